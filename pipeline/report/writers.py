"""Where the numbers of a run go besides the console: JSON lines and TensorBoard's scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

from torch import Tensor

from pipeline.core.plain import to_json
from pipeline.errors import UserError


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
