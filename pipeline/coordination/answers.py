"""A future whose result is never waited for without end: what one asks another thread for, with a deadline of its own.

The other thread is meant to answer, or to say why not, long before. This is for the day when it cannot.
"""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

from pipeline.errors import PeerLate

SLICE_S = 1.0  # of a wait; time that this whole process stood still counts as one slice at most

T = TypeVar("T")


class Answer(Future[T]):
    """Waits for at most `longest_s`.

    Args:
        what: is waited for, in words.
    """

    def __init__(self, longest_s: float, what: str) -> None:
        super().__init__()
        self._longest_s, self._what = longest_s, what

    def result(self, timeout: float | None = None) -> T:
        """The answer; raises what it failed with.

        Raises:
            PeerLate: there was none in time.
            TimeoutError: nor within `timeout`, if that is given.
        """
        if timeout is None:
            self._await()
        return super().result(0 if timeout is None else timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it failed with, or None; raises as `result` does when nothing came."""
        if timeout is None:
            self._await()
        return super().exception(0 if timeout is None else timeout)

    def _await(self) -> None:
        left_s = self._longest_s
        while not self.done():
            if left_s <= 0:
                raise PeerLate(f"waited {self._longest_s:g} s for {self._what}")
            slice_s = min(left_s, SLICE_S)
            try:
                super().exception(slice_s)
            except NotYet:
                left_s -= slice_s
