"""What a run says while it trains: the reference's log lines, TensorBoard scalars, JSON lines; sums that wait.

    window = Window();  window.add(loss=loss_sum, correct=hits, samples=64)        # in the hot path: no .item()
    sums = window.take().sums()                                                    # when a line is due
    log.window(epoch=0, batch=20, update=20, sums=..., samples=1280, seconds=1.5, lr=0.1)

Sums, not means, are collected and added over replicas, so uneven shards and short last batches weigh what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.core.plain import to_json
from pipeline.errors import UserError
from pipeline.models.criterion import Criterion

Sums = Mapping[str, float]


def training_line(epochs: int, iterations: int) -> str:
    """The reference's first line, printed by rank 0."""
    return f"Training {epochs} epoch, each epoch runs {iterations} iteration"


def speed_line(epoch: int, batch: int, *, samples_per_s: float, shown: str) -> str:
    """MXNet's Speedometer line: the speed of the last window, and what its means are."""
    return f"Epoch[{epoch}] Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec\t{shown}"


def io_line(batch: int, *, samples_per_s: float) -> str:
    """The line of --test-io 1."""
    return f"Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec"


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
        """Take the values of one event: settings, start, window, train, validation or a name of the caller's."""

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

    Args:
        means: names of what the criterion measures; each gets a tag of its own wherever it is said.

    Raises:
        UserError: the folder cannot be written.
    """

    TAGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
        {
            "train": {
                "partner": "Train/Partner",
                "waited_s": "Replicas/waited_s",
                "staleness": "Replicas/staleness",
                "distance": "Replicas/distance",
                "mixed_bytes": "Replicas/bytes_sent",
                "lost": "Replicas/lost",
            },
            "consensus": {"distance": "Replicas/consensus_distance"},
            "validation": {},
            "window": {
                "samples_per_s": "Performance/samples_per_s",
                "step_s": "Performance/step_s",
                "bubble": "Performance/bubble",
                "memory_bytes": "Performance/memory_bytes",
                "lr": "Performance/lr",
            },
        }
    )
    ROOMS: Mapping[str, str] = MappingProxyType(
        {"train": "Train", "validation": "Validation", "window": "Performance"}  # of the means
    )

    def __init__(self, directory: str | Path, *, means: Iterable[str] = ("loss",)) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only one rank needs it

        self._tags = {event: dict(tags) for event, tags in self.TAGS.items()}
        for event, room in self.ROOMS.items():
            self._tags[event] |= {name: f"{room}/{name}" for name in means}
        try:
            self._writer: Any = SummaryWriter(str(directory))
        except OSError as error:
            raise UserError(f"--runs: {directory} cannot be written ({error.strerror})") from None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        step = values.get("update" if event in ("window", "consensus") else "epoch", 0)
        if event == "settings":
            self._writer.add_text("settings", _table(values), values.get("batches", 0))
        for name, tag in self._tags.get(event, {}).items():
            if name in values:
                self._writer.add_scalar(tag, values[name], step)
        for name in values:
            if name.startswith("samples_of_pipeline_"):
                self._writer.add_scalar(f"Replicas/{name}", values[name], step)
        sizes = group_sizes(values)
        if sizes:
            self._add_histogram("Replicas/group_size", sizes, step)
        if event in ("settings", "train", "validation"):
            self._writer.flush()

    def _add_histogram(self, tag: str, counts: Mapping[int, float], step: int) -> None:
        """A histogram of values that occurred so often; a bar per value, however often that was."""
        self._writer.add_histogram_raw(
            tag,
            min=min(counts),
            max=max(counts),
            num=sum(counts.values()),
            sum=sum(value * times for value, times in counts.items()),
            sum_squares=sum(value * value * times for value, times in counts.items()),
            bucket_limits=[value + 0.5 for value in sorted(counts)],
            bucket_counts=[counts[value] for value in sorted(counts)],
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


GROUPS = "groups_of_"  # and a size: how many groups were of this size


def group_sizes(values: Mapping[str, Any]) -> dict[int, float]:
    """How often each size of a group occurs among the values of an event."""
    sizes = {int(name.removeprefix(GROUPS)): times for name, times in values.items() if name.startswith(GROUPS)}
    return {size: times for size, times in sorted(sizes.items()) if times}


def _table(values: Mapping[str, Any]) -> str:
    """Settings as a table in Markdown, which TensorBoard draws."""
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


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
