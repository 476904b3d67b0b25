"""What an elastic job survives, one fault at a time; every job is real, and ended whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

from conftest import thorough
from faulty_jobs import agreed, same_bits, tiny_job

from heturun.launch.fleet import END_S, Fleet, GiveUp, Rules
from heturun.launch.outcome import Closed, Elastic, Exited, Started
from pipeline.train import checkpoint

LONG_S = 120.0  # an epoch that only a fault ends
PATIENCE_S = 90.0  # for a busy machine


def test_a_killed_stage_takes_its_pipeline_with_it_and_the_others_end_well(tmp_path: Path) -> None:
    with tiny_job(tmp_path, stages=2, pipelines=2, epoch_s=2.5, preduce=True, consensus_every=10) as job:
        job.wait_for_updates(5, within_s=PATIENCE_S)
        killed = job.kill(0, stage=0)
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
        assert job.entries("update", pipeline=1, after=killed + 0.5)
        assert "the job ended well, though it lost pipeline 0" in job.text() and "SIGKILL" in job.text()
        tickets = {entry.values["ticket"] for entry in job.entries("update", pipeline=1, stage=1)}
        tickets |= {e.values["ticket"] for e in job.entries("update", pipeline=0, stage=1) if e.time < killed}
        assert tickets == set(range(2 * 125)), "every batch was done by somebody"
        assert [entry.values["members"] for entry in agreed(job, 0)[0]] == [[1]]
        assert job.text().count("] Summary") == 1, "rank 0 is lost, and the next one prints the table"
        ranks = json.loads((tmp_path / "out" / "summary.json").read_text())["ranks"]
        assert [rank["rank"] for rank in ranks] == [2, 3]
        assert not job.processes()


def test_a_job_begins_without_a_pipeline_that_dies_before_it_has_said_hello(tmp_path: Path) -> None:
    fates = {0: "hello"}  # the pipeline of rank 0, who measures the blocks for all where it is there
    with tiny_job(tmp_path, stages=2, pipelines=2, epoch_s=0.5, fates=fates, preduce=True, partition=None) as job:
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
        lost = "rank 1 (localhost, stage 1, pipeline 0) was ended by signal 9 (SIGKILL)"
        assert f"heturun: pipeline 0 is lost: {lost}" in job.text()
        assert job.tail(1) == f"heturun: the job ended well, though it lost pipeline 0 ({lost})"
        assert job.entries("update", pipeline=1)
        assert not job.processes()


def test_a_job_that_has_lost_all_replicas_says_so_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    options = {"checkpoint": str(tmp_path / "ck"), "checkpoint_every": 20, "local_sgd": True}
    with tiny_job(tmp_path, pipelines=2, epoch_s=LONG_S, **options) as job:
        job.wait_for_updates(40, within_s=PATIENCE_S)
        job.kill(0)
        job.kill(1)
        assert job.finish(within_s=PATIENCE_S) != 0
        assert "all replicas of stage 0 are gone; last checkpoint: " in job.text(), job.text()
        assert str(tmp_path / "ck") in job.text().rpartition("last checkpoint: ")[2]
        assert not job.processes()


@thorough
def test_fewer_pipelines_than_asked_for_are_an_error(tmp_path: Path) -> None:
    with tiny_job(tmp_path, pipelines=2, epoch_s=LONG_S, adpsgd=True, min_replicas=2) as job:
        job.wait_for_updates(5, within_s=PATIENCE_S)
        job.kill(1)
        assert job.finish(within_s=PATIENCE_S) == 1
        assert "1 pipeline is left, --min-replicas asks for 2" in job.text(), job.text()
        assert not job.processes()


def test_a_lost_coordinator_ends_the_job_at_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    folder, options = tmp_path / "ck", {"stages": 2, "pipelines": 2, "preduce": True}
    with tiny_job(tmp_path, epoch_s=3.0, checkpoint=str(folder), **options) as job:
        job.wait_for_updates(10, within_s=PATIENCE_S)
        (coordinator,) = [pid for pid, line in job.processes().items() if "-m pipeline.coordination.server" in line]
        os.kill(coordinator, signal.SIGKILL)
        assert job.finish(within_s=PATIENCE_S) == 1, job.text()
        assert "coordinator" in job.tail(3), job.text()
        assert not job.processes()
    updates = checkpoint.read_values(checkpoint.latest(folder))["updates"]
    assert 10 <= updates < 150
    again = tmp_path / "again"
    again.mkdir()
    with tiny_job(again, epoch_s=3.0, checkpoint=str(folder), resume="", **options) as job:
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
        assert f"after {updates} updates" in job.text()
    assert checkpoint.read_values(checkpoint.latest(folder))["updates"] == 150


@thorough
def test_a_pipeline_that_starts_again_reads_no_checkpoint(tmp_path: Path) -> None:
    """It copies a replica, though the folder that its job was resumed from is gone by then."""
    folder, again, options = tmp_path / "ck", tmp_path / "again", {"pipelines": 2, "preduce": True, "epoch_s": 1.0}
    again.mkdir()
    with tiny_job(tmp_path, checkpoint=str(folder), **options) as job:
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
    with tiny_job(again, epochs=1000, resume=str(folder), restarts=1, **options) as job:
        job.wait_for_updates(1, within_s=PATIENCE_S)
        shutil.rmtree(folder)
        killed = job.kill(1)
        job.wait_for("joined", pipeline=1, after=killed, within_s=PATIENCE_S)
        assert "resumed from" in job.text()


def test_a_frozen_worker_is_dropped_and_rejoins_when_it_goes_on(tmp_path: Path) -> None:
    with tiny_job(tmp_path, stages=2, pipelines=2, epoch_s=LONG_S, preduce=True, overlap_sync=True) as job:
        job.wait_for_updates(5, within_s=PATIENCE_S)
        copies = len(job.entries("took"))
        frozen = job.freeze(0, stage=1)
        job.wait_until(lambda: "pipeline 0 was declared lost: stage 1 was silent" in job.text(), what="the loss")
        job.wait_for("update", 20, pipeline=1, stage=1, after=frozen + 2.0)
        thawed = job.thaw(0, stage=1)
        job.wait_for("joined", 2, pipeline=0, after=thawed)
        job.wait_for_updates(10, after=thawed)
        assert same_bits(job) == copies + 2


@thorough
def test_a_worker_may_die_in_the_final_average_and_another_in_the_validation(tmp_path: Path) -> None:
    fates = {1: "final", 2: "validation"}
    with tiny_job(tmp_path, epochs=2, epoch_s=1.5, fates=fates, local_sgd=True) as job:
        assert job.finish(within_s=PATIENCE_S) == 0, job.text()
        assert [entry.values["members"] for entry in agreed(job, 0)[0]] == [[0, 2]] * 2
        assert [entry.values["members"] for entry in agreed(job, 1)[0]] == [[0]]
        assert "it lost pipeline 1" in job.text() and "; pipeline 2" in job.text()
        assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["validations"]) == 2
        assert not job.processes()


@thorough
def test_a_pipeline_that_starts_again_copies_another_replica_when_its_giver_dies(tmp_path: Path) -> None:
    fates = {0: "giving"}  # the first to be asked, or never
    with tiny_job(tmp_path, epoch_s=LONG_S, fates=fates, restarts=2, preduce=True) as job:
        job.wait_for_updates(5, within_s=PATIENCE_S)
        copies = len(job.entries("took"))
        killed = job.kill(1)
        (joined,) = job.wait_for("joined", pipeline=1, after=killed, within_s=PATIENCE_S)
        job.wait_for("update", 10, pipeline=1, after=joined.time)
        assert joined.incarnation == 1 and same_bits(job) > copies


def test_a_pipeline_that_stays_when_the_others_have_ended_is_given_up() -> None:
    fleet = Fleet.of([[0], [1]], coordinator=2, rules=Rules())
    for event in (Started(0), Started(1), Elastic(0, 1), Exited(0, 0, killed=False), Closed(0)):
        fleet = fleet.after(event, 10.0)
    fleet, orders = fleet.orders(10.0)
    assert not orders and not fleet.over and fleet.look_again_at(10.0) == 10.0 + END_S
    fleet, orders = fleet.orders(10.0 + END_S)
    assert [type(order) for order in orders if isinstance(order, GiveUp)] == [GiveUp]
    assert fleet.over and fleet.verdict(10.0 + END_S) is None
