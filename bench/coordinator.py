"""How many decisions a coordinator makes in a second, and how long a worker waits for one.

    python bench/coordinator.py                                  1,024 workers: 4 stages of 256 pipelines, about 10 s
    python bench/coordinator.py --stages 16 --pipelines 64       another shape
    python bench/coordinator.py --wait adaptive --rate 2000 6000 another rule, other loads

A decision is the answer to one `ready`: with whom that worker averages. Every simulated worker is a DEALER socket with
CURVE keys and has one `ready` under way; after its answer it computes (a random time around workers / rate) and asks
again. The coordinator is the real process, on one core with its I/O thread; the workers are driven from the others. The
latency runs from the ready to its answer. It includes the time for which a group waits on purpose for late members: up
to 10 ms under the reference's rule, as long as it pays under the adaptive one; the line of the scheduler alone, which
gets the same load on a virtual clock without any socket, shows this part. `most` leaves no time to compute: all workers
stand in the queue, and their number over the rate is the latency. `core` is processor time over time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import random
import select
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.coordination.groups.events import Form, Ready, Tick
from pipeline.coordination.groups.policy import Rules
from pipeline.coordination.groups.scheduler import GroupScheduler
from pipeline.coordination.keys import curve_keys
from pipeline.coordination.messages import JobRules
from pipeline.coordination.server import spawn_coordinator

WARM_UP_S = 1.0


class Measured(NamedTuple):
    """What one driver saw: seconds from ready to answer, the sizes of the groups, and how long it drove."""

    latencies_s: list[float]
    sizes: list[int]
    seconds: float


# --- the scheduler alone


def measure_scheduler(stages: int, pipelines: int, rules: Rules, rate: float, decisions: int) -> Measured:
    """The scheduler alone; `seconds` is its processor time, latencies are on the virtual clock."""
    scheduler = GroupScheduler(stages, pipelines, rules)
    think_s, chance = stages * pipelines / rate, random.Random(0)
    arrivals = [
        (chance.uniform(0.0, think_s), stage, pipeline) for stage in range(stages) for pipeline in range(pipelines)
    ]
    heapq.heapify(arrivals)
    delays = [think_s * chance.uniform(0.8, 1.2) for _ in range(4096)]
    wake, spent, asked = float("inf"), 0.0, {}
    latencies: list[float] = []
    sizes: list[int] = []
    while len(latencies) < decisions:
        if arrivals and arrivals[0][0] <= wake:
            now, stage, pipeline = heapq.heappop(arrivals)
            event: Ready | Tick = Ready(stage, pipeline, 0)
            asked[stage, pipeline] = now
        else:
            now, event, wake = wake, Tick(), float("inf")
        begin = time.thread_time()
        commands = scheduler.handle(event, now)
        spent += time.thread_time() - begin
        for command in commands:
            if isinstance(command, Form):
                sizes += [len(command.members)] * len(command.members)
                for member in command.members:
                    latencies.append(now - asked[command.stage, member])
                    heapq.heappush(arrivals, (now + delays[len(latencies) % 4096], command.stage, member))
            else:
                wake = command.time
    return Measured(latencies, sizes, spent)


# --- simulated workers


class Swarm:
    """Many DEALER sockets, driven by one thread."""

    def __init__(self, address: str, key: bytes, rules: JobRules, workers: Sequence[tuple[int, int]]) -> None:
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, len(workers) + 64)
        server, mine = curve_keys(key, "server").public, curve_keys(key, "client")
        self._sockets, self._epoll = [], select.epoll()
        self._by_fd: dict[int, int] = {}
        self._steps, self._asked, self._early = [0] * len(workers), 0, list[int]()
        for number, (stage, pipeline) in enumerate(workers):
            sock = self._context.socket(zmq.DEALER)
            sock.identity = b"p%d.s%d" % (pipeline, stage)
            sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = server, mine.public, mine.secret
            sock.linger = 0
            sock.connect(f"tcp://{address}")
            self._sockets.append(sock)
            fd = sock.get(zmq.FD)
            self._by_fd[fd] = number
            self._epoll.register(fd, select.EPOLLIN)
            hello = {"type": "hello", "n": 0, "stage": stage, "pipeline": pipeline, "incarnation": 0, "mesh": "here:1"}
            self._send(number, {**hello, "timeout": 300.0, "rules": rules.message()})
            sock.get(zmq.EVENTS)  # only after having been asked does a socket signal at its descriptor

    def _send(self, number: int, message: dict[str, Any]) -> None:
        self._sockets[number].send(json.dumps(message, separators=(",", ":")).encode(), zmq.NOBLOCK)

    def receive(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """(worker, message) of all that has come."""
        found = []
        early, self._early = self._early, []
        ready = [self._by_fd[fd] for fd, _ in self._epoll.poll(0.0 if early else timeout_s, 64)]
        for number in {*early, *ready}:
            sock = self._sockets[number]
            while sock.get(zmq.EVENTS) & zmq.POLLIN:
                found.append((number, sock.recv(zmq.NOBLOCK)))
        return found

    def meet(self) -> None:
        """Waits for everybody's welcome."""
        missing, deadline = set(range(len(self._sockets))), time.monotonic() + 60
        while missing:
            assert time.monotonic() < deadline, f"{len(missing)} workers were not welcomed in 60 s"
            for number, data in self.receive(0.1):
                assert b'"late":false' in data, data
                missing.discard(number)

    def drive(self, think_s: float, seconds: float) -> Measured:
        """Lets every worker ask, wait, compute, and ask again."""
        clock, chance, count = time.perf_counter, random.Random(os.getpid()), len(self._sockets)
        begin = clock()
        counted, end = begin + min(WARM_UP_S, seconds), begin + min(WARM_UP_S, seconds) + seconds
        due = [(begin + chance.uniform(0.0, think_s), number) for number in range(count)]
        heapq.heapify(due)
        asked, under_way = [0.0] * count, 0
        latencies: list[float] = []
        sizes: list[int] = []
        while (now := clock()) < end or under_way:
            for _ in range(64):
                if not due or due[0][0] > now or now >= end:
                    break
                _, number = heapq.heappop(due)
                asked[number] = clock()
                self._ask(number)
                under_way += 1
            pause_s = 0.1 if not due or now >= end else max(0.0, due[0][0] - clock())
            for number, data in self.receive(min(pause_s, 0.1)):
                now = clock()
                if b'"members"' not in data:
                    assert b'"error"' not in data, data
                    continue
                under_way -= 1
                if counted <= now < end:
                    latencies.append(now - asked[number])
                    sizes.append(data.count(b",", data.index(b"["), data.index(b"]")) + 1)
                heapq.heappush(due, (now + think_s * chance.uniform(0.8, 1.2), number))
            assert now < end + 30, f"{under_way} workers had no answer for 30 s"
        return Measured(latencies, sizes, seconds)

    def _ask(self, number: int) -> None:
        self._steps[number] += 1
        self._asked += 1
        text = b'{"type":"ready","n":%d,"g":0,"step":%d,"scope":""}' % (self._asked, self._steps[number])
        sock = self._sockets[number]
        sock.send(text, zmq.NOBLOCK)
        if sock.get(zmq.EVENTS) & zmq.POLLIN:  # its descriptor will not tell any more
            self._early.append(number)

    def close(self) -> None:
        for number in range(len(self._sockets)):
            self._send(number, {"type": "bye", "n": 1 << 40, "g": 0})
        deadline, missing = time.monotonic() + 20, len(self._sockets)
        while missing and time.monotonic() < deadline:
            missing -= sum(b'"n":%d' % (1 << 40) in data for _, data in self.receive(0.1))
        self._context.destroy(linger=0)


