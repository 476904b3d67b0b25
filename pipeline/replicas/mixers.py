"""Carries out a synchroniser's dialogues for one stage: at once, during the next step, or at any time.

    blocking      J5 B5 U5 W5 X5                  asked before the backward, answered by the time of W, averaged in X
    overlapped    U5 X5  F6 B6 U6 X6              X5 gives a copy away; the correction (average - copy) comes in X6, or
                     '------------^               in whichever X follows its arrival: nobody waits for it
    asynchronous  U5 X5  ...      U6 X6           partners swap copies at any time (AD-PSGD, ICML 2018); halves of
                      swap  swap                  the differences are added in the next X

What cannot be had (a group that broke, a pipeline that was declared lost) leaves the weights as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from torch import Tensor

from pipeline.core.group import Group
from pipeline.replicas.conversation import Conversation, Link
from pipeline.replicas.flat_state import StageVector
from pipeline.stage.executor import NoMixer
from pipeline.sync import Synchroniser
from pipeline.sync.adpsgd import correction
from pipeline.sync.dialogue import Join


class BlockingMixer:
    """Mixes between two steps.

    Args:
        after: called when weights were mixed (a momentum policy).
    """

    def __init__(
        self,
        vector: StageVector,
        sync: Synchroniser,
        link: Link,
        *,
        guard: AbstractContextManager[Any],
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self._vector, self._sync, self._link, self._guard = vector, sync, link, guard
        self._after = after
        self.step = 0
        self._x = vector.read()  # what the dialogue works on; filled when its partners are known
        self._talk: Conversation | None = None
        self._partners: Future[Group] | None = None

    def request(self, rate: float) -> None:
        self.step += 1
        if self._x.numel() != self._vector.size:  # the optimiser's state has come into being
            self._x = self._vector.read()
        self._talk = Conversation(self._sync.mix(self._x, self.step, learning_rate=rate), self._link)
        asked = self._talk.request
        self._partners = None
        if isinstance(asked, Join):
            self._partners = self._link.client.ready(asked.step, asked.scope)

    def wait(self) -> None:
        if self._partners is not None:
            started = perf_counter()
            self._partners.exception()
            self._link.stats.spent(waiting_s=perf_counter() - started)

    def mix(self) -> None:
        talk, x, partners = self._talk, self._x, self._partners
        if talk is None or talk.request is None:
            return
        started = perf_counter()
        self._vector.read_into(x)
        if partners is not None:
            talk.reply(lambda: self._link.joined(partners))
        result = talk.finish()
        if result is not None and result is not x:
            with self._guard:
                self._vector.write(result)
            self._after()
        self._talk = None
        self._link.stats.spent(mixing_s=perf_counter() - started)

    def drain(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass
class _Job:
    """A copy of the weights that is being averaged, and what became of it: average - copy, or None for nothing."""

    snapshot: Tensor
    step: int
    rate: float
    done: threading.Event = field(default_factory=threading.Event)
    correction: Tensor | None = None
    error: BaseException | None = None


class OverlappedMixer:
    """Mixes copies in the background, adds corrections later: x <- x + (average - copy), which preserves the mean."""

    def __init__(
        self,
        vector: StageVector,
        sync: Synchroniser,
        link: Link,
        *,
        guard: AbstractContextManager[Any],
    ) -> None:
        self._vector, self._sync, self._link, self._guard = vector, sync, link, guard
        self._rate = 0.0  # of the update under way
        self.step = 0
        self._copy = vector.read()  # the memory of all snapshots, of which there is one at a time
        self._job: _Job | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="overlapped-mixing")
        self._thread.start()

    def request(self, rate: float) -> None:
        self.step += 1
        self._rate = rate

    def wait(self) -> None:
        return None

    def mix(self) -> None:
        started = perf_counter()
        if self._job is not None and self._job.done.is_set():
            self._correct(self._job)
        if self._job is None:
            self._job = _Job(self._snapshot(), self.step, self._rate)
            self._jobs.put(self._job)
        self._link.stats.spent(mixing_s=perf_counter() - started)

    def drain(self) -> None:
        if self._job is not None:
            started = perf_counter()
            self._job.done.wait()
            self._link.stats.spent(waiting_s=perf_counter() - started)
            self._correct(self._job)

    def close(self) -> None:
        self._jobs.put(None)

    def _snapshot(self) -> Tensor:
        if self._copy.numel() != self._vector.size:  # the optimiser's state has come into being
            self._copy = self._vector.read()
        else:
            self._vector.read_into(self._copy)
        return self._copy

    def _correct(self, job: _Job) -> None:
        self._job = None
        if job.error is not None:
            raise job.error
        if job.correction is not None:
            self._link.stats.corrected(self.step - job.step)
            with self._guard:
                self._vector.add(job.correction)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                talk = Conversation(self._sync.mix(job.snapshot, job.step, learning_rate=job.rate), self._link)
                result = talk.finish()
                if result is not None and result is not job.snapshot:
                    job.correction = result.sub_(job.snapshot)
            except BaseException as error:  # handed to the training thread
                job.error = error
            job.done.set()


class AsynchronousMixer:
    """AD-PSGD (Lian et al., ICML 2018, algorithm 1): pairs average whenever they like while gradients are computed.

    `_mirror` is this replica's weights as its partners see them: those of the last X and all corrections since, which
    wait in `_pending` for the next X. Both halves of a swap add the same difference with opposite signs, so the mean
    of the replicas is preserved whatever happens in between.
    """

    def __init__(
        self,
        vector: StageVector,
        sync: Synchroniser,
        link: Link,
        *,
        guard: AbstractContextManager[Any],
    ) -> None:
        self._vector, self._sync, self._link, self._guard = vector, sync, link, guard
        self.step = 0
        self._lock = threading.Lock()
        self._mirror: Tensor | None = None  # None: not to be swapped with now
        self._pending: Tensor | None = None
        self._since = 0  # the step of the oldest correction in `_pending`
        self._idle = threading.Event()
        self._idle.set()
        self._steps: SimpleQueue[int | None] = SimpleQueue()
        self._error: BaseException | None = None
        link.mesh.on_swap(self._answer)
        self._thread = threading.Thread(target=self._work, daemon=True, name="asynchronous-mixing")
        self._thread.start()

    def request(self, rate: float) -> None:
        self.step += 1

    def wait(self) -> None:
        return None

    def mix(self) -> None:
        started = perf_counter()
        if self._error is not None:
            raise self._error
        with self._lock:
            self._apply()
            newest = self._vector.read()
            self._mirror = newest
        if self._idle.is_set():
            self._idle.clear()
            self._steps.put(self.step)
        self._link.stats.spent(mixing_s=perf_counter() - started)

    def drain(self) -> None:
        self._idle.wait()
        with self._lock:
            self._apply()
            self._mirror = None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._steps.put(None)

    def _apply(self) -> None:
        if self._pending is not None:
            with self._guard:
                self._vector.add(self._pending)
            self._link.stats.corrected(self.step - self._since)
            self._pending = None

    def _add(self, delta: Tensor) -> None:
        """Under the lock: what the mirror becomes, the weights will become in the next X."""
        assert self._mirror is not None
        self._mirror = self._mirror + delta
        if self._pending is None:
            self._pending, self._since = delta, self.step
        else:
            self._pending = self._pending + delta
        self._link.stats.met(2)

    def _answer(self, theirs: Tensor) -> Tensor | None:
        """The passive side: gives the mirror as it was, keeps half of the difference; None while it is drained."""
        with self._lock:
            mine = self._mirror
            if mine is None or mine.shape != theirs.shape:
                return None
            self._add(correction(mine, theirs))
            return mine

    def _work(self) -> None:
        """The active side: one swap per update."""
        while (step := self._steps.get()) is not None:
            try:
                self._swap(step)
            except BaseException as error:  # handed to the training thread
                self._error = error
            self._idle.set()

    def _swap(self, step: int) -> None:
        with self._lock:
            mine = self._mirror
        if mine is None:
            return
        talk = Conversation(self._sync.mix(mine, step), self._link)
        result = talk.finish()
        if result is not None and result is not mine:
            with self._lock:
                self._add(result.sub_(mine))


class NothingToMix(NoMixer):
    """Replicas that share gradients (all-reduce) have nothing to mix."""

    step = 0

    def drain(self) -> None:
        return None

    def close(self) -> None:
        return None
