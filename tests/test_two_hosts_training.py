"""The reference's command on two hosts, for real; and a rank of a training job that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shared_data
from heturun_jobs import ROOT, clean_environment
from netns import TwoHosts, two_hosts

REFERENCE = [
    "-c",
    "config/w0_w1.yml",
    "python3",
    "train_resnet.py",
    "--batch-size",
    "64",
    "--model",
    "resnet50",
    "--dataset",
    "imagenet",
    "--learning-rate",
    "0.01",
    "--weight-decay",
    "1e-4",
    "--epochs",
    "1",
    "--pipeline",
    "pipedream",
]
SMALLER = ["--image-size", "32", "--max-steps", "2", "--disp-batches", "1", "--validate-every", "0", "--workers", "0"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as net:
        yield net


def start(net: TwoHosts, arguments: list[str]) -> subprocess.Popen[str]:
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return net.run_in(
        "w0",
        [sys.executable, "-m", "heturun", "-i", str(net.key), "--timeout", "240", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(PATH=path, OMP_NUM_THREADS="1"),
    )


def twice(images: Path, folder: Path) -> Path:
    """A data set with every photograph of `images` two times: four batches of 64 need more than there are."""
    for image in sorted(images.glob("*/*.JPEG")):
        place = folder / "train" / image.parent.name
        place.mkdir(parents=True)
        for copy in range(2):
            (place / f"{copy}.JPEG").symlink_to(image)
    return folder


@pytest.mark.timeout(900)
def test_the_reference_command_trains_across_two_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    data = twice(shared_data("imagenet") / "train", tmp_path / "data")
    places = ["--data", str(data), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    job = start(hosts, [*REFERENCE, *SMALLER, *places])
    try:
        output, _ = job.communicate(timeout=800)
    finally:
        job.kill()
    assert job.returncode == 0, output[-4000:]
    assert "4 pipeline(s) x 4 stage(s); schedule pipedream; blocks per stage 5,4,4,5" in output
    assert re.search(r"^\[w0/3/0\] 0 TRAIN loss \d+\.\d{4} acc", output, re.MULTILINE), output[-4000:]
    table = [line for line in output.splitlines() if "│" in line]
    assert sum("w0:cpu" in line for line in table) == 8 and sum("w1:cpu" in line for line in table) == 8
    assert (tmp_path / "out" / "timeline.png").stat().st_size > 1000
    assert hosts.wait_until_empty(within_s=2.0) == {}


def process_of_rank(net: TwoHosts, host: str, rank: int) -> int:
    """The pid of the training process of `rank` on `host`."""
    for pid, line in net.processes_in(host).items():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if "train_resnet.py" in line and f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError(f"no rank {rank} on {host}: {net.processes_in(host)}")


@pytest.mark.timeout(600)
def test_a_killed_rank_of_a_training_job_ends_it_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    job = start(
        hosts,
        [
            "-c",
            "config/w0_w1.yml",
            "python3",
            "train_resnet.py",
            "--dataset",
            "digits",
            "--placement",
            "two_hosts_2x2",
            "--partition",
            "4,6",
            "--batch-size",
            "4",
            "--disp-batches",
            "1",
            "--epochs",
            "100",
            *places,
        ],
    )
    assert job.stdout is not None
    read = ""
    while "Epoch[0] Batch [3]" not in read:
        line = job.stdout.readline()
        assert line, f"the job ended early: {read}"
        read += line
    os.kill(process_of_rank(hosts, "w1", 3), signal.SIGKILL)
    since = time.monotonic()
    try:
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert time.monotonic() - since < 10.0
    assert job.returncode == 128 + signal.SIGKILL, output[-3000:]
    assert output.splitlines()[-1] == "heturun: rank 3 (w1, stage 1, pipeline 1) was ended by signal 9 (SIGKILL)"
    assert hosts.wait_until_empty(within_s=2.0) == {}
