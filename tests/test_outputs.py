"""Places of results are tried before the first step; weights that cannot be written there are put somewhere else."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, run_here, tiny_settings, tiny_task

from pipeline.cluster.world import join_world
from pipeline.errors import UserError
from pipeline.report.training_log import WhoeverSpeaks
from pipeline.train import checkpoint
from pipeline.train.outputs import Output, outputs_of, rescue_weights, try_outputs
from pipeline.train.run import _balanced as measured_cut


def test_each_rank_tries_what_it_will_write(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, checkpoint="c", export="e", profile="p")

    def names(pipeline: int, stage: int) -> set[str]:
        return {output.name for output in outputs_of(settings, pipeline=pipeline, stage=stage, stages=3)}

    assert names(0, 0) == {"checkpoint", "export", "out"}
    assert names(0, 1) == {"checkpoint", "export"}
    assert names(0, 2) == {"checkpoint", "export", "runs", "metrics"}
    assert names(1, 0) == names(1, 2) == set()


@pytest.mark.parametrize(
    ("kind", "place", "why"),
    [
        ("folder", "file/x", "Not a directory"),
        ("folder", "file", "Not a directory"),
        ("file", "file/x", "Not a directory"),
        ("file", "folder", "Is a directory"),
        ("whole file", "file/x/y", "Not a directory"),
        ("whole file", "folder", "Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_who_found_it(
    tmp_path: Path, kind: str, place: str, why: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^--out .*{place}: cannot be written \({why}\), as rank 3 on w1 found"):
        try_outputs([Output("out", tmp_path / place, kind)], rank=3, host="w1")


def test_a_trial_leaves_nothing_behind_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("kept\n")
    outputs = [
        Output("out", tmp_path / "new" / "out", "folder"),
        Output("export", tmp_path / "m.safetensors", "whole file"),
        Output("metrics", tmp_path / "m.jsonl", "file"),
        Output("metrics", Path("/dev/null"), "file"),
    ]
    try_outputs(outputs, rank=0, host="here")
    assert (tmp_path / "m.jsonl").read_text() == "kept\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m.jsonl", "new", "out"]


@pytest.mark.parametrize("name", ["checkpoint", "export", "out", "metrics", "runs"])
def test_nothing_is_trained_when_a_place_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    given: dict[str, Any] = {name: str(tmp_path / "file" / "x")}
    with pytest.raises(UserError, match=rf"^--{name} .*file/x: cannot be written \(Not a directory\)"):
        run_here(tmp_path, **given)
    assert not (tmp_path / "metrics.jsonl").exists(), "training begins with the settings in it"


def test_blocks_are_not_measured_when_their_costs_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = tiny_settings(tmp_path, profile=str(tmp_path / "file" / "x"))
    world = join_world(None, timeout_s=60, directory=ROOT)
    with pytest.raises(UserError, match=r"^--profile .*file/x: cannot be written"):
        measured_cut(settings, tiny_task(), world, (1, 1), math.inf, print)


def test_weights_that_cannot_be_exported_are_put_somewhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "m.safetensors.parts").write_text("in the way")
    with pytest.raises(UserError, match=r"--export .*the weights of stage 0 are in") as failed:
        run_here(tmp_path, export=str(tmp_path / "m.safetensors"), checkpoint=str(tmp_path / "kept"))
    found = re.search(r"are in (\S+model\.safetensors)", str(failed.value))
    assert found is not None
    rescued = load_file(found[1])
    folder = checkpoint.latest(tmp_path / "kept")
    trained = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in rescued.items()}
    checkpoint.load(folder, trained)
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in rescued.items())
    assert (tmp_path / "out" / "summary.txt").exists(), "everything else is written"


def test_the_parts_of_all_stages_are_the_whole_model_under_all_its_names(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    said = rescue_weights(
        {"model.embed.weight": weight}, {"head.weight": "embed.weight"}, stage=0, stages=2, host="w0", folder=tmp_path
    )
    (path,) = tmp_path.rglob("model-stage-0-of-2.safetensors")
    assert said == f"the weights of stage 0 are in {path} on w0"
    tensors = load_file(path)
    assert tensors.keys() == {"embed.weight", "head.weight"} and torch.equal(tensors["head.weight"], weight)


def test_nothing_is_rescued_that_is_not_worth_it_and_a_failure_is_said(tmp_path: Path) -> None:
    broken = {"model.w": torch.tensor([float("nan")])}
    assert "not finite" in rescue_weights(broken, {}, stage=1, stages=2, host="w0", folder=tmp_path)
    fine, nowhere = {"model.w": torch.ones(2)}, tmp_path / "nowhere"
    assert "nor could" in rescue_weights(fine, {}, stage=1, stages=2, host="w0", folder=nowhere)


def test_a_log_that_cannot_be_written_any_more_is_said_once_and_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full:
        def write(self, event: str, values: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    class Kept:
        events: tuple[str, ...] = ()

        def write(self, event: str, values: object) -> None:
            self.events += (event,)

        def close(self) -> None:
            return None

    kept = Kept()
    writers = WhoeverSpeaks(lambda: True, lambda first: (Full(), kept))
    for event in ("window", "train"):
        writers.write(event, {})
    writers.close()
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and said.startswith("warning: ")
    assert kept.events == ("window", "train")
