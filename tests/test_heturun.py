"""heturun before anything starts: cluster files, the command line, the plan, and which failure is the first."""

from __future__ import annotations

import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest
from heturun_jobs import ROOT, clean_environment, heturun

from heturun.__main__ import main
from heturun.launch.agent import with_threads
from heturun.launch.cluster import Cluster, Node, load_cluster, this_machine
from heturun.launch.hosts import num_gpus
from heturun.launch.outcome import EXIT_S, SETTLE_S, Closed, Event, Exited, Failed, Lost, Outcome, Started, Verdict
from heturun.launch.processes import common_environment, here_note, layout_here, layout_of, on_cluster, plan_job
from pipeline.cluster.cores import granted, own_share, share
from pipeline.errors import UserError
from pipeline.placement import Placement, load_placement, rcpu, rgpu

A = "host: a, workers: 1, chief: true"
WRONG_FILES = {
    "unknown key at the top": (f"nodes: [{{{A}}}]\nshared: 1", ["'shared'", "nodes, env"]),
    "unknown key of a node": (f"nodes: [{{{A}, gpu: 1}}]", ["nodes[0]", "'gpu'", "gpus"]),
    "no chief": ("nodes: [{host: a, workers: 1}]", ["chief", "add `chief: true`"]),
    "two chiefs": (f"nodes: [{{{A}}}, {{host: b, workers: 1, chief: true}}]", ["a, b", "leave `chief: true` at one"]),
    "a host twice": (f"nodes: [{{{A}}}, {{host: a, workers: 1}}]", ["nodes[1].host", "a stands here twice", "once"]),
    "zero workers": ("nodes: [{host: a, servers: 1, chief: true}]", ["zero workers", "workers: 4"]),
    "a host with nothing": (f"nodes: [{{{A}}}, {{host: b, workers: 0}}]", ["nodes[1].workers", "b has zero", "leave"]),
    "workers in words": ("nodes: [{host: a, workers: eight}]", ["workers", "'eight'", "whole number"]),
    "workers true": ("nodes: [{host: a, workers: true}]", ["workers", "True", "whole number"]),
    "negative workers": ("nodes: [{host: a, workers: -1}]", ["workers", "-1", "whole number"]),
    "half a worker": ("nodes: [{host: a, workers: 1.5}]", ["workers", "1.5", "whole number"]),
    "chief as a word": ('nodes: [{host: a, chief: "yes"}]', ["chief", "'yes'", "true or false"]),
    "port too large": (f"nodes: [{{{A}, port: 70000}}]", ["port", "70000", "65535"]),
    "no host": ("nodes: [{workers: 1, chief: true}]", ["nodes[0].host", "missing"]),
    "a host with a blank": ('nodes: [{host: "a b"}]', ["nodes[0].host", "'a b'", "use letters"]),
    "a host like an option": ('nodes: [{host: "-oProxyCommand=x"}]', ["host", "use letters"]),
    "a number as host": ("nodes: [{host: 10}]", ["nodes[0].host", "10", "quotes"]),
    "nodes no list": ("nodes: {host: a}", ["nodes", "list of hosts"]),
    "a node no mapping": ("nodes: [w0, w1]", ["nodes[0]", "'w0'", "{host: w0, workers: 8}"]),
    "no nodes": ("nodes: []", ["nodes", "list of hosts"]),
    "a list at the top": ("- a\n- b", ["a list", "nodes:"]),
    "an empty file": ("", ["nothing", "nodes:"]),
    "env no mapping": (f"nodes: [{{{A}}}]\nenv: [A]", ["env", "NAME: value"]),
    "env true": (f"nodes: [{{{A}}}]\nenv: {{A: true}}", ["env.A", "True", "quotes"]),
    "no YAML": ("nodes: [", ["line 1", "not YAML", "correct it"]),
}


