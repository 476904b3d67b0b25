"""Faults by the hundred, over all synchronisers and both launchers: nothing may hang, stay behind or lie about its end.

    python bench/survival.py                          100 faults: about 15 minutes
    python bench/survival.py --faults 20 --seed 7     fewer, others
    python bench/survival.py --only mpi:local-sgd     one launcher and synchroniser

Every job is a real one under heturun: emulated stages, the real schedule, transport, coordinator and synchroniser.
Seeded faults come from outside while it runs: kill -9 of a worker, a worker frozen for a while (shorter or longer than
the heartbeat timeout), and in some jobs, as the last fault, kill -9 of heturun itself.

hang        the job had not ended PATIENCE_S after its last batch should have been done, or after its end was certain
orphan      a process of the job lives GONE_S after heturun has ended
status      an elastic job must end with 0; all-reduce with 137 when a worker was killed, else with 0
files       anything left in the job's own temporary folder or in /dev/shm
"""

from __future__ import annotations

import argparse
import getpass
import itertools
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.faults import FaultyJob

SYNCHRONISERS = {
    "all-reduce": [],
    "preduce": ["--preduce"],
    "preduce-overlapped": ["--preduce", "--overlap-sync"],
    "adpsgd": ["--adpsgd"],
    "local-sgd": ["--local-sgd", "--local-steps", "2"],
}
LAUNCHERS = ("local", "mpi")
SHAPES = ((1, 3), (2, 2), (2, 3))  # stages, pipelines
STEP_MS, HEARTBEAT_S = 40.0, 1.0
STEPS = 300  # of a job: 12 s on an idle machine
FAULTS_PER_JOB = 6
PATIENCE_S, GONE_S = 180.0, 20.0
WELL_S = 2.0  # a pipeline all of whose stages made an update since then is well
OF_TORCH = f"torchinductor_{getpass.getuser()}"  # a cache that torch makes in the temporary folder and keeps


@dataclass(frozen=True)
class Case:
    """One job: what it runs under, and how many faults at most hit it."""

    launcher: str
    sync: str
    stages: int
    pipelines: int
    seed: int
    kills_launcher: bool

    @property
    def elastic(self) -> bool:
        return self.sync != "all-reduce"

    def options(self) -> list[str]:
        return [
            "--emulate", f"{STEP_MS / 2:g},{STEP_MS / 2:g},1", "--batch-size", "1", "--epochs", "1", "--max-steps",
            str(STEPS * (self.pipelines if self.elastic else 1)), "--pipeline",
            "pipedream" if self.stages > 1 else "dp", "--disp-batches", "20", "--heartbeat-timeout",
            f"{HEARTBEAT_S:g}", *SYNCHRONISERS[self.sync],
        ]  # fmt: skip


@dataclass
class Outcome:
    """What was done to a job, and what was found wrong in the end."""

    kills: int = 0
    freezes: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return self.kills + self.freezes


def cases(seed: int, only: str | None) -> Iterator[Case]:
    """Launchers and synchronisers in turn, for ever; shapes and fates drawn."""
    pairs = [(launcher, sync) for sync in SYNCHRONISERS for launcher in LAUNCHERS]
    wanted = [pair for pair in pairs if only is None or only in f"{pair[0]}:{pair[1]}"]
    if not wanted:
        raise SystemExit(f"--only {only} is in none of {', '.join(':'.join(pair) for pair in pairs)}")
    random = Random(seed)
    for number, (launcher, sync) in enumerate(itertools.cycle(wanted)):
        stages, pipelines = random.choice(SHAPES)
        yield Case(launcher, sync, stages, pipelines, seed=seed * 1000 + number, kills_launcher=random.random() < 0.15)


