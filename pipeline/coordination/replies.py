"""Questions and answers: each question gets exactly one answer, however often it arrives.

worker ──{"n": 7, ...}──► ask ─────────► waits: who is missing, until when
                           answer ─────► {"n": 7, ...} ──► remembered, in case 7 comes again
                           expire ─────► {"n": 7, "error": "timeout", "text": "waited 300 s for ..."}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipeline.coordination.membership import Ask, Worker
from pipeline.coordination.messages import Message

Outgoing = list[tuple[bytes, Message]]

REMEMBERED = 32  # answers per worker
NEVER = float("inf")


class Post:
    """What is to be sent, in order, and what has been."""

    def __init__(self) -> None:
        self.expire_at = NEVER  # no question is too old before that
        self._out: Outgoing = []

    def taken(self) -> Outgoing:
        """All that is to be sent since the last call."""
        out, self._out = self._out, []
        return out

    def send(self, worker: bytes, message: Message) -> None:
        self._out.append((worker, message))

    def push(self, message: Message, workers: Iterable[Worker]) -> None:
        """News, to all of these who are still there."""
        self._out.extend((worker.id, message) for worker in workers if not worker.gone)

    def repeated(self, worker: Worker, number: int) -> bool:
        """Whether this question has come before; if it has been answered, it is answered again."""
        if number < worker.acked:
            return True
        if number in worker.answers:
            self._out.append((worker.id, worker.answers[number]))
            return True
        return number in worker.asks

    def ask(self, worker: Worker, number: int, kind: str, now: float, missing: Callable[[], str]) -> None:
        """A question has to wait, but no longer than its worker is willing to."""
        deadline = now + worker.timeout_s
        worker.asks[number] = Ask(kind, deadline, missing)
        if deadline < self.expire_at:
            self.expire_at = deadline

    def answer(self, worker: Worker, number: int, answer: Message) -> None:
        answer["n"] = number
        worker.asks.pop(number, None)
        worker.answers[number] = answer
        if len(worker.answers) > REMEMBERED:
            del worker.answers[next(iter(worker.answers))]
        self._out.append((worker.id, answer))

    def acknowledged(self, worker: Worker, before: int) -> None:
        """The worker has the answers to all questions with smaller numbers: they need not be remembered."""
        worker.acked = max(worker.acked, before)
        for number in [number for number in worker.answers if number < before]:
            del worker.answers[number]

    def fail(self, worker: Worker, number: int, error: str, text: str, generation: int) -> None:
        """Answers with an error: "fenced", "too few", "timeout", "refused", "over" or "replaced"."""
        self.answer(worker, number, {"error": error, "text": text, "g": generation})

    def expire(self, asking: Iterable[tuple[Worker, int, Ask]], now: float) -> list[tuple[Worker, int]]:
        """Fails the questions, of all that wait, that have waited for too long; which these are."""
        self.expire_at, expired = NEVER, []
        for worker, number, ask in asking:
            if now >= ask.deadline:
                text = f"waited {worker.timeout_s:g} s ({ask.kind}) for {ask.missing()}"
                self.answer(worker, number, {"error": "timeout", "text": text})
                expired.append((worker, number))
            else:
                self.expire_at = min(self.expire_at, ask.deadline)
        return expired
