"""Trying again: growing pauses, a limit, and the reasons in the message."""

from __future__ import annotations

import pytest

from pipeline.coordination.patience import Patience
from pipeline.errors import PeerLate, PeerLost


def test_pauses_grow_and_stay_within_the_limit() -> None:
    patience, now, pauses = Patience("copying", limit_s=20.0, began=0.0), 0.0, []
    with pytest.raises(PeerLate):
        while True:
            pauses.append(patience.pause_s("busy", now))
            now += pauses[-1]
    assert pauses[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert now == pytest.approx(20.0)


def test_the_last_word_names_the_reasons_of_all_refusals() -> None:
    patience = Patience("copying a replica's state", limit_s=300.0, began=10.0)
    for reason in ["pipeline 1 refused: RuntimeError: out of memory", "pipeline 2 went away"]:
        patience.pause_s(reason, 10.0)
    with pytest.raises(PeerLost) as error:
        patience.pause_s("pipeline 1 refused: RuntimeError: out of memory", 310.0)
    assert str(error.value) == (
        "copying a replica's state was tried in vain for 300 s: "
        "pipeline 1 refused: RuntimeError: out of memory (2 times); pipeline 2 went away"
    )


def test_a_thousand_different_reasons_are_not_all_told() -> None:
    patience = Patience("copying", limit_s=1.0, began=0.0)
    for number in range(1000):
        patience.pause_s(f"reason {number}", 0.5)
    with pytest.raises(PeerLate, match=r"reason 0; reason 1; reason 2; reason 3; 997 other reasons"):
        patience.pause_s("the last one", 1.0)
