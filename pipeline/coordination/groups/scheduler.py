"""GroupScheduler: who averages with whom, for all stages of a job. Events and times in, commands out.

What one stage decides is its lane's: partial.py, everybody.py or matching.py. A stage that holds back requests may
wait for a pipeline that is not free to come; so the scheduler takes requests in the order in which they depend:

    stage 0   J5 ............. B5 U5 X5     the average X5 follows stage 1's B5, and so its X4: J5 counts as asked
    stage 1   J4 B4 U4 X4 J5 B5             only when J4 is answered, and is not made a group that waits for X4
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf

from pipeline.coordination.groups.events import Command, Event, Final, Form, Left, Ready, Tick, WakeAt
from pipeline.coordination.groups.everybody import Everybody
from pipeline.coordination.groups.matching import Matching
from pipeline.coordination.groups.partial import Partial
from pipeline.coordination.groups.policy import SCOPES, Attendance, Policy, Rules, Shared


class _Order:
    """The requests of each pipeline, in the order in which its stages depend on each other."""

    def __init__(self, pipelines: int, stages: int) -> None:
        self._open: list[list[float]] = [[inf] * stages for _ in range(pipelines)]  # the step that is not answered
        self._newest: list[list[float]] = [[-inf] * stages for _ in range(pipelines)]  # the last step that counted
        self._early: list[dict[int, Ready]] = [{} for _ in range(pipelines)]  # stage -> what does not count yet

    def early(self, pipeline: int) -> Collection[int]:
        """The stages at which this pipeline has asked too early."""
        return self._early[pipeline].keys()

    def counts(self, ready: Ready) -> bool:
        """Whether a request counts now; else `answered` returns it when it does."""
        stage, pipeline, step, _ = ready
        if min(self._open[pipeline][stage + 1 :], default=inf) < step:
            self._early[pipeline][stage] = ready
            return False
        self._open[pipeline][stage] = self._newest[pipeline][stage] = step
        return True

    def is_urgent(self, ready: Ready) -> bool:
        """Whether its message was overtaken by one that counts already though it depends on it: others may wait."""
        return max(self._newest[ready.pipeline][: ready.stage], default=-inf) > ready.step

    def answered(self, form: Form) -> list[Ready]:
        """The requests that count from now on."""
        released = []
        for pipeline in form.members:
            self._open[pipeline][form.stage] = inf
            early = self._early[pipeline]
            for stage in list(early):
                ready = early.pop(stage)
                if self.counts(ready):
                    released.append(ready)
        return released

    def left(self, pipeline: int) -> None:
        stages = len(self._open[pipeline])
        self._open[pipeline], self._newest[pipeline] = [inf] * stages, [-inf] * stages
        self._early[pipeline].clear()


_Lane = Partial | Everybody | Matching
POLICIES: dict[Policy, Callable[[Attendance, Shared], _Lane]] = {
    "partial": Partial,
    "all": Everybody,
    "matching": Matching,
}


class GroupScheduler:
    """Answers every `Ready` and `Final` of a live pipeline with exactly one `Form`; groups are disjoint.

    hosts[stage][pipeline]: for scope "host". live: who takes part at the start (default: all).

    >>> scheduler = GroupScheduler(1, 2, Rules())
    >>> scheduler.handle(Ready(0, 0, 1), 0.0)
    [WakeAt(time=0.002)]
    >>> scheduler.handle(Ready(0, 1, 1), 0.001)
    [Form(stage=0, round=1, members=(0, 1), reason='all who work are here', final=False)]
    """

    def __init__(
        self,
        stages: int,
        pipelines: int,
        rules: Rules,
        *,
        hosts: Sequence[Sequence[str]] | None = None,
        live: Iterable[int] | None = None,
    ) -> None:
        self._live = set(range(pipelines) if live is None else live)
        hosts = hosts or [[""] * pipelines] * stages
        self._job = Shared(rules, pipelines, stages)
        self._stages = [Attendance(number, hosts[number], set(self._live)) for number in range(stages)]
        self._lanes = [POLICIES[rules.policy](stage, self._job) for stage in self._stages]
        self._order = (
            _Order(pipelines, stages) if rules.policy == "partial" and stages > 1 else None
        )  # who holds needs it
        self._deadlines: dict[int, float] = {}  # stage -> when its round closes at the latest
        self._asked_for: float | None = None

    @property
    def live(self) -> frozenset[int]:
        return frozenset(self._live)

    def waiting(self, stage: int) -> tuple[int, ...]:
        """The pipelines whose request at this stage has not been answered, sorted."""
        order = self._order
        early = [] if order is None else [pipeline for pipeline in self._live if stage in order.early(pipeline)]
        return tuple(sorted((*self._lanes[stage].waiting, *self._stages[stage].drained, *early)))

    @property
    def holding(self) -> int | None:
        """The stage that keeps workers waiting so that its replicas become connected."""
        return self._job.holder

    @property
    def sizes(self) -> Counter[int]:
        """How many groups of each size there were, final ones not counted."""
        return self._job.sizes

    @property
    def singletons(self) -> int:
        return self._job.sizes[1]

    def handle(self, event: Event, now: float) -> list[Command]:
        """The groups that this event completes, and when to come back with a `Tick`.

        Raises:
            ValueError: a request of a pipeline that is not live or already waits at that stage; Joined of a live one.
        """
        if isinstance(event, Ready):
            forms = self._ready(event, now)
        elif isinstance(event, Tick):
            due = [stage for stage, deadline in self._deadlines.items() if now >= deadline]
            forms = [form for stage in due for form in self._lanes[stage].tick(now)]
            self._note_deadlines(due)
        elif isinstance(event, Final):
            forms = self._final(event, now)
        elif isinstance(event, Left):
            forms = self._left(event.pipeline, now)
        else:
            forms = self._joined(event.pipeline)
        if self._order is not None:
            self._follow(self._order, forms, now)
        commands: list[Command] = [*forms]
        wake = min(self._deadlines.values()) if self._deadlines else None
        if self._asked_for is not None and now >= self._asked_for:
            self._asked_for = None
        if wake is not None and (self._asked_for is None or wake < self._asked_for):
            self._asked_for = wake
            commands.append(WakeAt(wake))
        return commands

    def _follow(self, order: _Order, forms: list[Form], now: float) -> None:
        """Takes in the requests that count once those forms are answered, and appends what they complete."""
        for form in forms:  # which grows meanwhile
            for ready in order.answered(form):
                forms += self._lanes[ready.stage].ready(ready, now)
                self._note_deadlines((ready.stage,))

    def _note_deadlines(self, stages: Iterable[int]) -> None:
        for stage in stages:
            deadline = self._lanes[stage].deadline
            if deadline is None:
                self._deadlines.pop(stage, None)
            else:
                self._deadlines[stage] = deadline

    def _check(self, stage: int, pipeline: int) -> None:
        if not 0 <= stage < len(self._stages):
            raise ValueError(f"stage {stage} of {len(self._stages)}")
        if pipeline not in self._live:
            raise ValueError(f"pipeline {pipeline} asks at stage {stage} and is not live")
        early = self._order is not None and stage in self._order.early(pipeline)
        if early or pipeline in self._lanes[stage].waiting or pipeline in self._stages[stage].drained:
            raise ValueError(f"pipeline {pipeline} asks at stage {stage} and already waits there")

    def _ready(self, event: Ready, now: float) -> list[Form]:
        self._check(event.stage, event.pipeline)
        if event.scope not in SCOPES:
            raise ValueError(f"unknown scope {event.scope!r}; choose from {list(SCOPES)}")
        urgent, order = False, self._order
        if order is not None:
            if not order.counts(event):
                return []
            urgent = order.is_urgent(event)
        forms = self._lanes[event.stage].ready(event, now, urgent=urgent)
        self._note_deadlines((event.stage,))
        return forms

    def _final(self, event: Final, now: float) -> list[Form]:
        self._check(event.stage, event.pipeline)
        stage, lane = self._stages[event.stage], self._lanes[event.stage]
        stage.working.remove(event.pipeline)
        stage.drained.add(event.pipeline)
        forms = lane.absent(event.pipeline, now)
        forms += self._close(stage.number, now)
        self._note_deadlines((stage.number,))
        return forms

    def _close(self, number: int, now: float) -> list[Form]:
        """The final average of a stage, if everybody has drained."""
        stage, lane = self._stages[number], self._lanes[number]
        members = stage.all_drained()
        if not members:
            return []
        stage.drained.difference_update(members)
        stage.working.update(members)
        stage.meet()
        lane.restarted()
        return [self._job.form(number, members, "all live replicas have drained", final=True)]

    def _left(self, pipeline: int, now: float) -> list[Form]:
        if pipeline not in self._live:
            raise ValueError(f"pipeline {pipeline} leaves and is not live")
        self._live.remove(pipeline)
        if self._order is not None:
            self._order.left(pipeline)
        forms = []
        for stage, lane in zip(self._stages, self._lanes, strict=True):
            worked = pipeline in stage.working
            stage.remove(pipeline)
            if worked:
                forms += lane.absent(pipeline, now)
            forms += lane.left(pipeline, now)
            forms += self._close(stage.number, now)
        self._note_deadlines(range(len(self._stages)))
        return forms

    def _joined(self, pipeline: int) -> list[Form]:
        if pipeline in self._live or not 0 <= pipeline < self._job.pipelines:
            raise ValueError(f"pipeline {pipeline} of {self._job.pipelines} joins; live: {sorted(self._live)}")
        self._live.add(pipeline)
        meetings = max(stage.meetings for stage in self._stages)
        for stage, lane in zip(self._stages, self._lanes, strict=True):
            if meetings > stage.meetings and len(self._live) > 1:
                stage.late[pipeline] = meetings
            stage.working.add(pipeline)
            lane.present(pipeline)
        return []
