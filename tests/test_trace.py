"""Spans: how busy a stage was, the ring of the last steps, and a file that Chrome reads."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import pytest

from pipeline.core.trace import (
    Recorder,
    Span,
    bubble_fraction,
    busy_fraction,
    chrome_trace,
    kind,
    number,
    shift,
    spans_from_values,
    spans_to_values,
    write_chrome_trace,
)


def spans_of(picture: str, *, stage: int = 0, start: float = 0.0) -> list[Span]:
    """The spans of `F0:2 RA1:3` (two seconds of F0, then three of RA1)."""
    spans = []
    for word in picture.split():
        action, seconds = word.split(":")
        spans.append(Span(0, stage, action, start, start + float(seconds)))
        start += float(seconds)
    return spans


def test_an_action_has_letters_and_a_number() -> None:
    assert (kind("SA12"), number("SA12"), kind("R"), number("R")) == ("SA", "12", "R", "")


def test_waiting_and_sending_are_bubble_and_computing_is_busy() -> None:
    spans = spans_of("RA0:1 F0:2 SA0:1 RG0:3 B0:4 R0:1 U0:1 RA1:1")
    assert busy_fraction(spans) == pytest.approx(7 / 14)
    assert bubble_fraction(spans) == pytest.approx(7 / 14)


def test_gaps_between_spans_are_bubble() -> None:
    assert bubble_fraction([*spans_of("F0:1"), *spans_of("B0:1", start=3.0)]) == pytest.approx(0.5)


def test_ranks_share_one_window() -> None:
    spans = spans_of("F0:1 F1:1 B0:1 B1:1") + spans_of("F0:1 B0:1", stage=1, start=1.0)
    assert busy_fraction(spans) == pytest.approx((1.0 + 0.5) / 2)


def test_no_spans_and_no_time_divide_nothing() -> None:
    assert (busy_fraction([]), bubble_fraction([])) == (0.0, 0.0)
    assert busy_fraction(spans_of("F0:0")) == 0.0


def test_a_ring_of_two_steps_forgets_the_third_last() -> None:
    recorder = Recorder(pipeline=1, stage=2, steps=2)
    recorder.record("F9", 8.0, 9.0)
    assert [span.action for span in recorder.spans()] == ["F9"]
    for step in range(3):
        recorder.record(f"F{step}", step, step + 0.5)
        recorder.record(f"B{step}", step + 0.5, step + 1)
        recorder.end_step()
        recorder.end_step()
    recorder.record("F3", 3.0, 4.0)
    assert [span.action for span in recorder.spans()] == ["F1", "B1", "F2", "B2"]
    assert recorder.spans()[0] == Span(1, 2, "F1", 1, 1.5)


def test_recording_a_span_costs_less_than_a_microsecond() -> None:
    recorder = Recorder(pipeline=0, stage=0, steps=2)

    def cost_s(times: int = 20_000) -> float:
        start = perf_counter()
        for _ in range(times):
            recorder.record("F0", 0.0, 1.0)
        seconds = perf_counter() - start
        recorder.end_step()
        return seconds / times

    assert min(cost_s() for _ in range(5)) < 1e-6


def test_chrome_reads_the_trace(tmp_path: Path) -> None:
    spans = spans_of("F0:0.5 SA0:0.25", start=100.0) + spans_of("RA0:0.5 F0:1", stage=1, start=100.25)
    write_chrome_trace(tmp_path / "trace.json", spans)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == chrome_trace(spans)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events] == [
        ("F0", 0, 0.0, 5e5),
        ("SA0", 0, 5e5, 2.5e5),
        ("RA0", 1, 2.5e5, 5e5),
        ("F0", 1, 7.5e5, 1e6),
    ]
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {"pipeline 0", "stage 0", "stage 1"}


def test_spans_travel_as_json_and_move_between_clocks() -> None:
    spans = spans_of("F0:1 B0:2")
    assert spans_from_values(json.loads(json.dumps(spans_to_values(spans)))) == spans
    assert [(span.start, span.end) for span in shift(spans, 10)] == [(10, 11), (11, 13)]
