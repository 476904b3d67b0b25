"""The calendar in tickets: which stretch of the common order lies between two stops, and which update a ticket is.

calendar, P = 3 pipelines     batch   0       1       2       3  |      an epoch is 4 batches each, then a stop
tickets                               0 1 2   3 4 5   6 7 8   9  | 10   an epoch of 10 batches: a short last row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.data.epochs import Calendar


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
