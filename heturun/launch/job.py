"""Runs one job: starts it, listens to it, and ends it, whatever happens.

start ---> events ---> over, or a verdict, or a signal ---> "stop" to all agents ---> (STOP_S) "kill" ---> last words
            |    ^
            +----+  orders of an elastic job: end one pipeline, start it again; and the coordinator, when it is wanted
One Ctrl-C is a signal; a second one goes to "kill" at once.
"""

from __future__ import annotations

import contextlib
import os
import re
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

from heturun.launch.agent import die_with_parent
from heturun.launch.console import Console
from heturun.launch.fleet import COORDINATOR, Fleet, GiveUp, Gone, Loss, Order, Rules, Tell, TooFew
from heturun.launch.hub import Hub
from heturun.launch.mpi import Mpirun, cause_last
from heturun.launch.mpi import environment as mpi_environment
from heturun.launch.outcome import Event, Joined, Lost, Output, Progress, Published, Signalled, Verdict, Wanted
from heturun.launch.processes import Plan
from heturun.launch.starters import Routes, Starter, Starters, choose, environment, find_routes, start_message, tied
from pipeline.cluster.wire import Message

START_S = 60.0  # for all processes to check in, unless --timeout says otherwise
STOP_S = 3.5  # from "stop" to "kill"; agents themselves send SIGKILL 2 s after SIGTERM
KILL_S = 1.0  # from "kill" to leaving
LEAVE_S = 0.5  # for mpirun or ssh to end after its agents, unless the way to their host is cut
FINISH_S = 10.0  # for mpirun to end after its processes did
WORDS = 200  # lines of a starter that are kept
CHECKPOINT = "last checkpoint"  # under this key the workers publish its path
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StarterEnded(NamedTuple):
    """mpirun, ssh or a local agent ended; `status` as Popen has it."""

    running: Running
    status: int


