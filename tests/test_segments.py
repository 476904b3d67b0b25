"""Stretches of the common order between two stops, and which update a ticket is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.epochs import Calendar, Segments
from pipeline.data.plan import Plan, epoch_order
from pipeline.schedules.program import Shape


def test_a_segment_per_epoch_holds_all_its_batches() -> None:
    calendar = Calendar(batches_per_epoch=4, epochs=2)
    segments = Segments(calendar=calendar, pipelines=3, tickets_per_epoch=10)
    assert segments.stops == (4, 8)
    assert [segments.tickets(n) for n in range(2)] == [(0, 10), (10, 20)]


def test_checkpoints_cut_an_epoch_where_all_reduce_would_write_them() -> None:
    calendar = Calendar(batches_per_epoch=4, epochs=1, checkpoint_every=3)
    segments = Segments(calendar=calendar, pipelines=2, tickets_per_epoch=8)
    assert segments.stops == (3, 4)
    assert [segments.tickets(n) for n in range(2)] == [(0, 6), (6, 8)]


def test_a_resumed_run_begins_where_the_other_ended() -> None:
    calendar = Calendar(batches_per_epoch=4, epochs=2, start=4, made=4)
    assert Segments(calendar=calendar, pipelines=2, tickets_per_epoch=8, first_ticket=8).tickets(0) == (8, 16)


@given(
    st.integers(1, 6), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 20)
)
def test_segments_cover_every_ticket_once_and_updates_never_fall(
    pipelines: int, batches: int, epochs: int, accumulate: int, every: int, extra: int
) -> None:
    calendar = Calendar(batches_per_epoch=batches, epochs=epochs, accumulate=accumulate, checkpoint_every=every)
    tickets_per_epoch = max(1, pipelines * batches - extra % pipelines)
    segments = Segments(calendar=calendar, pipelines=pipelines, tickets_per_epoch=tickets_per_epoch)
    covered = [ticket for n in range(len(segments.stops)) for ticket in range(*segments.tickets(n))]
    assert covered == list(range(epochs * tickets_per_epoch))
    updates = [segments.update(ticket) for ticket in covered]
    assert updates == sorted(updates)
    assert updates[0] == 0 and updates[-1] == calendar.total_updates - 1


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(12, 60),
    st.integers(1, 3),
    st.integers(0, 30),
    st.integers(1, 2),
)
def test_another_number_of_pipelines_reads_the_rest_of_a_begun_epoch_once_and_its_epochs_end_alike(
    before: int, after: int, accumulate: int, size: int, batch_size: int, updates: int, microbatches: int
) -> None:
    """The first run stops after an update; the second one's batches and tickets are the rest, and whole epochs."""
    batch_size = max(batch_size, microbatches)
    old = Plan(size=size, batch_size=batch_size, pipelines=before, microbatches=microbatches, seed=3)
    first = Calendar(batches_per_epoch=old.batches_per_epoch, epochs=4, accumulate=accumulate)
    made = min(updates, first.total_updates)
    begun = old.position(first.batch_after(made))
    pipelines = [
        Plan(
            size=size,
            batch_size=batch_size,
            pipelines=after,
            pipeline=p,
            microbatches=microbatches,
            seed=3,
            begun=begun,
        )
        for p in range(after)
    ]
    common = Plan(size=size, batch_size=batch_size, microbatches=microbatches, seed=3, begun=begun)
    new = pipelines[0]
    calendar = Calendar(
        batches_per_epoch=new.batches_per_epoch, epochs=4, accumulate=accumulate, start=new.first_batch, made=made
    )
    names = [
        plan.name(m)
        for plan in pipelines
        for m in range(new.first_batch * microbatches, (new.first_batch + 9) * microbatches)
    ]
    earlier = [old.name(m) for m in range(first.batch_after(made) * microbatches)]  # of the first of its pipelines
    assert len({*names, *earlier}) == len(names) + len(earlier), "no two micro-batches draw the same random numbers"
    assert calendar.updates_after(calendar.start) == made and calendar.batch_after(made) == calendar.start
    for update in range(made, calendar.total_updates):
        assert calendar.updates_after(calendar.batch_after(update + 1)) == update + 1
    if new.first_batch < 4 * new.batches_per_epoch:
        epoch = new.epoch(new.first_batch)
        seen = [
            i
            for b in range(new.first_batch, (epoch + 1) * new.batches_per_epoch)
            for p in pipelines
            for i in p.indices(b)
        ]
        order = epoch_order(size, epoch=epoch, seed=3).tolist()
        rest = order[begun.samples if epoch == begun.epoch else 0 :]
        assert seen == rest[: len(seen)] and len(rest) - len(seen) < after * microbatches
        again = new.position((epoch + 1) * new.batches_per_epoch)
        assert again == (epoch + 1, 0) and new.position(new.first_batch) in (begun, (begun.epoch + 1, 0))
        segments = Segments(
            calendar=calendar,
            pipelines=after,
            tickets_per_epoch=common.batches_per_epoch,
            first_ticket=common.first_batch,
        )
        tickets = [ticket for n in range(len(segments.stops)) for ticket in range(*segments.tickets(n))]
        assert tickets == list(range(tickets[0], 4 * common.batches_per_epoch))
        through = [i for t in tickets if common.epoch(t) == epoch for i in common.indices(t)]
        assert through == rest[: len(through)] and len(rest) - len(through) < max(after, 1) * microbatches
        numbers = [segments.update(ticket) for ticket in tickets]
        assert numbers == sorted(numbers) and numbers[0] == made and numbers[-1] == calendar.total_updates - 1


def test_the_picture_of_an_epoch_that_another_number_of_pipelines_began() -> None:
    calendar = Calendar(batches_per_epoch=5, epochs=2, accumulate=2, start=2, made=5)
    assert [calendar.updates_after(n) for n in (2, 4, 5, 7, 9, 10)] == [5, 6, 7, 8, 9, 10]
    assert [calendar.batch_after(n) for n in range(5, 11)] == [2, 4, 5, 7, 9, 10]
    shape = Shape(stages=1, accumulate=2, batches_per_epoch=5, first=2)
    assert [n for n in range(2, 10) if shape.ends_update(n)] == [3, 4, 6, 8, 9]
