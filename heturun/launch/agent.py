"""What the launcher starts on every host: it runs the command, carries its output home and lets nothing outlive it.

    launcher <=== control channel ===> agent ---- the command, in a session of its own
                                         |------- (over ssh and here: one agent per host; under mpirun: one per rank)
    The connection breaks, "stop" arrives, mpirun says SIGTERM  ->  SIGTERM, GRACE_S later SIGKILL, for the whole group.

Needs the standard library only. It spawns from its main thread, for the kernel's "die with your parent" counts threads.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple

from heturun.launch import hosts, tidy
from heturun.launch.outbox import Outbox
from pipeline.cluster import cores, wire
from pipeline.cluster.edition import introduction

GRACE_S = 2.0  # between SIGTERM and SIGKILL
MPIRUN_GRACE_S = 0.4  # mpirun itself sends SIGKILL a second after its SIGTERM
LAST_WORDS_S = 0.3  # a rank that calls MPI_Abort is given this long to end with its own status
DRAIN_S = 0.5  # output is awaited this long after a process ended; a grandchild may hold the pipe open
LOOPBACK = "127.0.0.1"  # what the launcher says when no other host takes part
LONGEST_LINE_BYTES = 1 << 16
CONNECT_S = 20.0
FAREWELL_S = 5.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Ended(NamedTuple):
    """A process ended (`status` as Popen has it), or its last output was sent (`status` None)."""

    rank: int
    status: int | None


class Order(NamedTuple):
    """End the processes: "stop" or "kill" from the launcher, "lost" launcher, "signal" from whoever started us."""

    what: str
    ranks: frozenset[int] | None = None  # None: all


class Child:
    """One rank's process and the threads that read its output and wait for it."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.process = rank, process
        self.killed = False
        self.kill_at: float | None = None

    def signal(self, number: int) -> None:
        """Signals the whole group, even after its leader ended."""
        for signum in (number, signal.SIGCONT):  # a stopped process would sit on its SIGTERM
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signum)


