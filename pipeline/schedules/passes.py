"""Passes: each takes an order and adds one thing to it, wherever that belongs.

an order            F0 F1 B0 B1
with_updates        F0 F1 B0 B1 U1
with_reduce         F0 F1 B0 RO1 B1 R1 U1
with_transfers      RA0 L0 F0 RA1 L1 F1 B0 SG0 RO1 B1 SG1 R1 U1      (on the last stage)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipeline.core.actions import Action, Op
from pipeline.schedules.orders import Program


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
