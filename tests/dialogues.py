"""Carries out the dialogues of several replicas against each other, in one thread and without any I/O.

A dialogue goes on until it asks for something that needs others; once all have, groups are formed, and so on:

    pipeline 0   Join(1) ----.                   Average ----.
    pipeline 1   Join(1) -----+- groups(...) ->  Average -----+- mean -> x
    pipeline 2   Join(1) ----'                   Average ----'
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core.draw import draw, shuffled
from pipeline.core.group import Group
from pipeline.errors import GroupBroken
from pipeline.sync.adpsgd import correction
from pipeline.sync.dialogue import Average, Broadcast, Dialogue, Join, Locate, Place, Request, Swap

Grouping = Callable[[Sequence[int], int], "list[tuple[int, ...]]"]


def everyone(waiting: Sequence[int], step: int) -> list[tuple[int, ...]]:
    return [tuple(waiting)]


def pairs(waiting: Sequence[int], step: int) -> list[tuple[int, ...]]:
    """A random perfect matching; an odd one stays alone."""
    order = shuffled(waiting, step)
    return [tuple(sorted(order[at : at + 2])) for at in range(0, len(order), 2)]


def ragged(waiting: Sequence[int], step: int) -> list[tuple[int, ...]]:
    """Two random groups of uneven sizes."""
    order = shuffled(waiting, step)
    cut = 1 + draw(step) % len(order)
    return [tuple(sorted(part)) for part in (order[:cut], order[cut:]) if part]


class Replicas:
    """The models of the replicas of one stage, and what is known of the world around them.

    Args:
        models: (n,) each; a swap changes its passive side's at once.
        hosts: of each pipeline, for groups of scope "host".
        lost: pipelines whose groups break.
    """

    def __init__(
        self,
        models: Sequence[Tensor],
        *,
        groups: Grouping = everyone,
        hosts: Sequence[str] | None = None,
        lost: Collection[int] = (),
    ) -> None:
        self.models = dict(enumerate(models))
        self.groups, self.lost = groups, lost
        self.hosts = hosts or [""] * len(models)
        self._given = dict(self.models)
        self.rounds: list[tuple[str, tuple[int, ...]]] = []  # (scope, members) of every group, in order

    def mix(self, dialogue_of: Callable[[int, Tensor], Dialogue[Tensor]]) -> None:
        """Every replica has its dialogue; its result becomes its model, as a correction if that changed meanwhile."""
        self._given = dict(self.models)
        talks = {pipeline: dialogue_of(pipeline, x) for pipeline, x in self.models.items()}
        asked: dict[int, Request] = {}
        for pipeline, talk in talks.items():
            self._go_on(asked, pipeline, talk, None)
        while asked:
            for pipeline, (method, answer) in self._answers(asked).items():
                del asked[pipeline]
                self._go_on(asked, pipeline, talks[pipeline], answer, method)

    def _go_on(
        self, asked: dict[int, Request], pipeline: int, talk: Dialogue[Tensor], answer: Any, method: str = "send"
    ) -> None:
        try:
            asked[pipeline] = getattr(talk, method)(answer)
        except StopIteration as end:
            given, now = self._given[pipeline], self.models[pipeline]
            self.models[pipeline] = end.value if now is given else now + (end.value - given)

    def _answers(self, asked: Mapping[int, Request]) -> dict[int, tuple[str, Any]]:
        """The answers that can be given now: to swaps and the like one at a time, to the rest once all have asked."""
        for pipeline, request in asked.items():
            if isinstance(request, Locate):
                return {pipeline: ("send", Place(0, pipeline, tuple(self.models)))}
            if isinstance(request, Swap):
                return {pipeline: self._swap(pipeline, request)}
        joining = {p: request for p, request in asked.items() if isinstance(request, Join)}
        if joining:
            return {p: ("send", group) for group in self._form(joining) for p in group.members}
        return {p: self._collective(p, asked) for p in asked}

    def _swap(self, pipeline: int, request: Swap) -> tuple[str, Any]:
        if request.peer in self.lost:
            return "throw", GroupBroken(request.peer)
        mine = self.models[request.peer]
        self.models[request.peer] = mine + correction(mine, request.x)
        return "send", mine

    def _form(self, joining: Mapping[int, Join]) -> list[Group]:
        formed = []
        kinds = sorted({(r.step, r.scope, self.hosts[p] if r.scope else "") for p, r in joining.items()})
        for step, scope, host in kinds:
            waiting = [
                p
                for p, r in joining.items()
                if (r.step, r.scope, self.hosts[p] if r.scope else "") == (step, scope, host)
            ]
            for members in self.groups(waiting, step):
                formed.append(Group(len(self.rounds), members, "test"))
                self.rounds.append((scope, members))
        return formed

    def _collective(self, pipeline: int, asked: Mapping[int, Request]) -> tuple[str, Any]:
        request = asked[pipeline]
        assert isinstance(request, Average | Broadcast)
        gone = [member for member in request.group.members if member in self.lost]
        if gone:
            return "throw", GroupBroken(gone[0])
        if isinstance(request, Broadcast):
            root = asked[request.root]
            assert isinstance(root, Broadcast)
            return "send", root.x.clone()
        offered = [asked[member] for member in request.group.members]
        assert all(isinstance(other, Average) and other.group == request.group for other in offered)
        return "send", torch.stack([other.x for other in offered if isinstance(other, Average)]).mean(0)

    @property
    def mean(self) -> Tensor:
        return torch.stack(list(self.models.values())).mean(0)

    @property
    def equal(self) -> bool:
        """Whether all models are, bit for bit."""
        return all(torch.equal(x, self.models[0]) for x in self.models.values())

    @property
    def disagreement(self) -> float:
        """The mean squared distance of the models to their mean."""
        return float(torch.stack([(x - self.mean).square().sum() for x in self.models.values()]).mean())
