"""Memory for received tensors that is used again once nobody refers to it any more.

A received tensor has to be fresh, since autograd may keep it for long. Making one costs more than a small transfer, and
its pages, cleared by the system when first touched, more than a large one. So tensors of one layout are made once, and
what is handed out shares its memory with the one kept here:

    slot    kept  ----\
                       storage     references to it: the kept ones alone -> idle, to be handed out again
    recv    fresh ----/            views, saved tensors and detached copies count, whoever holds them
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from sys import getrefcount
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.transport.protocol import Layout, bytes_of

MOST_SIZES = 8  # sizes whose memory is kept for the next tensor
MOST_SLOTS = 64  # a ring forgets its oldest slot beyond that; more are in use only where somebody keeps everything


class Slot(Protocol):
    """A tensor of a fixed layout, its bytes, and the request that receives into it (the transport's affair)."""

    tensor: Tensor
    flat: Tensor
    request: Any
    more: tuple[Any, ...]

    @property
    def idle(self) -> bool:
        """Whether nobody else refers to the memory, be it through a tensor or through the storage itself."""

    def fresh(self) -> Tensor:
        """The tensor to hand out; the slot is not idle while any tensor made from it lives."""


class CountingSlot:
    """Asks torch how many refer to the storage; only builds of torch for GPUs can tell."""

    __slots__ = ("_address", "_idle_holders", "_idle_references", "_storage", "flat", "more", "request", "tensor")

    def __init__(self, layout: Layout) -> None:
        self.tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)
        self.flat = bytes_of(self.tensor)
        self.request: Any = None
        self.more: tuple[Any, ...] = ()
        self._storage = self.tensor.untyped_storage()
        self._address = self._storage._cdata
        self._idle_references = torch._C._storage_Use_Count(self._address)
        self._idle_holders = getrefcount(self._storage)

    @property
    def idle(self) -> bool:
        return (
            torch._C._storage_Use_Count(self._address) == self._idle_references
            and getrefcount(self._storage) == self._idle_holders
        )

    def fresh(self) -> Tensor:
        return self.tensor.detach()


class LendingSlot:
    """Lends the memory of an array; every tensor made from it refers to the array. Some 3 us slower."""

    __slots__ = ("_array", "_idle_holders", "_layout", "flat", "more", "request", "tensor")

    def __init__(self, layout: Layout) -> None:
        self._layout, self._array = layout, np.empty(layout.nbytes, dtype=np.uint8)
        self.request: Any = None
        self.more: tuple[Any, ...] = ()
        self.tensor = self.fresh()
        self.flat = bytes_of(self.tensor)
        self._idle_holders = getrefcount(self._array)

    @property
    def idle(self) -> bool:
        return getrefcount(self._array) == self._idle_holders

    def fresh(self) -> Tensor:
        dtype, shape, stride = self._layout
        if not self._layout.nbytes:
            return torch.empty_strided(shape, stride, dtype=dtype)
        return torch.frombuffer(self._array, dtype=dtype).as_strided(shape, stride)


def best_slot() -> Callable[[Layout], Slot]:
    """The kind of slot for this build of torch."""
    return CountingSlot if hasattr(torch._C, "_storage_Use_Count") else LendingSlot


class Ring:
    """Slots of one layout, the one handed out longest ago first.

    Args:
        prepare: called with every new slot. discard: called with a slot that is given up. make: the kind of slot.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        prepare: Callable[[Slot], object] = lambda slot: None,
        discard: Callable[[Slot], object] = lambda slot: None,
        make: Callable[[Layout], Slot] | None = None,
    ) -> None:
        self.layout, self._make_slot = layout, make or best_slot()
        self._prepare, self._discard = prepare, discard
        self._slots: deque[Slot] = deque()

    def __len__(self) -> int:
        return len(self._slots)

    def take(self) -> Slot:
        """A slot whose memory nobody refers to, of undefined content."""
        slots = self._slots
        for _ in range(len(slots)):
            slots.rotate(-1)
            if slots[-1].idle:
                return slots[-1]
        return self._make()

    def _make(self) -> Slot:
        if len(self._slots) == MOST_SLOTS:
            self._discard(self._slots.popleft())
        slot = self._make_slot(self.layout)
        self._prepare(slot)
        self._slots.append(slot)
        return slot

    def clear(self) -> None:
        """Gives up every slot; tensors handed out stay good."""
        while self._slots:
            self._discard(self._slots.pop())


class Memory:
    """Memory by size, used again once nobody refers to it; for several threads. Copies of it share nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings: OrderedDict[int, Ring] = OrderedDict()

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 of undefined content, aligned for any dtype."""
        with self._lock:
            if nbytes not in self._rings:
                self._rings[nbytes] = Ring(Layout(torch.uint8, torch.Size((nbytes,)), (1,)))
            self._rings.move_to_end(nbytes)
            if len(self._rings) > MOST_SIZES:
                self._rings.popitem(last=False)
            return self._rings[nbytes].take().fresh()

    def like(self, x: Tensor) -> Tensor:
        """(n,) of x's dtype, n its number of elements, in host memory, of undefined content."""
        return self.take(x.nbytes).view(x.dtype)

    def __deepcopy__(self, memo: object) -> Memory:
        return Memory()
