"""Update rules over a stage's flat parameters, and learning rates as pure functions of the update's number.

    rate = make_learning_rate(settings, updates_per_epoch=390)   # rate(0) = lr / W ... rate(W - 1) = lr
    optimizer = optimizer_of(settings)(parameters)

Nothing here remembers how far training is, so a resumed run only needs the update's number.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.settings import Settings

T = TypeVar("T")
LearningRate = Callable[[int], float]  # the number of an update, from 0 -> its rate
ParamGroups = Iterable[Tensor] | Iterable[dict[str, Any]]
OptimizerFactory = Callable[[ParamGroups], torch.optim.Optimizer]

REFERENCE_DECAY: Mapping[str, tuple[float, int]] = MappingProxyType(
    {"imagenet": (0.2, 30), "imagefolder": (0.2, 30)}  # factor, epochs between decays
)
CIFAR_DECAY = (0.1, 60)
STEP_FACTOR = 0.1
POLY_POWER = 2.0


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-7,
    fused: bool = True,
) -> OptimizerFactory:
    """A function from parameters (or groups of them) to a torch optimiser; the name is "sgd" or "adamw".

    SGD: g += decay w; v = momentum v + g; w -= rate v. AdamW decouples the decay; `eps` is the reference's.
    torch's fused rules take one pass over memory, on CPU 3 to 6 times faster. Where a flat tensor is cut does not
    change their bits if the parts are multiples of 16 elements; in a tail the last bit may differ.

    Raises:
        UserError: an unknown name.
    """
    rules: dict[str, OptimizerFactory] = {
        "sgd": partial(
            torch.optim.SGD,
            lr=learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fused=fused,
        ),
        "adamw": partial(
            torch.optim.AdamW, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        ),
    }
    return _choose(rules, name, what="optimizer")


def optimizer_of(settings: Settings) -> OptimizerFactory:
    """The update rule that the settings ask for."""
    return make_optimizer(
        settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
    )


SCALES: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {"none": lambda batches: 1.0, "linear": float, "sqrt": math.sqrt}
)


def scaled(settings: Settings, *, pipelines: int) -> Settings:
    """The settings with the rate that --scale-lr makes of theirs, for so many pipelines.

    What they do until all have met once is one update of K P batches: under all-reduce at once, under the other
    synchronisers as the mean of weights that each of P replicas moved by K batches (Goyal et al. 2017, section 2.1).
    """
    factor = SCALES[settings.scale_lr](settings.accumulate * pipelines)
    return dataclasses.replace(settings, learning_rate=settings.learning_rate * factor)


def make_learning_rate(settings: Settings, *, updates_per_epoch: int) -> LearningRate:
    """The rate of every update: linear warm-up, then the schedule of --lr-schedule.

    It depends on --epochs and never on --max-steps, so a run that is cut short follows the same curve.

    Raises:
        UserError: no update fits in an epoch.
    """
    if updates_per_epoch < 1:
        raise UserError(
            f"--batch-size {settings.batch_size} with --accumulate {settings.accumulate}: an epoch has "
            "too few samples for one update; give a smaller batch"
        )
    lr = settings.learning_rate
    warmup = settings.warmup_updates(updates_per_epoch)
    total = settings.epochs * updates_per_epoch
    milestones = settings.lr_milestones or default_milestones(settings.epochs)
    factor = STEP_FACTOR if settings.lr_factor is None else settings.lr_factor
    schedules: dict[str, Callable[[], LearningRate]] = {
        "reference": lambda: _reference(settings, updates_per_epoch),
        "constant": lambda: constant(lr),
        "step": lambda: step(lr, milestones=[m * updates_per_epoch for m in milestones], factor=factor),
        "poly": lambda: poly(lr, start=warmup, end=total),
        "cosine": lambda: cosine(lr, start=warmup, end=total),
    }
    return warm_up(lr, updates=warmup, then=_choose(schedules, settings.lr_schedule, what="schedule")())


def default_milestones(epochs: int) -> tuple[int, ...]:
    """Where "step" acts unless told: after one half and three quarters of the epochs."""
    return tuple(sorted({max(1, epochs // 2), max(1, 3 * epochs // 4)}))


def warm_up(lr: float, *, updates: int, then: LearningRate) -> LearningRate:
    """lr / W, 2 lr / W, ... lr over the first W `updates`, then `then` of the update's own number."""
    return lambda update: lr * (update + 1) / updates if update < updates else then(update)


def constant(lr: float) -> LearningRate:
    """The same rate for ever."""
    return lambda update: lr


def step(lr: float, *, milestones: Sequence[int], factor: float) -> LearningRate:
    """The rate times `factor` for each milestone (a number of updates, ascending) that has been reached."""
    return lambda update: lr * factor ** bisect_right(milestones, update)


def poly(lr: float, *, start: int, end: int, power: float = POLY_POWER) -> LearningRate:
    """lr (1 - t)^power, where t runs from 0 at update `start` to 1 at `end`."""
    return lambda update: lr * (1 - _part(update, start, end)) ** power


def cosine(lr: float, *, start: int, end: int) -> LearningRate:
    """lr (1 + cos(pi t)) / 2, where t runs from 0 at update `start` to 1 at `end`."""
    return lambda update: lr * (1 + math.cos(math.pi * _part(update, start, end))) / 2


def decay_by_epoch(lr: float, *, factor: float, every: int, updates_per_epoch: int) -> LearningRate:
    """The reference's decay: after the epoch of index e the rate becomes lr factor^(e // every).

    It is set at the end of an epoch, so the first decay acts from epoch `every` + 1 (31 or 61) on.
    """
    return lambda update: lr * factor ** (max(0, update // updates_per_epoch - 1) // every)


def _reference(settings: Settings, updates_per_epoch: int) -> LearningRate:
    if settings.task == "bert":
        return constant(settings.learning_rate)
    factor, every = REFERENCE_DECAY.get(settings.dataset, CIFAR_DECAY)
    return decay_by_epoch(settings.learning_rate, factor=factor, every=every, updates_per_epoch=updates_per_epoch)


def _part(update: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (update - start) / max(1, end - start)))


def _choose(table: Mapping[str, T], name: str, *, what: str) -> T:
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; choose from {', '.join(table)}")
    return table[name]
