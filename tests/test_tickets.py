"""Tickets on all stages of a pipeline: the same batches, the same end, whoever asks first."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from pipeline.data.dynamic_batches import TicketBook, TicketFeed, TicketPlan
from pipeline.data.plan import Plan
from pipeline.errors import CoordinatorLost, Fenced
from pipeline.transport.local import local_transports


class Coordinator:
    """Answers at once: `tickets` in their order, then `last`."""

    def __init__(self, tickets: list[int], last: Exception | None = None) -> None:
        self.tickets, self.last = tickets, last
        self.asked: list[int] = []

    def ticket(self, segment: int, k: int) -> Future[int | None]:
        self.asked.append(k)
        answer: Future[int | None] = Future()
        if k < len(self.tickets):
            answer.set_result(self.tickets[k])
        elif self.last is None:
            answer.set_result(None)
        else:
            answer.set_exception(self.last)
        return answer


def books(coordinator: Coordinator, stages: int, accumulate: int = 1) -> list[TicketBook]:
    transports = local_transports(stages, timeout_s=5)
    made = [
        TicketBook(coordinator, transports[stage], stage=stage, stages=stages, accumulate=accumulate)  # type: ignore[arg-type]
        for stage in range(stages)
    ]
    for book in made:
        book.begin(0, 0)
    return made


def test_all_stages_have_the_same_batches_and_only_the_first_asks() -> None:
    coordinator = Coordinator([7, 9, 12])
    for book in books(coordinator, 3):
        assert list(TicketFeed(book, 0, 2)) == [0, 1, 2, 3, 4, 5]
        assert [book.ticket(k) for k in range(4)] == [7, 9, 12, None]
        assert book.end == 3 and not book.abandoned
    assert coordinator.asked == [0, 1, 2, 3]


def test_a_stage_hears_of_a_batch_before_the_first_stage_begins_the_one_before() -> None:
    first, second = books(Coordinator([3, 4, 5]), 2)
    assert first.ticket(0) == 3
    assert [second.ticket(0), second.ticket(1)] == [3, 4]


def test_the_last_stage_may_look_over_a_whole_update() -> None:
    first, last = books(Coordinator(list(range(8))), 2, accumulate=4)
    first.ticket(0)
    assert last.ticket(3) == 3


def test_what_was_told_in_an_earlier_life_is_passed_over_though_batches_are_numbered_on() -> None:
    first, second = made = books(Coordinator(list(range(20))), 2)
    assert first.ticket(2) == 2 == second.ticket(2)
    first.ticket(3)
    first.part(4)
    for book in made:
        book.life = 1
        book.begin(0, 9)  # more were granted than were begun
    assert first.ticket(9) == 9 == second.ticket(9)


@pytest.mark.parametrize(("error", "abandoned"), [(Fenced("away"), False), (CoordinatorLost("gone"), True)])
def test_whatever_ends_the_tickets_ends_them_at_the_same_batch_everywhere(error: Exception, abandoned: bool) -> None:
    for book in books(Coordinator([1, 2], error), 2):
        assert list(TicketFeed(book, 0, 1)) == [0, 1]
        assert book.end == 2 and book.abandoned is abandoned


def test_samples_are_those_of_the_ticket_in_the_common_order() -> None:
    (book,) = books(Coordinator([2, 0]), 1)
    plan = Plan(size=12, batch_size=4, microbatches=2)
    keys = TicketPlan(plan, book).keys
    assert keys(0) + keys(1) == plan.keys(4) + plan.keys(5)
    assert keys(2) == plan.keys(0) and keys(4) == []
