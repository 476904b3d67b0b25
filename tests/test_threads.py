"""Workers that are threads: the error that is raised is the one that made the others."""

from __future__ import annotations

import threading

import pytest

from pipeline.errors import CoordinatorLost, Fenced, GroupBroken, PeerLost, TooFewReplicas
from pipeline.train.threads import first_cause, run_together


def test_the_first_error_that_nobody_else_made_counts() -> None:
    mine, later = ValueError("mine"), KeyError("later")
    made = [PeerLost("stage 1 went away"), GroupBroken(1), Fenced("silent"), TooFewReplicas("1"), CoordinatorLost("x")]
    assert first_cause([*made, mine, later]) is mine
    assert first_cause(made) is made[0]


def test_a_thread_whose_error_comes_late_is_waited_for() -> None:
    told = threading.Event()

    def goes_away() -> None:
        assert told.wait(30)
        raise ValueError("the cause")

    def waits_for_it() -> None:
        try:
            raise PeerLost("stage 0 does not answer")
        finally:
            told.set()

    with pytest.raises(ValueError, match="the cause"):
        run_together([goes_away, waits_for_it], cause_s=30)


def test_a_thread_that_waits_for_ever_holds_nobody_up() -> None:
    never = threading.Event()
    with pytest.raises(PeerLost, match="alone"):
        run_together([lambda: never.wait() and None, lambda: _raise(PeerLost("alone"))], cause_s=0.01)
    with pytest.raises(SystemExit):
        run_together([lambda: never.wait() and None, lambda: _raise(SystemExit(3))])
    never.set()


def test_all_end_well() -> None:
    done: list[int] = []
    run_together([lambda: done.append(1), lambda: done.append(1)])
    assert done == [1, 1]


def _raise(error: BaseException) -> None:
    raise error
