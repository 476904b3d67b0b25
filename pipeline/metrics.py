"""What a run says while it trains: the reference's log lines, TensorBoard scalars, JSON lines; sums that wait.

    window = Window();  window.add(loss=loss_sum, correct=hits, samples=64)        # in the hot path: no .item()
    sums = window.take().sums()                                                    # when a line is due
    log.window(epoch=0, batch=20, update=20, rows=..., seconds=1.5, lr=0.1)

Sums, not means, are collected and added over replicas, so uneven shards and short last batches weigh what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.plain import to_json

Sums = Mapping[str, float]
Means = Mapping[str, float]


def training_line(epochs: int, iterations: int) -> str:
    """The reference's first line, printed by rank 0."""
    return f"Training {epochs} epoch, each epoch runs {iterations} iteration"


def resnet_train_line(epoch: int, means: Means, *, lr: float, seconds: float) -> str:
    """The reference's line at the end of a ResNet's epoch."""
    return f"{epoch} TRAIN loss {means['loss']:.4f} acc {means['acc']:.4f} lr {lr:.2e}, time {seconds:.4f}"


def bert_train_line(epoch: int, means: Means, *, lr: float, seconds: float) -> str:
    """The reference's line at the end of a BERT's epoch; the two blanks after the loss are its own."""
    parts = f"lm {means['lm']:.4e} ns {means['ns']:.4e}"
    return f"{epoch} TRAIN loss {means['loss']:.4f}  {parts} lr {lr:.4e}, time {seconds:.4f}"


def eval_line(epoch: int, means: Means) -> str:
    """The reference's line after a validation."""
    return f"{epoch} EVAL  loss {means['loss']:.4f} acc {means['acc']:.4f}"


def speed_line(epoch: int, batch: int, *, samples_per_s: float, metric: str, value: float) -> str:
    """MXNet's Speedometer line: the speed and one metric of the last window."""
    return f"Epoch[{epoch}] Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec\t{metric}={value:f}"


def io_line(batch: int, *, samples_per_s: float) -> str:
    """The line of --test-io 1."""
    return f"Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec"


def resnet_means(sums: Sums) -> dict[str, float]:
    """Mean loss and accuracy from the sums "loss", "correct" and "samples"."""
    return {"loss": _ratio(sums, "loss", "samples"), "acc": _ratio(sums, "correct", "samples")}


def bert_means(sums: Sums) -> dict[str, float]:
    """Loss = lm + ns, where lm = sum "lm" / "masked", ns = sum "ns" / "samples"; acc = "correct" / "masked"."""
    lm, ns = _ratio(sums, "lm", "masked"), _ratio(sums, "ns", "samples")
    return {"loss": lm + ns, "lm": lm, "ns": ns, "acc": _ratio(sums, "correct", "masked")}


class TaskLog(NamedTuple):
    """How a task turns sums into means, its line per epoch, and the metric of its speed line: (text, key)."""

    means: Callable[[Sums], dict[str, float]]
    train_line: Callable[..., str]
    metric: tuple[str, str]


TASKS: Mapping[str, TaskLog] = MappingProxyType(
    {
        "resnet": TaskLog(resnet_means, resnet_train_line, ("accuracy", "acc")),
        "bert": TaskLog(bert_means, bert_train_line, ("loss", "loss")),
    }
)


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


def add_sums(first: Sums, second: Sums) -> dict[str, float]:
    """The sums of two windows, or of two replicas, as one."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}


class Writer(Protocol):
    """Where scalars go besides the console."""

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Take the values of one event: "start", "window", "train", "validation" or a name of the caller's."""

    def close(self) -> None:
        """Leave nothing unwritten."""


