"""Connections between replicas: one that goes out is a `Link`, one that came in a `Caller`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable

from pipeline import frames
from pipeline.frames import Header


class Link:
    """An outgoing connection, made when it is first used; whoever uses it holds `lock`."""

    def __init__(self, address: str, key: bytes, timeout_s: float, generation: int, once: bool) -> None:
        self.address, self.generation, self.once = address, generation, once
        self.lock = threading.Lock()
        self.sock: socket.socket | None = None
        self._key, self._timeout_s = key, timeout_s
        self._ready = self._ended = False

    def connected(self) -> socket.socket:
        """The socket; raises `OSError` when it cannot be had."""
        if not self._ready:
            frames.dial(self.address, self._key, timeout_s=self._timeout_s, keep=self._keep)
            self._ready = True
        if self._ended or self.sock is None:
            raise ConnectionAbortedError("the connection was given up")
        return self.sock

    def _keep(self, sock: socket.socket) -> None:
        self.sock = sock
        if self._ended:
            raise ConnectionAbortedError("the connection was given up")

    def end(self) -> None:
        """Wakes whoever is using it; says goodbye if nobody is."""
        self._ended = True
        idle = self.lock.acquire(blocking=False)
        try:
            if self.sock is not None:
                if idle and self._ready:
                    frames.say_bye(self.sock)
                frames.hang_up(self.sock)
                if idle:
                    self.sock.close()
        finally:
            if idle:
                self.lock.release()


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
