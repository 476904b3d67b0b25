"""Stretches of the common order between two stops, and which update a ticket is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.calendar import Calendar
from pipeline.segments import Segments


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
    calendar = Calendar(batches_per_epoch=4, epochs=2)
    assert Segments(calendar=calendar, pipelines=2, tickets_per_epoch=8, start=4).tickets(0) == (8, 16)


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
