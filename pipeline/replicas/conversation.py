"""A dialogue under way on a stage's ways to its replicas, and what talking has brought and cost.

dialogue  ── request ──►  Link: who is in my group? (coordinator)   what is our mean? (mesh)
          ◄── answer ───
result: the new x, or None where it came to nothing
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.coordination.client import Client
from pipeline.core.group import Group
from pipeline.errors import CoordinatorLost, Fenced, GroupBroken, TooFewReplicas
from pipeline.replicas.mesh.mesh import Mesh
from pipeline.sync.dialogue import Average, Broadcast, Dialogue, Join, Locate, Place, Request, Swap

HARMLESS = (Fenced, CoordinatorLost, TooFewReplicas)  # the training loop meets them again where it can act on them


class Mixed(NamedTuple):
    """What mixing has done and cost: group sizes, updates between a copy and its correction, seconds, broken groups."""

    sizes: Counter[int]
    staleness: Counter[int]
    waited_s: float
    mixed_s: float
    broken: int

    @property
    def mixed(self) -> int:
        """How often this replica was in company."""
        return sum(times for size, times in self.sizes.items() if size > 1)


def mean_of(counts: Counter[int]) -> float:
    """The mean of what was counted, 0 where nothing was."""
    total = sum(counts.values())
    return sum(value * times for value, times in counts.items()) / total if total else 0.0


class MixStats:
    """Counts what the threads of a stage mix; whoever wants to know gets a copy, since they go on counting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: Counter[int] = Counter()
        self._staleness: Counter[int] = Counter()
        self._waited_s = self._mixed_s = 0.0
        self._broken = 0

    def now(self) -> Mixed:
        with self._lock:
            return Mixed(self._sizes.copy(), self._staleness.copy(), self._waited_s, self._mixed_s, self._broken)

    def met(self, size: int) -> None:
        with self._lock:
            self._sizes[size] += 1

    def corrected(self, updates: int) -> None:
        """A correction came so many updates after its copy."""
        with self._lock:
            self._staleness[updates] += 1

    def broke(self) -> None:
        with self._lock:
            self._broken += 1

    def spent(self, *, waiting_s: float = 0.0, mixing_s: float = 0.0) -> None:
        with self._lock:
            self._waited_s += waiting_s
            self._mixed_s += mixing_s


@dataclass(frozen=True)
class Link:
    """A stage's ways to its replicas: who forms groups, and the wires to their members."""

    client: Client
    mesh: Mesh
    stats: MixStats
    stage: int
    pipeline: int

    def answer(self, request: Request) -> Any:
        """What a request of a dialogue brings; waits for it.

        Raises:
            GroupBroken, Fenced, CoordinatorLost: as their docstrings say.
            PeerLost: a partner did not answer before the deadline.
        """
        if isinstance(request, Locate):
            return Place(self.stage, self.pipeline, tuple(sorted({*self.client.live, self.pipeline})))
        if isinstance(request, Join):
            return self.joined(self.client.ready(request.step, request.scope))
        if isinstance(request, Average):
            group = request.group
            return self.mesh.average(request.x, group.members, group.round, generations=group.generations)
        if isinstance(request, Broadcast):
            group = request.group
            members, generations = group.members, group.generations
            return self.mesh.broadcast_from(request.x, members, group.round, request.root, generations=generations)
        assert isinstance(request, Swap)
        if self.client.fenced:  # its weights are out of date
            raise Fenced("this pipeline was declared lost")
        return self.mesh.swap(request.peer, request.x)

    def joined(self, answer: Future[Group]) -> Group:
        group = answer.result()
        self.stats.met(len(group.members))
        return group


class Conversation:
    """One dialogue under way; every way out of it ends in `result`: the new x, or None where it came to nothing."""

    def __init__(self, dialogue: Dialogue[Tensor], link: Link) -> None:
        self._dialogue, self._link = dialogue, link
        self.result: Tensor | None = None
        self.request: Request | None = self._advance(lambda: next(dialogue))

    def reply(self, fetch: Callable[[], Any]) -> None:
        """Goes on with the answer that `fetch` returns; what it raises goes into the dialogue."""
        assert self.request is not None
        try:
            answer = fetch()
        except GroupBroken as broken:
            self._link.stats.broke()
            error: Exception = broken
        except HARMLESS as harmless:
            error = harmless
        else:
            self.request = self._advance(lambda: self._dialogue.send(answer))
            return
        self.request = self._advance(lambda: self._dialogue.throw(error))

    def finish(self) -> Tensor | None:
        """Carries on to the end."""
        while (request := self.request) is not None:
            self.reply(lambda asked=request: self._link.answer(asked))  # type: ignore[misc]
        return self.result

    def _advance(self, step: Callable[[], Request]) -> Request | None:
        try:
            return step()
        except StopIteration as end:
            self.result = end.value
        except (GroupBroken, *HARMLESS):  # the dialogue has no answer to it: weights stay as they are
            self.result = None
        return None
