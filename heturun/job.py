"""Runs one job: starts it, listens to it, and ends it, whatever happens.

start ---> events ---> over, or a verdict, or a signal ---> "stop" to all agents ---> (STOP_S) "kill" ---> last words
One Ctrl-C is a signal; a second one goes to "kill" at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from heturun.agent import die_with_parent
from heturun.console import Console
from heturun.hub import Hub
from heturun.mpi import environment as mpi_environment
from heturun.outcome import Event, Lost, Outcome, Output, Progress, Signalled, Verdict
from heturun.plan import Plan
from heturun.starters import Routes, Starter, choose, environment, find_routes, start_message, starters

START_S = 60.0  # for all processes to check in, unless --timeout says otherwise
STOP_S = 3.5  # from "stop" to "kill"; agents themselves send SIGKILL 2 s after SIGTERM
KILL_S = 1.0  # from "kill" to leaving
LEAVE_S = 0.5  # for mpirun or ssh to end after its agents, unless the way to their host is cut
FINISH_S = 10.0  # for mpirun to end after its processes did
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StarterEnded(NamedTuple):
    """mpirun, ssh or a local agent ended."""

    running: Running
    status: int


@dataclass
class Running:
    """A starter that was started, and its last words."""

    starter: Starter
    process: subprocess.Popen[bytes]
    words: deque[str] = field(default_factory=lambda: deque(maxlen=40))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number) if number == signal.SIGKILL else self.process.send_signal(number)


class Job:
    """The events of one job and what follows from them."""

    def __init__(self, plan: Plan, routes: Routes, console: Console, *, mpi: bool, timeout_s: float | None) -> None:
        self.plan, self.console = plan, console
        self.key = secrets.token_bytes(32)
        start = start_message(plan, routes, mpi_environment() if mpi else {})
        self.hub = Hub(self.key, only_here=routes.only_here, start=start, deliver=self.deliver)
        self.start_s = START_S if timeout_s is None else timeout_s
        self.events: SimpleQueue[Event | StarterEnded] = SimpleQueue()
        self.outcome = Outcome(len(plan.processes))
        self.running: list[Running] = []
        self.stopping = False

    def deliver(self, event: Event) -> None:
        """Takes an event from the hub, on any thread."""
        if isinstance(event, Output):
            self.console.output(event)
            if self.console.broken and not self.stopping:
                self.events.put(Signalled(signal.SIGPIPE))
        elif isinstance(event, Progress):
            self.console.progress(event)
        else:
            self.events.put(event)

    def spawn(self, todo: Sequence[Starter]) -> None:
        """Starts the starters; on the main thread and before any other exists, as `die_with_parent` needs."""
        for starter in todo:
            process = subprocess.Popen(
                starter.argv,
                env=environment(os.environ, self.key.hex()),
                stdin=subprocess.PIPE if starter.key_on_stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches the launcher alone
                preexec_fn=die_with_parent,
            )
            self.running.append(Running(starter, process))
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # its exit tells
                    process.stdin.write(f"{self.key.hex()}\n".encode())
                    process.stdin.flush()

    def run(self) -> int:
        """From the first event to the last word; the exit status."""
        for running in self.running:
            threading.Thread(target=self._watch, args=(running,), daemon=True).start()
        self.hub.serve()
        end = self._until_something_ends_it()
        if end is None:
            self._until(lambda: not self._alive(), FINISH_S)
        else:
            self._stop()
        self.leave_nothing()
        return self._conclude(end)

    def _watch(self, running: Running) -> None:
        """Keeps what a starter itself has to say, for it matters only if the start fails, and tells that it ended."""
        assert running.process.stdout is not None
        for raw in running.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            if line.strip("-"):
                running.words.append(line)
        self.events.put(StarterEnded(running, _shell_status(running.process.wait())))

    def _until_something_ends_it(self) -> Verdict | Signalled | None:
        """None when every process ended well."""
        deadline = time.monotonic() + self.start_s
        while True:
            now = time.monotonic()
            verdict = self.outcome.verdict(now)
            if verdict is not None:
                return verdict
            if self.outcome.over:
                return None
            if self.outcome.missing and now >= deadline:
                return self._late()
            signalled = self._take(self._next_look(now, deadline))
            if signalled is not None:
                return signalled

    def _next_look(self, now: float, deadline: float) -> float | None:
        """When to look again, though nothing may have happened."""
        times = [self.outcome.look_again_at(now), deadline if self.outcome.missing else None]
        known = [when for when in times if when is not None]
        return min(known) if known else None

    def _take(self, until: float | None) -> Signalled | None:
        """Waits for one event, at most `until`, and notes it; a signal is returned."""
        wait_s = None if until is None else max(0.0, until - time.monotonic())
        try:
            event = self.events.get(timeout=wait_s)
        except Empty:
            return None
        if isinstance(event, Signalled):
            return event
        if isinstance(event, StarterEnded):
            event = self._left_alone(event)
        self.outcome = self.outcome.after(event, time.monotonic())
        return None

    def _left_alone(self, ended: StarterEnded) -> Event:
        """A starter that ended before its processes did: its own words are the error."""
        starter, words = ended.running.starter, list(ended.running.words)
        ranks = tuple(rank for rank in starter.ranks if rank not in self.outcome.closed)
        when = "before its processes had started" if set(ranks) & set(self.outcome.missing) else "before its processes"
        first = f"{starter.name} {_how(ended.status)} {when}"
        return Lost(ranks, "\n".join([f"{first}:", *words] if words else [first]))

    def _late(self) -> Verdict:
        missing = [str(self.plan.processes[rank]) for rank in self.outcome.missing]
        named = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        first = f"not started within {self.start_s:g} s: {named}; check those hosts, or give more time with --timeout"
        late = [running for running in self.running if set(running.starter.ranks) & set(self.outcome.missing)]
        words = [f"{running.starter.name}: {word}" for running in late for word in running.words]
        return Verdict(self.outcome.missing[0], None, "\n".join([*words, first]))

    def _alive(self) -> list[Running]:
        return [running for running in self.running if running.process.poll() is None]

    def _stop(self) -> None:
        """Asks everything to end; returns when it has, after STOP_S, or at a second signal."""
        self.stopping = True
        self.hub.order("stop")
        for running in self._alive():
            if any(rank in self.outcome.missing for rank in running.starter.ranks):
                running.signal(signal.SIGTERM)  # it may still be on its way to the host
        if self._until(lambda: self.outcome.over and not self.hub.has_agents(), STOP_S):
            self._until(self._ended, LEAVE_S)

    def leave_nothing(self) -> None:
        """Ends what is still there, at once; harmless when nothing is, or done twice."""
        self.stopping = True
        if not self._ended():
            self.hub.order("kill")
            for running in self._alive():
                running.signal(signal.SIGTERM)
            self._until(self._ended, KILL_S)
        for running in self._alive():
            running.signal(signal.SIGKILL)
            running.process.wait()
        self.hub.close()

    def _ended(self) -> bool:
        """Whether nothing is left, here or on another host: agents leave when all of theirs has ended."""
        return not self._alive() and not self.hub.has_agents()

    def _until(self, done: Callable[[], bool], within_s: float) -> bool:
        """Handles events until `done()`, the deadline, or a signal; whether it is done."""
        deadline = time.monotonic() + within_s
        while not done() and time.monotonic() < deadline:
            if self._take(deadline) is not None:
                break
        return done()

    def _conclude(self, end: Verdict | Signalled | None) -> int:
        """The last words, and the exit status."""
        if end is None:
            self.console.finish()
            return 0
        if isinstance(end, Signalled):
            self.console.finish(f"heturun: ended by {signal.Signals(end.number).name}")
            return 128 + end.number
        process = self.plan.processes[end.rank]
        words = end.message.splitlines() if end.message is not None else self.console.tail(end.rank)
        first = f"heturun: {process} {_how(end.exited)}"
        self.console.finish(f"{first}:" if words else first, *words)
        return end.exited or 1


def run_job(plan: Plan, *, launcher: str, identity: Path | None, timeout_s: float | None, log_dir: Path | None) -> int:
    """Starts the processes of a plan and returns the exit status: 0, the first failing rank's, or 128 + signal."""
    mpirun = choose(launcher, plan)
    with _private_folder() as folder, _signals() as signals:
        routes = find_routes(plan, folder=folder, identity=identity)
        console = Console(plan.processes, log_dir)
        job = Job(plan, routes, console, mpi=mpirun is not None, timeout_s=timeout_s)
        try:
            signals.forward = job.events
            job.spawn(starters(plan, routes, mpirun, port=job.hub.port, folder=folder))
            return job.run()
        finally:
            job.leave_nothing()


def _shell_status(status: int) -> int:
    """The exit status as a shell has it: 128 + number for a signal."""
    return 128 - status if status < 0 else status


def _how(status: int | None) -> str:
    if status is None:
        return "failed"
    with contextlib.suppress(ValueError):
        return f"was ended by signal {status - 128} ({signal.Signals(status - 128).name})"
    return f"exited with status {status}"


class _Signals:
    """Where signals go: into the queue of the job, once there is one."""

    forward: SimpleQueue[Event | StarterEnded] | None = None

    def handle(self, number: int, _: object) -> None:
        if self.forward is None:
            raise SystemExit(128 + number)
        self.forward.put(Signalled(number))


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="heturun-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
