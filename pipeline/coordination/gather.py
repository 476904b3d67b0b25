"""Gathers: every member of a scope gives a value under a key; the members get one small answer, or one gets the values.

    fold "all"             2: True   3: False   5: True    ──► everybody: False
    fold "rows to first"   2: 0.9    3: 0.8     (5 is lost) ──► 2: {2: 0.9, 3: 0.8}    the others: nothing

The members are those who were live when the first one asked; who is lost later is struck out, and who joins later is
not waited for. The answer is decided once: whoever asks for it soon afterwards is told the same.

All values of N workers in N answers would be N^2 of them through one process, so there is no such fold. And all books
are bounded: a gather is forgotten when nobody waits for it any more, a first value when its segment is over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REMEMBERED = 256  # finished gathers; the oldest are forgotten
WAITING = 64  # gathers that one worker may wait for at a time

Values = Mapping[int, Any]  # worker rank -> what it gave


class Asker(NamedTuple):
    """A question: whose, and its number."""

    worker: Hashable
    number: int


class Name(NamedTuple):
    """What tells gathers apart: `place` is the stage or the pipeline (and its generation) that the scope speaks of."""

    scope: str
    place: tuple[int, ...]
    key: str
    fold: str


class Complete(NamedTuple):
    """The answer to all who asked, and the values for the one who receives them: None where the fold has none."""

    name: Name
    value: Any
    receiver: int | None
    rows: Values
    askers: tuple[tuple[Asker, int], ...]  # with their ranks


def add_up(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum under each name, in the order of the values; a missing one counts as 0."""
    sums: dict[str, float] = {}
    for row in values:
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


FOLDS: Mapping[str, Callable[[list[Any]], Any]] = {
    "nothing": lambda values: None,  # all have come
    "all": all,
    "any": any,
    "sum": add_up,
    "given": lambda values: next((value for value in values if value is not None), None),  # the lowest rank's
}
ROWS = ("rows to first", "rows to speaker")  # the first rank; the last stage of the first pipeline that is there


def objection(fold: str, value: Any) -> str | None:
    """Why a value cannot be folded so, if it cannot."""
    if fold not in FOLDS and fold not in ROWS:
        return f"a gather needs a fold of {', '.join((*FOLDS, *ROWS))}"
    if fold == "sum" and not (isinstance(value, dict) and all(type(one) in (int, float) for one in value.values())):
        return "a sum needs numbers by their names"
    return None


@dataclass
class _Open:
    members: set[int]
    missing: set[int]
    values: dict[int, Any] = field(default_factory=dict)
    askers: dict[Asker, int] = field(default_factory=dict)


class Gathers:
    """All gathers of a job of so many stages."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._open: dict[Name, _Open] = {}
        self._names: dict[Asker, Name] = {}  # of those who wait
        self._finished: dict[Name, Any] = {}

    def __len__(self) -> int:
        """How many are remembered, in any way."""
        return len(self._open) + len(self._finished) + len(self._names)

    def ask(self, name: Name, asker: Asker, rank: int, value: Any, members: Iterable[int]) -> Complete | None:
        """Notes what `rank` gives (who need not be a member: then it only listens); the answers, if there are any.

        Args:
            members: the live ranks of the scope; read when this gather is new.
        """
        if name in self._finished:
            return Complete(name, self._finished[name], None, {}, ((asker, rank),))
        if name not in self._open:
            everybody = set(members)
            self._open[name] = _Open(everybody, set(everybody))
        gather = self._open[name]
        gather.values[rank] = None if name.fold == "nothing" else value
        gather.askers[asker] = rank
        self._names[asker] = name
        gather.missing.discard(rank)
        return None if gather.missing else self._finish(name)

    def withdraw(self, asker: Asker) -> None:
        """A question has been answered otherwise: what nobody waits for any more is forgotten."""
        name = self._names.pop(asker, None)
        if name is not None:
            askers = self._open[name].askers
            del askers[asker]
            if not askers:
                del self._open[name]

    def left(self, ranks: Iterable[int]) -> list[Complete]:
        """Strikes out members who are gone; the gathers that are complete without them."""
        gone = set(ranks)
        for gather in self._open.values():
            gather.members -= gone
            gather.missing -= gone
        return [self._finish(name) for name in [name for name, gather in self._open.items() if not gather.missing]]

    def missing(self, name: Name) -> list[int]:
        """Who has not given a value to an open gather."""
        return sorted(self._open[name].missing) if name in self._open else []

    def _finish(self, name: Name) -> Complete:
        gather = self._open.pop(name)
        for asker in gather.askers:
            del self._names[asker]
        rows = {rank: gather.values[rank] for rank in sorted(gather.members)}
        value = FOLDS[name.fold](list(rows.values())) if name.fold in FOLDS else None
        self._finished[name] = value
        if len(self._finished) > REMEMBERED:
            del self._finished[next(iter(self._finished))]
        askers = tuple(gather.askers.items())
        if name.fold in FOLDS or not rows:
            return Complete(name, value, None, {}, askers)
        return Complete(name, None, self._receiver(name.fold, rows), rows, askers)

    def _receiver(self, fold: str, rows: Values) -> int:
        last = self._stages - 1
        speakers = [rank for rank in rows if rank % self._stages == last] if fold == "rows to speaker" else []
        return min(speakers or rows)


class FirstValues:
    """Whose value came first under a key is everybody's: agreements, each of a segment (-1: of the start)."""

    def __init__(self) -> None:
        self._values: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def give(self, segment: int, key: str, value: Any) -> Any:
        """The value of whoever was first."""
        return self._values.setdefault(segment, {}).setdefault(key, value)

    def keep(self, segments: Iterable[int]) -> None:
        """Forgets all segments but these, and the start, which who comes late asks for."""
        kept = {-1, *segments}
        self._values = {segment: values for segment, values in self._values.items() if segment in kept}