def endure(case: Case, most_faults: int) -> Outcome:
    """Runs one job under faults and says what was wrong."""
    outcome = Outcome()
    shared = shared_memory_names()
    with tempfile.TemporaryDirectory(prefix="survival-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        temporary = folder / "tmp"
        temporary.mkdir()
        job = FaultyJob(
            folder,
            stages=case.stages,
            pipelines=case.pipelines,
            options=case.options(),
            launcher=case.launcher,
            restarts=99 if case.elastic else 0,
            environment={"TMPDIR": str(temporary)},
        )
        with job:
            try:
                if case.elastic:
                    job.wait_for_updates(5, within_s=PATIENCE_S)
                else:
                    job.wait_until(lambda: "Speed:" in job.text(), within_s=PATIENCE_S, what="its first updates")
                harm(job, case, outcome, most_faults)
                status = job.finish(within_s=PATIENCE_S)
                outcome.wrong += [*wrong_status(case, outcome, status), *left_processes(job)]
            except AssertionError as error:
                outcome.wrong.append(f"hang: {error}")
            if outcome.wrong:
                outcome.wrong.append(job.tail(15))
        if not any(line.startswith("hang") for line in outcome.wrong):  # what was killed by force cannot tidy up
            outcome.wrong += [f"file {path.relative_to(folder)}" for path in left_files(temporary)]
            outcome.wrong += [f"file /dev/shm/{left}" for left in left_in_shared_memory(shared)]
    return outcome


def harm(job: FaultyJob, case: Case, outcome: Outcome, most_faults: int) -> None:
    """Faults at seeded times; an elastic job always keeps one pipeline that is well."""
    random = Random(case.seed)
    wanted = min(most_faults, FAULTS_PER_JOB if case.elastic else 1)
    over: dict[int, float] = {}  # when the last fault of a pipeline was over
    while outcome.faults < wanted and wait(job, random.uniform(0.3, 1.5)):
        victim, stage = random.randrange(case.pipelines), random.randrange(case.stages)
        well = [pipeline for pipeline in range(case.pipelines) if is_well(job, pipeline, over)]
        if case.elastic and (victim not in well or len(well) < 2):
            continue
        if outcome.faults == wanted - 1 and case.kills_launcher:
            job.process.kill()
            outcome.kills += 1
            return
        try:
            pid = job.pid(victim, stage) if case.elastic else workers(job)[random.randrange(job.stages * job.pipelines)]
            if random.random() < 0.6:
                os.kill(pid, signal.SIGKILL)
                over[victim] = time.time()
                outcome.kills += 1
                continue
            os.kill(pid, signal.SIGSTOP)
            outcome.freezes += 1
            wait(job, random.uniform(0.2, 3 * HEARTBEAT_S))
            over[victim] = time.time()
            os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, KeyError):
            return  # it has just ended by itself


def workers(job: FaultyJob) -> dict[int, int]:
    """The process of each rank, as long as all are there."""
    found = {}
    for pid, line in job.processes().items():
        with suppress(OSError):
            words = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            if ranks and "train_resnet.py" in line and "heturun" not in line:
                found[ranks[0]] = pid
    return found


def wait(job: FaultyJob, seconds: float) -> bool:
    """Whether the job still ran after that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and job.process.poll() is None:
        time.sleep(0.02)
    return job.process.poll() is None


def is_well(job: FaultyJob, pipeline: int, over: Mapping[int, float]) -> bool:
    """Whether all its stages have made an update lately, and since its last fault."""
    since = max(time.time() - WELL_S, over.get(pipeline, 0.0))
    updates = job.entries("update", pipeline=pipeline, after=since)
    return {entry.stage for entry in updates} == set(range(job.stages))


def wrong_status(case: Case, outcome: Outcome, status: int) -> list[str]:
    if case.kills_launcher and status == -9:
        return []
    expected = 0 if case.elastic or not outcome.kills else 137
    return [] if status == expected else [f"status {status}, expected {expected}"]


def left_processes(job: FaultyJob) -> list[str]:
    deadline = time.monotonic() + GONE_S
    while (left := job.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"orphan {pid}: {line}" for pid, line in left.items()]


def left_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if OF_TORCH not in path.parts)


def left_in_shared_memory(before: set[str]) -> list[str]:
    """What has come and does not go: other jobs of this machine may run."""
    deadline = time.monotonic() + GONE_S
    while (left := shared_memory_names() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted(left)


def shared_memory_names() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def table(results: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """A row per launcher and synchroniser."""
    lines = ["| launcher | synchroniser | jobs | kills | freezes | wrong |", "|---|---|---|---|---|---|"]
    for launcher, sync in dict.fromkeys((case.launcher, case.sync) for case, _ in results):
        of = [outcome for case, outcome in results if (case.launcher, case.sync) == (launcher, sync)]
        counts = [len(of), sum(o.kills for o in of), sum(o.freezes for o in of), sum(bool(o.wrong) for o in of)]
        lines.append(f"| {launcher} | {sync} | {' | '.join(map(str, counts))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="in all jobs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of LAUNCHER:SYNCHRONISER")
    options = parser.parse_args()
    results: list[tuple[Case, Outcome]] = []
    started, done = time.monotonic(), 0
    for case in cases(options.seed, options.only):
        outcome = endure(case, options.faults - done)
        results.append((case, outcome))
        done += outcome.faults
        print(f"{done} faults, {time.monotonic() - started:.0f} s: {case}", *outcome.wrong, sep="\n  ", file=sys.stderr)
        if done >= options.faults:
            break
    kinds = Counter(line.split()[0].rstrip(":") for _, o in results for line in o.wrong[:1])
    print(
        f"`python bench/survival.py {' '.join(sys.argv[1:])}`: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(*table(results), sep="\n")
    print(
        f"\n{done} faults in {len(results)} jobs, {time.monotonic() - started:.0f} s; wrong: {dict(kinds) or 'nothing'}"
    )
    sys.exit(1 if kinds else 0)


if __name__ == "__main__":
    main()
