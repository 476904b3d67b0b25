"""How groups are to be formed, and what is kept of a job: who is expected, and which rounds there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from pipeline.coordination.groups.events import Form
from pipeline.coordination.groups.waits import WAITS
from pipeline.errors import UserError

ROUNDS_PER_REPLICA = 10  # as the reference
SCOPES = ("", "host")
Policy = Literal["partial", "all", "matching"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How groups are formed.

    partial: whoever is ready, in groups of at most `max_group`; within `connect_within` rounds of a stage (None: ten
        per replica) its groups have connected all replicas; `wait` is one of `waits.WAITS`: "hidden" where
        nobody stands still for the answer.
    all: a round has all live replicas of its scope, however long that takes.
    matching: pairs, drawn from (seed, step), of replicas that have made the same number of steps.
    """

    policy: Policy = "partial"
    max_group: int = 8
    connect_within: int | None = None
    wait: Literal["adaptive", "hidden", "reference"] = "adaptive"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("policy", get_args(Policy)), ("wait", WAITS)):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {sorted(choices)}")
        if self.max_group < 2:
            raise UserError(f"--max-group {self.max_group}: a group has at least 2 members")
        if self.connect_within is not None and self.connect_within < 1:
            raise UserError(f"--connect-within {self.connect_within}: expected a number of rounds from 1 on")


@dataclass
class Shared:
    """What the stages share."""

    rules: Rules
    pipelines: int
    stages: int
    holder: int | None = None  # the one stage that keeps workers waiting for a connection
    rounds: int = 0
    sizes: Counter[int] = field(default_factory=Counter)

    def form(self, stage: int, members: Iterable[int], reason: str, *, final: bool = False) -> Form:
        self.rounds += 1
        form = Form(stage, self.rounds, tuple(sorted(members)), reason, final)
        if not final:
            self.sizes[len(form.members)] += 1
        return form


@dataclass
class Attendance:
    """Who is expected at one stage.

    A meeting is a round that nobody may miss: a final one, or any of policy "all". All stages of a pipeline must take
    part in the same meetings, or two pipelines would wait for each other at two stages. So a pipeline that joins is
    `late` for the meetings that another stage has already had.
    """

    number: int
    hosts: Sequence[str]
    working: set[int]
    drained: set[int] = field(default_factory=set)
    late: dict[int, int] = field(default_factory=dict)  # pipeline -> the meetings it has missed are this many
    meetings: int = 0

    def meet(self) -> None:
        self.meetings += 1
        self.late = {pipeline: missed for pipeline, missed in self.late.items() if missed > self.meetings}

    def remove(self, pipeline: int) -> None:
        self.working.discard(pipeline)
        self.drained.discard(pipeline)
        self.late.pop(pipeline, None)
        if len(self.late) == len(self.working) + len(self.drained):  # nobody is left who could have a meeting before
            self.late.clear()

    def all_drained(self) -> list[int]:
        """Who can have the final average: everybody but the late, once they have all drained."""
        if self.late:
            waiting = [pipeline for pipeline in self.drained if pipeline not in self.late]
            return waiting if self.working <= self.late.keys() else []
        return [] if self.working else list(self.drained)
