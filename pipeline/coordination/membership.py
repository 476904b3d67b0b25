"""Who takes part in a job: its pipelines and their workers.

coming ──all said hello──► live ──silence, suspicion, the launcher's notice──► away ──all stages refreshed──► live
                            └──────────────bye──────────► finished                └─ (generation + 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pipeline.coordination.messages import JobRules, Message

State = Literal["coming", "live", "away", "finished"]

LISTED = 8  # names in a sentence


class Ask(NamedTuple):
    """A message that waits for its answer."""

    kind: str
    deadline: float
    missing: Callable[[], str]  # who is waited for, in words


@dataclass(eq=False, slots=True)
class Worker:
    """One process: a stage of a pipeline, in one of its incarnations."""

    id: bytes
    rank: int
    stage: int
    pipeline: int
    mesh: str
    timeout_s: float
    heard: float
    segment: int = -1  # it has begun
    silent: bool = False
    gone: bool = False  # it said bye
    refreshed: bool = False
    acked: int = 0  # it has the answers to all questions with smaller numbers
    asks: dict[int, Ask] = field(default_factory=dict)
    answers: dict[int, Message] = field(default_factory=dict)  # the last ones, by number


@dataclass(eq=False, slots=True)
class Pipeline:
    """The failure domain."""

    index: int
    state: State = "coming"
    generation: int = 0
    incarnation: int = 0
    why: str = ""  # it is away
    workers: dict[int, Worker] = field(default_factory=dict)  # stage -> worker
    tickets: dict[int, int] = field(default_factory=dict)  # k -> ticket, in the segment that it is or was in
    segment: int = -1  # of these tickets
    giver: int | None = None  # whom its stages copy from

    def lose(self, why: str) -> State:
        """What it said until now no longer counts; returns the state that it was in."""
        before, self.state = self.state, "away"
        self.generation += 1
        self.giver, self.why = None, f"pipeline {self.index} was declared lost: {why}"
        return before

    def take_in(self) -> None:
        """It is whole, and takes part again."""
        self.state, self.why, self.giver = "live", "", None
        self.segment, self.tickets = -1, {}

    def keep(self, segment: int, k: int, ticket: int | None) -> None:
        """Remembers what one of its stages was told, for the others."""
        if self.segment != segment:
            self.segment, self.tickets = segment, {}
        if ticket is not None:
            self.tickets[k] = ticket

    def fence(self) -> Message:
        """The news that it was lost, for its own workers."""
        return {"type": "fenced", "g": self.generation, "text": self.why}


class Roll:
    """Everybody, as soon as the first worker has brought the rules."""

    def __init__(self, rules: JobRules, raw_rules: Message) -> None:
        self.rules = rules
        self._raw_rules = raw_rules  # as the first worker sent them
        self.pipelines = [Pipeline(index) for index in range(rules.pipelines)]
        self.workers: dict[bytes, Worker] = {}

    def of(self, *states: State) -> list[Pipeline]:
        """The pipelines in one of these states."""
        return [pipeline for pipeline in self.pipelines if pipeline.state in states]

    @property
    def live(self) -> tuple[int, ...]:
        return tuple(pipeline.index for pipeline in self.pipelines if pipeline.state == "live")

    def pipeline_of(self, worker: Worker) -> Pipeline:
        return self.pipelines[worker.pipeline]

    def enter(self, worker: Worker) -> None:
        """Takes a worker in who is not there yet."""
        self.workers[worker.id] = self.pipelines[worker.pipeline].workers[worker.stage] = worker

    def objection(
        self, rules: Message, stage: int, index: int, incarnation: int, *, known: bool
    ) -> tuple[str, str] | None:
        """Why a worker cannot take part, as (error, text)."""
        if rules != self._raw_rules:
            first = self._raw_rules
            differing = [name for name in first if rules.get(name) != first[name]]
            listing = ", ".join(f"{name} {rules.get(name)!r} (the first: {first[name]!r})" for name in differing)
            return "refused", f"stage {stage} of pipeline {index} has {listing}; give every process the same flags"
        if not (0 <= stage < self.rules.stages and 0 <= index < self.rules.pipelines):
            shape = f"{self.rules.pipelines} pipeline(s) of {self.rules.stages} stage(s)"
            return "refused", f"there is no stage {stage} of pipeline {index} among {shape}"
        pipeline = self.pipelines[index]
        if incarnation < pipeline.incarnation:
            return "replaced", f"incarnation {pipeline.incarnation} of pipeline {index} has taken this one's place"
        if known or (incarnation == pipeline.incarnation and stage in pipeline.workers):
            return "refused", f"stage {stage} of pipeline {index} has already said hello"
        return None

    def welcome(self, worker: Worker, *, segment: int, next_k: int) -> Message:
        """Where a worker begins, or goes on, and with whom."""
        pipeline, others = self.pipeline_of(worker), self.of("live")
        return {
            "g": pipeline.generation,
            "late": pipeline.state != "live",
            "segment": segment,
            "k": next_k,
            "live": [other.index for other in others],
            "generations": [other.generation for other in self.pipelines],
            "peers": [(other.index, other.workers[worker.stage].mesh) for other in others],
        }

    def renew(self, pipeline: Pipeline, incarnation: int) -> None:
        """A pipeline's processes were started again: the old ones are nobody."""
        pipeline.incarnation, pipeline.giver = incarnation, None
        for worker in pipeline.workers.values():
            del self.workers[worker.id]
        pipeline.workers = {}

    def complete(self, pipeline: Pipeline) -> bool:
        return len(pipeline.workers) == self.rules.stages

    def whole(self, pipeline: Pipeline) -> bool:
        """Whether all stages of a lost pipeline are there and have copied."""
        return self.complete(pipeline) and all(self._fresh(worker) for worker in pipeline.workers.values())

    @staticmethod
    def _fresh(worker: Worker) -> bool:
        return worker.refreshed and not (worker.silent or worker.gone)

    def live_workers(self) -> Iterator[Worker]:
        for pipeline in self.pipelines:
            if pipeline.state == "live":
                yield from (worker for worker in pipeline.workers.values() if not worker.gone)

    def scope(self, worker: Worker, scope: str) -> Iterator[Worker]:
        """Whom a worker means by "stage" (its replicas), "pipeline" (its stages), "last" (all last stages) or "all"."""
        everybody = self.pipeline_of(worker).workers.values() if scope == "pipeline" else self.live_workers()
        stage = {"stage": worker.stage, "last": self.rules.stages - 1}.get(scope)
        return (other for other in everybody if stage in (None, other.stage) and not other.gone)

    def others(self, pipeline: Pipeline) -> Iterator[Worker]:
        """The workers of all other pipelines."""
        return (worker for worker in self.workers.values() if worker.pipeline != pipeline.index)

    def asking(self, *kinds: str) -> list[tuple[Worker, int, Ask]]:
        """Every question, by its number, that waits for its answer; of these kinds or of all."""
        return [
            (worker, number, ask)
            for worker in self.workers.values()
            for number, ask in worker.asks.items()
            if not kinds or ask.kind in kinds
        ]

    def choose_giver(self, joiner: Pipeline, candidates: list[int], refused: int) -> int:
        """Whom a lost pipeline copies from: as before if that is possible and not refused."""
        giver = joiner.giver
        if giver not in candidates or giver == refused:
            giver = min(candidates, key=lambda index: self._burden(index, joiner, refused))
            joiner.giver = giver
        return giver

    def _burden(self, index: int, joiner: Pipeline, refused: int) -> tuple[bool, int, int]:
        """Whoever gives to fewest others is asked; among equals the next one."""
        taken = sum(other.giver == index for other in self.of("away"))
        return index == refused, taken, (index - joiner.index) % self.rules.pipelines

    def too_few(self) -> str | None:
        """Why the job cannot go on, if fewer pipelines are left than it needs."""
        left, lost = self.of("coming", "live", "finished"), self.of("away")
        if len(left) >= self.rules.min_replicas:
            return None
        count = f"{len(left)} of {self.rules.pipelines} pipelines {'is' if len(left) == 1 else 'are'} left"
        reasons = "; ".join(pipeline.why for pipeline in lost)
        return f"{count}, and --min-replicas is {self.rules.min_replicas}: {reasons}"

    def paused(self, seconds: float, now: float) -> None:
        """Nobody could be heard for a while: whoever was not silent before counts as heard now."""
        for worker in self.workers.values():
            if worker.heard + seconds >= now - self.rules.heartbeat_timeout_s:
                worker.heard = now

    def silent_at(self, now: float) -> list[Worker]:
        """Who has been silent for as long as the heartbeat timeout, and was not before; from now on they are."""
        timeout_s = self.rules.heartbeat_timeout_s
        found = [worker for worker in self._watched() if now >= worker.heard + timeout_s]
        for worker in found:
            worker.silent = True
        return found

    @property
    def look_at(self) -> float:
        """Until then nobody can have been silent for too long."""
        return min((worker.heard for worker in self._watched()), default=float("inf")) + self.rules.heartbeat_timeout_s

    def _watched(self) -> Iterator[Worker]:
        return (worker for worker in self.workers.values() if not (worker.gone or worker.silent))

    @property
    def deserted(self) -> bool:
        """Whether nobody is left to be served: all have said bye, or are lost and silent."""
        return not self.of("coming", "live") and all(worker.gone or worker.silent for worker in self.workers.values())

    # --- who is missing, in words

    def missing_at_start(self) -> str:
        stages = range(self.rules.stages)
        coming = self.of("coming")
        return listed((stage, each.index) for each in coming for stage in stages if stage not in each.workers)

    def missing_of(self, pipeline: Pipeline) -> str:
        """Which stages of a lost pipeline have not copied."""
        ready = {stage for stage, worker in pipeline.workers.items() if self._fresh(worker)}
        missing = [(stage, pipeline.index) for stage in range(self.rules.stages) if stage not in ready]
        return listed(missing) if missing else "the others to begin the next segment"

    def named(self, ranks: Iterable[int]) -> str:
        places = [divmod(rank, self.rules.stages) for rank in ranks]
        return listed((stage, pipeline) for pipeline, stage in places)


def listed(places: Iterable[tuple[int, int]]) -> str:
    """(stage, pipeline) pairs in words, the first of them."""
    names = [f"stage {stage} of pipeline {pipeline}" for stage, pipeline in places]
    more = [f"{len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join(names[:LISTED] + more) or "nobody"
