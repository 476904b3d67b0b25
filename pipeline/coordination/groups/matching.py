"""Pairs of a stage's replicas, drawn anew for every step: a pair waits for nobody else."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.coordination.groups.events import Form, Ready
from pipeline.coordination.groups.policy import Attendance, Shared
from pipeline.core.topology import matching


class Matching:
    """One stage where every step has its pairs."""

    deadline: float | None = None
    REMEMBERED = 64  # matchings

    def __init__(self, stage: Attendance, job: Shared) -> None:
        self.waiting: dict[int, int] = {}  # pipeline -> step
        self._stage, self._job = stage, job
        self._steps = dict.fromkeys(stage.working, -1)  # the last step of everybody who may be matched
        self._matchings: dict[int, dict[int, int | None]] = {}
        self._awaited: dict[int, set[int]] = {}  # pipeline -> those who wait for it

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        pipeline = event.pipeline
        known = pipeline in self._steps
        self._steps[pipeline] = self.waiting[pipeline] = event.step
        if not known:  # it joined: from its first step on it is matched with others
            return self._rematch()
        return self._settle([pipeline, *self._awaited.get(pipeline, ())])

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        return self._settle(list(self._awaited.get(pipeline, ())))  # a drained one comes back, and keeps its place

    def left(self, pipeline: int, now: float) -> list[Form]:
        self._steps.pop(pipeline, None)
        return self._rematch()

    def present(self, pipeline: int) -> None:
        """Matched from its first step on."""

    def restarted(self) -> None:
        """Steps go on."""

    def tick(self, now: float) -> list[Form]:
        return []

    def _rematch(self) -> list[Form]:
        """The replicas have changed: the steps that are still to come get other pairs."""
        self._matchings.clear()
        self._awaited.clear()
        return self._settle(list(self.waiting))

    def _partner(self, pipeline: int, step: int) -> int | None:
        if step not in self._matchings:
            if len(self._matchings) >= self.REMEMBERED:
                del self._matchings[min(self._matchings)]
            self._matchings[step] = matching(self._steps, self._job.rules.seed, step)
        return self._matchings[step][pipeline]

    def _settle(self, pipelines: Iterable[int]) -> list[Form]:
        forms = []
        for pipeline in pipelines:
            step = self.waiting.get(pipeline)
            if step is None:
                continue
            partner = self._partner(pipeline, step)
            if partner is None:
                forms.append(self._form([pipeline], f"the odd one of step {step}"))
            elif self.waiting.get(partner) == step:
                forms.append(self._form([pipeline, partner], f"the pair of step {step}"))
            elif partner in self._stage.drained or self._steps[partner] >= step:
                forms.append(self._form([pipeline], f"pipeline {partner} has no step {step} to come"))
            else:
                self._awaited.setdefault(partner, set()).add(pipeline)
        return forms

    def _form(self, members: list[int], reason: str) -> Form:
        for member in members:
            step = self.waiting.pop(member)
            partner = self._partner(member, step)
            if partner is not None and partner in self._awaited:
                self._awaited[partner].discard(member)
        return self._job.form(self._stage.number, members, reason)