@dataclass(eq=False)
class Running:
    """A starter that was started, and its last words. `told`: to end, by us."""

    starter: Starter
    process: subprocess.Popen[bytes]
    words: deque[str] = field(default_factory=lambda: deque(maxlen=WORDS))
    told: bool = False

    def signal(self, number: int) -> None:
        self.told = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it and what it has started: mpirun would leave an ssh behind that waits for a host that is gone."""
        others = _session(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in others:  # agents among them still tidy up
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


class Job:
    """The events of one job and what follows from them.

    Args:
        mpirun: None for plain processes. folder: a private directory.
    """

    def __init__(
        self, plan: Plan, routes: Routes, console: Console, *, mpirun: Mpirun | None, folder: Path, rules: Rules
    ) -> None:
        self.plan, self.console, self.rules = plan, console, rules
        self.key = secrets.token_bytes(32)
        told = start_message(plan, routes, {} if mpirun is None else mpi_environment())
        ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]

        def start(ranks: Sequence[int], incarnation: int) -> Message:
            return {**told(ranks, incarnation), "ignored": ignored}

        self.hub = Hub(self.key, only_here=routes.only_here, lost_s=plan.lost_s, start=start, deliver=self.deliver)
        self.starters = Starters(plan, routes, mpirun, self.hub.port, folder)
        self.events: SimpleQueue[Event | StarterEnded] = SimpleQueue()
        ranks = [[process.rank for process in pipeline] for pipeline in plan.pipelines()]
        self.fleet = Fleet.of(ranks, coordinator=plan.coordinator.rank, rules=rules, least=plan.least_replicas)
        console.on_broken = self._nobody_reads
        self.running: list[Running] = []
        self.speaking: set[tuple[int, int]] = set()  # ranks and incarnations whose agents may have more to say
        self.ended: list[StarterEnded] = []  # starters that are believed when these have said it
        self.coordinator_started = self.stopping = False
        self.checkpoint: str | None = None

    def deliver(self, event: Event) -> None:
        """Takes an event from the hub, on any thread."""
        if isinstance(event, Output):
            self.console.output(event)
        elif isinstance(event, Progress):
            self.console.progress(event)
        else:
            self.events.put(event)

    def _nobody_reads(self) -> None:
        if not self.stopping:
            self.events.put(Signalled(signal.SIGPIPE))

    def start(self) -> None:
        """Starts the workers; on the main thread and before any other exists, as `die_with_parent` needs."""
        for starter in self.starters.first():
            self._spawn(starter, starter.argv, die_with_parent)

    def _start_more(self, *more: Starter) -> None:
        """Starts something when the launcher has threads; on the main thread, whose end the kernel watches."""
        for starter in more:
            running = self._spawn(starter, tied(starter.argv), None)
            threading.Thread(target=self._watch, args=(running,), daemon=True).start()

    def _spawn(self, starter: Starter, argv: Sequence[str], preexec: Callable[[], None] | None) -> Running:
        process = subprocess.Popen(
            argv,
            env=environment(os.environ, self.key.hex()),
            stdin=subprocess.PIPE if starter.key_on_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches the launcher alone
            preexec_fn=preexec,
        )
        running = Running(starter, process)
        self.running.append(running)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its exit tells
                process.stdin.write(f"{self.key.hex()}\n".encode())
                process.stdin.flush()
        return running

    def run(self) -> int:
        """From the first event to the last word; the exit status."""
        for running in self.running:
            threading.Thread(target=self._watch, args=(running,), daemon=True).start()
        self.hub.serve()
        end = self._until_something_ends_it()
        if end is None:
            self.stopping = True
            self.hub.order("stop")  # the coordinator, for everybody else has ended
            self._until(lambda: all(self._is_lost(running) for running in self._alive()), FINISH_S)
        else:
            self._stop()
        self.leave_nothing()
        return self._conclude(end)

    def _watch(self, running: Running) -> None:
        """Keeps what a starter itself has to say, for it matters only if the start fails, and tells that it ended."""
        assert running.process.stdout is not None
        for raw in running.process.stdout:
            line = raw.decode(errors="replace").rstrip().strip("\0")
            running.words.append(line)
        self.events.put(StarterEnded(running, running.process.wait()))

    def _until_something_ends_it(self) -> Verdict | TooFew | Signalled | None:
        """None when every process ended well."""
        deadline = time.monotonic() + self.rules.start_s
        while True:
            now = time.monotonic()
            self.fleet, orders = self.fleet.orders(now)
            for order in orders:
                self._carry_out(order)
            verdict = self.fleet.verdict(now)
            if verdict is not None:
                return verdict
            if self.fleet.over:
                return None
            if self.fleet.missing and now >= deadline:
                return self._late()
            signalled = self._take(self._next_look(now, deadline))
            if signalled is not None:
                return signalled

    def _next_look(self, now: float, deadline: float) -> float | None:
        """When to look again, though nothing may have happened."""
        times = [self.fleet.look_again_at(now), deadline if self.fleet.missing else None]
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
            self.ended.append(event)
        else:
            self._note(event)
        self._believe_what_ended()
        return None

    def _note(self, event: Event) -> None:
        if isinstance(event, Joined):
            self.speaking.update((rank, event.incarnation) for rank in event.ranks)
        elif isinstance(event, Lost):
            self.speaking.difference_update((rank, event.incarnation) for rank in event.ranks)
        elif isinstance(event, Published) and event.key == CHECKPOINT:
            self.checkpoint = event.value
        elif isinstance(event, Wanted) and event.key == COORDINATOR:
            self._start_coordinator()
        self.fleet = self.fleet.after(event, time.monotonic())

    def _believe_what_ended(self) -> None:
        """Starters whose agents have said all they had to say; this launcher may have slept, and not yet read it."""
        for event in list(self.ended):
            starter = event.running.starter
            if not any((rank, starter.incarnation) in self.speaking for rank in starter.ranks):
                self.ended.remove(event)
                self.fleet = self.fleet.after(self._left_alone(event), time.monotonic())

    def _start_coordinator(self) -> None:
        """Once, when the first process asks for it."""
        if not self.coordinator_started and not self.stopping:
            self.coordinator_started = True
            self.console.add(self.plan.coordinator)
            self._start_more(self.starters.coordinator())

    def _carry_out(self, order: Order) -> None:
        """Does what an elastic job's losses ask for; the coordinator is told first, for the other pipelines wait."""
        pipeline = self.plan.pipelines()[order.pipeline]
        number, ranks = pipeline[0].pipeline, [process.rank for process in pipeline]
        if isinstance(order, Tell):
            told = {"type": "lost", "pipeline": number, "incarnation": order.incarnation, "message": order.message}
            self.hub.push(self.plan.coordinator.rank, told)
        elif isinstance(order, GiveUp):
            self.console.say(f"pipeline {number} is lost: {self._why(order.verdict)}; {_go_on(order.left)}")
            self.hub.give_up(ranks, order.incarnation)
            self._dismiss(lambda starter: bool(self.fleet.unstarted(starter.ranks, starter.incarnation)), ranks)
        elif isinstance(order, Gone):
            self._dismiss(lambda starter: not self.fleet.open(starter.ranks, starter.incarnation), ranks)
        else:
            allowed = self.rules.max_restarts
            self.console.say(f"pipeline {number} starts again ({order.incarnation} of {allowed} restarts)")
            self._start_more(*self.starters.again(pipeline, order.incarnation))

    def _dismiss(self, condition: Callable[[Starter], bool], ranks: Sequence[int]) -> None:
        """Ends starters of these ranks: they may still be on their way to the host, or not notice that it is gone."""
        for running in self._alive():
            if set(running.starter.ranks) & set(ranks) and condition(running.starter):
                running.signal(signal.SIGTERM)

    def _why(self, verdict: Verdict) -> str:
        """A failure in one line, for example "rank 4 (w0, stage 0, pipeline 2) exited with status 1 (KeyError: 7)"."""
        words = [line for line in self._words(verdict) if line.strip()]
        return f"{self._who(verdict)} {_how(verdict.exited)}" + (f" ({words[-1].strip()})" if words else "")

    def _who(self, verdict: Verdict) -> str:
        coordinator = self.plan.coordinator
        return str(coordinator if verdict.rank == coordinator.rank else self.plan.processes[verdict.rank])

    def _words(self, verdict: Verdict) -> list[str]:
        return verdict.message.splitlines() if verdict.message is not None else self.console.tail(verdict.rank)

    def _left_alone(self, ended: StarterEnded) -> Event:
        """A starter that ended before its processes did: its own words are the error.

        One that a signal ended, and not ours, has taken its processes along, even if its agents still ended them.
        """
        starter, words = ended.running.starter, cause_last(ended.running.words)
        status = _shell_status(ended.status)
        taken = ended.status < 0 and not ended.running.told
        ranks = starter.ranks if taken else self.fleet.open(starter.ranks, starter.incarnation)
        unstarted = self.fleet.unstarted(ranks, starter.incarnation)
        when = "before its processes had started" if unstarted else "before its processes"
        first = f"{starter.name} {_how(status)} {when}"
        if words and self.fleet.elastic is not None:  # a line will do, for the job goes on
            first, words = f"{first}: {words[-1]}", []
        text = "\n".join([f"{first}:", *words] if words else [first])
        return Lost(ranks, text, starter.incarnation, status if taken else None)

    def _late(self) -> Verdict:
        missing = [str(self.plan.processes[rank]) for rank in self.fleet.missing]
        named = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        first = (
            f"not started within {self.rules.start_s:g} s: {named}; check those hosts, or give more time with --timeout"
        )
        late = [running for running in self.running if set(running.starter.ranks) & set(self.fleet.missing)]
        words = [f"{running.starter.name}: {word}" for running in late for word in cause_last(running.words)]
        return Verdict(self.fleet.missing[0], None, "\n".join([*words, first]))

    def _alive(self) -> list[Running]:
        return [running for running in self.running if running.process.poll() is None]

    def _stop(self) -> None:
        """Asks everything to end; returns when it has, after STOP_S, or at a second signal."""
        self.stopping = True
        self.hub.order("stop")
        for running in self._alive():
            if self.fleet.unstarted(running.starter.ranks, running.starter.incarnation):
                running.signal(signal.SIGTERM)  # it may still be on its way to the host
        if self._until(lambda: self.fleet.closed and not self.hub.has_agents(), STOP_S):
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
            running.kill()
        self.hub.close()

    def _is_lost(self, running: Running) -> bool:
        """Whether nobody waits for a starter: it may be on a host that is gone."""
        return self.fleet.has_lost(running.starter.ranks, running.starter.incarnation)

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

    def _conclude(self, end: Verdict | TooFew | Signalled | None) -> int:
        """The last words, and the exit status."""
        if end is None:
            self.console.finish(*self._summary(), give_up=self._interrupted)
            return 128 + signal.SIGPIPE if self.console.broken else 0
        if isinstance(end, Signalled):
            self.console.finish(
                f"heturun: ended by {signal.Signals(end.number).name}", idle_s=LEAVE_S, give_up=self._interrupted
            )
            return 128 + end.number
        verdict = end.first if isinstance(end, TooFew) else end
        words = self._words(verdict)
        first = f"heturun: {self._who(verdict)} {_how(verdict.exited)}"
        last = [f"{first}:" if words else first, *words, *self._too_few(end)]
        self.console.finish(*last, give_up=self._interrupted)
        if isinstance(end, TooFew):
            return 1 if end.left else verdict.exited or 1
        return 1 if end.rank == self.plan.coordinator.rank else end.exited or 1

    def _interrupted(self) -> bool:
        """Whether a signal came since the job has ended; nothing else is of interest any more."""
        with contextlib.suppress(Empty):
            while True:
                if isinstance(self.events.get_nowait(), Signalled):
                    return True
        return False

    def _too_few(self, end: Verdict | TooFew) -> list[str]:
        """The sentence with which a job ends that has lost too many pipelines."""
        if isinstance(end, Verdict):
            return []
        checkpoint = f"last checkpoint: {self.checkpoint or 'none was written'}"
        if end.left == 0:
            return [f"heturun: all replicas of stage 0 are gone; {checkpoint}"]
        left = f"{end.left} pipeline{'s are' if end.left > 1 else ' is'} left"
        return [f"heturun: {left}, --min-replicas asks for {end.wanted}; {checkpoint}"]

    def _summary(self) -> list[str]:
        """What an elastic job that ended well has lost on the way."""
        lost = "; ".join(self._summary_of(loss) for loss in self.fleet.losses)
        return [f"heturun: the job ended well, though it lost {lost}"] if lost else []

    def _summary_of(self, loss: Loss) -> str:
        again = ", and started it again" if self.fleet.pipelines[loss.pipeline].incarnation > loss.incarnation else ""
        number = self.plan.pipelines()[loss.pipeline][0].pipeline
        return f"pipeline {number} ({self._why(loss.verdict)}){again}"


