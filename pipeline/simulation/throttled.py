"""Links with little bandwidth, over any transport: a message is handed out when its last byte would have arrived.

    stage 0    send A0, A1, compute ...             sending never blocks
    link       [ A0 ....... ][ A1 ....... ]         bytes / bandwidth each, one after another in each direction
    stage 1                  A0            A1       recv waits for that moment

Messages travel at once, as fast as the transport below can, and carry the time at which they are due in a stamp of two
numbers; the receiver waits for it. The other way, a thread that holds messages back in the sender, would call the
transport below while the stage's own thread waits in its `recv`, and none of them allows for that: MPI's and Gloo's
ends are not locked, and a `recv` that held a lock would keep back the very message its peer waits for. So all calls
stay on one thread. Stamps are times of day: exact on one host, and between hosts as good as their clocks agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.placement import Place
from pipeline.simulation.profile import Profile
from pipeline.transport.protocol import HOST_CHANNELS, Tensors, Transport

HOST = torch.device("cpu")


class ThrottledTransport:
    """Wraps `inner`; both ends of a limited link must be wrapped with the same limits.

    Args:
        stage: whose transport this is.
        limits: (source, to) -> bytes per second; links that are not named are left alone.
        device: where `inner` wants its tensors. synchronize: waits until what is about to be sent has been computed.

    Attributes:
        limited: whether messages sent from now on take their time; not inside `unlimited`.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        stage: int,
        limits: Mapping[tuple[int, int], float],
        device: torch.device | None = None,
        synchronize: Callable[[], object] = lambda: None,
        now_ns: Callable[[], int] = time.time_ns,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._inner, self._device = inner, device or HOST
        self._outgoing = {to: rate for (source, to), rate in limits.items() if source == stage}
        self._incoming = frozenset(source for source, to in limits if to == stage)
        self._free_ns = dict.fromkeys(self._outgoing, 0)  # when a link will have carried what it was given
        self._stamp_bytes = 0
        self._synchronize, self._now_ns, self._wait = synchronize, now_ns, wait
        self.limited = True

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent - self._stamp_bytes

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self._inner.bytes_sent = value + self._stamp_bytes

    def post(self, source: int, channel: str, microbatch: int) -> None:
        self._inner.post(source, channel, microbatch)

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        if to in self._outgoing:
            self._synchronize()
            device = HOST if channel in HOST_CHANNELS else self._device
            tensors = (*tensors, self._stamp(to, sum(tensor.nbytes for tensor in tensors), device))
        self._inner.send(to, channel, microbatch, tensors)

    def _stamp(self, to: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """When the message is due, and how long it is on its way: (2,) int64, in nanoseconds."""
        now_ns = self._now_ns()
        due_ns = now_ns
        if self.limited:
            due_ns = max(now_ns, self._free_ns[to]) + round(1e9 * nbytes / self._outgoing[to])
            self._free_ns[to] = due_ns
        stamp = torch.tensor([due_ns, due_ns - now_ns], device=device)
        self._stamp_bytes += stamp.nbytes
        return stamp

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        tensors = self._inner.recv(source, channel, microbatch)
        if source not in self._incoming:
            return tensors
        due_ns, way_ns = tensors[-1].tolist()
        self._wait_ns(min(due_ns - self._now_ns(), way_ns))  # clocks that disagree cannot make it longer than its way
        return tensors[:-1]

    def _wait_ns(self, left_ns: int) -> None:
        if left_ns > 0:
            self._wait(left_ns / 1e9)

    def release(self) -> None:
        self._inner.release()

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        self.limited = False
        try:
            with self._inner.unlimited():
                yield
        finally:
            self.limited = True

    def flush(self) -> None:
        self._inner.flush()
        if self.limited:
            self._wait_ns(max(self._free_ns.values(), default=0) - self._now_ns())

    def close(self) -> None:
        self._inner.close()


def throttled(
    inner: Transport, profile: Profile, row: Sequence[Place], *, stage: int, device: torch.device | None = None
) -> Transport:
    """`inner` with the limits of `profile` on the links of a pipeline; `inner` itself where there are none.

    Args:
        row: the stages of this pipeline, in order; the same on all of them.
        device: where the stage computes, and `inner` takes tensors.
    """
    limits = profile.edges(row)
    if not any(stage in edge for edge in limits):
        return inner
    options: dict[str, Any] = {}
    if device is not None and device.type == "cuda":
        options = {"device": device, "synchronize": torch.cuda.current_stream(device).synchronize}
    return ThrottledTransport(inner, stage=stage, limits=limits, **options)
