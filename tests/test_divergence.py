"""When a loss that is no number ends a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny import run_here

from pipeline.errors import UserError
from pipeline.report.divergence import IN_A_ROW, LossWatch

NAN, INF = math.nan, math.inf


def warnings(policy: str, *losses: float) -> list[str]:
    watch = LossWatch(policy)
    return [said for update, loss in enumerate(losses, 1) if (said := watch.see(update, loss)) is not None]


def test_a_few_losses_in_a_row_end_the_run_and_the_first_of_them_is_named() -> None:
    assert IN_A_ROW == 3
    with pytest.raises(UserError, match=r"since update 4 \(3 in a row\).*--learning-rate.*--nan warn"):
        warnings("stop", 1.0, NAN, 2.0, INF, NAN, NAN)


def test_single_ones_are_let_pass() -> None:
    assert warnings("stop", 1.0, NAN, NAN, 2.0, INF, -INF, 3.0) == []


def test_a_warning_is_said_once_a_row() -> None:
    said = warnings("warn", *[NAN] * 50, 1.0, *[NAN] * 50)
    assert len(said) == 2 and "since update 1 " in said[0] and "since update 52 " in said[1]


def test_off_is_silent() -> None:
    assert warnings("off", *[NAN] * 50) == []


def test_a_run_that_diverges_ends_in_one_line_long_before_a_line_is_due(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the training has diverged"):
        run_here(tmp_path, learning_rate=1e30, warmup_epochs=0.0, epochs=50, disp_batches=10_000)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["nan"] == "stop" and not any(row["event"] == "window" for row in rows)


def test_a_run_may_go_on_and_its_summary_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path, learning_rate=1e30, warmup_epochs=0.0, epochs=2, nan="warn")
    assert capsys.readouterr().out.count("warning: the loss is not finite any more") == 1

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=refuse)
