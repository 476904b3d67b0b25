"""Model averaging: x <- mean over a group; the one step that partial reduce, local SGD and matchings share."""

from __future__ import annotations

from torch import Tensor

from pipeline.sync.dialogue import Dialogue, average, broadcast, join


def group_mean(x: Tensor, step: int, scope: str = "") -> Dialogue[Tensor]:
    """The mean over whoever the coordinator puts into this step's group."""
    group = yield from join(step, scope)
    return (yield from average(group, x))


def leader_weights(x: Tensor, step: int) -> Dialogue[Tensor]:
    """The weights of the group's first pipeline."""
    group = yield from join(step)
    return (yield from broadcast(group, group.members[0], x))
