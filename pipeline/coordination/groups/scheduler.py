"""GroupScheduler: who averages with whom, for all stages of a job. Events and times in, commands out.

                      0.0 ms          0.4 ms            0.7 ms
    pipeline 0   ───────R───────────────┆─────────────────M
    pipeline 1   ───────┆───────────────R─────────────────M        R: Ready, M: its group {0, 1} is formed
    pipeline 2   ───────────────────────────────────────────────   expected in 9 ms: not worth waiting for

Partial reduce (Miao et al., SDPipe, PVLDB 16(9), 2023): a round of a stage closes when all who work there wait, or at a
deadline. So that the models still agree, the groups of a stage must connect all its replicas, directly or through
others, within `connect_within` rounds. A stage that is about to miss this *holds*: it forms only groups that connect
replicas that were not connected, and keeps the others waiting. One stage holds at a time: if two did, each could
wait for a pipeline that the other keeps waiting. A pipeline is never kept from arriving at the stage that holds:
no other stage keeps it longer than its deadline, and no average that it takes part in waits for one who is held.

    stage 0   J5 ............. B5 U5 X5     the average X5 follows stage 1's B5, and so its X4: J5 counts as asked
    stage 1   J4 B4 U4 X4 J5 B5             only when J4 is answered, and is not made a group that waits for X4
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from pipeline.coordination.groups.waits import WAITS
from pipeline.core.topology import Components, matching
from pipeline.errors import UserError

ROUNDS_PER_REPLICA = 10  # as the reference
SCOPES = ("", "host")
Policy = Literal["partial", "all", "matching"]


class Ready(NamedTuple):
    """A replica has made `step` updates and wants a group; `scope` "host" asks for replicas of its own host only."""

    stage: int
    pipeline: int
    step: int
    scope: str = ""


class Final(NamedTuple):
    """A replica has drained and wants the average over all live replicas of its stage."""

    stage: int
    pipeline: int


class Left(NamedTuple):
    """A pipeline was lost, or went; what it asked for is not answered any more."""

    pipeline: int


class Joined(NamedTuple):
    """A pipeline takes part from now on."""

    pipeline: int


class Tick(NamedTuple):
    """Time has passed."""


class Form(NamedTuple):
    """The answer to every member (pipelines, sorted) of a group; `round` is unique over all stages and increases."""

    stage: int
    round: int
    members: tuple[int, ...]
    reason: str
    final: bool = False


class WakeAt(NamedTuple):
    """A `Tick` is wanted at this time, whatever comes before; later ones are asked for then."""

    time: float


Event = Ready | Final | Left | Joined | Tick
Command = Form | WakeAt


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How groups are formed.

    partial: whoever is ready, in groups of at most `max_group`; within `connect_within` rounds of a stage (None: ten
        per replica) its groups have connected all replicas; `wait` is one of `waits.WAITS`: "hidden" where
        nobody stands still for the answer.
    all: a round has all live replicas of its scope, however long that takes.
    matching: pairs, drawn from (seed, step), of replicas that have made the same number of steps.
    """

    policy: Policy = "partial"
    max_group: int = 8
    connect_within: int | None = None
    wait: Literal["adaptive", "hidden", "reference"] = "adaptive"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("policy", POLICIES), ("wait", WAITS)):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {sorted(choices)}")
        if self.max_group < 2:
            raise UserError(f"--max-group {self.max_group}: a group has at least 2 members")
        if self.connect_within is not None and self.connect_within < 1:
            raise UserError(f"--connect-within {self.connect_within}: expected a number of rounds from 1 on")


@dataclass
class _Job:
    """What the stages share."""

    rules: Rules
    pipelines: int
    stages: int
    holder: int | None = None  # the one stage that keeps workers waiting for a connection
    rounds: int = 0
    sizes: Counter[int] = field(default_factory=Counter)

    def form(self, stage: int, members: Iterable[int], reason: str, *, final: bool = False) -> Form:
        self.rounds += 1
        form = Form(stage, self.rounds, tuple(sorted(members)), reason, final)
        if not final:
            self.sizes[len(form.members)] += 1
        return form


