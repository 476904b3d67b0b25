"""What a synchroniser may ask of the world, as values, and the verbs that ask.

A synchroniser is a dialogue: a generator that yields requests and is sent the answers, so it does no I/O of its own.

    group = yield from join(step)          ->  Join(step)         <-  Group(round=41, members=(0, 2))
    x = yield from average(group, x)       ->  Average(group, x)  <-  the mean over pipelines 0 and 2

Processes, threads and tests carry out the same dialogues. A lost member is `GroupBroken`, thrown in where the answer
was expected.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from pipeline.core.group import Group
from pipeline.errors import GroupBroken

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Place(NamedTuple):
    """Which replica a dialogue speaks for, and which pipelines are alive (ascending, its own among them)."""

    stage: int
    pipeline: int
    live: tuple[int, ...]


class Locate(NamedTuple):
    """Asks for this replica's `Place`."""


class Join(NamedTuple):
    """Asks for the `Group` of this step; scope "" among all replicas of the stage, "host" among those of this host."""

    step: int
    scope: str = ""


class Average(NamedTuple):
    """Asks for the mean of the members' x, equal bit for bit on all of them."""

    group: Group
    x: Tensor


class Broadcast(NamedTuple):
    """Asks for the x of member `root`."""

    group: Group
    root: int
    x: Tensor


class Swap(NamedTuple):
    """Gives x to pipeline `peer` and asks for its own; None when it does not swap now."""

    peer: int
    x: Tensor


Request: TypeAlias = Locate | Join | Average | Broadcast | Swap
Dialogue: TypeAlias = Generator[Request, Any, T]


def locate() -> Dialogue[Place]:
    """Where this replica stands."""
    place: Place = yield Locate()
    return place


def join(step: int, scope: str = "") -> Dialogue[Group]:
    """The group to average with after update `step`."""
    group: Group = yield Join(step, scope)
    return group


def average(group: Group, x: Tensor) -> Dialogue[Tensor]:
    """The mean over the group, in new memory; x itself in a group of one.

    Raises:
        GroupBroken: a member was lost meanwhile.
    """
    if len(group.members) == 1:
        return x
    mean: Tensor = yield Average(group, x)
    return mean


def broadcast(group: Group, root: int, x: Tensor) -> Dialogue[Tensor]:
    """The x of pipeline `root`, in new memory; x itself in a group of one.

    Raises:
        GroupBroken: the root was lost meanwhile.
    """
    if len(group.members) == 1:
        return x
    theirs: Tensor = yield Broadcast(group, root, x)
    return theirs


def swap(peer: int, x: Tensor) -> Dialogue[Tensor | None]:
    """The x of pipeline `peer`, which gets this one; None when it does not swap now.

    Raises:
        GroupBroken: the peer was lost meanwhile.
    """
    theirs: Tensor | None = yield Swap(peer, x)
    return theirs


def unless_broken(dialogue: Dialogue[T], otherwise: T) -> Dialogue[T]:
    """What the dialogue comes to, or `otherwise` when a member of its group was lost meanwhile."""
    try:
        return (yield from dialogue)
    except GroupBroken:
        return otherwise
