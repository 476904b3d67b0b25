"""Local SGD and post-local SGD: replicas update on their own and average every H steps, or less often at first.

Stich, ICLR 2019, algorithm 1; Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020, also
for the first S steps (post-local) and for averages inside a host (hierarchical). S = 3, H = 4, h = 2:

    step               1  2  3 | 4  5  6  7  8  9 10 11 12      A   average over all
    single_process     .  .  L | A  .  h  .  A  .  h  .  A      L   everyone adopts the first pipeline's weights
    multiple_processes A  A  A | A  .  h  .  A  .  h  .  A      h   average inside the host

With H = 1 on plain SGD this is gradient averaging: the mean of x - lr g_i is x - lr mean(g_i).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from torch import Tensor

from pipeline.errors import GroupBroken
from pipeline.sync.averaging import group_mean, leader_weights
from pipeline.sync.dialogue import Dialogue, unless_broken
from pipeline.sync.outer import Outer


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """What happens after which update: "average", "host", "adopt", or "" for nothing."""

    local_steps: int = 4
    initial_steps: int = 0
    single_process: bool = True
    host_steps: int | None = None

    def after(self, step: int) -> str:
        if step < self.initial_steps:
            return "" if self.single_process else "average"
        if step == self.initial_steps:
            return "adopt" if self.single_process else "average"
        if step % self.local_steps == 0:
            return "average"
        return "host" if self.host_steps is not None and step % self.host_steps == 0 else ""

    @property
    def every(self) -> int:
        """A number of updates that divides all steps at which something happens."""
        regular = gcd(self.local_steps, self.host_steps or 0)
        if not self.initial_steps:
            return regular
        return gcd(regular, self.initial_steps) if self.single_process else 1


class LocalSgd:
    """Averages as the calendar says; each average over all replicas after the initial steps is also an outer step."""

    policy, even, blocking = "all", True, True

    def __init__(self, calendar: Calendar, outer: Outer | None = None) -> None:
        self._calendar, self._outer = calendar, outer

    @property
    def every(self) -> int:
        return self._calendar.every

    @property
    def remembers(self) -> frozenset[str]:
        return frozenset() if self._outer is None else self._outer.remembers

    def begin(self, x: Tensor, weights: int | None = None) -> None:
        if self._outer is not None:
            self._outer.begin(x, weights)

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Dialogue[Tensor]:
        event = self._calendar.after(step)
        if not event:
            return x
        if event == "host":
            return (yield from unless_broken(group_mean(x, step, "host"), x))
        try:
            mean = yield from (leader_weights if event == "adopt" else group_mean)(x, step)
        except GroupBroken:
            return x
        if self._outer is None:
            return mean
        if step > self._calendar.initial_steps:
            return self._outer.step(mean, learning_rate)
        self._outer.restart(mean)
        return mean

    def state(self) -> dict[str, Tensor]:
        return {} if self._outer is None else self._outer.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self._outer is not None:
            self._outer.load_state(tensors)
