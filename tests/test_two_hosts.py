"""heturun over two hosts with their own names, addresses and ssh servers (tests/netns.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heturun_jobs import ROOT, clean_environment
from netns import NAMES, TwoHosts, two_hosts

LIMIT_S = 60.0
OWN_PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
LAYOUT = """
from pipeline.placement import rcpu
across = [[rcpu("w0", 0), rcpu("w0", 1)], [rcpu("w1", 0), rcpu("w1", 1)]]  # ranks 0 2 / 1 3
pair = [[rcpu("w0", 0)], [rcpu("w1", 0)]]
dotted = [[rcpu("w0.example.org", 0)], [rcpu("w1.example.org", 0)]]
"""
TELL = """
import json, os, socket, sys
names = ["RANK", "HETURUN_HOST", "HETURUN_ADDRESS", "HETURUN_CONTROL", "PATH", "PYTHONPATH", "VIRTUAL_ENV",
         "FROM_FILE", "GIVEN", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMP_NUM_THREADS"]
print("TOLD", json.dumps({"hostname": socket.gethostname(), "directory": os.getcwd(), "arguments": sys.argv[1:],
                          **{name: os.environ.get(name) for name in names}}))
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as net:
        yield net


@pytest.fixture(params=["mpi", "ssh"])
def launcher(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Launch:
    """heturun on one of the hosts, with a cluster file and layouts in a folder of its own."""

    def __init__(self, net: TwoHosts, folder: Path) -> None:
        self.net, self.folder = net, folder
        (folder / "layouts.py").write_text(LAYOUT)
        self.cluster("{host: w0, workers: 4, chief: true}", "{host: w1, workers: 4}")

    def cluster(self, *nodes: str, more: str = "") -> None:
        (self.folder / "two.yml").write_text("nodes:\n" + "".join(f"  - {node}\n" for node in nodes) + more)

    def start(
        self,
        launcher: str,
        code: str,
        *,
        on: str = "w0",
        layout: str | None = "across",
        options: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
        **extra: str,
    ) -> subprocess.Popen[str]:
        (self.folder / "worker.py").write_text(code)
        placement = [] if layout is None else ["--placement", f"layouts.py:{layout}"]
        starter = [sys.executable, "-m", "heturun", "-c", "two.yml", "-i", str(self.net.key), "--launcher", launcher]
        return self.net.run_in(
            on,
            [*starter, *options, "python3", "worker.py", *arguments, *placement],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(**{"PATH": OWN_PATH, **extra}),
        )

    def run(self, launcher: str, code: str, **keywords: Any) -> tuple[int, list[str]]:
        """Exit status and lines; nothing may be left on either host."""
        return self.end(self.start(launcher, code, **keywords))

    def end(self, job: subprocess.Popen[str], *, within_s: float = LIMIT_S, read: str = "") -> tuple[int, list[str]]:
        try:
            output, _ = job.communicate(timeout=within_s)
        finally:
            job.kill()
        assert self.net.wait_until_empty(within_s=1.0) == {}
        return job.returncode, (read + output).splitlines()

    def until(self, job: subprocess.Popen[str], word: str, count: int) -> str:
        """Reads until `count` lines contain `word`."""
        read = ""
        assert job.stdout is not None
        while read.count(word) < count:
            line = job.stdout.readline()
            assert line, f"the job ended early: {read}"
            read += line
        return read


@pytest.fixture
def launch(hosts: TwoHosts, tmp_path: Path) -> Launch:
    return Launch(hosts, tmp_path)


def told(lines: list[str]) -> dict[int, dict[str, Any]]:
    """What the ranks said of themselves, by rank."""
    values = [json.loads(line.partition("TOLD ")[2]) for line in lines if "TOLD " in line]
    return {int(value["RANK"]): value for value in values}


def addresses(lines: list[str]) -> list[str]:
    """The addresses that the ranks advertise, in the order of ranks."""
    return [value["HETURUN_ADDRESS"] for _, value in sorted(told(lines).items())]


@pytest.mark.parametrize("on", NAMES)
def test_every_rank_runs_on_the_host_that_the_layout_names(launch: Launch, launcher: str, on: str) -> None:
    status, lines = launch.run(launcher, TELL, on=on)
    ranks = told(lines)
    assert status == 0, lines
    assert {rank: value["hostname"] for rank, value in ranks.items()} == {0: "w0", 1: "w1", 2: "w0", 3: "w1"}
    assert all(value["hostname"] == value["HETURUN_HOST"] for value in ranks.values())
    places = sorted(line.partition(" ")[0] for line in lines if "TOLD" in line)
    assert places == ["[w0/0/0]", "[w0/0/1]", "[w1/1/0]", "[w1/1/1]"]


def test_the_users_paths_directory_and_variables_reach_the_other_host(launch: Launch, launcher: str) -> None:
    launch.cluster("{host: w0, workers: 4, chief: true}", "{host: w1, workers: 4}", more="env: {FROM_FILE: a b}\n")
    own_path = f"{OWN_PATH}:/some where/bin"
    status, lines = launch.run(
        launcher,
        TELL,
        layout="pair",
        options=("--env", "GIVEN=it's"),
        arguments=("two words", "$HOME"),
        PATH=own_path,
        VIRTUAL_ENV="/v",
    )
    assert status == 0, lines
    far = told(lines)[1]
    assert far["PATH"] == own_path
    assert far["PYTHONPATH"] == str(ROOT)
    assert far["VIRTUAL_ENV"] == "/v"
    assert far["directory"] == str(launch.folder)
    assert (far["FROM_FILE"], far["GIVEN"], far["OMP_NUM_THREADS"]) == ("a b", "it's", "1")
    assert far["arguments"][:2] == ["two words", "$HOME"]


def test_addresses_lead_from_host_to_host_though_the_own_name_means_the_loopback(launch: Launch, launcher: str) -> None:
    own = launch.net.addresses
    status, lines = launch.run(launcher, TELL, layout="pair")
    assert status == 0, lines
    assert addresses(lines) == [own["w0"], own["w1"]]
    assert all(value["HETURUN_CONTROL"].startswith(own["w0"] + ":") for value in told(lines).values())
    launch.cluster("{host: w0, workers: 4, chief: true, address: w0}", "{host: w1, workers: 4, address: w1}")
    status, lines = launch.run(launcher, TELL, layout="pair")
    assert addresses(lines) == [own["w0"], own["w1"]]


def test_ipv6_addresses_can_be_told_to_the_others(launch: Launch, launcher: str) -> None:
    own = launch.net.addresses6
    launch.cluster(
        f"{{host: w0, workers: 4, chief: true, address: '{own['w0']}'}}",
        f"{{host: w1, workers: 4, address: '{own['w1']}'}}",
    )
    status, lines = launch.run(launcher, TELL, layout="pair")
    assert status == 0, lines
    assert addresses(lines) == [own["w0"], own["w1"]]
    assert all(value["HETURUN_CONTROL"].startswith(f"[{own['w0']}]:") for value in told(lines).values())


def test_an_interface_gives_the_address(launch: Launch, launcher: str) -> None:
    launch.cluster("{host: w0, workers: 4, chief: true, interface: e0}", "{host: w1, workers: 4, interface: e0}")
    status, lines = launch.run(launcher, TELL, layout="pair")
    assert status == 0, lines
    assert addresses(lines) == [launch.net.addresses[name] for name in NAMES]


def test_names_with_dots_work(launch: Launch, launcher: str) -> None:
    launch.cluster("{host: w0.example.org, workers: 1, chief: true}", "{host: w1.example.org, workers: 1}")
    status, lines = launch.run(launcher, TELL, layout="dotted")
    assert status == 0, lines
    assert [told(lines)[rank]["hostname"] for rank in range(2)] == ["w0", "w1"]


def test_without_a_layout_every_worker_of_every_host_runs(launch: Launch, launcher: str) -> None:
    launch.cluster("{host: w0, workers: 1, chief: true}", "{host: w1, workers: 2}")
    status, lines = launch.run(launcher, TELL, layout=None)
    assert status == 0, lines
    assert [told(lines)[rank]["hostname"] for rank in range(3)] == ["w0", "w1", "w1"]
    worlds = {value["OMPI_COMM_WORLD_SIZE"] for value in told(lines).values()}
    assert worlds == ({"3"} if launcher == "mpi" else {None})


def test_a_pipeline_across_hosts_is_an_mpi_world(launch: Launch) -> None:
    code = """
import os
from mpi4py import MPI
world = MPI.COMM_WORLD
met = world.allgather((int(os.environ["HETURUN_STAGE"]), MPI.Get_processor_name()))
print("MET", os.environ["RANK"], world.rank, world.size, met)
"""
    status, lines = launch.run("mpi", code)
    assert status == 0, lines
    met = sorted(line.partition("MET ")[2] for line in lines if "MET " in line)
    assert met == [f"{rank} {rank % 2} 2 [(0, 'w0'), (1, 'w1')]" for rank in range(4)]


def test_values_are_published_from_host_to_host(launch: Launch, launcher: str) -> None:
    code = """
import os
from pipeline.cluster.control import Control
control, rank = Control.from_environment(), int(os.environ["RANK"])
control.publish(f"of {rank}", f"value {rank}")
print("GOT", control.lookup(f"of {1 - rank}", timeout_s=20))
"""
    status, lines = launch.run(launcher, code, layout="pair")
    assert status == 0, lines
    assert sorted(line.partition("GOT ")[2] for line in lines if "GOT" in line) == ["value 0", "value 1"]


def test_a_killed_rank_of_the_other_host_ends_both_hosts(launch: Launch, launcher: str) -> None:
    job = launch.start(
        launcher, "import os, time\nprint('UP', os.environ['RANK'], os.getpid(), flush=True)\ntime.sleep(300)"
    )
    read = launch.until(job, "UP ", 4)
    pids = {int(rank): int(pid) for rank, pid in (line.split()[-2:] for line in read.splitlines() if "UP " in line)}
    assert pids[3] in launch.net.processes_in("w1")
    os.kill(pids[3], signal.SIGKILL)
    since = time.monotonic()
    status, lines = launch.end(job, within_s=10.0, read=read)
    assert time.monotonic() - since < 10.0
    assert status == 128 + signal.SIGKILL
    assert lines[-1] == "heturun: rank 3 (w1, stage 1, pipeline 1) was ended by signal 9 (SIGKILL)"


def test_the_first_real_error_of_either_host_comes_last(launch: Launch, launcher: str) -> None:
    code = """
import os, sys, time
from pipeline.cluster.control import Control
control, rank = Control.from_environment(), int(os.environ["RANK"])
print("UP", flush=True)
if rank == 1:
    control.publish("rank 1 is up", "yes")
    control.lookup("peer lost", timeout_s=20)
    control.failed("ValueError: the disk of rank 1 is full", secondary=False)
    sys.exit(7)
if rank == 0:
    control.lookup("rank 1 is up", timeout_s=20)
    control.failed("PeerLost: rank 1 does not answer", secondary=True)
    control.publish("peer lost", "yes")
    sys.exit(1)
time.sleep(300)
"""
    status, lines = launch.run(launcher, code)
    assert status == 7
    assert lines[-2:] == [
        "heturun: rank 1 (w1, stage 1, pipeline 0) exited with status 7:",
        "ValueError: the disk of rank 1 is full",
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_both_hosts(launch: Launch, launcher: str, signum: signal.Signals) -> None:
    job = launch.start(launcher, "import time\nprint('UP', flush=True)\ntime.sleep(300)", layout="pair")
    read = launch.until(job, "UP", 2)
    job.send_signal(signum)
    status, lines = launch.end(job, within_s=10.0, read=read)
    assert status == 128 + signum, lines


def test_a_launcher_that_is_killed_leaves_nothing_on_either_host(launch: Launch, launcher: str) -> None:
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('UP', flush=True)\ntime.sleep(300)"
    )
    job = launch.start(launcher, deaf, layout="pair")
    launch.until(job, "UP", 2)
    job.kill()
    job.communicate(timeout=10.0)
    assert launch.net.wait_until_empty(within_s=8.0) == {}


def test_a_host_that_refuses_the_key_is_named(launch: Launch, launcher: str) -> None:
    wrong = launch.folder / "wrong_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(wrong)], check=True, timeout=20)
    status, lines = launch.run(launcher, TELL, options=("-i", str(wrong)))
    assert status == 1
    assert any("w1" in line and "Permission denied" in line for line in lines), lines
    assert all(value["hostname"] == "w0" for value in told(lines).values())


def test_a_host_without_an_address_is_the_users_mistake(launch: Launch, launcher: str) -> None:
    launch.cluster("{host: w0, workers: 4, chief: true}", "{host: nowhere, workers: 4}")
    status, lines = launch.run(launcher, TELL, layout=None)
    assert status == 2
    assert len(lines) == 1 and "nowhere" in lines[0] and "address" in lines[0]


def test_the_hosts_vanish_when_the_process_that_made_them_is_killed() -> None:
    code = """
import netns, time
with netns.two_hosts() as net:
    print(net.tag, net.folder, flush=True)
    time.sleep(300)
"""
    maker = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert maker.stdout is not None
    words = maker.stdout.readline().split()
    maker.kill()
    errors = maker.communicate()[1]
    if not words:
        pytest.skip(f"no two hosts here: {errors.strip().splitlines()[-1:]}")
    deadline = time.monotonic() + 20
    while traces_of(words[0], Path(words[1])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert traces_of(words[0], Path(words[1])) == []


def traces_of(tag: str, folder: Path) -> list[str]:
    """What there still is of the hosts with that tag."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, timeout=20).stdout
    spaces = [str(path) for place in ("/run/netns", "/etc/netns") for path in Path(place).glob(f"*{tag}*")]
    return [line for line in links.splitlines() if tag in line] + spaces + [str(folder)] * folder.exists()
