"""What a run says while it goes on: log lines, scalars, the live progress bar, and the sums behind them.

Only last stages know losses. The one of pipeline 0 speaks; those of the other pipelines add their sums to its epochs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pipeline.core.plain import finite, write_line
from pipeline.data.epochs import Calendar
from pipeline.models.criterion import Criterion
from pipeline.report.divergence import LossWatch
from pipeline.report.lines import add_sums
from pipeline.report.run_log import RunLog, Window
from pipeline.report.summary import peak_memory_bytes
from pipeline.report.writers import GROUPS, JsonLines, TensorBoard, Writer, group_sizes

if TYPE_CHECKING:
    from pipeline.settings import Settings


class Progress(Protocol):
    """Draws `done` of `total` with a few words beside it."""

    def __call__(self, done: int, total: int, text: str) -> object: ...


Row = tuple[float, Mapping[str, float]]  # the update, counted from 1, and the sums of what went into it
READ_EVERY = 64  # updates whose sums wait on the device at most


def line_due(before: int, after: int, *, every: int, per_epoch: int) -> bool:
    """Whether a line falls due between two numbers of batches: one after every `every` batches of an epoch.

    >>> [line_due(n, n + 3, every=20, per_epoch=50) for n in (15, 18, 21)]
    [False, True, False]
    """

    def lines(batches: int) -> int:
        epoch, within = divmod(batches, per_epoch)
        return epoch * (per_epoch // every) + within // every

    return lines(after) > lines(before)


class Journal:
    """The log of one last stage. A window is what all pipelines have done since the last line.

    Args:
        speaks: whether this is the one that prints and writes; it may become so later.
        sum_over_pipelines: adds up a dict of sums over the last stages of all pipelines; all of them call it.
        run_name: of TensorBoard's folder, the same whoever speaks.
        clock: the time in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        calendar: Calendar,
        criterion: Criterion,
        *,
        speaks: Callable[[], bool],
        rate: Callable[[int], float],
        sum_over_pipelines: Callable[[dict[str, float]], dict[str, float]],
        progress: Progress,
        busy_s: Callable[[], float],
        device: str,
        run_name: str,
        resumed: bool = False,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._settings, self._calendar, self._speaks = settings, calendar, speaks
        self._rate, self._clock = rate, clock
        self._sum_over_pipelines, self._progress = sum_over_pipelines, progress
        self._busy_s, self._device = busy_s, device
        self._means, self._watch = criterion.means, LossWatch(settings.nan)
        means = tuple(criterion.means({}))
        writers = (
            WhoeverSpeaks(speaks, lambda first: _writers(settings, run_name, means, append=resumed or not first)),
        )
        self.log = RunLog(criterion, say=say or self._say, writers=writers)
        self._unread, self._updates = Window(), list[float]()  # sums on the device, and the updates they are of
        self._own: list[Row] = []  # read, and not yet told to the others
        self._window: list[Row] = []  # of all pipelines, since the last line
        self._epoch_sums: dict[str, float] = {}  # of this pipeline
        self._window_start = self._epoch_start = clock()
        self._window_busy = 0.0
        self._batches = 0

    def begin(self, batches: int) -> None:
        """Training starts, or goes on, after `batches` batches."""
        self.log.settings(self._settings.to_values(), batches=batches)
        if batches == 0:
            self.log.start(self._settings.epochs, self._calendar.batches_per_epoch)
        self._window_start = self._epoch_start = self._clock()
        self._batches = batches
        self.log.go_on(self._calendar.updates_after(batches))

    def paused(self, seconds: float) -> None:
        """Time that was not training (validation, a checkpoint) does not count in any speed."""
        self._window_start += seconds
        self._epoch_start += seconds

    def updated(self, batches: int, sums: dict[str, Tensor]) -> None:
        """An update is made after `batches` batches; `sums` are of the batches in it."""
        due = self._note(batches, sums)
        calendar = self._calendar
        ended = calendar.ends_epoch(batches) or batches == calendar.total_batches
        if due or ended:
            self._exchange()
            self._close_window(batches, sum(row.get("samples", 0.0) for _, row in self._window))
        if ended:
            self._close_epoch(batches)

    def _note(self, batches: int, sums: dict[str, Tensor]) -> bool:
        """Keeps the sums of an update; whether a line is due."""
        self._unread.add(**sums)
        self._updates.append(float(self._calendar.updates_after(batches)))
        if len(self._updates) >= READ_EVERY:
            self._read()
        before, self._batches = self._batches, max(batches, self._batches)
        self._show_progress(self._batches)
        every, per_epoch = self._settings.disp_batches, self._calendar.batches_per_epoch
        return line_due(before, self._batches, every=every, per_epoch=per_epoch)

    def _read(self) -> None:
        """Takes what this pipeline has done from the device, for which it waits."""
        rows = self._unread.take()
        self._epoch_sums = add_sums(self._epoch_sums, rows.sums())
        own = list(zip(self._updates, rows.each(), strict=True))
        self._own += own
        self._updates.clear()
        for update, sums in own:
            warning = self._watch.see(update, self._means(sums)["loss"])
            if warning is not None:
                self.log.say(warning)

    def _exchange(self) -> None:
        """Adds what every pipeline has done to the window: here all of them have made the same updates, and wait."""
        self._read()
        own, self._own = self._own, []
        flat = {f"{number} {name}": value for number, (_, row) in enumerate(own) for name, value in row.items()}
        rows: list[dict[str, float]] = [{} for _ in own]
        for key, value in self._sum_over_pipelines(flat).items():
            number, _, name = key.partition(" ")
            rows[int(number)][name] = value
        self._add((update, row) for (update, _), row in zip(own, rows, strict=True))

    def _add(self, rows: Iterable[Row]) -> None:
        for update, sums in rows:
            self._window.append((update, sums))
            self.log.losses.add(update, sums)

    def _close_window(self, batches: int, samples: float) -> None:
        """A line about all that was done since the last one: `samples`, of all pipelines."""
        now, busy, rows = self._clock(), self._busy_s(), self._window
        seconds, update = now - self._window_start, self._calendar.updates_after(batches)
        names = dict.fromkeys(name for _, row in rows for name in row)
        self.log.window(
            epoch=(batches - 1) // self._calendar.batches_per_epoch,
            batch=(batches - 1) % self._calendar.batches_per_epoch + 1,
            update=update,
            sums={name: math.fsum(row.get(name, 0.0) for _, row in rows) for name in names},
            samples=samples,
            seconds=seconds,
            lr=self._rate(update - 1),
            bubble=max(0.0, 1.0 - (busy - self._window_busy) / seconds) if seconds > 0 else 0.0,
            memory_bytes=peak_memory_bytes(self._device),
        )
        self._window_start, self._window_busy, self._window = now, busy, []

    def _close_epoch(self, batches: int, extra: Mapping[str, float] = MappingProxyType({})) -> None:
        sums = self._sum_over_pipelines(self._epoch_sums)
        update = self._calendar.updates_after(batches)
        self.log.epoch(
            epoch=(batches - 1) // self._calendar.batches_per_epoch,
            update=update,
            sums=sums,
            lr=self._rate(update - 1),
            seconds=self._clock() - self._epoch_start,
            **extra,
        )
        if self._calendar.ends_epoch(batches):  # else the run ends here, and a resumed one finishes the epoch
            self._epoch_sums = {}
        self._epoch_start = self._clock()

    def validated(self, batches: int, sums: dict[str, float]) -> None:
        """A validation is over; `sums` are those of this pipeline's share."""
        total = self._sum_over_pipelines(sums)
        epoch = (batches - 1) // self._calendar.batches_per_epoch
        self.log.validation(epoch=epoch, update=self._calendar.updates_after(batches), sums=total)

    def _show_progress(self, batches: int) -> None:
        if self._speaks():
            epoch = (batches - 1) // self._calendar.batches_per_epoch
            text = f"epoch {epoch + 1}/{self._settings.epochs}"
            if self.log.losses.last is not None:
                text += f" loss {self.log.losses.last:.4f}"
            self._progress(batches, self._calendar.total_batches, text)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same epoch line and curve; all last stages call this."""
        self._exchange()
        return {
            "epoch_sums": finite(self._sum_over_pipelines(self._epoch_sums)),
            "curve": finite(self.log.curve),
            "validations": finite(self.log.validations),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` of the checkpointed run returned."""
        sums = {name: _number(value) for name, value in state["epoch_sums"].items()}
        self._epoch_sums = sums if self._speaks() else {}
        self.log.losses.restore((x, _number(y)) for x, y in state["curve"])
        self.log.validations = [(x, _number(y)) for x, y in state["validations"]]

    def close(self) -> None:
        self.log.close()

    def _say(self, line: str) -> None:
        if self._speaks():
            write_line(line, sys.stdout)


