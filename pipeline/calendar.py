"""When things happen in a run, counted in batches: updates, ends of epochs, and the stops at which the pipe runs empty.

batch    0   1   2   3   4 | 5   6   7   8   9 |      5 batches an epoch, an update every 2 (and at the epoch's end)
update       1       2   3       4       5   6        the pipe is drained only where something has to look at the
stop                     ^                   ^        weights: validation, a checkpoint, the end
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """The plan of a run.

    max_updates: ends the run early. validate_every: epochs between validations, 0 for none. checkpoint_every: updates
    between checkpoints, besides those at the end of every epoch; None where no checkpoints are written.
    """

    batches_per_epoch: int
    epochs: int
    accumulate: int = 1
    max_updates: int | None = None
    validate_every: int = 1
    checkpoint_every: int | None = None

    @property
    def updates_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def total_updates(self) -> int:
        planned = self.epochs * self.updates_per_epoch
        return planned if self.max_updates is None else min(planned, self.max_updates)

    @property
    def total_batches(self) -> int:
        return self.batch_after(self.total_updates)

    def batch_after(self, updates: int) -> int:
        """The number of batches that have gone into the first `updates` updates."""
        epoch, rest = divmod(updates, self.updates_per_epoch)
        return epoch * self.batches_per_epoch + min(rest * self.accumulate, self.batches_per_epoch)

    def updates_after(self, batches: int) -> int:
        """The number of updates made once `batches` batches (up to the end of an update) are through."""
        epoch, rest = divmod(batches, self.batches_per_epoch)
        return epoch * self.updates_per_epoch + -(-rest // self.accumulate)

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
        updates = self.updates_after(batches)
        while updates < self.total_updates:
            periods = (self.updates_per_epoch, self.checkpoint_every or self.total_updates)
            updates = min(self.total_updates, *((updates // period + 1) * period for period in periods))
            stop = self.batch_after(updates)
            if self.validates(stop) or self.checkpoints(stop):
                return stop
        return self.total_batches
