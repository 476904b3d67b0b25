"""What an executor sends to whom, and that it keeps nothing when a program is over."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pipes import Job, assert_equal, cuts, run_threads, small_mlp
from typing import Any

import pytest
import torch
from test_equivalence import bert_job
from torch import Tensor

from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, edges, forward_only
from pipeline.stage.executor import Executor
from pipeline.stage.stage import StageOptions
from pipeline.transport.local import LocalTransport, local_transports
from pipeline.transport.protocol import HOST_CHANNELS

SCHEDULED = ("gpipe", "1f1b", "pipedream")


class Watched:
    """A transport that remembers who was sent something on which channel."""

    def __init__(self, inner: LocalTransport, stage: int) -> None:
        self._inner, self._stage = inner, stage
        self.sent: set[tuple[int, int, str]] = set()

    def send(self, to: int, channel: str, microbatch: int, tensors: tuple[Tensor, ...]) -> None:
        self.sent.add((self._stage, to, channel))
        assert channel not in HOST_CHANNELS or all(tensor.device.type == "cpu" for tensor in tensors)
        self._inner.send(to, channel, microbatch, tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def mlp_job(stages: int, schedule: str, **values: Any) -> Job:
    """Three updates of two batches each, of four micro-batches where batches are split."""
    model = small_mlp(dropout=0.3)
    flushed = schedule in ("gpipe", "1f1b")
    return Job(
        model=model, counts=cuts(len(model.blocks), stages), schedule=schedule,
        microbatches=4 if flushed else 1, batches=6, accumulate=2, **values,
    )  # fmt: skip


def evaluate_all(executors: Sequence[Executor], count: int) -> list[dict[str, float]]:
    """A validation of `count` micro-batches by all stages at once."""
    results: list[dict[str, float]] = [{}] * len(executors)

    def work(position: int) -> None:
        results[position] = executors[position].evaluate(forward_only(position, len(executors), range(count)))

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(executors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


NORMS = {"clipped": {"max_norm": 0.05}, "fp16": {"amp": torch.float16}, "free": {}}


@pytest.mark.parametrize("schedule", SCHEDULED)
@pytest.mark.parametrize(("stages", "kind"), [*((n, "clipped") for n in range(1, 9)), (4, "fp16"), (4, "free")])
def test_devices_send_along_the_edges_and_every_book_is_empty_afterwards(stages: int, kind: str, schedule: str) -> None:
    norm: dict[str, Any] = NORMS[kind]
    job = mlp_job(stages, schedule, options=StageOptions(**norm))
    watched = [Watched(end, stage) for stage, end in enumerate(local_transports(stages, timeout_s=60))]
    executors, _ = run_threads(job, watched)
    assert [executor.left() for executor in executors] == [{}] * stages
    assert all(executor.stage.weights.newest.holders == 0 for executor in executors)
    assert all(gradient is None for executor in executors for gradient in executor.stage.weights.gradients)
    sums = evaluate_all(executors, 5)
    assert sums[-1]["samples"] == 5 * 6 and not any(sums[:-1])
    assert [executor.left() for executor in executors] == [{}] * stages

    used = {each[:2] for bag in watched for each in bag.sent if each[2] not in HOST_CHANNELS}
    shape = Shape(stages=stages, microbatches=job.microbatches, accumulate=2, norm=bool(norm))
    assert used == edges(SCHEDULES[schedule], shape)
    norms = {each[:2] for bag in watched for each in bag.sent if each[2] == "N"}
    everybody = {(one, other) for one in range(stages) for other in range(stages) if one != other}
    assert norms == (everybody if norm else set())


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_a_tied_weight_has_edges_of_its_own(schedule: str) -> None:
    flushed = schedule != "pipedream"
    options = StageOptions(max_norm=0.5)
    job = bert_job(4, schedule, microbatches=3 if flushed else 1, batches=3, options=options)
    watched = [Watched(end, stage) for stage, end in enumerate(local_transports(4, timeout_s=60))]
    executors, _ = run_threads(job, watched)
    assert [executor.left() for executor in executors] == [{}] * 4
    assert all(loan.gradient is None for executor in executors for loan in executor.stage.borrowed)
    used = {each[:2] for bag in watched for each in bag.sent if each[2] not in HOST_CHANNELS}
    shape = Shape(stages=4, microbatches=job.microbatches, norm=True, tie=(0, 3))
    assert used == edges(SCHEDULES[schedule], shape) == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (0, 3), (3, 0)}


@pytest.mark.parametrize("tied", [False, True], ids=["mlp", "tied bert"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_clipped_run_has_the_same_digits_wherever_it_is_cut(schedule: str, tied: bool) -> None:
    options = StageOptions(max_norm=0.05)

    def trained(stages: int) -> dict[str, Tensor]:
        job = mlp_job(stages, schedule, optimizer="adamw", options=options)
        if tied:
            job = bert_job(stages, schedule, batches=4, optimizer="adamw", options=options)
        return run_threads(job, local_transports(stages, timeout_s=60))[1]

    whole = trained(1)
    for stages in (2, 3):
        assert_equal(trained(stages), whole, tolerance=0)


def test_the_norm_is_that_of_all_parameters() -> None:
    job = mlp_job(1, "gpipe", options=StageOptions(max_norm=1e9))
    executors, _ = run_threads(replace(job, batches=2), local_transports(1))
    stage = executors[0].stage
    stage.weights.gradients[:] = [torch.full(slot.shape, 3.0) for slot in stage.weights.slots]
    stage.weights.gradients[0] = None
    sizes = [slot.size for slot in stage.weights.slots]
    assert stage.gradient_squares().dtype is torch.float64
    torch.testing.assert_close(
        stage.gradient_squares(), torch.tensor([0.0, *(9.0 * size for size in sizes[1:])], dtype=torch.float64)
    )
