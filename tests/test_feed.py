"""Which samples a pipeline sees, in which order, and that the loader brings exactly those."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.data.loader import Key, MicrobatchFeed, shared_memory_serves
from pipeline.data.plan import Plan, ValidationPlan, epoch_order, shard
from pipeline.errors import UserError


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Pipeline 0 of some plan."""
    least = draw(st.integers(1, 2))
    batch_size = draw(st.integers(least, 9))
    pipelines = draw(st.integers(1, 5))
    return Plan(
        size=draw(st.integers(pipelines * batch_size, 150)),
        batch_size=batch_size,
        pipelines=pipelines,
        microbatches=draw(st.integers(1, batch_size // least)),
        least=least,
        seed=draw(st.integers(0, 3)),
        drop_last=draw(st.booleans()),
    )


def all_pipelines(plan: Plan) -> list[Plan]:
    return [replace(plan, pipeline=pipeline) for pipeline in range(plan.pipelines)]


def epoch_of(plan: Plan, epoch: int) -> list[list[int]]:
    first = epoch * plan.batches_per_epoch
    return [plan.indices(first + batch) for batch in range(plan.batches_per_epoch)]


@given(plans(), st.integers(0, 3))
def test_no_sample_is_seen_twice_in_an_epoch_and_only_the_documented_tail_is_left_out(plan: Plan, epoch: int) -> None:
    seen = [index for each in all_pipelines(plan) for batch in epoch_of(each, epoch) for index in batch]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(plan.size))
    left_out = plan.size - len(seen)
    global_batch = plan.pipelines * plan.batch_size
    if plan.drop_last:
        assert left_out == plan.size % global_batch
    else:
        least = plan.microbatches * plan.least
        assert left_out < plan.pipelines * least
        assert bool(plan.left_out) == (plan.least > 1 and left_out >= plan.pipelines)
        if (plan.size % global_batch) // plan.pipelines >= least:
            assert left_out == plan.size % plan.pipelines
    assert len(seen) == plan.pipelines * plan.samples_per_epoch


@given(plans(), st.integers(0, 3))
def test_several_pipelines_see_the_batches_of_one_pipeline_with_their_joint_batch_size(plan: Plan, epoch: int) -> None:
    joint = replace(plan, pipelines=1, batch_size=plan.pipelines * plan.batch_size, drop_last=True, microbatches=1)
    parts = [epoch_of(each, epoch) for each in all_pipelines(plan)]
    for batch, whole in enumerate(epoch_of(joint, epoch)):
        assert [index for part in parts for index in part[batch]] == whole


@given(plans(), st.integers(0, 40))
def test_all_pipelines_have_equally_long_batches(plan: Plan, batch: int) -> None:
    lengths = {len(each.indices(batch)) for each in all_pipelines(plan)}
    assert lengths == {plan.batch_length(batch)}


@given(plans(), st.integers(0, 40))
def test_a_batch_is_cut_into_exactly_m_microbatches_that_are_nearly_equal_and_never_empty(
    plan: Plan, batch: int
) -> None:
    parts = [plan.microbatch_indices(batch, part) for part in range(plan.microbatches)]
    lengths = [len(part) for part in parts]
    assert [index for part in parts for index in part] == plan.indices(batch)
    assert min(lengths) >= max(plan.least, plan.shortest) and max(lengths) - min(lengths) <= 1
    first = batch * plan.microbatches
    assert lengths == [plan.microbatch_length(first + part) for part in range(plan.microbatches)]
    cut = torch.tensor_split(torch.tensor(plan.indices(batch)), plan.microbatches)
    assert parts == [part.tolist() for part in cut]


@given(plans(), st.integers(0, 3))
def test_shard_lists_the_same_batches_as_the_plan(plan: Plan, epoch: int) -> None:
    order = epoch_order(plan.size, epoch=epoch, seed=plan.seed)
    for each in all_pipelines(plan):
        batches = shard(
            order,
            pipelines=plan.pipelines,
            pipeline=each.pipeline,
            batch_size=plan.batch_size,
            drop_last=plan.drop_last,
            least=plan.microbatches * plan.least,
        )
        assert [batch.tolist() for batch in batches] == epoch_of(each, epoch)


def test_the_picture_at_the_top_of_the_module() -> None:
    order = torch.tensor([7, 2, 9, 4, 0, 5, 1, 8, 3, 6, 10])
    first, second = (
        [b.tolist() for b in shard(order, pipelines=2, pipeline=p, batch_size=2, drop_last=False)] for p in (0, 1)
    )
    assert first == [[7, 2], [0, 5], [3]]
    assert second == [[9, 4], [1, 8], [6]]


def test_every_epoch_and_every_seed_has_its_own_order_and_it_is_always_the_same() -> None:
    orders = {
        (epoch, seed): tuple(epoch_order(50, epoch=epoch, seed=seed).tolist())
        for epoch in range(4)
        for seed in range(4)
    }
    assert len(set(orders.values())) == 16
    epoch_order.cache_clear()
    assert all(tuple(epoch_order(50, epoch=e, seed=s).tolist()) == order for (e, s), order in orders.items())


def test_the_keys_of_a_microbatch_carry_the_epoch() -> None:
    plan = Plan(size=8, batch_size=4, microbatches=2)
    assert [{epoch for epoch, _ in plan.keys(m)} for m in range(8)] == [{0}] * 4 + [{1}] * 4


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_validation_sees_every_sample_exactly_once_over_uneven_shards(
    size: int, pipelines: int, batch_size: int
) -> None:
    seen = []
    for pipeline in range(pipelines):
        plan = ValidationPlan(size=size, batch_size=batch_size, pipelines=pipelines, pipeline=pipeline)
        keys = [plan.keys(m) for m in range(plan.count)]
        assert all(len(batch) == batch_size for batch in keys[:-1])
        assert all(batch and len(batch) == plan.microbatch_length(m) for m, batch in enumerate(keys))
        seen += [index for batch in keys for _, index in batch]
    assert seen == list(range(size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 15}, "15 training samples are fewer than one batch of 8 for each of 2 pipelines"),
        ({"microbatches": 9}, "a batch of 8 cannot be cut into 9 micro-batches"),
        (
            {"least": 2, "microbatches": 5},
            "into 5 micro-batches of 2 .* BatchNorm .* --batch-size 10 .* --microbatches 4",
        ),
        ({"least": 2, "batch_size": 1, "microbatches": 1}, "a batch of 1 .* give --batch-size 2 or more$"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"microbatches": 0}, "--microbatches is 0"),
        ({"pipeline": 2}, "pipeline 2 of 2 does not exist"),
        ({"size": 0}, "0 training samples"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(wrong: dict[str, int], message: str) -> None:
    good = {"size": 100, "batch_size": 8, "pipelines": 2, "pipeline": 1, "microbatches": 4}
    with pytest.raises(UserError, match=message) as caught:
        Plan(**good | wrong)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Numbers:
    """Sample (epoch, index) is ([epoch, index], index squared); reading `bad` is the user's mistake."""

    size: int
    bad: int = -1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        epoch, index = (0, key) if isinstance(key, int) else key
        if index == self.bad:
            raise UserError(f"sample {index} is damaged; delete it")
        return torch.tensor([epoch, index]), torch.tensor(float(index**2))


def keys_in(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    return [(epoch, index) for epoch, index in tensors[0].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_feed_brings_exactly_the_planned_microbatches_across_epochs(workers: int) -> None:
    plan = Plan(size=23, batch_size=4, pipelines=2, pipeline=1, microbatches=2, seed=5)
    per_epoch = plan.batches_per_epoch * plan.microbatches
    feed = MicrobatchFeed(Numbers(23), plan, start_microbatch=3, stop_microbatch=3 * per_epoch, workers=workers)
    received = list(feed)
    assert [microbatch for microbatch, _ in received] == list(range(3, 3 * per_epoch))
    for microbatch, tensors in received:
        assert keys_in(tensors) == plan.keys(microbatch)
        assert tensors[1].tolist() == [index**2 for _, index in plan.keys(microbatch)]


@settings(max_examples=25, deadline=None)
@given(plans(), st.integers(0, 60))
def test_a_feed_that_starts_later_goes_on_as_one_that_never_stopped(plan: Plan, start: int) -> None:
    assume(plan.size < 60)
    later = MicrobatchFeed(Numbers(plan.size), plan, start_microbatch=start, stop_microbatch=start + 5)
    throughout = MicrobatchFeed(Numbers(plan.size), plan, stop_microbatch=start + 5)
    expected = [(m, keys_in(tensors)) for m, tensors in throughout][start:]
    assert [(m, keys_in(tensors)) for m, tensors in later] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_validation_feed_ends_and_can_be_run_again(workers: int) -> None:
    plan = ValidationPlan(size=11, batch_size=2, pipelines=2, pipeline=1)
    feed = MicrobatchFeed(Numbers(11), plan, workers=workers)
    for _ in range(2):
        keys = [key for _, tensors in feed for key in keys_in(tensors)]
        assert keys == [(0, index) for index in range(5, 11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_cannot_read_is_one_line_in_the_main_process_after_the_good_ones(workers: int) -> None:
    plan = ValidationPlan(size=12, batch_size=2)
    received = []
    with pytest.raises(UserError) as caught:
        received.extend(m for m, _ in MicrobatchFeed(Numbers(12, bad=7), plan, workers=workers))
    assert str(caught.value) == "sample 7 is damaged; delete it"
    assert received == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(workers: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert len(list(MicrobatchFeed(Numbers(8), ValidationPlan(size=8, batch_size=2), workers=workers))) == 4
    assert torch.equal(torch.rand(4), expected)


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(UserError, match="-1 loader workers"):
        MicrobatchFeed(Numbers(8), ValidationPlan(size=8, batch_size=2), workers=-1)


def test_closing_a_feed_half_way_ends_its_workers() -> None:
    feed = MicrobatchFeed(Numbers(100), Plan(size=100, batch_size=2), workers=2)
    reading = iter(feed)
    next(reading)
    assert len(multiprocessing.active_children()) == 2
    reading.close()  # type: ignore[attr-defined]
    feed.close()
    assert not multiprocessing.active_children()
    assert next(iter(feed))[0] == 0  # it can be read again, with new workers
    feed.close()


@dataclass(frozen=True)
class Stuck(Numbers):
    """Reading sample 3 never ends, as on a file system that is gone."""

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        while key == (0, 3):
            signal.pause()
        return super().__getitem__(key)

    def place(self, index: int) -> str:
        return f"/data/{index}.jpg"


def test_a_worker_that_hangs_is_waited_for_until_the_deadline_and_the_message_says_what_it_reads() -> None:
    feed = MicrobatchFeed(Stuck(12), ValidationPlan(size=12, batch_size=2), workers=1, timeout_s=2.0)
    with pytest.raises(UserError, match=r"sent nothing for 2 s; process 0 was reading /data/3\.jpg; .*--timeout"):
        list(feed)
    assert not multiprocessing.active_children()


def test_shared_memory_serves_where_it_is_large_enough_and_its_socket_can_be_made() -> None:
    folder = "/tmp"
    assert shared_memory_serves(needed_bytes=10, free_bytes=10, temporary=folder)
    assert shared_memory_serves(needed_bytes=10, free_bytes=None, temporary=folder)
    assert not shared_memory_serves(needed_bytes=11, free_bytes=10, temporary=folder)
    assert not shared_memory_serves(needed_bytes=0, free_bytes=10, temporary="/tmp/" + "x" * 80)


def test_a_temporary_folder_whose_path_no_socket_can_have_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    plan = ValidationPlan(size=11, batch_size=2)
    keys = [key for _, tensors in MicrobatchFeed(Numbers(11), plan, workers=2) for key in keys_in(tensors)]
    assert keys == [(0, index) for index in range(11)]


READ_LARGE = """
import torch
from pipeline.data.loader import MicrobatchFeed
from pipeline.data.plan import ValidationPlan
class Large:
    def __len__(self): return 8
    def __getitem__(self, key): return (torch.full((1 << 18,), float(key[1])),)
if __name__ == "__main__":
    print([m for m, (x,) in MicrobatchFeed(Large(), ValidationPlan(size=8, batch_size=1), workers=2) if x[0, -1] == m])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a small /dev/shm needs root")
def test_a_shared_memory_smaller_than_a_microbatch_changes_nothing() -> None:
    code = shlex.quote(READ_LARGE)
    small = f"mount -t tmpfs -o size=512k tmpfs /dev/shm && exec {sys.executable} -c {code}"
    run = subprocess.run(["unshare", "-m", "sh", "-c", small], cwd=ROOT, capture_output=True, text=True, timeout=100)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip(f"no mount namespaces here: {run.stderr.strip()}")
    assert run.stdout.strip() == str(list(range(8))), run.stderr


KILL_A_WORKER = """
import multiprocessing, os, signal, sys
from pipeline.data.loader import MicrobatchFeed
from pipeline.data.plan import Plan
from test_feed import Numbers
if __name__ == "__main__":
    feed = MicrobatchFeed(Numbers(100), Plan(size=100, batch_size=2), workers=2)
    reading = iter(feed)
    next(reading)
    if "locked" in sys.argv:  # what a worker holds for a moment before each of its batches, and may die with
        feed._loader._iterator._workers_done_event._cond.acquire()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in reading:
        pass
"""


@pytest.mark.parametrize("state", ["", "locked"])
def test_a_killed_worker_is_an_error_and_no_hang(state: str) -> None:
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    run = subprocess.run(
        [sys.executable, "-c", KILL_A_WORKER, state], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]  # torch may be waiting, or fetching a tensor, when the worker dies
    assert last.startswith("RuntimeError: ")
    assert "DataLoader worker" in last or "a process that reads data died" in last, run.stderr


@pytest.mark.parametrize(
    ("size", "batch_size", "microbatches", "said"),
    [
        (9, 4, 1, "1 of 9 samples are left out of every epoch, others each time: .* fewer than 2, .* BatchNorm"),
        (11, 8, 2, "3 of 11 samples"),
        (12, 8, 2, ""),
    ],
)
def test_a_last_microbatch_of_one_is_left_out_where_the_model_needs_two(
    size: int, batch_size: int, microbatches: int, said: str
) -> None:
    plan = Plan(size=size, batch_size=batch_size, microbatches=microbatches, least=2)
    assert re.match(said, plan.left_out) if said else not plan.left_out
    assert plan.shortest >= 2
    seen = {index for epoch in range(30) for batch in epoch_of(plan, epoch) for index in batch}
    assert seen == set(range(size)), "others each time"
