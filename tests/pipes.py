"""A pipeline for tests: the same steps over threads, MPI or Gloo, and the unsplit training it has to equal."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.draw import mix
from pipeline.models.criterion import Classification, Criterion
from pipeline.models.layered import LayeredModel, build_blocks, tie
from pipeline.models.mlp import mlp
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, program, updates_of
from pipeline.stage.build import make_stage, tie_of
from pipeline.stage.executor import Executor, Hooks
from pipeline.stage.seeding import GENERATOR_LOCK
from pipeline.stage.stage import StageOptions
from pipeline.train.state import OptimizerState, WeightsState

Tensors = tuple[Tensor, ...]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=1e-2),
}
RATE = {"sgd": 0.1, "adamw": 0.01}


def classification_batch(
    microbatch: int, *, size: int = 6, width: int = 12, classes: int = 5
) -> tuple[Tensors, Tensors]:
    """Inputs (size, width) and labels (size,) that depend on the micro-batch's number alone."""
    generator = torch.Generator().manual_seed(1000 + microbatch)
    inputs = torch.randn(size, width, generator=generator)
    return (inputs,), (torch.randint(classes, (size,), generator=generator),)


def small_mlp(*, dropout: float = 0.0, batchnorm: bool = False) -> LayeredModel:
    return mlp(inputs=12, width=16, depth=8, num_classes=5, dropout=dropout, batchnorm=batchnorm, activation="tanh")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run: the model, how it is cut, scheduled and optimised."""

    model: LayeredModel
    counts: tuple[int, ...]
    schedule: str
    microbatches: int = 1
    batches: int = 3
    accumulate: int = 1
    optimizer: str = "sgd"
    seed: int = 7
    criterion: Criterion = field(default_factory=Classification)
    batch: Callable[[int], tuple[Tensors, Tensors]] = classification_batch
    options: StageOptions = field(default_factory=StageOptions)

    @property
    def group(self) -> int:
        """Micro-batches per update."""
        return self.microbatches * self.accumulate

    @property
    def count(self) -> int:
        return self.microbatches * self.batches

    def counts_of(self, microbatch: int) -> Any:
        start = microbatch // self.group * self.group
        targets = [self.batch(m)[1] for m in range(start, min(start + self.group, self.count))]
        return self.criterion.count(tuple(torch.cat(parts) for parts in zip(*targets, strict=True)))


def run_stage(job: Job, position: int, transport: Any) -> tuple[Executor, dict[str, Tensor]]:
    """Trains one stage of `job`; returns its executor and its final state."""
    stages = len(job.counts)
    with GENERATOR_LOCK:
        lent = tie_of(job.model, job.counts)
    shape = Shape(
        stages=stages,
        microbatches=job.microbatches,
        accumulate=job.accumulate,
        norm=job.options.max_norm is not None or job.options.amp is torch.float16,
        tie=(lent.owner, lent.borrower) if lent else None,
    )
    schedule = SCHEDULES[job.schedule]
    window = schedule.window(position, stages, job.microbatches)
    stage = make_stage(
        job.model, job.counts, position, OPTIMIZERS[job.optimizer],
        seed=job.seed, criterion=job.criterion, window=window, options=job.options,
    )  # fmt: skip
    hooks = Hooks(
        inputs=lambda m: job.batch(m)[0],
        targets=lambda m: (job.batch(m)[1], job.counts_of(m)),
        learning_rate=lambda update: RATE[job.optimizer],
    )
    executor = Executor(stage, transport, position=position, stages=stages, hooks=hooks, tie=lent)
    executor.run(program(schedule, shape, position, range(job.count)))
    transport.flush()
    state = WeightsState(stage).tensors() | OptimizerState(stage).tensors()
    return executor, {name: tensor.clone() for name, tensor in state.items()}


def run_threads(job: Job, transports: Sequence[Any]) -> tuple[list[Executor], dict[str, Tensor]]:
    """All stages of `job` as threads; returns the executors and the states put together."""
    results: list[Any] = [None] * len(job.counts)
    errors: list[BaseException] = []

    def work(position: int) -> None:
        try:
            results[position] = run_stage(job, position, transports[position])
        except BaseException as error:  # handed to the test below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(position,), daemon=True) for position in range(len(job.counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert all(result is not None for result in results), "a stage did not finish"
    state: dict[str, Tensor] = {}
    for _, part in results:
        state |= part
    return [executor for executor, _ in results], state


class Unsplit:
    """The whole model in one process, with plain modules and a plain torch optimiser."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.modules = build_blocks(job.model, 0, len(job.model.blocks), job.seed)
        tie(job.model, self.modules)
        if job.options.deferred_batchnorm:
            raise ValueError("the unsplit reference uses the whole batch for that")
        self.optimizer = OPTIMIZERS[job.optimizer](_distinct(self.modules))

    def loss(self, modules: Sequence[nn.Module], microbatch: int) -> Tensor:
        inputs, targets = self.job.batch(microbatch)
        result: Any = inputs
        for index, module in enumerate(modules):
            torch.default_generator.manual_seed(
                mix(self.job.options.seed, self.job.options.pipeline, microbatch, index)
            )
            result = module(*result)
            result = result if isinstance(result, tuple) else (result,)
        loss, _ = self.job.criterion(result, targets, self.job.counts_of(microbatch))
        return loss

    def train(self) -> dict[str, Tensor]:
        """Plain gradient accumulation: one update per batch."""
        for start in range(0, self.job.count, self.job.group):
            self.optimizer.zero_grad()
            for microbatch in range(start, min(start + self.job.group, self.job.count)):
                self.loss(self.modules, microbatch).backward()
            if self.job.options.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(_distinct(self.modules), self.job.options.max_norm)
            self.optimizer.step()
        return self.state()

    def train_with_delays(self) -> dict[str, Tensor]:
        """PipeDream by its recurrence: every micro-batch has a deep copy of the model as its stages saw it.

        Stage s forwards micro-batch k with the weights after the updates that its schedule had made by then;
        the gradient is applied to the newest weights (Narayanan et al., SOSP 2019, section 3.3).
        """
        seen = [self._versions(stage) for stage in range(len(self.job.counts))]
        history = [copy.deepcopy(self.modules)]
        for microbatch in range(self.job.count):
            mixed = self._mixture(history, [versions[microbatch] for versions in seen])
            _copy_buffers(self.modules, mixed)
            self.optimizer.zero_grad()
            self.loss(mixed, microbatch).backward()
            _copy_buffers(mixed, self.modules)
            for parameter, stale in zip(_distinct(self.modules), _distinct(mixed), strict=True):
                parameter.grad = stale.grad
            self.optimizer.step()
            history.append(copy.deepcopy(self.modules))
        return self.state()

    def _versions(self, stage: int) -> list[int]:
        shape = Shape(stages=len(self.job.counts))
        updates, result = 0, []
        for action in updates_of(SCHEDULES[self.job.schedule], shape, stage, range(self.job.count)):
            if action.op.value == "U":
                updates += 1
            elif action.op.value == "F":
                result.append(updates)
        return result

    def _mixture(self, history: list[list[nn.Module]], versions: list[int]) -> list[nn.Module]:
        modules: list[nn.Module] = []
        start = 0
        for count, version in zip(self.job.counts, versions, strict=True):
            modules += copy.deepcopy(history[version][start : start + count])
            start += count
        tie(self.job.model, modules)
        return modules

    def state(self) -> dict[str, Tensor]:
        return {
            f"model.{block.prefix}{name}": tensor
            for block, module in zip(self.job.model.blocks, self.modules, strict=True)
            for name, tensor in module.state_dict().items()
            if block.prefix + name not in self.job.model.ties
        }


def _copy_buffers(source: Sequence[nn.Module], target: Sequence[nn.Module]) -> None:
    """Running statistics have no versions: they go on from micro-batch to micro-batch."""
    with torch.no_grad():
        for old, new in zip(source, target, strict=True):
            for value, buffer in zip(old.buffers(), new.buffers(), strict=True):
                buffer.copy_(value)


def _distinct(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Every expected tensor is there; bit for bit when the tolerance is 0."""
    for name, tensor in expected.items():
        if tolerance == 0:
            assert torch.equal(actual[name], tensor), f"{name} differs by {(actual[name] - tensor).abs().max():.3g}"
        else:
            torch.testing.assert_close(
                actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def cuts(blocks: int, stages: int) -> tuple[int, ...]:
    """`blocks` spread over `stages`, the rest to the first ones."""
    return tuple(blocks // stages + (stage < blocks % stages) for stage in range(stages))