@dataclass
class _Stage:
    """Who is expected at one stage.

    A meeting is a round that nobody may miss: a final one, or any of policy "all". All stages of a pipeline must take
    part in the same meetings, or two pipelines would wait for each other at two stages. So a pipeline that joins is
    `late` for the meetings that another stage has already had.
    """

    number: int
    hosts: Sequence[str]
    working: set[int]
    drained: set[int] = field(default_factory=set)
    late: dict[int, int] = field(default_factory=dict)  # pipeline -> the meetings it has missed are this many
    meetings: int = 0

    def meet(self) -> None:
        self.meetings += 1
        self.late = {pipeline: missed for pipeline, missed in self.late.items() if missed > self.meetings}

    def remove(self, pipeline: int) -> None:
        self.working.discard(pipeline)
        self.drained.discard(pipeline)
        self.late.pop(pipeline, None)
        if len(self.late) == len(self.working) + len(self.drained):  # nobody is left who could have a meeting before
            self.late.clear()

    def all_drained(self) -> list[int]:
        """Who can have the final average: everybody but the late, once they have all drained."""
        if self.late:
            waiting = [pipeline for pipeline in self.drained if pipeline not in self.late]
            return waiting if self.working <= self.late.keys() else []
        return [] if self.working else list(self.drained)


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


