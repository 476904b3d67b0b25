"""Number formats, memory formats and compilation change how a stage computes, never what the pipeline means."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pipes import OPTIMIZERS, Job, Unsplit, assert_equal, cuts, run_threads, small_mlp
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.models import Block, LayeredModel, make_model
from pipeline.stage.executor import Executor
from pipeline.stage.loss_scaling import LossScaler
from pipeline.stage.stage import StageOptions
from pipeline.transport.local import LocalTransport, local_transports

Tensors = tuple[Tensor, ...]
SCHEDULES = ("gpipe", "1f1b", "pipedream")
OVERFLOWING = 2.0**24  # a loss scale that float16 cannot hold at first


class Mailbag:
    """A transport that remembers what it was given to send, by channel."""

    def __init__(self, inner: LocalTransport) -> None:
        self._inner = inner
        self.sent: dict[str, list[Tensor]] = {"A": [], "G": [], "N": []}

    def send(self, to: int, channel: str, microbatch: int, tensors: Tensors) -> None:
        self.sent[channel] += tensors
        self._inner.send(to, channel, microbatch, tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def trained(job: Job) -> tuple[list[Executor], dict[str, Tensor], list[Mailbag]]:
    mailbags = [Mailbag(transport) for transport in local_transports(len(job.counts), timeout_s=60)]
    executors, state = run_threads(job, mailbags)
    return executors, state, mailbags


def mlp_job(stages: int, schedule: str, *, dropout: float = 0.3, **values: Any) -> Job:
    model = small_mlp(dropout=dropout)
    flushed = schedule != "pipedream"
    defaults = {"microbatches": 3 if flushed else 1, "batches": 4 if flushed else 9}
    return Job(model=model, counts=cuts(len(model.blocks), stages), schedule=schedule, **(defaults | values))


def image_batch(microbatch: int) -> tuple[Tensors, Tensors]:
    """Four images of 16 x 16 and their labels."""
    generator = torch.Generator().manual_seed(microbatch)
    return (torch.randn(4, 3, 16, 16, generator=generator),), (torch.randint(5, (4,), generator=generator),)


def resnet_job(stages: int, schedule: str, **options: Any) -> Job:
    model = make_model("resnet18", num_classes=5, stem="cifar")
    counts = cuts(len(model.blocks), stages)
    microbatches = 1 if schedule == "pipedream" else 2
    return Job(
        model=model, counts=counts, schedule=schedule, batch=image_batch,
        batches=2, microbatches=microbatches, options=StageOptions(**options),
    )  # fmt: skip


def of_the_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the optimiser's momenta, in which another order of additions shows most."""
    return {name: tensor for name, tensor in state.items() if name.startswith("model.")}


class Autocast(Unsplit):
    """The unsplit model under autocast, one context per micro-batch as in any training loop."""

    def loss(self, modules: Any, microbatch: int) -> Tensor:
        with torch.autocast("cpu", dtype=self.job.options.amp):
            return super().loss(modules, microbatch)


class ScaledOptimizer:
    """Loss scaling by the book: unscale, skip and halve at an overflow, double after `growth` good updates."""

    def __init__(self, inner: torch.optim.Optimizer, options: StageOptions) -> None:
        self.inner, self.scale, self.growth = inner, options.loss_scale, options.loss_scale_growth
        self.good, self.skipped, self.norms = 0, 0, []
        self.max_norm = options.max_norm

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        gradients = [p.grad for group in self.inner.param_groups for p in group["params"]]
        if not all(gradient.isfinite().all() for gradient in gradients):
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
            return
        for gradient in gradients:
            gradient /= self.scale
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                [p for group in self.inner.param_groups for p in group["params"]],
                self.max_norm,
                torch.nn.utils.get_total_norm(gradients),
            )
        self.inner.step()
        self.good += 1
        if self.good == self.growth:
            self.scale, self.good = self.scale * 2, 0


class Scaled(Autocast):
    """The unsplit model in float16 with a scaled loss."""

    def __init__(self, job: Job) -> None:
        super().__init__(replace(job, options=replace(job.options, max_norm=None)))
        self.optimizer: Any = ScaledOptimizer(self.optimizer, job.options)

    def loss(self, modules: Any, microbatch: int) -> Tensor:
        return super().loss(modules, microbatch) * self.optimizer.scale

    def expected(self) -> dict[str, Tensor]:
        return self.train_with_delays() if self.job.schedule == "pipedream" else self.train()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 3])
