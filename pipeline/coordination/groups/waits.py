"""How long those who wait for a group should wait for the others: rules that learn from who came when.

                 answered            expected      late
    worker 0  ──────┤·········own time·····├────────┤          waiting for the next to come costs every waiting worker
    worker 1  ──────┤·································R        a part of a batch; its company is worth GAIN of one
    worker 2  ──────┤·······························R          now + worth: the deadline, if worker 0 is expected before

A worker's own time runs from an answer to its next request, so that it does not depend on how long it waited. It is
judged by the median of the last few: a rare long pause neither moves it nor makes the others wait for it.

Waiting may be hidden behind work (requests that leave before they need the answer). Then the next request comes as
early after a long wait as after a short one. How much of a wait delays the next request is learnt, too; only that part
counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple, Protocol

REMEMBERED = 8  # own times per worker
GAIN = 0.3  # batches: what the company of one more is worth to a group
BUDGET = 0.1  # of its own time, on average, a worker waits at most
OUTLIER = 1.5  # times the typical time: a pause, not work
BURST = 0.6  # of its own time it waits at once at most, out of what it saved
FIRST_WAIT_S = 0.002  # while nothing is known yet


class Deadline(NamedTuple):
    """When to close a round if nobody comes before, in seconds of the caller's clock; if it is now, why not later."""

    time: float
    reason: str


class Wait(Protocol):
    """A rule for one stage; every event that concerns it is told by the group scheduler."""

    def arrived(self, pipeline: int, now: float) -> None: ...

    def answered(self, pipeline: int, now: float, *, size: int, held: bool) -> None:
        """It got a group of `size`; `held`: it was kept waiting for another reason than this rule's."""

    def absent(self, pipeline: int) -> None:
        """It is not expected any more: lost, or drained."""

    def restarted(self, pipelines: Iterable[int]) -> None:
        """These were answered at once, and did other things than batches since (a validation)."""

    def deadline(self, now: float, *, missing: int, full: bool) -> Deadline:
        """For those who wait now. `missing`: how many may still come; `full`: the group cannot become larger."""


class _Delay:
    """The part of a wait that delays the next request: the slope of periods over the waits before them, from 1 on."""

    PRIOR, FADING, SLOWNESS, LEAST = 0.01, 0.99, 0.1, 0.02

    def __init__(self) -> None:
        self._variance = self._covariance = self.PRIOR
        self.part = 1.0

    def learn(self, wait: float, period: float, worker: _Worker) -> None:
        """A worker's wait and the time from that request to its next, both in units of its own time."""
        if wait > 1 or period > 2.5:
            return
        wait_off, period_off = wait - worker.usual_wait, period - worker.usual_period
        worker.usual_wait += self.SLOWNESS * wait_off
        worker.usual_period += self.SLOWNESS * period_off
        self._variance = self.FADING * self._variance + wait_off * wait_off
        self._covariance = self.FADING * self._covariance + wait_off * period_off
        part = (self._covariance + self.PRIOR) / (self._variance + self.PRIOR)
        self.part = min(1.0, max(self.LEAST, part))


class _NoDelay(_Delay):
    """Nobody stands still, which is known and need not be learnt."""

    def __init__(self) -> None:
        self.part = self.LEAST

    def learn(self, wait: float, period: float, worker: _Worker) -> None:
        """There is nothing to learn."""


