"""Stages as MPI ranks, through mpi4py: the fastest way between processes of a host, and over fabrics that MPI knows.

A message whose layouts are those of the previous one on its channel is one MPI message per tensor and nothing else. Its
first tensor is received straight into memory laid out as last time, posted ahead. Other layouts are announced by an
empty message, which fits whatever is posted:

    tag = 2 * (microbatch mod 2^14)        the tensors, each in pieces of at most 1 GiB
    tag = 2 * (microbatch mod 2^14) + 1    nothing, then a description of the tensors that follow

MPI keeps the order of messages between two ranks of a communicator, and every channel has a communicator of its own, so
tags serve only to tell announcements and to check the micro-batch.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PeerLost
from pipeline.transport.pool import Ring, Slot
from pipeline.transport.protocol import CHANNELS, AtOnce, Layout, Tensors, Who, dense, describe, layout_of, undescribe

POSTED_AHEAD = "AG"  # channels of which the next message is always expected
PIECE_BYTES = 1 << 30  # MPI counts in 32 bits
SPIN_S = 1e-3  # how long a wait keeps its core where there are cores to spare
YIELD_S = 5e-5  # how long it offers its core to others, over and over, where there are not
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2e-5, 1e-3
_MICROBATCHES = 1 << 14
_NOTHING = Layout(torch.uint8, torch.Size([0]), (1,))


class _Outbox:
    """The sending end of a channel: how the last message was laid out."""

    __slots__ = ("isend", "layouts")

    def __init__(self, isend: Callable[[Any, int, int], Any]) -> None:
        self.isend = isend
        self.layouts: tuple[tuple[torch.dtype, torch.Size, tuple[int, ...], int], ...] = ()

    def fits(self, tensors: Tensors) -> bool:
        """Whether a message needs no announcement."""
        layouts = self.layouts
        if len(tensors) != len(layouts) or not tensors:
            return False
        for tensor, (dtype, shape, stride, _) in zip(tensors, layouts, strict=True):
            if tensor.shape != shape or tensor.stride() != stride or tensor.dtype is not dtype:
                return False
        return True


class _Inbox:
    """The receiving end of a channel: memory laid out like the last message, and the receive posted for the next."""

    __slots__ = ("ahead", "communicator", "first", "posted", "rest", "source")

    def __init__(self, communicator: Any, source: int, first: Ring, *, ahead: bool) -> None:
        self.communicator, self.source, self.ahead = communicator, source, ahead
        self.first, self.rest = first, tuple[Ring, ...]()
        self.posted: Slot | None = None

    def post(self) -> Slot:
        """Expects the next message, or its announcement."""
        self.posted = slot = self.first.take()
        slot.request.Start()
        return slot


class MpiTransport(AtOnce):
    """The transport of one stage.

    Args:
        communicator: mpi4py communicator whose rank s is stage s of this pipeline; duplicated here, by all together.
        who: this stage, for messages.
        timeout_s: how long a receive waits.
        oversubscribed: more ranks than cores; waiting then gives the core away at once.
        remote: stages on other hosts; a thread keeps messages from and to them moving while this stage computes.
        piece_bytes: the largest message that MPI is given.
    """

    def __init__(
        self,
        communicator: Any,
        *,
        who: Who,
        timeout_s: float = 300.0,
        oversubscribed: bool = False,
        remote: frozenset[int] = frozenset(),
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._who, self._timeout_s = MPI, who, timeout_s
        self._piece_bytes = piece_bytes
        self._memory = MPI.buffer.fromaddress
        self._communicators = {channel: communicator.Dup() for channel in CHANNELS}
        self._inboxes: dict[tuple[int, str], _Inbox] = {}
        self._outboxes: dict[tuple[int, str], _Outbox] = {}
        self._pending: deque[tuple[Any, object]] = deque()
        self._status = MPI.Status()
        self._spin = partial(_offer_core, YIELD_S) if oversubscribed else partial(_keep_core, SPIN_S)
        self.bytes_sent = 0
        self._closed = threading.Event()
        self._mover = threading.Thread(target=self._keep_moving, daemon=True, name="mpi-progress")
        if remote:
            self._mover.start()

    # --- sending

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        if self._pending:
            self._reap()
        outbox = self._outboxes.get((to, channel))
        if outbox is None:
            outbox = self._outboxes[to, channel] = _Outbox(self._communicators[channel].Isend)
        tag = 2 * (microbatch % _MICROBATCHES)
        if not outbox.fits(tensors):
            tensors = self._announce(outbox, to, tag + 1, tensors)
        for tensor, (_, _, _, nbytes) in zip(tensors, outbox.layouts, strict=True):
            self.bytes_sent += nbytes
            if nbytes <= self._piece_bytes:
                request = outbox.isend(self._memory(tensor.data_ptr(), nbytes), to, tag)
                self._pending.append((request, tensor))
            else:
                for piece in self._pieces(tensor.data_ptr(), nbytes):
                    self._pending.append((outbox.isend(piece, to, tag), tensor))

    def _announce(self, outbox: _Outbox, to: int, tag: int, tensors: Tensors) -> Tensors:
        """Tells the receiver of new layouts; returns the tensors in that layout."""
        tensors = tuple(dense(tensor) for tensor in tensors)
        layouts = tuple(layout_of(tensor) for tensor in tensors)
        outbox.layouts = tuple((*layout, layout.nbytes) for layout in layouts)
        numbers = describe(layouts)
        for text in (b"", struct.pack(f"<{len(numbers)}q", *numbers)):
            self._pending.append((outbox.isend(text, to, tag), text))
        return tensors

    def _pieces(self, address: int, nbytes: int) -> list[Any]:
        """The memory in pieces that MPI can count; one piece for a tensor without elements."""
        size = self._piece_bytes
        return [self._memory(address + at, min(size, nbytes - at)) for at in range(0, max(1, nbytes), size)]

    def _reap(self) -> None:
        """Lets go of what has been sent."""
        pending = self._pending
        while pending and pending[0][0].Test():
            pending.popleft()

    def flush(self) -> None:
        if not self._wait(self._all_sent):
            raise PeerLost(
                f"stage {self._who.stage} of pipeline {self._who.pipeline} waited {self._timeout_s:g} s "
                f"for {len(self._pending)} messages to be taken"
            )

    def _all_sent(self) -> bool:
        self._reap()
        return not self._pending

    # --- receiving

    def post(self, source: int, channel: str, microbatch: int) -> None:
        return None  # the next receive of every known channel is always posted

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        inbox = self._inboxes.get((source, channel))
        if inbox is None:
            inbox = self._inboxes[source, channel] = self._open(source, channel)
        slot = inbox.posted or inbox.post()
        self._finish(slot, source, channel, microbatch)
        if self._status.tag != 2 * (microbatch % _MICROBATCHES):
            return self._announced(inbox, source, channel, microbatch)
        first = slot.fresh()
        tensors = (
            (first, *(self._take(ring, source, channel, microbatch) for ring in inbox.rest)) if inbox.rest else (first,)
        )
        if inbox.ahead:
            inbox.post()
        else:
            inbox.posted = None
        return tensors

    def _open(self, source: int, channel: str) -> _Inbox:
        communicator = self._communicators[channel]
        return _Inbox(communicator, source, self._ring(communicator, source, _NOTHING), ahead=channel in POSTED_AHEAD)

    def _announced(self, inbox: _Inbox, source: int, channel: str, microbatch: int) -> Tensors:
        """The message that follows an announcement; an error if it is another than expected."""
        tag = self._status.tag
        if tag >> 1 != microbatch % _MICROBATCHES:
            ahead = (tag >> 1) - microbatch + _MICROBATCHES // 2
            raise self._who.wrong(source, channel, microbatch, microbatch + ahead % _MICROBATCHES - _MICROBATCHES // 2)
        layouts = self._description(inbox.communicator, source, channel, microbatch)
        for ring in (inbox.first, *inbox.rest):
            ring.clear()
        rings = [self._ring(inbox.communicator, source, layout) for layout in layouts or (_NOTHING,)]
        inbox.first, inbox.rest = rings[0], tuple(rings[1:])
        tensors = tuple(self._take(ring, source, channel, microbatch) for ring in rings[: len(layouts)])
        inbox.posted = None
        if inbox.ahead:
            inbox.post()
        return tensors

    def _description(self, communicator: Any, source: int, channel: str, microbatch: int) -> tuple[Layout, ...]:
        if not self._wait(partial(communicator.Iprobe, source, self._mpi.ANY_TAG, self._status)):
            raise self._who.lost(source, channel, microbatch, self._timeout_s)
        text = bytearray(self._status.count)
        communicator.Recv(text, source)
        return undescribe(list(struct.unpack(f"<{len(text) // 8}q", text)))

    def _ring(self, communicator: Any, source: int, layout: Layout) -> Ring:
        """Memory for tensors of a layout, with requests that receive into it."""

        def prepare(slot: Slot) -> None:
            pieces = self._pieces(slot.flat.data_ptr(), layout.nbytes)
            slot.request, *more = [communicator.Recv_init(piece, source, self._mpi.ANY_TAG) for piece in pieces]
            slot.more = tuple(more)

        return Ring(layout, prepare=prepare, discard=_free)

    def _take(self, ring: Ring, source: int, channel: str, microbatch: int) -> Tensor:
        slot = ring.take()
        slot.request.Start()
        self._finish(slot, source, channel, microbatch)
        return slot.fresh()

    def _finish(self, slot: Slot, source: int, channel: str, microbatch: int) -> None:
        """Waits until a tensor is there; its tag is then in the status."""
        self._await(slot.request, source, channel, microbatch)
        if slot.more and not self._status.tag & 1:
            for request in slot.more:
                request.Start()
                self._await(request, source, channel, microbatch)

    def _await(self, request: Any, source: int, channel: str, microbatch: int) -> None:
        if not request.Test(self._status) and not self._wait(partial(request.Test, self._status)):
            raise self._who.lost(source, channel, microbatch, self._timeout_s)

    def _wait(self, test: Callable[[], bool]) -> bool:
        """Waits for `test`, at first without giving up the core, then in growing pauses; False at the deadline."""
        deadline = time.perf_counter() + self._timeout_s
        if self._spin(test):
            return True
        pause = SHORTEST_PAUSE_S
        while not test():
            if time.perf_counter() >= deadline:
                return False
            self._reap()
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_S)
        return True

    # --- the rest

    def _keep_moving(self) -> None:
        """Between hosts a large message moves only while its ends call into MPI: does so every millisecond."""
        communicator = self._communicators["A"]
        while not self._closed.wait(1e-3):
            communicator.Iprobe()

    def close(self) -> None:
        self._closed.set()
        if self._mover.is_alive():
            self._mover.join()
        for inbox in self._inboxes.values():
            if inbox.posted is not None:
                inbox.posted.request.Cancel()
                inbox.posted.request.Wait()
            for ring in (inbox.first, *inbox.rest):
                ring.clear()
        self._inboxes.clear()


def _free(slot: Slot) -> None:
    for request in (slot.request, *slot.more):
        request.Free()


def _keep_core(spin_s: float, test: Callable[[], bool]) -> bool:
    """Tests for some time without pause."""
    until = time.perf_counter() + spin_s
    while time.perf_counter() < until:
        if test() or test() or test() or test():
            return True
    return False


def _offer_core(spin_s: float, test: Callable[[], bool]) -> bool:
    """Tests for some time, letting others run between the tests."""
    until = time.perf_counter() + spin_s
    while time.perf_counter() < until:
        if test():
            return True
        os.sched_yield()
    return False
