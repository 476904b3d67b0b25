"""Who does which batch: every ticket of a segment goes to one pipeline, on demand, so that fast ones do more.

tickets      0  1  2  3  4  5  6  7  8  9 | the segment's end
pipeline 0   0     2     4  5     7     9        fast
pipeline 1      1                 6              slow: ticket 8 would be through later with it than with
pipeline 2            3              8           the others, so it gets none and has finished its share
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil
from statistics import median_high

REMEMBERED = 8  # times per batch, of each pipeline
ENOUGH = 4  # of them show that it is fast: two batches whose news came together seem to have taken no time
AT_ONCE = 4  # tickets that a pipeline gets for one question, while there are
SPARE = 8  # for each pipeline and ticket ahead
CLEARLY = 0.9  # the others are sooner if they need less than this part of the time


@dataclass
class _Share:
    """One pipeline's part of the segment."""

    live: bool = True
    next_k: int = 0
    first_k: int = 0  # of this segment
    end: int | None = None  # the k from which on it gets nothing more
    tickets: dict[int, int] = field(default_factory=dict)  # k -> ticket, of this segment
    under_way: dict[int, int] = field(default_factory=dict)  # those of them that are not done
    own: deque[int] = field(default_factory=deque)  # reserved for it (even shares)
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    last_done: float | None = None
    batch_s: float | None = None  # typical time from one batch to the next

    @property
    def open(self) -> bool:
        return self.live and self.end is None

    def learn(self, batches: int, now: float) -> None:
        if self.last_done is not None:
            self.recent_s.extend([max(now - self.last_done, 1e-9) / batches] * batches)
            self.batch_s = median_high(self.recent_s)
        self.last_done = now


class Shares:
    """The tickets of one segment after another.

    even: the pipelines that are live at the beginning take turns (ticket first + i * P + p), as all-reduce would;
    what is left over because somebody was lost goes to whoever asks. Otherwise first come, first served.
    """

    def __init__(self, pipelines: int, *, even: bool) -> None:
        self.segment = -1
        self._even = even
        self._shares = [_Share() for _ in range(pipelines)]
        self._next, self._stop = 0, 0  # tickets that nobody was given or promised
        self._returned: list[int] = []  # a heap

    @property
    def over(self) -> bool:
        """Whether all tickets of the segment are handed out."""
        return self._left() == 0 and not any(share.own for share in self._shares)

    @property
    def undone(self) -> tuple[int, ...]:
        """Tickets of the segment that are not through: at its end, those that were lost with the last to hold them."""
        held = [ticket for share in self._shares for ticket in (*share.under_way.values(), *share.own)]
        return tuple(sorted((*held, *self._returned, *range(self._next, self._stop))))

    def next_k(self, pipeline: int) -> int:
        """The number of the first batch that this pipeline has not asked for."""
        return self._shares[pipeline].next_k

    def begin(self, segment: int, first: int, stop: int) -> None:
        """From now on tickets [first, stop) are handed out; nothing happens if the segment has begun already."""
        if segment == self.segment:
            return
        self.segment = segment
        self._next, self._stop, self._returned = first, stop, []
        for share in self._shares:
            share.first_k, share.last_done = share.next_k, None
            share.end = None if share.live else share.next_k
            share.tickets, share.under_way, share.own = {}, {}, deque()
        live = [share for share in self._shares if share.live]
        if self._even and live:
            for turn, share in enumerate(live):
                share.own.extend(range(first + turn, stop, len(live)))
            self._next = stop

    def ask(self, pipeline: int, k: int, now: float) -> int | None:
        """The ticket of a pipeline's batch `k`, the same for all its stages; None: its share of the segment ends there.

        Raises:
            ValueError: no segment has begun, or a batch before `k` was not asked for.
        """
        share = self._shares[pipeline]
        if self.segment < 0:
            raise ValueError(f"pipeline {pipeline} asks for batch {k}, and no segment has begun")
        if not share.first_k <= k <= share.next_k:
            expected = f"from {share.first_k} to {share.next_k}"
            raise ValueError(
                f"pipeline {pipeline} asks for batch {k} of segment {self.segment}; expected one {expected}"
            )
        if k in share.tickets:
            return share.tickets[k]
        if share.end is None:
            ticket = self._grant(share)
            if ticket is not None:
                return ticket
            share.end = k
        return None

    def ahead(self, pipeline: int, k: int) -> list[int]:
        """Tickets for its batches after `k`, the last it asked for; none where few are left, or its pace is unknown."""
        share = self._shares[pipeline]
        if k + 1 != share.next_k or share.end is not None or share.batch_s is None:
            return []
        competing = 1 if self._even else sum(other.open for other in self._shares)
        left = len(share.own) if self._even else self._left()
        tickets: list[int] = []
        while len(tickets) < min(AT_ONCE - 1, left // (SPARE * competing)):
            ticket = self._grant(share)
            if ticket is None:
                break
            tickets.append(ticket)
        return tickets

    def _grant(self, share: _Share) -> int | None:
        """A ticket for its next batch."""
        ticket = self._give(share)
        if ticket is not None:
            share.tickets[share.next_k] = share.under_way[share.next_k] = ticket
            share.next_k += 1
        return ticket

    def _give(self, share: _Share) -> int | None:
        if share.own:
            return share.own.popleft()
        if not self._left() or self._others_are_sooner(share):
            return None
        if self._returned:
            return heappop(self._returned)
        self._next += 1
        return self._next - 1

    def _left(self) -> int:
        return len(self._returned) + self._stop - self._next

    def _others_are_sooner(self, share: _Share) -> bool:
        """Whether the others would have done all that is left clearly before this one had done one more."""
        if share.batch_s is None:
            return False
        time_s = CLEARLY * (len(share.under_way) + 1) * share.batch_s
        left = self._left()
        for other in self._shares:
            if other is not share and other.open and other.batch_s is not None and len(other.recent_s) >= ENOUGH:
                done = ceil(time_s / other.batch_s) - 1  # strictly before
                left -= max(0, done - len(other.under_way))
                if left <= 0:
                    return True
        return False

    def done(self, pipeline: int, k: int, now: float) -> None:
        """A pipeline's batches up to `k` are through. Nothing happens if it does not have them any more."""
        share = self._shares[pipeline]
        through = [held for held in share.under_way if held <= k]
        for held in through:
            del share.under_way[held]
        if through:
            share.learn(len(through), now)

    def left(self, pipeline: int) -> None:
        """What this pipeline has not done is handed out again; it gets nothing more of this segment unless it joins."""
        share = self._shares[pipeline]
        self._return(share.under_way.values())
        self._return(share.own)
        share.live, share.end, share.last_done = False, share.next_k, None
        share.under_way, share.own = {}, deque()

    def _return(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            heappush(self._returned, ticket)

    def joined(self, pipeline: int, k: int) -> None:
        """This pipeline takes part from its batch `k` on."""
        share = self._shares[pipeline]
        share.live, share.end, share.last_done = True, None, None
        share.next_k = share.first_k = k
        share.tickets, share.under_way = {}, {}
        share.recent_s.clear()
        share.batch_s = None
