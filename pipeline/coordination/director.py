"""The Director decides everything that replicas must agree on: messages and times in, answers and pushes out.

    worker                          Director                                    everybody
      hello ──────────────────────► Roll: the start barrier ─► welcome
      begin, ticket ──────────────► Shares: who does which batch
      ready, final ───────────────► GroupScheduler: who averages with whom
      gather, first ──────────────► Gathers: one answer for all
      tell ───────────────────────► whoever speaks ──────────► told
      ping, silence, suspect ─────► Roll: who is alive ──────► lost, fenced, stop
      giver, refreshed ───────────► Roll: who is whole again ► joined

A pipeline is lost and comes back as a whole (`membership`); its generation goes up whenever it is lost.

Every message but a ping has a number `n`, unique for its worker, and gets exactly one answer with that number
(`replies`); `a` is the number up to which the worker has all its answers. It also has the generation `g` that its
sender believes in, which keeps out what a pipeline said before it heard that it was lost. No socket, thread or clock:
`pipeline.coordination.server` is the loop around it.
"""

from __future__ import annotations

from pipeline.coordination.job import Job, turn_away
from pipeline.coordination.messages import Message, field_of
from pipeline.coordination.replies import NEVER, Outgoing


class Director:
    """One job; create it before the first worker comes, who brings the rules.

    Messages are dicts of plain JSON values; a worker is known by the name (bytes) of its connection. Every method
    returns what is to be sent, in this order. Times are seconds on any clock that does not go back.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._early: dict[int, str] = {}  # pipelines that the launcher lost before anybody came
        self._job: Job | None = None

    def handle(self, worker_id: bytes, message: Message, now: float) -> Outgoing:
        """Takes a worker's message in; the answers and pushes that follow from it.

        Raises:
            Malformed: the message cannot be understood; nothing has changed.
        """
        if message.get("type") != "hello":
            return [turn_away(worker_id, message)] if self._job is None else self._job.handle(worker_id, message, now)
        job = self._job or Job(field_of(message, "rules", dict))
        out = job.hello(worker_id, message, now)
        if self._job is None:
            self._job = job
            for pipeline, reason in self._early.items():
                out += job.lost(pipeline, reason, self._began, None)
        return out

    def tick(self, now: float) -> Outgoing:
        """Does what is due at this time; call it at `next_wake`."""
        return [] if self._job is None else self._job.tick(now)

    def lost(self, pipeline: int, reason: str, now: float, *, incarnation: int | None = None) -> Outgoing:
        """The launcher's notice that a process of a pipeline has ended; of an older incarnation it is no news."""
        if self._job is None:
            self._early[pipeline] = reason
            return []
        return self._job.lost(pipeline, reason, now, incarnation)

    def paused(self, seconds: float, now: float) -> None:
        """The loop itself stood still for a while: nobody could be heard, and some may have to connect again."""
        if self._job is not None:
            self._job.roll.paused(seconds, now)

    def take_notes(self) -> list[str]:
        """What has happened, in words, since the last call."""
        if self._job is None or not self._job.notes:
            return []
        notes, self._job.notes = self._job.notes, []
        return notes

    @property
    def next_wake(self) -> float | None:
        """When `tick` has something to do; None: only a message can change anything."""
        wake = NEVER if self._job is None else self._job.next_wake
        return None if wake == NEVER else wake

    @property
    def met(self) -> bool:
        """Whether any worker has ever come."""
        return self._job is not None

    @property
    def over(self) -> bool:
        """Whether nobody is left to be served: all have said bye, or are lost and silent."""
        return self._job is not None and self._job.roll.deserted

    @property
    def stopped(self) -> str | None:
        """Why the job has to end, if too few pipelines are left."""
        return None if self._job is None else self._job.stopped

    @property
    def live(self) -> tuple[int, ...]:
        """The pipelines that take part."""
        return () if self._job is None else self._job.roll.live
