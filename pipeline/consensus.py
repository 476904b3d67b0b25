"""How far apart the replicas are, while they train: estimated from a few coordinates of each, so that nobody stops.

    distance = sqrt(mean over pipelines of ||x_i - mean(x)||^2),  x_i all weights of pipeline i

m of the n coordinates of a stage, the same on all its replicas, stand for all: their squares times n / m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

COORDINATES = 1024  # of a pipeline

Rows = Mapping[int, Sequence[float]]


class Gather(Protocol):
    """Gives a value; the future holds those of all live workers, by rank."""

    def __call__(self, key: str, value: Any, scope: str, /) -> Future[dict[int, Any]]: ...


def estimate(rows: Rows, *, stages: int, scale: Mapping[int, float]) -> float:
    """The distance, from sampled coordinates by rank (pipeline * stages + stage) and n / m of every stage."""
    pipelines = {rank // stages for rank in rows}
    total = 0.0
    for stage in {rank % stages for rank in rows}:
        samples = torch.tensor([rows[rank] for rank in sorted(rows) if rank % stages == stage], dtype=torch.float64)
        total += scale[stage] * float((samples - samples.mean(0)).square().sum())
    return math.sqrt(total / len(pipelines))


class ConsensusProbe:
    """Samples a stage's weights every so many updates and reports the distance when all have sampled theirs.

    Args:
        read: the flat weights, (n,). tell: is called with (update, distance).
    """

    def __init__(
        self,
        gather: Gather,
        read: Callable[[], Tensor],
        *,
        every: int,
        stages: int,
        tell: Callable[[int, float], object],
    ) -> None:
        self._gather, self._read, self._tell = gather, read, tell
        self._every, self._stages = every, stages
        self._waiting: dict[int, Future[dict[int, Any]]] = {}

    def updated(self, update: int) -> None:
        """After the update of that number, from 1."""
        if not self._every:
            return
        if update % self._every == 0:
            self._waiting[update] = self._gather(f"consensus/{update}", self._sample(), "all")
        for number in [number for number, rows in self._waiting.items() if rows.done()]:
            self._report(number, self._waiting.pop(number))

    def forget(self) -> None:
        """Gives up what some replica will never sample, at the end of a segment."""
        self._waiting.clear()

    def _sample(self) -> list[float]:
        """n first, then m coordinates."""
        x = self._read()
        count = min(x.numel(), max(1, COORDINATES // self._stages))
        chosen = torch.linspace(0, x.numel() - 1, count).long()
        return [float(x.numel()), *x[chosen.to(x.device)].double().tolist()]

    def _report(self, update: int, answer: Future[dict[int, Any]]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # the loop meets the error where it can act on it
        rows = answer.result()
        scale = {rank % self._stages: row[0] / (len(row) - 1) for rank, row in rows.items()}
        samples = {rank: row[1:] for rank, row in rows.items()}
        self._tell(update, estimate(samples, stages=self._stages, scale=scale))