def test_pipelined_bf16_equals_unsplit_bf16_bit_for_bit(stages: int, schedule: str, optimizer: str) -> None:
    job = mlp_job(stages, schedule, optimizer=optimizer, options=StageOptions(amp=torch.bfloat16))
    _, state, mailbags = trained(job)
    unsplit = Autocast(job)
    assert_equal(state, unsplit.train_with_delays() if schedule == "pipedream" else unsplit.train(), tolerance=0)
    travelled = [tensor for bag in mailbags for tensor in bag.sent["A"] + bag.sent["G"]]
    assert all(tensor.dtype is torch.bfloat16 for tensor in travelled)
    assert all(tensor.dtype is torch.float32 for name, tensor in state.items() if "weight" in name)
    assert not torch.equal(
        state["model.head.linear.weight"],
        trained(replace(job, options=StageOptions()))[1]["model.head.linear.weight"],
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 3])
def test_an_overflow_skips_the_update_and_halves_the_scale_on_every_stage(
    stages: int, schedule: str, optimizer: str
) -> None:
    options = StageOptions(amp=torch.float16, loss_scale=OVERFLOWING, loss_scale_growth=2)
    job = mlp_job(stages, schedule, optimizer=optimizer, batches=16, options=options)
    executors, state, _ = trained(job)
    unsplit = Scaled(job)
    assert_equal(state, unsplit.expected(), tolerance=0)
    for executor in executors:
        stage = executor.stage
        assert (stage.scaler.scale, stage.scaler.good_steps) == (unsplit.optimizer.scale, unsplit.optimizer.good)
        assert stage.skipped_updates == unsplit.optimizer.skipped
        assert stage.updates + stage.skipped_updates == job.count // job.group
        assert all(gradient is None for gradient in stage.weights.gradients)
    assert unsplit.optimizer.skipped >= 2, "the scale was meant to be too large"
    assert stage.updates >= 2, "and to come down to what fits"


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_the_scale_grows_between_updates_in_flight_and_is_undone_exactly(schedule: str) -> None:
    options = StageOptions(amp=torch.float16, loss_scale=64.0, loss_scale_growth=1)
    job = mlp_job(3, schedule, batches=6, options=options)
    executors, state, _ = trained(job)
    unsplit = Scaled(job)
    assert_equal(state, unsplit.expected(), tolerance=0)
    assert {executor.stage.scaler.scale for executor in executors} == {64.0 * 2**6}


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream"])
def test_clipping_measures_the_norm_without_the_scale(schedule: str) -> None:
    options = StageOptions(amp=torch.float16, loss_scale=1024.0, max_norm=0.05)
    job = mlp_job(3, schedule, options=options)
    _, state, _ = trained(job)
    assert_equal(state, Scaled(job).expected(), tolerance=1e-6)
    free = replace(job, options=replace(options, max_norm=None))
    assert not torch.equal(state["model.head.linear.weight"], trained(free)[1]["model.head.linear.weight"])


def test_a_loss_scaler_halves_at_once_and_doubles_in_time() -> None:
    scaler = LossScaler(scale=8.0, growth_interval=2)
    seen = []
    for finite in (True, True, True, False, True, True, False, False, False, False, False, False):
        scaler.update(finite)
        seen.append(scaler.scale)
    assert seen == [8, 16, 16, 8, 8, 16, 8, 4, 2, 1, 1, 1]


def small_convnet() -> LayeredModel:
    def build() -> nn.Module:
        layers = {"conv1": nn.Conv2d(3, 4, 3, stride=2), "bn1": nn.BatchNorm2d(4), "flat": nn.Flatten(1)}
        return nn.Sequential(OrderedDict[str, nn.Module](layers, fc=nn.Linear(4 * 7 * 7, 5)))

    return LayeredModel("convnet", (Block("all", "", build),), 0, 0, lambda batch: image_batch(0)[0])


