"""Seeded chaos under every synchroniser: workers killed and frozen at random, and all must come right in the end.

HETURUN_CHAOS_S is how long each job trains on an idle machine (4; give 60 for a thorough run); HETURUN_CHAOS_SEED draws
other faults (0). One synchroniser is tried with two stages, the others, which are long tests, with one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import thorough
from faulty_jobs import HEARTBEAT_S, FaultyJob, agreed, same_bits, tiny_job

LENGTH_S = float(os.environ.get("HETURUN_CHAOS_S", "4"))
SEED = int(os.environ.get("HETURUN_CHAOS_SEED", "0"))
EPOCHS = 3
CALM_S = 1.0  # a pipeline all of whose stages made an update since then is well
PATIENCE_S = 120.0

SYNCHRONISERS: dict[str, dict[str, Any]] = {
    "preduce": {"preduce": True},
    "overlapped": {"preduce": True, "overlap_sync": True},
    "adpsgd": {"adpsgd": True},
    "local_sgd": {"local_sgd": True, "local_steps": 2},
}


class Chaos:
    """Injects faults, now and then, as long as at least two pipelines are well: one of them goes on."""

    def __init__(self, job: FaultyJob, seed: int) -> None:
        self.job, self.random = job, Random(seed)
        self.harmed: dict[int, float] = {}  # pipeline -> when its last fault was over
        self.killed: list[int] = []
        self.frozen: list[int] = []

    def run(self) -> None:
        """Until the job ends."""
        deadline = time.monotonic() + LENGTH_S + PATIENCE_S
        while self.goes_on(self.random.uniform(0.5, 1.5)):
            assert time.monotonic() < deadline, self.job.tail()
            well = [pipeline for pipeline in range(self.job.pipelines) if self.is_well(pipeline)]
            victim, stage = self.random.randrange(self.job.pipelines), self.random.randrange(self.job.stages)
            if len(well) >= 2 and victim in well:
                self.harm(victim, stage)

    def harm(self, victim: int, stage: int) -> None:
        if self.random.random() < 0.4:
            self.harmed[victim] = self.job.kill(victim, stage=stage)
            self.killed.append(victim)
            return
        self.frozen.append(victim)
        self.job.freeze(victim, stage=stage)
        self.goes_on(self.random.uniform(0.2, 2 * HEARTBEAT_S))
        self.harmed[victim] = self.job.thaw(victim, stage=stage)

    def is_well(self, pipeline: int) -> bool:
        since = max(time.time() - CALM_S, self.harmed.get(pipeline, 0.0) + CALM_S)  # the fenced still finish a batch
        return all(self.job.entries("update", pipeline=pipeline, stage=s, after=since) for s in range(self.job.stages))

    def goes_on(self, seconds: float) -> bool:
        """Lets the job run; whether it still does."""
        deadline = time.monotonic() + seconds
        while self.job.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.job.process.poll() is None


@pytest.mark.parametrize("name", ["preduce", *(pytest.param(name, marks=thorough) for name in [*SYNCHRONISERS][1:])])
def test_chaos(tmp_path: Path, name: str) -> None:
    stages = 2 if name == "preduce" else 1
    options = {"stages": stages, "pipelines": 3, "restarts": 9, "epochs": EPOCHS, "epoch_s": LENGTH_S / EPOCHS}
    metrics = tmp_path / "metrics.jsonl"
    with tiny_job(tmp_path, metrics=str(metrics), **options, **SYNCHRONISERS[name]) as job:
        chaos = Chaos(job, SEED)
        job.wait_for_updates(3, within_s=PATIENCE_S)
        chaos.run()
        said = f"killed {chaos.killed}, frozen {chaos.frozen}\n{job.text()}"
        print(said)
        assert job.finish(within_s=1.0) == 0, said
        assert not job.processes(), said
        for segment in range(EPOCHS):
            agreed(job, segment)
        same_bits(job)
        for pipeline in set(chaos.killed):
            assert f"pipeline {pipeline} (rank " in job.text().rpartition("the job ended well")[2], said
        losses = [
            line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if line["event"] == "train"
        ]
        assert losses[-1] < losses[0], said
