"""Partial reduce at one stage: groups of whoever is ready, that still connect all replicas.

                      0.0 ms          0.4 ms            0.7 ms
    pipeline 0   ───────R───────────────┆─────────────────M
    pipeline 1   ───────┆───────────────R─────────────────M        R: Ready, M: its group {0, 1} is formed
    pipeline 2   ───────────────────────────────────────────────   expected in 9 ms: not worth waiting for

Partial reduce (Miao et al., SDPipe, PVLDB 16(9), 2023): a round of a stage closes when all who work there wait, or at a
deadline. So that the models still agree, the groups of a stage must connect all its replicas, directly or through
others, within `connect_within` rounds. A stage that is about to miss this *holds*: it forms only groups that connect
replicas that were not connected, and keeps the others waiting. One stage holds at a time: if two did, each could
wait for a pipeline that the other keeps waiting. A pipeline is never kept from arriving at the stage that holds:
no other stage keeps it longer than its deadline, and no average that it takes part in waits for one who is held.
"""

from __future__ import annotations

from pipeline.coordination.groups.events import Form, Ready
from pipeline.coordination.groups.policy import ROUNDS_PER_REPLICA, Attendance, Shared
from pipeline.coordination.groups.waits import WAITS
from pipeline.core.topology import Components


class Partial:
    """One stage under partial reduce."""

    def __init__(self, stage: Attendance, job: Shared) -> None:
        rules, pipelines = job.rules, job.pipelines
        self.deadline: float | None = None
        self.waiting: dict[int, None] = {}  # in the order of their arrival
        self._stage, self._job, self._max_group = stage, job, rules.max_group
        self._wait = WAITS[rules.wait](pipelines)
        self._limit = ROUNDS_PER_REPLICA * pipelines if rules.connect_within is None else rules.connect_within
        # While another stage holds, this one cannot: it asks early enough to have its turn.
        self._spare = min(self._limit // 2, pipelines * (job.stages - 1))
        self._rounds = 0  # since all were connected last
        self._components = Components(stage.working)
        self._held = False
        self._urgent: set[int] = set()  # must not be held
        self._splits = pipelines > rules.max_group
        # [pipeline][pipeline]: the round in which they met last; own entry: last round in company
        self._met = [[0] * pipelines for _ in range(pipelines)] if self._splits else []

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        self.waiting[event.pipeline] = None
        if urgent:
            self._urgent.add(event.pipeline)
        self._wait.arrived(event.pipeline, now)
        return self._settle(now)

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        self._urgent.discard(pipeline)
        self._components.remove(pipeline)
        self._wait.absent(pipeline)
        self._restart_if_connected()
        return self._settle(now)

    def left(self, pipeline: int, now: float) -> list[Form]:
        return []

    def present(self, pipeline: int) -> None:
        self._components.add(pipeline)
        self._rounds = 0

    def restarted(self) -> None:
        """Everybody has averaged with everybody."""
        self._wait.restarted(self._stage.working)
        self._components = Components(self._stage.working)
        self._rounds = 0

    def tick(self, now: float) -> list[Form]:
        return self._settle(now) if self.deadline is not None and now >= self.deadline else []

    def _settle(self, now: float) -> list[Form]:
        """Forms every group that need not wait."""
        forms: list[Form] = []
        self.deadline, closing = None, ""
        while self.waiting:
            if self._must_connect():
                members, reason = self._connecting(), f"connects replicas that had not met in {self._rounds} rounds"
                if not members:
                    members, reason = sorted(self._urgent)[: self._max_group], "the average of a stage before waits"
                if not members:
                    self._held = True
                    return forms
            else:
                closing = closing or self._closing(now)
                if not closing:
                    return forms
                members, reason = self._pick(list(self.waiting)), closing
            forms.append(self._form(members, reason, now))
        self._must_connect()  # hands the right to hold on
        self._held = False
        return forms

    def _closing(self, now: float) -> str:
        """Why the round closes now; "" if it does not, and then `deadline` says when it will."""
        missing = len(self._stage.working) - len(self.waiting)
        if self._held:
            return "released: all are connected again"
        if not missing:
            return "all who work are here"
        deadline = self._wait.deadline(now, missing=missing, full=len(self.waiting) >= self._max_group)
        if now >= deadline.time:
            return deadline.reason
        self.deadline = deadline.time
        return ""

    def _must_connect(self) -> bool:
        """Whether only connecting groups may be formed; takes and hands back the right to hold."""
        job, number = self._job, self._stage.number
        apart = self._components.count - 1
        due = apart > 0 and bool(self.waiting) and self._rounds + apart + self._spare >= self._limit
        if due and job.holder is None:
            job.holder = number
        elif not due and job.holder == number:
            job.holder = None
        return due and job.holder == number

    def _needed(self) -> int:
        """How many components a group has to connect so that the rounds that are left suffice."""
        apart, left = self._components.count - 1, max(1, self._limit - self._rounds)
        return min(1 + -(-apart // left), self._max_group)

    def _connecting(self) -> list[int]:
        """A group that connects, preferring replicas of different components; [] if those who wait cannot."""
        ones: dict[int, int] = {}  # component -> who came first of it
        for pipeline in self.waiting:
            ones.setdefault(self._components.find(pipeline), pipeline)
        if len(ones) < self._needed():
            return []
        firsts = list(ones.values())
        taken = set(firsts)
        others = [pipeline for pipeline in self.waiting if pipeline not in taken]
        size = max(self._even_size(), self._needed())
        if len(firsts) >= size:
            return firsts[:size]
        return self._pick([*firsts, *others], size=size, start=len(firsts))

    def _even_size(self) -> int:
        """Those who wait, shared out evenly among as few groups as possible: nobody is alone if a pair is possible."""
        count = len(self.waiting)
        return -(-count // -(-count // self._max_group))

    def _pick(self, candidates: list[int], *, size: int = 0, start: int = 0) -> list[int]:
        """A group of those who have not met for longest; the first `start` candidates are in it."""
        if len(candidates) <= self._max_group:
            return candidates
        size = size or self._even_size()
        pool = candidates[: max(16, 2 * self._max_group)]
        never, group = self._job.rounds + 1, pool[:start]
        if not group:  # whoever has been without company for longest
            group = [min(pool, key=lambda pipeline: self._met[pipeline][pipeline])]
        rows = [self._met[member] for member in group]
        last_met = [max(row[other] for row in rows) for other in pool] if start else [rows[0][other] for other in pool]
        for member in group:
            last_met[pool.index(member)] = never
        while len(group) < size:
            best = last_met.index(min(last_met))
            group.append(pool[best])
            row = self._met[pool[best]]
            last_met = list(map(max, last_met, [row[other] for other in pool]))
            last_met[best] = never
        return group

    def _form(self, members: list[int], reason: str, now: float) -> Form:
        form = self._job.form(self._stage.number, members, reason)
        size = len(members)
        for member in members:
            del self.waiting[member]
            self._urgent.discard(member)
            self._wait.answered(member, now, size=size, held=self._held)
        if size > 1:
            self._components.connect(members)
            if self._splits:
                for member in members:
                    row = self._met[member]
                    for other in members:
                        row[other] = form.round
        self._rounds += 1
        self._restart_if_connected()
        return form

    def _restart_if_connected(self) -> None:
        if self._components.count <= 1:
            self._rounds = 0
            if len(self._stage.working) > 1:
                self._components = Components(self._stage.working)
