"""The group scheduler: its laws under random events, and whole jobs on a virtual clock."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.coordination.groups.events import Final, Form, Joined, Left, Ready, Tick, WakeAt
from pipeline.coordination.groups.policy import Rules
from pipeline.coordination.groups.scheduler import GroupScheduler
from pipeline.coordination.groups.waits import BURST, FIRST_WAIT_S, ReferenceWait
from pipeline.coordination.work_queue import Shares
from pipeline.core.actions import Op
from pipeline.core.draw import draw
from pipeline.errors import UserError
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.passes import with_mixing
from pipeline.schedules.program import Shape, updates_of

# --- single decisions


def forms(commands: Sequence[Form | WakeAt]) -> list[tuple[int, ...]]:
    return [command.members for command in commands if isinstance(command, Form)]


def wake(commands: Sequence[Form | WakeAt]) -> float:
    (time,) = [command.time for command in commands if isinstance(command, WakeAt)]
    return time


def test_a_round_closes_when_everybody_is_here() -> None:
    scheduler = GroupScheduler(1, 3, Rules())
    assert forms(scheduler.handle(Ready(0, 2, 1), 0.0)) == []
    assert forms(scheduler.handle(Ready(0, 0, 1), 0.0005)) == []
    assert scheduler.waiting(0) == (0, 2)
    (form,) = scheduler.handle(Ready(0, 1, 1), 0.001)
    assert form == Form(0, 1, (0, 1, 2), "all who work are here")
    assert scheduler.waiting(0) == ()


def test_a_round_closes_at_its_deadline_without_the_late_ones() -> None:
    scheduler = GroupScheduler(1, 3, Rules(wait="reference"))
    deadline = wake(scheduler.handle(Ready(0, 2, 1), 10.0))
    scheduler.handle(Ready(0, 0, 1), 10.0003)
    assert deadline == 10.0 + 1e-3
    (form,) = scheduler.handle(Tick(), deadline)
    assert isinstance(form, Form) and form.members == (0, 2) and "over" in form.reason


def test_the_reference_waits_twice_as_long_after_being_alone_and_less_after_company() -> None:
    scheduler = GroupScheduler(1, 2, Rules(wait="reference", connect_within=1000))
    waits, now = [], 0.0
    for _ in range(6):
        deadline = wake(scheduler.handle(Ready(0, 0, 1), now))
        waits.append(deadline - now)
        scheduler.handle(Tick(), deadline)
        now += 1
    assert waits == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.01, 0.01])
    for _ in range(100):
        now += 1
        scheduler.handle(Ready(0, 0, 1), now)
        scheduler.handle(Ready(0, 1, 1), now)
    assert wake(scheduler.handle(Ready(0, 0, 1), now + 1)) - now - 1 == pytest.approx(1e-5)


def test_deadlines_are_stored_so_that_rounding_cannot_make_them_spin() -> None:
    """`now - since >= wait` is false for ever for some floats: the tick that was asked for must close the round."""
    for number in range(1000):
        now = draw(number) % 10**12 / 10**3 + 0.1 * number  # far from zero, odd in binary
        for rules in (Rules(), Rules(wait="reference")):
            scheduler = GroupScheduler(1, 2, rules)
            deadline = wake(scheduler.handle(Ready(0, 0, 1), now))
            assert forms(scheduler.handle(Tick(), deadline)) == [(0,)]


def test_two_fast_replicas_do_not_pair_for_ever() -> None:
    """The connection rule is asked before "the group is full"."""
    scheduler, limit = GroupScheduler(1, 3, Rules(max_group=2, connect_within=10, wait="reference")), 10
    for round_ in range(30):
        scheduler.handle(Ready(0, 0, round_), round_)
        scheduler.handle(Ready(0, 1, round_), round_)
        if not forms(scheduler.handle(Tick(), round_ + 0.5)):
            break
    assert round_ < limit and scheduler.holding == 0 and scheduler.waiting(0) == (0, 1)
    assert scheduler.handle(Tick(), 1e6) == [], "time cannot change the answer"
    first, second = forms(scheduler.handle(Ready(0, 2, 0), 1e6))
    assert first == (0, 2) and second == (1,)
    assert scheduler.holding is None


def test_a_slow_one_is_in_some_group_within_the_bound_and_only_then_waited_for() -> None:
    scheduler = GroupScheduler(1, 2, Rules(connect_within=5, wait="reference"))
    for step in range(4):
        scheduler.handle(Ready(0, 0, step), step)
        assert forms(scheduler.handle(Tick(), step + 0.5)) == [(0,)]
    scheduler.handle(Ready(0, 0, 4), 4)
    assert scheduler.handle(Tick(), 100.0) == [], "the fifth round has to connect"
    (form,) = scheduler.handle(Ready(0, 1, 0), 101.0)
    assert form == Form(0, 5, (0, 1), "connects replicas that had not met in 4 rounds")


def test_a_large_group_is_split_evenly_among_those_who_have_not_met_for_longest() -> None:
    scheduler, met = GroupScheduler(1, 8, Rules(max_group=2, wait="reference", connect_within=1000)), Counter()
    for round_ in range(7):
        formed = []
        for pipeline in range(8):
            formed += forms(scheduler.handle(Ready(0, pipeline, round_), round_))
        assert sorted(map(len, formed)) == [2, 2, 2, 2]
        met.update(formed)
    assert max(met.values()) <= 2 and len(met) >= 20, "7 rounds of 28 possible pairs"


@given(st.integers(2, 40), st.integers(2, 9))
def test_nobody_is_alone_where_a_pair_was_possible(count: int, max_group: int) -> None:
    scheduler = GroupScheduler(1, count, Rules(max_group=max_group))
    sizes = sorted(
        len(form) for pipeline in range(count) for form in forms(scheduler.handle(Ready(0, pipeline, 1), 0.0))
    )
    assert sum(sizes) == count and sizes[-1] <= max_group
    assert sizes.count(1) == (count % 2 if max_group == 2 else 0)
    assert len(sizes) == -(-count // max_group)


def test_a_final_round_has_everybody_and_ordinary_rounds_go_on_until_then() -> None:
    scheduler = GroupScheduler(1, 3, Rules())
    assert forms(scheduler.handle(Final(0, 1), 0.0)) == []
    scheduler.handle(Ready(0, 0, 1), 0.0)
    assert forms(scheduler.handle(Ready(0, 2, 1), 0.0)) == [(0, 2)], "nobody waits for one who has drained"
    scheduler.handle(Final(0, 2), 0.1)
    (form,) = scheduler.handle(Final(0, 0), 0.2)
    assert isinstance(form, Form) and form.members == (0, 1, 2) and form.final
    assert scheduler.sizes == Counter({2: 1}), "final rounds are not counted"


@pytest.mark.parametrize("policy", ["partial", "all", "matching"])
def test_who_leaves_is_not_waited_for(policy: Any) -> None:
    scheduler = GroupScheduler(1, 3, Rules(policy=policy, connect_within=1))
    for pipeline in (0, 1):
        scheduler.handle(Ready(0, pipeline, 1), 0.0)
    scheduler.handle(Left(2), 0.0)
    assert scheduler.waiting(0) == ()
    scheduler.handle(Final(0, 0), 1.0)
    assert forms(scheduler.handle(Left(1), 2.0)) == [(0,)], "its final round"
    assert scheduler.live == {0}


def test_who_asks_twice_or_is_not_live_is_refused() -> None:
    scheduler = GroupScheduler(2, 2, Rules(), live=[0])
    scheduler.handle(Final(0, 0), 0.0)
    scheduler.handle(Joined(1), 0.0)
    with pytest.raises(ValueError, match="pipeline 1 of 2 joins"):
        scheduler.handle(Joined(1), 0.0)
    scheduler.handle(Left(1), 0.0)
    with pytest.raises(ValueError, match="not live"):
        scheduler.handle(Ready(0, 1, 1), 0.0)
    with pytest.raises(ValueError, match="stage 2"):
        scheduler.handle(Ready(2, 0, 1), 0.0)
    waiting = GroupScheduler(1, 2, Rules())
    waiting.handle(Ready(0, 0, 1), 0.0)
    with pytest.raises(ValueError, match="already waits"):
        waiting.handle(Final(0, 0), 0.0)


def test_wrong_rules_are_refused() -> None:
    with pytest.raises(UserError, match="unknown policy 'some'; choose from"):
        Rules(policy="some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--max-group 1"):
        Rules(max_group=1)
    with pytest.raises(UserError, match="--connect-within 0"):
        Rules(connect_within=0)


def test_matchings_are_drawn_per_step_and_only_equal_steps_pair() -> None:
    scheduler = GroupScheduler(1, 5, Rules(policy="matching", seed=3))
    pairs = set()
    for step in range(20):
        formed = []
        for pipeline in range(5):
            formed += forms(scheduler.handle(Ready(0, pipeline, step), 0.0))
        assert sorted(map(len, formed)) == [1, 2, 2] and sorted(sum(formed, ())) == [0, 1, 2, 3, 4]
        pairs.update(form for form in formed if len(form) == 2)
    assert len(pairs) == 10, "all of them in 20 steps"


def test_a_partner_that_has_passed_a_step_is_not_waited_for() -> None:
    scheduler = GroupScheduler(1, 2, Rules(policy="matching"))
    assert forms(scheduler.handle(Ready(0, 0, 1), 0.0)) == []
    assert forms(scheduler.handle(Ready(0, 1, 5), 0.0)) == [(0,)]
    assert forms(scheduler.handle(Ready(0, 0, 5), 0.0)) == [(0, 1)]


def test_hosts_average_among_themselves_and_all_with_all() -> None:
    scheduler = GroupScheduler(1, 4, Rules(policy="all"), hosts=[["a", "a", "b", "b"]])
    scheduler.handle(Ready(0, 0, 1, "host"), 0.0)
    scheduler.handle(Ready(0, 2, 1, "host"), 0.0)
    assert forms(scheduler.handle(Ready(0, 1, 1, "host"), 0.0)) == [(0, 1)]
    assert forms(scheduler.handle(Ready(0, 0, 2), 0.0)) == []
    assert forms(scheduler.handle(Ready(0, 1, 2), 0.0)) == []
    assert forms(scheduler.handle(Ready(0, 3, 2), 0.0)) == [(2,)], "3 waits for all: nobody else of b can come"
    assert forms(scheduler.handle(Ready(0, 2, 2), 0.0)) == [(0, 1, 2, 3)]


def test_a_pipeline_that_joins_misses_the_meetings_that_another_stage_has_had() -> None:
    """Else 0 would meet 1 in its step 6 at stage 0 and in its step 5 at stage 1, and both could wait for ever."""
    scheduler = GroupScheduler(2, 2, Rules(policy="all"), live=[0])
    scheduler.handle(Ready(1, 0, 5), 0.0)
    scheduler.handle(Joined(1), 0.0)
    assert forms(scheduler.handle(Ready(0, 1, 1), 0.0)) == [], "it waits for the next meeting of stage 0"
    assert forms(scheduler.handle(Ready(0, 0, 5), 0.0)) == [(0,)]
    assert forms(scheduler.handle(Ready(0, 0, 6), 0.0)) == [(0, 1)]
    assert forms(scheduler.handle(Ready(1, 0, 6), 0.0)) == []
    assert forms(scheduler.handle(Ready(1, 1, 1), 0.0)) == [(0, 1)]


def test_a_request_does_not_count_before_those_its_average_depends_on_are_answered() -> None:
    """Stage 0's average of step 5 comes after stage 1's of step 4, so nobody may be promised the former first."""
    scheduler = GroupScheduler(2, 2, Rules(wait="reference"))
    scheduler.handle(Ready(1, 0, 4), 0.0)
    scheduler.handle(Ready(0, 1, 5), 0.0)
    assert scheduler.handle(Ready(0, 0, 5), 0.0) == []
    assert scheduler.waiting(0) == (0, 1)
    first, second = [command for command in scheduler.handle(Tick(), 0.001) if isinstance(command, Form)]
    assert (first.stage, first.members, second.stage, second.members) == (1, (0,), 0, (1,))
    assert scheduler.waiting(0) == (0,), "now it counts, for the next round"


# --- laws under any order of events


OVERTAKEN = "the average of a stage before waits"  # does not connect, and cannot wait until it would


class Laws:
    """Checks a scheduler from outside: who waits, who was answered, and whether groups connect within the bound."""

    def __init__(self, scheduler: GroupScheduler, stages: int, pipelines: int, rules: Rules) -> None:
        self.scheduler, self.rules, self.pipelines = scheduler, rules, pipelines
        self.limit = 10 * pipelines if rules.connect_within is None else rules.connect_within
        self.open: list[dict[int, str]] = [{} for _ in range(stages)]  # pipeline -> what it asked
        self.drained: list[set[int]] = [set() for _ in range(stages)]
        self.parts = [[{pipeline} for pipeline in scheduler.live] for _ in range(stages)]
        self.rounds = [0] * stages  # since connected, but those while another stage held
        self.all_rounds = [0] * stages
        self.round = 0
        self.wakes: list[float] = []

    def handle(self, event: Any, now: float) -> list[Form]:
        holders = {self.scheduler.holding}
        if isinstance(event, Ready | Final):
            self.open[event.stage][event.pipeline] = "final" if isinstance(event, Final) else "ready"
            if isinstance(event, Final):
                self.drained[event.stage].add(event.pipeline)
        if isinstance(event, Left):
            for stage, waiting in enumerate(self.open):
                waiting.pop(event.pipeline, None)
                self.drained[stage].discard(event.pipeline)
        commands = self.scheduler.handle(event, now)
        holders |= {self.scheduler.holding}
        if isinstance(event, Left | Final | Joined):
            for stage in range(len(self.open)):
                if not isinstance(event, Final) or stage == event.stage:
                    self.change(stage, event)
        formed = []
        for command in commands:
            if isinstance(command, WakeAt):
                heapq.heappush(self.wakes, command.time)
            else:
                self.form(command, holders)
                formed.append(command)
        for stage in {event.stage} if isinstance(event, Ready | Final) else range(len(self.open)):
            assert self.scheduler.waiting(stage) == tuple(sorted(self.open[stage]))
        return formed

    def change(self, stage: int, event: Left | Final | Joined) -> None:
        parts = self.parts[stage]
        if isinstance(event, Joined):
            parts.append({event.pipeline})
            self.rounds[stage] = self.all_rounds[stage] = 0
        else:
            self.parts[stage] = [rest for part in parts if (rest := part - {event.pipeline})]
        self.restart_if_connected(stage)

    def restart_if_connected(self, stage: int) -> None:
        if len(self.parts[stage]) <= 1:
            self.rounds[stage] = self.all_rounds[stage] = 0
            self.parts[stage] = [{pipeline} for pipeline in self.scheduler.live - self.drained[stage]]

    def form(self, form: Form, holders: set[int | None]) -> None:
        stage, members = form.stage, set(form.members)
        assert form.round > self.round and form.members == tuple(sorted(members)) and form.reason
        self.round = form.round
        kinds = {self.open[stage].pop(member) for member in members}  # KeyError: it had not asked, or was answered
        assert kinds == {"final" if form.final else "ready"}
        if form.final:
            self.drained[stage] -= members
            self.parts[stage] = []
            self.restart_if_connected(stage)
            return
        assert self.rules.policy != "partial" or len(members) <= self.rules.max_group
        parts = self.parts[stage]
        touched = [part for part in parts if part & members]
        self.parts[stage] = [part for part in parts if not part & members] + [set().union(*touched)]
        self.rounds[stage] += holders <= {None, stage} and form.reason != OVERTAKEN
        self.all_rounds[stage] += 1
        self.check_connected(stage)
        self.restart_if_connected(stage)

    def check_connected(self, stage: int) -> None:
        if self.rules.policy == "partial" and len(self.parts[stage]) > 1:
            possible = -(-(self.pipelines - 1) // (self.rules.max_group - 1))
            assert self.rounds[stage] < max(self.limit, possible)
            if self.rules.connect_within is None:  # then even while another stage holds
                assert self.all_rounds[stage] < self.limit


operations = st.lists(
    st.tuples(
        st.sampled_from(["ready"] * 12 + ["final", "left", "joined", "tick"]), st.integers(0, 2), st.integers(0, 5)
    ),
    max_size=80,
)
any_rules = st.builds(
    Rules,
    policy=st.sampled_from(["partial", "partial", "all", "matching"]),
    max_group=st.integers(2, 5),
    connect_within=st.none() | st.integers(1, 30),
    wait=st.sampled_from(["adaptive", "hidden", "reference"]),
    seed=st.integers(0, 3),
)


@settings(max_examples=200, deadline=None)
@given(
    any_rules, st.integers(1, 3), st.integers(1, 6), operations, st.lists(st.floats(0, 0.02), min_size=80, max_size=80)
)
def test_groups_are_disjoint_answered_once_and_connected(
    rules: Rules, stages: int, pipelines: int, todo: list[tuple[str, int, int]], pauses: list[float]
) -> None:
    """Whatever happens in whatever order; at the end everybody drains and every request has been answered."""
    scheduler = GroupScheduler(stages, pipelines, rules)
    laws, steps, now = Laws(scheduler, stages, pipelines, rules), Counter[tuple[int, int]](), 0.0
    for (name, stage, pipeline), pause in zip(todo, pauses, strict=False):
        now += pause
        stage, pipeline = stage % stages, pipeline % pipelines
        free = pipeline in scheduler.live and pipeline not in laws.open[stage]
        if name == "ready" and free:
            steps[stage, pipeline] += 1
            laws.handle(Ready(stage, pipeline, steps[stage, pipeline]), now)
        elif name == "final" and free:
            laws.handle(Final(stage, pipeline), now)
        elif name == "left" and pipeline in scheduler.live:
            laws.handle(Left(pipeline), now)
        elif name == "joined" and pipeline not in scheduler.live:
            laws.handle(Joined(pipeline), now)
        elif name == "tick":
            laws.handle(Tick(), now)
    for _ in range(2 * stages * pipelines + 2):  # everybody who is answered drains; a late one may need two finals
        for stage in range(stages):
            for pipeline in sorted(scheduler.live):
                if pipeline not in laws.open[stage] and laws.open[stage]:
                    laws.handle(Final(stage, pipeline), now)
        while laws.wakes:
            now = max(now, heapq.heappop(laws.wakes))
            laws.handle(Tick(), now)
    left = [kind for waiting in laws.open for kind in waiting.values()]
    assert "ready" not in left


# --- whole jobs on a virtual clock


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random job. `slowness[pipeline]` multiplies forward and backward, which take 1 and 2 ms."""

    rules: Rules
    stages: int
    slowness: tuple[float, ...]
    schedule: str = "pipedream"
    microbatches: int = 1
    segments: tuple[int, ...] = (12,)  # batches per pipeline
    jitter: float = 0.1
    seed: int = 0
    failures: tuple[tuple[float, int, float], ...] = ()  # (when, pipeline, seconds until it wants to join)
    pause_s: float = 0.0  # one forward or backward in ten takes so much longer
    early: bool = True  # ask before the backward, or after the update
    latency_s: float = 0.0  # requests travel for up to this long, and overtake each other
    separate: bool = False  # a scheduler per stage: the trap

    @property
    def pipelines(self) -> int:
        return len(self.slowness)


