"""A device that is not there, and a clock: ops last so long on it, while its host does other things.

    device  |---- F4 ----|------ B4 ------|-X-|---- F5 ----|
    host    | F4 zzzzzzzzz | B4 zzzzzzzzzz |U4|X4|L5| F5 zzz |      a sleep ends late, loading takes time

As with a real device, which has its next work before it is through, what the host does meanwhile costs nothing:
updates (they are part of the backward's time), loading, being late. What counts is what a device waits for, which
is messages and partners, and mixing, which works with its memory. A host that falls behind by more than a real one
runs ahead holds its device up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from pipeline.core.actions import Handlers, Op
from pipeline.simulation.clocks import Waiting

RUNS_AHEAD_S = 0.01  # a host of its device, which hides what the host does between two ops
WAS_THERE_S = 1e-4  # what comes in less time had not to be waited for
WAITING = frozenset({  # what a device waits for
    Op.RECV_ACTIVATION, Op.RECV_GRADIENT, Op.RECV_TIED_GRADIENT, Op.RECV_TIED_WEIGHT, Op.NORM, Op.WAIT, Op.REDUCE,
})  # fmt: skip


class EmulatedDevice:
    """A device that is not there, and a clock: its ops last so long, while its host does other things."""

    def __init__(self, pace: Mapping[Op, float], clock: Waiting) -> None:
        self._pace, self._clock = pace, clock
        self._free_at = inf  # when the device was, or will be, through with everything; at first, not yet known

    def wrap(self, handlers: Handlers) -> Handlers:
        """The same handlers, with ops that last as long as they should."""
        present = handlers.keys()
        lasting = {op: self._lasting(handlers[op], self._pace[op]) for op in present & self._pace.keys()}
        waiting = {op: self._waiting(handlers[op]) for op in present & WAITING}
        mixing = {op: self._mixing(handlers[op]) for op in present & {Op.MIX}}
        return handlers | lasting | waiting | mixing

    def now(self) -> float:
        """When the device was, or will be, through with everything so far: its own time, for a simulated straggler."""
        now = self._clock.now()
        self._free_at = max(min(self._free_at, now), now - RUNS_AHEAD_S)
        return self._free_at

    def wait(self, seconds: float) -> None:
        """The device is busy for so long."""
        self._free_at = self.now() + seconds
        self._clock.wait_until(self._free_at)

    def _lasting(self, handler: Callable[[int], object], seconds: float) -> Callable[[int], object]:
        def act(microbatch: int) -> None:
            began = self.now()
            handler(microbatch)
            self._free_at = began + seconds
            self._clock.wait_until(self._free_at)

        return act

    def _waiting(self, handler: Callable[[int], object]) -> Callable[[int], object]:
        def act(microbatch: int) -> None:
            began = self._clock.now()
            handler(microbatch)
            if self._clock.now() - began > WAS_THERE_S:
                self._free_at = self._clock.now()

        return act

    def _mixing(self, handler: Callable[[int], object]) -> Callable[[int], object]:
        def act(microbatch: int) -> None:
            began = self._clock.now()
            handler(microbatch)
            self._free_at += self._clock.now() - began

        return act
