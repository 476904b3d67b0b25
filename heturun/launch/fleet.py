"""What an elastic job survives: one `Outcome` per pipeline; events and times in, orders and a verdict out.

a failure before "elastic" was said       the end of the job, as `outcome` has it
      but: killed, or its host gone       of a job that is to be elastic: as below, the others begin without it
after it: rank 4 of pipeline 2 fails      Tell the coordinator, at once
          why is known                    GiveUp the other ranks; the end of the job if too few pipelines go on
          all its ranks are closed        Gone; Restart, if that is allowed and somebody is left to copy from
the coordinator fails                     the workers get LAST_CHECKPOINT_S to end by themselves
a pipeline ended well                     the others get END_S; one that is frozen would never end
                                          and nobody waits for one whose host does not answer
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from heturun.launch.outcome import SETTLE_S, Elastic, Event, Lost, Outcome, Published, Signalled, Silent, Verdict
from pipeline.cluster.control import STOPPED

COORDINATOR = "coordinator"  # under this key it publishes its address
CUT_OFF = "its host was switched off or cut off"
LAST_CHECKPOINT_S = 60.0  # for the workers to write a checkpoint when the coordinator is lost
END_S = 20.0  # for the other pipelines when one has ended well: they end together, but one may be frozen or starting


class Rules(NamedTuple):
    """What the user allows.

    min_replicas: fewer pipelines are an error (None: as the processes say). max_restarts: of each pipeline.
    start_s: for the processes of a restarted pipeline to check in.
    """

    min_replicas: int | None = None
    max_restarts: int = 0
    start_s: float = 60.0


class Tell(NamedTuple):
    """Tell the coordinator that this incarnation of a pipeline is lost."""

    pipeline: int
    incarnation: int
    message: str


class GiveUp(NamedTuple):
    """Say why a pipeline is lost and how many go on, and end those of its ranks that are still there."""

    pipeline: int
    incarnation: int
    verdict: Verdict
    left: int


class Gone(NamedTuple):
    """Nothing of a lost pipeline runs any more; what started it may end."""

    pipeline: int
    incarnation: int


class Restart(NamedTuple):
    """Start the processes of a pipeline again, in this incarnation."""

    pipeline: int
    incarnation: int


Order = Tell | GiveUp | Gone | Restart


class TooFew(NamedTuple):
    """The end of an elastic job: `left` pipelines, though `wanted` are needed; and the first loss."""

    left: int
    wanted: int
    first: Verdict


class Loss(NamedTuple):
    """A pipeline was lost, and why."""

    pipeline: int
    incarnation: int
    verdict: Verdict


@dataclass(frozen=True)
class Pipeline:
    """One pipeline: what is known of its ranks in their present incarnation, and how far its loss was dealt with.

    `silent`: ranks whose hosts do not answer at present.
    """

    number: int
    outcome: Outcome
    incarnation: int = 0
    start_by: float = inf
    told: bool = False
    lost: bool = False
    gone: bool = False
    silent: frozenset[int] = frozenset()

    def after(self, event: Event, now: float) -> Pipeline:
        """With one more event; those of an earlier incarnation change nothing."""
        if getattr(event, "incarnation", self.incarnation) != self.incarnation:
            return self
        if isinstance(event, Silent):
            ranks = frozenset(event.ranks) & frozenset(self.outcome.ranks)
            return replace(self, silent=self.silent | ranks if event.silent else self.silent - ranks)
        return replace(self, outcome=self.outcome.after(event, now))

    def at(self, now: float) -> Pipeline:
        """At a time when those who have not started may have to be given up."""
        missing = self.outcome.missing
        if self.lost or now < self.start_by or not missing:
            return self
        return self.after(Lost(missing, "it did not start in time", self.incarnation), now)

    def again(self, start_by: float) -> Pipeline:
        """The next incarnation, of which nothing is known yet."""
        return Pipeline(self.number, Outcome(self.outcome.ranks), self.incarnation + 1, start_by)

    def given_up(self, text: str, now: float) -> Pipeline:
        """Nobody waits any longer for those of its ranks that are not through."""
        return self.after(Lost(tuple(self.outcome.ranks), text, self.incarnation), now)

    @property
    def runs(self) -> bool:
        return not self.lost and not self.outcome.over

    @property
    def out_of_reach(self) -> bool:
        return bool(self.silent - self.outcome.closed)

    def look_again_at(self, now: float) -> float | None:
        if self.lost:
            return None
        start_by = self.start_by if self.outcome.missing else inf
        return min(start_by, self.outcome.look_again_at(now) or inf)


@dataclass(frozen=True)
class Fleet:
    """All pipelines of a job and its coordinator.

    Attributes:
        whole: all ranks as one, which is what counts until the job is elastic.
        coordinator: the pseudo-process, whether it was started or not.
        least: the least number of replicas of a job that is to become elastic; None of one that never will.
        elastic: what the processes asked for; None until they have begun, all of them.
        coordinated: whether the coordinator has published its address.
        losses: so far, in their order.
        end_by: when a pipeline that still runs is given up, since another has ended well.
        stopped: whether the coordinator has seen too few pipelines left: none is started again.
    """

    pipelines: tuple[Pipeline, ...]
    whole: Outcome
    coordinator: Outcome
    rules: Rules
    least: int | None = None
    elastic: int | None = None
    coordinated: bool = False
    losses: tuple[Loss, ...] = ()
    end_by: float = inf
    stopped: bool = False

    @classmethod
    def of(
        cls, pipelines: Sequence[Collection[int]], *, coordinator: int, rules: Rules, least: int | None = None
    ) -> Fleet:
        """A job of which nothing is known yet, from the ranks of its pipelines."""
        return cls(
            pipelines=tuple(Pipeline(number, Outcome(tuple(ranks))) for number, ranks in enumerate(pipelines)),
            whole=Outcome(tuple(sorted(rank for ranks in pipelines for rank in ranks))),
            coordinator=Outcome((coordinator,)),
            rules=rules,
            least=least,
        )

    def after(self, event: Event, now: float) -> Fleet:
        """What is known after one more event, which arrived at time `now`."""
        if isinstance(event, Elastic):
            begins = self.elastic is None and not self._at_fault.complaints
            return replace(self, elastic=event.min_replicas) if begins else self
        if isinstance(event, Published) and event.key == STOPPED:
            return replace(self, stopped=True)
        if isinstance(event, Published):
            return replace(self, coordinated=True) if event.key == COORDINATOR else self
        if isinstance(event, Signalled):
            return self
        if isinstance(event, Silent) and event.silent and self.elastic is None:
            event = Lost(event.ranks, CUT_OFF, event.incarnation)
        return replace(
            self,
            pipelines=tuple(pipeline.after(event, now) for pipeline in self.pipelines),
            whole=self.whole.after(event, now),
            coordinator=self.coordinator.after(event, now),
        )

    # --- orders

    def orders(self, now: float) -> tuple[Fleet, list[Order]]:
        """What is to be done now about pipelines that were lost, and the fleet after it."""
        if self.coordinator.complaints:
            return self, []
        fleet, orders = self._at(now), list[Order]()
        for pipeline in fleet.pipelines:
            if fleet.elastic is not None or pipeline.number in fleet._excused:
                fleet, more = fleet._orders(pipeline.at(now), now)
                orders += more
        return fleet, orders

    @property
    def _excused(self) -> frozenset[int]:
        """Pipelines that were lost before the job had begun, which begins without them."""
        if self.elastic is not None or self.least is None:
            return frozenset()
        lost = {loss.pipeline for loss in self.losses}
        return frozenset(p.number for p in self.pipelines if p.number in lost or p.outcome.ended_from_outside)

    @property
    def _at_fault(self) -> Outcome:
        """The failures that end a job which has not begun."""
        excused = {rank for number in self._excused for rank in self.pipelines[number].outcome.ranks}
        if not excused:
            return self.whole
        return replace(self.whole, complaints=tuple(c for c in self.whole.complaints if c.rank not in excused))

    def _at(self, now: float) -> Fleet:
        """Once a pipeline has ended well, nothing is left to do for the others."""
        ended_well = any(pipeline.outcome.over and not pipeline.outcome.complaints for pipeline in self.pipelines)
        if self.elastic is None or not ended_well:
            return self
        end_by = min(self.end_by, now + END_S)
        late = f"it had not ended {END_S:g} s after the others" if now >= end_by else None
        whys = [CUT_OFF if pipeline.out_of_reach else late for pipeline in self.pipelines]
        pipelines = [p if why is None else p.given_up(why, now) for p, why in zip(self.pipelines, whys, strict=True)]
        return replace(self, end_by=end_by, pipelines=tuple(pipelines))

    def _orders(self, pipeline: Pipeline, now: float) -> tuple[Fleet, list[Order]]:
        fleet, orders, known = self, list[Order](), (pipeline.number, pipeline.incarnation)
        if pipeline.outcome.complaints and not pipeline.told:
            pipeline = replace(pipeline, told=True)
            orders.append(Tell(*known, pipeline.outcome.complaints[0].message or "a process ended"))
        verdict = None if pipeline.lost else pipeline.outcome.verdict(now)
        if verdict is not None:
            pipeline = replace(pipeline, lost=True)
            fleet = replace(fleet._with(pipeline), losses=(*fleet.losses, Loss(*known, verdict)))
            orders.append(GiveUp(*known, verdict, fleet.left))
        if pipeline.lost and not pipeline.gone and pipeline.outcome.over:
            pipeline = replace(pipeline, gone=True)
            orders.append(Gone(*known))
            if fleet._may_restart(pipeline):
                pipeline = pipeline.again(now + self.rules.start_s)
                orders.append(Restart(pipeline.number, pipeline.incarnation))
        return fleet._with(pipeline), orders

    def _with(self, changed: Pipeline) -> Fleet:
        return replace(self, pipelines=tuple(changed if p.number == changed.number else p for p in self.pipelines))

    def _may_restart(self, pipeline: Pipeline) -> bool:
        allowed = pipeline.incarnation < self.rules.max_restarts and self.left >= self.wanted
        return (
            allowed
            and not self.stopped
            and any(other.runs for other in self.pipelines if other.number != pipeline.number)
        )

    # --- what it comes to

    @property
    def left(self) -> int:
        """How many pipelines were not lost."""
        return sum(not pipeline.lost for pipeline in self.pipelines)

    @property
    def wanted(self) -> int:
        """The least number of pipelines."""
        asked = self.least if self.elastic is None else self.elastic
        return max(1, asked or 1) if self.rules.min_replicas is None else self.rules.min_replicas

    def verdict(self, now: float) -> Verdict | TooFew | None:
        """Why the job must end; None while it may go on."""
        if self._coordinator_failed:
            return self.coordinator.verdict(now) if now >= self._judged_at else None
        if self.elastic is None:
            return self._verdict_at_the_beginning(now)
        mistakes = (pipeline.outcome.mistake for pipeline in self.pipelines)
        mistake = next((found for found in mistakes if found is not None), None)
        if mistake is not None:
            return mistake
        if self.left >= self.wanted or now < self._blamed_at:
            return None
        return TooFew(self.left, self.wanted, self.losses[0].verdict)

    def _verdict_at_the_beginning(self, now: float) -> Verdict | TooFew | None:
        verdict = self._at_fault.verdict(now)
        if verdict is not None or not self.losses:
            return verdict
        if self.left < self.wanted:
            return TooFew(self.left, self.wanted, self.losses[0].verdict)
        return self.losses[0].verdict if self.closed else None  # the others have ended: it never was elastic

    @property
    def _blamed_at(self) -> float:
        """Until then a failure of the coordinator may yet be heard of, of which those of the pipelines only follow."""
        outcomes = [pipeline.outcome for pipeline in self.pipelines]
        if not self.coordinated or any(outcome.primary is not None for outcome in outcomes):
            return 0.0
        times = [complaint.time for outcome in outcomes for complaint in outcome.complaints]
        return max(times, default=0.0) + SETTLE_S

    @property
    def _coordinator_failed(self) -> bool:
        """Whether it is the coordinator's failure that ends the job."""
        others = self._at_fault.complaints if self.elastic is None else ()
        first = others[0].time if others else inf
        return bool(self.coordinator.complaints) and self.coordinator.complaints[0].time <= first

    @property
    def _judged_at(self) -> float:
        """When the coordinator's failure ends the job: the workers have ended, had their time to, or never began."""
        failed = self.coordinator.complaints[0].time
        return failed + LAST_CHECKPOINT_S if self.coordinated and not self.closed else failed

    def look_again_at(self, now: float) -> float | None:
        """When time alone may bring orders or a verdict."""
        if self._coordinator_failed:
            return self._judged_at if now < self._judged_at else self.coordinator.look_again_at(now)
        if self.elastic is None:
            times = [self.pipelines[number].look_again_at(now) for number in self._excused]
            times.append(self._at_fault.look_again_at(now))
            return min((time for time in times if time is not None and time < inf), default=None)
        times = [pipeline.look_again_at(now) for pipeline in self.pipelines]
        times.append(self.end_by if now < self.end_by and not self.closed else None)
        times.append(self._blamed_at if self.left < self.wanted else None)
        return min((time for time in times if time is not None and time < inf), default=None)

    @property
    def over(self) -> bool:
        """Every rank of every pipeline has ended, for good if `orders` were asked for, and nothing failed."""
        enough = not self.losses if self.elastic is None else self.left >= self.wanted
        judged = all(pipeline.lost or not pipeline.outcome.complaints for pipeline in self.pipelines)
        return self.closed and enough and judged and not self.coordinator.complaints

    @property
    def closed(self) -> bool:
        """Nothing of any pipeline runs."""
        return all(pipeline.outcome.over for pipeline in self.pipelines)

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have never started though they should have."""
        expected = [pipeline for pipeline in self.pipelines if not pipeline.lost and pipeline.incarnation == 0]
        return tuple(sorted(rank for pipeline in expected for rank in pipeline.outcome.missing))

    def unstarted(self, ranks: Collection[int], incarnation: int) -> tuple[int, ...]:
        """Those of `ranks` that have not started in this incarnation, which is their present one."""
        return tuple(rank for part in self._parts(incarnation) for rank in part.missing if rank in ranks)

    def open(self, ranks: Collection[int], incarnation: int) -> tuple[int, ...]:
        """Those of `ranks` that are not through in this incarnation, which is their present one."""
        return tuple(
            rank
            for part in self._parts(incarnation)
            for rank in part.ranks
            if rank in ranks and rank not in part.closed
        )

    def has_lost(self, ranks: Collection[int], incarnation: int) -> bool:
        """Whether any of `ranks` was lost in this incarnation."""
        lost = [(loss.incarnation, self.pipelines[loss.pipeline].outcome.ranks) for loss in self.losses]
        return any(when == incarnation and set(theirs) & set(ranks) for when, theirs in lost)

    def _parts(self, incarnation: int) -> list[Outcome]:
        parts = [pipeline.outcome for pipeline in self.pipelines if pipeline.incarnation == incarnation]
        return [*parts, self.coordinator] if incarnation == 0 else parts
