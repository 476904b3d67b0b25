"""Lines and curves of a run: one meaning of a window and of a speed, whoever trains how fast, and however many do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_settings

from pipeline.data.epochs import Calendar
from pipeline.models.criterion import Classification
from pipeline.report.training_log import ElasticJournal, Journal, line_due

BATCH = 8


class Watch:
    """A clock that somebody else moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Desk:
    """A journal, what it says, and a clock."""

    def __init__(self, folder: Path, *, elastic: bool, speaks: bool = True, add: Any = dict, **values: Any) -> None:
        self.said: list[str] = []
        self.watch, self.add = Watch(), add
        self.told_to_others: list[Any] = []
        self.from_others: list[Any] = []
        settings = tiny_settings(folder, metrics=None, batch_size=BATCH, microbatches=None, pipeline="dp", **values)
        self.calendar = Calendar(batches_per_epoch=10, epochs=2, accumulate=settings.accumulate, validate_every=0)
        options: dict[str, Any] = {
            "speaks": lambda: speaks, "rate": lambda update: 0.1, "sum_over_pipelines": add,
            "progress": lambda *_: None, "busy_s": lambda: 0.0, "device": "cpu", "run_name": "run",
            "say": self.said.append, "clock": self.watch,
        }  # fmt: skip
        if elastic:
            options |= {"told": self, "length": lambda ticket: BATCH}
        kind: Callable[..., Any] = ElasticJournal if elastic else Journal
        self.journal = kind(settings, self.calendar, Classification(), **options)

    def tell(self, value: Any) -> None:
        self.told_to_others.append(value)

    def told(self) -> list[Any]:
        told, self.from_others = self.from_others, []
        return told

    def sum_to_speaker(self, sums: dict[str, float]) -> dict[str, float]:
        return dict(self.add(sums))

    def lines(self) -> list[tuple[int, float, float]]:
        """(batch, speed, accuracy) of every speed line."""
        found = [re.search(r"Batch \[(\d+)\]\tSpeed: (\S+) samples/sec\taccuracy=(\S+)", line) for line in self.said]
        return [(int(m[1]), float(m[2]), float(m[3])) for m in found if m]


def sums(batches: int = 1, *, right: float = 0.5, loss: float = 2.0) -> dict[str, torch.Tensor]:
    samples = float(batches * BATCH)
    values = {"loss": loss * samples, "samples": samples, "correct": right * samples}
    return {name: torch.tensor(value) for name, value in values.items()}


def rows(*updates: float, right: float, loss: float = 2.0) -> list[Any]:
    values = {name: float(value) for name, value in sums(right=right, loss=loss).items()}
    return [[update, values] for update in updates]


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 12), st.integers(1, 25))
def test_a_line_is_due_when_a_multiple_within_an_epoch_was_passed(
    before: int, more: int, every: int, per_epoch: int
) -> None:
    passed = [(batch - 1) % per_epoch + 1 for batch in range(before + 1, before + more + 1)]
    expected = any(within % every == 0 for within in passed)
    assert line_due(before, before + more, every=every, per_epoch=per_epoch) == expected


def test_lines_come_every_so_many_batches_and_count_all_pipelines_whatever_goes_into_an_update(tmp_path: Path) -> None:
    """Two pipelines, the other of which is right half as often; a batch takes a second."""

    def add(mine: dict[str, float]) -> dict[str, float]:
        return {name: value * (1.5 if "correct" in name else 2.0) for name, value in mine.items()}

    desk = Desk(tmp_path, elastic=False, add=add, accumulate=3, disp_batches=4)
    desk.journal.begin(0)
    for batches, in_it in ((3, 3), (6, 3), (9, 3), (10, 1)):
        desk.watch.now_s = float(batches)
        desk.journal.updated(batches, sums(in_it))
    speed = 2 * BATCH
    assert desk.lines() == [(6, speed, 0.375), (9, speed, 0.375), (10, speed, 0.375)]
    assert desk.journal.log.curve == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert "0 TRAIN loss 2.0000 acc 0.3750" in desk.said[-1]


