"""The summary in numbers and text, and pictures with something in them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.trace import Span
from pipeline.errors import UserError
from pipeline.report.pictures import draw_losses, draw_timeline, smooth
from pipeline.report.summary import (
    RankReport,
    human_bytes,
    mixing_text,
    peak_memory_bytes,
    summary_text,
    totals,
    write_reports,
)


def spans_of(pipeline: int, stage: int, picture: str, *, start: float) -> tuple[Span, ...]:
    """The spans of `F0:2 RA1:3`, in milliseconds."""
    spans = []
    for word in picture.split():
        action, length = word.split(":")
        spans.append(Span(pipeline, stage, action, start, start + float(length) / 1e3))
        start += float(length) / 1e3
    return tuple(spans)


def reports() -> list[RankReport]:
    """Two pipelines of two stages under 1f1b with two micro-batches, in the wrong order; pipeline 1 is half as fast."""
    pictures = {
        0: "L0:1 F0:10 SA0:.5 L1:1 F1:10 SA1:.5 RG0:8 B0:20 RG1:3 B1:20 R1:4 U1:3",
        1: "RA0:12 L0:1 F0:10 B0:20 SG0:1 RA1:.5 L1:.5 F1:10 B1:20 SG1:1 R1:4 U1:3",
    }
    made = []
    for pipeline in (1, 0):
        for stage in (1, 0):
            spans = tuple(
                span
                for step in range(2)
                for span in spans_of(pipeline, stage, pictures[stage], start=1e9 + 0.083 * step + pipeline * 0.002)
            )
            made.append(
                RankReport(
                    rank=2 * pipeline + stage,
                    host=f"w{pipeline}",
                    device=f"cpu{stage}",
                    pipeline=pipeline,
                    stage=stage,
                    samples=1000,
                    seconds=10.0 * (1 + pipeline),
                    versions=2 - stage,
                    peak_bytes=1_500_000_000,
                    bytes_sent=20_000_000,
                    spans=spans,
                )
            )
    return made


def test_a_report_travels_as_json() -> None:
    for report in reports():
        assert RankReport.from_values(json.loads(json.dumps(report.to_values()))) == report


def test_the_job_is_as_fast_as_its_pipelines_together_not_its_stages() -> None:
    whole = totals(reports())
    assert whole["samples_per_s"] == 100.0 + 50.0
    assert whole["seconds"] == 20.0 and whole["bytes_sent"] == 80_000_000 and whole["peak_bytes"] == 6e9
    assert whole["busy"] + whole["bubble"] == pytest.approx(1.0)


def test_the_table_has_a_row_per_stage_in_order_and_the_whole_below() -> None:
    text = summary_text(reports())
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in text.splitlines()]
    assert [line[:3] for line in lines if line and line[0] in "01"] == [
        ["0", "0", "w0:cpu0"],
        ["0", "1", "w0:cpu1"],
        ["1", "0", "w1:cpu0"],
        ["1", "1", "w1:cpu1"],
    ]
    row = next(line for line in lines if line[:3] == ["0", "0", "w0:cpu0"])
    assert row[3:] == ["100.0", "76.8%", "23.2%", "2", "1.5", "GB", "20", "MB"]
    whole = next(line for line in lines if line and line[0] == "all")
    assert whole[1:6] == ["4", "workers,", "20.0", "s", "150.0"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (2.5e13, "25 TB"), (999_999, "1 MB")],
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_smoothing_keeps_a_constant_averages_neighbours_and_survives_a_nan() -> None:
    assert smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert smooth([1, 2, 3, 4], window=3) == [1.5, 2, 3, 3.5]
    assert smooth([1, float("nan"), 3, 4], window=3) == [1, 2, 3.5, 3.5]
    assert smooth([]) == []


def test_peak_memory_of_this_process_is_plausible() -> None:
    assert 10e6 < peak_memory_bytes("cpu") < 1e12


def test_everything_is_written_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    curve = [(update, 4 / (1 + update)) for update in range(50)]
    paths = write_reports(tmp_path / "out", reports(), curve=curve, validations=[(49, 0.2)], say=said.append)
    names = ["summary.txt", "summary.json", "trace.json", "timeline.png", "loss.png"]
    assert [path.name for path in paths] == names and all(path.stat().st_size > 0 for path in paths)
    assert (tmp_path / "out" / "summary.txt").read_text().rstrip("\n") == said[0]
    values = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert values["totals"]["samples_per_s"] == 150.0 and len(values["ranks"]) == 4
    assert len(json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]) > 4 * 24


def test_a_run_without_steps_has_a_summary_and_no_pictures(tmp_path: Path) -> None:
    idle = RankReport(
        rank=0,
        host="h",
        device="cpu0",
        pipeline=0,
        stage=0,
        samples=0,
        seconds=0.0,
        versions=1,
        peak_bytes=0,
        bytes_sent=0,
    )
    paths = write_reports(tmp_path, [idle], curve=[], validations=[], say=lambda text: None)
    assert [path.name for path in paths] == ["summary.txt", "summary.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: cannot be written \(Not a directory\)"):
        write_reports(tmp_path / "file" / "out", reports(), curve=[], validations=[], say=lambda text: None)


def test_files_are_written_before_the_table_is_said(tmp_path: Path) -> None:
    def closed(line: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError):
        write_reports(tmp_path, reports(), curve=[], validations=[], say=closed)
    assert (tmp_path / "summary.txt").stat().st_size > 0 and (tmp_path / "summary.json").stat().st_size > 0


def test_one_file_that_cannot_be_written_keeps_nobody_from_the_table_and_the_others(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    said: list[str] = []
    with pytest.raises(UserError, match=r"--out .*: cannot be written \(Is a directory\)"):
        write_reports(tmp_path, reports(), curve=[(1, 2.0)], validations=[], say=said.append)
    assert "4 workers" in said[0] and (tmp_path / "loss.png").exists() and (tmp_path / "summary.txt").exists()


def test_a_summary_of_losses_that_are_not_numbers_is_json(tmp_path: Path) -> None:
    mixing = {"groups_of_2": 1, "waited_s": 0.0, "lost": [], "distance": float("nan")}
    broken = [dataclasses.replace(report, mixing=mixing) for report in reports()]
    curve = [(1.0, 2.0), (2.0, float("nan")), (3.0, float("inf"))]
    write_reports(tmp_path, broken, curve=curve, validations=[(3.0, float("nan"))], say=lambda text: None)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    values = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert values["curve"] == [[1.0, 2.0], [2.0, None], [3.0, None]] and values["validations"] == [[3.0, None]]


def colours(path: Path) -> set[tuple[int, int, int]]:
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return set(map(tuple, pixels.tolist()))


def test_the_timeline_shows_forward_backward_update_and_waiting(tmp_path: Path) -> None:
    spans = [span for report in reports() for span in report.spans]
    draw_timeline(tmp_path / "t.png", spans)
    shown = colours(tmp_path / "t.png")
    for colour in ("4c78a8", "54a24b", "e45756", "b279a2", "d8d8d8"):
        assert tuple(bytes.fromhex(colour)) in shown, colour
    draw_timeline(tmp_path / "f.png", [span for span in spans if str(span.action).startswith("F")])
    assert tuple(bytes.fromhex("54a24b")) not in colours(tmp_path / "f.png")


def test_losses_are_drawn_with_and_without_a_validation(tmp_path: Path) -> None:
    draw_losses(tmp_path / "a.png", [(0, 2.0), (1, 1.0)], [])
    draw_losses(tmp_path / "b.png", [(0, 2.0), (1, float("nan"))], [(1, 1.5)])
    orange = tuple(bytes.fromhex("f58518"))
    assert orange not in colours(tmp_path / "a.png") and orange in colours(tmp_path / "b.png")


def test_a_report_is_made_without_importing_what_draws_it() -> None:
    code = "import sys, pipeline.report.summary; print({'torch', 'matplotlib', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_summary_says_how_replicas_were_kept_together() -> None:
    mixing = {"groups_of_1": 1, "groups_of_4": 9, "waited_s": 0.5, "lost": [2]}
    mixed = [dataclasses.replace(report, mixing=mixing, seconds=10.0) for report in reports()]
    assert mixing_text(mixed) == (
        "groups of 3.70 on average (10.0% of 1, 90.0% of 4); 5.0% of the time spent waiting for them; "
        "lost meanwhile: pipeline 2"
    )
    assert mixing_text(reports()) == ""
