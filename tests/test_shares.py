"""Who does which batch."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.coordination.work_queue import Shares


def test_first_come_first_served_and_all_stages_get_the_same_answer() -> None:
    shares = Shares(2, even=False)
    shares.begin(0, 10, 13)
    assert [shares.ask(0, 0, 0.0), shares.ask(1, 0, 0.0), shares.ask(1, 1, 0.0)] == [10, 11, 12]
    assert shares.over
    assert [shares.ask(0, 0, 9.0), shares.ask(0, 1, 9.0), shares.ask(1, 1, 9.0), shares.ask(1, 2, 9.0)] == [
        10,
        None,
        12,
        None,
    ]
    assert shares.next_k(0) == 1 and shares.next_k(1) == 2


def test_a_segment_begins_once_and_batches_are_numbered_on() -> None:
    shares = Shares(1, even=False)
    shares.begin(0, 0, 1)
    assert [shares.ask(0, 0, 0.0), shares.ask(0, 1, 0.0)] == [0, None]
    shares.begin(1, 1, 2)
    shares.begin(1, 1, 2)
    assert [shares.ask(0, 1, 0.0), shares.ask(0, 2, 0.0)] == [1, None]
    assert shares.segment == 1


def test_even_shares_go_round_as_with_all_reduce() -> None:
    shares = Shares(3, even=True)
    shares.begin(0, 100, 108)
    asked = [[shares.ask(pipeline, k, 0.0) for k in range(4)] for pipeline in range(2)]
    assert asked == [[100, 103, 106, None], [101, 104, 107, None]]
    assert [shares.ask(2, k, 0.0) for k in range(3)] == [102, 105, None]


def test_what_a_lost_pipeline_had_not_done_is_done_by_others() -> None:
    shares = Shares(2, even=True)
    shares.begin(0, 0, 6)
    assert [shares.ask(1, 0, 0.0), shares.ask(1, 1, 0.0)] == [1, 3]
    shares.done(1, 0, 1.0)
    shares.left(1)
    assert [shares.ask(0, k, 2.0) for k in range(6)] == [0, 2, 4, 3, 5, None]
    assert [shares.ask(1, 1, 2.0), shares.ask(1, 2, 2.0)] == [3, None], "its stages still agree where its share ended"


def test_who_joins_gets_what_is_left() -> None:
    shares = Shares(2, even=False)
    shares.left(1)
    shares.begin(0, 0, 3)
    assert shares.ask(0, 0, 0.0) == 0
    shares.joined(1, 7)
    assert shares.next_k(1) == 7 and [shares.ask(1, 7, 0.0), shares.ask(1, 8, 0.0), shares.ask(1, 9, 0.0)] == [
        1,
        2,
        None,
    ]


def test_the_last_tickets_go_to_those_who_are_through_sooner() -> None:
    shares = Shares(2, even=False)
    shares.begin(0, 0, 15)
    learn(shares, 1, 10.0, 3)
    learn(shares, 0, 1.0, 5)
    assert shares.ask(1, 3, 30.0) is None, "6 of the 7 that are left take the other 6 s, the last 7 s: sooner than 10 s"
    assert [shares.ask(0, k, 30.0) for k in range(5, 13)] == [*range(8, 15), None]


def learn(shares: Shares, pipeline: int, batch_s: float, batches: int) -> None:
    for k in range(batches):
        assert shares.ask(pipeline, k, 0.0) is not None
        shares.done(pipeline, k, batch_s * (k + 1))


def test_a_slow_one_goes_on_while_it_helps_and_when_nobody_else_can() -> None:
    shares = Shares(3, even=False)
    shares.begin(0, 0, 40)
    learn(shares, 0, 1.0, 5)
    learn(shares, 1, 10.0, 3)
    assert shares.ask(1, 3, 30.0) is not None, "the other would need 32 s for the rest"
    shares.left(0)
    shares.left(2)
    for k in range(4, 35):
        assert shares.ask(1, k, 30.0) is not None
    shares.ask(1, 35, 30.0)
    assert shares.over


def under_way(count: int, batches: int) -> Shares:
    """Two replicas, `count` tickets; the first one has begun `batches` batches."""
    shares = Shares(2, even=False)
    shares.begin(0, 0, count)
    for k in range(batches):
        shares.ask(0, k, 0.0)
    return shares


def test_news_that_comes_together_does_not_make_a_replica_look_infinitely_fast() -> None:
    shares = under_way(400, 2)
    shares.done(0, 0, 0.1)
    shares.done(0, 1, 0.1)
    learn(shares, 1, 0.005, 3)
    assert shares.ask(1, 3, 0.1) is not None


@pytest.mark.parametrize("even", [False, True])
def test_tickets_come_ahead_of_time_while_there_are_many(even: bool) -> None:
    shares = Shares(2, even=even)
    shares.begin(0, 0, 100)
    assert shares.ask(0, 0, 0.0) == 0 and not shares.ahead(0, 0), "its pace is not known"
    shares.done(0, 0, 1.0)
    assert shares.ask(0, 1, 1.0) is not None
    shares.done(0, 1, 2.0)
    assert shares.ask(0, 2, 2.0) is not None
    more = shares.ahead(0, 2)
    assert len(more) == 3 and not shares.ahead(0, 2), "once"
    assert [shares.ask(0, k, 2.0) for k in range(3, 6)] == more
    shares.left(0)
    assert {*more} <= {*shares.undone}, "handed out again"


def test_the_last_tickets_are_handed_out_one_by_one() -> None:
    shares = Shares(2, even=False)
    shares.begin(0, 0, 100)
    learn(shares, 0, 1.0, 88)
    assert not shares.ahead(0, 87)


def test_several_batches_are_through_at_once() -> None:
    shares = under_way(100, 5)
    shares.done(0, 0, 1.0)
    shares.done(0, 4, 9.0)
    shares.ask(0, 5, 9.0)
    shares.left(0)
    assert len(shares.undone) == 95
    assert [shares.ask(1, 0, 9.0)] == [5]


def test_rates_that_are_not_known_stop_nobody() -> None:
    shares = Shares(2, even=False)
    shares.begin(0, 0, 4)
    shares.ask(0, 0, 0.0)
    learn(shares, 1, 10.0, 2)
    assert shares.ask(1, 2, 20.0) == 3


def test_batches_that_cannot_be_asked_for_are_refused() -> None:
    shares = Shares(1, even=False)
    with pytest.raises(ValueError, match="no segment has begun"):
        shares.ask(0, 0, 0.0)
    shares.begin(0, 0, 5)
    with pytest.raises(ValueError, match="asks for batch 3 of segment 0; expected one from 0 to 0"):
        shares.ask(0, 3, 0.0)


events = st.lists(
    st.tuples(st.sampled_from(["ask"] * 8 + ["ahead"] * 2 + ["done"] * 4 + ["left", "joined"]), st.integers(0, 3)),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.integers(1, 4), st.integers(0, 60), events)
def test_every_ticket_is_done_exactly_once(even: bool, pipelines: int, count: int, todo: list[tuple[str, int]]) -> None:
    """Handed out again only when its holder was lost; whoever is left at the end does the rest."""
    shares = Shares(pipelines, even=even)
    shares.begin(0, 0, count)
    live, done, now = set(range(pipelines)), Counter[int](), 0.0
    held: dict[int, dict[int, int]] = {pipeline: {} for pipeline in range(pipelines)}
    ended: set[int] = set()

    def ask(pipeline: int) -> int | None:
        k = shares.next_k(pipeline)
        ticket = shares.ask(pipeline, k, now)
        assert ticket == shares.ask(pipeline, k, now + 1), "the same answer to all stages"
        if ticket is None:
            ended.add(pipeline)
        else:
            assert 0 <= ticket < count and not any(ticket in tickets.values() for tickets in held.values())
            held[pipeline][k] = ticket
        return ticket

    def ahead(pipeline: int) -> None:
        k = shares.next_k(pipeline)
        for number, ticket in enumerate(shares.ahead(pipeline, k - 1)):
            assert 0 <= ticket < count and not any(ticket in tickets.values() for tickets in held.values())
            assert shares.ask(pipeline, k + number, now) == ticket
            held[pipeline][k + number] = ticket

    def finish(pipeline: int) -> None:
        for k, ticket in list(held[pipeline].items())[:1]:
            shares.done(pipeline, k, now)
            shares.done(pipeline, k, now)
            done[ticket] += 1
            del held[pipeline][k]

    for name, pipeline in todo:
        now += 0.5 + pipeline
        pipeline %= pipelines
        if name == "joined" and pipeline not in live:
            shares.joined(pipeline, shares.next_k(pipeline))
            live.add(pipeline)
            ended.discard(pipeline)
        elif pipeline in live and name == "ask" and pipeline not in ended:
            ask(pipeline)
        elif pipeline in live and name == "ahead":
            ahead(pipeline)
        elif pipeline in live and name == "done":
            finish(pipeline)
        elif pipeline in live and name == "left":
            shares.left(pipeline)
            live.remove(pipeline)
            held[pipeline].clear()
    for pipeline in sorted(live):
        while pipeline not in ended:
            ask(pipeline)
        while held[pipeline]:
            finish(pipeline)
    assert all(times == 1 for times in done.values())
    assert sorted((*done, *shares.undone)) == list(range(count))
    if live:
        lost_late = set(range(pipelines)) != live  # what went back when all others had ended stays undone
        assert lost_late or not shares.undone or count == 0


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0, 30.0])
def test_the_end_is_near_the_ideal_with_and_without_a_slow_one(factor: float) -> None:
    """Without the tail rule a replica 30 times slower would take a last batch and let all wait for it."""
    slowness, now = [1.0, 1.0, 1.0, factor], 0.0
    shares, heap, counts = Shares(4, even=False), [(0.0, pipeline) for pipeline in range(4)], Counter[int]()
    shares.begin(0, 0, 400)
    while heap:
        time, pipeline = heapq.heappop(heap)
        if counts[pipeline]:
            now = time
            shares.done(pipeline, counts[pipeline] - 1, now)
        if shares.ask(pipeline, counts[pipeline], time) is not None:
            counts[pipeline] += 1
            heapq.heappush(heap, (time + slowness[pipeline], pipeline))
    assert sum(counts.values()) == 400
    assert now < 400 / sum(1 / each for each in slowness) + 1.5
