"""The distance between replicas, from samples of their weights."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from pipeline.consensus import ConsensusProbe, estimate


def test_two_replicas_that_differ_everywhere_by_two_are_sqrt_n_from_their_mean() -> None:
    rows = {0: [1.0] * 8, 1: [3.0] * 8}
    assert estimate(rows, stages=1, scale={0: 100 / 8}) == pytest.approx(math.sqrt(100))


def test_the_probe_speaks_when_all_replicas_have_sampled() -> None:
    answers: list[tuple[Any, Future[dict[int, Any]]]] = []

    def gather(key: str, value: Any, scope: str) -> Future[dict[int, Any]]:
        answers.append((value, Future()))
        return answers[-1][1]

    told: list[tuple[int, float]] = []
    weights = torch.zeros(5000)
    probe = ConsensusProbe(gather, lambda: weights, every=2, stages=1, tell=lambda *event: told.append(event))
    for update in range(1, 4):
        probe.updated(update)
    assert len(answers) == 1 and not told
    mine, future = answers[0]
    future.set_result({0: mine, 1: [5000.0, *(2.0 for _ in mine[1:])]})
    probe.updated(5)
    assert told == [(2, pytest.approx(math.sqrt(5000)))]
