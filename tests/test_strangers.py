"""Whoever does not hold the job's key: reads nothing of what is sent, changes nothing, and is in nobody's way."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from heturun_jobs import clean_environment, heturun, program

from heturun import __version__
from heturun.launch import deliver, hosts, mpi, ssh
from heturun.launch.cluster import Node
from heturun.launch.hub import Hub
from heturun.launch.mpi import find_mpirun
from heturun.launch.outcome import Event, Failed, Lost, Output
from pipeline.cluster import porch, wire
from pipeline.cluster.control import Control
from pipeline.cluster.edition import Editions, edition
from pipeline.cluster.porch import Porch
from pipeline.cluster.seal import SEAL_BYTES, Sealer

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


def test_a_holder_of_the_key_that_speaks_another_language_ends_only_its_own_connection(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with hub() as launcher:
        for hello in ({}, {"type": "agent", "ranks": "x"}, {"type": "process", "rank": None}):
            stranger = wire.connect(f"127.0.0.1:{launcher.port}", KEY, timeout_s=20)
            stranger.send(hello)
            assert stranger.receive() is None
        control = Control(f"127.0.0.1:{launcher.port}", KEY.hex(), 0)
        control.publish("still", "here")
        assert control.lookup("still", timeout_s=20) == "here"
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("heturun: hung up on 127.0.0.1") == 3
    assert "Traceback" not in said


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


def hello(host: str, edition: str | None, kind: str = "agent") -> wire.Message:
    return {"type": kind, "host": host, "edition": edition}


def test_agents_have_what_the_launcher_has_and_processes_what_the_first_one_has() -> None:
    known = Editions(hello("w0", "0.1.0 (sources a)"))
    assert known.complaint(hello("w1", "0.1.0 (sources a)")) is None
    other = known.complaint(hello("w1", "0.1.0 (sources b)"))
    assert other == "w1 has heturun 0.1.0 (sources b), w0 has 0.1.0 (sources a); install the same on every host"
    assert "w2 has heturun without a version" in (known.complaint({"type": "agent", "host": "w2"}) or "")
    assert known.complaint(hello("w1", "mine", "process")) is None
    assert known.complaint(hello("w2", "mine", "process")) is None
    assert "w3 has heturun yours, w1 has mine" in (known.complaint(hello("w3", "yours", "process")) or "")


def test_an_edition_tells_of_every_change_in_the_sources(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "sub").mkdir(parents=True)
    (tmp_path / "heturun").mkdir()
    seen = [edition(tmp_path)]
    for name, text in (("heturun/a.py", ""), ("pipeline/sub/b.py", "x = 1"), ("pipeline/sub/b.py", "x = 2")):
        (tmp_path / name).write_text(text)
        seen.append(edition(tmp_path))
    (tmp_path / "pipeline" / "sub" / "b.py").rename(tmp_path / "pipeline" / "b.py")
    seen.append(edition(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "pipeline" / "b.pyc").write_text("no source")
    assert edition(tmp_path) == seen[-1]


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{__version__}"\n' in text


def test_another_edition_is_an_error_at_the_start_and_a_warning_when_a_pipeline_starts_again() -> None:
    events: list[Event] = []
    with hub(events) as launcher:
        for incarnation, answer in ((0, None), (1, {"type": "stop"})):
            agent = wire.connect(f"127.0.0.1:{launcher.port}", KEY, timeout_s=20)
            if incarnation:
                launcher.order("stop")
            agent.send({**hello("w1", "another"), "ranks": [0, 2], "incarnation": incarnation})
            assert agent.receive() == answer
            agent.close()
    failed, lost, warning = events[:3]
    assert isinstance(failed, Failed) and (failed.rank, failed.status) == (0, 2)
    assert failed.message.startswith("w1 has heturun another, ") and isinstance(lost, Lost) and lost.ranks == (0, 2)
    assert isinstance(warning, Output) and warning.lines == [f"WARNING: {failed.message}"]


@pytest.mark.skipif(find_mpirun() is None, reason="no Open MPI here")
def test_the_ranks_of_an_mpi_world_on_one_host_listen_to_nobody() -> None:
    code = (
        "from mpi4py import MPI; import psutil\n"
        "MPI.COMM_WORLD.barrier()\n"
        "listening = [c for c in psutil.net_connections('tcp') if c.status == 'LISTEN' and c.pid == os.getpid()]\n"
        "print('LISTENS', [c.laddr for c in listening])"
    )
    done = heturun("-w", "2", "--launcher", "mpi", *program(code))
    assert done.stdout.count("LISTENS []") == 2, done.stdout + done.stderr


def test_mpirun_is_told_no_secret_and_its_own_pages_come_before_the_cause() -> None:
    network = mpi.Network(None, None, None)
    argv = mpi.command(
        mpi.Mpirun("m", 5), [], host_name=str, agent=lambda _: [], network=network, folder=Path("/nowhere")
    )
    assert "-x" not in argv
    rule = "-" * 60
    page = [rule, "PRTE has lost communication with a remote daemon.", "", "check your firewall", rule]
    cause = "bash: prted: No such file or directory"
    assert mpi.cause_last([cause, *page]) == [page[1], page[3], cause]
    assert mpi.cause_last(page) == [page[1], page[3]]


@pytest.mark.parametrize("dismissed", [True, False])
def test_an_heir_settles_only_what_was_not_left_in_order(dismissed: bool, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from heturun.launch.tidy import Heir, make_estate\n"
        "estate = make_estate(os.getppid(), sys.argv[1], far=True, parent=Path(sys.argv[1]).parent)\n"
        "heir = Heir(estate.settle)\n" + ("heir.dismiss()" if dismissed else "os.kill(os.getpid(), signal.SIGKILL)")
    )
    folder = tmp_path / "job"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code, str(folder)], env=clean_environment(), timeout=30, check=False)
    deadline = time.monotonic() + 10
    while not dismissed and any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list(tmp_path.iterdir())) == (2 if dismissed else 0)


def test_a_key_is_laid_down_for_its_owner_alone_and_goes_with_the_connection(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    line = deliver.remote_line(str(folder), ("3", "5"))
    shell = subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write("abc\n")
    shell.stdin.flush()
    assert shell.stdout.readline() == "ready\n"
    assert folder.stat().st_mode & 0o777 == 0o700
    for rank in (3, 5):
        path = Path(deliver.key_file(str(folder), rank))
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("abc\n", 0o600)
    assert (
        subprocess.run(["sh", "-c", line], input="abc\n", text=True, capture_output=True).returncode != 0
    )  # not twice
    shell.communicate(timeout=10)
    assert not folder.exists()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")
def test_ssh_reads_the_names_of_keys_with_signs_of_its_own(tmp_path: Path) -> None:
    for name in ("100%h", "a b", 'quo"te', "back\\slash"):
        ssh.write_config(tmp_path / "config", [], identity=tmp_path / name)
        shown = subprocess.run(
            ["ssh", "-F", str(tmp_path / "config"), "-G", "w1"], capture_output=True, text=True, timeout=20
        )
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith("identityfile ")]
        assert line.removeprefix("identityfile ").replace("%%", "%") == str(tmp_path / name)


def test_an_address_counts_more_than_a_name() -> None:
    own = next(iter(hosts.own_names() - {hosts.LOCAL}))
    assert hosts.is_here(own) and hosts.is_meant(own)
    assert not hosts.is_here(own, "192.0.2.77") and not hosts.is_meant(own, "192.0.2.77")
    assert hosts.is_here("surely-elsewhere", "127.0.0.1")
    assert ssh.alias(Node(host=own, address="192.0.2.77")) != own
