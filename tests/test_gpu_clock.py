"""The GPU's clock: spans are those of the device, however far the host has run ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from pipes import OPTIMIZERS, Job, cuts, small_mlp
from typing import Any

import pytest

from pipeline.core.actions import Action, Op, parse
from pipeline.core.trace import Recorder, bubble_fraction
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, forward_only, program
from pipeline.stage.build import make_stage
from pipeline.stage.executor import Executor, Hooks
from pipeline.stage.gpu_clock import GpuClock
from pipeline.transport.local import local_transports


@dataclass
class Device:
    """A device with one stream, which works off what is queued while its time passes; the host has a time too."""

    host_s: float = 100.0
    done_s: float = 0.0  # the device's own clock: how far it has come
    queued_s: float = 0.0  # and when it will have finished everything

    def launch(self, seconds: float) -> None:
        self.queued_s += seconds

    def run(self, seconds: float) -> None:
        self.done_s = min(self.done_s + seconds, self.queued_s)

    def synchronize(self) -> None:
        self.host_s += self.queued_s - self.done_s
        self.done_s = self.queued_s

    def stamp(self) -> Stamp:
        return Stamp(self, self.queued_s)


@dataclass
class Stamp:
    device: Device
    at_s: float

    def query(self) -> bool:
        return self.device.done_s >= self.at_s

    def elapsed_time(self, end_event: Stamp) -> float:
        assert self.query() and end_event.query(), "only events that are over can be compared"
        return (end_event.at_s - self.at_s) * 1e3


@dataclass
class Bench:
    device: Device = field(default_factory=Device)
    recorder: Recorder = field(default_factory=lambda: Recorder(pipeline=0, stage=0, steps=2))

    def __post_init__(self) -> None:
        device, recorder = self.device, self.recorder
        self.clock = GpuClock(
            stamp=device.stamp, synchronize=device.synchronize, now=lambda: device.host_s,
            record=recorder.record, end_step=recorder.end_step,
        )  # fmt: skip

    def act(self, text: str, seconds: float) -> None:
        (action,) = parse(text)
        handlers = self.clock.timed({action.op: lambda microbatch: self.device.launch(seconds)})
        handlers[action.op](action.microbatch)

    def spans(self) -> list[tuple[str, float, float]]:
        return [(str(action), start, end) for _, _, action, start, end in self.recorder.spans()]


def test_spans_are_the_devices_though_the_host_queues_all_at_once() -> None:
    bench = Bench()
    bench.clock.begin()
    for text, seconds in (("F0", 1.0), ("RG0", 0.5), ("B0", 2.0), ("U0", 0.25)):
        bench.act(text, seconds)
    bench.clock.end_step()
    bench.clock.settle()
    assert bench.spans() == [
        ("F0", 100.0, 101.0), ("RG0", 101.0, 101.5), ("B0", 101.5, 103.5), ("U0", 103.5, 103.75)
    ]  # fmt: skip
    assert bench.clock.busy_s() == 3.25
    assert bubble_fraction(bench.recorder.spans()) == pytest.approx(0.5 / 3.75)


def test_nothing_waits_for_what_is_not_over() -> None:
    bench = Bench()
    bench.clock.begin()
    bench.act("F0", 1.0)
    bench.act("B0", 1.0)
    bench.clock.end_step()
    assert (bench.clock.busy_s(), bench.device.host_s, bench.recorder.spans()) == (0.0, 100.0, [])
    bench.device.run(1.5)
    assert bench.clock.busy_s() == 1.0
    bench.device.run(0.5)
    assert bench.clock.busy_s() == 2.0
    assert bench.device.host_s == 100.0


def test_steps_end_where_the_host_said_so_not_where_it_was_by_then() -> None:
    bench = Bench()
    bench.clock.begin()
    for step in range(3):
        bench.act(f"F{step}", 1.0)
        bench.act(f"U{step}", 1.0)
        bench.clock.end_step()
    bench.clock.settle()
    assert [text for text, _, _ in bench.spans()] == ["F1", "U1", "F2", "U2"]


def test_a_new_beginning_does_not_count_the_time_between() -> None:
    bench = Bench()
    bench.clock.begin()
    bench.act("F0", 1.0)
    bench.clock.settle()
    bench.device.launch(7.0)  # a validation, say
    bench.clock.begin()
    bench.device.host_s += 2.0  # the host dawdles, and the device with it
    bench.device.launch(2.0)
    bench.act("F1", 1.0)
    bench.clock.end_step()
    bench.clock.settle()
    assert bench.spans()[-1] == ("F1", 108.0, 111.0)
    assert bench.clock.busy_s() == 4.0


def executor_on(device: Device, clock: GpuClock | None, hooks: Hooks) -> Executor:
    """A stage whose forwards take 1 s, backwards 2 s and updates 0.5 s of `device`."""
    job = Job(model=small_mlp(), counts=cuts(8, 1), schedule="1f1b", batches=9)
    seconds = {"forward": 1.0, "backward": 2.0, "update": 0.5, "evaluate": 4.0}

    class Slow:
        def __init__(self, stage: Any) -> None:
            self._stage = stage

        def __getattr__(self, name: str) -> Any:
            if name in seconds:
                device.launch(seconds[name])
            return getattr(self._stage, name)

    stage: Any = Slow(
        make_stage(job.model, job.counts, 0, OPTIMIZERS["sgd"],
                   seed=0, criterion=job.criterion)
    )  # fmt: skip
    hooks.inputs = lambda m: job.batch(m)[0]
    hooks.targets = lambda m: (job.batch(m)[1], job.counts_of(m))
    return Executor(stage, local_transports(1)[0], position=0, stages=1, hooks=hooks, clock=clock)


def test_an_executor_with_a_clock_is_busy_as_long_as_the_device() -> None:
    bench = Bench()
    executor = executor_on(bench.device, bench.clock, Hooks(updated=lambda microbatch: bench.clock.end_step()))
    executor.run(program(SCHEDULES["1f1b"], Shape(stages=1, microbatches=2), 0, range(4)))
    bench.clock.settle()
    assert executor.busy_s == 4 * 3.0 + 2 * 0.5
    actions = [text for text, _, _ in bench.spans() if text[0] in "FBU"]
    assert actions == ["F0", "B0", "F1", "B1", "U1", "F2", "B2", "F3", "B3", "U3"]
    executor.evaluate(forward_only(0, 1, range(1)))
    assert executor.busy_s == 4 * 3.0 + 2 * 0.5, "a validation is no training"


def test_busy_time_is_known_while_the_program_runs() -> None:
    seen: list[float] = []
    recorded: list[Action] = []
    hooks = Hooks(record=lambda action, start, end: recorded.append(action))
    executor = executor_on(Device(), None, hooks)
    hooks.updated = lambda microbatch: seen.append(executor.busy_s)
    executor.run(program(SCHEDULES["1f1b"], Shape(stages=1), 0, range(3)))
    assert 0 < seen[0] < seen[1] < seen[2] == executor.busy_s
    assert recorded[-1] == Action(Op.UPDATE, 2)