def run_job(
    plan: Plan,
    *,
    launcher: str,
    identity: Path | None,
    timeout_s: float | None,
    log_dir: Path | None,
    min_replicas: int | None = None,
    max_restarts: int = 0,
) -> int:
    """Starts the processes of a plan and returns the exit status: 0, the first failing rank's, or 128 + signal."""
    rules = Rules(min_replicas, max_restarts, START_S if timeout_s is None else timeout_s)
    mpirun = choose(launcher, plan)
    with _private_folder() as folder, _signals() as signals:
        routes = find_routes(plan, folder=folder, identity=identity)
        console = Console(plan.processes, log_dir)
        job = Job(plan, routes, console, mpirun=mpirun, folder=folder, rules=rules)
        console.say(*plan.notes)
        try:
            signals.forward = job.events
            job.start()
            return job.run()
        finally:
            job.leave_nothing()


def _shell_status(status: int) -> int:
    """The exit status as a shell has it: 128 + number for a signal."""
    return 128 - status if status < 0 else status


def _session(leader: int) -> list[int]:
    """The processes of a session; none where the system does not list processes as Linux does."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = entry.read_bytes().rpartition(b")")[2].split()  # state, parent, group, session, ...
            found += [int(entry.parent.name)] if int(fields[3]) == leader else []
    return found


def _go_on(left: int) -> str:
    return f"{left or 'no'} pipeline{' goes' if left == 1 else 's go'} on"


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
    """Those that are ignored, as SIGHUP is under nohup, stay ignored; Python calls a handler of C's None."""
    signals = _Signals()
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signals.handle) for number in heard}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Of this job, for files; where the user's temporary directory has a name that mpirun would cut in two, in /tmp."""
    simple = re.fullmatch(r"[\w./+-]*", tempfile.gettempdir(), re.ASCII)
    folder = Path(tempfile.mkdtemp(prefix="heturun-", dir=None if simple else "/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
