"""Emulated compute: waits as long as it says, learns, and travels like any other model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from pipes import Job, Unsplit, assert_equal, run_threads
from typing import Any

import pytest
import torch
from tiny import losses, tiny_settings

from pipeline.cluster.world import join_world
from pipeline.core.actions import Op
from pipeline.errors import UserError
from pipeline.models.layered import build_blocks
from pipeline.models.partition import cut_points, needs_profile
from pipeline.placement import Place
from pipeline.settings import Settings
from pipeline.simulation.device import EmulatedDevice
from pipeline.simulation.emulated_model import EmulatedBlock, SumOfShares, emulated_model, samples
from pipeline.simulation.emulation import Emulation, parse_emulate
from pipeline.simulation.parse_profile import parse_profile
from pipeline.simulation.straggler import make_straggler, slowed
from pipeline.stage.stage import StageOptions
from pipeline.train.emulated import make_emulated
from pipeline.train.run import train
from pipeline.transport.local import local_transports

ROOT = Path(__file__).resolve().parent.parent


PACE = {Op.FORWARD: 0.002, Op.BACKWARD: 0.003}


class Watch:
    """A clock that stands still unless it is waited on."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now(self) -> float:
        return self.time_s

    def wait_until(self, moment: float) -> None:
        self.time_s = max(self.time_s, moment)


def block(emulation: Emulation) -> EmulatedBlock:
    torch.manual_seed(0)
    return EmulatedBlock(emulation)