class _Partial:
    """One stage under partial reduce."""

    def __init__(self, stage: _Stage, job: _Job) -> None:
        rules, pipelines = job.rules, job.pipelines
        self.deadline: float | None = None
        self.waiting: dict[int, None] = {}  # in the order of their arrival
        self._stage, self._job, self._max_group = stage, job, rules.max_group
        self._wait = WAITS[rules.wait](pipelines)
        self._limit = ROUNDS_PER_REPLICA * pipelines if rules.connect_within is None else rules.connect_within
        # While another stage holds, this one cannot: it asks early enough to have its turn.
        self._spare = min(self._limit // 2, pipelines * (job.stages - 1))
        self._rounds = 0  # since all were connected last
        self._components = Components(stage.working)
        self._held = False
        self._urgent: set[int] = set()  # must not be held
        self._splits = pipelines > rules.max_group
        # [pipeline][pipeline]: the round in which they met last; own entry: last round in company
        self._met = [[0] * pipelines for _ in range(pipelines)] if self._splits else []

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        self.waiting[event.pipeline] = None
        if urgent:
            self._urgent.add(event.pipeline)
        self._wait.arrived(event.pipeline, now)
        return self._settle(now)

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        self._urgent.discard(pipeline)
        self._components.remove(pipeline)
        self._wait.absent(pipeline)
        self._restart_if_connected()
        return self._settle(now)

    def left(self, pipeline: int, now: float) -> list[Form]:
        return []

    def present(self, pipeline: int) -> None:
        self._components.add(pipeline)
        self._rounds = 0

    def restarted(self) -> None:
        """Everybody has averaged with everybody."""
        self._wait.restarted(self._stage.working)
        self._components = Components(self._stage.working)
        self._rounds = 0

    def tick(self, now: float) -> list[Form]:
        return self._settle(now) if self.deadline is not None and now >= self.deadline else []

    def _settle(self, now: float) -> list[Form]:
        """Forms every group that need not wait."""
        forms: list[Form] = []
        self.deadline, closing = None, ""
        while self.waiting:
            if self._must_connect():
                members, reason = self._connecting(), f"connects replicas that had not met in {self._rounds} rounds"
                if not members:
                    members, reason = sorted(self._urgent)[: self._max_group], "the average of a stage before waits"
                if not members:
                    self._held = True
                    return forms
            else:
                closing = closing or self._closing(now)
                if not closing:
                    return forms
                members, reason = self._pick(list(self.waiting)), closing
            forms.append(self._form(members, reason, now))
        self._must_connect()  # hands the right to hold on
        self._held = False
        return forms

    def _closing(self, now: float) -> str:
        """Why the round closes now; "" if it does not, and then `deadline` says when it will."""
        missing = len(self._stage.working) - len(self.waiting)
        if self._held:
            return "released: all are connected again"
        if not missing:
            return "all who work are here"
        deadline = self._wait.deadline(now, missing=missing, full=len(self.waiting) >= self._max_group)
        if now >= deadline.time:
            return deadline.reason
        self.deadline = deadline.time
        return ""

    def _must_connect(self) -> bool:
        """Whether only connecting groups may be formed; takes and hands back the right to hold."""
        job, number = self._job, self._stage.number
        apart = self._components.count - 1
        due = apart > 0 and bool(self.waiting) and self._rounds + apart + self._spare >= self._limit
        if due and job.holder is None:
            job.holder = number
        elif not due and job.holder == number:
            job.holder = None
        return due and job.holder == number

    def _needed(self) -> int:
        """How many components a group has to connect so that the rounds that are left suffice."""
        apart, left = self._components.count - 1, max(1, self._limit - self._rounds)
        return min(1 + -(-apart // left), self._max_group)

    def _connecting(self) -> list[int]:
        """A group that connects, preferring replicas of different components; [] if those who wait cannot."""
        ones: dict[int, int] = {}  # component -> who came first of it
        for pipeline in self.waiting:
            ones.setdefault(self._components.find(pipeline), pipeline)
        if len(ones) < self._needed():
            return []
        firsts = list(ones.values())
        taken = set(firsts)
        others = [pipeline for pipeline in self.waiting if pipeline not in taken]
        size = max(self._even_size(), self._needed())
        if len(firsts) >= size:
            return firsts[:size]
        return self._pick([*firsts, *others], size=size, start=len(firsts))

    def _even_size(self) -> int:
        """Those who wait, shared out evenly among as few groups as possible: nobody is alone if a pair is possible."""
        count = len(self.waiting)
        return -(-count // -(-count // self._max_group))

    def _pick(self, candidates: list[int], *, size: int = 0, start: int = 0) -> list[int]:
        """A group of those who have not met for longest; the first `start` candidates are in it."""
        if len(candidates) <= self._max_group:
            return candidates
        size = size or self._even_size()
        pool = candidates[: max(16, 2 * self._max_group)]
        never, group = self._job.rounds + 1, pool[:start]
        if not group:  # whoever has been without company for longest
            group = [min(pool, key=lambda pipeline: self._met[pipeline][pipeline])]
        rows = [self._met[member] for member in group]
        last_met = [max(row[other] for row in rows) for other in pool] if start else [rows[0][other] for other in pool]
        for member in group:
            last_met[pool.index(member)] = never
        while len(group) < size:
            best = last_met.index(min(last_met))
            group.append(pool[best])
            row = self._met[pool[best]]
            last_met = list(map(max, last_met, [row[other] for other in pool]))
            last_met[best] = never
        return group

    def _form(self, members: list[int], reason: str, now: float) -> Form:
        form = self._job.form(self._stage.number, members, reason)
        size = len(members)
        for member in members:
            del self.waiting[member]
            self._urgent.discard(member)
            self._wait.answered(member, now, size=size, held=self._held)
        if size > 1:
            self._components.connect(members)
            if self._splits:
                for member in members:
                    row = self._met[member]
                    for other in members:
                        row[other] = form.round
        self._rounds += 1
        self._restart_if_connected()
        return form

    def _restart_if_connected(self) -> None:
        if self._components.count <= 1:
            self._rounds = 0
            if len(self._stage.working) > 1:
                self._components = Components(self._stage.working)


class _All:
    """One stage where a round has everybody of its scope."""

    deadline: float | None = None

    def __init__(self, stage: _Stage, job: _Job) -> None:
        self.waiting: dict[int, str] = {}  # pipeline -> scope
        self._stage, self._job = stage, job

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        stage = self._stage
        if event.scope == "host" and event.pipeline in stage.late:
            return [self._job.form(stage.number, [event.pipeline], "it has not met all others since it joined")]
        self.waiting[event.pipeline] = event.scope
        return self._settle({stage.hosts[event.pipeline]})

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        return self._settle({self._stage.hosts[pipeline]})

    def left(self, pipeline: int, now: float) -> list[Form]:
        return []

    def present(self, pipeline: int) -> None:
        """Counts from now on."""

    def restarted(self) -> None:
        """Nothing to forget."""

    def tick(self, now: float) -> list[Form]:
        return []

    def _settle(self, hosts: Iterable[str]) -> list[Form]:
        """Closes the round of all, or those of these hosts."""
        stage, waiting = self._stage, self.waiting
        forms = []
        if len(waiting) >= len(stage.working) - len(stage.late):
            meeting = [pipeline for pipeline in stage.working if pipeline not in stage.late]
            if meeting and all(waiting.get(pipeline) == "" for pipeline in meeting):
                stage.meet()
                forms.append(self._form(meeting, "everybody is here"))
        for host in hosts if any(waiting.values()) else ():
            expected = [
                pipeline
                for pipeline in stage.working
                if stage.hosts[pipeline] == host and pipeline not in stage.late and waiting.get(pipeline) != ""
            ]  # who waits for all others cannot come before this round is over
            if expected and all(pipeline in waiting for pipeline in expected):
                forms.append(self._form(expected, f"everybody of {host} is here"))
        return forms

    def _form(self, members: list[int], reason: str) -> Form:
        for member in members:
            del self.waiting[member]
        return self._job.form(self._stage.number, members, reason)


class _Matching:
    """One stage where every step has its pairs."""

    deadline: float | None = None
    REMEMBERED = 64  # matchings

    def __init__(self, stage: _Stage, job: _Job) -> None:
        self.waiting: dict[int, int] = {}  # pipeline -> step
        self._stage, self._job = stage, job
        self._steps = dict.fromkeys(stage.working, -1)  # the last step of everybody who may be matched
        self._matchings: dict[int, dict[int, int | None]] = {}
        self._awaited: dict[int, set[int]] = {}  # pipeline -> those who wait for it

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        pipeline = event.pipeline
        known = pipeline in self._steps
        self._steps[pipeline] = self.waiting[pipeline] = event.step
        if not known:  # it joined: from its first step on it is matched with others
            return self._rematch()
        return self._settle([pipeline, *self._awaited.get(pipeline, ())])

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        return self._settle(list(self._awaited.get(pipeline, ())))  # a drained one comes back, and keeps its place

    def left(self, pipeline: int, now: float) -> list[Form]:
        self._steps.pop(pipeline, None)
        return self._rematch()

    def present(self, pipeline: int) -> None:
        """Matched from its first step on."""

    def restarted(self) -> None:
        """Steps go on."""

    def tick(self, now: float) -> list[Form]:
        return []

    def _rematch(self) -> list[Form]:
        """The replicas have changed: the steps that are still to come get other pairs."""
        self._matchings.clear()
        self._awaited.clear()
        return self._settle(list(self.waiting))

    def _partner(self, pipeline: int, step: int) -> int | None:
        if step not in self._matchings:
            if len(self._matchings) >= self.REMEMBERED:
                del self._matchings[min(self._matchings)]
            self._matchings[step] = matching(self._steps, self._job.rules.seed, step)
        return self._matchings[step][pipeline]

    def _settle(self, pipelines: Iterable[int]) -> list[Form]:
        forms = []
        for pipeline in pipelines:
            step = self.waiting.get(pipeline)
            if step is None:
                continue
            partner = self._partner(pipeline, step)
            if partner is None:
                forms.append(self._form([pipeline], f"the odd one of step {step}"))
            elif self.waiting.get(partner) == step:
                forms.append(self._form([pipeline, partner], f"the pair of step {step}"))
            elif partner in self._stage.drained or self._steps[partner] >= step:
                forms.append(self._form([pipeline], f"pipeline {partner} has no step {step} to come"))
            else:
                self._awaited.setdefault(partner, set()).add(pipeline)
        return forms

    def _form(self, members: list[int], reason: str) -> Form:
        for member in members:
            step = self.waiting.pop(member)
            partner = self._partner(member, step)
            if partner is not None and partner in self._awaited:
                self._awaited[partner].discard(member)
        return self._job.form(self._stage.number, members, reason)


_Lane = _Partial | _All | _Matching
POLICIES: dict[str, Callable[[_Stage, _Job], _Lane]] = {"partial": _Partial, "all": _All, "matching": _Matching}


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
        self._job = _Job(rules, pipelines, stages)
        self._stages = [_Stage(number, hosts[number], set(self._live)) for number in range(stages)]
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
