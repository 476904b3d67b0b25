"""Whoever does not hold the job's key: reads nothing of what is sent, changes nothing, and is in nobody's way."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from heturun import porch, wire
from heturun.control import Control
from heturun.hub import Hub
from heturun.outcome import Event
from heturun.porch import Porch
from heturun.seal import SEAL_BYTES, Sealer

KEY = b"k" * 32
SECRET = "hf_abcdefghijklmnop"


def pair(direction: bytes = b"c", nonces: bytes = b"n") -> tuple[Sealer, Sealer]:
    """Both ends of one direction."""
    return Sealer(KEY, direction, nonces), Sealer(KEY, direction, nonces)


@pytest.mark.parametrize("text", [b"", b"x", b"\0" * 100, os.urandom(100_000)], ids=len)
def test_what_was_sealed_opens_again(text: bytes) -> None:
    here, there = pair()
    for _ in range(2):
        sealed = here.close(text)
        assert len(sealed) == len(text) + SEAL_BYTES
        assert there.open(sealed) == text


def test_equal_texts_look_different_every_time_and_on_every_connection_and_way() -> None:
    ways = [Sealer(KEY, direction, nonces) for direction in (b"c", b"s") for nonces in (b"1", b"2")]
    sealed = [way.close(b"\0" * 64)[SEAL_BYTES:] for way in ways for _ in range(3)]
    assert len(set(sealed)) == len(sealed) == 12
    assert b"\0" * 8 not in b"".join(sealed)


def test_a_message_that_was_changed_repeated_left_out_or_sent_back_does_not_open() -> None:
    here, there = pair()
    first, second = here.close(b"first"), here.close(b"second")
    with pytest.raises(ValueError, match="changed"):
        there.open(second)  # the first was left out
    for bad in (first[:-1] + bytes([first[-1] ^ 1]), bytes([first[0] ^ 1]) + first[1:], first[:10], b""):
        with pytest.raises(ValueError, match="changed"):
            pair()[1].open(bad)
    with pytest.raises(ValueError, match="changed"):
        Sealer(KEY, b"s", b"n").open(first)  # sent back to its sender
    _, there = pair()
    assert there.open(first) == b"first"
    with pytest.raises(ValueError, match="changed"):
        there.open(first)


@contextmanager
def hub(deliver: list[Event] | None = None) -> Iterator[Hub]:
    """A launcher's end without agents."""
    events = [] if deliver is None else deliver
    made = Hub(KEY, only_here=True, start=lambda ranks, incarnation: {}, deliver=events.append)
    made.serve()
    try:
        yield made
    finally:
        made.close()


class Wiretap:
    """Passes one connection on and keeps every byte of both ways; when it `spoils`, the last of them are changed."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.heard = self._listener.getsockname()[1], bytearray()
        self._onward, self.spoils = port, False
        threading.Thread(target=self._tap, daemon=True).start()

    def _tap(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._onward))
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        while part := one.recv(1 << 16):
            self.heard += part
            other.sendall(part[:-1] + bytes([part[-1] ^ 1]) if self.spoils else part)
        other.shutdown(socket.SHUT_RDWR)


def test_values_cross_the_control_channel_unread() -> None:
    with hub() as launcher:
        tap = Wiretap(launcher.port)
        control = Control(f"127.0.0.1:{tap.port}", KEY.hex(), 0)
        control.publish("the password", SECRET)
        assert control.lookup("the password", timeout_s=20) == SECRET
        control.close()
    assert len(tap.heard) > 200
    for word in (SECRET, "password", "publish", "process", KEY.hex()):
        assert tap.heard.count(word.encode()) == 0


def test_a_connection_whose_bytes_are_changed_ends() -> None:
    with hub() as launcher:
        tap = Wiretap(launcher.port)
        control = Control(f"127.0.0.1:{tap.port}", KEY.hex(), 0)
        control.publish("a", "b")
        assert control.lookup("a", timeout_s=20) == "b"
        tap.spoils = True
        with pytest.raises(ConnectionError, match="went away"):
            control.lookup("a", timeout_s=20)


def test_twelve_hundred_connections_that_say_nothing_hinder_nobody() -> None:
    porch.raise_file_limit()
    with hub() as launcher, ExitStack() as silent:
        threads = threading.active_count()
        for _ in range(1200):
            silent.enter_context(socket.create_connection(("127.0.0.1", launcher.port), timeout=20))
        control = Control(f"127.0.0.1:{launcher.port}", KEY.hex(), 0)
        control.publish("still", "here")
        assert control.lookup("still", timeout_s=20) == "here"
        assert threading.active_count() - threads <= porch.ROOM + 20
        control.close()


def test_the_oldest_has_to_go_when_the_porch_is_full() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as callers:
        waiting = Porch(listener, room=2)
        arrivals = waiting.arrivals()
        clients, inside = [], []
        for _ in range(3):
            clients.append(callers.enter_context(socket.create_connection(listener.getsockname(), timeout=20)))
            inside.append(callers.enter_context(next(arrivals)))
        assert clients[0].recv(1) == b""
        assert waiting.admit(inside[0], KEY) is None
        for client in clients[1:]:
            client.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.recv(1)
        waiting.close()
        assert list(arrivals) == []


class OutOfFiles:
    """A listening socket that cannot accept for want of descriptors until somebody has hung up."""

    def __init__(self, free: threading.Event) -> None:
        self.free, self.calls = free, 0

    def accept(self) -> tuple[socket.socket, object]:
        self.calls += 1
        if self.calls > 1 and not self.free.is_set():
            raise OSError(errno.EMFILE, "Too many open files")
        ours, theirs = socket.socketpair()
        threading.Thread(target=lambda: (theirs.recv(1), self.free.set()), daemon=True).start()
        return ours, None


def test_accepting_goes_on_when_files_have_run_out_and_the_oldest_makes_room() -> None:
    listener = OutOfFiles(threading.Event())
    arrivals = Porch(listener).arrivals()  # type: ignore[arg-type]
    with next(arrivals), next(arrivals):
        assert listener.free.is_set()
        assert listener.calls >= 3


def test_a_handshake_has_one_deadline_however_slowly_its_bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.3)
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            theirs.send(b"x")

    threading.Thread(target=drip, daemon=True).start()
    since = time.monotonic()
    assert wire.admit(ours, KEY) is None
    assert time.monotonic() - since < 2.0  # 64 bytes take 3.2 s
    over.set()
