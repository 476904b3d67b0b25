"""What goes from host to host unread, and what is left on a host when the other one, or what came from it, is gone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netns import PREFIX, TwoHosts, two_hosts
from test_two_hosts import TELL, Launch, told

from heturun.launch.mpi import find_mpirun

needs_mpi = pytest.mark.skipif(find_mpirun() is None, reason="no Open MPI here")
SECRETS = {"HF_TOKEN": "hf_of_the_environment", "GIVEN_SECRET": "s_of_the_option", "FILE_PASSWORD": "p_of_the_file"}
SHARING = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from mpi4py import MPI
MPI.COMM_WORLD.barrier()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/dev/shm/" in line}
words = pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_text().split(chr(0))
print("SHARES", *maps, "FOLDER", words[words.index("--folder") + 1] if "--folder" in words else "-", flush=True)
time.sleep(300)
"""
FOUR = """
from pipeline.placement import rcpu
four = [[rcpu("w0", 0)], [rcpu("w0", 1)], [rcpu("w1", 0)], [rcpu("w1", 1)]]
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as net:
        yield net


@pytest.fixture(params=["mpi", "ssh"])
def launcher(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def launch(hosts: TwoHosts, tmp_path: Path) -> Launch:
    made = Launch(hosts, tmp_path)
    (tmp_path / "four.py").write_text(FOUR)
    return made


class Cable:
    """Hears every packet between the hosts."""

    def __init__(self, net: TwoHosts) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind((f"{PREFIX}{net.tag}0", 0))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self.heard = bytearray()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                self.heard += self._socket.recv(1 << 16)
            except TimeoutError:
                continue

    def cut(self) -> bytes:
        self._over.set()
        self._thread.join(10)
        self._socket.close()
        return bytes(self.heard)


def test_neither_the_key_nor_a_secret_variable_can_be_heard_between_the_hosts(launch: Launch, launcher: str) -> None:
    code = (
        "import os, pathlib\n"
        "names = ['HF_TOKEN', 'GIVEN_SECRET', 'FILE_PASSWORD']\n"
        "pathlib.Path('got.' + os.environ['RANK']).write_text(' '.join(map(os.environ.get, ['HETURUN_KEY', *names])))\n"
        "print('aloud', flush=True)"
    )
    more = f"env: {{FILE_PASSWORD: {SECRETS['FILE_PASSWORD']}}}\n"
    launch.cluster("{host: w0, workers: 4, chief: true}", "{host: w1, workers: 4}", more=more)
    cable = Cable(launch.net)
    options = ("--env", f"GIVEN_SECRET={SECRETS['GIVEN_SECRET']}")
    status, lines = launch.run(launcher, code, options=options, HF_TOKEN=SECRETS["HF_TOKEN"])
    heard = cable.cut()
    assert status == 0, lines
    got = [(launch.folder / f"got.{rank}").read_text().split() for rank in range(4)]
    key = got[0][0]
    assert got == [[key, *SECRETS.values()]] * 4
    assert b"SSH-2.0" in heard  # it did listen
    for secret in (key.encode(), bytes.fromhex(key), *(value.encode() for value in SECRETS.values()), b"aloud"):
        assert heard.count(secret) == 0


@needs_mpi
@pytest.mark.parametrize("how", ["in order", "launcher", "mpirun", "agent", "cable"])
def test_what_open_mpi_leaves_is_tidied_up_on_both_hosts_however_it_ends(launch: Launch, how: str) -> None:
    code = SHARING.replace("time.sleep(300)", "") if how == "in order" else SHARING
    (launch.folder / "layouts.py").write_text(FOUR)
    job = launch.start("mpi", code, layout="four")
    read = launch.until(job, "SHARES ", 4)
    shared = {path for line in re.findall(r"SHARES (.*) FOLDER", read) for path in line.split()}
    folders = set(re.findall(r"FOLDER (/\S+)", read))
    assert len(shared) == 4 and len(folders) == 2, read
    try:
        if how == "launcher":
            job.kill()
        elif how == "mpirun":
            os.kill(the_pid(launch.net, "w0", "bin/prterun"), signal.SIGKILL)
        elif how == "agent":
            os.kill(the_pid(launch.net, "w1", "heturun.launch.agent"), signal.SIGKILL)
        elif how == "cable":
            launch.net.unplug("w0")
            wait_until_gone(launch.net, "w1")
        job.communicate(timeout=30)
        if how == "cable":
            launch.net.plug("w0")
        assert launch.net.wait_until_empty(within_s=8.0) == {}
        left = {*shared, *map(os.path.dirname, shared), *folders} - {"/dev/shm"}
        assert [path for path in left if os.path.exists(path)] == []
    finally:
        job.kill()
        launch.net.plug("w0")


def the_pid(net: TwoHosts, host: str, word: str) -> int:
    """Of the first process whose own command has that word."""
    return min(pid for pid, line in net.processes_in(host).items() if word in line.partition(" -np ")[0])


def wait_until_gone(net: TwoHosts, host: str) -> None:
    deadline = time.monotonic() + 15
    while left := net.processes_in(host):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_addresses_count_when_the_names_are_swapped(launch: Launch, launcher: str) -> None:
    own = launch.net.addresses
    launch.cluster(
        f"{{host: w1, servers: 1, workers: 4, chief: true, address: {own['w0']}}}",
        f"{{host: w0, workers: 4, address: {own['w1']}}}",
    )
    status, lines = launch.run(launcher, TELL, layout="pair")
    assert status == 0, lines
    ranks = told(lines)
    assert [(ranks[rank]["HETURUN_HOST"], ranks[rank]["hostname"]) for rank in range(2)] == [("w0", "w1"), ("w1", "w0")]
    assert [ranks[rank]["HETURUN_ADDRESS"] for rank in range(2)] == [own["w1"], own["w0"]]


def test_blanks_in_the_temporary_directory_and_percent_signs_in_the_keys_name_do_no_harm(
    launch: Launch, launcher: str
) -> None:
    folder = launch.folder / "temporary files"
    folder.mkdir()
    key = launch.folder / "my key 100%h"
    key.write_bytes(launch.net.key.read_bytes())
    key.chmod(0o600)
    status, lines = launch.run(launcher, TELL, layout="pair", options=("-i", str(key)), TMPDIR=str(folder))
    assert status == 0, lines
    assert [told(lines)[rank]["hostname"] for rank in range(2)] == ["w0", "w1"]
    assert list(folder.iterdir()) == []


def test_the_cause_of_a_failed_start_comes_last(launch: Launch, launcher: str) -> None:
    wrong = launch.folder / "wrong_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(wrong)], check=True, timeout=20)
    status, lines = launch.run(launcher, TELL, layout="pair", options=("-i", str(wrong)))
    assert status == 1
    assert "w1" in lines[-1] and "Permission denied" in lines[-1]


def test_other_sources_on_the_second_host_are_said_in_one_line(launch: Launch, launcher: str) -> None:
    code = (
        "import os, time\n"
        "from pipeline.cluster import edition\n"
        "from pipeline.cluster.control import Control\n"
        "if os.environ['HETURUN_HOST'] == 'w1':\n    time.sleep(1)\n    edition.VERSION = '0.0.9'\n"
        "Control.from_environment()\n"
        "time.sleep(60)"
    )
    status, lines = launch.run(launcher, code, layout="pair")
    assert status == 2, lines
    assert re.fullmatch(
        r"w1 has heturun 0\.0\.9 \(sources \w{12}\), w0 has 0\.1\.0 \(sources \w{12}\); "
        "install the same on every host",
        lines[-1],
    )
