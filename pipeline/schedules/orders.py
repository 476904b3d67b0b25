"""Schedules: the order in which a stage works on its micro-batches.

There is one schedule with one dial. At most `window` micro-batches stand between their forward and their backward:

    window 4 (GPipe, 4 micro-batches)   F0 F1 F2 F3 B0 B1 B2 B3
    window 2 (1F1B, stage 2 of 4)       F0 F1 B0 F2 B1 F3 B2 B3
    window 1 (the last stage)           F0 B0 F1 B1 F2 B2 F3 B3

GPipe (Huang et al., 2019) is `window = M`; 1F1B is `window = stages - stage`; PipeDream (Narayanan et al., SOSP 2019)
is 1F1B over a feed that does not end at a batch, with an update after every backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from pipeline.core.actions import Action, Op
from pipeline.errors import UserError

Program = Iterator[Action]
Window = Callable[[int, int, int], int]  # (stage, stages, microbatches of a batch) -> micro-batches in flight


@dataclass(frozen=True)
class Schedule:
    """A named schedule: its window, and whether the pipe runs empty at the end of every batch."""

    name: str
    window: Window
    flushes: bool
    doc: str


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule("gpipe", lambda stage, stages, m: m, True, "all forwards of a batch, then all backwards"),
    "1f1b": Schedule("1f1b", lambda stage, stages, m: min(stages - stage, m), True, "backwards start early"),
    "pipedream": Schedule(
        "pipedream", lambda stage, stages, m: stages - stage, False, "never empty: stale weights, stashed"
    ),
    "dp": Schedule("dp", lambda stage, stages, m: 1, True, "no pipeline: replicas of the whole model"),
}


def find_schedule(name: str) -> Schedule:
    """The schedule called `name`.

    Raises:
        UserError: an unknown name.
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {name!r}; choose from {list(SCHEDULES)}")
    return SCHEDULES[name]


def compute_order(feed: Iterable[int], window: int) -> Program:
    """Forwards and backwards with at most `window` micro-batches between them; backwards first in, first out."""
    pending: deque[int] = deque()
    for microbatch in feed:
        yield Action(Op.FORWARD, microbatch)
        pending.append(microbatch)
        if len(pending) == window:
            yield Action(Op.BACKWARD, pending.popleft())
    while pending:
        yield Action(Op.BACKWARD, pending.popleft())


def flushed(feed: Iterable[int], window: int, batch: int) -> Program:
    """`compute_order` of one batch of `batch` micro-batches after the other: the pipe runs empty in between."""
    numbers = iter(feed)
    while chunk := list(islice(numbers, batch)):
        yield from compute_order(chunk, window)
