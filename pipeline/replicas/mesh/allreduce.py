"""One round of averaging, as one of its members sees it.

two       a <--- whole --> b                      each adds up the same parts in the same order
more      1. everybody sends chunk i to member i  (reduce-scatter; member i adds chunk i up)
          2. member i sends the sum to everybody  (all-gather)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import PeerLost
from pipeline.replicas.mesh.frames import Header, Kind, View, view_of
from pipeline.replicas.mesh.mailbox import Key, Mailbox
from pipeline.transport.pool import Memory
from pipeline.transport.protocol import bytes_of

SMALL_BYTES = 1 << 16  # up to here everybody sends everything to everybody: one exchange instead of two
BLOCK = 1 << 17  # elements


class Wires(Protocol):
    """What a round needs of the mesh."""

    pipeline: int
    memory: Memory  # for results

    def send(self, peer: int, header: Header, payload: View | bytes = b"") -> None: ...
    def is_cut(self, peer: int) -> bool: ...


class Round:
    """One round under way: what goes to and comes from its other members."""

    def __init__(self, mesh: Wires, mailbox: Mailbox, number: int, members: Mapping[int, int], deadline: float) -> None:
        self._mesh, self._mailbox, self._number, self._deadline = mesh, mailbox, number, deadline
        self._generations = members
        self._members = tuple(members)
        self._place = self._members.index(mesh.pipeline)
        self._others = self._members[self._place + 1 :] + self._members[: self._place]  # not all at the same one first

    def mean(self, x: Tensor, part: int) -> Tensor:
        """The mean of the members' x, (n,) in host memory."""
        direct = len(self._members) == 2 or x.nbytes <= SMALL_BYTES
        return self.exchange(x, part) if direct else self.scatter_gather(x, part)

    def exchange(self, x: Tensor, part: int) -> Tensor:
        """Everybody sends everything to everybody."""
        self.send_to_others(x, 2 * part)
        theirs = dict(zip(self._others, self.collect(self._others, 2 * part, x), strict=True))
        return mean_of([theirs.get(member, x) for member in self._members], self._mesh.memory.like(x))

    def scatter_gather(self, x: Tensor, part: int) -> Tensor:
        """Every member adds up its chunk and sends the mean to the others."""
        result = self._mesh.memory.like(x)
        chunks = dict(
            zip(self._members, zip(_split(x, self._members), _split(result, self._members), strict=True), strict=True)
        )
        for member in self._others:
            self._mailbox.post(Key(member, self._number, 2 * part + 1), bytes_of(chunks[member][1]))
        for member in self._others:
            self._send(member, 2 * part, chunks[member][0])
        mine, mean = chunks[self._mesh.pipeline]
        theirs = dict(zip(self._others, self.collect(self._others, 2 * part, mine), strict=True))
        mean_of([theirs.get(member, mine) for member in self._members], mean)
        self.send_to_others(mean, 2 * part + 1)
        targets = [chunks[member][1] for member in self._others]
        for target, came in zip(targets, self.collect(self._others, 2 * part + 1, *targets), strict=True):
            if came.data_ptr() != target.data_ptr():
                target.copy_(came)
        return result

    def send_to_others(self, x: Tensor, part: int) -> None:
        for member in self._others:
            self._send(member, part, x)

    def _send(self, member: int, part: int, x: Tensor) -> None:
        header = Header(Kind.PART, self._mesh.pipeline, self._mailbox.generation, self._number, part)
        self._mesh.send(member, header, view_of(x))

    def collect(self, senders: Sequence[int], part: int, *like: Tensor) -> list[Tensor]:
        """The parts of these members, shaped like `like`: one for each, or one for all."""
        keys = [Key(sender, self._number, part) for sender in senders]
        parts = self._mailbox.collect(keys, self._generations, deadline=self._deadline, probe=self._mesh.is_cut)
        return [
            shaped_like(memory, like[at % len(like)], f"pipeline {key.sender} sent in round {key.round}")
            for at, (key, memory) in enumerate(zip(keys, parts, strict=True))
        ]

    def give_up(self, lost: int) -> None:
        """Tells the others, who may wait for parts that will not come."""
        header = Header(Kind.GAVE_UP, self._mesh.pipeline, self._mailbox.generation, self._number, lost)
        for member in self._others:
            if member != lost:
                with contextlib.suppress(PeerLost):
                    self._mesh.send(member, header)


def mean_of(parts: Sequence[Tensor], result: Tensor) -> Tensor:
    """The mean of (n,) tensors of one dtype, added in order in float32 at least and rounded once, as `result`."""
    wide = result.dtype if result.dtype.itemsize >= 4 else torch.float32
    for start in range(0, result.numel(), BLOCK):  # what stays in the cache is divided there
        first, *rest = (part[start : start + BLOCK].to(wide) for part in parts)
        block = result[start : start + BLOCK]
        total = block if block.dtype == wide else torch.empty_like(first)
        torch.add(first, rest[0], out=total)
        for part in rest[1:]:
            total += part
        total /= len(parts)
        if total is not block:
            block.copy_(total)
    return result


def _split(x: Tensor, members: Sequence[int]) -> list[Tensor]:
    """One chunk of x per member, as equal as can be."""
    count = len(members)
    return [x[x.numel() * at // count : x.numel() * (at + 1) // count] for at in range(count)]


def shaped_like(memory: Tensor, like: Tensor, what: str) -> Tensor:
    if memory.nbytes != like.nbytes:
        raise ValueError(f"{what} {memory.nbytes} bytes, expected {like.nbytes}: the replicas' models differ")
    return memory.view(like.dtype)
