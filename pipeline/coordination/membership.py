"""Who takes part in a job: its rules, its pipelines and their workers, and what a message must look like.

coming ──all said hello──► live ──silence, suspicion, the launcher's notice──► away ──all stages refreshed──► live
                            └──────────────bye──────────► finished                └─ (generation + 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.coordination.groups.policy import Rules

Message = dict[str, Any]
State = Literal["coming", "live", "away", "finished"]

LISTED = 8  # names in a sentence
MOST_WORKERS = 1 << 20  # of a job

T = TypeVar("T")


class Malformed(ValueError):
    """A message that nobody of ours would send: it is dropped."""


@dataclass(frozen=True, kw_only=True)
class JobRules:
    """What a job agreed on beforehand; the same from every worker.

    `policy`, `max_group`, `connect_within`, `wait` and `seed` are `groups.policy.Rules`'; `even` is `Shares`';
    `hosts` is hosts[stage][pipeline], for groups inside a host.
    """

    stages: int
    pipelines: int
    policy: str = "partial"
    max_group: int = 8
    connect_within: int | None = None
    wait: str = "adaptive"
    seed: int = 0
    even: bool = False
    min_replicas: int = 1
    heartbeat_timeout_s: float = 3.0
    hosts: tuple[tuple[str, ...], ...] | None = None

    @property
    def groups(self) -> Rules:
        """The scheduler's part; a synchroniser that forms no groups ("none") still has final averages."""
        return Rules(
            policy="partial" if self.policy == "none" else self.policy,  # type: ignore[arg-type]
            max_group=self.max_group,
            connect_within=self.connect_within,
            wait=self.wait,  # type: ignore[arg-type]
            seed=self.seed,
        )

    def message(self) -> Message:
        """As it travels in JSON."""
        hosts = None if self.hosts is None else [list(stage) for stage in self.hosts]
        return {**asdict(self), "hosts": hosts}

    @classmethod
    def from_message(cls, message: Message) -> JobRules:
        """The inverse; raises `Malformed`."""
        missing = [item.name for item in fields(cls) if item.name not in message]
        if missing:
            raise Malformed(f"rules without {', '.join(missing)}")
        known = {item.name: message[item.name] for item in fields(cls)}
        wrong = [name for name, valid in _VALID.items() if not valid(known[name])]
        if wrong:
            raise Malformed(f"rules with {', '.join(f'{name} = {known[name]!r:.40}' for name in wrong)}")
        stages, pipelines, hosts = known["stages"], known["pipelines"], known["hosts"]
        if stages * pipelines > MOST_WORKERS:
            raise Malformed(f"rules of {stages} x {pipelines} workers")
        if hosts is not None and (len(hosts) != stages or any(len(row) != pipelines for row in hosts)):
            raise Malformed("rules with hosts of another shape")
        rules = cls(**{**known, "hosts": None if hosts is None else tuple(map(tuple, hosts))})
        try:
            rules.groups  # noqa: B018
        except ValueError as error:
            raise Malformed(f"rules with a wrong field: {error}") from None
        return rules


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(name, str) for name in row) for row in value
    )


_VALID: Mapping[str, Callable[[Any], bool]] = {
    "stages": _counts,
    "pipelines": _counts,
    "policy": lambda value: isinstance(value, str),
    "max_group": _counts,
    "connect_within": lambda value: value is None or _counts(value),
    "wait": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
    "even": lambda value: type(value) is bool,
    "min_replicas": lambda value: type(value) is int,
    "heartbeat_timeout_s": lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    "hosts": lambda value: value is None or _is_table(value),
}


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


class Roll:
    """Everybody, as soon as the first worker has brought the rules."""

    def __init__(self, rules: JobRules) -> None:
        self.rules = rules
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


def field_of(message: Message, name: str, kind: type[T]) -> T:
    """A field of a message; raises `Malformed` when it is missing or of another type."""
    value = message.get(name)
    if type(value) is not kind:
        raise Malformed(f"{message.get('type')!s:.40} with {name} = {value!r:.60}")
    return value
