"""Spans of time: what each stage did and when; how busy it was; a file that Chrome and Perfetto open.

    stage 1  |  wait  | F0 | F1 | wait | B0 | U0 |     busy = F + B + U over the whole; bubble = 1 - busy
             first start                         last end

Seconds throughout, of any clock: `perf_counter` of a process, or the simulator's. An action is anything whose
text starts with the letters of its kind, as in `F3` or `SA0`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

COMPUTE = frozenset({"F", "B", "U"})


class Span(NamedTuple):
    """One action of one stage of one pipeline, from `start` to `end` seconds."""

    pipeline: int
    stage: int
    action: Any
    start: float
    end: float


class Recorder:
    """Keeps the spans of the last `steps` steps of one rank; `record` costs well under a microsecond.

    >>> recorder = Recorder(pipeline=0, stage=1, steps=2)
    >>> recorder.record("F0", 0.0, 1.5)
    >>> recorder.end_step()
    >>> recorder.spans()
    [Span(pipeline=0, stage=1, action='F0', start=0.0, end=1.5)]
    """

    def __init__(self, *, pipeline: int, stage: int, steps: int) -> None:
        self._rank = (pipeline, stage)
        self._done: deque[list[tuple[Any, float, float]]] = deque(maxlen=steps)
        self._current: list[tuple[Any, float, float]] = []

    def record(self, action: Any, start: float, end: float) -> None:
        """Add one action of the step that is under way."""
        self._current.append((action, start, end))

    def end_step(self) -> None:
        """Close the step that is under way; the oldest step falls out when the ring is full."""
        if self._current:
            self._done.append(self._current)
            self._current = []

    def spans(self) -> list[Span]:
        """The spans of the steps kept, oldest first; of the unfinished step if no step was closed yet."""
        steps: Iterable[list[tuple[Any, float, float]]] = self._done or (self._current,)
        return [Span(*self._rank, *timed) for timed in chain.from_iterable(steps)]


def kind(action: Any) -> str:
    """The letters of an action: "SA" of `SA3`."""
    return str(action).rstrip("0123456789")


def number(action: Any) -> str:
    """The digits of an action, its micro-batch: "3" of `SA3`."""
    text = str(action)
    return text[len(kind(text)) :]


def busy_fraction(spans: Sequence[Span]) -> float:
    """The share of time spent computing (F, B, U), from the first start to the last end of all `spans`.

    Spans of several ranks share one window, and the mean over the ranks is returned; no spans give 0.
    """
    if not spans:
        return 0.0
    window_s = max(span.end for span in spans) - min(span.start for span in spans)
    ranks = len({span[:2] for span in spans})
    busy_s = sum(span.end - span.start for span in spans if kind(span.action) in COMPUTE)
    return busy_s / (window_s * ranks) if window_s > 0 else 0.0


def bubble_fraction(spans: Sequence[Span]) -> float:
    """The share of time not spent computing: 1 - `busy_fraction`; no spans give 0."""
    return 1.0 - busy_fraction(spans) if spans else 0.0


def shift(spans: Iterable[Span], by_s: float) -> list[Span]:
    """The spans on another clock: `by_s` seconds are added to each start and end."""
    return [span._replace(start=span.start + by_s, end=span.end + by_s) for span in spans]


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans as Chrome's trace events: a process per pipeline, a thread per stage, microseconds."""
    first = min((span.start for span in spans), default=0.0)
    ranks = sorted({span[:2] for span in spans})
    names = [_name("process_name", pipeline, 0, f"pipeline {pipeline}") for pipeline in sorted({p for p, _ in ranks})]
    names += [_name("thread_name", pipeline, stage, f"stage {stage}") for pipeline, stage in ranks]
    return {"traceEvents": names + [_event(span, first) for span in spans], "displayTimeUnit": "ms"}


def write_chrome_trace(path: str | Path, spans: Sequence[Span]) -> None:
    """Write `chrome_trace(spans)` to a file, for chrome://tracing or ui.perfetto.dev."""
    Path(path).write_text(json.dumps(chrome_trace(spans)), encoding="utf-8")


def spans_to_values(spans: Iterable[Span]) -> list[list[Any]]:
    """The spans as JSON-able rows; actions become text."""
    return [[span.pipeline, span.stage, str(span.action), span.start, span.end] for span in spans]


def spans_from_values(rows: Iterable[Sequence[Any]]) -> list[Span]:
    """The inverse of `spans_to_values`; actions stay text."""
    return [Span(*row) for row in rows]


def _name(what: str, pipeline: int, stage: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pipeline, "tid": stage, "args": {"name": name}}


def _event(span: Span, first: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": str(span.action),
        "cat": kind(span.action),
        "pid": span.pipeline,
        "tid": span.stage,
        "ts": (span.start - first) * 1e6,
        "dur": (span.end - span.start) * 1e6,
    }
