"""Trying again what others may refuse: with growing pauses, up to a limit, and with their reasons in the last word.

0.1 s   0.2 s   0.4 s   ...   5 s   5 s   then an error: what was tried, how often, and why it was refused
"""

from __future__ import annotations

from collections import Counter

from pipeline.errors import PeerLate

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
REASONS = 4  # different ones that are told, the most frequent first


class Patience:
    """How often and how long something has been tried in vain.

    Args:
        what: is tried, in words. limit_s: for how long. began: the time of the first attempt.
    """

    def __init__(self, what: str, *, limit_s: float, began: float) -> None:
        self._what, self._limit_s, self._began = what, limit_s, began
        self._reasons: Counter[str] = Counter()

    def pause_s(self, refusal: str, now: float) -> float:
        """How long to wait before the next attempt, now that one came to nothing.

        Raises:
            PeerLate: that was the last one.
        """
        self._reasons[refusal] += 1
        left_s = self._began + self._limit_s - now
        if left_s <= 0:
            raise PeerLate(f"{self._what} was tried in vain for {self._limit_s:g} s: {self._words()}")
        tries = self._reasons.total()
        return float(min(FIRST_PAUSE_S * 2 ** min(tries - 1, 16), LONGEST_PAUSE_S, left_s))

    def _words(self) -> str:
        told = self._reasons.most_common(REASONS)
        words = [f"{reason} ({times} times)" if times > 1 else reason for reason, times in told]
        more = [f"{len(self._reasons) - REASONS} other reasons"] if len(self._reasons) > REASONS else []
        return "; ".join(words + more)
