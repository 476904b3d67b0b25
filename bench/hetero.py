"""How much a slow replica costs, per way of keeping replicas together, against the least possible time.

    python bench/hetero.py                          all ways, one of four replicas 1, 2 and 5 times slower
    python bench/hetero.py --rounds 9 --output table.md
    python bench/hetero.py --ways "preduce, overlapped" --factors 5

Replicas are processes of their own under heturun with the real coordinator and transport; only their arithmetic is
replaced by waiting (--emulate): an emulated device is through with its step when it should be, even if its host, which
shares the processors with the others, notices late. What the device waits for, and mixing, counts. The work is
`--steps` steps per replica, handed out on demand where the way allows it.

    ideal       everybody computes all the time: all the work over the sum of the speeds
    bound       of all-reduce: everybody does as much, so all are as slow as the slowest
    seconds     from the moment the first replica leaves the common start to the moment the last one has drained and
                has the final average; what comes before (processes, connections) and after (reports) does not count
    x ideal     of the same round's run; the median, as seconds
    group       replicas per group, as a replica meets them; alone: groups of one, of all groups
    mixes       averages that a replica took part in, per update
    waited      of its time a replica waited for a group; of all-reduce it is not counted

"scheduler alone" forms groups and averages nothing: four clients of a real coordinator that ask at the start of the
backward and go on when the group is known, as partial reduce does. The reference's scheduler took 0.61 / 0.75 / 0.85 s
for what this bench does at 1x / 2x / 5x.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REPLICAS = 4
SLOW = REPLICAS - 1  # the replica that is slower
FORWARD_MS, BACKWARD_MS, MODEL_MB = 2.0, 3.0, 1.0
GROUPS = "groups_of_"  # what counts of groups are called in a summary
LIMIT_S = 120  # for one run
REFERENCE_S = {1.0: 0.61, 2.0: 0.75, 5.0: 0.85}  # its scheduler alone, 100 steps of 5 ms

ALONE = "scheduler alone"
WAYS: Mapping[str, tuple[str, ...]] = {
    "all-reduce": (),
    "preduce, overlapped": ("--preduce", "--overlap-sync"),
    "preduce": ("--preduce",),
    "adpsgd": ("--adpsgd",),
    "local-sgd, H=4": ("--local-sgd", "--local-steps", "4"),
}


# --- arithmetic


def slowdowns(factor: float) -> list[float]:
    """How many times as long each replica's steps last."""
    return [1.0] * (REPLICAS - 1) + [factor]


def ideal_s(factors: Sequence[float], steps: int, step_s: float) -> float:
    """All the work over the sum of the speeds."""
    return len(factors) * steps * step_s / sum(1 / factor for factor in factors)


def bound_s(factors: Sequence[float], steps: int, step_s: float) -> float:
    """The least time of all-reduce: `steps` steps of the slowest."""
    return steps * step_s * max(factors)


class Outcome(NamedTuple):
    """One run: seconds, how often a replica was in a group of each size, updates of all, and the waited share."""

    seconds: float
    groups: Mapping[int, int]  # size -> times, added up over the replicas
    updates: int
    waited: float | None


def outcome_of(reports: Iterable[Mapping[str, Any]], batch_size: int) -> Outcome:
    """From the ranks of a summary.json.

    Raises:
        ValueError: a run with stops in between, which would count.
    """
    reports = list(reports)
    stretches = [stretch for report in reports for stretch in report["stretches"]]
    if len(stretches) != len(reports):
        raise ValueError(f"{len(reports)} replicas trained in {len(stretches)} stretches; expected one each")
    seconds = max(end for _, end in stretches) - min(begin for begin, _ in stretches)
    mixing = [report["mixing"] for report in reports if report["mixing"] is not None]
    return Outcome(
        seconds=seconds,
        groups=_added(_groups(each) for each in mixing),
        updates=sum(report["samples"] for report in reports) // batch_size,
        waited=statistics.mean(each["waited_s"] for each in mixing) / seconds if mixing else None,
    )


