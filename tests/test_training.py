"""The training loop: same seed, same curve; a resumed run is the uninterrupted one; what is printed and written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import Points, losses, run_here, tiny_settings

from pipeline.data.epochs import Calendar
from pipeline.errors import UserError
from pipeline.models.layered import build_whole, load_full_state
from pipeline.models.mlp import mlp
from pipeline.train import checkpoint


def state(directory: Path, step: int) -> dict[str, torch.Tensor]:
    folder = directory / f"step-{step:08d}"
    tensors = {name: torch.zeros(shape) for name, shape in checkpoint.read_shapes(folder).items()}
    checkpoint.load(folder, tensors)
    return tensors


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream", "dp"])
def test_the_same_seed_gives_the_same_curve_twice(tmp_path: Path, schedule: str) -> None:
    for name in ("a", "b"):
        microbatches = 2 if schedule in ("gpipe", "1f1b") else None
        run_here(tmp_path / name, pipeline=schedule, microbatches=microbatches, task={"dropout": 0.2})
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    run_here(tmp_path / "c", seed=1, task={"dropout": 0.2})
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [3, 6, 7])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int, optimizer: str) -> None:
    task: dict[str, Any] = {"batchnorm": True, "dropout": 0.2}
    options: dict[str, Any] = {"checkpoint_every": 1, "keep": 99, "optimizer": optimizer, "task": task}
    run_here(tmp_path / "whole", checkpoint=str(tmp_path / "one"), **options)
    run_here(tmp_path / "begun", checkpoint=str(tmp_path / "two"), max_steps=stop, **options)
    run_here(tmp_path / "resumed", checkpoint=str(tmp_path / "two"), resume="", **options)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    one, two = state(tmp_path / "one", 12), state(tmp_path / "two", 12)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_prints_the_line_of_the_whole_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 1}
    run_here(tmp_path / "whole")
    whole = re.findall(r"1 TRAIN loss \S+ acc \S+", capsys.readouterr().out)
    run_here(tmp_path / "begun", max_steps=8, **options)
    capsys.readouterr()
    run_here(tmp_path / "resumed", resume="", **options)
    text = capsys.readouterr().out
    assert "after 8 updates" in text
    assert re.findall(r"1 TRAIN loss \S+ acc \S+", text) == whole


def test_a_resume_with_another_number_of_threads_says_that_it_rounds_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "kept"), "checkpoint_every": 1}
    run_here(tmp_path / "begun", max_steps=2, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run_here(tmp_path / "resumed", max_steps=3, resume="", **options)
    finally:
        torch.set_num_threads(before)
    line = f"written with {before} thread(s) a process, this run has {before + 1}"
    assert line in capsys.readouterr().out
    run_here(tmp_path / "again", max_steps=2, **options | {"checkpoint": str(tmp_path / "other")})
    run_here(tmp_path / "same", max_steps=3, resume="", **options | {"checkpoint": str(tmp_path / "other")})
    assert "thread(s)" not in capsys.readouterr().out


def test_the_reference_lines_are_printed_to_the_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "Training 2 epoch, each epoch runs 6 iteration" in lines
    number = r"\d+\.\d{4}"
    assert any(
        re.fullmatch(rf"1 TRAIN loss {number} acc {number} lr \d\.\d\de[-+]\d\d, time {number}", line) for line in lines
    )
    assert any(re.fullmatch(rf"1 EVAL  loss {number} acc {number}", line) for line in lines)
    assert any(
        re.fullmatch(r"Epoch\[1\] Batch \[4\]\tSpeed: \d+\.\d\d samples/sec\taccuracy=\d\.\d{6}", line)
        for line in lines
    )


def test_metrics_are_json_lines_with_one_event_each(tmp_path: Path) -> None:
    run_here(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [row["event"] for row in rows]
    assert events.count("train") == 2 and events.count("validation") == 2 and events.count("window") == 6
    validation = next(row for row in rows if row["event"] == "validation")
    assert validation["samples"] == 21  # every sample once, though 21 is not a multiple of the batch
    assert {"samples_per_s", "step_s", "bubble", "memory_bytes"} <= next(
        r for r in rows if r["event"] == "window"
    ).keys()


def test_the_last_checkpoints_are_kept_and_the_pictures_drawn(tmp_path: Path) -> None:
    run_here(tmp_path, checkpoint=str(tmp_path / "kept"), checkpoint_every=1, keep=2)
    assert sorted(path.name for path in (tmp_path / "kept").glob("step-*")) == ["step-00000011", "step-00000012"]
    for name in ("timeline.png", "loss.png", "summary.txt", "trace.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_max_steps_counts_updates_and_validates_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path, max_steps=2, accumulate=2)
    assert len(losses(tmp_path)) == 2
    assert "0 EVAL" in capsys.readouterr().out


def test_the_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    run_here(tmp_path, checkpoint=str(tmp_path / "kept"), export=str(target))
    exported, trained = load_file(target), state(tmp_path / "kept", 12)
    model = mlp(inputs=12, width=16, depth=8, num_classes=5, activation="tanh")
    assert exported.keys() == {name.removeprefix("model.") for name in trained if name.startswith("model.")}
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in exported.items())
    assert len(list(build_whole(model, 0).parameters())) == len(exported)
    assert not Path(f"{target}.parts").exists()


def test_validation_is_what_the_exported_model_gives_in_evaluation_mode(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    run_here(tmp_path, export=str(target), task={"batchnorm": True, "dropout": 0.3})
    model = mlp(inputs=12, width=16, depth=8, num_classes=5, activation="tanh", batchnorm=True, dropout=0.3)
    chain = build_whole(model, 0).eval()
    load_full_state(model, list(chain.links), load_file(target))
    points = Points.make(21, 2)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(chain(points.inputs.rows), points.targets.rows)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    said = [row["loss"] for row in rows if row["event"] == "validation"][-1]
    assert said == pytest.approx(float(loss), rel=1e-5)


def test_training_learns(tmp_path: Path) -> None:
    run_here(tmp_path, epochs=30, pipeline="pipedream", microbatches=None)
    curve = losses(tmp_path)
    assert sum(curve[-6:]) / 6 < 0.7 * sum(curve[:6]) / 6


def test_resuming_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    run_here(tmp_path, checkpoint=kept, max_steps=2)
    with pytest.raises(UserError, match=r"written with --batch-size 8, this run has 4"):
        run_here(tmp_path, resume=kept, batch_size=4)
    with pytest.raises(UserError, match="over 44 training samples, this run has 45"):
        run_here(tmp_path, resume=kept, task={"train_size": 45})
    with pytest.raises(UserError, match="nowhere"):
        run_here(tmp_path, resume=str(tmp_path / "nowhere"))
    shutil.rmtree(kept)


def test_settings_of_a_short_run_are_valid(tmp_path: Path) -> None:
    assert tiny_settings(tmp_path).num_microbatches == 2


def test_the_calendar_stops_for_validation_and_checkpoints_only() -> None:
    every = Calendar(batches_per_epoch=5, epochs=2, accumulate=2, checkpoint_every=2)
    assert every.updates_per_epoch == 3 and every.total_updates == 6 and every.total_batches == 10
    assert [every.batch_after(n) for n in range(7)] == [0, 2, 4, 5, 7, 9, 10]
    assert [every.updates_after(every.batch_after(n)) for n in range(7)] == list(range(7))
    assert [every.next_stop(n) for n in (0, 4, 5, 7)] == [4, 5, 7, 10]
    free = Calendar(batches_per_epoch=5, epochs=4, validate_every=0)
    assert free.next_stop(0) == 20
    rare = Calendar(batches_per_epoch=5, epochs=4, validate_every=3, max_updates=17)
    assert [rare.next_stop(0), rare.next_stop(15)] == [15, 17]
    assert rare.validates(17) and not rare.validates(10)


calendars = st.builds(
    Calendar,
    batches_per_epoch=st.integers(1, 12),
    epochs=st.integers(1, 5),
    accumulate=st.integers(1, 5),
    max_updates=st.none() | st.integers(1, 30),
    validate_every=st.integers(0, 3),
    checkpoint_every=st.none() | st.integers(0, 9),
)


@given(calendars, st.integers(0, 60))
def test_the_next_stop_is_the_first_update_after_which_something_is_due(calendar: Calendar, updates: int) -> None:
    begin = min(updates, calendar.total_updates)
    ends = (calendar.batch_after(update) for update in range(begin + 1, calendar.total_updates + 1))
    due = (end for end in ends if calendar.validates(end) or calendar.checkpoints(end))
    assert calendar.next_stop(calendar.batch_after(begin)) == next(due, calendar.total_batches)


def test_a_last_batch_of_one_sample_is_left_out_where_batchnorm_could_not_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, batchnorm, updates in (("with", True, 10), ("without", False, 12)):
        run_here(tmp_path / name, microbatches=2, task={"batchnorm": batchnorm, "train_size": 43})
        assert len(losses(tmp_path / name)) == updates, "43 = 5 * 8 + 3, which would be cut into 2 and 1"
        assert ("3 of 43 samples are left out" in capsys.readouterr().out) == batchnorm
    with pytest.raises(UserError, match=r"8 cannot be cut into 5 micro-batches of 2 .* --microbatches 4 or fewer"):
        run_here(tmp_path, microbatches=5, task={"batchnorm": True})