@dataclass
class _Worker:
    """One stage of one pipeline: its program, and where it stands."""

    stage: int
    pipeline: int
    life: int
    program: Iterator[Any] = field(default_factory=lambda: iter(()))
    at: Any = None
    step: int = 0
    asked: float = 0.0
    group: Form | None = None
    segment: int = 0
    state: str = "working"


class World:
    """All workers of a job carry out their real programs; forwards and backwards take virtual time, averages meet."""

    FORWARD_S, BACKWARD_S = 0.001, 0.002

    def __init__(self, case: Case) -> None:
        self.case, self.now, self.count = case, 0.0, 0
        stages, pipelines = case.stages, case.pipelines
        self.laws = [
            Laws(GroupScheduler(each, pipelines, case.rules), each, pipelines, case.rules)
            for each in ([1] * stages if case.separate else [stages])
        ]
        self.shares = Shares(pipelines, even=case.rules.policy != "partial")
        self.heap: list[tuple[float, int, str, Any]] = []
        self.workers: dict[tuple[int, int], _Worker] = {}
        self.lives = [0] * pipelines
        self.messages: set[tuple[int, int, Op, int]] = set()  # (pipeline, stage that did it, F or B, micro-batch)
        self.mixing: dict[int, set[int]] = {}  # round -> who has come to its average
        self.promised: dict[int, dict[int, int]] = {}  # round -> member -> its life; who has another broke the group
        self.batches = Counter[int]()
        self.finals = Counter[tuple[int, int]]()  # (segment, stage)
        self.closing = -1
        self.begun = -1
        self.joining: set[int] = set()
        self.ticks = self.events = 0
        self.longest_wait = 0.0
        self.hold_since: float | None = None
        self.sizes: Counter[int] = Counter()
        self.last_batch = 0.0

    @property
    def live(self) -> frozenset[int]:
        return self.laws[0].scheduler.live

    # scheduling

    def at(self, time: float, kind: str, what: Any) -> None:
        self.count += 1
        heapq.heappush(self.heap, (time, self.count, kind, what))

    def schedule(self, event: Any, stages: Sequence[int] | None = None) -> None:
        self.events += 1
        for number, laws in enumerate(self.laws):
            if len(self.laws) > 1 and isinstance(event, Ready | Final):
                if event.stage != number:
                    continue
                event = event._replace(stage=0)
            for form in laws.handle(event, self.now):
                self.formed(form if len(self.laws) == 1 else form._replace(stage=number, round=form.round * 8 + number))
            while laws.wakes:
                self.at(heapq.heappop(laws.wakes), "tick", None)

    def formed(self, form: Form) -> None:
        if form.final:
            segment = self.workers[form.stage, form.members[0]].segment
            self.finals[segment, form.stage] += 1
            self.closing = max(self.closing, segment)
        else:
            self.sizes[len(form.members)] += 1
        self.promised[form.round] = {member: self.lives[member] for member in form.members}
        for member in form.members:
            worker = self.workers[form.stage, member]
            worker.group = form
            if not form.final:
                self.longest_wait = max(self.longest_wait, self.now - worker.asked)
            else:
                self.begin(worker, worker.segment + 1)
        for member in form.members:
            self.at(self.now, "go", (form.stage, member, self.lives[member]))

    def send(self, event: Ready | Final) -> None:
        self.count += 1
        delay = self.case.latency_s * (draw(self.case.seed, self.count) % 1000) / 1000
        if delay:
            self.at(self.now + delay, "message", (event, self.lives[event.pipeline]))
        else:
            self.schedule(event)

    # programs

    def begin(self, worker: _Worker, segment: int) -> None:
        if segment == len(self.case.segments):
            worker.state = "finished"
            if all(self.workers[stage, worker.pipeline].state == "finished" for stage in range(self.case.stages)):
                self.schedule(Left(worker.pipeline))
            return
        if segment > self.begun:
            self.begun = segment
            first = self.case.pipelines * sum(self.case.segments[:segment])
            self.shares.begin(segment, first, first + self.case.pipelines * self.case.segments[segment])
        worker.segment, worker.state = segment, "working"
        shape = Shape(stages=self.case.stages, microbatches=self.case.microbatches)
        order = updates_of(SCHEDULES[self.case.schedule], shape, worker.stage, self.feed(worker))
        worker.program = with_mixing(order)
        worker.at = next(worker.program, None)
        self.admit()

    def feed(self, worker: _Worker) -> Iterator[int]:
        pipeline, m = worker.pipeline, self.case.microbatches
        k = self.starts[pipeline, worker.segment] = self.starts.get(
            (pipeline, worker.segment), self.shares.next_k(pipeline)
        )
        while self.ask(pipeline, worker.segment, k) is not None:
            yield from range(k * m, (k + 1) * m)
            k += 1

    starts: dict[tuple[int, int], int]
    answers: dict[tuple[int, int, int], int | None]

    def ask(self, pipeline: int, segment: int, k: int) -> int | None:
        key = (pipeline, segment, k)
        if key not in self.answers:  # a late stage asks for the segment before: as the director, remember
            self.answers[key] = self.shares.ask(pipeline, k, self.now)
        return self.answers[key]

    def seconds(self, worker: _Worker, action: Any) -> float:
        case = self.case
        base = self.FORWARD_S if action.op is Op.FORWARD else self.BACKWARD_S
        chance = draw(case.seed, worker.pipeline, worker.stage, action.microbatch, int(action.op is Op.FORWARD))
        pause = case.pause_s if chance // 2001 % 10 == 0 else 0.0
        return pause + base * case.slowness[worker.pipeline] * (1 + case.jitter * (chance % 2001 - 1000) / 1000)

    def may_start(self, worker: _Worker, action: Any) -> bool:
        pipeline, stage = worker.pipeline, worker.stage
        if action.op is Op.FORWARD:
            return stage == 0 or (pipeline, stage - 1, Op.FORWARD, action.microbatch) in self.messages
        if action.op is Op.BACKWARD:
            last = stage == self.case.stages - 1
            return last or (pipeline, stage + 1, Op.BACKWARD, action.microbatch) in self.messages
        if action.op is Op.WAIT:
            return worker.group is not None
        if action.op is Op.MIX:
            assert worker.group is not None
            come = self.mixing.setdefault(worker.group.round, set())
            if pipeline not in come:
                come.add(pipeline)
                for member in worker.group.members:
                    if member != pipeline:
                        self.at(self.now, "go", (stage, member, self.lives[member]))
            lives = self.promised[worker.group.round]
            return all(member in come or self.lives[member] != life for member, life in lives.items())
        return True

    def go(self, worker: _Worker) -> None:
        """Carries on until something has to be waited for."""
        while worker.state == "working":
            action = worker.at
            if action is None:
                worker.state = "draining"
                worker.asked = self.now
                self.send(Final(worker.stage, worker.pipeline))
                return
            if not self.may_start(worker, action):
                return
            if action.op in (Op.FORWARD, Op.BACKWARD):
                worker.state = "busy"
                place = (worker.stage, worker.pipeline, worker.life)
                self.at(self.now + self.seconds(worker, action), "done", place)
                return
            if action.op is (Op.JOIN if self.case.early else Op.UPDATE):
                worker.step += 1
                worker.group, worker.asked = None, self.now
                self.send(Ready(worker.stage, worker.pipeline, worker.step))
            worker.at = next(worker.program, None)

    def done(self, worker: _Worker) -> None:
        action, pipeline, stage = worker.at, worker.pipeline, worker.stage
        self.messages.add((pipeline, stage, action.op, action.microbatch))
        if action.op is Op.BACKWARD and stage == 0 and (action.microbatch + 1) % self.case.microbatches == 0:
            self.shares.done(pipeline, action.microbatch // self.case.microbatches, self.now)
            self.batches[pipeline] += 1
            self.last_batch = self.now
        worker.state, worker.at = "working", next(worker.program, None)
        self.go(worker)
        for other in (stage - 1, stage + 1):
            if 0 <= other < self.case.stages:
                self.go(self.workers[other, pipeline])

    # failures

    def lose(self, pipeline: int, away: float) -> None:
        finished = any(self.workers[stage, pipeline].state == "finished" for stage in range(self.case.stages))
        if pipeline not in self.live or finished or len(self.live) == 1:
            return
        self.lives[pipeline] += 1
        for stage in range(self.case.stages):
            self.workers[stage, pipeline].state = "lost"
        self.shares.left(pipeline)
        self.schedule(Left(pipeline))
        for worker in self.workers.values():  # averages with it are broken
            self.at(self.now, "go", (worker.stage, worker.pipeline, worker.life))
        if away < 1:
            self.at(self.now + away, "back", pipeline)

    def admit(self) -> None:
        """Takes pipelines in again, never between two segments."""
        newest = [w.segment == self.begun for w in self.workers.values() if w.pipeline in self.live]
        if not self.joining or self.closing >= self.begun or not all(newest):
            return
        if any(w.state == "finished" for w in self.workers.values()):
            return
        joining, self.joining = self.joining, set()
        for pipeline in sorted(joining):
            k = self.shares.next_k(pipeline)
            self.shares.joined(pipeline, k)
            for key in [key for key in self.answers if key[0] == pipeline and key[2] >= k]:
                del self.answers[key]
            self.starts[pipeline, self.begun] = k
            for key in [key for key in self.messages if key[0] == pipeline]:
                self.messages.discard(key)
            step = max(worker.step for worker in self.workers.values())
            self.schedule(Joined(pipeline))
            for stage in range(self.case.stages):
                worker = _Worker(stage, pipeline, self.lives[pipeline], step=step)
                self.workers[stage, pipeline] = worker
                self.begin(worker, self.begun)
                self.at(self.now, "go", (stage, pipeline, worker.life))

    # the run

    def run(self) -> World:
        self.starts, self.answers = {}, {}
        places = [(stage, pipeline) for stage in range(self.case.stages) for pipeline in range(self.case.pipelines)]
        for stage, pipeline in places:
            self.workers[stage, pipeline] = _Worker(stage, pipeline, 0)
        for place in places:
            self.begin(self.workers[place], 0)
            self.at(0.0, "go", (*place, 0))
        for when, pipeline, away in self.case.failures:
            self.at(when, "lose", (pipeline % self.case.pipelines, away))
        while self.heap:
            self.now, _, kind, what = heapq.heappop(self.heap)
            if kind == "tick":
                self.ticks += 1
                self.schedule(Tick())
            elif kind == "message":
                event, life = what
                if self.lives[event.pipeline] == life:
                    self.schedule(event)
            elif kind == "lose":
                self.lose(*what)
            elif kind == "back":
                self.joining.add(what)
                self.admit()
            else:
                worker = self.workers[what[:2]]
                if worker.life == what[2] == self.lives[worker.pipeline]:
                    self.done(worker) if kind == "done" else self.go(worker)
        return self

    @property
    def stuck(self) -> str:
        """What stands still although it has not finished; "" if nothing does."""
        return ", ".join(
            f"stage {w.stage} of pipeline {w.pipeline} is {w.state} at {w.at}"
            for w in self.workers.values()
            if w.pipeline in self.live
        )

    @property
    def period_s(self) -> float:
        """An upper bound for the time between two requests of a replica that nobody holds."""
        case = self.case
        work = (self.FORWARD_S + self.BACKWARD_S) * max(case.slowness) * (1 + case.jitter)
        voluntary = max(ReferenceWait.LONGEST_S, FIRST_WAIT_S, BURST * work * (case.stages + case.microbatches))
        return (2 * case.stages + case.microbatches) * (work + voluntary)


def random_case(seed: int) -> Case:
    chance = iter(range(1000))

    def pick(*choices: Any) -> Any:
        return choices[draw(seed, next(chance)) % len(choices)]

    pipelines = pick(1, 2, 3, 3, 4, 4, 5, 6, 9)
    stages = pick(1, 2, 2, 3, 3, 4)
    schedule = pick("pipedream", "pipedream", "1f1b", "gpipe")
    failures = tuple(
        (pick(*range(1, 60)) / 1e3, pick(*range(pipelines)), pick(0.0, 0.002, 0.02, 2.0))
        for _ in range(pick(0, 0, 1, 2, 4))
    )
    return Case(
        rules=Rules(
            policy=pick("partial", "partial", "partial", "all", "matching"),
            max_group=pick(2, 2, 3, 4, 8),
            connect_within=pick(None, 1, 3, pipelines, 2 * pipelines, 3 * pipelines),
            wait=pick("adaptive", "adaptive", "reference", "hidden"),
            seed=seed,
        ),
        stages=stages,
        slowness=tuple(pick(1.0, 1.0, 1.0, 1.5, 2.0, 5.0, 20.0) for _ in range(pipelines)),
        schedule=schedule,
        microbatches=1 if schedule == "pipedream" else pick(1, 2, 4),
        segments=pick((6,), (8, 3), (1, 4)),
        jitter=pick(0.0, 0.1, 0.5),
        seed=seed,
        failures=failures,
        early=pick(True, True, False),
        latency_s=pick(0.0, 0.0, 0.001, 0.02),
    )


def check(case: Case) -> World:
    world = World(case).run()
    assert not world.stuck, f"{world.stuck} in {case}"
    assert world.ticks <= 2 * world.events + 10, f"it spins in {case}"
    if case.rules.policy == "partial" and not case.failures:
        assert world.longest_wait <= 2 * world.period_s + case.latency_s, case
    if not case.failures:
        expected = {(segment, stage): 1 for segment in range(len(case.segments)) for stage in range(case.stages)}
        assert world.finals == Counter(expected) and sum(world.batches.values()) == case.pipelines * sum(case.segments)
    return world


@pytest.mark.parametrize("part", range(4))
def test_no_random_job_deadlocks_spins_or_waits_beyond_the_bound(part: int) -> None:
    """The laws of `Laws` hold as well; a wait ends within two steps of the slowest pipeline, whatever is held."""
    for seed in range(part * 350, part * 350 + 350):
        check(random_case(seed))


def tight_case(seed: int) -> Case:
    """Everything that makes a stage hold, and messages that overtake each other."""
    case = random_case(seed)
    return replace(
        case,
        rules=replace(case.rules, policy="partial", connect_within=1 + seed % 6),
        stages=2 + seed % 3,
        slowness=(case.slowness * 4)[: 3 + seed % 3],
        latency_s=(0.0, 0.003, 0.02, 0.05)[seed // 6 % 4],
        early=True,
        failures=(),
    )


@pytest.mark.parametrize("part", range(2))
def test_no_job_with_tight_bounds_and_late_messages_deadlocks(part: int) -> None:
    for seed in range(part * 250, part * 250 + 250):
        check(tight_case(seed))


def test_stages_that_hold_independently_deadlock() -> None:
    """The trap: with a scheduler per stage, each waits for a pipeline that another one keeps waiting."""
    stuck = [seed for seed in range(200) if World(replace(tight_case(seed), separate=True)).run().stuck]
    assert stuck, "if this cannot happen any more, the one holder is not needed"
    assert not any(World(tight_case(seed)).run().stuck for seed in stuck)


# --- what it is for


def uneven(factor: float, **more: Any) -> Case:
    return Case(
        stages=1, slowness=(1.0, 1.0, 1.0, factor), segments=(100,), **{"rules": Rules(), "early": False, **more}
    )


def ideal_s(case: Case) -> float:
    """Total work over total speed."""
    step = World.FORWARD_S + World.BACKWARD_S
    return len(case.slowness) * sum(case.segments) * step / sum(1 / slowness for slowness in case.slowness)


def memberships(world: World) -> tuple[float, float]:
    """Mean group size, and the part of all requests that were answered by a group of one."""
    total = sum(size * times for size, times in world.sizes.items())
    return sum(size * size * times for size, times in world.sizes.items()) / total, world.sizes[1] / total


@pytest.mark.parametrize("early", [False, True])
def test_equal_replicas_meet_all_together(early: bool) -> None:
    """Early requests hide the waiting behind the backward; that it is hidden is learnt."""
    for seed in range(5):
        world = World(uneven(1.0, seed=seed, early=early)).run()
        mean, alone = memberships(world)
        assert alone <= 0.01 and mean > (3.4 if early else 3.8), world.sizes
        assert world.last_batch < 1.08 * ideal_s(world.case)


def test_in_the_background_nobody_goes_alone_although_others_are_a_step_away() -> None:
    """Request at the end of a step, computing goes on: phases drift apart, and waiting costs nothing."""
    alone = {}
    for wait in ("hidden", "reference"):
        scheduler, events, wakes = GroupScheduler(1, 4, Rules(wait=wait)), [(0.005, p) for p in range(4)], []
        for step in range(1600):
            now, pipeline = heapq.heappop(events)
            while wakes and wakes[0] <= now:
                time = heapq.heappop(wakes)
                wakes += [c.time for c in scheduler.handle(Tick(), time) if isinstance(c, WakeAt)]
            if pipeline not in scheduler.waiting(0):
                commands = scheduler.handle(Ready(0, pipeline, step), now)
                wakes += [c.time for c in commands if isinstance(c, WakeAt)]
            heapq.heappush(events, (now + 0.005 * (1 + (draw(step) % 201 - 100) / 1000), pipeline))
        total = sum(size * times for size, times in scheduler.sizes.items())
        alone[wait] = scheduler.singletons / total
    assert alone["hidden"] < 0.01 < alone["reference"]


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_a_slow_replica_costs_the_others_little_and_takes_part(factor: float) -> None:
    for seed in range(5):
        world, fixed = (
            World(uneven(factor, seed=seed, rules=Rules(wait=wait))).run() for wait in ("adaptive", "reference")
        )
        mean, alone = memberships(world)
        assert world.last_batch < 1.1 * ideal_s(world.case) and world.last_batch < fixed.last_batch
        assert mean > 3 and alone < 0.04
        assert world.batches[3] == pytest.approx(400 / factor / (3 + 1 / factor), rel=0.2), "each works at its speed"


def test_nobody_waits_for_replicas_that_pause_at_random() -> None:
    """The reference's --hetero: what is usual is judged by the median, which a rare long pause does not move."""
    world = World(uneven(1.0, pause_s=0.1, rules=Rules(connect_within=1000))).run()
    step = World.FORWARD_S + World.BACKWARD_S
    assert world.longest_wait < 1.2 * BURST * step
