"""When things happen in a run, counted in batches: updates, ends of epochs, and the stops at which the pipe runs empty.

batch    0   1   2   3   4 | 5   6   7   8   9 |      5 batches an epoch, an update every 2 (and at the epoch's end)
update       1       2   3       4       5   6        the pipe is drained only where something has to look at the
stop                     ^                   ^        weights: validation, a checkpoint, the end

A run that goes on with an epoch which another number of pipelines began numbers its batches so that the epoch ends
where it would end here: begun after 5 updates, 3 of its 5 batches left, it starts with batch 2 and update 6.

batch            2   3   4 | 5   6   7   8   9 |
update               6   7       8       9  10

Batches that are handed out while the run goes on have tickets. A stretch of them, between two stops, is a segment:

calendar, P = 3 pipelines     batch   0       1       2       3  |      an epoch is 4 batches each, then a stop
tickets                               0 1 2   3 4 5   6 7 8   9  | 10   an epoch of 10 batches: a short last row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Position(NamedTuple):
    """How far a run has come in the data, whoever reads it: whole epochs, and samples of the next one's order."""

    epoch: int = 0
    samples: int = 0


BEGINNING = Position()


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """The plan of a run.

    max_updates: ends the run early. validate_every: epochs between validations, 0 for none. checkpoint_every: updates
    between checkpoints, besides those at the end of every epoch; None where no checkpoints are written.
    start, made: the first batch of a run that goes on with another's, and the updates made before it.
    """

    batches_per_epoch: int
    epochs: int
    accumulate: int = 1
    max_updates: int | None = None
    validate_every: int = 1
    checkpoint_every: int | None = None
    start: int = 0
    made: int = 0

    @property
    def updates_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def shift(self) -> int:
        """Updates made until the start, less those that this calendar would have made until there."""
        return self.made - self._own_updates(self.start)

    @property
    def total_updates(self) -> int:
        planned = self.epochs * self.updates_per_epoch + self.shift
        return max(self.made, planned if self.max_updates is None else min(planned, self.max_updates))

    @property
    def total_batches(self) -> int:
        return self.batch_after(self.total_updates)

    def batch_after(self, updates: int) -> int:
        """The batch before which so many updates have been made."""
        epoch, rest = divmod(updates - self.shift, self.updates_per_epoch)
        first = epoch * self.batches_per_epoch
        if epoch == self._begun_epoch:
            first, rest = self.start, updates - self.made
        return min(first + rest * self.accumulate, (epoch + 1) * self.batches_per_epoch)

    def updates_after(self, batches: int) -> int:
        """The number of updates made once `batches` batches (up to the end of an update) are through."""
        return self._own_updates(batches) + self.shift

    def _own_updates(self, batches: int) -> int:
        """Those of this calendar from its beginning on; in the begun epoch they are counted back from its end."""
        epoch, within = divmod(batches, self.batches_per_epoch)
        if epoch == self._begun_epoch:
            left = (epoch + 1) * self.batches_per_epoch - self.start
            begun = (epoch + 1) * self.updates_per_epoch - -(-left // self.accumulate)
            return begun + -(-(batches - self.start) // self.accumulate)
        return epoch * self.updates_per_epoch + -(-within // self.accumulate)

    @property
    def _begun_epoch(self) -> int:
        return self.start // self.batches_per_epoch

    def ends_epoch(self, batches: int) -> bool:
        return batches > 0 and batches % self.batches_per_epoch == 0

    def validates(self, batches: int) -> bool:
        """Whether a validation follows when `batches` batches are through: by epochs, and at the very end."""
        if not self.validate_every:
            return False
        at_end = batches == self.total_batches
        due = self.ends_epoch(batches) and (batches // self.batches_per_epoch) % self.validate_every == 0
        return at_end or due

    def checkpoints(self, batches: int) -> bool:
        """Whether a checkpoint is written when `batches` batches are through."""
        if self.checkpoint_every is None or batches == 0:
            return False
        if self.ends_epoch(batches) or batches == self.total_batches:
            return True
        updates = self.updates_after(batches)
        return (
            self.checkpoint_every > 0 and updates % self.checkpoint_every == 0 and self.batch_after(updates) == batches
        )

    def next_stop(self, batches: int) -> int:
        """The first point after `batches` at which the pipe has to be empty."""
        updates, shift, total = self.updates_after(batches), self.shift, self.total_updates
        while updates < total:
            end_of_epoch = ((updates - shift) // self.updates_per_epoch + 1) * self.updates_per_epoch + shift
            every = self.checkpoint_every or total
            updates = min(total, end_of_epoch, (updates // every + 1) * every)
            stop = self.batch_after(updates)
            if self.validates(stop) or self.checkpoints(stop):
                return stop
        return self.total_batches


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A run cut at its stops.

    tickets_per_epoch: batches of an epoch, over all pipelines. first_ticket: that of the calendar's first batch.
    """

    calendar: Calendar
    pipelines: int
    tickets_per_epoch: int
    first_ticket: int = 0

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The batches (per pipeline, of the calendar) at which segments end."""
        stops, at = [], self.calendar.start
        while at < self.calendar.total_batches:
            at = self.calendar.next_stop(at)
            stops.append(at)
        return tuple(stops)

    def tickets(self, segment: int) -> tuple[int, int]:
        """The tickets of a segment: first, and the one after the last."""
        stops = (self.calendar.start, *self.stops)
        return self.ticket(stops[segment]), self.ticket(stops[segment + 1])

    def ticket(self, batch: int) -> int:
        """The first ticket of a batch of the calendar."""
        epoch, within = divmod(batch, self.calendar.batches_per_epoch)
        first = epoch * self.tickets_per_epoch
        if epoch == self._begun:
            first, within = self._first, batch - self.calendar.start
        return min(first + within * self.pipelines, (epoch + 1) * self.tickets_per_epoch)

    def batch(self, ticket: int) -> int:
        """Which batch of the calendar a ticket belongs to."""
        epoch, within = divmod(ticket, self.tickets_per_epoch)
        first, per_epoch = epoch * self.calendar.batches_per_epoch, self.calendar.batches_per_epoch
        if epoch == self._begun:
            first, within = self.calendar.start, ticket - self._first
        return min(first + within // self.pipelines, (epoch + 1) * per_epoch - 1)

    @property
    def _first(self) -> int:
        """`first_ticket`, unless what is left of its epoch is too little for a batch of every pipeline."""
        return max(self.first_ticket, self._begun * self.tickets_per_epoch)

    @property
    def _begun(self) -> int:
        return self.calendar.start // self.calendar.batches_per_epoch

    def update(self, ticket: int) -> int:
        """The number, from 0, of the calendar's update that a ticket goes into: it decides the learning rate."""
        return self.calendar.updates_after(self.batch(ticket) + 1) - 1
