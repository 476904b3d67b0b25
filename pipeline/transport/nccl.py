"""Tensors between GPUs over NCCL; the headers of their messages travel over Gloo (torch_dist.py)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.transport.protocol import Layout, bytes_of


class NcclCarrier:
    """Moves tensors between GPUs: one NCCL group per directed edge, on a stream of its own.

    A receive is only issued once its header has come, so a kernel never waits for a message that nobody sends. The
    computing stream waits for what it needs; the host does not.

    Args:
        edges: (source stage, destination stage) -> two-rank NCCL group, with this process in it.
        stage: this stage. ranks: global rank of every stage.
    """

    def __init__(
        self, edges: dict[tuple[int, int], dist.ProcessGroup], *, stage: int, ranks: list[int], device: torch.device
    ) -> None:
        self._edges, self._stage, self._ranks, self._device = edges, stage, ranks, device
        self._streams: dict[tuple[int, int], Any] = {edge: torch.cuda.Stream(device) for edge in edges}  # type: ignore[no-untyped-call]
        self._pending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends once the computing stream has made `tensor`."""
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()
        edge = (self._stage, to)
        stream = self._streams[edge]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            flat = bytes_of(tensor)
            work = dist.isend(flat, dst=self._ranks[to], group=self._edges[edge])
            flat.record_stream(stream)
        self._pending.append((work, tensor))

    def recv(self, layout: Layout, source: int) -> Tensor:
        """Memory that the computing stream may use as soon as it gets to it."""
        edge = (source, self._stage)
        stream = self._streams[edge]
        with torch.cuda.stream(stream):
            memory = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=self._device)
            work = dist.irecv(bytes_of(memory), src=self._ranks[source], group=self._edges[edge])
            if work is not None:
                work.wait()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(stream)
        memory.record_stream(current)
        return memory

    def flush(self) -> None:
        """Waits until everything has been taken."""
        while self._pending:
            self._pending.popleft()[0].wait()
        for stream in self._streams.values():
            stream.synchronize()
