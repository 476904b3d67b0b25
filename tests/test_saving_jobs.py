"""Jobs whose writers of checkpoints are frozen or lost while they write: nothing is lost, and nobody else ends."""

from __future__ import annotations

from pathlib import Path

from faulty_jobs import tiny_job
from safetensors.torch import load_file

from pipeline.train import checkpoint
from pipeline.train.checkpoint_folder import checkpoints

PATIENCE_S = 90.0
LONG_S = 120.0


def test_a_pipeline_that_stood_still_while_it_saved_publishes_nothing_and_joins_again(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    options = {"stages": 2, "pipelines": 2, "preduce": True, "checkpoint": str(folder), "checkpoint_every": 40}
    with tiny_job(tmp_path, epoch_s=LONG_S, fates={0: "standing"}, **options) as job:
        job.wait_for("stands", pipeline=0, within_s=PATIENCE_S)
        job.wait_until(lambda: "pipeline 0 was declared lost" in job.text(), what="the loss", within_s=PATIENCE_S)
        job.wait_until(lambda: checkpoints(folder), what="the checkpoint of another pipeline", within_s=PATIENCE_S)
        thawed = job.thaw(0, stage=1)
        job.wait_for("fenced", 2, pipeline=0, after=thawed, within_s=PATIENCE_S)
        job.wait_for("joined", 2, pipeline=0, after=thawed, within_s=PATIENCE_S)
        job.wait_for_updates(5, after=thawed, within_s=PATIENCE_S)
        assert "another job writes there" not in job.text() and "NO CHECKPOINT" not in job.text()
        assert not list(folder.glob(".step-*.p0.g0.*")), "what it had half written is gone"


def test_the_last_checkpoint_and_the_export_are_written_by_whoever_is_left(tmp_path: Path) -> None:
    folder, weights = tmp_path / "ck", tmp_path / "w.safetensors"
    options = {"pipelines": 3, "local_sgd": True, "checkpoint": str(folder), "export": str(weights)}
    with tiny_job(tmp_path, epoch_s=1.5, fates={0: "saving", 1: "exporting"}, **options) as job:
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
        assert (
            "it lost pipeline 0" in job.text() and "; pipeline 1" in job.text() and f"exported {weights}" in job.text()
        )
        assert not job.processes()
    saved = checkpoint.latest(folder)
    loaded = {f"model.{name}": tensor for name, tensor in load_file(weights).items()}
    expected = {name: tensor.clone() for name, tensor in loaded.items()}
    checkpoint.load(saved, loaded)
    assert all(bool((loaded[name] == tensor).all()) for name, tensor in expected.items())
    assert sorted(path.name for path in folder.iterdir()) == ["latest", saved.name], "nothing half written, no lock"
    assert not (tmp_path / "w.safetensors.parts").exists()
