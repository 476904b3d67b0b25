"""Simulated stragglers: who is slowed, when and by how much. This module decides; `straggler.py` waits.

    F0 ---- B0 ----            at full speed
    F0 ---- zzz B0 ----        a pause, by chance, before a forward or a backward
    F0 -------- B0 --------    slowed by a factor of 2: the op lasts twice as long

Each rule may name a pipeline, a stage and a host; what it does not name it does not ask for. Factors that meet
multiply, pauses add up, and of several bandwidths the least one holds. `parse_profile.py` says how they are written.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.core.actions import Op
from pipeline.core.draw import draw
from pipeline.errors import UserError
from pipeline.placement import Place

SLOWED = (Op.FORWARD, Op.BACKWARD)
_ONE = 1 << 63  # draws are below
_PAUSES = 0x5D31  # keeps these draws apart from others that begin with the seed


@dataclass(frozen=True, kw_only=True)
class Whom:
    """Whom a rule concerns, and the words it was given in; None is anybody."""

    text: str
    pipeline: int | None = None
    stage: int | None = None
    host: str | None = None

    def includes(self, where: Place) -> bool:
        return (
            self.pipeline in (None, where.pipeline)
            and self.stage in (None, where.stage)
            and self.host in (None, where.host)
        )

    def joins(self, source: Place, to: Place) -> bool:
        """Whether a link between two stages is meant: one of its ends; of a host, only what enters or leaves it."""
        inside = self.host is not None and source.host == to.host
        return not inside and (self.includes(source) or self.includes(to))


@dataclass(frozen=True)
class Pause:
    """Before a forward or a backward, with this probability, wait that many seconds."""

    whom: Whom
    probability: float
    seconds: float


@dataclass(frozen=True)
class Slow:
    """From `start_s` to `stop_s` of training an op lasts `factor` times as long."""

    whom: Whom
    slowdown: float
    start_s: float = 0.0
    stop_s: float = math.inf

    def factor(self, at_s: float) -> float:
        return self.slowdown if self.start_s <= at_s < self.stop_s else 1.0


@dataclass(frozen=True)
class Trace:
    """From each time (in seconds of training) to the next one this speed, of a full speed of 1; full speed before."""

    whom: Whom
    times: tuple[float, ...]
    speeds: tuple[float, ...]

    def factor(self, at_s: float) -> float:
        index = bisect_right(self.times, at_s) - 1
        return 1.0 if index < 0 else 1.0 / self.speeds[index]


@dataclass(frozen=True)
class Link:
    """A link between two stages of a pipeline carries so many bytes per second in each direction."""

    whom: Whom
    bandwidth: float


Rule = Pause | Slow | Trace | Link


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that slows a job down; without rules, nothing."""

    pauses: tuple[Pause, ...] = ()
    slowdowns: tuple[Slow | Trace, ...] = ()
    links: tuple[Link, ...] = ()

    def pause_before(self, where: Place, microbatch: int, op: Op, seed: int) -> float:
        """Seconds to wait before an op; the same for the same arguments, in every run."""
        total = 0.0
        for number, pause in enumerate(self.pauses):
            if pause.whom.includes(where):
                drawn = draw(seed, _PAUSES, number, where.pipeline, where.stage, microbatch, SLOWED.index(op))
                total += pause.seconds if drawn < pause.probability * _ONE else 0.0
        return total

    def stretch(self, where: Place, op: Op, took_s: float, now_s: float) -> float:
        """Seconds to wait after an op that took `took_s` and ended at `now_s`, both without this wait.

        The speed at its beginning holds for the whole op. Times count from the beginning of training.
        """
        return took_s * (self.factor(where, now_s - took_s) - 1.0)

    def factor(self, where: Place, at_s: float) -> float:
        """How many times as long an op lasts that begins at this time."""
        return math.prod(slow.factor(at_s) for slow in self.slowdowns if slow.whom.includes(where))

    def bandwidth(self, source: Place, to: Place) -> float | None:
        """Bytes per second from one stage to another of its pipeline; None where nothing limits them."""
        return min((link.bandwidth for link in self.links if link.whom.joins(source, to)), default=None)

    def stretches(self, where: Place) -> bool:
        """Whether ops of this worker are ever made longer, so that they have to be timed."""
        return any(slow.whom.includes(where) for slow in self.slowdowns)

    def slows(self, where: Place) -> bool:
        """Whether this worker ever waits for our sake."""
        return self.stretches(where) or any(pause.whom.includes(where) for pause in self.pauses)

    def edges(self, row: Sequence[Place]) -> dict[tuple[int, int], float]:
        """(source stage, other stage) -> bytes per second, of the limited links of a pipeline with these stages."""
        limits = {(a.stage, b.stage): self.bandwidth(a, b) for a in row for b in row if a is not b}
        return {edge: limit for edge, limit in limits.items() if limit is not None}


def check_places(profile: Profile, places: Sequence[Place]) -> None:
    """UserError if a rule concerns nothing in this layout: a wrong number or name would silently do nothing."""
    pairs = [(a, b) for a in places for b in places if a.pipeline == b.pipeline and a.stage != b.stage]
    slowing = (*profile.pauses, *profile.slowdowns)
    idle = [rule.whom for rule in slowing if not any(rule.whom.includes(place) for place in places)]
    idle += [link.whom for link in profile.links if not any(link.whom.joins(a, b) for a, b in pairs)]
    if idle:
        raise UserError(
            f"--hetero {idle[0].text}: concerns nothing in this layout, which has pipelines "
            f"{_range(place.pipeline for place in places)}, stages {_range(place.stage for place in places)} "
            f"and hosts {', '.join(dict.fromkeys(place.host for place in places))}"
        )


def _range(numbers: Iterable[int]) -> str:
    last = max(numbers)
    return f"0 to {last}" if last else "0"
