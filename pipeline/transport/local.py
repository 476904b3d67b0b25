"""Stages as threads of one process: a queue per directed edge and channel."""

from __future__ import annotations

from collections import defaultdict
from queue import Empty, Queue

from torch import Tensor

from pipeline.transport.protocol import CHANNELS, AtOnce, Tensors, Who

Queues = defaultdict[tuple[int, int, str], "Queue[tuple[int, Tensors]]"]


class LocalTransport(AtOnce):
    """One stage's end. Tensors are copied on the way, since the sender's graph still refers to its own."""

    def __init__(self, who: Who, queues: Queues, *, timeout_s: float) -> None:
        self._who = who
        self._queues, self._timeout_s = queues, timeout_s
        self.bytes_sent = 0

    def post(self, source: int, channel: str, microbatch: int) -> None:
        return None

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        self.bytes_sent += sum(tensor.nbytes for tensor in tensors)
        self._queues[self._who.stage, to, channel].put((microbatch, tuple(map(_copy, tensors))))

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        try:
            number, tensors = self._queues[source, self._who.stage, channel].get(timeout=self._timeout_s)
        except Empty:
            raise self._who.lost(source, channel, microbatch, self._timeout_s) from None
        if number != microbatch:
            raise self._who.wrong(source, channel, microbatch, number)
        return tensors

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def local_transports(
    stages: int, *, pipeline: int = 0, hosts: tuple[str, ...] = (), timeout_s: float = 300.0
) -> list[LocalTransport]:
    """One transport per stage, joined to each other."""
    queues: Queues = defaultdict(Queue)
    for source in range(stages):  # made here, so that threads only look them up
        for to in range(stages):
            for channel in CHANNELS:
                queues[source, to, channel]
    return [LocalTransport(Who(stage, pipeline, hosts), queues, timeout_s=timeout_s) for stage in range(stages)]
