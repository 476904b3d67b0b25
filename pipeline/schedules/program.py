"""Programs: everything that a stage does, in order, made of a schedule's order by passes over it.

    orders      F0 B0 F1 B1                                      which micro-batch when
    passes      RA0 L0 F0 B0 SG0 U0 RA1 L1 F1 B1 SG1 U1          updates, transfers, and what else the job's shape asks

What is read off programs stands here too: who sends to whom, and how many versions of the weights there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.core.actions import Action, Op
from pipeline.schedules.orders import Program, Schedule, compute_order, flushed
from pipeline.schedules.passes import (
    with_borrowed_weights,
    with_mixing,
    with_norm,
    with_owned_weights,
    with_reduce,
    with_transfers,
    with_updates,
)


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
    >>> from pipeline.schedules.orders import SCHEDULES
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
