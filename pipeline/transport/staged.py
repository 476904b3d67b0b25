"""Tensors on a GPU over a transport for CPUs, through pinned host memory: for ranks that share a GPU, or MPI.

A send copies to the host on a stream of its own and leaves once the copy is done; nobody waits for it but the next
receive, before which everything that is due is sent (or two stages could wait for each other's copies).
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch

from pipeline.transport.protocol import HOST_CHANNELS, Tensors, Transport


class StagedTransport:
    """Wraps `inner`, whose tensors live in host memory; what it hands out lives on `device`."""

    def __init__(self, inner: Transport, device: torch.device) -> None:
        self._inner, self._device = inner, device
        self._stream: Any = _stream(device)  # to the host
        self._inbound: Any = _stream(device)  # from there, so that a copy does not wait for one the other way
        self._due: deque[tuple[Any, tuple[int, str, int, Tensors]]] = deque()

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @bytes_sent.setter
    def bytes_sent(self, value: int) -> None:
        self._inner.bytes_sent = value

    def post(self, source: int, channel: str, microbatch: int) -> None:
        self.release()
        self._inner.post(source, channel, microbatch)

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        self.release()
        if channel in HOST_CHANNELS:  # no copy to wait for
            self._inner.send(to, channel, microbatch, tensors)
            return
        copies, event = self._to_host(tensors)
        self._due.append((event, (to, channel, microbatch, copies)))
        self.release()

    def _to_host(self, tensors: Tensors) -> tuple[Tensors, Any]:
        if self._stream is None:
            return tuple(tensor.to("cpu") for tensor in tensors), None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copies = []
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
                copies.append(host.copy_(tensor, non_blocking=True))
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return tuple(copies), event

    def release(self) -> None:
        while self._due and (self._due[0][0] is None or self._due[0][0].query()):
            self._inner.send(*self._due.popleft()[1])

    def _send_all(self) -> None:
        while self._due:
            event, message = self._due.popleft()
            if event is not None:
                event.synchronize()
            self._inner.send(*message)

    def recv(self, source: int, channel: str, microbatch: int) -> Tensors:
        self._send_all()
        tensors = self._inner.recv(source, channel, microbatch)
        if channel in HOST_CHANNELS:
            return tensors
        if self._inbound is None:
            return tuple(tensor.to(self._device) for tensor in tensors)
        return self._to_device(tensors)

    def _to_device(self, tensors: Tensors) -> Tensors:
        """Copies on the stream of its own, for which the computing stream waits, and the host does not."""
        current = torch.cuda.current_stream(self._device)
        received = []
        with torch.cuda.stream(self._inbound):
            for tensor in tensors:
                host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
                received.append(host.copy_(tensor).to(self._device, non_blocking=True))
                received[-1].record_stream(current)
        current.wait_stream(self._inbound)
        return tuple(received)

    def unlimited(self) -> AbstractContextManager[object]:
        return self._inner.unlimited()

    def flush(self) -> None:
        self._send_all()
        self._inner.flush()

    def close(self) -> None:
        self._due.clear()
        self._inner.close()


def _stream(device: torch.device) -> Any:
    """For copies; nothing where the tensors lie there already."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
