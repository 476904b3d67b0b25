"""What is trained on what, and everything that follows from the settings before anything is started.

settings, task ─► cut, tie ─► data ─► calendar ─► shape ─► schedule, proved ─► RunPlan, the same on every rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.core.actions import Op
from pipeline.data.epochs import BEGINNING, Calendar, Position
from pipeline.data.loader import Samples
from pipeline.data.plan import Plan
from pipeline.models.criterion import Criterion
from pipeline.models.layered import LayeredModel
from pipeline.models.smallest import least_samples
from pipeline.schedules.orders import Schedule, find_schedule
from pipeline.schedules.program import Shape
from pipeline.schedules.simulate import validate
from pipeline.settings import Settings
from pipeline.simulation.clocks import Waiting
from pipeline.simulation.profile import Profile
from pipeline.stage.build import tie_of
from pipeline.stage.seeding import GENERATOR_LOCK
from pipeline.stage.tied import Tie
from pipeline.train.resuming import Begun

EVEN = Profile()  # nobody is slowed down
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Split(Protocol):
    """What `datasets` gives to train or validate on: inputs and targets apart, so that a stage reads only its own."""

    @property
    def inputs(self) -> Samples: ...
    @property
    def targets(self) -> Samples: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Pace:
    """How long forwards and backwards last at least, in seconds, by whose clock: an emulation."""

    seconds: Mapping[Op, float]
    clock: Waiting


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what: the model as blocks, its loss, and the data; and how fast, if it is emulated."""

    model: LayeredModel
    criterion: Criterion
    train: Split
    val: Split | None
    pace: Pace | None = None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that follows from the settings and is the same on every rank."""

    settings: Settings
    counts: tuple[int, ...]  # blocks per stage
    schedule: Schedule
    shape: Shape
    calendar: Calendar
    tie: Tie | None
    least: int = 1  # samples in a micro-batch
    begun: Begun | None = None  # where it goes on from

    @property
    def position(self) -> Position:
        """Where the run begins in the data."""
        return BEGINNING if self.begun is None else self.begun.position

    @property
    def microbatches(self) -> int:
        return self.shape.microbatches


def plan_run(
    settings: Settings,
    task: Task,
    counts: tuple[int, ...],
    *,
    pipelines: int,
    say: Callable[[str], None],
    elastic: bool = False,
    begun: Begun | None = None,
) -> RunPlan:
    """Settles the run and proves, before anything is started, that its programs fit together.

    `elastic`: how many batches a pipeline does is not known beforehand, and replicas mix weights after updates.
    `begun`: the run that is gone on with.

    Raises:
        UserError: settings that contradict each other or the data.
        DeadlockError: programs that would wait for each other for ever.
    """
    position = BEGINNING if begun is None else begun.position
    with GENERATOR_LOCK:  # blocks are built for a look at them
        tie = tie_of(task.model, counts)
        least = least_in_microbatch(settings, task, pipelines=pipelines)
    data = data_plan(settings, task.train.size, pipelines=pipelines, pipeline=0, least=least, begun=position)
    if data.left_out:
        say(data.left_out)
    calendar = _calendar(settings, data, validates=task.val is not None, begun=begun)
    shape = _shape(settings, counts, data, calendar, tie=tie, pipelines=pipelines, elastic=elastic)
    schedule = find_schedule(settings.pipeline)
    validate(schedule, shape, (calendar.total_batches - calendar.start) * settings.num_microbatches)
    if shape.norm and not schedule.flushes and shape.stages > 1:
        say(f"--pipeline {schedule.name} agrees on a norm at every update: stages wait for each other")
    return RunPlan(
        settings=settings,
        counts=counts,
        schedule=schedule,
        shape=shape,
        calendar=calendar,
        tie=tie,
        least=least,
        begun=begun,
    )


def _calendar(settings: Settings, data: Plan, *, validates: bool, begun: Begun | None) -> Calendar:
    """When the run stops, and for what."""
    return Calendar(
        batches_per_epoch=data.batches_per_epoch,
        epochs=settings.epochs,
        accumulate=settings.accumulate,
        max_updates=settings.max_steps,
        validate_every=settings.validate_every if validates else 0,
        checkpoint_every=settings.checkpoint_every if settings.checkpoint else None,
        start=data.first_batch,
        made=0 if begun is None else begun.updates,
    )


def _shape(
    settings: Settings,
    counts: tuple[int, ...],
    data: Plan,
    calendar: Calendar,
    *,
    tie: Tie | None,
    pipelines: int,
    elastic: bool,
) -> Shape:
    """What the programs of this run are made for."""
    return Shape(
        stages=len(counts),
        microbatches=settings.num_microbatches,
        accumulate=settings.accumulate,
        batches_per_epoch=None if elastic else data.batches_per_epoch,
        first=calendar.start,
        replicas=1 if elastic and settings.elastic else pipelines,
        mixing=elastic and settings.elastic,
        norm=settings.clip_grad_norm is not None or settings.amp == "fp16",
        tie=(tie.owner, tie.borrower) if tie else None,
    )


def least_in_microbatch(settings: Settings, task: Task, *, pipelines: int) -> int:
    """The fewest samples of a micro-batch: one, unless it came to that and the model cannot do with one."""
    plans = [data_plan(settings, task.train.size, pipelines=n, pipeline=0) for n in {1, pipelines}]
    return 1 if min(plan.shortest for plan in plans) > 1 else least_samples(task.model)


def data_plan(
    settings: Settings, size: int, *, pipelines: int, pipeline: int, least: int = 1, begun: Position = BEGINNING
) -> Plan:
    """Which samples which pipeline sees when, from `begun` on."""
    return Plan(
        size=size,
        batch_size=settings.batch_size,
        pipelines=pipelines,
        pipeline=pipeline,
        microbatches=settings.num_microbatches,
        least=least,
        seed=settings.seed,
        begun=begun,
    )
