"""Lines on their way to somebody who may read slowly, or not at all: they wait, the oldest give way, nobody is held up.

any thread ---- put ----> | | | | | | | ----> the printer's own thread ----> a terminal, a pipe, a file
                    the oldest are dropped, and one line says how many
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from heturun.launch.outcome import Progress

MOST_BYTES = 4 << 20  # that wait
BATCH_LINES = 64
LOOK_EVERY_S = 0.1
READS_S = 0.2  # whoever has taken something within this time is reading, and waited for before lines are dropped


class Backlog:
    """Waiting lines of at most `most` bytes; what is dropped for that is counted. Not for several threads."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._bytes, self._dropped = most, 0, 0
        self._lines: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def full(self) -> bool:
        return self._bytes > self._most // 2

    def put(self, line: bytes) -> None:
        self._lines.append(line)
        self._bytes += len(line)
        while self._bytes > self._most and len(self._lines) > 1:
            self._bytes -= len(self._lines.popleft())
            self._dropped += 1

    def take(self, most: int) -> list[bytes]:
        """The next lines; the first of them says how many were dropped before it."""
        lines = [] if not self._dropped else [_dropped(self._dropped)]
        self._dropped = 0
        while self._lines and len(lines) < most:
            lines.append(self._lines.popleft())
            self._bytes -= len(lines[-1])
        return lines


def _dropped(count: int) -> bytes:
    return f"heturun: {count} line{'s were' if count > 1 else ' was'} dropped here: nobody read them in time".encode()


class Printer:
    """Writes lines on a thread of its own, until that fails; the caller never waits but in `finish`.

    Args:
        write: is called with some lines, on that thread, and may take its time.
        draw: is called there with the newest progress of every rank; `close` when all is over.
        failed: is called there once, with the error that ended the writing.
    """

    def __init__(
        self,
        write: Callable[[Sequence[bytes]], None],
        *,
        failed: Callable[[OSError], None],
        draw: Callable[[Sequence[Progress]], None] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._write, self._draw, self._close, self._failed = write, draw, close, failed
        self._changed = threading.Condition()
        self._backlog = Backlog()
        self._newest: dict[int, Progress] = {}
        self._written = 0  # grows while somebody reads
        self._wrote_at = time.monotonic()
        self._over = self._done = False
        self.ended = False  # by an error
        threading.Thread(target=self._run, name="printer", daemon=True).start()

    def put(self, *lines: str) -> None:
        """Lines to be written, in their order; waits only for who keeps reading, though more slowly than they come."""
        with self._changed:
            if not self.ended:
                for line in lines:
                    self._backlog.put(line.encode(errors="replace"))
                self._changed.notify_all()
            while self._backlog.full and not self.ended and time.monotonic() < self._wrote_at + READS_S:
                self._changed.wait(READS_S)

    def show(self, progress: Progress) -> None:
        """A rank's newest progress; what is not drawn yet is replaced."""
        with self._changed:
            self._newest[progress.rank] = progress
            self._changed.notify_all()

    def finish(self, *, idle_s: float, give_up: Callable[[], bool]) -> None:
        """Waits until all is written, nobody has read anything for `idle_s`, or `give_up` says so."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            seen, last = self._written, time.monotonic()
            while not self._done and not give_up() and time.monotonic() < last + idle_s:
                self._changed.wait(LOOK_EVERY_S)
                if self._written != seen:
                    seen, last = self._written, time.monotonic()

    def _run(self) -> None:
        try:
            while self._step():
                pass
            if self._close is not None:
                self._close()
        except OSError as error:
            with self._changed:
                self.ended = True
            self._failed(error)
        finally:
            with self._changed:
                self.ended = self._done = True
                self._changed.notify_all()

    def _step(self) -> bool:
        """Writes and draws what there is; whether more may come."""
        with self._changed:
            while not (self._backlog or self._newest or self._over):
                self._changed.wait()
            lines, newest = self._backlog.take(BATCH_LINES), list(self._newest.values())
            self._newest.clear()
            more = bool(lines or newest) or not self._over
        if lines:
            self._write(lines)
        if newest and self._draw is not None:
            self._draw(newest)
        with self._changed:
            self._written += len(lines)
            self._wrote_at = time.monotonic()
            self._changed.notify_all()
        return more


def write_to(fd: int) -> Callable[[Sequence[bytes]], None]:
    """Writes whole lines to a file descriptor, also to one that another program has made non-blocking."""

    def write(lines: Sequence[bytes]) -> None:
        rest = memoryview(b"".join(line + b"\n" for line in lines))
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                select.select([], [fd], [])

    return write
