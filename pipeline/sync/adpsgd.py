"""AD-PSGD: replicas average in random pairs while they go on computing, and never all at once.

Lian, Zhang, Zhang, Liu, "Asynchronous Decentralized Parallel Stochastic Gradient Descent", ICML 2018, algorithm 1: an
active replica swaps weights with a random passive one, and each adds half of the difference, here as a correction.

    active    0     2     4        x_i <- x_i + (x_j - x_i) / 2
              | \\ / | \\ / |        x_j <- x_j + (x_i - x_j) / 2     with the x that were swapped: the corrections
    passive   1     3              cancel, so the mean is preserved whatever was added to either meanwhile

Active ones ask passive ones only, and those ask nobody, so nobody waits in a circle; any number of replicas will do.
The synchronous form is the SDPipe reference's: a seeded perfect matching of all replicas after every update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.core.draw import draw
from pipeline.core.topology import sides
from pipeline.sync.averaging import group_mean
from pipeline.sync.dialogue import Dialogue, locate, swap, unless_broken
from pipeline.sync.protocol import Stateless


def passive_neighbours(live: Sequence[int], pipeline: int) -> tuple[int, ...]:
    """Whom this pipeline may ask: every second of the live ones; nobody, when it is passive itself or not alive."""
    active, passive = sides(live)
    return passive if pipeline in active else ()


def correction(mine: Tensor, theirs: Tensor) -> Tensor:
    """What each side adds to its weights after a swap."""
    return (theirs - mine).mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class AdPsgd(Stateless):
    """Asynchronous: one swap with a random passive neighbour per update, while computing goes on."""

    seed: int = 0
    blocking: bool = False
    policy: str = "none"
    even: bool = False
    every: int = 1

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Dialogue[Tensor]:
        return unless_broken(self._meet(x, step), x)

    def _meet(self, x: Tensor, step: int) -> Dialogue[Tensor]:
        stage, pipeline, live = yield from locate()
        passive = passive_neighbours(live, pipeline)
        if not passive:
            return x
        theirs = yield from swap(passive[draw(self.seed, stage, pipeline, step) % len(passive)], x)
        return x if theirs is None else x + correction(x, theirs)


@dataclass(frozen=True, kw_only=True)
class MatchedAdPsgd(Stateless):
    """Synchronous: the coordinator's perfect matching of this step; an odd one goes on alone."""

    blocking: bool = True
    policy: str = "matching"
    even: bool = True
    every: int = 1

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Dialogue[Tensor]:
        return unless_broken(group_mean(x, step), x)