def test_the_speed_of_replicas_that_do_as_much_as_they_can_is_of_all_of_them(tmp_path: Path) -> None:
    """This one does a third of the tickets, two to an update; a ticket takes a second."""
    desk = Desk(tmp_path, elastic=True, accumulate=2, disp_batches=4)
    desk.journal.begin(0)
    desk.journal.begin_at(0)
    desk.from_others.append(rows(1.0, 1.0, right=0.0))
    for ticket in (5, 11, 17):  # with three pipelines: the calendar's batches 2, 4 and 6
        desk.watch.now_s = ticket + 1.0
        desk.journal.progressed(ticket // 3 + 1, ticket, sums(2))
    assert desk.lines() == [(4, BATCH, pytest.approx(0.5 * 4 / 6, abs=1e-6))]
    assert desk.journal.log.curve == [(1, 2.0), (2, 2.0)], "the last update is read when a line is due"


def test_a_resumed_elastic_run_does_not_count_what_was_done_before(tmp_path: Path) -> None:
    desk = Desk(tmp_path, elastic=True, disp_batches=2)
    desk.journal.begin(4)
    desk.journal.begin_at(8)
    for ticket in range(8, 16):  # two pipelines
        desk.watch.now_s += 1.0
        desk.journal.progressed(ticket // 2 + 1, ticket, sums())
    assert {speed for _, speed, _ in desk.lines()} == {BATCH} and len(desk.lines()) == 2


def test_who_joins_late_does_not_count_what_the_others_did_meanwhile(tmp_path: Path) -> None:
    desk = Desk(tmp_path, elastic=True, disp_batches=2)
    desk.journal.begin(0)
    desk.journal.joined()
    for ticket in range(6, 14):
        desk.watch.now_s += 1.0
        desk.journal.progressed(ticket // 2 + 1, ticket, sums())
    assert {speed for _, speed, _ in desk.lines()} == {BATCH}


def test_the_last_line_of_an_epoch_counts_all_tickets_and_hears_all_that_was_told(tmp_path: Path) -> None:
    desk: Desk

    def add(mine: dict[str, float]) -> dict[str, float]:
        desk.from_others.append(rows(10.0, right=0.0, loss=4.0))  # what was told before the sum was given
        return mine

    desk = Desk(tmp_path, elastic=True, add=add, disp_batches=100)
    desk.journal.begin(0)
    desk.journal.begin_at(0)
    desk.watch.now_s = 19.0
    desk.journal.progressed(10, 18, sums())
    desk.watch.now_s = 20.0
    desk.journal.stopped(10, {"groups_of_2": 4.0}, ticket=20, pipeline=0, samples=8.0)
    assert desk.lines() == [(10, BATCH, 0.25)]
    assert desk.journal.log.curve == [(10, 3.0)], "the mean over both pipelines"


def test_tickets_at_the_end_of_which_nothing_was_heard_get_no_line_of_their_own(tmp_path: Path) -> None:
    """Its loss would be no number, which looks like a training that has diverged."""
    desk = Desk(tmp_path, elastic=True, disp_batches=10)
    desk.journal.begin(0)
    desk.journal.begin_at(0)
    desk.watch.now_s = 19.0
    desk.journal.progressed(10, 18, sums())
    desk.watch.now_s = 20.0
    desk.journal.stopped(10, {}, ticket=20, pipeline=0, samples=8.0)
    assert desk.lines() == [(10, BATCH, 0.5)]


def test_who_does_not_speak_tells_what_it_has_done(tmp_path: Path) -> None:
    desk = Desk(tmp_path, elastic=True, speaks=False, disp_batches=2)
    desk.journal.begin(0)
    desk.journal.begin_at(0)
    for ticket in range(3):
        desk.journal.progressed(ticket + 1, ticket, sums(loss=float("inf") if ticket else 2.0))
    (told,) = desk.told_to_others
    assert [update for update, _ in told] == [1.0, 2.0]
    assert told[0][1]["loss"] == 16.0 and told[1][1]["loss"] is None, "JSON has no word for it"


def test_a_stop_without_any_work_is_no_error(tmp_path: Path) -> None:
    desk = Desk(tmp_path, elastic=True)
    desk.journal.begin(0)
    desk.journal.begin_at(0)
    desk.journal.stopped(10, {}, ticket=20, pipeline=0, samples=0.0)
    assert desk.said[-1].startswith("0 TRAIN loss nan")
