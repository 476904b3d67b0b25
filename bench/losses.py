"""The losses of eleven small jobs to the last digit: a change that is none is proved by equal ones.

    python bench/losses.py --write before.json      on the old code
    python bench/losses.py --against before.json    on the new code, on the same machine: exit status 1 if one differs

Every job is a real one with real processes: four schedules, ResNet and BERT, all-reduce and local SGD, both launchers
and threads, a resume. One thread per process; all weights, orders and masks are seeded. Elastic jobs are not among
them, as who does which batch depends on who is quicker there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 300
BERT = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
RESNET_JOB = ["train_resnet.py", "--dataset", "digits", "--batch-size", "8", "--validate-every", "0"]
BERT_JOB = [
    "train_bert.py", "--dataset", "synthetic", "--bert-config", json.dumps(BERT), "--sequence-length", "16",
    "--batch-size", "8", "--warmup-steps", "2", "--validate-every", "0",
]  # fmt: skip
COMMON = ["--epochs", "1", "--disp-batches", "1", "--seed", "5"]

JOBS: Mapping[str, tuple[str, Sequence[str]]] = {
    "resnet gpipe": ("local", [*RESNET_JOB, "--pipeline", "gpipe", "--placement", "local_2x1", "--partition", "5,5"]),
    "resnet 1f1b": ("mpi", [*RESNET_JOB, "--pipeline", "1f1b", "--placement", "local_2x1", "--partition", "5,5"]),
    "resnet pipedream": (
        "mpi",
        [*RESNET_JOB, "--pipeline", "pipedream", "--placement", "local_2x1", "--partition", "5,5"],
    ),
    "resnet dp": ("local", [*RESNET_JOB, "--pipeline", "dp", "--placement", "local_1x2"]),
    "resnet clipped": (
        "local",
        [*RESNET_JOB, "--pipeline", "1f1b", "--placement", "local_2x1", "--partition", "5,5", "--clip-grad-norm", "1"],
    ),
    "bert gpipe": ("local", [*BERT_JOB, "--pipeline", "gpipe", "--placement", "local_2x1", "--partition", "2,2"]),
    "bert pipedream": ("mpi", [*BERT_JOB, "--pipeline", "pipedream", "--placement", "local_2x2", "--partition", "2,2"]),
    "bert recomputed": (
        "local",
        [*BERT_JOB, "--pipeline", "1f1b", "--placement", "local_2x1", "--partition", "2,2", "--recompute"],
    ),
    "bert threads": ("threads", [*BERT_JOB, "--pipeline", "1f1b", "--placement", "local_2x2", "--partition", "2,2"]),
}
STEPS = 6


def heturun(launcher: str, command: Sequence[str], folder: Path, *, steps: int) -> list[float]:
    """The loss of every update, over all pipelines, as the curve of the summary has it."""
    placement = command[command.index("--placement") + 1]
    stages, pipelines = (int(number) for number in placement.removeprefix("local_").split("x"))
    places = ["--out", str(folder / "out"), "--runs", str(folder / "runs")]
    start = [sys.executable, "-m", "heturun", "-w", str(stages * pipelines), "--launcher", launcher, sys.executable]
    run([*start, *command, *COMMON, "--max-steps", str(steps), *places])
    return [loss for _, loss in json.loads((folder / "out" / "summary.json").read_text())["curve"]]


def resumed(folder: Path) -> list[float]:
    """A job that stops in the middle and goes on, with another number of stages."""
    command = [*BERT_JOB, "--pipeline", "gpipe", "--checkpoint", str(folder / "checkpoints")]
    first = heturun("local", [*command, "--placement", "local_1x1"], folder, steps=STEPS // 2)
    again = [*command, "--placement", "local_2x1", "--partition", "2,2", "--resume"]
    return [*first, *heturun("mpi", again, folder, steps=STEPS)[-STEPS // 2 :]]


def local_sgd(folder: Path) -> list[float]:
    """examples/cifar.py on images made up here: the validation losses of its epochs."""
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for name in ("a", "b"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8) + (100 if name == "b" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / name / f"{number}.png")
    options = ["--nprocs", "2", "--epochs", "2", "--batch-size", "8", "-p", "1"]
    options += ["--local-steps", "2", "--initial-steps", "2"]
    printed = run([sys.executable, "examples/cifar.py", str(folder / "images"), *options])
    return [float(number) for number in re.findall(r"[Ll]oss[ :=]+([\d.]+(?:e-?\d+)?)", printed)]


def run(command: Sequence[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def measure() -> dict[str, list[float]]:
    found = {}
    for name in (*JOBS, "resumed", "local sgd"):
        with tempfile.TemporaryDirectory(prefix="losses-") as folder:
            if name in JOBS:
                launcher, command = JOBS[name]
                found[name] = heturun(launcher, command, Path(folder), steps=STEPS)
            else:
                found[name] = {"resumed": resumed, "local sgd": local_sgd}[name](Path(folder))
        assert found[name], f"{name} printed no losses"
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--against", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = measure()
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
        return
    before = json.loads(options.against.read_text())
    different = [name for name in before if found.get(name) != before[name]]
    for name in different:
        print(f"{name}: {found.get(name)}, was {before[name]}")
    print(f"{len(before) - len(different)} of {len(before)} equal to the last digit")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
