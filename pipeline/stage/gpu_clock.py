"""When a GPU did what: the host only queues work and runs ahead, so its own clock says nothing about the work.

    host     F0 F1 B0 ...                        queued at once
    device   |   F0   |   F1   |    B0    |      an event in the computing stream after every action
             e0       e1       e2         e3     a span lasts from the event before to its own

Time on the device is the host's time at e0 plus all spans since; `begin` sets both clocks equal while the device is
idle. Nothing waits for an event that is not over yet, except `begin` and `settle`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch

from pipeline.core.actions import Action, Handlers, Op

COMPUTE = (Op.FORWARD, Op.BACKWARD, Op.UPDATE)


class Event(Protocol):
    """A moment in a stream; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this event to that one; both are over."""


class GpuClock:
    """Hands the spans of a device to `record`, some time after they are over; adds up what was computing.

    Args:
        stamp: puts an event into the computing stream. synchronize: waits until the device is idle.
        record: takes (action, start, end) in seconds of `now`'s clock. end_step: called where `end_step` was called
            between the actions.
    """

    def __init__(
        self,
        *,
        stamp: Callable[[], Event],
        synchronize: Callable[[], object],
        record: Callable[[Action, float, float], object],
        end_step: Callable[[], object],
        now: Callable[[], float] = perf_counter,
    ) -> None:
        self._stamp, self._synchronize, self._now = stamp, synchronize, now
        self._record, self._end_step = record, end_step
        self._waiting: deque[tuple[Action | None, Event | None]] = deque()
        self._last: Event | None = None
        self._time_s = 0.0  # of `_last`
        self._busy_s = 0.0

    def begin(self) -> None:
        """The device starts afresh: what comes now is not measured from what was long ago."""
        self.settle()
        self._last, self._time_s = self._stamp(), self._now()

    def timed(self, handlers: Handlers) -> Handlers:
        """The same handlers, whose work on the device becomes spans."""
        return {op: self._timed(op, handler) for op, handler in handlers.items()}

    def _timed(self, op: Op, handler: Callable[[int], object]) -> Callable[[int], object]:
        def act(microbatch: int) -> None:
            handler(microbatch)
            self._waiting.append((Action(op, microbatch), self._stamp()))

        return act

    def end_step(self) -> None:
        """A step ends with what was queued so far; also takes in what is over by now."""
        self._waiting.append((None, None))
        self._collect()

    def busy_s(self) -> float:
        """Seconds of forwards, backwards and updates that are over."""
        self._collect()
        return self._busy_s

    def settle(self) -> None:
        """Waits for the device, so that every span is known."""
        self._synchronize()
        self._collect()

    def _collect(self) -> None:
        waiting = self._waiting
        while waiting:
            action, event = waiting[0]
            if event is not None and not event.query():
                return
            waiting.popleft()
            if action is None or event is None:
                self._end_step()
            else:
                self._take(action, event)

    def _take(self, action: Action, event: Event) -> None:
        assert self._last is not None, "begin() comes before the first action"
        start = self._time_s
        self._time_s += self._last.elapsed_time(event) / 1e3
        self._last = event
        if action.op in COMPUTE:
            self._busy_s += self._time_s - start
        self._record(action, start, self._time_s)


def cuda_clock(
    device: torch.device,
    *,
    record: Callable[[Action, float, float], object],
    end_step: Callable[[], object],
) -> GpuClock:
    """A clock of the stream that is current now on `device`, where stages compute."""
    make_event: Any = torch.cuda.Event  # typed in some versions of torch only
    stream = torch.cuda.current_stream(device)

    def stamp() -> Any:
        event = make_event(enable_timing=True)
        event.record(stream)
        return event

    return GpuClock(stamp=stamp, synchronize=lambda: torch.cuda.synchronize(device), record=record, end_step=end_step)
