"""Everything that is put into a report fits into a message, however long the job was."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from pipeline.coordination.client import FRAME_BYTES
from pipeline.coordination.thinning import SHORT, fit, thinned
from pipeline.core.trace import Span
from pipeline.replicas.elastic import RECEIVED_BYTES, share_bytes
from pipeline.report.summary import RankReport


def size(values: Any) -> int:
    return len(json.dumps(values, separators=(",", ":")))


def long_job(*, stops: int, updates: int, spans: int) -> dict[str, Any]:
    """What a rank says at the end of it."""
    report = RankReport(
        rank=3, host="w0", device="cpu", pipeline=1, stage=1, samples=10**9, seconds=1e6, versions=2, peak_bytes=10**9,
        bytes_sent=10**12, mixing={"waited_s": 1.5, "lost": [0, 2, 0]}, busy_s=9e5,
        stretches=tuple((1.7e9 + stop + 0.123456789, 1.7e9 + stop + 0.987654321) for stop in range(stops)),
        spans=tuple(Span(1, 1, f"F{n}", 1.7e9 + n / 3, 1.7e9 + n / 3 + 0.1) for n in range(spans)),
    )  # fmt: skip
    return {
        "report": report.to_values(),
        "curve": [(update, 1 / (update + 1)) for update in range(updates)],
        "validations": [(update, float("nan")) for update in range(0, updates, 5)],
    }


@pytest.mark.parametrize(
    "long",
    [
        {"stops": 30_000, "updates": 0, "spans": 0},
        {"stops": 0, "updates": 50_000, "spans": 0},
        {"stops": 0, "updates": 0, "spans": 25_000},
        {"stops": 10_000, "updates": 30_000, "spans": 10_000},
    ],
)
@pytest.mark.parametrize("workers", [1, 4096])
def test_what_a_rank_says_of_a_very_long_job_fits_into_its_message(long: dict[str, int], workers: int) -> None:
    whole, limit = long_job(**long), share_bytes(workers)
    assert size(whole) > limit
    said = json.loads(json.dumps(fit(whole, limit, newest=("spans",))))
    assert limit / 3 < size(said) <= limit
    report = RankReport.from_values(said["report"])
    original = RankReport.from_values(whole["report"])
    assert (report.rank, report.samples, report.mixing) == (3, 10**9, original.mixing)
    if report.stretches:
        assert report.stretches[0] == original.stretches[0] and report.stretches[-1] == original.stretches[-1]
    if report.spans:
        assert report.spans == original.spans[-len(report.spans) :]
    if said["curve"]:
        assert said["curve"][0] == [0, 1.0] and said["curve"][-1][0] == long["updates"] - 1


def test_all_messages_together_fit_the_one_who_receives_them() -> None:
    assert share_bytes(4) + 1024 < FRAME_BYTES  # with its key, its scope and its numbers
    for workers in (64, 512, 4096):
        assert workers * share_bytes(workers) <= RECEIVED_BYTES


def test_what_fits_is_left_alone() -> None:
    values = {"curve": [(1, 0.5)] * 100, "text": "x"}
    assert fit(values, size(values)) is values


def test_short_lists_and_rows_stay_whole() -> None:
    values = {"curve": [[n, n / 7] for n in range(1000)], "lost": list(range(SHORT))}
    said = fit(values, 700)
    assert said["lost"] == values["lost"] and all(len(row) == 2 for row in said["curve"])
    assert SHORT <= len(said["curve"]) < 100


def test_what_cannot_be_thinned_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"1002 bytes without a list of more than 16 entries; 100 are taken"):
        fit("x" * 1000, 100)


@pytest.mark.parametrize("length", [2, 3, 10, 99, 100])
def test_entries_are_chosen_evenly(length: int) -> None:
    chosen = thinned(list(range(100)), length)
    assert len(chosen) == length and (chosen[0], chosen[-1]) == (0, 99)
    steps = {after - before for before, after in pairwise(chosen)}
    assert max(steps) - min(steps) <= 1