class JsonLines:
    """One flat JSON object per line, written through at once; NaN and infinity become null.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(path, "a" if append else "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--metrics {path}: cannot be written ({error.strerror})") from None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        self._file.write(to_json({"event": event, **plain}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under the reference's tags (x = epoch), and the speed under Performance/ (x = update).

    Raises:
        UserError: the folder cannot be written.
    """

    TAGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
        {
            "train": {
                "loss": "Train/loss",
                "acc": "Train/acc",
                "partner": "Train/Partner",
                "waited_s": "Replicas/waited_s",
                "staleness": "Replicas/staleness",
                "distance": "Replicas/distance",
                "mixed_bytes": "Replicas/bytes_sent",
                "lost": "Replicas/lost",
            },
            "consensus": {"distance": "Replicas/consensus_distance"},
            "validation": {"loss": "Validation/loss", "acc": "Validation/acc"},
            "window": {
                "samples_per_s": "Performance/samples_per_s",
                "step_s": "Performance/step_s",
                "bubble": "Performance/bubble",
                "memory_bytes": "Performance/memory_bytes",
                "lr": "Performance/lr",
                "loss": "Performance/loss",
            },
        }
    )

    def __init__(self, directory: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only one rank needs it

        try:
            self._writer: Any = SummaryWriter(str(directory))
        except OSError as error:
            raise UserError(f"--runs: {directory} cannot be written ({error.strerror})") from None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        step = values.get("update" if event in ("window", "consensus") else "epoch", 0)
        for name, tag in self.TAGS.get(event, {}).items():
            if name in values:
                self._writer.add_scalar(tag, values[name], step)
        for name in values:
            if name.startswith("samples_of_pipeline_"):
                self._writer.add_scalar(f"Replicas/{name}", values[name], step)
        groups = {name: times for name, times in values.items() if name.startswith("groups_of_")}
        if groups:
            sizes = [int(name.removeprefix("groups_of_")) for name, times in groups.items() for _ in range(int(times))]
            self._writer.add_histogram("Replicas/group_size", torch.tensor(sizes), step, bins="auto")
        if event in ("train", "validation"):
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def run_directory(runs: str | Path, name: str, *, now: datetime) -> Path:
    """TensorBoard's folder of this run: runs/NAME, or runs/TIME without a name."""
    return Path(runs) / (name or now.strftime("%Y-%m-%d_%H-%M-%S"))


class RunLog:
    """Says each event once: a line on the console, the same numbers to every writer, the losses to `curve`.

    `curve` holds (update, loss) for every batch, `validations` the same for every validation: the report draws them.
    `extra` values (bubble, memory_bytes ...) only go to the writers.
    """

    def __init__(
        self, task: str, *, say: Callable[[str], None], writers: tuple[Writer, ...] = (), replicas: float = 1
    ) -> None:
        self._task = TASKS[task]
        self.say = say
        self._writers = writers
        self.replicas = replicas  # that train as fast as this one; speeds are of the whole job
        self._update = 0
        self.curve: list[tuple[float, float]] = []
        self.validations: list[tuple[float, float]] = []

    def start(self, epochs: int, iterations: int, **extra: Any) -> None:
        """The run begins."""
        self.say(training_line(epochs, iterations))
        self._write("start", {"epochs": epochs, "iterations": iterations, **extra})

    def go_on(self, update: int) -> None:
        """The run stands after `update` updates: the curve goes on from there."""
        self._update = update

    def window(
        self, *, epoch: int, batch: int, update: int, rows: Rows, seconds: float, lr: float, **extra: Any
    ) -> None:
        """`batch` batches of the epoch and `update` updates of the run are done; `rows` are those of the window."""
        sums = rows.sums()
        means = self._task.means(sums)
        speed = self.replicas * sums["samples"] / seconds if seconds > 0 else 0.0
        metric, key = self._task.metric
        self.say(speed_line(epoch, batch, samples_per_s=speed, metric=metric, value=means[key]))
        values = {"samples_per_s": speed, "step_s": seconds / max(1, update - self._update), **means, "lr": lr}
        self._write("window", {"epoch": epoch, "batch": batch, "update": update, **values, **extra})
        self._extend_curve(rows, update)

    def epoch(self, *, epoch: int, update: int, sums: Sums, lr: float, seconds: float, **extra: Any) -> None:
        """An epoch is over; `sums` are those of all its batches, over all replicas."""
        means = self._task.means(sums)
        self.say(self._task.train_line(epoch, means, lr=lr, seconds=seconds))
        values = {"epoch": epoch, "update": update, **means, "lr": lr, "seconds": seconds}
        self._write("train", {**values, "samples": sums["samples"], **extra})

    def validation(self, *, epoch: int, update: int, sums: Sums, **extra: Any) -> None:
        """A validation is over; `sums` are those of the whole validation set."""
        means = self._task.means(sums)
        self.say(eval_line(epoch, means))
        self.validations.append((update, means["loss"]))
        self._write("validation", {"epoch": epoch, "update": update, **means, "samples": sums["samples"], **extra})

    def event(self, event: str, values: Mapping[str, Any]) -> None:
        """Anything else, to the writers only."""
        self._write(event, values)

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            writer.close()

    def _extend_curve(self, rows: Rows, update: int) -> None:
        each = rows.each()
        updates_per_row = (update - self._update) / max(1, len(each))
        for number, row in enumerate(each, 1):
            self.curve.append((self._update + number * updates_per_row, self._task.means(row)["loss"]))
        self._update = update

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(event, values)


def _ratio(sums: Sums, above: str, below: str) -> float:
    """NaN where there is nothing to divide by, and 0 for a sum that nobody collects."""
    return sums.get(above, 0.0) / sums[below] if sums.get(below) else math.nan


def _to_floats(values: list[Tensor | float]) -> list[float]:
    tensors = [value.reshape(()) for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values):
        return [float(value) for value in values]
    read: list[float] = torch.stack(tensors).double().tolist()
    return read
