"""Values as JSON over a process group: nothing that comes over a network is unpickled.

    every rank ── length of its text, negative for an error's ──► all ranks
               ── text, padded to the longest ──────────────────► all ranks; or, without errors, the one that gathers

A `UserError` that is given as a value is raised, the same, on every rank, and so is the error of a value that cannot
be sent: a rank that fails alone would leave the others waiting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.outside import parse_json
from pipeline.errors import Forged, UserError

MAX_BYTES = 64 << 20  # of one value
_CPU = torch.device("cpu")
_VALUE = b'["value",'


def gather_values(value: Any, group: dist.ProcessGroup | None, *, device: torch.device = _CPU) -> list[Any]:
    """Every rank's value, in the order of the group's ranks; called by all of them.

    Args:
        value: None, bool, int, float, str, and lists, tuples and dicts with text as keys of these; tuples come back as
            lists. A `UserError` is raised on every rank.
        group: None is this process alone.
        device: where the tensors lie that are sent; NCCL needs its GPU.

    Raises:
        UserError: the one that a rank gave; of several the first rank's.
        TypeError: a rank's value is no JSON, or is longer than MAX_BYTES.
        Forged: what came is no such value.
    """
    mine = _encoded(value)
    if group is None:
        return [_decoded(mine, 0)]
    return _meet(mine, group, device).gathered(group)


def gather_values_at(
    value: Any, group: dist.ProcessGroup | None, *, receiver: int, device: torch.device = _CPU
) -> list[Any] | None:
    """As `gather_values` on the receiver, a rank of the group; None on the others, who raise the same errors."""
    mine = _encoded(value)
    if group is None:
        return [_decoded(mine, 0)]
    texts = _meet(mine, group, device)
    if texts.errors:
        return texts.gathered(group)
    root = dist.get_global_rank(group, receiver)
    found = texts.empty() if dist.get_rank(group) == receiver else None
    dist.gather(texts.mine, found, dst=root, group=group)
    return None if found is None else texts.decoded(found)


def broadcast_value(value: Any, group: dist.ProcessGroup | None, *, source: int, device: torch.device = _CPU) -> Any:
    """The value of the source, a rank of the group; called by all of them. Arguments and errors as `gather_values`."""
    if group is None:
        return _decoded(_encoded(value), 0)
    root, text = dist.get_global_rank(group, source), None
    if dist.get_rank(group) == source:
        text = _tensor(_encoded(value), device)
    length = torch.tensor([0 if text is None else text.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, src=root, group=group)
    if text is None:
        text = torch.empty(_checked(int(length), source), dtype=torch.uint8, device=device)
    dist.broadcast(text, src=root, group=group)
    return _decoded(_bytes(text), source)


class _Texts:
    """The texts of all ranks under way, padded to one length."""

    def __init__(self, mine: bytes, lengths: Sequence[int], device: torch.device) -> None:
        self.errors = any(length < 0 for length in lengths)
        self._lengths = [_checked(abs(length), rank) for rank, length in enumerate(lengths)]
        self._longest, self._device = max(self._lengths), device
        self.mine = _tensor(mine.ljust(self._longest), device)

    def empty(self) -> list[Tensor]:
        """Where the texts of all ranks are to arrive."""
        return [torch.empty(self._longest, dtype=torch.uint8, device=self._device) for _ in self._lengths]

    def gathered(self, group: dist.ProcessGroup) -> list[Any]:
        found = self.empty()
        dist.all_gather(found, self.mine, group=group)
        return self.decoded(found)

    def decoded(self, found: Sequence[Tensor]) -> list[Any]:
        pairs = zip(found, self._lengths, strict=True)
        return [_decoded(_bytes(text[:length]), rank) for rank, (text, length) in enumerate(pairs)]


def _meet(mine: bytes, group: dist.ProcessGroup, device: torch.device) -> _Texts:
    """Tells everybody the length of this rank's text."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    length = len(mine) if mine.startswith(_VALUE) else -len(mine)
    dist.all_gather(lengths, torch.tensor([length], dtype=torch.int64, device=device), group=group)
    return _Texts(mine, [int(length) for length in lengths], device)


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _checked(length: int, rank: int) -> int:
    if not 0 < length <= MAX_BYTES:
        raise Forged(f"rank {rank} of the group announced a value of {length} bytes; at most {MAX_BYTES} are taken")
    return length


def packed(value: Any) -> list[Any]:
    """The value with a word that says what it is: ["value", ...], ["mistake", text] or ["fault", text]; always JSON."""
    if isinstance(value, UserError):
        return ["mistake", str(value)]
    try:
        _check(value, "the value")
    except TypeError as error:
        return ["fault", " ".join(str(error).split())]
    except RecursionError:
        return ["fault", "the value is nested too deeply"]
    return ["value", value]


def unpacked(message: Any, sender: str) -> Any:
    """The inverse of `packed`; raises what `gather_values` raises."""
    try:
        word, value = message
        if word not in ("value", "mistake", "fault"):
            raise ValueError(f"no word that is known: {word!r:.20}")
    except (ValueError, TypeError) as error:
        raise Forged(f"{sender} sent what is no value of this job ({error})") from None
    if word == "mistake":
        raise UserError(str(value))
    if word == "fault":
        raise TypeError(f"{sender}: {value}")
    return value


def _encoded(value: Any) -> bytes:
    text = json.dumps(packed(value), separators=(",", ":")).encode()
    if len(text) > MAX_BYTES:
        return json.dumps(["fault", f"a value of {len(text)} bytes is longer than {MAX_BYTES}"]).encode()
    return text


def _check(value: Any, where: str) -> None:
    """Raises `TypeError` for what JSON refuses, or gives back as something else (a key that is no text)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r:.60}, which is no text, so that it is no JSON")
            _check(item, f"{where}[{key!r:.60}]")
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            _check(item, f"{where}[{at}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(f"{where} is a {type(value).__name__}, which is no JSON")


def _decoded(text: bytes, rank: int) -> Any:
    sender = f"rank {rank} of the group"
    try:
        message = parse_json(text)
    except ValueError as error:
        raise Forged(f"{sender} sent {len(text)} bytes that are no value of this job ({error})") from None
    return unpacked(message, sender)
