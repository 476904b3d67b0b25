"""Gathers: every member of a scope gives a value under a key, and all of them get the same answer.

    key "score/3", members fixed by the first asker ──► 0: 0.9   1: 0.8   (2 was lost)  ──► {0: 0.9, 1: 0.8}

The members are those who were live when the first one asked; who is lost later is struck out, and who joins later is
not waited for. The answer is decided once: whoever asks for it afterwards is told the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

REMEMBERED = 4096  # finished gathers; the oldest are forgotten

Answer = dict[int, Any]  # worker rank -> its value


@dataclass
class _Open:
    members: set[int]
    missing: set[int]
    values: Answer = field(default_factory=dict)


class Gathers:
    """All gathers of a job; a gather's name is any hashable value."""

    def __init__(self) -> None:
        self._open: dict[Hashable, _Open] = {}
        self._finished: dict[Hashable, Answer] = {}

    def give(self, name: Hashable, rank: int, value: Any, members: Iterable[int]) -> Answer | None:
        """Notes the value of `rank` (who need not be a member: then it only listens); the answer, if there is one.

        Args:
            members: the live ranks of the scope; read when this gather is new.
        """
        if name in self._finished:
            return self._finished[name]
        if name not in self._open:
            everybody = set(members)
            self._open[name] = _Open(everybody, set(everybody))
        gather = self._open[name]
        gather.values[rank] = value
        gather.missing.discard(rank)
        return None if gather.missing else self._finish(name)

    def left(self, ranks: Iterable[int]) -> dict[Hashable, Answer]:
        """Strikes out members who are gone; the gathers that are complete without them."""
        gone = set(ranks)
        for gather in self._open.values():
            gather.members -= gone
            gather.missing -= gone
        complete = [name for name, gather in self._open.items() if not gather.missing]
        return {name: self._finish(name) for name in complete}

    def missing(self, name: Hashable) -> list[int]:
        """Who has not given a value to an open gather."""
        return sorted(self._open[name].missing) if name in self._open else []

    def _finish(self, name: Hashable) -> Answer:
        gather = self._open.pop(name)
        answer = self._finished[name] = {rank: gather.values[rank] for rank in sorted(gather.members)}
        if len(self._finished) > REMEMBERED:
            del self._finished[next(iter(self._finished))]
        return answer
