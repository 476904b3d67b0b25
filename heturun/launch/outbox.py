"""What an agent tells the launcher, in its order, without ever waiting for a launcher that stands still (Ctrl-Z).

Output is only sent while little of it is under way: a connection whose other end reads nothing would be given up by
the kernel, as if that host were gone. What comes meanwhile waits here; the oldest output gives way, and a line says so.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from pipeline.cluster.wire import Message

UNDER_WAY_BYTES = 32 << 10  # that the launcher has not confirmed; fits into any socket's buffer
MOST_BYTES = 4 << 20  # of output that waits
READS_S = 1.0  # a launcher that has confirmed something within this time is reading: it is waited for


class _Waiting(NamedTuple):
    message: Message
    output_bytes: int  # 0 of what is no output: that is never held back, nor dropped


class Outbox:
    """Sends messages on a thread of its own.

    Args:
        send: may take its time; an `OSError` ends the sending.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._under_way: deque[int] = deque()
        self._dropped: Counter[int] = Counter()  # lines, by rank
        self._took_at = time.monotonic()
        self._over = self._broken = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, message: Message) -> None:
        """To be sent; waits only for a launcher that keeps reading, though more slowly than the output comes."""
        size = len(json.dumps(message)) if message["type"] == "output" else 0
        with self._changed:
            while size and self._bytes + size > MOST_BYTES and self._reads():
                self._changed.wait(READS_S)
            self._waiting.append(_Waiting(message, size))
            self._bytes += size
            while self._bytes > MOST_BYTES:
                self._drop()
            self._changed.notify_all()

    def took(self) -> None:
        """The launcher confirmed one message of output, the oldest that it had not."""
        with self._changed:
            if self._under_way:
                self._under_way.popleft()
            self._took_at = time.monotonic()
            self._changed.notify_all()

    def finish(self, gone: threading.Event) -> None:
        """Returns when all is sent, or the launcher is `gone`."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        while self._thread.is_alive() and not gone.is_set():
            self._thread.join(READS_S)

    def _reads(self) -> bool:
        return not self._broken and time.monotonic() < self._took_at + READS_S

    def _drop(self) -> None:
        """The oldest output; there is one."""
        index = next(i for i, waiting in enumerate(self._waiting) if waiting.output_bytes)
        message, size = self._waiting[index]
        del self._waiting[index]
        self._bytes -= size
        self._dropped[message["rank"]] += len(message["lines"])

    def _run(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._send(message)
            except OSError:  # whoever listens for orders notices, and ends the processes
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()
                return

    def _next(self) -> Message | None:
        """The next message, when it may go; None when there will be no more."""
        with self._changed:
            while not self._may_go():
                if self._over and not self._waiting:
                    return None
                self._changed.wait()
            message, size = self._waiting[0]
            if (size or message["type"] == "closed") and message["rank"] in self._dropped:
                self._under_way.append(1)
                return _dropped(message["rank"], self._dropped.pop(message["rank"]))
            self._waiting.popleft()
            self._bytes -= size
            if size:
                self._under_way.append(size)
            self._changed.notify_all()
            return message

    def _may_go(self) -> bool:
        if not self._waiting:
            return False
        size = self._waiting[0].output_bytes
        return not size or not self._under_way or sum(self._under_way) + size <= UNDER_WAY_BYTES


def _dropped(rank: int, count: int) -> Message:
    line = f"heturun: {count} line(s) were dropped here: the launcher did not take them in time"
    return {"type": "output", "rank": rank, "stream": "stderr", "lines": [line]}
