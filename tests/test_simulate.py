"""The validator finds deadlocks, and the virtual clock gives the textbook bubbles."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.actions import Action, Op, parse
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, forward_only, program
from pipeline.schedules.simulate import DeadlockError, simulate, validate

COSTS = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0}


def unit_cost(pipeline: int, stage: int, action: Action) -> float:
    return COSTS.get(action.op, 0.0)


def makespan(name: str, shape: Shape, count: int) -> float:
    places = [(p, s) for p in range(shape.replicas) for s in range(shape.stages)]
    programs = {place: program(SCHEDULES[name], shape, place[1], range(count)) for place in places}
    return max(span.end for span in simulate(programs, cost=unit_cost))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gpipe", "1f1b", "pipedream"]),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_every_schedule_finishes(
    name: str, stages: int, microbatches: int, accumulate: int, replicas: int, norm: bool, tied: bool
) -> None:
    count = microbatches * 4 if SCHEDULES[name].flushes else 13
    shape = Shape(
        stages=stages,
        microbatches=microbatches if SCHEDULES[name].flushes else 1,
        accumulate=accumulate,
        replicas=replicas,
        norm=norm,
        tie=(0, stages - 1) if tied else None,
    )
    validate(SCHEDULES[name], shape, count)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bubble_of_a_flushed_schedule_is_the_textbook_one(name: str) -> None:
    stages, microbatches = 4, 8
    assert makespan(name, Shape(stages=stages, microbatches=microbatches), microbatches) == 3.0 * (
        microbatches + stages - 1
    )


def test_pipedream_fills_the_pipe_once_for_many_batches() -> None:
    assert makespan("pipedream", Shape(stages=4), 100) == 3.0 * (100 + 3)


def test_a_pipeline_that_waits_for_itself_is_named() -> None:
    programs = {(0, 0): iter(parse("RG0 F0 SA0")), (0, 1): iter(parse("RA0 F0 SG0"))}
    with pytest.raises(DeadlockError, match="stage 0 at RG0, stage 1 at RA0"):
        simulate(programs)


def test_a_message_in_the_wrong_order_is_named() -> None:
    programs = {(0, 0): iter(parse("SA1 SA0")), (0, 1): iter(parse("RA0 RA1"))}
    with pytest.raises(DeadlockError, match="stage 1 at RA0 finds SA1 of stage 0"):
        simulate(programs)


def test_a_message_that_nobody_takes_is_named() -> None:
    with pytest.raises(DeadlockError, match="nobody receives SA0 of stage 0"):
        simulate({(0, 0): iter(parse("SA0")), (0, 1): iter(parse("F0"))})


def test_evaluation_keeps_no_more_in_flight_than_there_are_stages() -> None:
    stages = 3
    programs = {(0, stage): forward_only(stage, stages, range(20)) for stage in range(stages)}
    ahead = 0
    done = -1
    for span in simulate(programs, cost=unit_cost):
        if span.action.op is Op.FORWARD and span.stage == 0:
            ahead = max(ahead, span.action.microbatch - done)
        if span.action.op is Op.RECV_GRADIENT and span.stage == 0:
            done = span.action.microbatch
    assert ahead <= stages