@pytest.mark.parametrize(("text", "words"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_cluster_file_is_one_line_that_names_file_key_and_remedy(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yml"
    path.write_text(text)
    assert main(["-c", str(path), "true"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert [word for word in [str(path), *words] if word not in printed.err] == []


WRONG_OPTIONS = {
    "a missing file": (["-c", "/nowhere/x.yml", "true"], "/nowhere/x.yml"),
    "no hosts at all": (["true"], "-w N"),
    "both -c and -w": (["-c", "x.yml", "-w", "2", "true"], "workers"),
    "zero workers": (["-w", "0", "true"], "-w 0"),
    "servers alone": (["-s", "1", "true"], "-w N"),
    "no command": (["-w", "2"], "nothing to run"),
    "no such variable": (["-w", "2", "--env", "SURELY_NOT_SET_1", "true"], "SURELY_NOT_SET_1"),
    "a variable without a name": (["-w", "2", "--env", "=x", "true"], "NAME"),
    "no such key": (["-w", "2", "-i", "/nowhere/key", "true"], "/nowhere/key"),
    "a negative timeout": (["-w", "2", "--timeout", "-1", "true"], "--timeout"),
    "an unfinished option of the command": (["-w", "2", "true", "--placement"], "--placement"),
    "an unknown layout file": (["-w", "2", "true", "--placement", "none.py:x"], "none.py"),
}


@pytest.mark.parametrize(("arguments", "word"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert word in printed


def test_every_key_of_a_cluster_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text(
        "nodes:\n"
        "  - {host: w0.example.org, servers: 1, workers: 8, chief: true, gpus: 4, interface: ib0}\n"
        "  - {host: w1, workers: 2, address: 'fd00::1', user: me, port: 2222}\n"
        "env: {A: 1, B: x y}\n"
    )
    cluster = load_cluster(path)
    assert (cluster.workers, cluster.servers, cluster.chief.host) == (10, 1, "w0.example.org")
    assert (cluster.nodes[0].gpus, cluster.nodes[0].interface) == (4, "ib0")
    assert (cluster.nodes[1].address, cluster.nodes[1].user, cluster.nodes[1].port) == ("fd00::1", "me", 2222)
    assert cluster.env == {"A": "1", "B": "x y"}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yml")), ids=lambda path: path.name)
def test_the_shipped_cluster_files_are_right(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.workers == (4 if path.name == "local.yml" else 16)


def test_a_dry_run_shows_every_process_and_starts_nothing(tmp_path: Path) -> None:
    layout = (
        "from pipeline.placement import rgpu\npair = [[rgpu('w0', 0), rgpu('w1', 0)], [rgpu('w0', 1), rgpu('w1', 1)]]"
    )
    (tmp_path / "device_list.py").write_text(f"{layout}\nmy_device = pair\n")
    (tmp_path / "train.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')\n")
    done = heturun(
        "-c", str(ROOT / "config/w0_w1.yml"), "--dry-run", sys.executable, "train.py", "--note", "a b", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "started").exists()
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["rank", "host", "role", "local", "rank", "device", "stage", "pipeline", "command"]
    command = f"{sys.executable} train.py --note 'a b'"
    assert [row.split(maxsplit=7)[:7] for row in rows[1:5]] == [
        ["0", "w0", "worker", "0", "gpu0", "0", "0"],
        ["1", "w0", "worker", "1", "gpu1", "1", "0"],
        ["2", "w1", "worker", "0", "gpu0", "0", "1"],
        ["3", "w1", "worker", "1", "gpu1", "1", "1"],
    ]
    assert all(row.endswith(command) for row in rows[1:5])
    assert "uses 4 of the 16 workers" in done.stdout
    assert "servers: 1" in done.stdout


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "device_list.py").write_text(
        "from pipeline.placement import cpu, rcpu\nwide = [[cpu(i) for i in range(5)]]\nfar = [[rcpu('w9', 0)]]\n"
    )
    (tmp_path / "train.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')\n")
    for name, word in (("wide", "5"), ("far", "w9"), ("none", "none")):
        done = heturun("-w", "4", sys.executable, "train.py", f"--placement={name}", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert word in done.stderr
    assert not (tmp_path / "started").exists()


def test_ranks_go_pipeline_by_pipeline_and_every_pipeline_is_a_world() -> None:
    placement = Placement("x", ((rcpu("a", 0), rcpu("b", 0)), (rcpu("b", 1), rcpu("a", 1))))
    cluster = plan_cluster("a", "b")
    plan = plan_job(cluster, placement, ["run"], directory="/", env={})
    where = [(p.rank, p.host, p.stage, p.pipeline, p.local_rank) for p in plan.processes]
    assert where == [(0, "a", 0, 0, 0), (1, "b", 1, 0, 0), (2, "b", 0, 1, 1), (3, "a", 1, 1, 1)]
    assert [[p.rank for p in world] for world in plan.worlds()] == [[0, 1], [2, 3]]
    assert plan.processes[2].env["LOCAL_WORLD_SIZE"] == "2"
    assert Placement.from_json(plan.processes[0].env["HETURUN_PLACEMENT"]) == placement


def test_without_a_layout_every_worker_is_a_pipeline_of_one_stage() -> None:
    plan = plan_job(plan_cluster("a", "b"), None, ["run"], directory="/", env={})
    assert [(p.host, p.local_rank, p.stage, p.pipeline) for p in plan.processes] == [
        ("a", 0, 0, 0),
        ("a", 1, 0, 1),
        ("b", 0, 0, 2),
        ("b", 1, 0, 3),
    ]
    assert len(plan.worlds()) == 1
    assert "HETURUN_PLACEMENT" not in plan.processes[0].env


def test_a_layout_may_name_hosts_without_their_domain() -> None:
    placement = Placement("x", ((rgpu("w0", 0),), (rgpu("w1", 0),)))
    moved = on_cluster(placement, plan_cluster("w0.example.org", "w1.example.org"), own_names=(), here=())
    assert moved.hosts == ("w0.example.org", "w1.example.org")


def test_the_layout_is_that_of_the_option_else_of_the_file_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    text = "from pipeline.placement import cpu\nmy_device = one = [[cpu(0)]]\ntwo = [[cpu(0), cpu(1)]]\n"
    (tmp_path / "sub" / "device_list.py").write_text(text)
    (tmp_path / "sub" / "train.py").write_text("")
    script = ["python3", "sub/train.py"]
    found = [
        layout_of([*script, *more], directory=tmp_path) for more in ([], ["--placement", "two"], ["--placement=two"])
    ]
    assert [layout.num_pipelines for layout in found if layout is not None] == [1, 2, 2]
    assert layout_of(["python3", "-c", "pass"], directory=tmp_path) is None


def test_on_one_machine_that_is_not_in_the_default_layout_its_workers_are_taken_and_it_is_said() -> None:
    default = load_placement(None, directory=ROOT)

    def taken(workers: int, *more: str, layout: Placement = default, gpus: int = 0) -> Placement | None:
        cluster = this_machine(workers=workers, servers=0)
        return layout_here(["python3", "train.py", *more], layout, cluster, gpus=gpus)

    shapes = {workers: taken(workers) for workers in (1, 2, 3, 4)}
    assert {w: p and (p.num_stages, p.num_pipelines) for w, p in shapes.items()} == {
        1: (1, 1),
        2: (2, 1),
        3: (1, 3),
        4: (2, 2),
    }
    assert taken(4) == load_placement("2x2", directory=ROOT)
    replicas = taken(4, "--pipeline=dp")
    assert replicas is not None and replicas.num_stages == 1
    on_gpus = taken(4, gpus=4)
    assert on_gpus is not None and {device.kind for row in on_gpus.rows for device in row} == {"gpu"}
    assert "hosts w0, w1" in here_note(on_gpus, default) and "--placement 2x2 (2 stage(s)" in here_note(
        on_gpus, default
    )
    assert taken(4, "--placement", "pipe_4_4") is None  # the user's choice, and error
    assert taken(4, layout=Placement("mine", ((rcpu("w9", 0),),))) is None  # the user's own file
    for cluster in (plan_cluster("w0"), plan_cluster("a", "b")):
        assert layout_here(["train.py"], default, cluster, gpus=0) is None


def test_gpus_are_counted_without_cuda(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [num_gpus(env, tmp_path) for env in ({}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": ""})] == [
        2,
        1,
        0,
    ]


def test_the_environment_has_the_users_paths_and_leaves_threads_to_the_hosts_unless_told() -> None:
    cluster = this_machine(workers=1, servers=0)

    def made(environ: dict[str, str], **given: str) -> dict[str, str | None]:
        return common_environment(environ, cluster=cluster, given=given, timeout_s=5.0, own_bin="/venv/bin")

    here = {"PATH": "/a:/b", "PYTHONPATH": "/p", "CONDA_PREFIX": "/c", "RANK": "7", "OMPI_COMM_WORLD_RANK": "1"}
    env = made(here)
    assert (env["PATH"], env["PYTHONPATH"], env["CONDA_PREFIX"]) == ("/venv/bin:/a:/b", "/p", "/c")
    assert env["HETURUN_TIMEOUT"] == "5"
    assert "OMP_NUM_THREADS" not in env  # a far host's cores are not known here
    assert "RANK" not in env
    assert "OMPI_COMM_WORLD_RANK" not in env
    assert made({**here, "OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert made({**here, "OMP_NUM_THREADS": "3"}, OMP_NUM_THREADS="4")["OMP_NUM_THREADS"] == "4"
    assert made({"PATH": "/a:/venv/bin"})["PATH"] == "/a:/venv/bin"


def test_a_workers_threads_are_its_share_of_the_cores_that_it_may_use() -> None:
    assert [share(8, inf, workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    assert [share(8, 4.0, 3), share(8, 2.5, 1), share(8, 0.5, 1)] == [1, 2, 1]
    assert with_threads({"LOCAL_WORLD_SIZE": "1"})["OMP_NUM_THREADS"] == str(own_share(1))
    assert with_threads({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert with_threads({})["OMP_NUM_THREADS"] == "1"  # the coordinator


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", inf), ("", inf)])
def test_a_container_says_how_many_cores_it_grants(tmp_path: Path, text: str, cores: float) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert granted(tmp_path, tmp_path / "none") == cores
    assert granted(tmp_path / "none", tmp_path / "none") == inf


def test_the_smallest_grant_of_all_groups_above_counts_in_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    for folder, file, text in (
        ("two/slice", "cpu.max", "300000 100000\n"),
        ("two/slice/job", "cpu.max", "max 100000\n"),
        ("one/cpu/job", "cpu.cfs_quota_us", "50000\n"),
        ("one/cpu/job", "cpu.cfs_period_us", "100000\n"),
        ("one/cpu", "cpu.cfs_quota_us", "-1\n"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text(text)
    own.write_text("0::/slice/job\n")
    assert granted(tmp_path / "two", own) == 3.0
    own.write_text("3:cpu,cpuacct:/job\n2:memory:/other\n")
    assert granted(tmp_path / "one", own) == 0.5


def after(*events: tuple[float, Event], size: int = 2) -> Outcome:
    """What is known after events at their times."""
    outcome = Outcome(range(size))
    for now, event in events:
        outcome = outcome.after(event, now)
    return outcome


def test_a_rank_that_lost_its_peer_waits_for_the_peers_own_error() -> None:
    lost = (0.0, Failed(0, "rank 1 went away", secondary=True))
    gone = (0.1, Exited(0, 1, killed=False))
    assert after(lost, gone).verdict(1.0) is None
    verdict = after(lost, gone, (1.0, Exited(1, 7, killed=False))).verdict(1.0)
    assert verdict is not None
    assert (verdict.rank, verdict.exited, verdict.message) == (1, 7, None)


def test_a_secondary_failure_is_reported_when_nothing_better_comes() -> None:
    outcome = after((0.0, Failed(0, "rank 1 went away", secondary=True)), (0.1, Exited(0, 3, killed=False)))
    assert outcome.look_again_at(0.2) == SETTLE_S
    verdict = outcome.verdict(SETTLE_S)
    assert verdict is not None
    assert (verdict.rank, verdict.exited, verdict.message) == (0, 3, "rank 1 went away")


def test_ranks_ended_by_mpirun_are_not_to_blame() -> None:
    outcome = after((0.0, Exited(0, 143, killed=True)), (0.2, Exited(1, 139, killed=False)))
    verdict = outcome.verdict(0.2)
    assert verdict is not None
    assert (verdict.rank, verdict.exited) == (1, 139)


def test_a_rank_that_said_why_it_fails_is_given_time_to_exit() -> None:
    said = (0.0, Failed(1, "bad shard", secondary=False))
    assert after(said).verdict(0.5) is None
    assert after(said).look_again_at(0.5) == EXIT_S
    exited = after(said, (0.5, Exited(1, 9, killed=False))).verdict(0.5)
    stayed = after(said).verdict(EXIT_S)
    assert exited is not None and stayed is not None
    assert (exited.exited, exited.message) == (9, "bad shard")
    assert (stayed.exited, stayed.message) == (None, "bad shard")


def test_an_agent_that_goes_away_after_its_ranks_is_no_failure() -> None:
    through = [(0.0, Started(0)), (0.1, Exited(0, 0, killed=False)), (0.2, Closed(0))]
    assert after(*through, (0.3, Lost((0,), "gone")), size=1).complaints == ()
    lost = after((0.0, Started(0)), (0.3, Lost((0,), "gone")), size=1).verdict(0.3)
    assert lost is not None
    assert (lost.rank, lost.exited, lost.message) == (0, None, "gone")


def test_help_is_instant_and_imports_no_torch() -> None:
    times: list[float] = []
    while (not times or min(times) >= 0.3) and len(times) < 10:  # other tests may keep the machine busy
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "heturun", "--help"],
            capture_output=True,
            text=True,
            env=clean_environment(),
            timeout=30,
        )
        times.append(time.monotonic() - start)
        assert done.returncode == 0
        assert "--dry-run" in done.stdout
        assert "torch" not in done.stderr
        assert "yaml" not in done.stderr
    assert min(times) < 0.3


def plan_cluster(*hosts: str) -> Cluster:
    """Two workers on every host."""
    return Cluster(tuple(Node(host=host, workers=2, chief=i == 0) for i, host in enumerate(hosts)))


def test_a_missing_option_value_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--placement"):
        layout_of(["python3", "x.py", "--placement"], directory=Path("/"))


def test_a_deleted_working_directory_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["-w", "1", "--dry-run", "true"]) == 2
    assert "working directory was deleted" in capsys.readouterr().err


def test_a_rank_that_said_its_status_need_not_have_ended_for_it_to_count() -> None:
    mistake = (0.0, Failed(0, "--lr x: expected a number", secondary=False, status=2))
    waited = after(mistake)
    assert waited.verdict(EXIT_S - 0.1) is None
    assert waited.verdict(EXIT_S) == Verdict(0, 2, "--lr x: expected a number")
    assert waited.mistake == waited.verdict(EXIT_S)
    killed = after(mistake, (0.5, Exited(0, 143, killed=True)))
    crashed = after(mistake, (0.5, Exited(0, 139, killed=False)))  # a library that ends badly
    assert killed.verdict(0.5) == crashed.verdict(0.5) == waited.verdict(EXIT_S)


def test_a_starter_that_a_signal_ended_is_the_cause_of_what_it_had_started() -> None:
    ends = [(0.1, Exited(rank, 143, killed=True)) for rank in (0, 1)]
    closed = [(0.2, Closed(rank)) for rank in (0, 1)]
    reason = "mpirun was ended by signal 9 (SIGKILL) before its processes"
    assert after(*ends, *closed).verdict(0.2) is None  # somebody told them to end, and may yet be known
    outcome = after(*ends, *closed, (0.3, Lost((0, 1), reason, status=137)))
    assert outcome.verdict(0.3) == Verdict(0, 137, reason)
    well = after(*[(0.1, Exited(rank, 0, killed=False)) for rank in (0, 1)], (0.3, Lost((0, 1), reason, status=137)))
    assert well.verdict(9.0) is None


def test_an_agent_that_went_away_without_a_word_waits_for_what_is_known_of_it() -> None:
    gone = (0.1, Lost((0,), "the agent went away", explained=False))
    started = (0.0, Started(0))
    assert after(started, gone, size=1).verdict(0.1) is None
    assert after(started, gone, size=1).verdict(0.1 + SETTLE_S) == Verdict(0, None, "the agent went away")
    reason = "agent on localhost was ended by signal 9 (SIGKILL) before its processes"
    assert after(started, gone, (0.2, Lost((0,), reason, status=137)), size=1).verdict(0.2) == Verdict(0, 137, reason)
