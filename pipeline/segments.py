"""The calendar in tickets: which stretch of the common order lies between two stops, and which update a ticket is.

calendar, P = 3 pipelines     batch   0       1       2       3  |      an epoch is 4 batches each, then a stop
tickets                               0 1 2   3 4 5   6 7 8   9  | 10   an epoch of 10 batches: a short last row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.calendar import Calendar


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A run cut at its stops.

    tickets_per_epoch: batches of an epoch, over all pipelines. start: batches per pipeline that are already through.
    """

    calendar: Calendar
    pipelines: int
    tickets_per_epoch: int
    start: int = 0

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The batches (per pipeline, of the calendar) at which segments end."""
        stops, at = [], self.start
        while at < self.calendar.total_batches:
            at = self.calendar.next_stop(at)
            stops.append(at)
        return tuple(stops)

    def tickets(self, segment: int) -> tuple[int, int]:
        """The tickets of a segment: first, and the one after the last."""
        stops = (self.start, *self.stops)
        return self._ticket(stops[segment]), self._ticket(stops[segment + 1])

    def _ticket(self, batch: int) -> int:
        epoch, within = divmod(batch, self.calendar.batches_per_epoch)
        return epoch * self.tickets_per_epoch + min(within * self.pipelines, self.tickets_per_epoch)

    def batch(self, ticket: int) -> int:
        """Which batch of the calendar a ticket belongs to."""
        epoch, within = divmod(ticket, self.tickets_per_epoch)
        last = self.calendar.batches_per_epoch - 1
        return epoch * self.calendar.batches_per_epoch + min(within // self.pipelines, last)

    def update(self, ticket: int) -> int:
        """The number, from 0, of the calendar's update that a ticket goes into: it decides the learning rate."""
        return self.calendar.updates_after(self.batch(ticket) + 1) - 1
