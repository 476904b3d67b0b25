"""What the group scheduler is told, and what it answers.

Ready, Final, Left, Joined, Tick ──► GroupScheduler ──► Form, WakeAt
"""

from __future__ import annotations

from typing import NamedTuple


class Ready(NamedTuple):
    """A replica has made `step` updates and wants a group; `scope` "host" asks for replicas of its own host only."""

    stage: int
    pipeline: int
    step: int
    scope: str = ""


class Final(NamedTuple):
    """A replica has drained and wants the average over all live replicas of its stage."""

    stage: int
    pipeline: int


class Left(NamedTuple):
    """A pipeline was lost, or went; what it asked for is not answered any more."""

    pipeline: int


class Joined(NamedTuple):
    """A pipeline takes part from now on."""

    pipeline: int


class Tick(NamedTuple):
    """Time has passed."""


class Form(NamedTuple):
    """The answer to every member (pipelines, sorted) of a group; `round` is unique over all stages and increases."""

    stage: int
    round: int
    members: tuple[int, ...]
    reason: str
    final: bool = False


class WakeAt(NamedTuple):
    """A `Tick` is wanted at this time, whatever comes before; later ones are asked for then."""

    time: float


Event = Ready | Final | Left | Joined | Tick
Command = Form | WakeAt
