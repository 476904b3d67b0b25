"""The Director's laws, with lists of messages and explicit times: no socket, no clock."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pipeline.coordination.director import Director
from pipeline.coordination.gather import REMEMBERED, WAITING
from pipeline.coordination.messages import JobRules, Malformed

Message = dict[str, Any]


class Job:
    """A Director and its workers: sends numbered messages as a client would, and keeps what everybody is told."""

    def __init__(self, *, stages: int = 1, pipelines: int = 2, **rules: Any) -> None:
        self.rules = JobRules(**{"stages": stages, "pipelines": pipelines, "policy": "all", **rules})
        self.director = Director(0.0)
        self.now = 0.0
        self.told: dict[bytes, list[Message]] = {}
        self.generations: dict[bytes, int] = {}
        self.numbers = 0

    def name(self, pipeline: int, stage: int = 0, incarnation: int = 0) -> bytes:
        return b"p%d.s%d.i%d" % (pipeline, stage, incarnation)

    def deliver(self, outgoing: list[tuple[bytes, Message]]) -> None:
        for worker, message in outgoing:
            self.told.setdefault(worker, []).append(message)
            if "g" in message and message.get("type") in (None, "fenced"):
                self.generations[worker] = message["g"]

    def say(self, kind: str, pipeline: int, stage: int = 0, incarnation: int = 0, /, **fields: Any) -> int:
        """Sends a message; returns its number."""
        self.numbers += 1
        worker = self.name(pipeline, stage, incarnation)
        message = {"type": kind, "n": self.numbers, "g": self.generations.get(worker, 0), **fields}
        self.deliver(self.director.handle(worker, message, self.now))
        return self.numbers

    def hello(self, pipeline: int, stage: int = 0, incarnation: int = 0, **fields: Any) -> int:
        known = {"stage": stage, "pipeline": pipeline, "incarnation": incarnation, "timeout": 100.0}
        mesh = f"host{pipeline}:{stage}.{incarnation}"
        return self.say(
            "hello", pipeline, stage, incarnation, **{**known, "mesh": mesh, "rules": self.rules.message(), **fields}
        )

    def start(self) -> Job:
        for pipeline in range(self.rules.pipelines):
            for stage in range(self.rules.stages):
                self.hello(pipeline, stage)
        return self

    def begin(self, segment: int, first: int = 0, stop: int = 100, *, but: int = -1) -> Job:
        for pipeline in self.director.live:
            for stage in range(self.rules.stages):
                if pipeline != but:
                    self.say("begin", pipeline, stage, segment=segment, first=first, stop=stop)
        return self

    def answer(self, number: int) -> Message | None:
        found = [message for told in self.told.values() for message in told if message.get("n") == number]
        assert all(message == found[0] for message in found)
        return found[0] if found else None

    def pushes(self, kind: str, pipeline: int, stage: int = 0, incarnation: int = 0) -> list[Message]:
        return [m for m in self.told.get(self.name(pipeline, stage, incarnation), []) if m.get("type") == kind]

    def tick(self, now: float) -> None:
        self.now = now
        self.deliver(self.director.tick(now))

    def lose(self, pipeline: int, why: str = "killed") -> None:
        self.deliver(self.director.lost(pipeline, why, self.now))

    def ready(self, pipeline: int, stage: int = 0, incarnation: int = 0, step: int = 1) -> int:
        return self.say("ready", pipeline, stage, incarnation, step=step, scope="")

    def final(self, pipeline: int, stage: int = 0, segment: int = 0, attempt: int = 0) -> int:
        return self.say("final", pipeline, stage, segment=segment, attempt=attempt)

    def ticket(self, pipeline: int, k: int, stage: int = 0, segment: int = 0) -> Any:
        return self.answer(self.say("ticket", pipeline, stage, segment=segment, k=k))

    def gather(self, pipeline: int, stage: int = 0, /, **fields: Any) -> int:
        return self.say("gather", pipeline, stage, **{"key": "x", "scope": "all", "fold": "all", **fields})

    def members(self, number: int) -> list[int] | None:
        answer = self.answer(number)
        return None if answer is None else answer["members"]

    def error(self, number: int) -> str | None:
        answer = self.answer(number)
        return None if answer is None else answer.get("error")


# --- the start


def test_the_job_starts_when_all_workers_have_said_hello() -> None:
    job = Job(stages=2)
    numbers = [job.hello(0, 0), job.hello(0, 1), job.hello(1, 0)]
    assert not any(map(job.answer, numbers))
    numbers.append(job.hello(1, 1))
    for number in numbers:
        welcome = job.answer(number)
        assert welcome is not None and not welcome["late"] and welcome["live"] == [0, 1]
    assert welcome["peers"] == [(0, "host0:1.0"), (1, "host1:1.0")]  # replicas of its own stage


def test_nobody_waits_at_the_start_for_a_pipeline_that_was_lost() -> None:
    job = Job(pipelines=3)
    job.lose(2)
    first = job.hello(0)
    second = job.hello(1)
    assert job.answer(first)["live"] == job.answer(second)["live"] == [0, 1]  # type: ignore[index]


def test_who_is_silent_before_the_start_is_lost_and_comes_late() -> None:
    job = Job(stages=1, pipelines=3)
    lost = job.hello(0)
    job.now = 2.0
    job.hello(1)
    job.tick(3.0)
    assert job.answer(job.hello(2))["live"] == [1, 2]  # type: ignore[index]
    assert job.answer(lost)["late"]  # type: ignore[index]


def test_a_worker_with_other_rules_is_refused_in_one_line() -> None:
    job = Job()
    job.hello(0)
    other = {**job.rules.message(), "max_group": 3}
    answer = job.answer(job.hello(1, rules=other))
    assert answer is not None and answer["error"] == "refused"
    assert "max_group 3 (the first: 8)" in answer["text"] and "\n" not in answer["text"]


def test_the_time_limit_of_the_start_names_who_is_missing() -> None:
    job = Job(stages=2, heartbeat_timeout_s=1e6)
    waiting = job.hello(0, 0)
    job.hello(1, 1)
    assert job.director.next_wake == 100.0
    job.tick(100.0)
    answer = job.answer(waiting)
    assert answer is not None and answer["error"] == "timeout"
    assert answer["text"] == "waited 100 s (hello) for stage 1 of pipeline 0, stage 0 of pipeline 1"


# --- messages


def test_what_is_told_comes_to_the_last_stage_of_the_first_live_pipeline_only() -> None:
    job = Job(stages=2, pipelines=3).start()
    assert job.answer(job.say("tell", 1, 1, value=[1, 2])) is not None
    job.lose(0)
    job.say("tell", 2, 1, value="later")
    told = {name: [m["value"] for m in messages if m.get("type") == "told"] for name, messages in job.told.items()}
    assert {name: values for name, values in told.items() if values} == {
        job.name(0, 1): [[1, 2]], job.name(1, 1): ["later"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": 7, "g": 0, "n": 99},
        {"type": "dance", "g": 0, "n": 99},
        {"type": "ready", "g": 0, "n": 99},
        {"type": "ready", "g": 0, "n": 99, "step": "one", "scope": ""},
        {"type": "ready", "g": 0, "n": True, "step": 1, "scope": ""},
        {"type": "gather", "g": 0, "n": 99, "key": "x", "scope": "moon", "fold": "all", "value": 1},
        {"type": "suspect", "g": 0, "n": 99, "pipeline": 9},
        {"type": "hello", "n": 1, "rules": {}},
    ],
)
def test_what_cannot_be_understood_changes_nothing(message: Message) -> None:
    job = Job().start()
    with pytest.raises(Malformed):
        job.director.handle(job.name(0), message, 0.0)
    groups = [job.ready(0), job.ready(1)]
    assert [job.members(number) for number in groups] == [[0, 1], [0, 1]]


def test_a_message_that_comes_twice_has_one_answer() -> None:
    job = Job().start().begin(0)
    message = {"type": "ready", "n": 77, "g": 0, "step": 1, "scope": ""}
    assert job.director.handle(job.name(0), message, 0.0) == []
    assert job.director.handle(job.name(0), message, 0.0) == []  # it waits already
    job.ready(1)
    (again,) = job.director.handle(job.name(0), message, 0.0)  # its answer was lost on the way
    assert again[1]["members"] == [0, 1] and again[1]["n"] == 77


# --- groups


def test_a_second_ready_of_a_waiting_worker_is_refused() -> None:
    job = Job().start()
    job.ready(0)
    assert job.error(job.ready(0)) == "refused"


def test_groups_are_mapped_to_the_requests_of_their_own_stage() -> None:
    job = Job(stages=2).start()
    a, b, c = job.ready(0, 0), job.ready(0, 1), job.ready(1, 1)
    assert job.answer(a) is None and job.members(b) == job.members(c) == [0, 1]
    assert job.members(job.ready(1, 0)) == [0, 1] == job.members(a)


def test_the_scheduler_is_woken_when_it_wants() -> None:
    job = Job(policy="partial", wait="reference", heartbeat_timeout_s=100.0).start()
    lone = job.ready(0)
    wake = job.director.next_wake
    assert wake is not None and 0 < wake < 0.1
    job.tick(wake)
    assert job.members(lone) == [0]


def test_the_time_limit_of_a_group_names_who_is_missing() -> None:
    job = Job(pipelines=3, heartbeat_timeout_s=1e6).start()
    waiting = job.ready(0)
    job.tick(100.0)
    answer = job.answer(waiting)
    assert answer is not None and answer["error"] == "timeout"
    assert "stage 0 of pipeline 1, stage 0 of pipeline 2" in answer["text"]


# --- losses


def test_silence_of_exactly_the_timeout_is_a_loss() -> None:
    job = Job(pipelines=2, heartbeat_timeout_s=3.0).start()
    job.now = 1.0
    job.say("ping", 1)
    assert job.director.next_wake == 3.0
    job.tick(2.999999)
    assert job.director.live == (0, 1)
    job.tick(3.0)
    assert job.director.live == (1,)
    assert job.director.next_wake == 4.0
    (lost,) = job.pushes("lost", 1)
    assert lost["pipeline"] == 0 and lost["g"] == 1 and "stage 0 was silent for 3 s" in lost["text"]


def test_a_loop_that_stood_still_loses_nobody() -> None:
    job = Job(heartbeat_timeout_s=3.0).start()
    job.director.paused(10.0, job.now + 10.0)
    job.tick(10.0)
    assert job.director.live == (0, 1)
    job.tick(13.0)
    assert job.director.live == (1,)


def test_the_last_pipeline_is_borne_with_longer_since_nobody_waits_for_it() -> None:
    job = Job(heartbeat_timeout_s=3.0).start()
    job.tick(3.0)
    assert job.director.live == (1,) and job.director.stopped is None
    assert 3.0 < job.director.next_wake < 4.0
    job.tick(29.9)
    assert job.director.live == (1,)
    job.tick(31.0)
    assert job.director.live == () and job.director.stopped is not None


def test_a_loss_is_told_to_all_and_lets_them_go_on() -> None:
    job = Job(stages=2, pipelines=3).start().begin(0)
    waiting = [job.ready(0), job.ready(2)]
    value = job.gather(0, value={"n": 5}, scope="stage", fold="sum")
    other = job.gather(2, value={"n": 6}, scope="stage", fold="sum")
    job.lose(1, "killed")
    assert [job.members(number) for number in waiting] == [[0, 2], [0, 2]]
    assert job.answer(value)["value"] == job.answer(other)["value"] == {"n": 11}  # type: ignore[index]
    assert [len(job.pushes("lost", pipeline, stage)) for pipeline in (0, 2) for stage in (0, 1)] == [1, 1, 1, 1]
    assert len(job.pushes("fenced", 1, 0)) == len(job.pushes("fenced", 1, 1)) == 1


def test_news_of_a_loss_come_before_the_groups_that_follow_from_it() -> None:
    job = Job(pipelines=2).start()
    job.ready(0)
    job.lose(1)
    assert [message.get("type", "answer") for message in job.told[job.name(0)][-2:]] == ["lost", "answer"]


def test_a_suspicion_is_a_loss_unless_it_comes_from_a_lost_pipeline() -> None:
    job = Job(pipelines=3).start()
    job.say("suspect", 0, pipeline=1)
    assert job.director.live == (0, 2)
    late = job.say("suspect", 1, pipeline=0, g=0)
    assert job.error(late) == "fenced"
    job.say("suspect", 1, pipeline=0)  # it has been told of its new generation
    job.say("suspect", 2, pipeline=2)  # itself
    assert job.director.live == (0, 2)


def test_what_a_lost_pipeline_waits_for_fails() -> None:
    job = Job(pipelines=2).start().begin(0)
    group, values = job.ready(1), job.gather(1, value=5)
    job.lose(1)
    assert job.error(group) == job.error(values) == "fenced"


def test_an_old_generation_is_kept_out_until_it_knows() -> None:
    job = Job(pipelines=2).start().begin(0)
    job.lose(1)
    for kind, fields in {
        "ready": {"step": 1, "scope": ""},
        "final": {"segment": 0, "attempt": 0},
        "begin": {"segment": 7, "first": 0, "stop": 1},
        "gather": {"key": "x", "value": 1, "scope": "all", "fold": "all"},
        "giver": {"not_from": -1},
        "refreshed": {},
    }.items():
        assert job.error(job.say(kind, 1, g=0, **fields)) == "fenced", kind
    assert job.ticket(0, 0)["ticket"] == 0  # segment 7 has not begun


def test_a_ping_of_an_old_generation_is_told_that_it_is_old() -> None:
    job = Job(pipelines=2).start()
    job.lose(1)
    before = len(job.pushes("fenced", 1))
    job.say("ping", 1, g=0)
    assert len(job.pushes("fenced", 1)) == before + 1 and job.pushes("pong", 1)


def test_a_pipeline_that_is_not_whole_is_alone_at_once() -> None:
    job = Job(stages=2, pipelines=2).start().begin(0)
    job.lose(1)
    answer = job.answer(job.ready(1, 0))
    assert answer is not None and answer["members"] == [1] and answer["round"] == -1
    assert answer["reason"] == "pipeline 1 is not whole"


def test_too_few_pipelines_stop_the_job_with_a_sentence() -> None:
    job = Job(pipelines=3, min_replicas=2).start()
    waiting = job.ready(0)
    job.lose(1, "host w1 was cut off")
    assert job.answer(waiting) is None
    job.lose(2, "killed by signal 9")
    (stop,) = job.pushes("stop", 0)
    assert stop["text"] == (
        "1 of 3 pipelines is left, and --min-replicas is 2: pipeline 1 was declared lost: host w1 was cut off; "
        "pipeline 2 was declared lost: killed by signal 9"
    )
    assert job.error(waiting) == "too few" == job.error(job.ready(0))


# --- who does which batch


def test_all_stages_are_told_the_same_ticket() -> None:
    job = Job(stages=2).start().begin(0, 10, 13)
    assert [job.ticket(0, 0)["ticket"], job.ticket(1, 0)["ticket"], job.ticket(0, 1)["ticket"]] == [10, 11, 12]
    assert [job.ticket(0, 0, 1)["ticket"], job.ticket(1, 0, 1)["ticket"], job.ticket(0, 1, 1)["ticket"]] == [10, 11, 12]
    assert job.ticket(0, 2)["ticket"] is None is job.ticket(1, 1)["ticket"]


def test_beginning_is_idempotent_but_must_agree() -> None:
    job = Job().start().begin(0, 0, 4).begin(0, 0, 4)
    assert job.ticket(0, 0)["ticket"] == 0
    assert job.error(job.say("begin", 1, segment=0, first=0, stop=5)) == "refused"
    assert job.ticket(1, 0, segment=1)["error"] == "refused"


def test_stages_of_a_lost_pipeline_still_agree_on_its_tickets() -> None:
    job = Job(stages=2).start().begin(0, 0, 10)
    assert job.ticket(1, 0)["ticket"] == 0
    job.lose(1)
    assert job.ticket(1, 0, 1)["ticket"] == 0 and job.ticket(1, 1, 1)["ticket"] is None is job.ticket(1, 1)["ticket"]
    assert job.ticket(0, 0)["ticket"] == 0  # done again by another
    for pipeline in (0,):
        for stage in (0, 1):
            job.final(pipeline, stage)
    job.begin(1, 10, 20)
    assert job.ticket(1, 0, 1)["ticket"] == 0 and job.ticket(1, 1, 1)["ticket"] is None  # the others are further


# --- the way back


def back(job: Job, pipeline: int, incarnation: int = 0) -> list[int]:
    """All stages ask whom to copy from, and have copied; the numbers of their `refreshed`."""
    numbers = []
    for stage in range(job.rules.stages):
        giver = job.answer(job.say("giver", pipeline, stage, incarnation, not_from=-1))
        assert giver is not None and giver["pipeline"] in job.director.live, giver
        numbers.append(job.say("refreshed", pipeline, stage, incarnation))
    return numbers


def test_a_pipeline_is_live_again_when_all_its_stages_have_copied() -> None:
    job = Job(stages=2, pipelines=3).start().begin(0)
    assert [job.ticket(1, k)["ticket"] for k in range(3)] == [0, 1, 2]
    job.lose(1)
    giver = job.answer(job.say("giver", 1, 0, not_from=-1))
    assert giver is not None and giver["mesh"] == f"host{giver['pipeline']}:0.0"
    first = job.say("refreshed", 1, 0)
    assert job.answer(first) is None and job.director.live == (0, 2)
    second = job.say("refreshed", 1, 1)
    for welcome in (job.answer(first), job.answer(second)):
        assert welcome is not None and (welcome["g"], welcome["segment"], welcome["k"]) == (1, 0, 3)
    assert job.director.live == (0, 1, 2)
    (joined,) = job.pushes("joined", 2, 1)
    assert joined == {"type": "joined", "pipeline": 1, "g": 1, "mesh": "host1:1.0"}
    assert job.ticket(1, 3)["ticket"] == 0  # handed out again
    waiting = [job.ready(pipeline) for pipeline in range(3)]
    assert job.members(waiting[0]) == [0, 1, 2]


def test_all_stages_copy_from_one_pipeline_and_change_it_together() -> None:
    job = Job(stages=2, pipelines=4).start().begin(0)
    job.lose(3)

    def giver(stage: int, not_from: int = -1) -> int:
        answer = job.answer(job.say("giver", 3, stage, not_from=not_from))
        assert answer is not None
        return int(answer["pipeline"])

    chosen = giver(0)
    assert giver(1) == chosen
    other = giver(1, not_from=chosen)
    assert other != chosen and giver(0, not_from=chosen) == other
    job.lose(other)
    assert giver(0) not in (other, 3)


def test_those_who_come_back_at_the_same_time_copy_from_different_pipelines() -> None:
    job = Job(pipelines=4).start().begin(0)
    job.lose(0)
    job.lose(1)
    givers = [job.answer(job.say("giver", pipeline, not_from=-1)) for pipeline in (0, 1)]
    assert sorted(giver["pipeline"] for giver in givers if giver) == [2, 3]


def test_processes_that_were_started_again_come_back() -> None:
    job = Job(stages=2, pipelines=2).start().begin(0)
    assert job.ticket(1, 0)["ticket"] == 0
    job.lose(1)
    welcome = job.answer(job.hello(1, 0, incarnation=1))
    assert welcome is not None and welcome["late"] and welcome["k"] == 1 and welcome["live"] == [0]
    assert welcome["g"] == 2  # unlike what the old processes could know
    job.hello(1, 1, incarnation=1)
    numbers = back(job, 1, incarnation=1)
    assert job.director.live == (0, 1)
    assert [job.answer(number)["k"] for number in numbers] == [1, 1]  # type: ignore[index]
    (joined,) = job.pushes("joined", 0, 1)
    assert joined["mesh"] == "host1:1.1" and joined["g"] == 2
    assert job.error(job.ready(1, 0)) == "replaced"
    assert job.pushes("replaced", 1, 0) == []
    job.say("ping", 1, 0)
    assert len(job.pushes("replaced", 1, 0)) == 1
    assert (
        job.error(
            job.say(
                "hello",
                1,
                0,
                **{
                    "stage": 0,
                    "pipeline": 1,
                    "incarnation": 0,
                    "mesh": "",
                    "timeout": 1.0,
                    "rules": job.rules.message(),
                },
            )
        )
        == "replaced"
    )


def test_a_new_incarnation_is_the_end_of_the_old_one_even_if_nobody_said_so() -> None:
    job = Job(pipelines=2).start().begin(0)
    waiting = job.ready(0)
    job.hello(1, incarnation=1)
    assert job.members(waiting) == [0] and len(job.pushes("lost", 0)) == 1
    job.deliver(job.director.lost(1, "the launcher is slow", 0.0, incarnation=0))
    back(job, 1, incarnation=1)
    assert job.director.live == (0, 1)
    job.deliver(job.director.lost(1, "the launcher is slow", 0.0, incarnation=0))
    assert job.director.live == (0, 1)


def test_nobody_joins_between_two_segments() -> None:
    job = Job(stages=2, pipelines=3).start().begin(0, 0, 5)
    job.lose(2)
    finals = [job.final(pipeline, 0) for pipeline in (0, 1)]
    assert job.members(finals[0]) == [0, 1]
    numbers = back(job, 2)
    assert not any(map(job.answer, numbers)) and job.director.live == (0, 1)
    others = [job.final(pipeline, 1) for pipeline in (0, 1)]
    assert job.members(others[0]) == [0, 1]  # as at stage 0
    job.begin(1, 5, 10, but=1)
    late = job.gather(1, key="score/0", value={"n": 1}, scope="stage", fold="sum")  # it is not so far
    assert not any(map(job.answer, numbers))
    answer = job.gather(0, key="score/0", value={"n": 2}, scope="stage", fold="sum")
    assert job.answer(answer)["value"] == job.answer(late)["value"] == {"n": 3}  # type: ignore[index]
    job.begin(1, 5, 10)
    for number in numbers:
        welcome = job.answer(number)
        assert welcome is not None and welcome["segment"] == 1
    assert job.director.live == (0, 1, 2)


def test_who_joins_before_the_final_average_is_waited_for() -> None:
    job = Job(pipelines=2).start().begin(0, 0, 5)
    job.lose(1)
    numbers = back(job, 1)
    assert job.answer(numbers[0]) is not None
    first = job.final(0)
    assert job.answer(first) is None
    assert job.members(job.final(1)) == [0, 1] == job.members(first)


def test_a_silent_stage_keeps_its_pipeline_out_until_it_speaks() -> None:
    job = Job(stages=2, pipelines=2, heartbeat_timeout_s=3.0).start().begin(0)
    job.lose(1)
    for stage in (0, 1):  # the launcher's notice was wrong
        job.say("ping", 1, stage)
    first = job.say("refreshed", 1, 0)
    job.now = 2.0
    for pipeline, stage in ((0, 0), (0, 1), (1, 1)):
        job.say("ping", pipeline, stage)
    job.tick(3.0)  # stage 0 of pipeline 1 is silent
    second = job.say("refreshed", 1, 1)
    assert job.answer(first) is None and job.answer(second) is None
    job.say("ping", 1, 0)
    assert job.answer(first) is not None and job.answer(second) is not None and job.director.live == (0, 1)


def test_who_comes_back_after_the_end_is_told_so() -> None:
    job = Job(pipelines=2).start().begin(0)
    job.lose(1)
    job.say("giver", 1, not_from=-1)
    job.final(0)
    waiting = job.say("refreshed", 1)
    assert job.answer(waiting) is None
    job.say("bye", 0)
    assert job.error(waiting) == "over" == job.error(job.say("giver", 1, not_from=-1))
    assert not job.director.over
    job.say("bye", 1)
    assert job.director.over


def test_a_second_loss_starts_the_way_back_again() -> None:
    job = Job(stages=2, pipelines=2).start().begin(0)
    job.lose(1)
    first = job.say("refreshed", 1, 0)
    job.lose(1)
    assert job.error(first) == "fenced"
    job.say("refreshed", 1, 1)
    assert job.director.live == (0,)
    assert job.answer(job.say("refreshed", 1, 0)) is not None and job.director.live == (0, 1)


# --- final averages


def test_a_final_average_is_repeated_by_those_who_are_left() -> None:
    job = Job(pipelines=3).start().begin(0)
    numbers = [job.final(pipeline) for pipeline in range(3)]
    assert job.members(numbers[0]) == [0, 1, 2]
    rounds = {job.answer(number)["round"] for number in numbers}  # type: ignore[index]
    job.lose(1)
    confirm = [job.gather(pipeline, key="final/0/0", value=False, scope="stage") for pipeline in (0, 2)]
    assert job.answer(confirm[0])["value"] is False  # type: ignore[index]
    again = [job.final(pipeline, attempt=1) for pipeline in (0, 2)]
    assert job.members(again[0]) == job.members(again[1]) == [0, 2]
    assert job.answer(again[0])["round"] not in rounds  # type: ignore[index]


def test_a_lost_pipeline_has_no_final_average() -> None:
    job = Job(pipelines=2).start().begin(0)
    job.lose(1)
    assert job.error(job.final(1)) == "fenced"
    assert job.members(job.final(0)) == [0]


def test_the_final_average_of_a_segment_that_the_others_have_finished_is_refused() -> None:
    job = Job(pipelines=2).start().begin(0)
    for pipeline in (0, 1):
        job.final(pipeline)
    job.begin(1, 100, 200, but=1)
    assert job.error(job.final(1, segment=0)) == "fenced"


# --- one answer for all


@pytest.mark.parametrize(
    ("scope", "members"), [("stage", [0, 2, 4]), ("pipeline", [0, 1]), ("all", [0, 1, 2, 3, 4, 5]), ("last", [1, 3, 5])]
)
def test_a_gather_is_complete_when_all_members_have_given(scope: str, members: list[int]) -> None:
    job = Job(stages=2, pipelines=3).start()
    numbers = []
    for rank in members:
        assert not any(map(job.answer, numbers))
        numbers.append(job.gather(rank // 2, rank % 2, value=rank * 10, scope=scope, fold="rows to first"))
    first, *others = map(job.answer, numbers)
    assert first["rows"] == [(rank, rank * 10) for rank in members]  # type: ignore[index]
    assert all(other["value"] is None and "rows" not in other for other in others)  # type: ignore[index]


@pytest.mark.parametrize(
    ("fold", "values", "value"),
    [
        ("nothing", ["x", 1, None], None),
        ("all", [True, False, True], False),
        ("all", [True, True, True], True),
        ("any", [False, True, False], True),
        ("sum", [{"n": 1, "loss": 0.5}, {"n": 2}, {"n": 4, "loss": 0.25}], {"n": 7, "loss": 0.75}),
        ("given", [None, [4, 6], None], [4, 6]),
        ("given", [None, None, None], None),
    ],
)
def test_what_everybody_is_told_is_folded(fold: str, values: list[Any], value: Any) -> None:
    job = Job(pipelines=3).start()
    numbers = [job.gather(pipeline, value=one, fold=fold) for pipeline, one in enumerate(values)]
    assert [job.answer(number)["value"] for number in numbers] == [value] * 3  # type: ignore[index]


def test_the_speaker_is_the_last_stage_of_the_first_pipeline_that_is_there() -> None:
    job = Job(stages=2, pipelines=3).start().begin(0)
    numbers = {
        (pipeline, stage): job.gather(pipeline, stage, value=0, fold="rows to speaker")
        for pipeline in (0, 1, 2)
        for stage in (0, 1)
        if (pipeline, stage) != (0, 0)
    }
    job.lose(0)
    assert {place for place, number in numbers.items() if "rows" in (job.answer(number) or {})} == {(1, 1)}
    assert [rank for rank, _ in job.answer(numbers[1, 1])["rows"]] == [2, 3, 4, 5]  # type: ignore[index]


@pytest.mark.parametrize("fields", [{"fold": "rows"}, {"fold": "sum"}, {"fold": "sum", "value": {"n": "1"}}])
def test_a_value_that_cannot_be_folded_is_refused(fields: dict[str, Any]) -> None:
    job = Job().start()
    assert job.error(job.gather(0, **{"value": 1, **fields})) == "refused"


def exchanged(job: Job, worker: bytes) -> int:
    """Bytes that a worker was told."""
    return sum(len(json.dumps(message, separators=(",", ":"))) for message in job.told.get(worker, []))


@pytest.mark.parametrize("fold", ["nothing", "all", "any", "sum", "given", "rows to first", "rows to speaker"])
def test_what_passes_through_the_coordinator_grows_with_the_workers_and_not_with_their_square(fold: str) -> None:
    through = {}
    for workers in (16, 32, 64):
        job = Job(stages=2, pipelines=workers // 2).start()
        job.told.clear()
        for rank in range(workers):
            value: Any = {"a value of some length": 0.125} if fold == "sum" else "x" * 1000
            if fold == "given" and rank:
                value = None
            job.gather(*divmod(rank, 2), value=value, fold=fold)
        told = [exchanged(job, job.name(*divmod(rank, 2))) for rank in range(workers)]
        through[workers] = sum(told) / workers
        assert sorted(told)[-2] < (1100 if fold == "given" else 100)  # all but a receiver
    assert through[64] < 1.1 * through[16]


def test_the_books_stay_small_when_uneven_replicas_probe_two_thousand_times() -> None:
    job = Job(pipelines=3, heartbeat_timeout_s=1e6).start().begin(0)
    for probe in range(2000):
        for pipeline in (0, 1) if probe % 10 else (0, 1, 2):  # the third one makes a tenth of the updates
            job.gather(pipeline, key=f"consensus/{probe if pipeline < 2 else probe // 10}", value=[0.5] * 10)
            job.say("first", pipeline, key=f"live/{probe}", value=[0, 1, 2], segment=0)
    inner = job.director._job
    assert inner is not None
    assert len(inner._gathers) <= 2 * 3 * WAITING + REMEMBERED  # open ones, who waits for them, and finished ones
    assert len(inner._post.expire(inner.roll.asking(), -1.0)) == 0 and len(inner.roll.asking()) <= 3 * WAITING
    assert all(len(worker.answers) <= 32 for worker in inner.roll.workers.values())
    for segment in (1, 2):
        job.begin(segment, 100 * segment, 100 * segment + 100)
    assert len(inner._first) == 0
    job.tick(1000.0)  # every time limit has passed
    assert len(inner._gathers) <= REMEMBERED and not inner.roll.asking()


def test_the_agreements_of_the_start_and_of_who_may_come_back_are_kept() -> None:
    job = Job(pipelines=2).start()
    job.say("first", 0, key="cut", value=[4, 6], segment=-1)
    job.begin(0)
    job.say("first", 0, key="live", value=[0, 1], segment=0)
    job.lose(1)  # it has begun segment 0, and may not know that it is lost
    for segment in (1, 2, 3):
        job.begin(segment, 100 * segment, 100 * segment + 100)
        job.say("first", 0, key="live", value=[0], segment=segment)
    job.generations[job.name(1)] = 0
    assert job.answer(job.say("first", 1, key="live", value=[1], segment=0))["value"] == [0, 1]  # type: ignore[index]
    assert job.answer(job.say("first", 1, key="cut", value=[5, 5], segment=-1))["value"] == [4, 6]  # type: ignore[index]
    assert len(job.director._job._first) == 4  # type: ignore[union-attr, arg-type]


def test_answers_that_have_arrived_are_not_remembered() -> None:
    job = Job(pipelines=1).start()
    asked = [job.gather(0, key=str(number), value="x" * 1000, fold="rows to first") for number in range(10)]
    worker = job.director._job.roll.workers[job.name(0)]  # type: ignore[union-attr]
    assert set(asked) <= worker.answers.keys()
    job.say("ping", 0, a=asked[-1])
    assert list(worker.answers) == asked[-1:]
    job.told.clear()
    job.director.handle(job.name(0), {"type": "gather", "n": asked[0], "g": 0}, 0.0)  # a late copy of a question
    assert not job.told


def test_who_was_declared_lost_gathers_with_nobody() -> None:
    job = Job(pipelines=3).start().begin(0)
    job.lose(2)
    assert job.error(job.gather(2, value=1)) == "fenced"


def test_the_answer_of_a_gather_is_decided_once() -> None:
    job = Job(pipelines=3).start().begin(0)
    for pipeline in (0, 1):
        job.gather(pipeline, value={"n": 1}, fold="sum")
    job.lose(2)
    back(job, 2)
    late = job.gather(2, value={"n": 1}, fold="sum")
    assert job.answer(late)["value"] == {"n": 2}  # type: ignore[index]


def test_who_is_not_of_the_last_stage_only_listens() -> None:
    job = Job(stages=2, pipelines=1).start()
    listener = job.gather(0, 0, value=None, scope="last", fold="given")
    assert job.answer(listener) is None
    job.gather(0, 1, value=0.5, scope="last", fold="given")
    assert job.answer(listener)["value"] == 0.5  # type: ignore[index]


def test_the_time_limit_of_a_gather_names_who_is_missing() -> None:
    job = Job(pipelines=3, heartbeat_timeout_s=1e6).start()
    waiting = job.gather(1, key="score/3", value=1)
    job.tick(100.0)
    assert job.answer(waiting)["text"] == (  # type: ignore[index]
        "waited 100 s (gather) for stage 0 of pipeline 0, stage 0 of pipeline 2 to give 'score/3'"
    )


def test_the_first_value_is_everybodys() -> None:
    job = Job(pipelines=2).start()
    assert job.answer(job.say("first", 1, key="cut", value=[4, 6], segment=-1))["value"] == [4, 6]  # type: ignore[index]
    assert job.answer(job.say("first", 0, key="cut", value=[5, 5], segment=-1))["value"] == [4, 6]  # type: ignore[index]


# --- the end


def test_the_end_is_when_all_have_said_bye_or_are_lost_and_silent() -> None:
    job = Job(pipelines=3, heartbeat_timeout_s=3.0).start().begin(0)
    job.lose(2)
    job.say("bye", 0)
    assert not job.director.over
    waiting = job.ready(1)
    assert job.members(waiting) == [1]  # nobody waits for who has said bye
    job.say("bye", 1)
    assert job.director.over and job.director.live == ()
    assert not job.pushes("stop", 1)  # two have finished
    job.say("ping", 2)
    assert not job.director.over
    job.tick(3.0)
    assert job.director.over


def test_a_crash_after_the_end_is_no_loss() -> None:
    job = Job(pipelines=2).start().begin(0)
    job.say("bye", 1)
    job.lose(1)
    assert not job.pushes("lost", 0)


# --- anything at any time


def anything(job: Job, chance: random.Random, incarnations: dict[int, int], asked: list[int]) -> None:
    """One step of a random job: a message that a worker might send, a loss, or time that passes."""
    pipeline, stage = chance.randrange(job.rules.pipelines), chance.randrange(job.rules.stages)
    who = (pipeline, stage, incarnations[pipeline])
    segment = chance.randrange(3)
    often = ("ready", "ready", "ticket", "begin", "refreshed", "ping", "wait")
    seldom = ("final", "gather", "first", "giver", "suspect", "hello", "lost", "again", "bye")
    kind = chance.choice((*often, *often, *seldom))
    fields: dict[str, dict[str, Any]] = {
        "ready": {"step": 1, "scope": ""},
        "final": {"segment": segment, "attempt": 0},
        "ticket": {"segment": segment, "k": chance.randrange(4)},
        "begin": {"segment": segment, "first": 10 * segment, "stop": 10 * segment + 10},
        "gather": {
            "key": "x",
            "value": 1,
            "scope": chance.choice(["stage", "pipeline", "all", "last"]),
            "fold": chance.choice(["nothing", "all", "given", "rows to first", "rows to speaker"]),
        },
        "first": {"key": "x", "value": 1, "segment": segment},
        "giver": {"not_from": -1},
        "refreshed": {},
        "suspect": {"pipeline": chance.randrange(job.rules.pipelines)},
        "ping": {},
        "bye": {},
    }
    if kind in fields and (kind != "bye" or chance.random() < 0.1):
        done = {"done": chance.randrange(4)} if chance.random() < 0.2 else {}
        number = job.say(kind, *who, **fields[kind], **done)
        if kind != "ping":
            asked.append(number)
    elif kind == "hello":
        asked.append(job.hello(*who))
    elif kind == "lost" and chance.random() < 0.3:
        job.lose(pipeline)
    elif kind == "again" and chance.random() < 0.3:
        incarnations[pipeline] += 1
    elif kind == "wait":
        job.tick(job.now + chance.random() * 0.3)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_each_question_has_one_answer_and_the_end_answers_all(seed: int) -> None:
    chance = random.Random(seed)
    policy = chance.choice(["partial", "all", "matching"])
    job = Job(stages=chance.randint(1, 3), pipelines=chance.randint(1, 4), policy=policy, heartbeat_timeout_s=1.0)
    incarnations = dict.fromkeys(range(job.rules.pipelines), 0)
    job.start()
    asked = list(range(1, job.numbers + 1))
    for _ in range(400):
        anything(job, chance, incarnations, asked)
        wake = job.director.next_wake
        assert wake is None or wake > job.now - 0.31  # it does not lie behind what has been looked at
    for _ in range(3):
        job.tick(job.now + 200.0)  # all are silent, and every time limit has passed
    answers = [message["n"] for told in job.told.values() for message in told if "n" in message]
    assert sorted(answers) == asked
    assert job.director.over and job.director.next_wake is None
