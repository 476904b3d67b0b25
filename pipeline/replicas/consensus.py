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
WAITING = 32  # probes at most whose distance is not known yet
ROWS = "rows to speaker"

Rows = Mapping[int, Sequence[float]]


class Gather(Protocol):
    """Gives a value; the future holds those of all live workers, by rank, at the one who speaks for all: else None."""

    def __call__(self, key: str, value: Any, scope: str, fold: str, /) -> Future[Rows | None]: ...


def estimate(rows: Rows, *, stages: int, scale: Mapping[int, float]) -> float:
    """The distance, from sampled coordinates by rank (pipeline * stages + stage) and n / m of every stage."""
    pipelines = {rank // stages for rank in rows}
    total = 0.0
    for stage in {rank % stages for rank in rows}:
        samples = torch.tensor([rows[rank] for rank in sorted(rows) if rank % stages == stage], dtype=torch.float64)
        total += scale[stage] * float((samples - samples.mean(0)).square().sum())
    return math.sqrt(total / len(pipelines))


def probes(last: int | None, update: int, every: int) -> range:
    """The probes that are due when a replica that last looked at one update (None: at none) comes to another."""
    before = update - 1 if last is None else last
    return range((before // every + 1) * every, update + 1, every)


class ConsensusProbe:
    """Samples a stage's weights every so many updates of the whole job and reports the distance when all have sampled.

        pipeline 0   updates 1 2 3 4 5 6 ...        every = 2: samples at 2, 4, 6
        pipeline 1           1     4     ...        it is slow: what it has at 4 is what it had at 2 and at 3

    So all give to every probe, however uneven they are, at about the same time.

    Args:
        read: the flat weights, (n,). tell: is called with (update, distance), where the values arrive.
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
        self._last: int | None = None  # update that was looked at
        self._waiting: dict[int, Future[Rows | None]] = {}

    def updated(self, update: int) -> None:
        """The whole job has come to the update of that number, from 1."""
        if not self._every:
            return
        due = probes(self._last, update, self._every)
        if due:
            sample = self._sample()
            self._waiting |= {number: self._gather(f"consensus/{number}", sample, "all", ROWS) for number in due}
        self._last = max(update, self._last or 0)
        for number in list(self._waiting)[:-WAITING]:  # some replica will never sample
            del self._waiting[number]
        for number in [number for number, rows in self._waiting.items() if rows.done()]:
            self._report(number, self._waiting.pop(number))

    def begin_anew(self) -> None:
        """What follows is not of the same life: the others have gone on without this replica."""
        self._last = None
        self._waiting.clear()

    def _sample(self) -> list[float]:
        """n first, then m coordinates; only n, which is 0, where all parameters of a stage are frozen."""
        x = self._read()
        count = min(x.numel(), max(1, COORDINATES // self._stages))
        chosen = torch.linspace(0, x.numel() - 1, count).long()
        return [float(x.numel()), *x[chosen.to(x.device)].double().tolist()]

    def _report(self, update: int, answer: Future[Rows | None]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # the loop meets the error where it can act on it
        rows = answer.result()
        if rows is None:
            return  # another one speaks
        scale = {rank % self._stages: row[0] / max(1, len(row) - 1) for rank, row in rows.items()}
        samples = {rank: row[1:] for rank, row in rows.items()}
        self._tell(update, estimate(samples, stages=self._stages, scale=scale))
