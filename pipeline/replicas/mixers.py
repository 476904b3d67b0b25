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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.coordination.client import Client
from pipeline.coordination.client import Group as Answered
from pipeline.errors import CoordinatorLost, Fenced, GroupBroken, TooFewReplicas
from pipeline.replicas.flat_state import StageVector
from pipeline.replicas.mesh.mesh import Mesh
from pipeline.stage.executor import NoMixer
from pipeline.stage.weights import Weights
from pipeline.sync import Synchroniser
from pipeline.sync.adpsgd import correction
from pipeline.sync.dialogue import Average, Broadcast, Dialogue, Group, Join, Locate, Place, Request, Swap

HARMLESS = (Fenced, CoordinatorLost, TooFewReplicas)  # the training loop meets them again where it can act on them


class Mixed(NamedTuple):
    """What mixing has done and cost: group sizes, updates between a copy and its correction, seconds, broken groups."""

    sizes: Counter[int]
    staleness: Counter[int]
    waited_s: float
    mixed_s: float
    broken: int

    @property
    def mixed(self) -> int:
        """How often this replica was in company."""
        return sum(times for size, times in self.sizes.items() if size > 1)


def mean_of(counts: Counter[int]) -> float:
    """The mean of what was counted, 0 where nothing was."""
    total = sum(counts.values())
    return sum(value * times for value, times in counts.items()) / total if total else 0.0


class MixStats:
    """Counts what the threads of a stage mix; whoever wants to know gets a copy, since they go on counting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: Counter[int] = Counter()
        self._staleness: Counter[int] = Counter()
        self._waited_s = self._mixed_s = 0.0
        self._broken = 0

    def now(self) -> Mixed:
        with self._lock:
            return Mixed(self._sizes.copy(), self._staleness.copy(), self._waited_s, self._mixed_s, self._broken)

    def met(self, size: int) -> None:
        with self._lock:
            self._sizes[size] += 1

    def corrected(self, updates: int) -> None:
        """A correction came so many updates after its copy."""
        with self._lock:
            self._staleness[updates] += 1

    def broke(self) -> None:
        with self._lock:
            self._broken += 1

    def spent(self, *, waiting_s: float = 0.0, mixing_s: float = 0.0) -> None:
        with self._lock:
            self._waited_s += waiting_s
            self._mixed_s += mixing_s


@dataclass(frozen=True)
class Link:
    """A stage's ways to its replicas: who forms groups, and the wires to their members."""

    client: Client
    mesh: Mesh
    stats: MixStats
    stage: int
    pipeline: int

    def answer(self, request: Request) -> Any:
        """What a request of a dialogue brings; waits for it.

        Raises:
            GroupBroken, Fenced, CoordinatorLost: as their docstrings say.
            PeerLost: a partner did not answer before the deadline.
        """
        if isinstance(request, Locate):
            return Place(self.stage, self.pipeline, tuple(sorted({*self.client.live, self.pipeline})))
        if isinstance(request, Join):
            return self.joined(self.client.ready(request.step, request.scope))
        if isinstance(request, Average):
            group = request.group
            return self.mesh.average(request.x, group.members, group.round, generations=group.generations)
        if isinstance(request, Broadcast):
            group = request.group
            members, generations = group.members, group.generations
            return self.mesh.broadcast_from(request.x, members, group.round, request.root, generations=generations)
        assert isinstance(request, Swap)
        if self.client.fenced:  # its weights are out of date
            raise Fenced("this pipeline was declared lost")
        return self.mesh.swap(request.peer, request.x)

    def joined(self, answer: Future[Answered]) -> Group:
        group = Group(*answer.result())
        self.stats.met(len(group.members))
        return group


class Conversation:
    """One dialogue under way; every way out of it ends in `result`: the new x, or None where it came to nothing."""

    def __init__(self, dialogue: Dialogue[Tensor], link: Link) -> None:
        self._dialogue, self._link = dialogue, link
        self.result: Tensor | None = None
        self.request: Request | None = self._advance(lambda: next(dialogue))

    def reply(self, fetch: Callable[[], Any]) -> None:
        """Goes on with the answer that `fetch` returns; what it raises goes into the dialogue."""
        assert self.request is not None
        try:
            answer = fetch()
        except GroupBroken as broken:
            self._link.stats.broke()
            error: Exception = broken
        except HARMLESS as harmless:
            error = harmless
        else:
            self.request = self._advance(lambda: self._dialogue.send(answer))
            return
        self.request = self._advance(lambda: self._dialogue.throw(error))

    def finish(self) -> Tensor | None:
        """Carries on to the end."""
        while (request := self.request) is not None:
            self.reply(lambda asked=request: self._link.answer(asked))  # type: ignore[misc]
        return self.result

    def _advance(self, step: Callable[[], Request]) -> Request | None:
        try:
            return step()
        except StopIteration as end:
            self.result = end.value
        except (GroupBroken, *HARMLESS):  # the dialogue has no answer to it: weights stay as they are
            self.result = None
        return None


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
        self._partners: Future[Answered] | None = None

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


class MeshReducer:
    """The mean of the gradients over all live replicas, through the mesh: all-reduce for workers that are threads.

    last stage   L0: join a group, mean of the normalisers ── F0 B0 ── mean of the gradients in the same group ── U0
    the others       F0 B0 ── join a group, mean of the gradients ── U0
    """

    def __init__(self, weights: Weights, link: Link) -> None:
        self._weights, self._link = weights, link
        self._step = 0
        self._group: Group | None = None  # of the update under way
        self.bytes_sent = 0  # the mesh counts them

    def open(self) -> None:
        return None

    def share(self, counts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of the normalisers, scalars, over those with whom the next update's gradients are averaged."""
        group = self._group = self._join()
        if len(group.members) == 1:
            return counts
        mesh, generations = self._link.mesh, group.generations
        mean = mesh.average(torch.stack(counts), group.members, group.round, part=1, generations=generations)
        return tuple(mean)

    def finish(self) -> None:
        group, self._group = self._group or self._join(), None
        met = perf_counter()
        if len(group.members) > 1:
            slots, leaves = self._weights.slots, self._weights.newest.leaves
            pairs = zip(self._weights.gradients, leaves, strict=True)
            flat = torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for g, leaf in pairs])
            mean = self._link.mesh.average(flat, group.members, group.round, generations=group.generations)
            parts = torch.split(mean, [slot.size for slot in slots])
            self._weights.gradients[:] = [
                part.view(slot.shape).to(slot.dtype) for part, slot in zip(parts, slots, strict=True)
            ]
        self._link.stats.spent(mixing_s=perf_counter() - met)

    def _join(self) -> Group:
        started = perf_counter()
        self._step += 1
        group = self._link.joined(self._link.client.ready(self._step, ""))
        self._link.stats.spent(waiting_s=perf_counter() - started)
        return group
