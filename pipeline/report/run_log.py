"""What a run says while it trains: each event once, as a line and to every writer; sums that wait on the device.

    window = Window();  window.add(loss=loss_sum, correct=hits, samples=64)        # in the hot path: no .item()
    sums = window.take().sums()                                                    # when a line is due
    log.window(epoch=0, batch=20, update=20, sums=..., samples=1280, seconds=1.5, lr=0.1)

Sums, not means, are collected and added over replicas, so uneven shards and short last batches weigh what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.criterion import Criterion
from pipeline.report.lines import Sums, add_sums, speed_line, training_line
from pipeline.report.writers import Writer


class Rows(NamedTuple):
    """Values read from the device: for each name, one number per `Window.add`."""

    columns: Mapping[str, list[float]]

    def sums(self) -> dict[str, float]:
        """The sum of every column, exactly rounded."""
        return {name: math.fsum(column) for name, column in self.columns.items()}

    def each(self) -> list[dict[str, float]]:
        """The rows one by one."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


class Window:
    """Collects scalars without reading them from the device until `take`.

    A tensor must not be overwritten between `add` and `take`; it is detached, not copied. Every `add` of one window
    gives the same names.
    """

    def __init__(self, *, limit: int = 1024) -> None:
        self._limit = limit
        self._waiting: dict[str, list[Tensor | float]] = {}
        self._read: dict[str, list[float]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add one batch's sums: numbers, or tensors of one element on any device."""
        if not self._waiting:
            self._waiting = {name: [] for name in values}
        for name, value in values.items():
            self._waiting[name].append(value.detach() if isinstance(value, Tensor) else value)
        if len(self._waiting[name]) >= self._limit:
            self._read_waiting()

    def take(self) -> Rows:
        """Everything added since the last `take`, as numbers; waits for the device once per name."""
        self._read_waiting()
        read, self._read = self._read, {}
        return Rows(read)

    def _read_waiting(self) -> None:
        for name, values in self._waiting.items():
            self._read.setdefault(name, []).extend(_to_floats(values))
        self._waiting = {}


def run_name(name: str, *, now: datetime) -> str:
    """What a run is called, and its folder in --runs: as it was told, else by the time."""
    return name or now.strftime("%Y-%m-%d_%H-%M-%S")


class Losses:
    """The loss of every update, from the sums of all pipelines that have said theirs; some say them a little later.

    >>> losses = Losses(lambda sums: {"loss": sums["loss"] / sums["samples"]})
    >>> losses.add(1, {"loss": 2.0, "samples": 1.0})
    >>> losses.add(1, {"loss": 0.0, "samples": 3.0})
    >>> losses.points()
    [(1, 0.5)]
    """

    def __init__(self, means: Callable[[Sums], Mapping[str, float]], *, open_updates: int = 1024) -> None:
        self._means, self._most = means, open_updates
        self._settled: list[tuple[float, float]] = []
        self._open: dict[float, dict[str, float]] = {}  # update -> sums that may still grow
        self.last: float | None = None

    def add(self, update: float, sums: Sums) -> None:
        """What one pipeline, or all, has done for this update."""
        self._open[update] = add_sums(self._open.get(update, {}), sums)
        self.last = self._means(self._open[update])["loss"]
        while len(self._open) > self._most:
            oldest = min(self._open)
            self._settled.append((oldest, self._means(self._open.pop(oldest))["loss"]))

    def points(self) -> list[tuple[float, float]]:
        """(update, loss), in order."""
        recent = [(update, self._means(sums)["loss"]) for update, sums in self._open.items()]
        return sorted((*self._settled, *recent), key=lambda point: point[0])

    def restore(self, points: Iterable[tuple[float, float]]) -> None:
        """Goes on from the points of an earlier run."""
        self._settled, self._open = list(points), {}


class RunLog:
    """Says each event once: a line on the console, the same numbers to every writer, the losses to `losses`.

    `validations` holds (update, loss) for every validation: the report draws them, and the losses. `extra` values
    (bubble, memory_bytes ...) only go to the writers.
    """

    def __init__(self, criterion: Criterion, *, say: Callable[[str], None], writers: tuple[Writer, ...] = ()) -> None:
        self._criterion = criterion
        self.say = say
        self._writers = writers
        self._update = 0
        self.losses = Losses(criterion.means)
        self.validations: list[tuple[float, float]] = []

    @property
    def curve(self) -> list[tuple[float, float]]:
        """The loss of every update, over all pipelines."""
        return self.losses.points()

    def start(self, epochs: int, iterations: int, **extra: Any) -> None:
        """The run begins."""
        self.say(training_line(epochs, iterations))
        self._write("start", {"epochs": epochs, "iterations": iterations, **extra})

    def settings(self, values: Mapping[str, Any], *, batches: int) -> None:
        """What the run was told, after `batches` batches; to the writers only."""
        self._write("settings", {"batches": batches, **values})

    def go_on(self, update: int) -> None:
        """The run stands after `update` updates."""
        self._update = update

    def window(
        self,
        *,
        epoch: int,
        batch: int,
        update: int,
        sums: Sums,
        samples: float,
        seconds: float,
        lr: float,
        **extra: Any,
    ) -> None:
        """`batch` batches of the epoch and `update` updates of the run are done.

        All pipelines have trained `samples` in the `seconds` since the last window; `sums` are what was heard of them.
        """
        means = self._criterion.means(sums)
        speed = samples / seconds if seconds > 0 else 0.0
        shown = self._criterion.wording.window.format(**means)
        self.say(speed_line(epoch, batch, samples_per_s=speed, shown=shown))
        values = {"samples_per_s": speed, "step_s": seconds / max(1, update - self._update), **means, "lr": lr}
        self._write("window", {"epoch": epoch, "batch": batch, "update": update, **values, **extra})
        self._update = update

    def epoch(self, *, epoch: int, update: int, sums: Sums, lr: float, seconds: float, **extra: Any) -> None:
        """An epoch is over; `sums` are those of all its batches, over all replicas."""
        means = self._criterion.means(sums)
        self.say(self._criterion.wording.train.format(epoch=epoch, lr=lr, seconds=seconds, **means))
        values = {"epoch": epoch, "update": update, **means, "lr": lr, "seconds": seconds}
        self._write("train", {**values, "samples": sums.get("samples", 0.0), **extra})

    def validation(self, *, epoch: int, update: int, sums: Sums, **extra: Any) -> None:
        """A validation is over; `sums` are those of the whole validation set."""
        means = self._criterion.means(sums)
        self.say(self._criterion.wording.validation.format(epoch=epoch, **means))
        self.validations.append((update, means["loss"]))
        self._write(
            "validation", {"epoch": epoch, "update": update, **means, "samples": sums.get("samples", 0.0), **extra}
        )

    def event(self, event: str, values: Mapping[str, Any]) -> None:
        """Anything else, to the writers only."""
        self._write(event, values)

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            writer.close()

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(event, values)


def _to_floats(values: list[Tensor | float]) -> list[float]:
    tensors = [value.reshape(()) for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values):
        return [float(value) for value in values]
    read: list[float] = torch.stack(tensors).double().tolist()
    return read