def test_deferred_statistics_are_kept_when_an_update_is_skipped() -> None:
    options = StageOptions(amp=torch.float16, loss_scale=2.0**40, deferred_batchnorm=True)
    job = replace(resnet_job(1, "gpipe"), model=small_convnet(), counts=(1,), options=options)
    executors, state, _ = trained(job)
    assert executors[0].stage.skipped_updates == 2
    assert state["model.bn1.num_batches_tracked"] == 2
    assert not any("_sum" in name or "_count" in name for name in state)


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
@pytest.mark.parametrize("stages", [1, 3])
def test_channels_last_computes_the_same(stages: int, schedule: str) -> None:
    executors, state, mailbags = trained(resnet_job(stages, schedule, channels_last=True))
    _, plain, _ = trained(resnet_job(stages, schedule))
    assert_equal(state, of_the_model(plain), tolerance=2e-3)
    for executor in executors:
        stage = executor.stage
        kernels = [leaf for leaf in stage.weights.newest.leaves if leaf.dim() == 4 and leaf.shape[2] > 1]
        assert kernels and all(_is_channels_last(kernel) for kernel in kernels)
        assert all(
            kernel.untyped_storage().data_ptr() == stage.weights.newest.flats[torch.float32].data_ptr()
            for kernel in kernels
        )
    images = [tensor for bag in mailbags for tensor in bag.sent["A"] + bag.sent["G"] if tensor.shape[2] > 1]
    assert bool(images) == (stages > 1) and all(_is_channels_last(image) for image in images)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_norms_and_biases_are_spared_from_decay_in_every_version(schedule: str, optimizer: str) -> None:
    options = StageOptions(decay_norm_and_bias=False)
    job = mlp_job(3, schedule, optimizer=optimizer, options=options)
    _, state, _ = trained(job)
    unsplit = Unsplit(job)
    parameters = [p for group in unsplit.optimizer.param_groups for p in group["params"]]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wide] for wide in (True, False))
    unsplit.optimizer = OPTIMIZERS[optimizer]([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    assert_equal(state, unsplit.train_with_delays() if schedule == "pipedream" else unsplit.train(), tolerance=0)
    decayed = trained(replace(job, options=StageOptions()))[1]
    assert not torch.equal(state["model.head.linear.bias"], decayed["model.head.linear.bias"])


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recomputation_under_autocast_repeats_the_same_dropout(schedule: str, amp: torch.dtype) -> None:
    options = StageOptions(amp=amp, recompute=True, loss_scale=256.0)
    job = mlp_job(3, schedule, options=options)
    _, state, _ = trained(job)
    assert_equal(state, trained(replace(job, options=replace(options, recompute=False)))[1], tolerance=0)


def test_recomputation_counts_deferred_statistics_once() -> None:
    job = resnet_job(2, "gpipe", deferred_batchnorm=True)
    again = replace(job, options=replace(job.options, recompute=True))
    assert_equal(trained(again)[1], trained(job)[1], tolerance=0)


@pytest.fixture
def compiler() -> Any:
    """Compiled code and counters start afresh."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiled_stages_swap_weights_without_compiling_again(schedule: str, compiler: Any) -> None:
    options = StageOptions(compile=True, compile_backend="aot_eager")
    job = mlp_job(3, schedule, batches=8, options=options)
    executors, state, _ = trained(job)
    assert_equal(state, trained(replace(job, options=StageOptions()))[1], tolerance=1e-5)
    assert [e.stage.weights.versions for e in executors] == ([3, 2, 1] if schedule == "pipedream" else [1, 1, 1])
    assert compiler["stats"]["unique_graphs"] == 3  # 12 -> 16 and 16 -> 16 numbers, and the head
    assert not compiler["graph_break"]


def test_deferred_batchnorm_is_compiled_once_and_whole(compiler: Any) -> None:
    options = {"deferred_batchnorm": True, "channels_last": True}
    job = resnet_job(1, "gpipe", compile=True, compile_backend="aot_eager", **options)
    _, state, _ = trained(job)
    assert_equal(state, of_the_model(trained(resnet_job(1, "gpipe", **options))[1]), tolerance=2e-3)
    assert compiler["stats"]["unique_graphs"] == 9  # the stem, a head, and 7 kinds of blocks
    assert not compiler["graph_break"]
