"""Schedules: the order in which a stage works on its micro-batches, and the passes that turn it into a program.

There is one schedule with one dial. At most `window` micro-batches stand between their forward and their backward:

    window 4 (GPipe, 4 micro-batches)   F0 F1 F2 F3 B0 B1 B2 B3
    window 2 (1F1B, stage 2 of 4)       F0 F1 B0 F2 B1 F3 B2 B3
    window 1 (the last stage)           F0 B0 F1 B1 F2 B2 F3 B3

GPipe (Huang et al., 2019) is `window = M`; 1F1B is `window = stages - stage`; PipeDream (Narayanan et al., SOSP 2019)
is 1F1B over a feed that does not end at a batch, with an update after every backward. Passes add the rest: updates,
the sum over replicas, transfers to the neighbours, the norm of the gradient, parameters tied across stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def with_updates(order: Iterable[Action], ends_update: Callable[[int], bool]) -> Program:
    """Adds an update after the backward of every micro-batch that ends one, and at the end if some are left over."""
    left = -1
    for action in order:
        yield action
        if action.op is Op.BACKWARD:
            left = action.microbatch
            if ends_update(left):
                yield Action(Op.UPDATE, left)
                left = -1
    if left >= 0:
        yield Action(Op.UPDATE, left)


def with_reduce(order: Iterable[Action]) -> Program:
    """Sums gradients over the replicas before every update; opens the reduction at the backward before it.

    Opening early lets finished buckets travel while the rest of that backward is still computed.
    """
    held: list[Action] = []  # the last backward seen and what follows it
    for action in order:
        if action.op is Op.UPDATE:
            yield Action(Op.OPEN_REDUCE, action.microbatch)
            yield from held
            yield Action(Op.REDUCE, action.microbatch)
            yield action
            held = []
        elif action.op is Op.BACKWARD:
            yield from held
            held = [action]
        elif held:
            held.append(action)
        else:
            yield action
    yield from held


def with_mixing(order: Iterable[Action]) -> Program:
    """Mixes weights with other replicas after every update; asks for partners before the backward that leads to it.

    RG5 B5 SG5 U5  ->  RG5 J5 B5 SG5 U5 W5 X5

    The last pass: who asks has all that the backward needs, so that partners wait for arithmetic only.
    """
    held: list[Action] = []  # the last backward seen and what follows it
    for action in order:
        if action.op is Op.BACKWARD:
            yield from held
            held = [action]
        elif action.op is Op.UPDATE:
            microbatch = action.microbatch
            yield Action(Op.JOIN, microbatch)
            yield from held
            yield action
            yield Action(Op.WAIT, microbatch)
            yield Action(Op.MIX, microbatch)
            held = []
        elif held:
            held.append(action)
        else:
            yield action
    yield from held


def with_norm(order: Iterable[Action]) -> Program:
    """Agrees on the norm of the whole gradient before every update."""
    for action in order:
        if action.op is Op.UPDATE:
            yield Action(Op.NORM, action.microbatch)
        yield action


def with_transfers(order: Iterable[Action], stage: int, stages: int) -> Program:
    """Adds loading, receiving and sending around forwards and backwards."""
    first, last = stage == 0, stage == stages - 1
    for action in order:
        op, microbatch = action
        if op is Op.FORWARD:
            if not first:
                yield Action(Op.RECV_ACTIVATION, microbatch)
            if first or last:
                yield Action(Op.LOAD, microbatch)
            yield action
            if not last:
                yield Action(Op.SEND_ACTIVATION, microbatch)
        elif op is Op.BACKWARD:
            if not last:
                yield Action(Op.RECV_GRADIENT, microbatch)
            yield action
            if not first:
                yield Action(Op.SEND_GRADIENT, microbatch)
        else:
            yield action


def with_owned_weights(order: Iterable[Action]) -> Program:
    """The owner of a parameter that another stage borrows: takes in its gradient, hands out every new version."""
    for action in order:
        if action.op is Op.UPDATE:
            yield Action(Op.RECV_TIED_GRADIENT, action.microbatch)
        yield action
        if action.op is Op.UPDATE:
            yield Action(Op.SEND_TIED_WEIGHT, action.microbatch)


def with_borrowed_weights(order: Iterable[Action], owner: Iterable[Action]) -> Program:
    """The borrower: sends its gradient at every update, and forwards with the version the owner forwarded with.

    `owner` is the owner's own order; counting its updates before each of its forwards tells which version that is.
    """
    forwards = _updates_before_each_forward(owner)
    taken = 0
    updates: list[int] = []
    for action in order:
        if action.op is Op.FORWARD:
            for _ in range(next(forwards) - taken):
                yield Action(Op.RECV_TIED_WEIGHT, updates[taken])
                taken += 1
        if action.op is Op.UPDATE:
            yield Action(Op.SEND_TIED_GRADIENT, action.microbatch)
            updates.append(action.microbatch)
        yield action
    for microbatch in updates[taken:]:
        yield Action(Op.RECV_TIED_WEIGHT, microbatch)


def _updates_before_each_forward(order: Iterable[Action]) -> Iterator[int]:
    updates = 0
    for action in order:
        if action.op is Op.UPDATE:
            updates += 1
        elif action.op is Op.FORWARD:
            yield updates


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a program depends on besides the schedule's name.

    microbatches: of one batch (1 for pipedream, whose unit is the batch). accumulate: batches per update; the last
    update of an epoch of `batches_per_epoch` may have fewer. first: the batch from which a begun epoch counts.
    replicas: how many pipelines share the gradients. mixing: weights are mixed with other replicas after updates.
    norm: agree on the gradient's norm before updates. tie: (owner stage, borrower stage) of what is shared, or None.
    """

    stages: int
    microbatches: int = 1
    accumulate: int = 1
    batches_per_epoch: int | None = None
    first: int = 0
    replicas: int = 1
    mixing: bool = False
    norm: bool = False
    tie: tuple[int, int] | None = None

    def ends_update(self, microbatch: int) -> bool:
        """Whether an update follows the backward of this micro-batch."""
        batch, part = divmod(microbatch, self.microbatches)
        if part + 1 < self.microbatches:
            return False
        if not self.batches_per_epoch:
            return (batch + 1) % self.accumulate == 0
        epoch, within = divmod(batch, self.batches_per_epoch)
        begun, since = divmod(self.first, self.batches_per_epoch)
        counted = within - since if epoch == begun else within
        return (counted + 1) % self.accumulate == 0 or within + 1 == self.batches_per_epoch


