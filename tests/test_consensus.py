"""The distance between replicas, from samples of their weights."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from pipeline.replicas.consensus import WAITING, ConsensusProbe, Gather, estimate, probes


def test_two_replicas_that_differ_everywhere_by_two_are_sqrt_n_from_their_mean() -> None:
    rows = {0: [1.0] * 8, 1: [3.0] * 8}
    assert estimate(rows, stages=1, scale={0: 100 / 8}) == pytest.approx(math.sqrt(100))


@pytest.mark.parametrize(
    ("last", "update", "every", "due"),
    [
        (None, 1, 2, []),
        (None, 4, 2, [4]),
        (3, 4, 2, [4]),
        (4, 4, 2, []),
        (4, 11, 3, [6, 9]),
        (0, 3, 1, [1, 2, 3]),
        (5, 2, 1, []),
    ],
)
def test_a_probe_is_due_whenever_the_job_has_passed_its_update(
    last: int | None, update: int, every: int, due: list[int]
) -> None:
    assert list(probes(last, update, every)) == due


class Gatherer:
    """Collects what replicas give, and answers when all have."""

    def __init__(self, replicas: int) -> None:
        self.given: dict[str, dict[int, Any]] = {}
        self.answers: dict[str, list[Future[Any]]] = {}
        self._replicas = replicas

    def of(self, rank: int) -> Gather:
        def gather(key: str, value: Any, scope: str, fold: str) -> Future[Any]:
            assert (scope, fold) == ("all", "rows to speaker")
            rows = self.given.setdefault(key, {})
            rows[rank] = value
            futures = self.answers.setdefault(key, [])
            futures.append(Future())
            if len(rows) == self._replicas:
                for number, future in enumerate(futures):
                    future.set_result(rows if number == 0 else None)
            return futures[-1]

        return gather


def test_the_probe_speaks_when_all_replicas_have_sampled() -> None:
    told: list[tuple[int, float]] = []
    gatherer = Gatherer(2)
    probe, other = (
        ConsensusProbe(gatherer.of(rank), lambda x=x: x, every=2, stages=1, tell=lambda *event: told.append(event))  # type: ignore[misc]
        for rank, x in enumerate((torch.zeros(5000), torch.full((5000,), 2.0)))
    )
    for update in range(1, 4):
        probe.updated(update)
    assert list(gatherer.given) == ["consensus/2"] and not told
    other.updated(2)
    probe.updated(3)
    other.updated(3)
    assert told == [(2, pytest.approx(math.sqrt(5000)))]


def test_uneven_replicas_all_give_to_every_probe() -> None:
    gatherer, told = Gatherer(2), []
    fast, slow = (
        ConsensusProbe(gatherer.of(rank), lambda: torch.zeros(8), every=1, stages=1, tell=lambda *e: told.append(e))
        for rank in (0, 1)
    )
    for update in range(1, 2001):
        fast.updated(update)
        if update % 20 == 1:
            slow.updated(update)
        assert len(fast._waiting) <= WAITING
    slow.updated(2000)
    fast.updated(2000)
    assert len(told) == 2000 and all(len(rows) == 2 for rows in gatherer.given.values())


def test_whoever_joins_does_not_give_to_probes_of_the_time_without_it() -> None:
    gatherer = Gatherer(2)
    probe = ConsensusProbe(gatherer.of(1), lambda: torch.zeros(8), every=1, stages=1, tell=lambda *event: None)
    probe.updated(1)
    probe.begin_anew()
    probe.updated(500)
    probe.updated(501)
    assert list(gatherer.given) == ["consensus/1", "consensus/500", "consensus/501"]


def test_a_stage_without_parameters_that_are_trained_adds_nothing() -> None:
    gatherer, told = Gatherer(4), []
    weights = (torch.zeros(100), torch.zeros(0), torch.full((100,), 2.0), torch.zeros(0))  # of stages 0, 1, 0, 1
    for rank, x in enumerate(weights):
        tell = lambda *event: told.append(event)  # noqa: E731
        probe = ConsensusProbe(gatherer.of(rank), lambda x=x: x, every=1, stages=2, tell=tell)  # type: ignore[misc]
        probe.updated(1)
        if rank == 0:
            first = probe
    first.updated(2)
    assert told == [(1, pytest.approx(math.sqrt(100)))]
