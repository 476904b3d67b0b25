"""The straggler at work: waits where a profile (`profile.py` beside it) says so, around the ops of one worker.

    SA3 |  zzz  | F4 | ..... | SA4         what was finished before has left already: sends do not wait
         before        after

Only the handlers of training are wrapped, so a validation runs at full speed. A GPU runs behind its host: before a
pause, and around every op that is to be made longer, the host waits for it, or the pause would vanish in its queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import Protocol

import torch

from pipeline.core.actions import Handlers, Op
from pipeline.errors import UserError
from pipeline.placement import Place
from pipeline.simulation.clocks import ExactClock
from pipeline.simulation.profile import SLOWED, Profile, parse_profile

RUNS_AHEAD_S = 0.01  # a host of its device, which hides what the host does between two ops
WAS_THERE_S = 1e-4  # what comes in less time had not to be waited for
WAITING = frozenset({  # what a device waits for
    Op.RECV_ACTIVATION, Op.RECV_GRADIENT, Op.RECV_TIED_GRADIENT, Op.RECV_TIED_WEIGHT, Op.NORM, Op.WAIT, Op.REDUCE,
})  # fmt: skip


class Clock(Protocol):
    """Seconds, and waiting for some."""

    def now(self) -> float: ...
    def wait(self, seconds: float) -> None: ...


class Waiting(Protocol):
    """Seconds, and waiting until so many."""

    def now(self) -> float: ...
    def wait_until(self, moment: float) -> None: ...


def read_profile(text: str) -> Profile:
    """The profile that --hetero describes, its files read.

    Raises:
        UserError: a profile that makes no sense, or a file that cannot be read.
    """
    return parse_profile(text, read=_read_file)


def _read_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--hetero {name}: {why}; give a file that every host can read") from None


class Straggler:
    """Slows one worker down.

    Args:
        seed: of the pauses.
        synchronize: waits until the device is idle; None where the host computes.
        release: lets go what is ready to be sent, before a pause; for transports that do so only when they are called.
        began: when training began, on `clock`; by default at the first op.
    """

    def __init__(
        self,
        profile: Profile,
        place: Place,
        *,
        seed: int,
        clock: Clock | None = None,
        synchronize: Callable[[], object] | None = None,
        release: Callable[[], object] = lambda: None,
        began: float | None = None,
    ) -> None:
        self._profile, self._place, self._seed = profile, place, seed
        self._clock: Clock = clock or ExactClock()
        self._release, self._began = release, began
        self._settle = synchronize or (lambda: None)
        self._stretches = profile.stretches(place)

    def before(self, op: Op, microbatch: int) -> None:
        """Waits before an op, if its turn has come to be paused."""
        if self._began is None:
            self._began = self._clock.now()
        pause_s = self._profile.pause_before(self._place, microbatch, op, self._seed)
        if pause_s > 0 or self._stretches:
            self._settle()
        if pause_s > 0:
            self._release()
            self._clock.wait(pause_s)

    def after(self, op: Op, microbatch: int, took_s: float) -> None:
        """Waits after an op, so that it lasts as long as a slow worker would have taken."""
        extra_s = self._profile.stretch(self._place, op, took_s, self._clock.now() - (self._began or 0.0))
        if extra_s > 0:
            self._clock.wait(extra_s)

    def carry_out(self, op: Op, microbatch: int, handler: Callable[[int], object]) -> None:
        """An op with what comes before and after it."""
        self.before(op, microbatch)
        start = self._clock.now()
        handler(microbatch)
        if self._stretches:
            self._settle()
            self.after(op, microbatch, self._clock.now() - start)


def slowed(handlers: Handlers, straggler: Straggler) -> Handlers:
    """The same handlers, with forwards and backwards slowed down."""
    return handlers | {op: _slowed(op, handlers[op], straggler) for op in SLOWED}


def _slowed(op: Op, handler: Callable[[int], object], straggler: Straggler) -> Callable[[int], object]:
    return lambda microbatch: straggler.carry_out(op, microbatch, handler)


class EmulatedDevice:
    """A device that is not there, and a clock: ops last so long on it, while its host does other things.

        device  |---- F4 ----|------ B4 ------|-X-|---- F5 ----|
        host    | F4 zzzzzzzzz | B4 zzzzzzzzzz |U4|X4|L5| F5 zzz |      a sleep ends late, loading takes time

    As with a real device, which has its next work before it is through, what the host does meanwhile costs nothing:
    updates (they are part of the backward's time), loading, being late. What counts is what a device waits for, which
    is messages and partners, and mixing, which works with its memory. A host that falls behind by more than a real one
    runs ahead holds its device up.
    """

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


def make_straggler(
    profile: Profile,
    place: Place,
    *,
    seed: int,
    device: torch.device,
    release: Callable[[], object] = lambda: None,
    clock: Clock | None = None,
) -> Straggler | None:
    """The straggler of this worker; None if the profile leaves it alone."""
    if not profile.slows(place):
        return None
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
    return Straggler(profile, place, seed=seed, clock=clock, synchronize=synchronize, release=release)