class _Worker:
    """One worker's past. `typical_s` is 0 while unknown."""

    __slots__ = (
        "asked_at",
        "began",
        "credit_s",
        "late_s",
        "recent",
        "since",
        "there",
        "turn",
        "typical_s",
        "usual_period",
        "usual_wait",
        "wait_s",
    )

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=REMEMBERED)
        self.typical_s = 0.0
        self.late_s = 0.0  # own time after which it is not expected any more
        self.credit_s = 0.0  # how long it may wait
        self.asked_at = self.wait_s = 0.0  # its last request, and how long that waited
        self.usual_wait, self.usual_period = 0.0, 1.0  # in units of its own time
        self.began: float | None = None  # when its own time began: at the answer, or earlier as far as waits are hidden
        self.since: float | None = None  # waiting since
        self.there = True
        self.turn = 0  # tells its current prediction from older ones

    def learn(self, own_s: float) -> None:
        first = not self.recent
        self.recent.append(max(own_s, 1e-9))
        ordered = sorted(self.recent)
        self.typical_s = ordered[(len(ordered) - 1) // 2]
        slowest_s = ordered[bisect_right(ordered, OUTLIER * self.typical_s) - 1]
        self.late_s = 1.1 * slowest_s if len(ordered) > REMEMBERED // 2 else OUTLIER * self.typical_s
        cap = BURST * self.typical_s
        self.credit_s = cap if first else min(cap, self.credit_s + BUDGET * own_s)


class AdaptiveWait:
    """Waits for the next one while its company is worth more than the time of those who wait.

    Waiting for `d` seconds costs the sum of `d / own time` over those who wait, in batches; the next one is worth GAIN
    batches to them, twice as much if somebody would else be alone, a quarter if the group is full. On average nobody
    waits longer than BUDGET of its own time. Hidden waiting is free, up to BURST.
    """

    def __init__(self, pipelines: int) -> None:
        self._workers = [_Worker() for _ in range(pipelines)]
        self._expected: list[tuple[float, float, int, int]] = []  # heap of (expected, late, pipeline, turn)
        self._delay = _Delay()
        self._waiting = 0
        self._rate = 0.0  # batches per second that those who wait would do
        self._opened = 0.0
        self._patience_end = inf
        self._worth_end: float | None = None  # up to when waiting pays; judged anew when somebody comes or goes
        self._must_guess = True
        self._latest: _Worker | None = None  # one whose own time is known

    def arrived(self, pipeline: int, now: float) -> None:
        worker = self._workers[pipeline]
        if worker.began is not None:
            if worker.typical_s:
                unit = 1 / worker.typical_s
                self._delay.learn(worker.wait_s * unit, (now - worker.asked_at) * unit, worker)
            worker.learn(now - worker.began)
        if not self._waiting:
            self._opened, self._patience_end, self._rate = now, inf, 0.0
        worker.since = worker.asked_at = now
        worker.there = True
        worker.turn += 1
        self._waiting += 1
        self._worth_end = None
        if worker.typical_s:
            self._latest = worker
            self._rate += 1 / worker.typical_s
            patience_s = min(worker.credit_s / self._delay.part, BURST * worker.typical_s)
            self._patience_end = min(self._patience_end, now + patience_s)
            if self._must_guess:
                self._guess(now, worker)
        else:
            self._patience_end = min(self._patience_end, now + FIRST_WAIT_S)

    def _guess(self, now: float, known: _Worker) -> None:
        """After a (re)start: the others began when this one began, and are as fast as it if nothing else is known."""
        self._must_guess = False
        for pipeline, worker in enumerate(self._workers):
            if worker.there and worker.since is None and (worker.typical_s or worker.began is not None):
                began = now - known.typical_s if worker.began is None else worker.began
                self._expect(pipeline, began, worker if worker.typical_s else known)

    def _expect(self, pipeline: int, began: float, like: _Worker) -> None:
        turn = self._workers[pipeline].turn = self._workers[pipeline].turn + 1
        heappush(self._expected, (began + like.typical_s, began + like.late_s, pipeline, turn))

    def answered(self, pipeline: int, now: float, *, size: int, held: bool) -> None:
        worker = self._workers[pipeline]
        delay_s = self._delay.part * (now - worker.asked_at)
        if not held:
            worker.credit_s = max(0.0, worker.credit_s - delay_s)
        self._stop_waiting(worker)
        worker.wait_s, worker.began = now - worker.asked_at, worker.asked_at + delay_s
        like = worker if worker.typical_s else self._latest
        if like is not None:
            self._expect(pipeline, worker.began, like)

    def _stop_waiting(self, worker: _Worker) -> None:
        if worker.since is not None:
            worker.since = None
            self._waiting -= 1
            self._worth_end = None
            if worker.typical_s:
                self._rate -= 1 / worker.typical_s

    def absent(self, pipeline: int) -> None:
        worker = self._workers[pipeline]
        self._stop_waiting(worker)
        worker.turn += 1
        worker.there, worker.began = False, None
        self._worth_end = None

    def restarted(self, pipelines: Iterable[int]) -> None:
        for pipeline in pipelines:
            worker = self._workers[pipeline]
            worker.turn += 1
            worker.there, worker.began = True, None
        self._must_guess = True

    def deadline(self, now: float, *, missing: int, full: bool) -> Deadline:
        if self._latest is None or self._rate <= 0:
            return Deadline(self._opened + FIRST_WAIT_S, "the first one came, and nothing is known about the others")
        expected, workers = self._expected, self._workers
        while expected and (workers[expected[0][2]].turn != expected[0][3] or expected[0][1] <= now):
            heappop(expected)
        if not expected:
            return Deadline(now, "nobody else is expected soon")
        if self._worth_end is None:
            company = 2.0 if self._waiting == 1 or missing == 1 else 0.25 if full else 1.0
            self._worth_end = now + GAIN * company / (self._rate * self._delay.part)
        end = min(self._worth_end, self._patience_end)
        comes, late, pipeline, _ = expected[0]
        if comes > end:
            return Deadline(min(end, now), f"pipeline {pipeline} is expected in {1e3 * (comes - now):.1f} ms only")
        end = min(end, late)
        return Deadline(end, f"pipeline {pipeline} did not come in time" if end <= now else "")


class HiddenWait(AdaptiveWait):
    """For requests that nobody stands still for (--overlap-sync): waits, up to BURST, for all who come by then.

    One who would be alone waits for ALONE of its own times: company a step later is worth more than none now.
    """

    ALONE = 3.0
    FIRST_ALONE_S = 1.0  # while nothing is known yet

    def __init__(self, pipelines: int) -> None:
        super().__init__(pipelines)
        self._delay = _NoDelay()

    def deadline(self, now: float, *, missing: int, full: bool) -> Deadline:
        deadline = super().deadline(now, missing=missing, full=full)
        if self._waiting > 1:
            return deadline
        end = self._opened + (self.ALONE / self._rate if self._rate > 0 else self.FIRST_ALONE_S)
        return deadline if deadline.time >= end else Deadline(end, "nobody came for several steps")


class ReferenceWait:
    """The reference's fixed rule: 1 ms; twice that after a group of one, up to 10 ms; else 0.9 times, down to 0.01 ms.

    Every worker has its own; that of the first to come counts.
    """

    FIRST_S, LONGEST_S, SHORTEST_S = 1e-3, 10e-3, 1e-5

    def __init__(self, pipelines: int) -> None:
        self._waits_s = [self.FIRST_S] * pipelines
        self._waiting: set[int] = set()
        self._deadline = inf

    def arrived(self, pipeline: int, now: float) -> None:
        if not self._waiting:
            self._deadline = now + self._waits_s[pipeline]
        self._waiting.add(pipeline)

    def answered(self, pipeline: int, now: float, *, size: int, held: bool) -> None:
        wait_s = self._waits_s[pipeline]
        self._waits_s[pipeline] = min(2 * wait_s, self.LONGEST_S) if size < 2 else max(0.9 * wait_s, self.SHORTEST_S)
        self._waiting.discard(pipeline)

    def absent(self, pipeline: int) -> None:
        self._waiting.discard(pipeline)

    def restarted(self, pipelines: Iterable[int]) -> None:
        """The waits stay as they are."""

    def deadline(self, now: float, *, missing: int, full: bool) -> Deadline:
        return Deadline(self._deadline, "the wait of the first one is over")


WAITS: dict[str, Callable[[int], Wait]] = {"adaptive": AdaptiveWait, "hidden": HiddenWait, "reference": ReferenceWait}
