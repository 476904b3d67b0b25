"""The pictures of a run: the timeline of the last steps, the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.core.trace import Span, kind, number

Curve = Sequence[tuple[float, float]]  # (update, loss)

# what a box of the timeline shows: label, colour, the kinds of actions
BOXES: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("forward", "#4c78a8", frozenset({"F"})),
    ("backward", "#54a24b", frozenset({"B"})),
    ("update", "#e45756", frozenset({"U"})),
    ("reduce over replicas", "#b279a2", frozenset({"R", "N"})),
    ("mix with replicas", "#9d755d", frozenset({"X"})),
    ("wait for a group", "#ff9da6", frozenset({"W"})),
    ("load data", "#f2cf5b", frozenset({"L"})),
)
OTHER = ("wait, send, receive", "#d8d8d8")
_DPI = 110


def draw_timeline(path: str | Path, spans: Sequence[Span]) -> None:
    """A Gantt chart as a PNG: a row per stage of each pipeline, a box per action, its micro-batch in it if it fits."""
    ranks = sorted({span[:2] for span in spans})
    first = min(span.start for span in spans)
    length_ms = (max(span.end for span in spans) - first) * 1e3 or 1.0
    figure, axes = _figure(width=14, height=1.6 + 0.5 * len(ranks))
    ms_per_pixel = length_ms / (14 * _DPI * 0.88)
    for label, colour, boxes in _boxes(spans):
        for row, rank in enumerate(ranks):
            bars = [(1e3 * (s.start - first), 1e3 * (s.end - s.start)) for s in boxes if s[:2] == rank]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
        axes.broken_barh([], (0, 0), facecolors=colour, label=label)
        if label != OTHER[0]:
            _number_boxes(axes, boxes, ranks, first, ms_per_pixel)
    axes.set_yticks(range(len(ranks)), [f"pipeline {pipeline}\nstage {stage}" for pipeline, stage in ranks])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, length_ms)
    axes.set_xlabel("ms")
    axes.set_title("Timeline of the last steps", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, frameon=False, borderaxespad=0.3)
    figure.savefig(path)


def draw_losses(path: str | Path, curve: Curve, validations: Curve) -> None:
    """The training loss of every batch, its moving average, and the validations, as a PNG.

    Validations far above the training loss (early ones, while BatchNorm's statistics lag behind) are drawn at the upper
    edge with their value beside them, so that the rest stays readable.
    """
    figure, axes = _figure(width=8, height=4.5)
    updates = [update for update, _ in curve]
    axes.plot(updates, [loss for _, loss in curve], color="#4c78a8", alpha=0.3, linewidth=0.8, label="batch")
    axes.plot(updates, smooth([loss for _, loss in curve]), color="#4c78a8", linewidth=1.8, label="smoothed")
    edge = _upper_edge(curve)
    if validations:
        shown = [(update, min(loss, edge)) for update, loss in validations]
        axes.plot(*zip(*shown, strict=True), "o-", color="#f58518", markersize=5, linewidth=1, label="validation")
    for update, loss in validations:
        if loss > edge:
            axes.annotate(f"{loss:.3g}", (update, edge), textcoords="offset points", xytext=(6, 5), color="#f58518")
    axes.set_xlabel("update")
    axes.set_ylabel("loss")
    axes.set_title("Loss", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def _upper_edge(curve: Curve) -> float:
    """Half as much again as the highest training loss; no edge where there is none."""
    return 1.5 * max((loss for _, loss in curve if math.isfinite(loss)), default=math.inf)


def smooth(values: Sequence[float], *, window: int | None = None) -> list[float]:
    """The mean of each value and its neighbours, `window` in all (by default a thirtieth of the values).

    NaN and infinity are left out; where only they are, the mean is NaN.
    """
    half = (window or max(1, len(values) // 30)) // 2
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(value if good else 0.0 for value, good in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for middle in range(len(values)):
        start, end = max(0, middle - half), min(len(values), middle + half + 1)
        count = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / count if count else math.nan)
    return means


def _boxes(spans: Sequence[Span]) -> list[tuple[str, str, list[Span]]]:
    """(label, colour, spans) of each kind of box that occurs; the grey ones first, so that they lie below."""
    known = frozenset().union(*(kinds for *_, kinds in BOXES))
    other = [span for span in spans if kind(span.action) not in known]
    named = [(label, colour, [s for s in spans if kind(s.action) in kinds]) for label, colour, kinds in BOXES]
    return [boxes for boxes in ((*OTHER, other), *named) if boxes[2]]


def _number_boxes(
    axes: Any, boxes: Sequence[Span], ranks: Sequence[tuple[int, int]], first: float, ms_per_pixel: float
) -> None:
    for span in boxes:
        text, width_ms = number(span.action), 1e3 * (span.end - span.start)
        if text and width_ms > ms_per_pixel * (6 * len(text) + 3):
            middle_ms = 1e3 * ((span.start + span.end) / 2 - first)
            style = {"ha": "center", "va": "center", "color": "white", "fontsize": 7, "clip_on": True}
            axes.text(middle_ms, ranks.index((span.pipeline, span.stage)), text, **style)


def _figure(*, width: float, height: float) -> tuple[Any, Any]:
    """A figure that draws into memory, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
