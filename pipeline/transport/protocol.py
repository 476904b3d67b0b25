"""What the executor asks of a transport, and what all transports share: names of channels, layouts, deadlines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.errors import PeerLost

Tensors = tuple[Tensor, ...]

CHANNELS: Mapping[str, str] = {
    "A": "activation",
    "G": "gradient",
    "T": "tied gradient",
    "W": "tied weight",
    "N": "norm",
    "C": "ticket",
}
HOST_CHANNELS = frozenset("NC")  # numbers that hosts decide by: in host memory on both ends, whatever the device
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


class Transport(Protocol):
    """Messages of tensors between the stages of one pipeline.

    Messages of one (source, destination, channel) arrive in order. Sending never blocks; receiving has a deadline.
    """

    bytes_sent: int

    def post(self, source: int, channel: str, microbatch: int) -> None:
        """Announces that this message will be received soon; may be ignored, may be called twice."""

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        """Sends `tensors` to stage `to`; the caller does not write to them afterwards."""

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        """The tensors that stage `source` sent, in memory of their own.

        Raises:
            PeerLost: nothing came before the deadline, or another micro-batch than expected.
        """

    def release(self) -> None:
        """Lets go of what is ready to leave, for a stage that will not call for a while; waits for nothing."""

    def flush(self) -> None:
        """Waits until everything sent has left this process (with the same deadline)."""

    def unlimited(self) -> AbstractContextManager[object]:
        """Whatever is sent inside travels at full speed, also over links that are slow for a simulation."""

    def close(self) -> None:
        """Gives up what is still posted."""


class AtOnce:
    """The part of a `Transport` that holds nothing back."""

    def release(self) -> None:
        return None

    def unlimited(self) -> AbstractContextManager[object]:
        return nullcontext()


class Layout(NamedTuple):
    """How a dense tensor lies in memory; equal layouts need no description on the wire."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.dtype, tensor.shape, tensor.stride())


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as (n,) uint8, in the order it lies there."""
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).view(torch.uint8)


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if its elements fill one piece of memory (in any order, as channels_last does), else a copy."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def describe(layouts: tuple[Layout, ...]) -> list[int]:
    """Layouts as plain integers: dtype number, rank, shape, stride of each.

    Raises:
        ValueError: a dtype that cannot be sent.
    """
    numbers = []
    for layout in layouts:
        if layout.dtype not in DTYPES:
            raise ValueError(f"a tensor of {layout.dtype} {tuple(layout.shape)} cannot be sent; convert it first")
        numbers += [DTYPES.index(layout.dtype), len(layout.shape), *layout.shape, *layout.stride]
    return numbers


def undescribe(numbers: list[int]) -> tuple[Layout, ...]:
    """The inverse of `describe`."""
    layouts, at = [], 0
    while at < len(numbers):
        dtype, rank = DTYPES[numbers[at]], numbers[at + 1]
        shape = numbers[at + 2 : at + 2 + rank]
        stride = numbers[at + 2 + rank : at + 2 + 2 * rank]
        layouts.append(Layout(dtype, torch.Size(shape), tuple(stride)))
        at += 2 + 2 * rank
    return tuple(layouts)


@dataclass(frozen=True)
class Who:
    """Who is on either end, for messages: this stage, its pipeline, and the hosts of the pipeline's stages."""

    stage: int = 0
    pipeline: int = 0
    hosts: tuple[str, ...] = field(default=())

    def lost(self, source: int, channel: str, microbatch: int, timeout_s: float, why: str = "") -> PeerLost:
        """The error when a message does not come."""
        where = f" ({self.hosts[source]})" if source < len(self.hosts) else ""
        return PeerLost(
            f"stage {self.stage} of pipeline {self.pipeline} waited {round(timeout_s, 1):g} s for {CHANNELS[channel]} "
            f"{microbatch} from stage {source}{where}" + (f": {why}" if why else "")
        )

    def wrong(self, source: int, channel: str, expected: int, got: int) -> PeerLost:
        """The error when another micro-batch comes."""
        return PeerLost(
            f"stage {self.stage} of pipeline {self.pipeline} expected {CHANNELS[channel]} {expected} "
            f"from stage {source}, got {got}"
        )
