"""What is left when a run is over: a table per stage, the timeline of the last steps, the loss curve.

Every rank makes a `RankReport`; they are gathered as JSON, and one rank draws:

    reports = [RankReport.from_values(values) for values in gathered]
    write_reports("out", reports, curve=log.curve, validations=log.validations, say=print)
"""

from __future__ import annotations

import dataclasses
import io
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.plain import to_json
from pipeline.core.trace import (
    Span,
    bubble_fraction,
    busy_fraction,
    spans_from_values,
    spans_to_values,
    write_chrome_trace,
)
from pipeline.errors import UserError
from pipeline.report.pictures import Curve, draw_losses, draw_timeline

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank did.

    `samples` were trained in `seconds`; `versions` is the most weight versions held at one time. `stretches` are the
    (begin, end) of training between stops, the agreeing of replicas at their end included; `spans` are those of the
    last steps. Both are on a clock that all ranks share (`trace.shift` moves spans to the time of day).
    """

    rank: int
    host: str
    device: str
    pipeline: int
    stage: int
    samples: int
    seconds: float
    versions: int
    peak_bytes: int
    bytes_sent: int
    mixing: Mapping[str, Any] | None = None  # what was mixed with replicas: groups (size -> times), waited_s, ...
    busy_s: float | None = None  # of `seconds`, spent computing; None: judged by the spans of the last steps
    stretches: tuple[tuple[float, float], ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def busy(self) -> float:
        """The share of time spent in forwards, backwards and updates."""
        if self.busy_s is None:
            return busy_fraction(self.spans)
        return min(1.0, self.busy_s / self.seconds) if self.seconds > 0 else 0.0

    @property
    def bubble(self) -> float:
        """The share of time spent waiting, sending and receiving."""
        return 1.0 - self.busy if self.busy_s is not None else bubble_fraction(self.spans)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    def to_values(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "spans": spans_to_values(self.spans)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RankReport:
        """The inverse of `to_values`; actions of spans become text."""
        stretches = tuple((begin, end) for begin, end in values.get("stretches", ()))
        return cls(**{**values, "stretches": stretches, "spans": tuple(spans_from_values(values["spans"]))})


def peak_memory_bytes(device: str) -> int:
    """The most memory this process has used: of the GPU it allocates on, else its resident set."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def totals(reports: Sequence[RankReport]) -> dict[str, float]:
    """The whole job in numbers: every stage of a pipeline sees the same samples, so one of them is counted."""
    speeds: dict[int, float] = {}
    for report in reports:
        speeds[report.pipeline] = max(speeds.get(report.pipeline, 0.0), report.samples_per_s)
    count = max(1, len(reports))
    return {
        "samples_per_s": sum(speeds.values()),
        "seconds": max((report.seconds for report in reports), default=0.0),
        "busy": sum(report.busy for report in reports) / count,
        "bubble": sum(report.bubble for report in reports) / count,
        "peak_bytes": sum(report.peak_bytes for report in reports),
        "bytes_sent": sum(report.bytes_sent for report in reports),
    }


def human_bytes(count: float) -> str:
    """Bytes in the unit that suits them: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def summary_table(reports: Sequence[RankReport]) -> Table:
    """A row per stage of each pipeline, and one for the whole job."""
    from rich.table import Table

    table = Table(title="Summary", title_justify="left", show_footer=True)
    for column, total in zip(_COLUMNS, _total_cells(reports), strict=True):
        table.add_column(column, footer=total, justify="left" if column == "device" else "right")
    for report in _ordered(reports):
        table.add_row(*_cells(report))
    return table


def mixing_text(reports: Sequence[RankReport]) -> str:
    """How the replicas were kept together, in a sentence; "" where they shared gradients or nothing."""
    mixed = [report.mixing for report in reports if report.mixing is not None]
    sizes: dict[int, int] = {}
    for mixing in mixed:
        for name, times in mixing.items():
            if name.startswith("groups_of_"):
                size = int(name.removeprefix("groups_of_"))
                sizes[size] = sizes.get(size, 0) + times
    if not sizes:
        return ""
    count = sum(sizes.values())
    shares = ", ".join(f"{times / count:.1%} of {size}" for size, times in sorted(sizes.items()))
    mean = sum(size * times for size, times in sizes.items()) / count
    waited = sum(mixing["waited_s"] for mixing in mixed) / max(1e-9, sum(report.seconds for report in reports))
    lost = sorted({pipeline for mixing in mixed for pipeline in mixing["lost"]})
    parts = [f"groups of {mean:.2f} on average ({shares})", f"{waited:.1%} of the time spent waiting for them"]
    if lost:
        parts.append(f"lost meanwhile: pipeline {', '.join(map(str, lost))}")
    return "; ".join(parts)


def summary_text(reports: Sequence[RankReport]) -> str:
    """The table without colours, for a file or a log."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=120, color_system=None, force_terminal=False).print(summary_table(reports))
    return text.getvalue()