def driver(address: str, key: bytes, rules: JobRules, workers: Sequence[tuple[int, int]], orders: Connection) -> None:
    """A process with some of the workers; follows orders: (seconds to compute, seconds to drive), None to end."""
    swarm = Swarm(address, key, rules, workers)
    swarm.meet()
    orders.send("met")
    while (order := orders.recv()) is not None:
        orders.send(swarm.drive(*order))
    swarm.close()


# --- the whole


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def processor_s(pid: int) -> float:
    """Processor time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(name: str, measured: Sequence[Measured], busy: float | None = None) -> None:
    latencies = [latency for one in measured for latency in one.latencies_s]
    sizes = [size for one in measured for size in one.sizes]
    rate = len(latencies) / max(one.seconds for one in measured)
    p50, p99 = (percentile(latencies, share) * 1e3 for share in (0.5, 0.99))
    company = sum(size > 1 for size in sizes) / len(sizes)
    core = "" if busy is None else f"{busy:.0%}"
    print(f"{name:20} {rate:12,.0f} {p50:8.2f} {p99:8.2f} {statistics.mean(sizes):10.2f} {company:11.1%} {core:>6}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="default: 4")
    parser.add_argument("--pipelines", type=int, default=256, help="default: 256")
    parser.add_argument("--max-group", type=int, default=8, help="default: 8")
    parser.add_argument("--wait", choices=("reference", "adaptive"), default="reference", help="default: reference")
    parser.add_argument("--rate", type=float, nargs="+", default=[6000.0], help="decisions/s asked for (default: 6000)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per line (default: 3)")
    parser.add_argument("--drivers", type=int, default=1, help="processes that simulate the workers (default: 1)")
    arguments = parser.parse_args()
    stages, pipelines = arguments.stages, arguments.pipelines
    count = stages * pipelines

    print(f"{count} workers: {stages} stages of {pipelines} pipelines, groups of at most {arguments.max_group}\n")
    print(f"{'':20} {'decisions/s':>12} {'p50 ms':>8} {'p99 ms':>8} {'group size':>10} {'not alone':>11} {'core':>6}")
    alone = Rules(max_group=arguments.max_group, wait=arguments.wait)
    show("scheduler alone", [measure_scheduler(stages, pipelines, alone, max(arguments.rate), 100_000)])

    key = os.urandom(32)
    rules = JobRules(
        stages=stages, pipelines=pipelines, max_group=arguments.max_group, wait=arguments.wait, heartbeat_timeout_s=60.0
    )
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    process, address = spawn_coordinator(key, "127.0.0.1")
    os.sched_setaffinity(0, cores[1:] or cores)
    workers = [(stage, pipeline) for pipeline in range(pipelines) for stage in range(stages)]
    drivers, orders = [], []
    context = multiprocessing.get_context("spawn")
    for number in range(arguments.drivers):
        ours, theirs = context.Pipe()
        part = workers[number :: arguments.drivers]
        drivers.append(context.Process(target=driver, args=(address, key, rules, part, theirs), daemon=True))
        drivers[-1].start()
        orders.append(ours)
    for pipe in orders:
        assert pipe.recv() == "met"
    for rate in [*arguments.rate, float("inf")]:
        for pipe in orders:
            pipe.send((count / rate, arguments.seconds))
        time.sleep(min(WARM_UP_S, arguments.seconds))
        before, begin = processor_s(process.pid), time.perf_counter()
        time.sleep(0.9 * arguments.seconds)
        busy = (processor_s(process.pid) - before) / (time.perf_counter() - begin)
        name = "most" if rate == float("inf") else f"{rate:g} asked for"
        show(name, [pipe.recv() for pipe in orders], busy)
    for pipe in orders:
        pipe.send(None)
    for one in drivers:
        one.join(30)
    status = process.wait(30)
    assert status == 0, f"the coordinator ended with status {status}"


if __name__ == "__main__":
    main()
