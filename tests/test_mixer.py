"""Mixers: the same dialogue at once, during the next step, or at any time; replicas are threads, wires are dicts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pipes import Job, Unsplit, assert_equal, small_mlp
from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.group import Group
from pipeline.errors import Fenced, GroupBroken
from pipeline.replicas.conversation import Link, MixStats, mean_of
from pipeline.replicas.flat_state import StageVector
from pipeline.replicas.mixers import AsynchronousMixer, BlockingMixer, OverlappedMixer
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, program
from pipeline.stage.build import make_stage
from pipeline.stage.executor import Executor, Hooks
from pipeline.stage.stage import Stage
from pipeline.sync.adpsgd import AdPsgd
from pipeline.sync.local_sgd import Calendar, LocalSgd
from pipeline.sync.outer import Outer, SlowMo
from pipeline.sync.preduce import PartialReduce
from pipeline.train.optim import cosine, warm_up
from pipeline.transport.local import local_transports

WAIT_S = 20.0


class Room:
    """Everybody of a job: groups are of all, averages and swaps go through memory."""

    def __init__(self, size: int) -> None:
        self.live = tuple(range(size))
        self.lock = threading.Condition()
        self.given: dict[int, dict[int, Tensor]] = {}
        self.swappers: dict[int, Callable[[Tensor], Tensor | None]] = {}


class Wires:
    """Client and mesh of one replica."""

    def __init__(self, room: Room, pipeline: int, error: Exception | None = None) -> None:
        self.room, self.pipeline, self.error = room, pipeline, error
        self.live, self.fenced = room.live, False

    def ready(self, step: int, scope: str = "") -> Future[Group]:
        answer: Future[Group] = Future()
        if isinstance(self.error, Fenced):
            answer.set_exception(self.error)
        else:
            answer.set_result(Group(step, self.live, "everybody"))
        return answer

    def average(self, x: Tensor, members: tuple[int, ...], round: int, *, generations: Any = None) -> Tensor:
        if self.error is not None:
            raise self.error
        with self.room.lock:
            given = self.room.given.setdefault(round, {})
            given[self.pipeline] = x.clone()
            self.room.lock.notify_all()
            assert self.room.lock.wait_for(lambda: len(given) == len(members), WAIT_S)
        return torch.stack([given[member] for member in members]).mean(0)

    def swap(self, peer: int, x: Tensor) -> Tensor | None:
        return self.room.swappers[peer](x.clone())

    def on_swap(self, answer: Callable[[Tensor], Tensor | None]) -> None:
        self.room.swappers[self.pipeline] = answer


class Weights:
    """A vector without a stage."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.size = x, x.numel()

    def read(self) -> Tensor:
        return self.x.clone()

    def read_into(self, x: Tensor) -> None:
        x.copy_(self.x)

    def write(self, x: Tensor) -> None:
        self.x.copy_(x)

    def add(self, delta: Tensor) -> None:
        self.x.add_(delta)


def link(room: Room, pipeline: int, error: Exception | None = None) -> Link:
    wires: Any = Wires(room, pipeline, error)
    return Link(wires, wires, MixStats(), 0, pipeline)


def step(mixer: Any, weights: Weights, change: float = 0.0) -> None:
    mixer.request(0.1)
    weights.add(torch.full_like(weights.x, change))
    mixer.wait()
    mixer.mix()


