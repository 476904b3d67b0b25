"""Elastic jobs of several processes: what each synchroniser promises, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import thorough
from test_jobs import assert_close, final, heturun
from tiny import losses

SYNCHRONISERS: dict[str, dict[str, Any]] = {
    "preduce": {"preduce": True},
    "overlapped": {"preduce": True, "overlap_sync": True},
    "adpsgd": {"adpsgd": True},
    "matched": {"adpsgd": True, "adpsgd_matching": "sync"},
    "local_sgd": {"local_sgd": True, "local_steps": 2, "sync_momentum": "average"},
    "slowmo": {"local_sgd": True, "local_steps": 2, "outer": "slowmo"},
}


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def test_local_sgd_with_an_average_after_every_step_equals_all_reduce(tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": {"train_size": 48}, "momentum": 0.0, "batch_size": 8, "pipeline": "1f1b"}
    local = {"local_sgd": True, "local_steps": 1, "checkpoint": str(tmp_path / "a")}
    heturun(tmp_path / "local", "local_1x2", launcher="local", **local, **options)
    heturun(tmp_path / "all", "local_1x2", launcher="local", checkpoint=str(tmp_path / "b"), **options)
    one, two = final(tmp_path / "a"), final(tmp_path / "b")
    assert_close({k: v for k, v in one.items() if k.startswith("model.")}, two, 1e-6)


@pytest.mark.parametrize(
    "name", ["preduce", *(pytest.param(name, marks=thorough) for name in SYNCHRONISERS if name != "preduce")]
)
def test_every_sample_is_seen_once_an_epoch_and_the_loss_falls(tmp_path: Path, name: str) -> None:
    stages = 2 if name in ("preduce", "adpsgd") else 1
    options: dict[str, Any] = {"task": {"train_size": 90, "batchnorm": True}, "epochs": 4, "microbatches": None}
    options |= {"partition": "4,4", "pipeline": "pipedream"} if stages == 2 else {"pipeline": "dp"}
    options |= {"sync_buffers": True, "learning_rate": 0.02, "metrics": str(tmp_path / "m.jsonl")}
    heturun(tmp_path, f"local_{stages}x2", launcher="local", **options, **SYNCHRONISERS[name])
    events = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [event["samples"] for event in events if event["event"] == "train"] == [90.0] * 4
    assert [event["samples"] for event in events if event["event"] == "validation"] == [21.0] * 4
    curve = [event["loss"] for event in events if event["event"] == "train"]
    assert curve[-1] < curve[0]
    ranks = summary(tmp_path)["ranks"]
    assert sum(rank["samples"] for rank in ranks if rank["stage"] == 0) == 360
    assert all(rank["mixing"]["mixed_bytes"] > 0 for rank in ranks)


def test_a_job_without_pipelining_mixes_whole_models(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pipeline": "dp", "microbatches": None, "preduce": True, "accumulate": 2}
    heturun(tmp_path, "local_1x3", launcher="local", task={"train_size": 120}, **options)
    ranks = summary(tmp_path)["ranks"]
    assert len(ranks) == 3 and sum(rank["samples"] for rank in ranks) == 240


@thorough
def test_a_checkpoint_of_an_elastic_job_resumes_as_one_stage(tmp_path: Path) -> None:
    begun = str(tmp_path / "ck")
    options: dict[str, Any] = {"task": {"train_size": 64}, "batch_size": 8, "checkpoint": begun}
    heturun(tmp_path / "one", "local_2x2", preduce=True, max_steps=4, partition="4,4", **options)
    heturun(tmp_path / "two", "local_1x2", launcher="local", local_sgd=True, resume="", pipeline="1f1b", **options)
    assert len(losses(tmp_path / "two")) > len(losses(tmp_path / "one"))


def test_all_workers_as_threads_of_one_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {"partition": "4,4", "task": {"train_size": 64}, "momentum": 0.0, "epochs": 1}
    heturun(tmp_path, "local_2x2", launcher="threads", **options)
    assert len(summary(tmp_path)["ranks"]) == 4 and all(loss < 10 for loss in losses(tmp_path))


@pytest.mark.parametrize("launcher", ["threads", pytest.param("local", marks=thorough)])
def test_a_mistake_that_rank_zero_finds_ends_every_rank_with_that_one_line(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "bad.json").write_text("{}")
    options: dict[str, Any] = {"preduce": True, "profile": str(tmp_path / "bad.json"), "status": 2}
    lines = heturun(tmp_path, "local_2x2", launcher=launcher, **options).splitlines()
    assert lines[-1].startswith(f"{tmp_path}/bad.json is not a profile") and "Traceback" not in "".join(lines)
    assert "all replicas are gone" not in "".join(lines)


def test_threads_without_a_synchroniser_weigh_uneven_batches_as_processes_do(tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": {"train_size": 96, "masked": True}, "batch_size": 4, "epochs": 1}
    for launcher in ("local", "threads"):
        heturun(tmp_path / launcher, "local_2x2", launcher=launcher, **options)
    threads, processes = losses(tmp_path / "threads"), losses(tmp_path / "local")
    assert len(threads) == 12 and [loss is None for loss in threads] == [loss is None for loss in processes]
    assert [x for x in threads if x is not None] == pytest.approx([x for x in processes if x is not None], rel=1e-6)
