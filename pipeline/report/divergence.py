"""A loss that is not a number any more does not heal: whether to go on, decided from one loss after the other.

update   11    12    13    14    15
loss     2.1   nan   2.0   inf   nan   nan      three in a row: --nan stop ends the run, warn says so once
"""

from __future__ import annotations

import math

from pipeline.errors import UserError

IN_A_ROW = 3  # losses that are not finite before anything is done about it


class LossWatch:
    """Looks at the losses of a run in order; `policy` is "stop", "warn" or "off"."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._first = 0.0  # the first update of the row
        self._bad = 0  # how many in a row

    def see(self, update: float, loss: float) -> str | None:
        """Takes the loss of an update in; a warning, if there is one.

        Raises:
            UserError: --nan stop, and too many losses in a row are not finite.
        """
        if math.isfinite(loss):
            self._bad = 0
            return None
        self._first = self._first if self._bad else update
        self._bad += 1
        if self._bad != IN_A_ROW or self._policy == "off":
            return None
        text = f"the loss is not finite any more since update {self._first:.0f} ({self._bad} in a row)"
        if self._policy == "stop":
            raise UserError(
                f"{text}: the training has diverged; give a lower --learning-rate, a longer warm-up or "
                "--clip-grad-norm, or go on all the same with --nan warn"
            )
        return f"warning: {text}; the run goes on (--nan warn)"