def together(*acts: Callable[[], object]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def replicas(size: int) -> list[Weights]:
    return [Weights(torch.randn(7, generator=torch.Generator().manual_seed(n))) for n in range(size)]


def mean(all_weights: list[Weights]) -> Tensor:
    return torch.stack([weights.x for weights in all_weights]).mean(0)


def test_blocking_replicas_are_equal_after_a_group_of_all() -> None:
    room, models = Room(3), replicas(3)
    before = mean(models)
    mixers = [
        BlockingMixer(weights, PartialReduce(blocking=True), link(room, n), guard=nullcontext())  # type: ignore[arg-type]
        for n, weights in enumerate(models)
    ]
    together(*(lambda m=m, w=w: step(m, w, 1.0) for m, w in zip(mixers, models, strict=True)))  # type: ignore[misc]
    for weights in models:
        torch.testing.assert_close(weights.x, before + 1.0)


def test_a_step_without_an_average_leaves_everything_alone() -> None:
    (weights,) = replicas(1)
    before = weights.read()
    sync = LocalSgd(Calendar(local_steps=2))
    mixer = BlockingMixer(weights, sync, link(Room(1), 0), guard=nullcontext())  # type: ignore[arg-type]
    step(mixer, weights)
    assert torch.equal(weights.x, before)


@pytest.mark.parametrize("error", [GroupBroken(1), Fenced("away")])
def test_a_group_that_breaks_leaves_the_weights_as_they_are(error: Exception) -> None:
    (weights,) = replicas(1)
    before, broken = weights.read(), link(Room(2), 0, error)
    mixer = BlockingMixer(weights, PartialReduce(blocking=True), broken, guard=nullcontext())  # type: ignore[arg-type]
    step(mixer, weights)
    assert torch.equal(weights.x, before)
    assert broken.stats.now().broken == isinstance(error, GroupBroken)


def test_overlapped_corrections_come_later_and_preserve_the_mean() -> None:
    room, models = Room(2), replicas(2)
    before = mean(models)
    mixers = [
        OverlappedMixer(weights, PartialReduce(blocking=False), link(room, n), guard=nullcontext())  # type: ignore[arg-type]
        for n, weights in enumerate(models)
    ]
    step(mixers[0], models[0])
    only_own = models[0].read()
    step(mixers[1], models[1])
    for mixer in mixers:  # whatever is trained meanwhile stays
        mixer.request(0.1)
    models[0].add(torch.ones(7))
    assert torch.equal(models[0].x, only_own + 1)
    together(*(mixer.drain for mixer in mixers))
    torch.testing.assert_close(mean(models), before + 0.5)
    torch.testing.assert_close(models[0].x - 1, models[1].x)
    for mixer in mixers:
        mixer.close()


def test_asynchronous_swaps_preserve_the_mean_and_bring_replicas_together() -> None:
    room, models = Room(3), replicas(3)
    before, apart = mean(models), max(float((w.x - mean(models)).norm()) for w in models)
    links = [link(room, n) for n in range(3)]
    mixers = [
        AsynchronousMixer(weights, AdPsgd(seed=1), links[n], guard=nullcontext())  # type: ignore[arg-type]
        for n, weights in enumerate(models)
    ]

    def met() -> int:
        return sum(one.stats.now().sizes[2] for one in links)

    def train(n: int) -> None:
        until = monotonic() + WAIT_S / 2
        while met() < 12 and monotonic() < until:  # a fast machine has done many steps before a swap comes about
            step(mixers[n], models[n])

    together(*(lambda n=n: train(n) for n in range(3)))  # type: ignore[misc]
    for mixer in mixers:
        mixer.drain()
    for mixer in mixers:  # a passive one may have been asked after its own drain: it declined
        mixer.close()
    torch.testing.assert_close(mean(models), before, atol=1e-5, rtol=1e-5)
    assert max(float((w.x - before).norm()) for w in models) < apart
    assert met() >= 12


def test_whoever_reads_the_statistics_is_not_disturbed_by_those_who_count() -> None:
    stats = MixStats()
    stats.met(2)
    known = stats.now()
    for size in known.sizes:  # a journal adds up while a partner's swap is answered on another thread
        stats.met(size + 1)
        stats.corrected(size)
    assert known.sizes == {2: 1} and not known.staleness
    stats.spent(waiting_s=0.5, mixing_s=0.25)
    stats.broke()
    assert stats.now() == (Counter({2: 1, 3: 1}), Counter({2: 1}), 0.5, 0.25, 1)
    assert stats.now().mixed == 2 and mean_of(stats.now().sizes) == 2.5


# --- the learning rate at the time of mixing

RATE = warm_up(0.2, updates=3, then=cosine(0.2, start=3, end=9))
UPDATES = 8


def small_job() -> Job:
    model = small_mlp()
    return Job(model=model, counts=(len(model.blocks),), schedule="dp", batches=2 * UPDATES, seed=3)


def plain_stage(job: Job) -> Stage:
    """Plain SGD: without momentum of its own."""
    make = partial(torch.optim.SGD, lr=1.0)
    return make_stage(job.model, job.counts, 0, make, seed=job.seed, criterion=job.criterion, window=1)


def train(job: Job, stage: Stage, mixer: Any, samples: Callable[[int], int]) -> None:
    """All updates of one replica, which reads the micro-batches that `samples` names."""
    hooks = Hooks(
        inputs=lambda m: job.batch(samples(m))[0],
        targets=lambda m: (job.batch(samples(m))[1], job.criterion.count(job.batch(samples(m))[1])),
        learning_rate=RATE,
    )
    end = local_transports(1)[0]
    executor = Executor(stage, end, position=0, stages=1, hooks=hooks, mixer=mixer)
    executor.run(program(SCHEDULES["dp"], Shape(stages=1, mixing=True), 0, range(UPDATES)))
    mixer.drain()
    mixer.close()


class Listening(PartialReduce):
    """Remembers at which rate it was told to mix after which step."""

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Any:
        heard.append((step, learning_rate))
        return super().mix(x, step, learning_rate=learning_rate)


heard: list[tuple[int, float]] = []


@pytest.mark.parametrize("kind", [BlockingMixer, OverlappedMixer])
def test_a_dialogue_hears_the_rate_of_the_update_it_mixes(kind: Any) -> None:
    heard.clear()
    job = small_job()
    stage = plain_stage(job)
    sync = Listening(blocking=kind is BlockingMixer)
    train(job, stage, kind(StageVector(stage), sync, link(Room(1), 0), guard=nullcontext()), lambda m: m)
    assert heard and heard[0] == (1, RATE(0)), "the first update has a rate too"
    assert all(rate == RATE(step - 1) for step, rate in heard)
    assert kind is OverlappedMixer or len(heard) == UPDATES


def test_slowmo_after_every_step_equals_its_recurrence() -> None:
    """x <- a - alpha lr u, u <- beta u + (a - mean of the replicas' steps from a) / lr, with lr of that very step."""
    alpha, beta, job, room = 0.8, 0.6, small_job(), Room(2)
    stages = [plain_stage(job) for _ in range(2)]
    mixers = []
    for number, stage in enumerate(stages):
        vector = StageVector(stage)
        sync = LocalSgd(Calendar(local_steps=1), Outer(SlowMo(alpha=alpha, beta=beta)))
        sync.begin(vector.read())
        mixers.append(BlockingMixer(vector, sync, link(room, number), guard=nullcontext()))
    together(*(lambda n=n: train(job, stages[n], mixers[n], lambda m: 2 * m + n) for n in range(2)))  # type: ignore[misc]

    unsplit = Unsplit(job)
    weights = [p for module in unsplit.modules for p in module.parameters()]
    slow = [torch.zeros_like(p) for p in weights]
    for step in range(UPDATES):
        for number in range(2):  # the mean of the two steps from a is one step along the mean of the gradients
            (unsplit.loss(unsplit.modules, 2 * step + number) / 2).backward()
        for p, u in zip(weights, slow, strict=True):
            u.mul_(beta).add_(p.grad)
            p.data.sub_(u, alpha=alpha * RATE(step))
            p.grad = None
    for stage in stages:
        assert_equal(stage.model_state(), unsplit.state(), tolerance=2e-5)
