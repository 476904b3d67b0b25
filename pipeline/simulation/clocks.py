"""Clocks to wait by. The system's sleep ends 50 to 200 us late, which would be several per cent of an emulated op.

sleep ............ late ....|        told to sleep for less, by as much as it is usually late,
                            ^        and the rest is waited out by looking at the clock
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Protocol

MOST_EARLY_S = 2.5e-4
_PR_SET_TIMERSLACK = 29


class Clock(Protocol):
    """Seconds, and waiting for some."""

    def now(self) -> float: ...
    def wait(self, seconds: float) -> None: ...


class Waiting(Protocol):
    """Seconds, and waiting until so many."""

    def now(self) -> float: ...
    def wait_until(self, moment: float) -> None: ...


class SharpClock:
    """Seconds since some moment, and waiting for one; may be used by several threads, and pickled.

    Every thread that waits must have been started after the first clock was made, or sleeps are a little less sharp.
    """

    def __init__(self) -> None:
        sharpen_sleeps()

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        self.wait_until(time.perf_counter() + seconds)

    def wait_until(self, moment: float) -> None:
        """Returns a little after `moment` of `now`, at once if it is past."""
        left = moment - time.perf_counter()
        if left > 0:
            time.sleep(left)


class ExactClock(SharpClock):
    """Looks at the time until the moment has come, which costs a processor a fraction of a millisecond per wait."""

    def __init__(self) -> None:
        super().__init__()
        self._early_s = 1e-4  # how much earlier than wanted sleeps are told to end

    def wait_until(self, moment: float) -> None:
        """Returns at `moment` of `now`, at once if it is past, and never before."""
        left = moment - time.perf_counter() - self._early_s
        if left > 0:
            time.sleep(left)
            late = time.perf_counter() - (moment - self._early_s)
            self._early_s = min(0.9 * self._early_s + 0.12 * late, MOST_EARLY_S)
        while time.perf_counter() < moment:
            time.sleep(0)  # other threads of this process may run


def sharpen_sleeps() -> None:
    """Linux ends sleeps up to 50 us late to save power; asks it not to, for this thread and those it starts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
