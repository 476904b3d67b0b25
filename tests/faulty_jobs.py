"""Jobs of the tiny task under heturun, slowed to a step per `STEP_S`, for tests that kill and freeze their workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.faults import Entry as Entry  # noqa: E402
from bench.faults import FaultyJob  # noqa: E402
from heturun.launch.processes import ELASTIC  # noqa: E402

PAUSE_S = 0.01  # before every forward and every backward
STEP_S = 2 * PAUSE_S
BATCH = 8
HEARTBEAT_S = 2.0


def tiny_job(
    folder: Path,
    *,
    stages: int = 1,
    pipelines: int = 3,
    epochs: int = 1,
    epoch_s: float = 5.0,
    fates: dict[int, str] | None = None,
    launcher: str = "local",
    restarts: int = 0,
    more: tuple[str, ...] = (),
    **settings: Any,
) -> FaultyJob:
    """A job that would last `epochs` * `epoch_s` seconds on an idle machine without faults."""
    steps = int(epoch_s / STEP_S)
    values = {
        "placement": f"{folder / 'layout.py'}:grid", "pipeline": "pipedream" if stages > 1 else "dp", "epochs": epochs,
        "microbatches": None, "batch_size": BATCH, "hetero": f"random:probability=1,seconds={PAUSE_S}",
        "heartbeat_timeout": HEARTBEAT_S, "learning_rate": 0.01, "warmup_epochs": 0.0, "disp_batches": 20,
        "partition": {1: "8", 2: "4,4"}[stages], **settings,
    }  # fmt: skip
    task = {"train_size": steps * pipelines * BATCH, "batchnorm": True}
    program = [str(ROOT / "tests" / "tiny.py")]
    if fates is not None:
        program = [str(ROOT / "tests" / "doomed.py"), json.dumps(fates)]
    command = [*program, str(folder), json.dumps(values), json.dumps(task)]
    command += [flag for flag in ELASTIC if settings.get(flag[2:].replace("-", "_"))]  # for the launcher to see
    return FaultyJob(
        folder,
        stages=stages,
        pipelines=pipelines,
        command=command,
        launcher=launcher,
        restarts=restarts,
        more=more,
    )


def agreed(job: FaultyJob, segment: int) -> dict[int, list[Entry]]:
    """Who took part in the last average of a segment, by stage; all of them must have become the same bits."""
    found: dict[int, list[Entry]] = {stage: [] for stage in range(job.stages)}
    for entry in job.entries("averaged"):
        if entry.values["segment"] == segment:
            found[entry.stage].append(entry)
    for entries in found.values():
        assert entries, f"nobody averaged at the end of segment {segment}"
        assert len({entry.values["state"] for entry in entries}) == 1, entries
    return found


def same_bits(job: FaultyJob) -> int:
    """Every state that was taken is one that its giver gave, to the last bit; how many there were."""
    given = {(entry.pipeline, entry.stage, entry.values["state"]) for entry in job.entries("gave")}
    taken = job.entries("took")
    for entry in taken:
        assert (entry.values["giver"], entry.stage, entry.values["state"]) in given, entry
    return len(taken)
