"""How soon the others step on when a worker is killed or frozen, how soon it is back, and what 20 faults cost.

    python bench/chaos.py                          all, 20 rounds each and 5 minutes of faults: about 15 minutes
    python bench/chaos.py --only kill --rounds 5   only one of kill (with restarts), freeze, throughput
    python bench/chaos.py --minutes 1              a shorter throughput run

Real jobs under heturun: emulated stages (they wait instead of computing), the real schedule, transport, coordinator and
synchroniser. Faults come from outside, at seeded times; everything is read from the workers' diaries (HETURUN_DIARY).

step on       the longest interval between two successive updates of any worker of the other pipelines that touches the
              3 s (frozen: heartbeat timeout + 3 s) after the fault; an undisturbed interval is part of it
restart       from the start of the later of the restarted pipeline's processes to its first update on all stages
pause         the longest interval between two updates of the giver in the half second around the copy, and how long
              it held its weights for it
kept          batches done / (alive seconds x batches per second of one replica before the first fault); a replica is
              dead from its kill until its process says hello, or from SIGSTOP to SIGCONT: rejoining counts as loss
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.faults import FaultyJob, longest_pause, process_start

EVER = 1_000_000  # updates that no run here comes to
WATCH_S = 3.0
CALM_S = 1.0
PATIENCE_S = 180.0
ALIVE_S = 3.0  # whoever has stepped within so long may be the next victim


@contextmanager
def job(
    *, stages: int, pipelines: int, step_ms: float, heartbeat_s: float, sync: Sequence[str], steps: int = EVER
) -> Iterator[FaultyJob]:
    """A running job of emulated replicas whose batches take `step_ms`."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        options = [
            "--emulate", f"{step_ms / 2:g},{step_ms / 2:g},1", "--batch-size", "1", "--epochs", "1", "--max-steps",
            str(steps), "--pipeline", "pipedream" if stages > 1 else "dp", "--disp-batches", "1000",
            "--heartbeat-timeout", f"{heartbeat_s:g}", *sync,
        ]  # fmt: skip
        with FaultyJob(Path(folder), stages=stages, pipelines=pipelines, options=options, restarts=99) as running:
            running.wait_for_updates(20, within_s=PATIENCE_S)
            yield running


def stepped_on(running: FaultyJob, victim: int, fault: float, within_s: float) -> float:
    """The longest interval between updates of anybody but the victim after the fault."""
    pauses = []
    for pipeline in range(running.pipelines):
        for stage in range(running.stages):
            if pipeline != victim:
                times = [e.time for e in running.entries("update", pipeline=pipeline, stage=stage, after=fault - 5)]
                pauses.append(longest_pause(times, fault, fault + within_s))
    return max(pauses)


def back(running: FaultyJob, victim: int, after: float) -> float:
    """When all stages of a pipeline have made their first update since they joined."""
    joined = running.wait_for("joined", running.stages, pipeline=victim, after=after, within_s=PATIENCE_S)
    since = max(entry.time for entry in joined)
    firsts = [
        running.wait_for("update", pipeline=victim, stage=stage, after=since)[0].time for stage in range(running.stages)
    ]
    return max(firsts)


def measure_kills(rounds: int, seed: int, **shape: object) -> Iterator[str]:
    """One worker after another is killed, and its pipeline started again."""
    random, stalls, starts, holds, pauses, same = Random(seed), [], [], [], [], 0
    with job(**shape) as running:  # type: ignore[arg-type]
        for _ in range(rounds):
            time.sleep(CALM_S * random.uniform(1.0, 2.0))
            victim, stage = random.randrange(running.pipelines), random.randrange(running.stages)
            killed = running.kill(victim, stage=stage)
            begun = running.wait_for("start", running.stages, pipeline=victim, after=killed, within_s=PATIENCE_S)
            started = max(process_start(entry.values["pid"]) for entry in begun)
            starts.append(back(running, victim, killed) - started)
            time.sleep(CALM_S)
            stalls.append(stepped_on(running, victim, killed, WATCH_S))
            for taken in running.entries("took", pipeline=victim, after=killed):
                given = running.entries("gave", pipeline=taken.values["giver"], stage=taken.stage, after=killed)
                equal = [entry for entry in given if entry.values["state"] == taken.values["state"]]
                assert equal, f"{taken} is not what was given: {given}"
                same += 1
                holds.append(equal[-1].values["paused_s"])
                times = [
                    entry.time
                    for entry in running.entries(
                        "update", pipeline=taken.values["giver"], stage=taken.stage, after=killed
                    )
                ]
                pauses.append(longest_pause(times, equal[-1].time - 0.25, equal[-1].time + 0.25))
            print(f"kill: others {stalls[-1]:.3f} s, back after {starts[-1]:.1f} s", file=sys.stderr, flush=True)
    yield row("step on after kill -9", stalls, "s", "0.5 s")
    yield row("restart: process start to first update", starts, "s", "10 s")
    yield row("the giver holds its weights", [1e3 * hold for hold in holds], "ms", "")
    yield row("the giver's longest step around the copy", [1e3 * pause for pause in pauses], "ms", "100 ms")
    yield f"| copies equal bit for bit | {same} of {same} | | | all |"


