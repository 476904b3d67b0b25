"""The training loop: puts model, data, schedule and transport of one rank together and runs them to the end.

    settings ─► cut, schedule, calendar ─► stage + transport ─► run … validate … checkpoint … run ─► report

The pipe runs from stop to stop of the calendar (`pipeline/data/epochs.py`); between two stops the executor is never
interrupted, across epochs too. Every rank runs the same code; what it prints depends on who it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from time import perf_counter, time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.cluster.world import World
from pipeline.core.actions import Handlers
from pipeline.core.trace import Recorder, shift
from pipeline.data.epochs import Position
from pipeline.data.loader import Microbatches, MicrobatchFeed, Samples
from pipeline.data.plan import ValidationPlan
from pipeline.data.supply import InputSupply, TargetSupply
from pipeline.replicas.gradients import GradientReducer
from pipeline.report.progress import LiveProgress
from pipeline.report.run_log import run_name
from pipeline.report.summary import RankReport, peak_memory_bytes
from pipeline.report.training_log import Journal
from pipeline.schedules import program as schedules
from pipeline.simulation.device import EmulatedDevice
from pipeline.simulation.profile import Profile
from pipeline.simulation.straggler import Straggler, make_straggler, slowed
from pipeline.stage.build import make_stage
from pipeline.stage.executor import Executor, Hooks, NoReducer, Reducer
from pipeline.stage.gpu_clock import GpuClock, cuda_clock
from pipeline.stage.stage import Stage, StageOptions
from pipeline.train.archive import Archive
from pipeline.train.optim import LearningRate, make_learning_rate, optimizer_of, scaled
from pipeline.train.plan import AMP, EVEN, RunPlan, Task, data_plan
from pipeline.train.resuming import Begun, modern, what_must_stay
from pipeline.train.state import LossScaleState, OptimizerState, Stateful, States, UpdatesState, WeightsState
from pipeline.train.validation import run_validation, validation_hooks
from pipeline.transport.protocol import Transport


def _slowed_down(handlers: Handlers, *, device: EmulatedDevice | None, straggler: Straggler | None) -> Handlers:
    """The handlers of training as an emulation and a simulated straggler make them last."""
    if device is not None:
        handlers = device.wrap(handlers)
    return handlers if straggler is None else slowed(handlers, straggler)


def other_threads(was: int, now: int) -> str:
    """What is said when a checkpoint is resumed with another number of threads: sums are then rounded otherwise."""
    return (
        f"the checkpoint was written with {was} thread(s) a process, this run has {now}: they agree up to rounding, "
        f"not bit for bit; set OMP_NUM_THREADS={was} for that"
    )


class Trainer:
    """One rank of a training run; `profile` says how it is slowed down, for a simulation."""

    def __init__(self, plan: RunPlan, task: Task, world: World, transport: Transport, profile: Profile = EVEN) -> None:
        self.plan, self.task, self.world, self.transport = plan, task, world, transport
        self.profile = profile
        self.settings, self.calendar = plan.settings, plan.calendar
        self.position, self.stages = world.stage, world.num_stages
        self.recorder = Recorder(pipeline=world.pipeline, stage=self.position, steps=self.settings.trace_steps)
        self.data = data_plan(
            self.settings,
            task.train.size,
            pipelines=world.num_pipelines,
            pipeline=world.pipeline,
            least=plan.least,
            begun=plan.position,
        )
        self.stage = self._make_stage()
        self.stage.name_of = self._name_of
        self.batches = plan.calendar.start  # that have gone through
        self.must_stay = what_must_stay(self.settings)  # now, while the files that it is read from are there
        self.over = False  # whether the job has ended without this rank
        self.saver = 0  # the pipeline that writes checkpoints
        self.archive = Archive(self.settings, world)
        self.reducer = self._make_reducer()
        told = scaled(self.settings, pipelines=world.num_pipelines)
        by_epoch = make_learning_rate(told, updates_per_epoch=self.calendar.updates_per_epoch)
        self.rate: LearningRate = lambda update: by_epoch(update - self.calendar.shift)
        self.clock = self._make_clock()
        self.hooks = Hooks(
            learning_rate=self.rate, updated=self._updated, record=self.recorder.record if self.clock is None else None
        )
        self._end_step = self.recorder.end_step if self.clock is None else self.clock.end_step
        self.executor = self._make_executor()
        self.states = States(self._stateful())
        self.progress = LiveProgress(world.control)
        self.journal = self._make_journal() if self.is_last else None
        self.seconds = 0.0
        self.stretches: list[tuple[float, float]] = []  # of training, between two stops
        self.samples = 0

    @property
    def is_last(self) -> bool:
        return self.position == self.stages - 1

    @property
    def had_nothing_to_do(self) -> bool:
        """Whether the run that it goes on with was over already."""
        return self.calendar.start >= self.calendar.total_batches

    def _make_clock(self) -> GpuClock | None:
        """On a GPU its own clock; elsewhere the host's will do."""
        if self.world.device.type != "cuda":
            return None
        return cuda_clock(self.world.device, record=self.recorder.record, end_step=self.recorder.end_step)

    def _make_executor(self, **more: Any) -> Executor:
        pace = self.task.pace
        device = None if pace is None else EmulatedDevice(pace.seconds, pace.clock)
        straggler = make_straggler(
            self.profile,
            self.world.row[self.position],
            seed=self.settings.seed,
            device=self.world.device,
            release=self.transport.release,
            clock=device,
        )
        return Executor(
            self.stage,
            self.transport,
            position=self.position,
            stages=self.stages,
            hooks=self.hooks,
            reducer=self.reducer,
            tie=self.plan.tie,
            wrap=partial(_slowed_down, device=device, straggler=straggler),
            clock=self.clock,
            **more,
        )

    def _make_stage(self) -> Stage:
        settings, schedule = self.settings, self.plan.schedule
        options = StageOptions(
            seed=settings.seed,
            pipeline=self.world.pipeline,
            amp=AMP[settings.amp],
            recompute=settings.recompute,
            channels_last=settings.channels_last,
            compile=settings.compile,
            deferred_batchnorm=settings.batchnorm == "deferred",
            decay_norm_and_bias=not settings.no_decay_norm_bias,
            max_norm=settings.clip_grad_norm,
        )
        return make_stage(
            self.task.model,
            self.plan.counts,
            self.position,
            optimizer_of(settings),
            seed=settings.seed,
            criterion=self.task.criterion,
            window=schedule.window(self.position, self.stages, self.plan.microbatches),
            device=self.world.device,
            options=options,
        )

    def _stateful(self) -> list[Stateful]:
        """Who has state here, in the order in which it is loaded."""
        stage = self.stage
        found: list[Stateful] = [WeightsState(stage), OptimizerState(stage), UpdatesState(stage)]
        if stage.options.amp is torch.float16:
            found.append(LossScaleState(stage.scaler))
        return found

    def _name_of(self, microbatch: int) -> int:
        """What a micro-batch is called where random numbers are drawn: by its place in the data, so none come twice."""
        return self.data.name(microbatch)

    def _make_reducer(self) -> Reducer:
        if self.world.num_pipelines == 1:
            return NoReducer()
        tie = self.plan.tie
        return GradientReducer(
            self.stage.weights,
            self.world.replicas(),
            late=frozenset({tie.owner_name}) if tie and tie.owner == self.position else frozenset(),
            timeout_s=self.world.timeout_s,
            description=f"stage {self.position} of the other pipelines",
        )

    def _make_journal(self) -> Journal:
        return Journal(
            self.settings,
            self.calendar,
            self.task.criterion,
            speaks=lambda: self.world.pipeline == 0,
            rate=self.rate,
            sum_over_pipelines=self.world.sum_over_pipelines,
            progress=self.progress,
            busy_s=lambda: self.executor.busy_s,
            device=str(self.world.device),
            run_name=run_name(self.settings.name, now=datetime.now()),
            resumed=self.settings.resume is not None,
        )

    # --- running

    def run(self) -> None:
        """Trains from where it stands to the end of the calendar."""
        self._supply_data()
        if self.journal is not None:
            self.journal.begin(self.batches)
        while self.batches < self.calendar.total_batches:
            began = perf_counter()
            self._run_to(self.calendar.next_stop(self.batches))
            self._average_buffers()
            started = perf_counter()
            self.stretches.append((began, started))
            if self.calendar.validates(self.batches):
                self._validate(pipelines=self.world.num_pipelines, pipeline=self.world.pipeline)
            if self.calendar.checkpoints(self.batches):
                self.save()
            if self.journal is not None:
                self.journal.paused(perf_counter() - started)

    def _run_to(self, stop: int) -> None:
        microbatches, started = self.plan.microbatches, perf_counter()
        feed = range(self.batches * microbatches, stop * microbatches)
        self._carry_out(feed)
        self.seconds += perf_counter() - started
        self.samples += sum(self.data.batch_length(batch) for batch in range(self.batches, stop))
        self.batches = stop

    def _carry_out(self, feed: Iterable[int]) -> None:
        """Trains on these micro-batches; returns when the pipe is empty and everything has left."""
        self.executor.run(schedules.program(self.plan.schedule, self.plan.shape, self.position, feed))
        self.transport.flush()
        if self.clock is not None:
            self.clock.settle()

    def _updated(self, microbatch: int) -> None:
        """After every update, on every rank."""
        self._end_step()
        if self.journal is not None:
            self.journal.updated(microbatch // self.plan.microbatches + 1, self.stage.take_sums())

    def _supply_data(self) -> None:
        start, stop = (n * self.plan.microbatches for n in (self.batches, self.calendar.total_batches))
        if self.position == 0:
            feed = self._feed(self.task.train.inputs, self.data, start, stop, self._workers())
            self.hooks.inputs = InputSupply(iter(feed))
        if self.is_last:
            feed = self._feed(self.task.train.targets, self.data, start, stop, 0)
            self.hooks.targets = TargetSupply(
                iter(feed),
                self.task.criterion,
                ends_update=self._ends_update,
                device=self.world.device,
                shared=self._mean_over_pipelines if self.task.criterion.uneven else None,
            )

    def _workers(self) -> int:
        """Processes that read inputs: as given, else two where files have to be decoded."""
        if self.settings.workers is not None:
            return self.settings.workers
        return 2 if self.settings.dataset in ("imagenet", "imagefolder") else 0

    def _mean_over_pipelines(self, counts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of normalisers over the last stages, so that P batches of b weigh like one of P * b."""
        if self.world.num_pipelines == 1:
            return counts
        flat = torch.stack(counts)
        dist.all_reduce(flat, group=self.world.last_row())
        return tuple(flat.div_(self.world.num_pipelines))

    def _ends_update(self, microbatch: int) -> bool:
        last = (self.calendar.total_batches * self.plan.microbatches) - 1
        return microbatch == last or self.plan.shape.ends_update(microbatch)

    def _feed(self, samples: Samples, plan: Microbatches, start: int, stop: int | None, workers: int) -> MicrobatchFeed:
        return MicrobatchFeed(
            samples,
            plan,
            start_microbatch=start,
            stop_microbatch=stop,
            workers=workers,
            pin_memory=self.world.device.type == "cuda",
            timeout_s=self.world.timeout_s,
        )

    # --- at the stops

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Running statistics of BatchNorm become the mean over the replicas, who have seen different samples."""
        if self.world.num_pipelines == 1:
            return
        buffers = self.stage.floating_buffers()
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat, group=self.world.replicas())
        means = torch.split(flat.div_(self.world.num_pipelines), [buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _validate(self, *, pipelines: int, pipeline: int) -> None:
        """Pipeline `pipeline` of the `pipelines` that take part does its share."""
        val = self.task.val
        assert val is not None
        plan = ValidationPlan(
            size=val.size, batch_size=self.settings.batch_size, pipelines=pipelines, pipeline=pipeline
        )
        hooks = validation_hooks(
            self._feed(val.inputs, plan, 0, None, self._workers()) if self.position == 0 else None,
            self._feed(val.targets, plan, 0, None, 0) if self.is_last else None,
            device=self.world.device,
        )
        program = schedules.forward_only(self.position, self.stages, range(plan.count))
        sums = run_validation(self.executor, self.transport, program, hooks)
        if self.journal is not None:
            self.journal.validated(self.batches, sums or dict.fromkeys(self.task.criterion.names, 0.0))

    def save(self) -> None:
        """Writes a checkpoint: the stages of one pipeline, whose weights are those of every pipeline."""
        journal = self.journal.state() if self.journal is not None else None
        if self.settings.checkpoint is not None:
            self.by_saver(lambda: self._save(journal))

    def by_saver(self, write: Callable[[], None]) -> None:
        """`write` on all stages of the pipeline that writes; called by all pipelines."""
        if self.saver == self.world.pipeline:
            write()

    def may_write(self) -> None:
        """Raises `Fenced` where this pipeline may not write for the others any more; all its stages call this."""

    def _save(self, journal: dict[str, Any] | None) -> None:
        updates = self.calendar.updates_after(self.batches)
        values = {
            "position": self._read_so_far()._asdict(),
            "updates": updates,
            "states": self.states.values(),
            "settings": self.settings.to_values(),
            "same": self.must_stay,
            "samples": self.task.train.size,
            "threads": torch.get_num_threads(),
            "partition": list(self.plan.counts),
            "journal": self.world.from_last_stage(journal),
        }
        tensors, group = self.states.tensors(), self.world.pipeline_group()
        folder = self.archive.save(updates, tensors=tensors, values=values, group=group, ask=self.may_write)
        if folder is not None and self.world.control is not None and self.position == 0:
            self.world.control.publish("last checkpoint", str(folder))

    def _read_so_far(self) -> Position:
        """Where the run has come to in the data."""
        return self.data.position(self.batches)

    def resume(self, begun: Begun) -> None:
        """Goes on from a checkpoint, written with any number of stages and pipelines.

        Raises:
            UserError: it cannot be read, or lacks what this model needs.
        """
        from pipeline.train import checkpoint

        values, shapes = modern(checkpoint.read_values(begun.folder)), checkpoint.read_shapes(begun.folder)
        room = self.states.room(shapes)
        checkpoint.load(begun.folder, room)
        self.states.load(room, values["states"])
        self.stage.updates = begun.updates - self.stage.skipped_updates
        if self.journal is not None:
            self.journal.restore(values["journal"])
            told = self.states.told(shapes, values["states"])
            self.journal.log.say(f"resumed from {begun.folder} after {begun.updates} updates, {told}")
            if self.world.device.type == "cpu" and values.get("threads", now := torch.get_num_threads()) != now:
                self.journal.log.say(other_threads(values["threads"], now))

    def curve(self) -> list[tuple[float, float]]:
        """The loss after every batch, as (update, loss); of a last stage."""
        return [] if self.journal is None else self.journal.log.curve

    def report(self) -> RankReport:
        """What this rank did, for the summary; times on the clock of the day, which hosts share."""
        to_day = time() - perf_counter()
        return RankReport(
            rank=self.world.rank,
            host=self.world.host,
            device=str(self.world.device),
            pipeline=self.world.pipeline,
            stage=self.position,
            samples=self.samples,
            seconds=self.seconds,
            busy_s=self.executor.busy_s,
            versions=self.stage.weights.versions,
            peak_bytes=peak_memory_bytes(str(self.world.device)),
            bytes_sent=self.transport.bytes_sent + self.reducer.bytes_sent,
            stretches=tuple((begin + to_day, end + to_day) for begin, end in self.stretches),
            spans=tuple(shift(self.recorder.spans(), to_day)),
        )