def batch(microbatch: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    rows = samples(4, microbatch)
    return (rows,), (rows[:, 0],)


def emulated_job(stages: int, schedule: str, **options: Any) -> Job:
    model = emulated_model(stages, Emulation(0.5, 1.0, 0.01))
    return Job(
        model=model, counts=(1,) * stages, schedule=schedule, criterion=SumOfShares(), batch=batch, **options
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [("2,3", Emulation(2, 3, 1)), ("0.5, 1, 10", Emulation(0.5, 1, 10)), ("0,0", Emulation(0, 0))]
)
def test_times_and_megabytes_are_read(text: str, expected: Emulation) -> None:
    assert parse_emulate(text) == expected


@pytest.mark.parametrize("text", ["", "2", "2,3,4,5", "two,3", "-1,3", "2,3,0", "2,inf", "nan,1"])
def test_a_mistake_is_told_in_one_line_when_settings_are_built(text: str) -> None:
    with pytest.raises(UserError, match=r"^--emulate .*: expected .* as in 2,3 or 2,3,10$"):
        Settings(emulate=text)


def test_compiling_and_waiting_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--compile with --emulate"):
        Settings(emulate="2,3", compile=True)


def test_ops_last_as_long_as_they_should_and_others_are_left_alone() -> None:
    watch, done = Watch(), []

    def handler(op: Op) -> Callable[[int], None]:
        return lambda microbatch: done.append((op, microbatch))

    ops = (Op.FORWARD, Op.BACKWARD, Op.UPDATE)
    handlers = EmulatedDevice(PACE, watch).wrap({op: handler(op) for op in ops})
    times = []
    for op in ops:
        handlers[op](7)
        times.append(watch.time_s)
    assert times == [pytest.approx(0.002), pytest.approx(0.005), pytest.approx(0.005)]
    assert done == [(op, 7) for op in ops]


def test_the_arithmetic_is_part_of_the_time() -> None:
    watch = Watch()

    def compute(microbatch: int) -> None:
        watch.time_s += 0.0015

    EmulatedDevice({Op.FORWARD: 0.002}, watch).wrap({Op.FORWARD: compute})[Op.FORWARD](0)
    assert watch.time_s == pytest.approx(0.002)


class LateWatch(Watch):
    """Its waits end late."""

    late_s = 0.0005

    def wait_until(self, moment: float) -> None:
        if moment > self.time_s:
            self.time_s = moment + self.late_s


def walk(watch: Watch, walked: tuple[Op, ...], took_s: dict[Op, float]) -> list[float]:
    """The moments at which ops return that keep the host busy for so long."""

    def handler(op: Op) -> Callable[[int], None]:
        def act(microbatch: int) -> None:
            watch.time_s += took_s.get(op, 0.0)

        return act

    handlers, times = EmulatedDevice(PACE, watch).wrap({op: handler(op) for op in walked}), []
    for op in walked:
        handlers[op](0)
        times.append(round(watch.time_s * 1e3, 6))
    return times


def test_late_sleeps_and_updates_are_made_up_for_by_the_next_op() -> None:
    step = (Op.FORWARD, Op.BACKWARD, Op.UPDATE)
    times = walk(LateWatch(), step * 100, {Op.FORWARD: 0.0001, Op.BACKWARD: 0.0002, Op.UPDATE: 0.0003})
    assert times[:6] == [2.5, 5.5, 5.8, 7.5, 10.5, 10.8]
    assert times[-2] == 500.5, "100 steps of 5 ms, the last of which ended late"


def test_arithmetic_that_lasts_longer_takes_its_time() -> None:
    steps = (Op.FORWARD, Op.BACKWARD) * 10
    assert walk(Watch(), steps, {Op.FORWARD: 0.009})[-1] == pytest.approx(90, abs=10)


def test_a_slow_device_is_slow_however_late_its_host_is() -> None:
    watch = LateWatch()
    device = EmulatedDevice(PACE, watch)
    straggler = make_straggler(
        parse_profile("slow:factor=2"), Place(0, 0, "w0"), seed=0, device=torch.device("cpu"), clock=device
    )
    assert straggler is not None
    handlers = slowed(device.wrap({op: lambda microbatch: None for op in (Op.FORWARD, Op.BACKWARD)}), straggler)
    for microbatch in range(100):
        for handler in handlers.values():
            handler(microbatch)
    assert watch.time_s == pytest.approx(1.0005), "100 steps of 10 ms, the last of which was noticed late"


def test_loading_is_hidden_and_mixing_is_not() -> None:
    ops = (Op.FORWARD, Op.BACKWARD, Op.UPDATE, Op.MIX, Op.LOAD, Op.FORWARD)
    took = {Op.UPDATE: 0.0002, Op.MIX: 0.0004, Op.LOAD: 0.001}
    assert walk(LateWatch(), ops, took) == [2.5, 5.5, 5.7, 6.1, 7.1, 7.9]


def test_a_device_that_waited_for_others_has_nothing_to_make_up_for() -> None:
    ops = (Op.FORWARD, Op.RECV_GRADIENT, Op.BACKWARD)
    assert walk(LateWatch(), ops, {Op.RECV_GRADIENT: 0.0003}) == [2.5, 2.8, 6.3]
    assert walk(LateWatch(), ops, {Op.RECV_GRADIENT: 0.01}) == [2.5, 12.5, 16.0]


def test_a_host_that_was_stopped_is_not_made_up_for() -> None:
    watch = LateWatch()
    watch.late_s = 3.0
    assert walk(watch, (Op.FORWARD,) * 7, {}) == [3002] * 6 + [6004], "10 ms of it are"


def test_the_gradient_is_that_of_the_summed_squares() -> None:
    module = block(Emulation(0, 0, 0.001))
    x = samples(8, 1).requires_grad_()
    y = module(x)
    assert torch.equal(y[:, 0], x[:, 0])
    y[:, 1].mean().backward()
    weight = module.weight.detach().clone().requires_grad_()
    terms = (weight[None] - x.detach()[:, :1]).square() / 2  # (batch, weights)
    torch.testing.assert_close(y[:, 1].detach(), terms.detach().mean(1))
    terms.sum(1).mean().backward()
    torch.testing.assert_close(module.weight.grad, weight.grad)


@pytest.mark.parametrize("megabytes", [0.001, 1.0, 3.0])
def test_weights_are_as_large_as_asked(megabytes: float) -> None:
    (module,) = build_blocks(emulated_model(1, Emulation(0, 0, megabytes)), 0, 1, 0)
    assert sum(parameter.nbytes for parameter in module.parameters()) == megabytes * 1e6


def test_a_model_travels_to_other_processes_and_is_cut_one_block_a_stage() -> None:
    model = pickle.loads(pickle.dumps(emulated_model(4, Emulation(1, 2, 0.01))))
    assert not needs_profile(model, None, (1, 1, 1, 1))
    assert cut_points(model, None, (1, 1, 1, 1)) == (1, 1, 1, 1)
    modules = build_blocks(model, 1, 3, 5)
    assert torch.equal(modules[1].weight, build_blocks(model, 0, 4, 5)[2].weight)  # type: ignore[arg-type]
    copy.deepcopy(modules[0])


@pytest.mark.parametrize(("schedule", "microbatches"), [("gpipe", 4), ("1f1b", 4), ("dp", 1)])
def test_pipelined_equals_unsplit(schedule: str, microbatches: int) -> None:
    job = emulated_job(1 if schedule == "dp" else 3, schedule, microbatches=microbatches)
    _, state = run_threads(job, local_transports(len(job.counts), timeout_s=60))
    assert_equal(state, Unsplit(job).train(), tolerance=1e-5)


@pytest.mark.parametrize("options", [StageOptions(recompute=True), StageOptions(amp=torch.bfloat16)])
def test_options_of_a_stage_work(options: StageOptions) -> None:
    executors, state = run_threads(emulated_job(2, "pipedream", options=options), local_transports(2, timeout_s=60))
    assert len(executors) == 2 and all(tensor.isfinite().all() for tensor in state.values())


def test_replicas_that_see_other_samples_drift_apart() -> None:
    modules = [block(Emulation(0, 0, 0.01)) for _ in range(2)]
    for number, module in enumerate(modules):
        module(samples(4, number))[:, 1].mean().backward()
    first, second = (module.weight.grad for module in modules)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("task", ["resnet", "bert"])
def test_the_loss_of_a_whole_run_falls(tmp_path: Path, task: str) -> None:
    settings = tiny_settings(
        tmp_path, emulate="0.2,0.2,0.1", max_steps=30, epochs=9, task=task, learning_rate=0.02,
        model="bert-base" if task == "bert" else "resnet18",
    )  # fmt: skip
    made = make_emulated(settings, stages=1, pipelines=1)
    assert made.train.size == 8 * 30 and made.val is None
    train(settings, made, join_world(None, timeout_s=60, directory=ROOT))
    curve = losses(tmp_path)
    assert len(curve) == 30 and curve[-1] < 0.5 * curve[0]


def test_an_epoch_has_a_hundred_updates_unless_told() -> None:
    settings = Settings(emulate="2,3", batch_size=4, accumulate=2)
    assert make_emulated(settings, stages=2, pipelines=4).train.size == 4 * 4 * 2 * 100