def _groups(mixing: Mapping[str, Any]) -> dict[int, int]:
    """Size -> times, of one replica's groups_of_SIZE."""
    return {int(name.removeprefix(GROUPS)): times for name, times in mixing.items() if name.startswith(GROUPS)}


def _added(groups: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for counts in groups:
        total.update(counts)
    return dict(sorted(total.items()))


def mean_size(groups: Mapping[int, int]) -> float:
    """Replicas per group, each group counted by each of its members."""
    return sum(size * times for size, times in groups.items()) / sum(groups.values())


def alone_share(groups: Mapping[int, int]) -> float:
    """Groups of one, of all groups; a group of n was counted n times."""
    return groups.get(1, 0) / sum(times / size for size, times in groups.items())


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    factor: float
    way: str
    seconds: float
    ratio: float
    groups: Mapping[int, int]
    updates: int = 0
    waited: float | None = None


def row_of(factor: float, way: str, outcomes: Sequence[Outcome], ideal: float) -> Row:
    """Medians over the rounds; groups of all rounds together."""
    seconds = statistics.median(outcome.seconds for outcome in outcomes)
    waits = [outcome.waited for outcome in outcomes if outcome.waited is not None]
    return Row(
        factor,
        way,
        seconds,
        seconds / ideal,
        _added(outcome.groups for outcome in outcomes),
        sum(outcome.updates for outcome in outcomes),
        statistics.median(waits) if waits else None,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table of the documentation."""
    lines = [
        "| slower | way | seconds | x ideal | group | alone | mixes | waited |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    size, alone, mixes = "", "", ""
    if row.groups:
        size, alone = f"{mean_size(row.groups):.2f}", f"{alone_share(row.groups):.1%}"
        mixes = f"{sum(row.groups.values()) / row.updates:.2f}" if row.updates else ""
    waited = "" if row.waited is None else f"{row.waited:.1%}"
    cells = [f"{row.factor:g}x", row.way, f"{row.seconds:.3f}", f"{row.ratio:.2f}", size, alone, mixes, waited]
    return f"| {' | '.join(cells)} |"


# --- runs


def train(way: str, factor: float, options: argparse.Namespace) -> Outcome:
    """One job under heturun."""
    steps, batch = options.steps, options.batch_size
    emulate = f"{FORWARD_MS:g},{BACKWARD_MS:g},{MODEL_MB:g}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "heturun", "-w", str(REPLICAS), "--launcher", "local",
            sys.executable, str(ROOT / "train_resnet.py"), "--placement", f"{ROOT}/device_list.py:local_1x{REPLICAS}",
            "--pipeline", "dp", "--emulate", emulate, "--epochs", "1", "--max-steps", str(steps),
            "--batch-size", str(batch), "--momentum", "0", "--weight-decay", "0", "--lr-schedule", "constant",
            "--disp-batches", str(10 * steps), "--trace-steps", "1", *WAYS[way],
        ]  # fmt: skip
        if factor != 1:
            command += ["--hetero", f"slow:pipeline={SLOW},factor={factor:g}"]
        log = Path(folder) / "log"
        with log.open("w") as output:
            status = run(command, folder, output)
        if status:
            raise SystemExit(f"{way} at {factor:g}x ended with status {status}:\n{log.read_text()[-4000:]}")
        summary = json.loads((Path(folder) / "out" / "summary.json").read_text(encoding="utf-8"))
    return outcome_of(summary["ranks"], batch)


def run(command: Sequence[str], folder: str, output: IO[str]) -> int:
    """The status of a command; one that hangs is asked to end, as by Ctrl-C, so that it cleans up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        return process.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=LIMIT_S)


def schedule_alone(factor: float, options: argparse.Namespace) -> Outcome:
    """Four clients of one coordinator that form groups and average nothing."""
    from pipeline.coordination.server import spawn_coordinator

    key = secrets.token_bytes(32)
    coordinator, address = spawn_coordinator(key, "127.0.0.1")
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, "--client", str(pipeline), "--address", address,
             "--slowdown", str(slowdown), "--steps", str(options.steps)],
            env={**os.environ, "HETURUN_KEY": key.hex()}, stdout=subprocess.PIPE, text=True,
        )
        for pipeline, slowdown in enumerate(slowdowns(factor))
    ]  # fmt: skip
    reports = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    coordinator.wait(timeout=30)
    if coordinator.stdin is not None:
        coordinator.stdin.close()
    return outcome_of(reports, 1)


