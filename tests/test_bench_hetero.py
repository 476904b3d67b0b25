"""The arithmetic of bench/hetero.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench" / "hetero.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_hetero", BENCH)
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_hetero"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(begin: float, end: float, groups: dict[int, int] | None, samples: int = 8) -> dict[str, Any]:
    mixing = None
    if groups is not None:
        mixing = {"waited_s": 0.1, "partner": 2.0, **{f"groups_of_{size}": times for size, times in groups.items()}}
    return {"stretches": [[begin, end]], "samples": samples, "mixing": mixing}


def test_it_says_how_it_is_used() -> None:
    text = subprocess.run([sys.executable, str(BENCH), "--help"], capture_output=True, text=True, check=True).stdout
    assert "bench/hetero.py" in text and "--rounds" in text and "SUPPRESS" not in text


@pytest.mark.parametrize(("factor", "ideal", "bound"), [(1, 0.5, 0.5), (2, 0.571, 1.0), (5, 0.625, 2.5)])
def test_the_ideal_is_all_work_over_all_speed(bench: Any, factor: float, ideal: float, bound: float) -> None:
    factors = bench.slowdowns(factor)
    assert bench.ideal_s(factors, 100, 0.005) == pytest.approx(ideal, abs=0.001)
    assert bench.bound_s(factors, 100, 0.005) == pytest.approx(bound)


def test_the_time_is_from_the_first_start_to_the_last_end(bench: Any) -> None:
    outcome = bench.outcome_of([report(10.0, 11.0, {1: 1, 4: 2}, 24), report(10.1, 12.0, {4: 2}, 16)], 8)
    assert outcome.seconds == pytest.approx(2.0)
    assert outcome.groups == {1: 1, 4: 4} and outcome.updates == 5
    assert outcome.waited == pytest.approx(0.05)


def test_all_reduce_forms_no_groups(bench: Any) -> None:
    outcome = bench.outcome_of([report(0.0, 1.0, None)], 8)
    assert outcome.groups == {} and outcome.waited is None


def test_a_run_with_stops_in_between_is_refused(bench: Any) -> None:
    twice = {**report(0.0, 1.0, {}), "stretches": [[0.0, 1.0], [2.0, 3.0]]}
    with pytest.raises(ValueError, match="expected one each"):
        bench.outcome_of([twice], 8)


def test_a_group_is_counted_once_though_each_member_reports_it(bench: Any) -> None:
    groups = {1: 1, 4: 4}  # one replica alone once, four together once
    assert bench.alone_share(groups) == pytest.approx(1 / 2)
    assert bench.mean_size(groups) == pytest.approx(17 / 5)


def test_a_row_has_the_medians_of_the_rounds(bench: Any) -> None:
    outcomes = [bench.Outcome(seconds, {2: 10}, 20, 0.01) for seconds in (0.6, 0.9, 0.55)]
    row = bench.row_of(1.0, "preduce", outcomes, ideal=0.5)
    assert bench.markdown([row]).splitlines()[-1] == "| 1x | preduce | 0.600 | 1.20 | 2.00 | 0.0% | 0.50 | 1.0% |"


def test_the_scheduler_alone_runs_with_a_real_coordinator(bench: Any) -> None:
    options = bench.argparse.Namespace(steps=5)
    outcome = bench.schedule_alone(2.0, options)
    assert outcome.updates == 20 and outcome.seconds >= 20 * 0.005 / 3.5
    assert sum(outcome.groups.values()) == 20