class Agent:
    """Carries out one start message; `run` returns when every process has ended and was reported."""

    def __init__(self, channel: wire.Channel, address: str, key: str, *, lost_s: int) -> None:
        self.channel, self.address, self.key, self.lost_s = channel, address, key, lost_s
        self.outbox = Outbox(channel.send)
        self.events: SimpleQueue[Ended | Order] = SimpleQueue()
        self.children: dict[int, Child] = {}
        self.open: set[int] = set()  # ranks whose last word is not yet sent
        self.gone = threading.Event()  # the launcher
        self.abandoned = False  # the launcher went away before the processes had ended

    def run(self, start: wire.Message) -> None:
        changes = {
            **start["env"],
            "HETURUN_CONTROL": self.address,
            "HETURUN_KEY": self.key,
            "HETURUN_LOST_AFTER": str(self.lost_s),
            "HETURUN_ADDRESS": advertised_address(start["address"], start["interface"], self.channel.own_address),
        }
        begin = partial(_begin, start.get("ignored", ()))
        for process in start["processes"]:
            self._spawn(process, start["directory"], changes, begin)
        self.outbox.start()
        for child in self.children.values():  # threads only now: a fork beside running threads is unsafe
            threading.Thread(target=self._follow, args=(child,), daemon=True).start()
        listener = threading.Thread(target=self._obey, daemon=True)
        listener.start()
        while self.open:
            self._handle(self._next_event())
        self.outbox.finish(self.gone)
        self.abandoned = self.gone.is_set()
        self.channel.finish()
        listener.join(FAREWELL_S)  # leaving with something unread would cut off what was just sent

    def _next_event(self) -> Ended | Order:
        """What happened, or that the time of some processes is up."""
        ends = {rank: child.kill_at for rank, child in self._living().items() if child.kill_at is not None}
        first = min(ends.values(), default=None)
        try:
            return self.events.get(timeout=None if first is None else max(0.0, first - time.monotonic()))
        except Empty:
            return Order("kill", frozenset(rank for rank, end in ends.items() if end == first))

    def _handle(self, event: Ended | Order) -> None:
        if isinstance(event, Order):
            self._end(event)
        elif event.status is None:
            self.open.discard(event.rank)
            self.outbox.put({"type": "closed", "rank": event.rank})
        else:
            status = 128 - event.status if event.status < 0 else event.status
            killed = self.children[event.rank].killed
            self.outbox.put({"type": "exit", "rank": event.rank, "status": status, "killed": killed})

    def _living(self) -> dict[int, Child]:
        """The processes that were started and are not through."""
        return {rank: child for rank, child in self.children.items() if rank in self.open}

    def _end(self, order: Order) -> None:
        """SIGTERM first, SIGKILL for whoever is still there later."""
        if order.what == "signal":
            self._wait_for_last_words()
        grace_s = MPIRUN_GRACE_S if order.what == "signal" else GRACE_S
        for rank, child in self._living().items():
            if order.ranks is None or rank in order.ranks:
                child.killed = child.killed or child.process.poll() is None
                child.signal(signal.SIGKILL if order.what == "kill" else signal.SIGTERM)
                child.kill_at = None if order.what == "kill" else time.monotonic() + grace_s

    def _wait_for_last_words(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline and any(c.process.poll() is None for c in self.children.values()):
            time.sleep(0.01)

    def _spawn(
        self, spec: wire.Message, directory: str, changes: dict[str, str | None], begin: Callable[[], None]
    ) -> None:
        rank = int(spec["rank"])
        self.open.add(rank)
        try:
            process = subprocess.Popen(
                spec["command"],
                cwd=directory,
                env=with_threads(_merged({**changes, **spec["env"]})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=begin,
            )
        except OSError as error:
            self._refuse(rank, _why_not_started(error, spec["command"], directory))
            return
        self.children[rank] = Child(rank, process)
        self.outbox.put({"type": "started", "rank": rank, "pid": process.pid})

    def _refuse(self, rank: int, why: str) -> None:
        """A command that cannot be started: as a shell says it, status 127."""
        self.outbox.put({"type": "output", "rank": rank, "stream": "stderr", "lines": [why]})
        self.outbox.put({"type": "exit", "rank": rank, "status": 127, "killed": False})
        self.events.put(Ended(rank, None))

    def _follow(self, child: Child) -> None:
        """Reads both streams, waits for the process, and makes sure that nothing of its group stays."""
        streams = {"stdout": child.process.stdout, "stderr": child.process.stderr}
        readers = [
            threading.Thread(target=self._carry, args=(child.rank, *item), daemon=True) for item in streams.items()
        ]
        for reader in readers:
            reader.start()
        self.events.put(Ended(child.rank, child.process.wait()))
        deadline = time.monotonic() + DRAIN_S
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        child.signal(signal.SIGKILL)
        for reader in readers:
            reader.join(DRAIN_S)
        self.events.put(Ended(child.rank, None))

    def _carry(self, rank: int, stream: str, pipe: IO[bytes]) -> None:
        for lines in whole_lines(pipe):
            self.outbox.put({"type": "output", "rank": rank, "stream": stream, "lines": lines})

    def _obey(self) -> None:
        while (message := self.channel.receive()) is not None:
            if message["type"] == "took":
                self.outbox.took()
                continue
            ranks = message.get("ranks")
            self.events.put(Order(str(message["type"]), None if ranks is None else frozenset(ranks)))
        self.gone.set()
        self.events.put(Order("lost"))


def _merged(changes: dict[str, str | None]) -> dict[str, str]:
    """This host's environment, changed as the launcher says; None takes a variable away."""
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


def with_threads(env: dict[str, str]) -> dict[str, str]:
    """A process's environment with its share of this host's cores as OMP_NUM_THREADS, unless the user has set that.

    Only the host itself knows its cores. The coordinator, which is none of the host's workers, gets one thread.
    """
    workers = env.get("LOCAL_WORLD_SIZE")
    threads = 1 if workers is None else cores.own_share(int(workers))
    return {"OMP_NUM_THREADS": str(threads), **env}


def whole_lines(pipe: IO[bytes]) -> Iterator[list[str]]:
    """The text of a pipe as lists of whole lines, as soon as they are there.

    Of a line that was overwritten with carriage returns the last state is kept; one that grows beyond 64 KiB is cut.
    """
    rest = b""
    while chunk := os.read(pipe.fileno(), 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LONGEST_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        if lines:
            yield [_text(line) for line in lines]
    if rest:
        yield [_text(rest)]


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def advertised_address(address: str | None, interface: str | None, connected: str) -> str:
    """The address that this host's processes tell to other hosts: its interface's, as configured, or the one that
    leads to the launcher."""
    if interface is not None:
        return interface_address(interface)
    found = hosts.resolve(address) if address is not None else None
    if found is not None and (address == LOOPBACK or not found.is_loopback):  # its own name may well mean 127.0.1.1
        return str(found)
    return connected


def interface_address(interface: str) -> str:
    """The first IPv4 address of a network interface, else its first IPv6 address that is not link-local."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        answer = fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, name = line.split()
        if name == interface and scope == "00":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    names = ", ".join(name for _, name in socket.if_nameindex())
    raise ValueError(
        f"interface {interface}: no address on {socket.gethostname()}, which has {names}; correct `interface`"
    )


def _why_not_started(error: OSError, command: list[str], directory: str) -> str:
    host = socket.gethostname()
    if not os.path.isdir(directory):
        return f"heturun: {host} has no directory {directory}; make the working directory the same on every host"
    return f"heturun: cannot start {command[0]!r} on {host}: {error.strerror}; is it on the PATH of every host?"


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel ends the process, politely, when the thread that started it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _begin(ignored: Sequence[int]) -> None:
    """For `preexec_fn`: a worker ends at once with its agent, and ignores what the launcher was told to ignore."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def _sweep() -> None:
    """Ends what moved itself into another session: as their sub-reaper this process has become their parent."""
    for _ in range(100):
        children = [int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m heturun.launch.agent", description=__doc__)
    parser.add_argument("--connect", required=True, help="address of the launcher")
    parser.add_argument("--ranks", required=True, help="ranks to run here, e.g. 0,3")
    parser.add_argument("--lost-after", type=int, default=wire.LOST_S, help="seconds of silence that end a connection")
    parser.add_argument("--incarnation", type=int, default=0, help="how often they were started again")
    parser.add_argument("--folder", help="the job's private directory here, to be removed if the launcher cannot")
    parser.add_argument("--key-on-stdin", action="store_true", help="read the job's key from stdin, not HETURUN_KEY")
    parser.add_argument("--key-file", help="read it from this file, and remove the file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Connects, asks for its processes, runs them. Their exit statuses go to the launcher, not into this one's."""
    options = _arguments(argv)
    starter = os.getppid()
    try:
        key = _key(options)
        channel = wire.connect(options.connect, bytes.fromhex(key), timeout_s=CONNECT_S, lost_s=options.lost_after)
    except OSError as error:
        print(
            f"heturun: {socket.gethostname()} cannot reach the launcher at {options.connect}: {error}; "
            "open that way in the firewall, or set `interface` of the launching host in the cluster file",
            file=sys.stderr,
        )
        return 1
    agent = Agent(channel, options.connect, key, lost_s=options.lost_after)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:  # SIGTERM is ours: PDEATHSIG
            signal.signal(number, lambda *_: agent.events.put(Order("signal")))
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # mpirun or the ssh session may end without a word
    ranks = [int(rank) for rank in options.ranks.split(",")]
    channel.send({"type": "agent", "ranks": ranks, "incarnation": options.incarnation, **introduction()})
    start = channel.receive()
    if start is None or start["type"] != "start":
        return 1  # the launcher ended, or stops, before this agent had begun
    try:
        _run(agent, start, options, starter)
    except ValueError as error:
        channel.send({"type": "broken", "message": f"heturun: {error}"})
        channel.finish()
        return 1
    finally:
        if agent.abandoned and options.folder is not None and not tidy.is_needed():
            tidy.remove(options.folder)
    return 0


def _key(options: argparse.Namespace) -> str:
    """The job's key; a file with it is removed, for others have one each.

    Raises:
        OSError: there is no such file.
    """
    if options.key_file is not None:
        key = Path(options.key_file).read_text().strip()
        os.unlink(options.key_file)
        return key
    return sys.stdin.readline().strip() if options.key_on_stdin else os.environ["HETURUN_KEY"]


def _run(agent: Agent, start: wire.Message, options: argparse.Namespace, starter: int) -> None:
    """Nothing stays that the processes have started, nor what Open MPI has made for them."""
    if not tidy.is_needed():
        _run_swept(agent, start)
        return
    estate = tidy.make_estate(starter, options.folder, far=options.key_file is not None)
    heir = tidy.Heir(estate.settle)  # also if this agent is killed, or raises
    _run_swept(agent, {**start, "env": {**estate.variables, **start["env"]}})
    if not agent.abandoned:
        estate.remove_segments()
        heir.dismiss()


def _run_swept(agent: Agent, start: wire.Message) -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # from now on orphans are ours; an heir is not
    try:
        agent.run(start)
    finally:
        _sweep()


def _load_libc() -> Any:
    try:
        return ctypes.CDLL(None) if sys.platform == "linux" else None
    except OSError:
        return None


_LIBC = _load_libc()  # loaded before any fork


if __name__ == "__main__":
    sys.exit(main())
