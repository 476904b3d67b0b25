"""The straggler at work: waits where a profile (`profile.py` beside it) says so, around the ops of one worker.

    SA3 |  zzz  | F4 | ..... | SA4         what was finished before has left already: sends do not wait
         before        after

Only the handlers of training are wrapped, so a validation runs at full speed. A GPU runs behind its host: before a
pause, and around every op that is to be made longer, the host waits for it, or the pause would vanish in its queue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.core.actions import Handlers, Op
from pipeline.placement import Place
from pipeline.simulation.clocks import Clock, ExactClock
from pipeline.simulation.profile import SLOWED, Profile


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