def measure_freezes(rounds: int, seed: int, *, heartbeat_s: float, **shape: object) -> Iterator[str]:
    """One worker after another is stopped for longer than the heartbeat timeout, then continued."""
    random, stalls, returns = Random(seed), [], []
    with job(heartbeat_s=heartbeat_s, **shape) as running:  # type: ignore[arg-type]
        for _ in range(rounds):
            time.sleep(CALM_S * random.uniform(1.0, 2.0))
            victim, stage = random.randrange(running.pipelines), random.randrange(running.stages)
            frozen = running.freeze(victim, stage=stage)
            time.sleep(heartbeat_s + 1.5)
            thawed = running.thaw(victim, stage=stage)
            returns.append(back(running, victim, thawed) - thawed)
            stalls.append(stepped_on(running, victim, frozen, heartbeat_s + WATCH_S))
            print(f"freeze: others {stalls[-1]:.3f} s, back after {returns[-1]:.2f} s", file=sys.stderr, flush=True)
    target = f"{heartbeat_s + 0.3:g} s"
    yield row(f"step on after SIGSTOP, heartbeat {heartbeat_s:g} s", stalls, "s", target)
    yield row("SIGCONT to first update", returns, "s", "")


def stepping(running: FaultyJob, now: float) -> set[int]:
    """The pipelines that have made an update lately."""
    return {p for p in range(running.pipelines) if running.entries("update", pipeline=p, after=now - ALIVE_S)}


def measure_throughput(minutes: float, faults: int, seed: int, *, step_ms: float, **shape: object) -> Iterator[str]:
    """Seeded kills and freezes at random times, two in three of them kills; batches done against alive replicas."""
    random, length_s = Random(seed), 60 * minutes
    quiet_s = min(20.0, length_s / 4)
    with job(step_ms=step_ms, **shape) as running:  # type: ignore[arg-type]
        dead: list[tuple[int, float, float]] = []
        begin = time.time()
        time.sleep(quiet_s)
        first = time.time()
        moments = sorted(random.uniform(0.0, length_s * 0.95) for _ in range(faults))
        thaws: list[tuple[float, int, float]] = []
        done = 0
        while time.time() < first + length_s:
            now = time.time()
            for thaw in [thaw for thaw in thaws if thaw[0] <= now]:
                _, victim, since = thaw
                dead.append((victim, since, running.thaw(victim)))
                thaws.remove(thaw)
            due = done < faults and first + moments[done] <= now
            if due and (alive := stepping(running, now) - {frozen for _, frozen, _ in thaws}):
                done += 1
                victim = random.choice(sorted(alive))
                if random.random() < 2 / 3:
                    dead.append((victim, running.kill(victim), float("inf")))
                else:
                    thaws.append((now + random.uniform(1.0, 8.0), victim, running.freeze(victim)))
                print(f"fault {done} at {now - first:.0f} s: pipeline {victim}", file=sys.stderr, flush=True)
            time.sleep(0.02)
        end = time.time()
        for _, victim, since in thaws:
            dead.append((victim, since, end))
            running.thaw(victim)
        updates = [entry for entry in running.entries("update", stage=0) if begin < entry.time < end]
        hellos = running.entries("hello", stage=0)
        pipelines = running.pipelines
    lost_s = 0.0
    for victim, since, until in dead:
        again = min((e.time for e in hellos if e.pipeline == victim and e.time > since), default=end)
        lost_s += min(until, again if until == float("inf") else until, end) - since
    before = len({entry.values["ticket"] for entry in updates if entry.time < first})
    after = len({entry.values["ticket"] for entry in updates if entry.time >= first})
    rate = before / (first - begin) / pipelines
    alive_s = pipelines * (end - first) - lost_s
    kept = after / (alive_s * rate)
    yield (
        f"| throughput kept, {pipelines} replicas, {faults} faults in {minutes:g} min | {kept:.1%} "
        f"| {alive_s / pipelines / (end - first):.1%} alive | {rate:.1f} batches/s each (ideal {1e3 / step_ms:.1f}) "
        "| 97.7 % |"
    )


def row(what: str, values: Sequence[float], unit: str, target: str) -> str:
    digits = 0 if unit == "ms" else 2
    numbers = [f"{number:.{digits}f} {unit}" for number in (median(values), min(values), max(values))]
    return f"| {what} | {numbers[0]} | {numbers[1]} to {numbers[2]} | {len(values)} | {target} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="kills, and freezes")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the throughput run")
    parser.add_argument("--faults", type=int, default=20, help="in the throughput run")
    parser.add_argument("--only", choices=["kill", "freeze", "throughput"], action="append", help="may be repeated")
    parser.add_argument("--stages", type=int, default=2, help="of the jobs with kills and freezes")
    parser.add_argument("--pipelines", type=int, default=3, help="of the jobs with kills and freezes")
    parser.add_argument("--replicas", type=int, default=8, help="of the throughput run, one stage each")
    parser.add_argument("--step-ms", type=float, default=40.0, help="a batch's emulated forward and backward")
    parser.add_argument("--heartbeat", type=float, default=1.0, help="seconds")
    parser.add_argument("--sync", default="--preduce", help="flags of the synchroniser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a Markdown file to write as well, as docs/chaos.md")
    options = parser.parse_args()
    wanted = options.only or ["kill", "freeze", "throughput"]
    common = {"step_ms": options.step_ms, "heartbeat_s": options.heartbeat, "sync": options.sync.split()}
    shape = {"stages": options.stages, "pipelines": options.pipelines, **common}
    lines = [
        f"`python bench/chaos.py {' '.join(sys.argv[1:])}`: {options.pipelines} pipelines x {options.stages} stages, "
        f"{options.step_ms:g} ms batches, 1 MB per stage, {options.sync}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start",
        "",
        "| | median | range | of | target |",
        "|---|---|---|---|---|",
    ]
    if "kill" in wanted:
        lines += measure_kills(options.rounds, options.seed, **shape)
    if "freeze" in wanted:
        lines += measure_freezes(options.rounds, options.seed, **shape)
    if "throughput" in wanted:
        row_shape = {"stages": 1, "pipelines": options.replicas, **common}
        lines += measure_throughput(options.minutes, options.faults, options.seed, **row_shape)
    text = "\n".join(lines) + "\n"
    print(text, end="", flush=True)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
