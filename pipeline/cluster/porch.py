"""Where connections wait until they have proved that they hold the job's key: there is room for so many and no more.

    accept ──► porch ── proof within HANDSHAKE_S, all in all ──► inside, where there is no limit
                 └── full, or no file descriptor left: whoever has waited longest has to go

So somebody without the key can take neither threads nor file descriptors from those who hold it. The limit is on all
together and not on each address, for on one host, or behind one router, all have the same.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import threading
import time
from collections.abc import Iterator

from pipeline.cluster import wire

ROOM = 256
AGAIN_S = 0.05  # before accepting goes on when it failed
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Porch:
    """Around a listening socket; `arrivals` is for one thread, the rest for any.

    Args:
        room: how many connections may wait.
    """

    def __init__(self, listener: socket.socket, *, room: int = ROOM) -> None:
        self._listener, self._room = listener, room
        self._waiting: dict[socket.socket, None] = {}  # in the order of their arrival
        self._lock = threading.Lock()
        self._closed = False

    def arrivals(self) -> Iterator[socket.socket]:
        """Connections, each of which has to be given to `admit` or `shut_out`; ends with `close`."""
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno in NO_MORE_FILES:
                    self._end_oldest(1)
                if not self._closed:
                    time.sleep(AGAIN_S)  # whoever called has hung up already, or files have run out
                continue
            with self._lock:
                self._waiting[sock] = None
                too_many = len(self._waiting) - self._room
            self._end_oldest(too_many)
            yield sock

    def admit(self, sock: socket.socket, key: bytes) -> bytes | None:
        """As `wire.admit`; None also for a connection that had to go."""
        nonces = wire.admit(sock, key)
        with self._lock:
            stayed = sock in self._waiting
            self._waiting.pop(sock, None)
        if nonces is not None and not stayed:
            sock.close()
        return nonces if stayed else None

    def shut_out(self, sock: socket.socket) -> None:
        """Ends a connection that nobody will serve."""
        with self._lock:
            self._waiting.pop(sock, None)
        sock.close()

    def close(self) -> None:
        """Stops listening and ends the connections that wait."""
        self._closed = True
        _hang_up(self._listener)
        self._listener.close()
        with self._lock:
            waiting = list(self._waiting)
        for sock in waiting:
            _hang_up(sock)

    def _end_oldest(self, count: int) -> None:
        """Ends those who have waited longest; their own threads close them."""
        with self._lock:
            oldest = list(self._waiting)[: max(0, count)]
            for sock in oldest:
                del self._waiting[sock]
        for sock in oldest:
            _hang_up(sock)


def raise_file_limit() -> None:
    """One descriptor per connection: as many as this user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS does not mean its "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _hang_up(sock: socket.socket) -> None:
    """Wakes whoever waits for it."""
    with contextlib.suppress(OSError):  # it was not connected any more
        sock.shutdown(socket.SHUT_RDWR)
