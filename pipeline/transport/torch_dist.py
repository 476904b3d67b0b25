"""Stages as ranks of torch.distributed: Gloo for tensors on CPUs, and for the headers of tensors that NCCL carries.

A message like the one before it on its channel is one Gloo message, since each costs a round of wake-ups:

    small (<= 16 KiB)    header and tensors together
    large                each tensor by itself, straight into memory laid out as last time; no header

A header of its own comes before a large message that is not like the last one (other layouts, a micro-batch that does
not follow) or when there is something to acknowledge. Gloo cannot wait for one of two messages, so the receiver waits
for the tensor, and looks whether the header, which was posted and sent first, lies in its memory and is the one of this
message (Gloo keeps no order between tags; a later header may have come). A message of other layouts therefore sends a
byte in place of the tensor, to wake the receiver, then a description and its tensors.

Gloo does not say when a message has been taken without waiting for it. So headers carry how many messages of each
channel have been received from the peer, and what is known to be taken is let go.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import PeerLost
from pipeline.transport.nccl import NcclCarrier
from pipeline.transport.pool import Ring, Slot
from pipeline.transport.protocol import (
    CHANNELS,
    HOST_CHANNELS,
    AtOnce,
    Layout,
    Tensors,
    Who,
    bytes_of,
    dense,
    describe,
    layout_of,
    undescribe,
)

SMALL_BYTES = 16 << 10
BRIEF_BYTES = 256 << 10  # the receive after such a message is posted after the next send, which somebody waits for
POSTED_AHEAD = "AG"  # channels of which the next message is always expected
ACKNOWLEDGE_EVERY = 4  # messages from a peer
MOST_PENDING = 1024  # messages on one channel that nobody acknowledges; the next send waits for the oldest
# micro-batch + 1, numbers described or -1, place on the channel, messages received on each of the peer's channels
_HEADER = struct.Struct(f"<{3 + len(CHANNELS)}q")
_ALIGNED = 64
_EMPTY = bytes(8)
_TAG_HEADER, _TAG_TENSOR, _TAG_OTHER = 0, 1, 2
_NUMBER_OF = {channel: number for number, channel in enumerate(CHANNELS)}
_NONE_RECEIVED = [0] * len(CHANNELS)
_Alive = tuple[int, Any, Any]  # number of the message, work, what has to stay in memory


class _Envelope:
    """A header with room for the tensors of a small message; the views lie in it."""

    __slots__ = ("memory", "text", "views")

    def __init__(self, layouts: tuple[Layout, ...]) -> None:
        starts, at = [], _HEADER.size
        for layout in layouts:
            starts.append(at)
            at += -(-layout.nbytes // _ALIGNED) * _ALIGNED
        self.memory = torch.zeros(at, dtype=torch.uint8)
        self.text = self.memory.numpy().data
        self.views = [
            torch.as_strided(self.memory[start : start + layout.nbytes].view(layout.dtype), layout.shape, layout.stride)
            for start, layout in zip(starts, layouts, strict=True)
        ]

    @property
    def arrived(self) -> bool:
        """Whether a header was written here since `erase`."""
        return self.text[:8] != _EMPTY

    def erase(self) -> None:
        self.text[:8] = _EMPTY


class _Edge:
    """One end of a channel: how its last message was laid out and numbered, and who carries its tensors."""

    def __init__(self, peer: int, channel: str, carrier: NcclCarrier | None) -> None:
        self.peer, self.channel = peer, channel
        self.carrier = None if channel in HOST_CHANNELS else carrier
        self.tag = 3 * (1 + _NUMBER_OF[channel])
        self.layouts: tuple[Layout, ...] | None = None
        self.small = self.brief = True
        self.count = 0  # messages so far
        self.next_number = -1  # the micro-batch that follows

    def adopt(self, layouts: tuple[Layout, ...]) -> None:
        self.layouts = layouts
        nbytes = sum(layout.nbytes for layout in layouts)
        self.small, self.brief = self.carrier is None and nbytes <= SMALL_BYTES, nbytes <= BRIEF_BYTES


class _Outbox(_Edge):
    """The sending end: what has been sent and not been acknowledged, and envelopes to use again."""

    def __init__(self, peer: int, channel: str, carrier: NcclCarrier | None) -> None:
        super().__init__(peer, channel, carrier)
        self.taken = 0  # messages that the peer has received
        self.pending: deque[_Alive] = deque()
        self.envelopes: list[_Envelope] = []

    def fits(self, tensors: Tensors) -> bool:
        """Whether the message is laid out like the last one."""
        layouts = self.layouts
        if layouts is None or len(tensors) != len(layouts):
            return False
        for tensor, (dtype, shape, stride) in zip(tensors, layouts, strict=True):
            if tensor.shape != shape or tensor.stride() != stride or tensor.dtype is not dtype:
                return False
        return True


class _Inbox(_Edge):
    """The receiving end: the receives that are posted, and memory laid out like the last message."""

    def __init__(self, peer: int, channel: str, carrier: NcclCarrier | None) -> None:
        super().__init__(peer, channel, carrier)
        self.envelope = _Envelope(())
        self.header: Any = None
        self.tensor: tuple[Slot, Any] | None = None
        self.rings: tuple[Ring, ...] = ()

    def expect(self, layouts: tuple[Layout, ...]) -> None:
        """From now on messages are laid out like that."""
        self.adopt(layouts)
        self.envelope = _Envelope(layouts if self.small else ())
        self.rings = tuple(map(Ring, layouts))


class TorchTransport(AtOnce):
    """The transport of one stage over a Gloo group of its pipeline.

    Args:
        group: the pipeline's stages, in order; rank s of the group is stage s.
        who: this stage, for messages.
        timeout_s: how long a receive waits.
        carrier: what moves the tensors of devices; Gloo itself where None, and on the channels of hosts.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        who: Who,
        timeout_s: float = 300.0,
        carrier: NcclCarrier | None = None,
    ) -> None:
        self._group, self._who, self._timeout_s = group, who, timeout_s
        self._timeout = timedelta(seconds=timeout_s)
        self._carrier = carrier
        self._outboxes: dict[tuple[int, str], _Outbox] = {}
        self._inboxes: dict[tuple[int, str], _Inbox] = {}
        self._to_post: list[_Inbox] = []
        self._received: dict[int, list[int]] = {}  # peer -> messages of every channel
        self._to_acknowledge: dict[int, int] = {}
        self.bytes_sent = 0

    # --- sending

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        outbox = self._outboxes.get((to, channel))
        if outbox is None:
            outbox = self._outboxes[to, channel] = _Outbox(to, channel, self._carrier)
        self._reap(outbox)
        outbox.count += 1
        if not outbox.fits(tensors):
            self._send_described(outbox, microbatch, tensors)
        elif outbox.small:
            self._send_small(outbox, microbatch, tensors)
        else:
            self._send_large(outbox, microbatch, tensors)
        outbox.next_number = microbatch + 1
        while self._to_post:
            self._post(self._to_post.pop())

    def _send_small(self, outbox: _Outbox, microbatch: int, tensors: Tensors) -> None:
        envelope = self._envelope(outbox, microbatch)
        for view, tensor in zip(envelope.views, tensors, strict=True):
            view.copy_(tensor.detach())
            self.bytes_sent += tensor.nbytes
        self._isend(outbox, envelope.memory, _TAG_HEADER, envelope)

    def _send_large(self, outbox: _Outbox, microbatch: int, tensors: Tensors) -> None:
        due = self._to_acknowledge.get(outbox.peer, 0) >= ACKNOWLEDGE_EVERY
        if due or microbatch != outbox.next_number or outbox.carrier is not None:
            envelope = self._envelope(outbox, microbatch)
            self._isend(outbox, envelope.memory, _TAG_HEADER, envelope)
        self._send_tensors(outbox, tensors, _TAG_TENSOR)

    def _send_described(self, outbox: _Outbox, microbatch: int, tensors: Tensors) -> None:
        """Tells the receiver of new layouts, in a header as long as the old ones require at most."""
        wake = not outbox.small and outbox.carrier is None
        tensors = tuple(dense(tensor) for tensor in tensors)
        layouts = tuple(layout_of(tensor) for tensor in tensors)
        numbers = describe(layouts)
        outbox.adopt(layouts)
        outbox.envelopes.clear()
        header = _Envelope(())
        self._write(header, outbox, microbatch, len(numbers))
        self._isend(outbox, header.memory, _TAG_HEADER, None)
        if wake:
            self._isend(outbox, torch.zeros(1, dtype=torch.uint8), _TAG_TENSOR, None)
        if numbers:
            self._isend(outbox, torch.tensor(numbers, dtype=torch.int64), _TAG_OTHER, None)
        self._send_tensors(outbox, tensors, _TAG_OTHER)

    def _send_tensors(self, outbox: _Outbox, tensors: Tensors, tag: int) -> None:
        for tensor in tensors:
            self.bytes_sent += tensor.nbytes
            if outbox.carrier is not None:
                outbox.carrier.send(tensor, outbox.peer)
            elif tensor.nbytes:
                self._isend(outbox, bytes_of(tensor), tag, None)

    def _envelope(self, outbox: _Outbox, microbatch: int) -> _Envelope:
        """A header for a message laid out like the last one, with room for its tensors if they are small."""
        assert outbox.layouts is not None
        if outbox.envelopes:
            envelope = outbox.envelopes.pop()
        else:
            envelope = _Envelope(outbox.layouts if outbox.small else ())
        self._write(envelope, outbox, microbatch, -1)
        return envelope

    def _write(self, envelope: _Envelope, outbox: _Outbox, microbatch: int, description: int) -> None:
        received = self._received.get(outbox.peer, _NONE_RECEIVED)
        _HEADER.pack_into(envelope.text, 0, microbatch + 1, description, outbox.count, *received)
        self._to_acknowledge[outbox.peer] = 0

    def _isend(self, outbox: _Outbox, memory: Tensor, tag: int, envelope: _Envelope | None) -> None:
        work = self._group.send([memory], outbox.peer, outbox.tag + tag)
        outbox.pending.append((outbox.count, work, envelope or memory))

    def _reap(self, outbox: _Outbox) -> None:
        """Lets go of what has been taken."""
        pending = outbox.pending
        while pending and (pending[0][0] <= outbox.taken or len(pending) > MOST_PENDING):
            number, work, kept = pending.popleft()
            self._taken(work, outbox, number)
            if isinstance(kept, _Envelope) and len(kept.views) == len(outbox.layouts or ()):
                outbox.envelopes.append(kept)

    def _taken(self, work: Any, outbox: _Outbox, number: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerLost(
                f"stage {self._who.stage} of pipeline {self._who.pipeline} waited {self._timeout_s:g} s for stage "
                f"{outbox.peer} to take {CHANNELS[outbox.channel]} message {number}: {str(error).splitlines()[0]}"
            ) from error

    def flush(self) -> None:
        for outbox in self._outboxes.values():
            while outbox.pending:
                number, work, _ = outbox.pending.popleft()
                self._taken(work, outbox, number)
        if self._carrier is not None:
            self._carrier.flush()

    # --- receiving

    def post(self, source: int, channel: str, microbatch: int) -> None:
        inbox = self._inboxes.get((source, channel))
        if inbox is None:
            inbox = self._inboxes[source, channel] = _Inbox(source, channel, self._carrier)
        self._post(inbox)

    def _post(self, inbox: _Inbox) -> None:
        """Expects the next header and, of a large message, the first tensor; in this order."""
        if inbox.header is None and not inbox.envelope.arrived:
            inbox.header = self._irecv(inbox, inbox.envelope.memory, _TAG_HEADER)
        if not inbox.small and inbox.tensor is None and inbox.carrier is None:
            ring = next(ring for ring in inbox.rings if ring.layout.nbytes)
            slot = ring.take()
            inbox.tensor = slot, self._irecv(inbox, slot.flat, _TAG_TENSOR)

    def _irecv(self, inbox: _Inbox, memory: Tensor, tag: int) -> Any:
        return self._group.recv([memory], inbox.peer, inbox.tag + tag)

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        self.post(source, channel, microbatch)
        inbox = self._inboxes[source, channel]
        number, description = self._header(inbox, microbatch)
        if number != microbatch:
            raise self._who.wrong(source, channel, microbatch, number)
        if description >= 0:
            tensors = self._described(inbox, microbatch, description)
        elif inbox.small:
            tensors = tuple(view.clone() for view in inbox.envelope.views)
        else:
            tensors = self._tensors(inbox, microbatch, _TAG_TENSOR)
        self._count(inbox, microbatch)
        if inbox.channel in POSTED_AHEAD:
            self._to_post.append(inbox) if inbox.brief else self._post(inbox)
        return tensors

    def _header(self, inbox: _Inbox, microbatch: int) -> tuple[int, int]:
        """Waits for a message: its micro-batch, and the length of its description or -1."""
        if inbox.tensor is not None:
            self._await(inbox.tensor[1], inbox, microbatch)
            if not self._has_header(inbox, microbatch):
                return inbox.next_number, -1
        if inbox.header is not None:
            self._await(inbox.header, inbox, microbatch)
            inbox.header = None
        number, description, _, *taken = _HEADER.unpack_from(inbox.envelope.text)
        inbox.envelope.erase()
        for channel, count in zip(CHANNELS, taken, strict=True):
            if count:
                self._outboxes[inbox.peer, channel].taken = count
        return number - 1, description

    def _has_header(self, inbox: _Inbox, microbatch: int) -> bool:
        """Whether the header that has come is that of the next message; a later one stays where it is."""
        if not inbox.envelope.arrived:
            return False
        if inbox.header is not None:
            self._await(inbox.header, inbox, microbatch)
            inbox.header = None
        return bool(_HEADER.unpack_from(inbox.envelope.text)[2] == inbox.count + 1)

    def _described(self, inbox: _Inbox, microbatch: int, length: int) -> Tensors:
        """The message after a header with a description."""
        numbers = torch.empty(length, dtype=torch.int64)
        if length:
            self._await(self._irecv(inbox, numbers, _TAG_OTHER), inbox, microbatch)
        inbox.tensor = None
        inbox.expect(undescribe(numbers.tolist()))
        return self._tensors(inbox, microbatch, _TAG_OTHER)

    def _tensors(self, inbox: _Inbox, microbatch: int, tag: int) -> Tensors:
        """The tensors of a large message, the first of which may have come."""
        if inbox.carrier is not None:
            return tuple(inbox.carrier.recv(ring.layout, inbox.peer) for ring in inbox.rings)
        tensors = []
        for ring in inbox.rings:
            if inbox.tensor is not None and ring.layout.nbytes:
                slot, inbox.tensor = inbox.tensor[0], None
            else:
                slot = ring.take()
                if ring.layout.nbytes:
                    self._await(self._irecv(inbox, slot.flat, tag), inbox, microbatch)
            tensors.append(slot.fresh())
        return tuple(tensors)

    def _count(self, inbox: _Inbox, microbatch: int) -> None:
        inbox.next_number = microbatch + 1
        inbox.count += 1
        received = self._received.setdefault(inbox.peer, _NONE_RECEIVED.copy())
        received[_NUMBER_OF[inbox.channel]] += 1
        self._to_acknowledge[inbox.peer] = self._to_acknowledge.get(inbox.peer, 0) + 1

    def _await(self, work: Any, inbox: _Inbox, microbatch: int) -> None:
        start = time.monotonic()
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            # at most the deadline: on a busy machine this thread may learn of it a little later
            waited_s = min(time.monotonic() - start, self._timeout.total_seconds())
            why = str(error).splitlines()[0]
            raise self._who.lost(inbox.peer, inbox.channel, microbatch, waited_s, why) from error

    def close(self) -> None:
        self._inboxes.clear()
        self._outboxes.clear()
        self._to_post.clear()