def _number(value: float | None) -> float:
    """What JSON had no word for is no number."""
    return math.nan if value is None else value


class Told(Protocol):
    """The way from one last stage to the one that speaks, on which nobody waits."""

    def tell(self, value: Any) -> None:
        """Sends a JSON-able value to whoever speaks."""

    def told(self) -> list[Any]:
        """What has come since the last call, if this is the one."""

    def sum_to_speaker(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums over all last stages, where they speak, {} elsewhere; all of them call it, and wait."""


class ElasticJournal(Journal):
    """The log of a last stage whose pipeline does as much as it can, and waits for nobody.

    The others tell the one that speaks what they have done whenever a line falls due, so that a line has what was heard
    by then. How much the whole job has done is known without that: it is so many tickets further.

    Args:
        told: the way to the one that speaks.
        length: samples in the batch of a ticket.
    """

    def __init__(self, *arguments: Any, told: Told, length: Callable[[int], int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told, self._length = told, length
        self._since: int | None = None  # the first ticket of the window; None: what the next update begins with
        self._tickets = 0  # that the job is known to have handed out
        self._mixed: Mapping[str, float] = {}  # what mixing had done at the end of the last epoch

    def begin_at(self, ticket: int) -> None:
        """The job's tickets begin here, now."""
        self._since = self._tickets = ticket

    def joined(self) -> None:
        """This pipeline has come (back) while the others went on: what they did meanwhile is nobody's speed."""
        self._since, self._window = None, []

    def progressed(self, batches: int, ticket: int, sums: dict[str, Tensor]) -> None:
        """An update is made; the whole job has come to `ticket`, which is of the calendar's batch `batches`."""
        due = self._note(batches, sums)
        self._tickets = max(self._tickets, ticket + 1)
        if self._since is None:
            self._since, self._window_start = self._tickets, self._clock()
            self.log.go_on(self._calendar.updates_after(self._batches))
            self._window_busy = self._busy_s()
        if due or len(self._own) >= READ_EVERY:
            self._exchange()
        if due and self._tickets > self._since:
            self._end_window(self._batches)

    def _exchange(self) -> None:
        self._read()
        own, self._own = self._own, []
        self._add(own)
        if self._speaks():
            told = (row for rows in self._told.told() for row in rows)
            self._add((update, {name: _number(value) for name, value in sums.items()}) for update, sums in told)
        elif own:
            self._told.tell([[update, finite(sums)] for update, sums in own])

    def _end_window(self, batches: int) -> None:
        assert self._since is not None
        samples = sum(self._length(ticket) for ticket in range(self._since, self._tickets))
        self._since = self._tickets
        self._close_window(batches, samples)

    def stopped(self, batches: int, mixing: Mapping[str, float], *, ticket: int, pipeline: int, samples: float) -> None:
        """A segment, up to `ticket`, is over at the calendar's `batches`; all last stages call this.

        Args:
            mixing: what mixing did so far. samples: that this pipeline has trained so far.
        """
        self._exchange()
        done = self._told.sum_to_speaker({f"samples_of_pipeline_{pipeline}": samples})
        self._exchange()  # what the others have told came before their part of the sum
        self._batches, self._tickets = batches, ticket
        if self._calendar.ends_epoch(batches) or batches == self._calendar.total_batches:
            if self._since is not None and ticket > self._since and self._window:
                self._end_window(batches)
            since, self._mixed = mixed_since(self._mixed, mixing), mixing
            self._close_epoch(batches, {**since, **dict(sorted(done.items()))})


ADDED_UP = (GROUPS, "waited_s", "mixed_s", "mixed_bytes")  # how names begin of what only grows


def mixed_since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """What mixing did in between, from what it had done in all; the mean size is that of these groups.

    >>> mixed_since({"groups_of_2": 5, "waited_s": 1.0}, {"groups_of_2": 8, "waited_s": 1.5, "lost": 1})
    {'groups_of_2': 3, 'waited_s': 0.5, 'lost': 1, 'partner': 2.0}
    """
    since = {name: v - before.get(name, 0) if name.startswith(ADDED_UP) else v for name, v in now.items()}
    sizes = group_sizes(since)
    count = sum(sizes.values())
    return {**since, "partner": sum(size * times for size, times in sizes.items()) / count if count else 0.0}


class WhoeverSpeaks:
    """A writer that opens the real ones when this rank has something to write for the first time.

    Args:
        open_writers: whether it is the first event of the run -> the writers.
    """

    def __init__(self, speaks: Callable[[], bool], open_writers: Callable[[bool], tuple[Writer, ...]]) -> None:
        self._speaks, self._open = speaks, open_writers
        self._events = 0
        self._writers: tuple[Writer, ...] | None = None

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        self._events += 1
        if self._speaks():
            if self._writers is None:
                self._writers = self._open(self._events == 1)
            for writer in self._writers:
                self._carefully(writer, lambda writer=writer: writer.write(event, values))  # type: ignore[misc]

    def _carefully(self, writer: Writer, act: Callable[[], object]) -> None:
        """A log that cannot be written any more is no reason to end what it is about."""
        try:
            act()
        except OSError as error:
            self._writers = tuple(other for other in self._writers or () if other is not writer)
            said = f"warning: {type(writer).__name__} of this run ends here: {error.strerror or error}"
            write_line(said, sys.stderr)

    def close(self) -> None:
        for writer in self._writers or ():
            self._carefully(writer, writer.close)


def _writers(settings: Settings, run_name: str, means: tuple[str, ...], *, append: bool) -> tuple[Writer, ...]:
    writers: list[Writer] = [TensorBoard(Path(settings.runs) / run_name, means=means)]
    if settings.metrics is not None:
        writers.append(JsonLines(Path(settings.metrics), append=append))
    return tuple(writers)
