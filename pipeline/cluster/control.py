"""The launcher as a training process sees it: published values, the progress bar, and the reason for a failure.

    control = Control.from_environment()               # None when heturun did not start this process
    control.publish("store", "10.0.0.1:4711")          # on one rank
    control.lookup("store", timeout_s=60.0)            # on another: waits until it is there

The messages are those of `pipeline.cluster.wire`, and `heturun.launch.hub` is the other end. Standard library only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from pipeline.cluster import wire
from pipeline.cluster.edition import introduction

CONNECT_S = 20.0
NOTED_S = 5.0  # for the launcher to confirm a failure
PROGRESS_EVERY_S = 0.1

STOPPED = "stopped"  # what is published under this says why the job has to end: too few pipelines are left


class Control:
    """A connection to the launcher; every method may be called by any thread.

    Args:
        address: the launcher, "host:port".
        key: the job's secret, in hexadecimal digits.
        rank: who this process is.
        on_push: is called with every message that nobody asked for, on a thread of this object's own.
        incarnation: how often this process's pipeline had been started again.
        lost_s: silence of the launcher's host that ends the connection.

    Raises:
        ConnectionError: nobody answers there, or not with this job's key.
    """

    def __init__(
        self,
        address: str,
        key: str,
        rank: int,
        *,
        on_push: Callable[[wire.Message], None] | None = None,
        incarnation: int = 0,
        lost_s: int = wire.LOST_S,
    ) -> None:
        try:
            self._channel = wire.connect(address, bytes.fromhex(key), timeout_s=CONNECT_S, lost_s=lost_s)
            self._channel.send({"type": "process", "rank": rank, "incarnation": incarnation, **introduction()})
        except OSError as error:
            raise ConnectionError(f"rank {rank} cannot reach the launcher at {address}: {error}") from error
        self._rank, self.on_push, self._lost_s = rank, on_push, lost_s
        self._lock = threading.Lock()
        self._answers: dict[int, SimpleQueue[wire.Message | None]] = {}  # None: the launcher is gone
        self._asked = 0
        self._gone = False
        self._progress_at = 0.0
        self._drawing: int | None = None  # the launcher, which may stand still (Ctrl-Z), has not confirmed it yet
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    @classmethod
    def from_environment(cls, *, on_push: Callable[[wire.Message], None] | None = None) -> Control | None:
        """The launcher that HETURUN_CONTROL names; None when heturun did not start this process."""
        address = os.environ.get("HETURUN_CONTROL")
        if not address:
            return None
        return cls(
            address,
            os.environ["HETURUN_KEY"],
            int(os.environ["RANK"]),
            on_push=on_push,
            incarnation=int(os.environ.get("HETURUN_INCARNATION", "0")),
            lost_s=int(os.environ.get("HETURUN_LOST_AFTER", wire.LOST_S)),
        )

    def publish(self, key: str, value: str) -> None:
        """Lets every process of the job look `key` up."""
        self._send({"type": "publish", "key": key, "value": value})

    def lookup(self, key: str, *, timeout_s: float) -> str:
        """The value under `key`, as soon as it is published.

        Raises:
            TimeoutError: nobody published it in time.
        """
        try:
            return str(self._ask({"type": "lookup", "key": key}, timeout_s)["value"])
        except Empty:
            raise TimeoutError(f"nobody published {key!r} within {timeout_s:g} s (rank {self._rank} waited)") from None

    def progress(self, done: int, total: int, text: str) -> None:
        """Moves the bar that the launcher draws; of calls in quick succession some are dropped, but not the last."""
        now = time.monotonic()
        with self._lock:
            if done < total and (self._drawing is not None or now < self._progress_at + PROGRESS_EVERY_S):
                return
            self._asked += 1
            self._drawing, self._progress_at = self._asked, now
            number = self._asked
        self._send({"type": "progress", "done": done, "total": total, "text": text, "number": number})

    def elastic(self, min_replicas: int) -> None:
        """Says that from now on the job survives the loss of a pipeline, as long as `min_replicas` of them are left.

        Returns when the launcher has noted it; the first process to say so decides.
        """
        try:
            self._ask({"type": "elastic", "min_replicas": min_replicas}, self._lost_s)
        except Empty:
            raise ConnectionError(
                f"the launcher did not confirm within {self._lost_s:g} s that the job is elastic"
            ) from None

    def failed(self, message: str, *, secondary: bool, status: int | None = None) -> None:
        """Says why this process is about to end; `secondary`: only because another one went away.

        `status`: what it will end with, which counts even if its end is long in coming, or comes otherwise.

        Returns when the launcher has noted it, so that it cannot learn of this process's end first.
        """
        try:
            self._ask({"type": "failed", "message": message, "secondary": secondary, "status": status}, NOTED_S)
        except Empty:
            raise ConnectionError(f"the launcher did not confirm rank {self._rank}'s error in {NOTED_S:g} s") from None

    def close(self) -> None:
        """Ends the connection; the job goes on."""
        self._channel.close()

    def _ask(self, message: wire.Message, timeout_s: float) -> wire.Message:
        """Sends a numbered message and waits for its answer; `Empty` when none comes in time."""
        with self._lock:
            self._asked += 1
            number = self._asked
            answers = self._answers[number] = SimpleQueue[wire.Message | None]()
            if self._gone:
                answers.put(None)
        try:
            self._send({**message, "number": number})
            answer = answers.get(timeout=timeout_s)
        finally:
            with self._lock:
                del self._answers[number]
        if answer is None:
            raise ConnectionError(f"the launcher went away while rank {self._rank} waited for its answer")
        return answer

    def _send(self, message: wire.Message) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise ConnectionError(f"the launcher went away from rank {self._rank}: {error}") from error

    def _listen(self) -> None:
        """Hands every answer to whoever asked, and the end of the connection to all who wait."""
        try:
            while (message := self._channel.receive()) is not None:
                self._hand_over(message)
        finally:
            with self._lock:
                self._gone = True
                for waiting in self._answers.values():
                    waiting.put(None)

    def _hand_over(self, message: wire.Message) -> None:
        if "number" not in message:
            if self.on_push is not None:
                self.on_push(message)
            return
        number = message["number"]
        with self._lock:
            if number == self._drawing:
                self._drawing = None
            waiting = self._answers.get(number) if isinstance(number, int) else None
        if waiting is not None:  # else it came after its deadline
            waiting.put(message)
