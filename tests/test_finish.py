"""The end of a run: whoever gathers what all did prints the table, and if it is lost meanwhile, the next one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.report.summary import RankReport
from pipeline.train.run import finish

REPORT = RankReport(
    rank=2, host="w1", device="cpu", pipeline=1, stage=0, samples=640, seconds=10.0, versions=1, peak_bytes=10**6,
    bytes_sent=10**6, stretches=((0.0, 1.0), (2.0, 3.0)),
)  # fmt: skip


class Survivor:
    """The world of a rank that is not rank 0, in which each gather has its own outcome."""

    rank = 2

    def __init__(self, *turns: tuple[bool, bool]) -> None:
        self._turns = list(turns)  # (it is the one that gathers, somebody has written)
        self.claims: list[bool] = []

    def gather_to_zero(self, value: Any) -> list[Any] | None:
        other = {**value, "report": dataclasses.replace(REPORT, rank=3, stage=1).to_values()}
        return json.loads(json.dumps([value, other])) if self._turns[0][0] else None

    def any_of(self, mine: bool) -> bool:
        self.claims.append(mine)
        return mine or self._turns.pop(0)[1]


def finished(world: Survivor, out: Path) -> None:
    trainer: Any = SimpleNamespace(
        world=world,
        journal=None,
        had_nothing_to_do=False,
        report=lambda: REPORT,
        transport=SimpleNamespace(close=lambda: None),
        settings=SimpleNamespace(out=str(out)),
    )
    finish(trainer)


def test_whoever_gathers_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(Survivor((True, True)), tmp_path / "out")
    assert "Summary" in capsys.readouterr().out
    assert "2 workers" in (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8")


def test_the_others_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(world := Survivor((False, True)), tmp_path / "out")
    assert not capsys.readouterr().out and not (tmp_path / "out").exists() and world.claims == [False]


def test_when_that_one_is_lost_before_it_has_written_the_next_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(world := Survivor((False, False), (True, True)), tmp_path / "out")
    assert capsys.readouterr().out.count("Summary") == 1 and world.claims == [False, True]
    assert (tmp_path / "out" / "summary.json").exists()