def client(options: argparse.Namespace) -> None:
    """One of them: a step is two waits, as long as a forward and a backward."""
    from pipeline.coordination.client import Client
    from pipeline.coordination.messages import JobRules
    from pipeline.simulation.clocks import ExactClock

    clock = ExactClock()
    rules = JobRules(
        stages=1, pipelines=REPLICAS, policy="partial", max_group=8, connect_within=None, wait="adaptive", seed=0,
        even=False, min_replicas=1, heartbeat_timeout_s=3.0, hosts=(("here",) * REPLICAS,),
    )  # fmt: skip
    line = Client(
        options.address, bytes.fromhex(os.environ["HETURUN_KEY"]), rules, stage=0, pipeline=options.client, timeout_s=60
    )
    line.hello()
    line.gather("start", None, "all", "nothing").result()
    began, groups, waited_s, k = time.time(), Counter[int](), 0.0, 0
    line.begin(0, 0, REPLICAS * options.steps)
    ticket = line.ticket(0, 0)
    while ticket.result() is not None:
        ticket = line.ticket(0, k + 1)
        clock.wait(options.slowdown * FORWARD_MS / 1e3)
        answer = line.ready(k + 1)
        clock.wait(options.slowdown * BACKWARD_MS / 1e3)
        started = clock.now()
        groups[len(answer.result().members)] += 1
        waited_s += clock.now() - started
        line.done(k)
        k += 1
    line.final(0).result()
    stretch = (began, time.time())
    mixing = {"waited_s": waited_s, **{f"{GROUPS}{size}": times for size, times in groups.items()}}
    print(json.dumps({"stretches": [stretch], "samples": k, "mixing": mixing}))
    line.bye()
    line.close()


def race(options: argparse.Namespace) -> list[Row]:
    """All ways one after the other, round after round."""
    outcomes: dict[tuple[float, str], list[Outcome]] = {}
    for number in range(options.rounds):
        for factor in options.factors:
            for way in options.ways:
                outcome = schedule_alone(factor, options) if way == ALONE else train(way, factor, options)
                outcomes.setdefault((factor, way), []).append(outcome)
                print(f"round {number + 1}: {factor:g}x {way}: {outcome.seconds:.3f} s", file=sys.stderr)
    return [row for factor in options.factors for row in _rows(factor, outcomes, options)]


def _rows(factor: float, outcomes: Mapping[tuple[float, str], list[Outcome]], options: argparse.Namespace) -> list[Row]:
    factors, step_s = slowdowns(factor), (FORWARD_MS + BACKWARD_MS) / 1e3
    ideal, bound = ideal_s(factors, options.steps, step_s), bound_s(factors, options.steps, step_s)
    rows = [Row(factor, "ideal", ideal, 1.0, {}), Row(factor, "bound of all-reduce", bound, bound / ideal, {})]
    rows += [row_of(factor, way, outcomes[factor, way], ideal) for way in options.ways]
    if ALONE in options.ways and options.steps == 100 and factor in REFERENCE_S:
        seconds = REFERENCE_S[factor]
        rows.append(Row(factor, "the reference's scheduler alone", seconds, seconds / ideal, {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 5.0])
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, ALONE), default=[*WAYS, ALONE])
    parser.add_argument("--steps", type=int, default=100, help="per replica, on average")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--slowdown", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        client(options)
        return
    table = markdown(race(options))
    print(table)
    if options.output:
        Path(options.output).write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
