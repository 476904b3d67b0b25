"""The schedules as pictures."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.actions import Action, Op, parse, render
from pipeline.errors import UserError
from pipeline.schedules.orders import SCHEDULES, compute_order, find_schedule
from pipeline.schedules.program import Shape, edges, peak_versions, program, updates_of


def order(name: str, stage: int, stages: int, microbatches: int, count: int) -> str:
    shape = Shape(stages=stages, microbatches=microbatches)
    return render(updates_of(SCHEDULES[name], shape, stage, range(count)))


def test_gpipe_does_all_forwards_first() -> None:
    assert order("gpipe", 0, 2, 4, 4) == "F0 F1 F2 F3 B0 B1 B2 B3 U3"
    assert order("gpipe", 1, 2, 4, 4) == "F0 F1 F2 F3 B0 B1 B2 B3 U3"


def test_1f1b_keeps_as_many_in_flight_as_stages_follow() -> None:
    assert order("1f1b", 0, 4, 6, 6) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5 U5"
    assert order("1f1b", 2, 4, 6, 6) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5 U5"
    assert order("1f1b", 3, 4, 6, 6) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 U5"


def test_1f1b_with_few_microbatches_is_not_deeper_than_a_batch() -> None:
    assert order("1f1b", 0, 4, 2, 4) == "F0 F1 B0 B1 U1 F2 F3 B2 B3 U3"


def test_pipedream_updates_at_every_backward_and_never_runs_empty() -> None:
    assert order("pipedream", 0, 3, 1, 6) == "F0 F1 F2 B0 U0 F3 B1 U1 F4 B2 U2 F5 B3 U3 B4 U4 B5 U5"
    assert order("pipedream", 2, 3, 1, 3) == "F0 B0 U0 F1 B1 U1 F2 B2 U2"


def test_a_stage_of_pipedream_holds_as_many_versions_as_stages_follow() -> None:
    for stages in (1, 2, 3, 4, 7):
        for stage in range(stages):
            shape = Shape(stages=stages)
            assert peak_versions(updates_of(SCHEDULES["pipedream"], shape, stage, range(50))) == stages - stage
            assert peak_versions(updates_of(SCHEDULES["1f1b"], shape, stage, range(50))) == 1


def test_accumulation_updates_after_several_batches_and_after_the_rest() -> None:
    shape = Shape(stages=1, microbatches=2, accumulate=2)
    assert render(updates_of(SCHEDULES["1f1b"], shape, 0, range(6))) == "F0 B0 F1 B1 F2 B2 F3 B3 U3 F4 B4 F5 B5 U5"


def test_a_middle_stage_receives_and_sends_on_both_sides() -> None:
    text = render(program(SCHEDULES["pipedream"], Shape(stages=3), 1, range(3)))
    assert text == "RA0 F0 SA0 RA1 F1 SA1 RG0 B0 SG0 U0 RA2 F2 SA2 RG1 B1 SG1 U1 RG2 B2 SG2 U2"


def test_a_single_stage_loads_and_sends_nothing() -> None:
    assert render(program(SCHEDULES["dp"], Shape(stages=1), 0, range(1))) == "L0 F0 B0 U0"


def test_the_reduction_opens_before_the_last_backward() -> None:
    shape = Shape(stages=2, microbatches=2, replicas=2)
    assert render(program(SCHEDULES["gpipe"], shape, 1, range(2))) == ("RA0 L0 F0 RA1 L1 F1 B0 SG0 RO1 B1 SG1 R1 U1")


def test_the_borrower_of_a_tied_weight_forwards_with_the_owners_version() -> None:
    shape = Shape(stages=2, tie=(0, 1))
    owner = render(program(SCHEDULES["pipedream"], shape, 0, range(4)))
    borrower = render(program(SCHEDULES["pipedream"], shape, 1, range(4)))
    assert owner.startswith("L0 F0 SA0 L1 F1 SA1 RG0 B0 RT0 U0 SW0 L2 F2 SA2 RG1 B1 RT1 U1 SW1 L3 F3")
    assert borrower == (
        "RA0 L0 F0 B0 SG0 ST0 U0 RA1 L1 F1 B1 SG1 ST1 U1 "
        "RW0 RA2 L2 F2 B2 SG2 ST2 U2 RW1 RA3 L3 F3 B3 SG3 ST3 U3 RW2 RW3"
    )


def test_the_order_before_an_update_is_tie_then_replicas_then_norm() -> None:
    shape = Shape(stages=2, replicas=2, norm=True, tie=(0, 1))
    text = render(program(SCHEDULES["pipedream"], shape, 0, range(1)))
    assert text == "L0 F0 SA0 RO0 RG0 B0 RT0 R0 N0 U0 SW0"


@given(st.integers(0, 40), st.integers(1, 8))
def test_every_microbatch_goes_forward_and_back_once_within_the_window(count: int, window: int) -> None:
    in_flight: list[int] = []
    seen = []
    for op, microbatch in compute_order(range(count), window):
        if op is Op.FORWARD:
            in_flight.append(microbatch)
            seen.append(microbatch)
        else:
            assert in_flight.pop(0) == microbatch
        assert len(in_flight) <= window
    assert seen == list(range(count)) and not in_flight


@given(st.lists(st.builds(Action, st.sampled_from(list(Op)), st.integers(0, 10**6)), max_size=20))
def test_the_text_form_is_read_back(actions: list[Action]) -> None:
    assert parse(render(actions)) == actions


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(UserError, match=r"unknown schedule 'hetpipe'; choose from \['gpipe'"):
        find_schedule("hetpipe")
    with pytest.raises(ValueError, match="'Z3' is not an action"):
        parse("F0 Z3")


def test_mixing_asks_before_the_backward_and_averages_after_the_update() -> None:
    shape = Shape(stages=2, mixing=True)
    assert render(program(SCHEDULES["pipedream"], shape, 1, range(2))) == (
        "RA0 L0 F0 J0 B0 SG0 U0 W0 X0 RA1 L1 F1 J1 B1 SG1 U1 W1 X1"
    )
    first = render(program(SCHEDULES["pipedream"], shape, 0, range(2)))
    assert first == "L0 F0 SA0 L1 F1 SA1 RG0 J0 B0 U0 W0 X0 RG1 J1 B1 U1 W1 X1"
    flushed = render(program(SCHEDULES["1f1b"], Shape(stages=1, microbatches=2, mixing=True), 0, range(2)))
    assert flushed == "L0 F0 B0 L1 F1 J1 B1 U1 W1 X1"


def test_a_tied_weight_leaves_after_it_was_mixed() -> None:
    shape = Shape(stages=2, mixing=True, tie=(0, 1))
    owner = render(program(SCHEDULES["gpipe"], shape, 0, range(1)))
    assert owner == "L0 F0 SA0 RG0 J0 B0 RT0 U0 W0 X0 SW0"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "pipedream"])
@pytest.mark.parametrize("stages", range(1, 9))
def test_devices_send_to_neighbours_and_the_ends_of_a_tie_only(
    stages: int, name: str, norm: bool, accumulate: int
) -> None:
    microbatches = 1 if name == "pipedream" else 4
    neighbours = {(s, s + 1) for s in range(stages - 1)} | {(s + 1, s) for s in range(stages - 1)}
    shape = Shape(stages=stages, microbatches=microbatches, accumulate=accumulate, norm=norm)
    assert edges(SCHEDULES[name], shape) == neighbours
    for tie in ((0, stages - 1), (1, stages - 1)) if stages > 2 else ():
        tied = dataclasses.replace(shape, tie=tie)
        assert edges(SCHEDULES[name], tied) == neighbours | {tie, tie[::-1]}
