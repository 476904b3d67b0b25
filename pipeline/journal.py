"""What a run says while it goes on: log lines, scalars, the live progress bar, and the sums behind them.

Only last stages know losses. The one of pipeline 0 speaks; those of the other pipelines add their sums to its epochs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from pipeline.calendar import Calendar
from pipeline.metrics import GROUPS, JsonLines, RunLog, TensorBoard, Window, Writer, add_sums, group_sizes
from pipeline.models.criterion import Criterion
from pipeline.optim import LearningRate
from pipeline.plain import finite, write_line
from pipeline.report import peak_memory_bytes
from pipeline.settings import Settings


class Progress(Protocol):
    """Draws `done` of `total` with a few words beside it."""

    def __call__(self, done: int, total: int, text: str) -> object: ...


class Journal:
    """The log of one last stage.

    Args:
        speaks: whether this is the one that prints and writes; it may become so later.
        sum_over_pipelines: adds up a dict of sums over the last stages of all pipelines; all of them call it.
        run_name: of TensorBoard's folder, the same whoever speaks.
    """

    def __init__(
        self,
        settings: Settings,
        calendar: Calendar,
        criterion: Criterion,
        *,
        speaks: Callable[[], bool],
        pipelines: int,
        rate: LearningRate,
        sum_over_pipelines: Callable[[dict[str, float]], dict[str, float]],
        progress: Progress,
        busy_s: Callable[[], float],
        device: str,
        run_name: str,
        resumed: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._settings, self._calendar, self._speaks = settings, calendar, speaks
        self._rate = rate
        self._sum_over_pipelines, self._progress = sum_over_pipelines, progress
        self._busy_s, self._device = busy_s, device
        means = tuple(criterion.means({}))
        writers = (
            WhoeverSpeaks(speaks, lambda first: _writers(settings, run_name, means, append=resumed or not first)),
        )
        self.log = RunLog(criterion, say=say or self._say, writers=writers, replicas=pipelines)
        self._window = Window()
        self._epoch_sums: dict[str, float] = {}
        self._window_start = self._epoch_start = perf_counter()
        self._window_busy = 0.0
        self._last_update = 0
        self.samples = 0.0

    def begin(self, batches: int) -> None:
        """Training starts, or goes on, after `batches` batches."""
        self.log.settings(self._settings.to_values(), batches=batches)
        if batches == 0:
            self.log.start(self._settings.epochs, self._calendar.batches_per_epoch)
        self._window_start = self._epoch_start = perf_counter()
        self._last_update = self._calendar.updates_after(batches)
        self.log.go_on(self._last_update)

    def paused(self, seconds: float) -> None:
        """Time that was not training (validation, a checkpoint) does not count in any speed."""
        self._window_start += seconds
        self._epoch_start += seconds

    def updated(self, batches: int, sums: dict[str, Tensor]) -> None:
        """An update is made after `batches` batches; `sums` are of the batches in it."""
        self._window.add(**sums)
        calendar, within = self._calendar, (batches - 1) % self._calendar.batches_per_epoch + 1
        ended = calendar.ends_epoch(batches) or batches == calendar.total_batches
        self._show_progress(batches)
        if ended or within % self._settings.disp_batches == 0:
            self._close_window(batches, within)
        if ended:
            self._close_epoch(batches)

    def _close_window(self, batches: int, within: int) -> None:
        rows = self._window.take()  # waits for a GPU, so the time is taken afterwards
        now, update = perf_counter(), self._calendar.updates_after(batches)
        sums = rows.sums()
        self._epoch_sums = add_sums(self._epoch_sums, sums) if self._epoch_sums else sums
        self.samples += sums.get("samples", 0.0)
        seconds, busy = now - self._window_start, self._busy_s()
        self.log.window(
            epoch=(batches - 1) // self._calendar.batches_per_epoch,
            batch=within,
            update=update,
            rows=rows,
            seconds=seconds,
            lr=self._rate(update - 1),
            bubble=max(0.0, 1.0 - (busy - self._window_busy) / seconds) if seconds > 0 else 0.0,
            memory_bytes=peak_memory_bytes(self._device),
        )
        self._window_start, self._window_busy = now, busy

    def _close_epoch(self, batches: int, extra: Mapping[str, float] = MappingProxyType({})) -> None:
        sums = self._sum_over_pipelines(self._epoch_sums)
        update = self._calendar.updates_after(batches)
        self.log.epoch(
            epoch=(batches - 1) // self._calendar.batches_per_epoch,
            update=update,
            sums=sums,
            lr=self._rate(update - 1),
            seconds=perf_counter() - self._epoch_start,
            **extra,
        )
        if self._calendar.ends_epoch(batches):  # else the run ends here, and a resumed one finishes the epoch
            self._epoch_sums = {}
        self._epoch_start = perf_counter()

    def validated(self, batches: int, sums: dict[str, float]) -> None:
        """A validation is over; `sums` are those of this pipeline's share."""
        total = self._sum_over_pipelines(sums)
        epoch = (batches - 1) // self._calendar.batches_per_epoch
        self.log.validation(epoch=epoch, update=self._calendar.updates_after(batches), sums=total)

    def _show_progress(self, batches: int) -> None:
        if self._speaks():
            epoch = (batches - 1) // self._calendar.batches_per_epoch
            text = f"epoch {epoch + 1}/{self._settings.epochs}"
            if self.log.curve:
                text += f" loss {self.log.curve[-1][1]:.4f}"
            self._progress(batches, self._calendar.total_batches, text)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same epoch line and curve; all last stages call this."""
        return {
            "epoch_sums": finite(self._sum_over_pipelines(self._epoch_sums)),
            "curve": finite(self.log.curve),
            "validations": finite(self.log.validations),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` of the checkpointed run returned."""
        sums = {name: _number(value) for name, value in state["epoch_sums"].items()}
        self._epoch_sums = sums if self._speaks() else {}
        self.log.curve = [(x, _number(y)) for x, y in state["curve"]]
        self.log.validations = [(x, _number(y)) for x, y in state["validations"]]

    def close(self) -> None:
        self.log.close()

    def _say(self, line: str) -> None:
        if self._speaks():
            write_line(line, sys.stdout)