def updates_of(schedule: Schedule, shape: Shape, stage: int, feed: Iterable[int]) -> Program:
    """Forwards, backwards and updates of one stage: the schedule before anything is said about communication."""
    window = schedule.window(stage, shape.stages, shape.microbatches)
    order = flushed(feed, window, shape.microbatches) if schedule.flushes else compute_order(feed, window)
    return with_updates(order, shape.ends_update)


def program(schedule: Schedule, shape: Shape, stage: int, feed: Iterable[int]) -> Program:
    """Everything stage `stage` does for the micro-batches numbered in `feed`, in order.

    `feed` may be endless, or end where nobody knew beforehand; it must be iterable more than once.

    >>> from pipeline.core.actions import render
    >>> render(program(SCHEDULES["pipedream"], Shape(stages=2), 1, range(2)))
    'RA0 L0 F0 B0 SG0 U0 RA1 L1 F1 B1 SG1 U1'
    """
    order = updates_of(schedule, shape, stage, feed)
    if shape.tie and shape.tie[0] != shape.tie[1]:
        owner, borrower = shape.tie
        if stage == owner:
            order = with_owned_weights(order)
        elif stage == borrower:
            order = with_borrowed_weights(order, updates_of(schedule, shape, owner, feed))
    if shape.replicas > 1:
        order = with_reduce(order)
    if shape.norm:
        order = with_norm(order)
    order = with_transfers(order, stage, shape.stages)
    return with_mixing(order) if shape.mixing else order


def forward_only(stage: int, stages: int, feed: Sequence[int]) -> Program:
    """Evaluation: the same 1F1B order, where a backward is only a receipt, so that no stage runs far ahead."""
    return with_transfers(compute_order(feed, stages - stage), stage, stages)


def destination(op: Op, stage: int, tie: tuple[int, int] | None = None) -> int | None:
    """The stage that gets the tensors which this action of `stage` sends; None for an action that sends none."""
    owner, borrower = tie or (None, None)
    return {
        Op.SEND_ACTIVATION: stage + 1,
        Op.SEND_GRADIENT: stage - 1,
        Op.SEND_TIED_GRADIENT: owner,
        Op.SEND_TIED_WEIGHT: borrower,
    }.get(op)


def edges(schedule: Schedule, shape: Shape) -> frozenset[tuple[int, int]]:
    """(source, destination) of every message between the devices of a pipeline, in training and validation.

    Read off the programs of one update and of one micro-batch's validation; longer runs repeat them. Norms and tickets
    are not among them: those go from host to host.
    """
    feed, stages = range(shape.microbatches * shape.accumulate), shape.stages
    found = set()
    for stage in range(stages):
        for action in (*program(schedule, shape, stage, feed), *forward_only(stage, stages, range(1))):
            to = destination(action.op, stage, shape.tie)
            if to is not None:
                found.add((stage, to))
    return frozenset(found)


def peak_versions(order: Iterable[Action]) -> int:
    """How many versions of the weights a stage holds at most: those of micro-batches in flight and the newest.

    The versions are not declared, they follow from the updates between a forward and its backward.
    """
    current, peak = 0, 1
    version_of: dict[int, int] = {}
    for op, microbatch in order:
        if op is Op.FORWARD:
            version_of[microbatch] = current
        elif op is Op.BACKWARD:
            del version_of[microbatch]
        elif op is Op.UPDATE:
            current += 1
            peak = max(peak, len({*version_of.values(), current}))
    return peak