def write_reports(
    out: str | Path,
    reports: Sequence[RankReport],
    *,
    curve: Curve,
    validations: Curve,
    say: Callable[[str], None],
) -> list[Path]:
    """Write summary.txt, summary.json, trace.json, timeline.png and loss.png into `out`, then say the table.

    A picture of nothing (no spans, no losses) is not drawn. One file that cannot be written keeps nobody from the
    others, or from the table.

    Raises:
        UserError: the folder cannot be written.
    """
    out = Path(out)
    text = summary_text(reports)
    if mixed := mixing_text(reports):
        text += mixed + "\n"
    written, failed = _write_files(out, _files(reports, text, curve, validations))
    say(text.rstrip("\n"))
    if written:
        say("written: " + ", ".join(map(str, written)))
    if failed is not None:
        raise UserError(f"--out {out}: cannot be written ({failed.strerror or failed})")
    return written


def _files(
    reports: Sequence[RankReport], text: str, curve: Curve, validations: Curve
) -> dict[str, Callable[[Path], Any]]:
    """What is to be written: the name of a file, and what writes it to a path."""
    spans = [span for report in _ordered(reports) for span in report.spans]
    values = {
        "totals": totals(reports),
        "ranks": [_without_spans(report) for report in _ordered(reports)],
        "curve": list(curve),
        "validations": list(validations),
    }
    writers: dict[str, Callable[[Path], Any]] = {
        "summary.txt": lambda path: path.write_text(text, encoding="utf-8"),
        "summary.json": lambda path: path.write_text(to_json(values, indent=1), encoding="utf-8"),
    }
    if spans:
        writers["trace.json"] = lambda path: write_chrome_trace(path, spans)
        writers["timeline.png"] = lambda path: draw_timeline(path, spans)
    if curve or validations:
        writers["loss.png"] = lambda path: draw_losses(path, curve, validations)
    return writers


def _write_files(out: Path, writers: Mapping[str, Callable[[Path], Any]]) -> tuple[list[Path], OSError | None]:
    """The files that were written, and why the first other one was not."""
    written: list[Path] = []
    failed: OSError | None = None
    for name, write in writers.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            write(out / name)
            written.append(out / name)
        except OSError as error:
            failed = failed or error
    return written, failed


_COLUMNS = (
    "pipeline",
    "stage",
    "device",
    "samples/s",
    "busy",
    "bubble",
    "weight versions",
    "peak memory",
    "sent",
)


def _cells(report: RankReport) -> list[str]:
    return [
        str(report.pipeline),
        str(report.stage),
        f"{report.host}:{report.device}",
        f"{report.samples_per_s:.1f}",
        f"{report.busy:.1%}",
        f"{report.bubble:.1%}",
        str(report.versions),
        human_bytes(report.peak_bytes),
        human_bytes(report.bytes_sent),
    ]


def _total_cells(reports: Sequence[RankReport]) -> list[str]:
    whole = totals(reports)
    return [
        "all",
        "",
        f"{len(reports)} workers, {whole['seconds']:.1f} s",
        f"{whole['samples_per_s']:.1f}",
        f"{whole['busy']:.1%}",
        f"{whole['bubble']:.1%}",
        "",
        human_bytes(whole["peak_bytes"]),
        human_bytes(whole["bytes_sent"]),
    ]


def _without_spans(report: RankReport) -> dict[str, Any]:
    values = report.to_values()
    del values["spans"]
    fractions = {"busy": report.busy, "bubble": report.bubble}
    return {**values, "samples_per_s": report.samples_per_s, **fractions}


def _ordered(reports: Iterable[RankReport]) -> list[RankReport]:
    return sorted(reports, key=lambda report: (report.pipeline, report.stage))