def _number(value: float | None) -> float:
    """What JSON had no word for is no number."""
    return math.nan if value is None else value


class ElasticJournal(Journal):
    """The log of a last stage whose pipeline does as much as it can: windows of its own batches, epochs of all.

    The speed is that of the whole job: tickets of all pipelines passed by while this one did its own.
    """

    _own = 0
    _window_ticket = 0
    _last_ticket = -1
    _last_batches = 0
    _mixed: Mapping[str, float] = MappingProxyType({})  # what mixing had done at the end of the last epoch

    def progressed(self, batches: int, ticket: int, sums: dict[str, Tensor]) -> None:
        """An update is made; the whole job has come to `ticket`, which is of the calendar's batch `batches`."""
        self._window.add(**sums)
        self._own += 1
        self._last_ticket, self._last_batches = max(ticket, self._last_ticket), max(batches, self._last_batches)
        self._show_progress(self._last_batches)
        if self._own % self._settings.disp_batches == 0:
            self._end_window(self._last_batches)

    def _end_window(self, batches: int) -> None:
        own, self._own = self._own, 0
        self.log.replicas = max(1.0, (self._last_ticket + 1 - self._window_ticket) / own)
        self._window_ticket = self._last_ticket + 1
        self._close_window(batches, (batches - 1) % self._calendar.batches_per_epoch + 1)

    def stopped(self, batches: int, mixing: Mapping[str, float], *, pipeline: int, samples: float) -> None:
        """A segment is over at the calendar's `batches`; all last stages call this, with what they did so far."""
        if self._own:
            self._end_window(batches)
        self._last_batches = batches
        if self._calendar.ends_epoch(batches) or batches == self._calendar.total_batches:
            done = self._sum_over_pipelines({f"samples_of_pipeline_{pipeline}": samples})
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
                writer.write(event, values)

    def close(self) -> None:
        for writer in self._writers or ():
            writer.close()


def _writers(settings: Settings, run_name: str, means: tuple[str, ...], *, append: bool) -> tuple[Writer, ...]:
    writers: list[Writer] = [TensorBoard(Path(settings.runs) / run_name, means=means)]
    if settings.metrics is not None:
        writers.append(JsonLines(Path(settings.metrics), append=append))
    return tuple(writers)
