"""Which batches a pipeline works on when nobody knows beforehand: tickets, asked for one by one, until there are none.

    coordinator   7 ... 9 ... 12 ... none            the common order of the epoch, handed out on demand
    stage 0       k=3   k=4   k=5    end at k=6      asks, some way ahead
    stage 1, 2    7     9     12     end             are told by stage 0, so that all end at the same k

A pipeline that was declared lost and has joined again lives anew: what stage 0 told in an earlier life is passed over,
and in that life it told everybody that there is no more, since a stage may not yet know of the loss.

k counts the batches of this pipeline over the whole run; micro-batches are numbered k * M + part.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from pipeline.coordination.client import Client
from pipeline.data.plan import Plan
from pipeline.errors import CoordinatorLost, Fenced, TooFewReplicas
from pipeline.transport.protocol import Transport

END, ABANDONED = -1, -2
UNNUMBERED = 0  # messages about tickets of an earlier life may be of any batch
REMEMBERED = 256  # tickets of batches long past are forgotten


class TicketBook:
    """The tickets of one stage; `ticket(k)` may be asked for in any order, and gives the same answer on all stages."""

    def __init__(self, client: Client, transport: Transport, *, stage: int, stages: int, accumulate: int = 1) -> None:
        self._client, self._transport = client, transport
        self._stage, self._stages = stage, stages
        # the others are told of a batch before stage 0 begins the one before; the last stage needs those of an update
        self._ahead = 0 if stage else accumulate if stages > 1 else accumulate - 1
        self._segment = 0
        self.life = 0  # the generation with which this pipeline takes part; the same on all stages
        self._known: dict[int, int] = {}
        self._next = 0  # the first k whose ticket is not yet known
        self._asked: dict[int, Future[int | None]] = {}
        self.end: int | None = 0  # the first k that is not of this segment, once it is known
        self.abandoned = False  # whether it ended because the coordinator is gone

    def begin(self, segment: int, k: int) -> None:
        """The batches of this segment begin with number `k` of this pipeline."""
        self._segment, self._next, self.end = segment, k, None
        self._asked.clear()

    def part(self, k: int) -> None:
        """This life is over: who waits for the first stage's word on batch `k` waits no longer."""
        if self._stage == 0:
            self._tell(k, END)

    def ticket(self, k: int) -> int | None:
        """The ticket of batch `k`; None at the end of the segment. Waits for whoever knows."""
        if k not in self._known and self.end is None:
            for number in range(self._next, k + 1 + self._ahead):
                self._learn(number)
        return self._known.get(k)

    def _learn(self, k: int) -> None:
        if self.end is not None or k in self._known:
            return
        ticket = self._ask(k) if self._stage == 0 else self._hear(k)
        if ticket < 0:
            self.end, self.abandoned = k, ticket == ABANDONED
        else:
            self._known[k] = ticket
            self._known.pop(k - REMEMBERED, None)
        self._next = k + 1

    def _ask(self, k: int) -> int:
        answer = self._asked.pop(k, None) or self._client.ticket(self._segment, k)
        try:
            given = answer.result()
            ticket = END if given is None else given
        except Fenced:  # drain, and meet it at the end of the segment
            ticket = END
        except (CoordinatorLost, TooFewReplicas):
            ticket = ABANDONED
        if ticket >= 0:
            self._asked[k + 1] = self._client.ticket(self._segment, k + 1)
        self._tell(k, ticket)
        return ticket

    def _tell(self, k: int, ticket: int) -> None:
        for stage in range(1, self._stages):
            self._transport.send(stage, "C", UNNUMBERED, (torch.tensor([k, ticket, self.life]),))

    def _hear(self, k: int) -> int:
        while True:
            (told,) = self._transport.recv(0, "C", UNNUMBERED)
            number, ticket, life = told.tolist()
            if life >= self.life and number >= k:
                return int(ticket)


@dataclass(frozen=True)
class TicketFeed:
    """The micro-batches of a segment, from batch `start` on; may be iterated more than once."""

    book: TicketBook
    start: int
    microbatches: int

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while self.book.ticket(k) is not None:
            yield from range(k * self.microbatches, (k + 1) * self.microbatches)
            k += 1


@dataclass(frozen=True)
class TicketPlan:
    """The samples of the micro-batches of this pipeline; `plan` is the common order, as one pipeline would read it."""

    plan: Plan
    book: TicketBook

    @property
    def count(self) -> None:
        """Nobody knows."""
        return None

    def keys(self, microbatch: int) -> list[tuple[int, int]]:
        k, part = divmod(microbatch, self.plan.microbatches)
        ticket = self.book.ticket(k)
        return [] if ticket is None else self.plan.keys(ticket * self.plan.microbatches + part)

    def length(self, k: int) -> int:
        """Samples in batch `k`."""
        ticket = self.book.ticket(k)
        assert ticket is not None
        return self.plan.batch_length(ticket)
