"""The coordinator process: a socket and a timer around the `Director`.

    worker ──DEALER, CURVE──► ROUTER ──► Director.handle ──► answers and pushes ──► ROUTER ──► workers
                                         Director.tick when `next_wake` has come
    launcher ──control channel──► Director.lost

    python -m pipeline.coordination.server --address 10.0.0.1     binds a port there, prints "coordinator 10.0.0.1:4711"

The job's key is in HETURUN_KEY (hexadecimal). Under heturun the port is published as "coordinator". A message is one
frame of compact JSON; what is too long, malformed or of an unknown kind is dropped, and said once on stderr. A worker
that does not read its messages loses them and holds nobody up. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message
from zmq.utils.z85 import encode as z85_encode

from pipeline.cluster.control import STOPPED, Control
from pipeline.cluster.porch import raise_file_limit
from pipeline.cluster.wire import join_address, split_address
from pipeline.coordination.director import Director
from pipeline.coordination.keys import curve_keys
from pipeline.coordination.messages import Malformed
from pipeline.coordination.replies import Outgoing
from pipeline.core.outside import parse_json
from pipeline.errors import CoordinatorLost, UserError

FRAME_BYTES = 1 << 20
BATCH = 256  # messages between two looks at the clock
QUEUED = 1000  # messages to one worker that wait for it to read; more are dropped
SLEEP_S = 1.0  # at most, without looking around
PAUSE_S = 0.5  # oversleeping by more than that means that this process was frozen, not its workers
FAREWELL_MS = 500  # for the last answers to leave
START_S = 20.0  # for a spawned coordinator to say where it listens
_KINDS = 64  # different complaints that are printed

_encode = json.JSONEncoder(separators=(",", ":")).encode
_TURNED_AWAY = zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH


class Coordinator:
    """Binds at once; `run` serves until the job is over.

    Args:
        key: the job's.
        address: of this host, where to listen; nowhere else.

    Raises:
        UserError: this host does not have the address.
    """

    def __init__(self, key: bytes, address: str) -> None:
        self._director = Director(time.monotonic())
        self.on_stopped: Callable[[str], object] | None = None  # called once, when too few pipelines are left
        self._context = zmq.Context()
        self._admitted = curve_keys(key, "client").public
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._context.socket(zmq.ROUTER)
        self._monitor = self._router.get_monitor_socket(_TURNED_AWAY)
        self.address = self._bind(key, address)
        self._notices: deque[tuple[int, str, int | None]] = deque()
        self._complaints: set[str] = set()
        self._wake_end, self._wake = os.pipe()
        self._stdin: int | None = None
        self._parentless = False  # whoever started this is gone
        self._ended = False
        self._fds = [int(sock.get(zmq.FD)) for sock in (self._router, self._zap, self._monitor)]

    def _bind(self, key: bytes, address: str) -> str:
        router = self._router
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = curve_keys(key, "server")
        router.zap_domain = b"coordinator"
        router.router_handover = True  # a worker that connects again keeps its name
        router.maxmsgsize = 2 * FRAME_BYTES  # beyond that its connection is cut; below, it is named
        router.sndhwm = QUEUED
        router.backlog = 1024
        place = _resolve(address)
        router.ipv6 = ":" in place
        try:
            router.bind(f"tcp://{join_address(place, 0)}")
        except zmq.ZMQError as error:
            raise UserError(
                f"the coordinator cannot listen at {address}: {error}; give an address of its host"
            ) from error
        endpoint = router.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        _, port = split_address(endpoint.removeprefix("tcp://"))
        return join_address(place, port)

    def lost(self, pipeline: int, reason: str, incarnation: int | None = None) -> None:
        """The launcher's notice; may be called by any thread."""
        self._notices.append((pipeline, reason, incarnation))
        os.write(self._wake, b"!")

    @property
    def needed(self) -> bool:
        """Whether workers have come and some of them still count on it."""
        return self._director.met and not self._director.over

    def end(self) -> None:
        """Makes `run` return; may be called by any thread."""
        self._ended = True
        os.write(self._wake, b"!")

    def end_with_stdin(self) -> None:
        """Ends when whoever started this closes its stdin and no worker ever came."""
        self._stdin = sys.stdin.fileno()

    def run(self, *, for_ever: bool = False) -> None:
        """Serves until all workers have said bye, or are lost and silent; `for_ever`: until this process is ended."""
        director, expected = self._director, time.monotonic()
        self._admit()  # a socket signals at its descriptor only after having been found empty
        self._notice_strangers()
        while not (self._ended or (director.over and not for_ever)):
            now = time.monotonic()
            if now > expected + PAUSE_S:
                director.paused(now - expected, now)
            drained = self._receive()
            while self._notices:
                pipeline, reason, incarnation = self._notices.popleft()
                self._send(director.lost(pipeline, reason, time.monotonic(), incarnation=incarnation))
            self._send(director.tick(time.monotonic()))
            self._say()
            expected = time.monotonic()
            if drained and (for_ever or not director.over):
                expected += self._sleep()
            self._ended = self._ended or (self._parentless and not director.met)

    def close(self) -> None:
        """Lets the last answers leave."""
        self._router.disable_monitor()
        for sock in (self._monitor, self._zap):
            sock.close(linger=0)
        self._router.close(linger=FAREWELL_MS)
        self._context.term()
        os.close(self._wake)
        os.close(self._wake_end)

    def _receive(self) -> bool:
        """Takes a bounded number of messages in; whether these were all."""
        receive, handle, clock = self._router.recv_multipart, self._director.handle, time.monotonic
        for _ in range(BATCH):
            try:
                frames = receive(zmq.NOBLOCK)
            except zmq.Again:
                return True
            try:
                self._send(handle(frames[0], _decode(frames), clock()))
            except Malformed as error:
                self._complain(f"dropped a message: {error}")
        return False

    def _send(self, outgoing: Outgoing) -> None:
        for worker, message in outgoing:
            try:
                text = _encode(message).encode()
            except RecursionError:  # it could just be read
                self._complain("dropped a message: nested too deeply to be passed on")
                continue
            with contextlib.suppress(zmq.ZMQError):  # EHOSTUNREACH: it went away, and heartbeats will tell
                self._router.send_multipart((worker, text), zmq.NOBLOCK)

    def _sleep(self) -> float:
        """Waits for anything to happen; returns for how long at most.

        The sockets' descriptors tell of changes only, so what is there already must be asked for first.
        """
        wake = self._director.next_wake
        planned = SLEEP_S if wake is None else min(max(wake - time.monotonic(), 0.0), SLEEP_S)
        if int(self._router.get(zmq.EVENTS)) & zmq.POLLIN:
            return 0.0
        watched = [*self._fds, self._wake_end, *([] if self._stdin is None else [self._stdin])]
        ready, _, _ = select.select(watched, [], [], planned)
        if self._fds[1] in ready:
            self._admit()
        if self._fds[2] in ready:
            self._notice_strangers()
        if self._wake_end in ready:
            os.read(self._wake_end, 4096)
        if self._stdin in ready and not os.read(self._stdin or 0, 4096):
            self._stdin = None
            self._parentless = True
        return planned

    def _admit(self) -> None:
        """Answers ZAP requests (RFC 27): our client key, and no other."""
        while True:
            try:
                version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            ours = mechanism == b"CURVE" and [z85_encode(key) for key in credentials] == [self._admitted]
            status, text = (b"200", b"OK") if ours else (b"400", b"not a client of this job")
            self._zap.send_multipart((version, request, status, text, b"", b""))

    def _notice_strangers(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if event["event"] & _TURNED_AWAY:
                self._complain("turned somebody away who does not hold this job's key")

    def _complain(self, text: str) -> None:
        """Prints each kind of complaint once."""
        if text not in self._complaints and len(self._complaints) < _KINDS:
            self._complaints.add(text)
            print(f"coordinator: {text}", file=sys.stderr, flush=True)

    def _say(self) -> None:
        if self._director.stopped is not None and self.on_stopped is not None:
            self.on_stopped(self._director.stopped)
            self.on_stopped = None
        for note in self._director.take_notes():
            print(f"coordinator: {note}", file=sys.stderr, flush=True)


def _decode(frames: list[bytes]) -> dict[str, Any]:
    """The JSON object of a message of two frames: its sender's name and its text."""
    if len(frames) != 2:
        raise Malformed("more than one frame")
    if len(frames[1]) > FRAME_BYTES:
        raise Malformed(f"longer than {FRAME_BYTES} bytes")
    try:
        message = parse_json(frames[1])
    except ValueError:
        raise Malformed("not JSON") from None
    if not isinstance(message, dict):
        raise Malformed("not a JSON object")
    return message


def _resolve(address: str) -> str:
    """The number of an address given as a name; never the loopback's if it has another."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise UserError(f"the coordinator cannot listen at {address}: {error}; give an address of its host") from error
    return next((number for number in found if not number.startswith("127.")), found[0])


def spawn_coordinator(key: bytes, address: str) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a coordinator on this host, for jobs that heturun did not start; returns its process and "host:port".

    It ends when all workers have said bye or are silent.

    Raises:
        CoordinatorLost: it did not start, or did not say in time where it listens.
    """
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name != "HETURUN_CONTROL"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.coordination.server", "--address", address, "--until-eof"],
        env={**kept, "HETURUN_KEY": key.hex(), "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_S)
    words = process.stdout.readline().split() if ready else []
    if len(words) != 2:
        process.kill()
        why = f"ended with status {process.wait()}" if ready else f"said nothing for {START_S:g} s"
        raise CoordinatorLost(f"the coordinator that was started at {address} {why}; see its output above")
    return process, words[1].decode()


def _end_on_signals(coordinator: Coordinator) -> None:
    """Ended from outside while workers still need it, it has failed them."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number if coordinator.needed else 0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _watch(coordinator: Coordinator, message: dict[str, Any]) -> None:
    """A push of the launcher's; of what another version of it says, nothing is understood here."""
    pipeline, incarnation = message.get("pipeline"), message.get("incarnation")
    if message.get("type") == "lost" and isinstance(pipeline, int) and isinstance(incarnation, int | None):
        coordinator.lost(pipeline, str(message.get("message")), incarnation)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves the workers of one job; the job's key is in HETURUN_KEY.")
    parser.add_argument("--address", default=os.environ.get("HETURUN_ADDRESS") or "127.0.0.1", help="where to listen")
    parser.add_argument("--until-eof", action="store_true", help="end when stdin is closed before any worker came")
    options = parser.parse_args()
    raise_file_limit()
    coordinator = Coordinator(bytes.fromhex(os.environ["HETURUN_KEY"]), options.address)
    _end_on_signals(coordinator)
    if options.until_eof:
        coordinator.end_with_stdin()
    control = Control.from_environment(on_push=lambda message: _watch(coordinator, message))
    if control is not None:
        control.publish("coordinator", coordinator.address)
        coordinator.on_stopped = partial(control.publish, STOPPED)
    else:
        print(f"coordinator {coordinator.address}", flush=True)
    coordinator.run(for_ever=control is not None)  # the launcher ends it: who comes back late hears that all is over
    coordinator.close()
    if control is not None:
        control.close()


if __name__ == "__main__":
    main()
