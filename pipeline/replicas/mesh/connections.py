"""Connections between replicas: one that goes out is a `Link`, one that came in a `Caller`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Iterator

from pipeline.replicas.mesh import frames
from pipeline.replicas.mesh.frames import Header


class Link:
    """An outgoing connection, made when it is first used, by one thread at a time."""

    def __init__(self, address: str, key: bytes, timeout_s: float, generation: int, once: bool) -> None:
        self.address, self.generation, self.once = address, generation, once
        self._key, self._timeout_s = key, timeout_s
        self._using = threading.Lock()
        self._sock: socket.socket | None = None
        self._ready = self._ended = False

    @contextlib.contextmanager
    def use(self) -> Iterator[socket.socket]:
        """The connected socket, for this thread alone; raises `OSError` when it cannot be had."""
        try:
            with self._using:
                if not self._ready:
                    frames.dial(self.address, self._key, timeout_s=self._timeout_s, keep=self._keep)
                    self._ready = True
                if self._ended or self._sock is None:
                    raise ConnectionAbortedError("the connection was given up")
                yield self._sock
        finally:
            if self._ended:
                self.end()

    def _keep(self, sock: socket.socket) -> None:
        self._sock = sock
        if self._ended:
            raise ConnectionAbortedError("the connection was given up")

    @property
    def in_use(self) -> bool:
        return self._ready and self._using.locked()

    @property
    def is_cut(self) -> bool:
        """Whether the other end has gone away, of a connection on which it never sends."""
        return self._ready and self._sock is not None and frames.is_cut(self._sock)

    def end(self) -> None:
        """Wakes whoever is using it, who then closes it; if nobody is, says goodbye and closes it."""
        self._ended = True
        if self._sock is None:
            return
        if not self._using.acquire(blocking=False):
            frames.hang_up(self._sock)
            return
        try:
            if self._ready:
                frames.say_bye(self._sock)
            frames.hang_up(self._sock)
            self._sock.close()
        finally:
            self._using.release()


class Caller:
    """An incoming connection: whose it is, with which generations of both it was made, and how it ended."""

    def __init__(self, sock: socket.socket, own: int) -> None:
        self.sock, self.own = sock, own
        self.sender, self.generation, self.kind = -1, 0, -1
        self.in_order = False

    def heard(self, header: Header) -> None:
        self.sender, self.generation, self.kind = header.sender, header.generation, header.kind


def end_all(links: Iterable[Link], callers: Iterable[Caller]) -> None:
    for link in links:
        link.end()
    for caller in callers:
        frames.hang_up(caller.sock)
