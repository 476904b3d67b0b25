"""Mixers: the same dialogue at once, during the next step, or at any time; replicas are threads, wires are dicts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.coordination import Group
from pipeline.errors import Fenced, GroupBroken
from pipeline.mixer import AsynchronousMixer, BlockingMixer, Link, MixStats, OverlappedMixer
from pipeline.sync.adpsgd import AdPsgd
from pipeline.sync.local_sgd import Calendar, LocalSgd
from pipeline.sync.preduce import PartialReduce

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
    mixer.request()
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
        BlockingMixer(weights, PartialReduce(blocking=True), link(room, n), guard=nullcontext(), rate=lambda: 0.1)  # type: ignore[arg-type]
        for n, weights in enumerate(models)
    ]
    together(*(lambda m=m, w=w: step(m, w, 1.0) for m, w in zip(mixers, models, strict=True)))  # type: ignore[misc]
    for weights in models:
        torch.testing.assert_close(weights.x, before + 1.0)


def test_a_step_without_an_average_leaves_everything_alone() -> None:
    (weights,) = replicas(1)
    before = weights.read()
    sync = LocalSgd(Calendar(local_steps=2))
    mixer = BlockingMixer(weights, sync, link(Room(1), 0), guard=nullcontext(), rate=lambda: 0.1)  # type: ignore[arg-type]
    step(mixer, weights)
    assert torch.equal(weights.x, before)


@pytest.mark.parametrize("error", [GroupBroken(1), Fenced("away")])
def test_a_group_that_breaks_leaves_the_weights_as_they_are(error: Exception) -> None:
    (weights,) = replicas(1)
    before, broken = weights.read(), link(Room(2), 0, error)
    mixer = BlockingMixer(weights, PartialReduce(blocking=True), broken, guard=nullcontext(), rate=lambda: 0.1)  # type: ignore[arg-type]
    step(mixer, weights)
    assert torch.equal(weights.x, before)
    assert broken.stats.broken == isinstance(error, GroupBroken)


def test_overlapped_corrections_come_later_and_preserve_the_mean() -> None:
    room, models = Room(2), replicas(2)
    before = mean(models)
    mixers = [
        OverlappedMixer(weights, PartialReduce(blocking=False), link(room, n), guard=nullcontext(), rate=lambda: 0.1)  # type: ignore[arg-type]
        for n, weights in enumerate(models)
    ]
    step(mixers[0], models[0])
    only_own = models[0].read()
    step(mixers[1], models[1])
    for mixer in mixers:  # whatever is trained meanwhile stays
        mixer.request()
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

    def train(n: int) -> None:
        for _ in range(40):
            step(mixers[n], models[n])

    together(*(lambda n=n: train(n) for n in range(3)))  # type: ignore[misc]
    for mixer in mixers:
        mixer.drain()
    for mixer in mixers:  # a passive one may have been asked after its own drain: it declined
        mixer.close()
    torch.testing.assert_close(mean(models), before, atol=1e-5, rtol=1e-5)
    assert max(float((w.x - before).norm()) for w in models) < apart
    assert sum(one.stats.sizes[2] for one in links) > 0
