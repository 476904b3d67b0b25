"""The Director decides everything that replicas must agree on: messages and times in, answers and pushes out.

    worker                          Director                                    everybody
      hello ──────────────────────► start barrier ─────────► welcome
      begin, ticket, done ────────► Shares: who does which batch
      ready, final ───────────────► GroupScheduler: who averages with whom
      gather, first ──────────────► one answer for all
      ping, silence, suspect ─────► liveness ───────────────► lost, fenced, stop
      giver, refreshed ───────────► the way back ───────────► joined

A pipeline is lost and comes back as a whole:

    coming ──all said hello──► live ──silence, suspicion, the launcher's notice──► away ──all stages refreshed──► live
                                └──────────────bye──────────► finished                └─ (generation + 1)

Every message but a ping has a number `n`, unique for its worker, and gets exactly one answer with that number; a
message that comes twice (its sender reconnected) gets the same answer. It also has the generation `g` that its sender
believes in, which keeps out what a pipeline sent before it heard that it was lost.

No socket, thread or clock: `pipeline.coordinator` is the loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from pipeline.gathers import Answer, Gathers
from pipeline.groups import Final, Form, GroupScheduler, Joined, Left, Ready, Rules, Tick
from pipeline.shares import Shares

Message = dict[str, Any]
Outgoing = list[tuple[bytes, Message]]

REMEMBERED = 32  # answers per worker that are kept for a message that comes twice
ALONE = -1  # the round of a group that nobody formed
SCOPES = ("stage", "pipeline", "all", "last")
_FENCED_MAY = ("ticket", "first", "bye")  # even with an old generation

T = TypeVar("T")


class Malformed(ValueError):
    """A message that nobody of ours would send: it is dropped."""


@dataclass(frozen=True, kw_only=True)
class JobRules:
    """What a job agreed on beforehand; the same from every worker.

    `policy`, `max_group`, `connect_within`, `wait` and `seed` are `pipeline.groups.Rules`'; `even` is `Shares`';
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

    def message(self) -> Message:
        """As it travels in JSON."""
        hosts = None if self.hosts is None else [list(stage) for stage in self.hosts]
        return {**asdict(self), "hosts": hosts}

    @classmethod
    def from_message(cls, message: Any) -> JobRules:
        """The inverse; raises `Malformed`."""
        try:
            hosts = message["hosts"]
            known = {item.name: message[item.name] for item in fields(cls)}
            rules = cls(**{**known, "hosts": None if hosts is None else tuple(map(tuple, hosts))})
            if not (rules.stages >= 1 and rules.pipelines >= 1 and rules.heartbeat_timeout_s > 0):
                raise Malformed(f"rules {message}: stages, pipelines and heartbeat_timeout_s must be above 0")
            return rules
        except (KeyError, TypeError) as error:
            raise Malformed(f"rules without a field, or with a wrong one: {error!r}") from error


class _Ask(NamedTuple):
    """A message that waits for its answer."""

    kind: str
    deadline: float
    missing: Callable[[], str]  # who is waited for, in words


@dataclass(eq=False, slots=True)
class _Worker:
    """One process: a stage of a pipeline, in one of its incarnations."""

    id: bytes
    stage: int
    pipeline: int
    mesh: str
    timeout_s: float
    heard: float
    segment: int = -1  # it has begun
    silent: bool = False
    gone: bool = False  # it said bye
    refreshed: bool = False
    asks: dict[int, _Ask] = field(default_factory=dict)
    answers: dict[int, Message] = field(default_factory=dict)  # the last ones, by number


@dataclass(eq=False, slots=True)
class _Pipeline:
    """The failure domain."""

    index: int
    state: str = "coming"  # "live", "away", "finished"
    generation: int = 0
    incarnation: int = 0
    why: str = ""  # it is away
    workers: dict[int, _Worker] = field(default_factory=dict)  # stage -> worker
    tickets: dict[int, int] = field(default_factory=dict)  # k -> ticket, in the segment that it is or was in
    segment: int = -1  # of these tickets
    giver: int | None = None  # whom its stages copy from


class Director:
    """One job's decisions; create it before the first worker comes.

    Messages and answers are dicts of plain JSON values; a worker is known by the name (bytes) of its connection.
    Every method returns what is to be sent, in this order. Times are seconds on any clock that does not go back.

    Raises (from `handle`):
        Malformed: the message cannot be understood; nothing has changed.
    """

    def __init__(self, now: float) -> None:
        self.notes: list[str] = []  # what happened, in words; the loop prints and clears them
        self._began = now
        self._rules: JobRules | None = None
        self._raw_rules: Message = {}
        self._group_rules = Rules()
        self._pipelines: list[_Pipeline] = []
        self._workers: dict[bytes, _Worker] = {}
        self._early: dict[int, str] = {}  # pipelines that the launcher lost before anybody came
        self._started = False
        self._stopped: str | None = None
        self._scheduler: GroupScheduler | None = None
        self._shares: Shares | None = None
        self._range = (-1, 0, 0)  # segment, first ticket, stop
        self._closing = -1  # the segment whose final averages have begun
        self._gathers = Gathers()
        self._gatherers: dict[Any, list[tuple[_Worker, int]]] = {}
        self._first: dict[str, Any] = {}
        self._rounds: dict[tuple[int, int], tuple[_Worker, int]] = {}  # (stage, pipeline) -> who waits for a group
        self._wake_at = float("inf")  # the scheduler has nothing to do before that
        self._look_at = float("inf")  # nobody is silent for too long before that
        self._expire_at = float("inf")  # no question is too old before that
        self._out: Outgoing = []
        self._handlers: Mapping[str, Callable[[_Worker, int, Message, float], None]] = {
            "ready": self._ready,
            "ticket": self._ticket,
            "done": self._done,
            "final": self._final,
            "begin": self._begin,
            "gather": self._gather,
            "first": self._first_value,
            "giver": self._giver,
            "refreshed": self._refreshed,
            "suspect": self._suspect,
            "bye": self._bye,
        }

    # --- in

    def handle(self, worker_id: bytes, message: Message, now: float) -> Outgoing:
        """Takes one message of a worker in; the answers and pushes that follow from it."""
        kind = message.get("type")
        if kind == "hello":
            self._hello(worker_id, message, now)
            return self._sent()
        worker = self._workers.get(worker_id)
        if worker is None:
            return self._stranger(worker_id, message)
        worker.heard = now
        if worker.silent:
            self._speaks_again(worker, now)
        pipeline = self._pipelines[worker.pipeline]
        old = _field(message, "g", int) < pipeline.generation
        if kind == "ping":
            self._out.append((worker_id, {"type": "pong"}))
            if old:
                self._out.append((worker_id, self._fence(pipeline)))
            return self._sent()
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        if handler is None:
            raise Malformed(f"unknown type {str(kind)[:40]!r}")
        number = _field(message, "n", int)
        if number in worker.asks:
            return []
        if number in worker.answers:
            return [(worker_id, worker.answers[number])]
        if old and kind not in _FENCED_MAY:
            self._fail(worker, number, "fenced", pipeline.why)
        elif self._stopped is not None and kind != "bye":
            self._fail(worker, number, "too few", self._stopped)
        else:
            handler(worker, number, message, now)
        return self._sent()

    def tick(self, now: float) -> Outgoing:
        """Does what is due at this time; call it at `next_wake`."""
        if now >= self._wake_at:
            self._wake_at = float("inf")
            self._schedule(Tick(), now)
        if now >= self._look_at:
            self._look(now)
        if now >= self._expire_at:
            self._expire(now)
        return self._sent()

    def lost(self, pipeline: int, reason: str, now: float, *, incarnation: int | None = None) -> Outgoing:
        """The launcher's notice that a process of a pipeline has ended; of an older incarnation it is no news."""
        if self._rules is None:
            self._early[pipeline] = reason
        elif 0 <= pipeline < len(self._pipelines):
            entry = self._pipelines[pipeline]
            if incarnation is None or incarnation >= entry.incarnation:
                for worker in entry.workers.values():
                    worker.silent = True
                self._lose(entry, reason, now)
        return self._sent()

    def paused(self, seconds: float) -> None:
        """The loop itself stood still for a while: nobody could be heard in that time."""
        for worker in self._workers.values():
            worker.heard += seconds

    @property
    def next_wake(self) -> float | None:
        """When `tick` has something to do; None: only a message can change anything."""
        wake = min(self._wake_at, self._look_at, self._expire_at)
        return None if wake == float("inf") else wake

    @property
    def met(self) -> bool:
        """Whether any worker has ever come."""
        return self._rules is not None

    @property
    def over(self) -> bool:
        """Whether nobody is left to be served: all have said bye, or are lost and silent."""
        left = all(worker.gone or worker.silent for worker in self._workers.values())
        return self.met and left and all(entry.state in ("finished", "away") for entry in self._pipelines)

    @property
    def live(self) -> tuple[int, ...]:
        """The pipelines that take part."""
        return tuple(entry.index for entry in self._pipelines if entry.state == "live")

    # --- out

    def _sent(self) -> Outgoing:
        out, self._out = self._out, []
        return out

    def _answer(self, worker: _Worker, number: int, answer: Message) -> None:
        answer["n"] = number
        worker.asks.pop(number, None)
        worker.answers[number] = answer
        if len(worker.answers) > REMEMBERED:
            del worker.answers[next(iter(worker.answers))]
        self._out.append((worker.id, answer))

    def _fail(self, worker: _Worker, number: int, error: str, text: str) -> None:
        """Answers with an error: "fenced", "too few", "timeout", "refused", "over" or "replaced"."""
        generation = self._pipelines[worker.pipeline].generation
        self._answer(worker, number, {"error": error, "text": text, "g": generation})

    def _push(self, message: Message, workers: Iterable[_Worker]) -> None:
        self._out.extend((worker.id, message) for worker in workers if not worker.gone)

    def _wait(self, worker: _Worker, number: int, kind: str, now: float, missing: Callable[[], str]) -> None:
        deadline = now + worker.timeout_s
        worker.asks[number] = _Ask(kind, deadline, missing)
        if deadline < self._expire_at:
            self._expire_at = deadline

    def _fence(self, pipeline: _Pipeline) -> Message:
        return {"type": "fenced", "g": pipeline.generation, "text": pipeline.why}

    def _stranger(self, worker_id: bytes, message: Message) -> Outgoing:
        """Tells a process of an older incarnation that its place is taken."""
        text = "another incarnation of this process has taken its place, or it never said hello"
        if message.get("type") == "ping":
            return [(worker_id, {"type": "replaced", "text": text})]
        return [(worker_id, {"n": _field(message, "n", int), "error": "replaced", "text": text})]

    # --- who is there

    def _hello(self, worker_id: bytes, message: Message, now: float) -> None:
        number, raw = _field(message, "n", int), _field(message, "rules", dict)
        stage, index = _field(message, "stage", int), _field(message, "pipeline", int)
        incarnation, mesh = _field(message, "incarnation", int), _field(message, "mesh", str)
        timeout_s = float(_field(message, "timeout", (int, float)))
        known = self._workers.get(worker_id)
        if known is not None and (number in known.asks or number in known.answers):
            self._out += [(worker_id, known.answers[number])] if number in known.answers else []
            return
        rules = self._agree(raw)
        refusal = self._objection(raw, rules, stage, index, incarnation, known)
        if refusal is not None:
            self._out.append((worker_id, {"n": number, "error": refusal[0], "text": refusal[1]}))
            return
        entry = self._pipelines[index]
        if incarnation > entry.incarnation:
            self._renew(entry, incarnation, now)
        worker = _Worker(worker_id, stage, index, mesh, timeout_s, now)
        entry.workers[stage] = self._workers[worker_id] = worker
        self._look_at = min(self._look_at, now + rules.heartbeat_timeout_s)
        self._wait(worker, number, "hello", now, self._missing_at_start)
        if self._stopped is not None:
            self._fail(worker, number, "too few", self._stopped)
        elif self._started:
            self._welcome(worker, number)
            self._admit(now)
        else:
            self._start(now)

    def _agree(self, raw: Message) -> JobRules:
        """The job's rules: those of the first worker."""
        if self._rules is None:
            rules = JobRules.from_message(raw)
            self._group_rules = _group_rules(rules)
            self._rules, self._raw_rules = rules, raw
            self._pipelines = [_Pipeline(index) for index in range(rules.pipelines)]
            self._shares = Shares(rules.pipelines, even=rules.even)
            for index, why in self._early.items():
                if 0 <= index < rules.pipelines:
                    self._lose(self._pipelines[index], why, self._began)
        return self._rules

    def _objection(
        self, raw: Message, rules: JobRules, stage: int, index: int, incarnation: int, known: _Worker | None
    ) -> tuple[str, str] | None:
        """Why a worker cannot take part, as (error, text)."""
        if raw != self._raw_rules:
            theirs = self._raw_rules
            differing = [name for name in theirs if raw.get(name) != theirs[name]]
            listed = ", ".join(f"{name} {raw.get(name)!r} (the first worker: {theirs[name]!r})" for name in differing)
            return "refused", f"stage {stage} of pipeline {index} has {listed}; give every process the same flags"
        if not (0 <= stage < rules.stages and 0 <= index < rules.pipelines):
            return "refused", f"there is no stage {stage} of pipeline {index} in {rules.pipelines} x {rules.stages}"
        entry = self._pipelines[index]
        if incarnation < entry.incarnation:
            return "replaced", f"incarnation {entry.incarnation} of pipeline {index} has taken this one's place"
        if known is not None or (incarnation == entry.incarnation and stage in entry.workers):
            return "refused", f"stage {stage} of pipeline {index} has already said hello"
        return None

    def _renew(self, entry: _Pipeline, incarnation: int, now: float) -> None:
        """A pipeline's processes were started again: the old ones are nobody."""
        if entry.state == "live":
            self._lose(entry, f"its processes were started again (incarnation {incarnation})", now)
        else:
            entry.generation += 1
        entry.incarnation, entry.giver = incarnation, None
        for worker in entry.workers.values():
            del self._workers[worker.id]
        entry.workers = {}
        entry.state = "away" if self._started else "coming"

    def _start(self, now: float) -> None:
        """Begins the job when everybody is there who still can come."""
        assert self._rules is not None and self._shares is not None
        rules = self._rules
        coming = [entry for entry in self._pipelines if entry.state == "coming"]
        if self._started or any(len(entry.workers) < rules.stages for entry in coming) or not self._enough():
            return
        self._started = True
        for entry in coming:
            entry.state = "live"
        self._scheduler = GroupScheduler(
            rules.stages,
            rules.pipelines,
            self._group_rules,
            hosts=rules.hosts,
            live=self.live,
        )
        for entry in self._pipelines:
            if entry.state != "live":
                self._shares.left(entry.index)
        for worker, number, _ in list(self._asking("hello")):
            self._welcome(worker, number)

    def _welcome(self, worker: _Worker, number: int) -> None:
        assert self._shares is not None
        entry = self._pipelines[worker.pipeline]
        peers = {other.index: other.workers[worker.stage].mesh for other in self._pipelines if other.state == "live"}
        answer = {
            "g": entry.generation,
            "late": entry.state != "live",
            "segment": self._range[0],
            "k": self._shares.next_k(entry.index),
            "live": list(self.live),
            "generations": [other.generation for other in self._pipelines],
            "peers": list(peers.items()),
        }
        self._answer(worker, number, answer)

    def _look(self, now: float) -> None:
        """Finds the silent ones."""
        assert self._rules is not None
        timeout_s = self._rules.heartbeat_timeout_s
        silent = [w for w in self._workers.values() if not (w.gone or w.silent) and now >= w.heard + timeout_s]
        for worker in silent:
            worker.silent = True
        for worker in silent:
            entry = self._pipelines[worker.pipeline]
            if entry.state in ("live", "coming"):
                self._lose(entry, f"stage {worker.stage} was silent for {now - worker.heard:.3g} s", now)
        watched = [w.heard + timeout_s for w in self._workers.values() if not (w.gone or w.silent)]
        self._look_at = min(watched, default=float("inf"))

    def _speaks_again(self, worker: _Worker, now: float) -> None:
        assert self._rules is not None
        worker.silent = False
        self._look_at = min(self._look_at, now + self._rules.heartbeat_timeout_s)
        self._admit(now)

    def _lose(self, entry: _Pipeline, why: str, now: float) -> None:
        """Declares a pipeline lost: the others go on, and what it said until now no longer counts."""
        if entry.state == "finished":
            return
        before, entry.state = entry.state, "away"
        entry.generation += 1
        entry.giver, entry.why = None, f"pipeline {entry.index} was declared lost: {why}"
        mine = list(entry.workers.values())
        for worker in mine:
            worker.refreshed = False
        self._push(self._fence(entry), mine)
        self._abandon(entry)
        if before == "away":  # it had been lost before, and comes back from the beginning
            return
        self.notes.append(entry.why)
        if not self._enough():
            return
        if before == "live":
            self._spread_loss(entry, now)
        else:
            self._start(now)
        self._admit(now)

    def _abandon(self, entry: _Pipeline) -> None:
        """Answers what a lost pipeline waits for."""
        for worker in entry.workers.values():
            self._rounds.pop((worker.stage, worker.pipeline), None)
            for number in [number for number, ask in worker.asks.items() if ask.kind != "hello"]:
                self._fail(worker, number, "fenced", entry.why)

    def _spread_loss(self, entry: _Pipeline, now: float) -> None:
        """Tells the others, and lets them go on."""
        assert self._rules is not None and self._shares is not None
        news = {"type": "lost", "pipeline": entry.index, "g": entry.generation, "text": entry.why}
        self._push(news, self._others(entry))
        self._shares.left(entry.index)
        self._schedule(Left(entry.index), now)
        ranks = range(entry.index * self._rules.stages, (entry.index + 1) * self._rules.stages)
        self._complete(self._gathers.left(ranks))

    def _enough(self) -> bool:
        """Whether enough pipelines are left; otherwise the job stops."""
        assert self._rules is not None
        left = [entry for entry in self._pipelines if entry.state != "away"]
        if self._stopped is None and len(left) < self._rules.min_replicas:
            reasons = "; ".join(entry.why for entry in self._pipelines if entry.state == "away")
            count = f"{len(left)} of {len(self._pipelines)} pipelines {'is' if len(left) == 1 else 'are'} left"
            self._stopped = f"{count}, and --min-replicas is {self._rules.min_replicas}: {reasons}"
            self.notes.append(self._stopped)
            self._push({"type": "stop", "text": self._stopped}, self._workers.values())
            for worker, number, _ in list(self._asking()):
                self._fail(worker, number, "too few", self._stopped)
        return self._stopped is None

    def _suspect(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        index = _field(message, "pipeline", int)
        if not 0 <= index < len(self._pipelines):
            raise Malformed(f"suspects pipeline {index}")
        self._answer(worker, number, {})
        suspected, sure = self._pipelines[index], self._pipelines[worker.pipeline].state == "live"
        if sure and index != worker.pipeline and suspected.state == "live":
            self._lose(suspected, f"its connection to pipeline {worker.pipeline} broke (stage {worker.stage})", now)

    def _bye(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        self._answer(worker, number, {})
        worker.gone = True
        entry = self._pipelines[worker.pipeline]
        self._complete(self._gathers.left([self._rank(worker)]))
        if entry.state == "live" and all(other.gone for other in entry.workers.values()):
            entry.state = "finished"
            assert self._shares is not None
            self._shares.left(entry.index)
            self._schedule(Left(entry.index), now)
        self._admit(now)

    # --- who does which batch

    def _begin(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        assert self._shares is not None
        segment, first, stop = (_field(message, name, int) for name in ("segment", "first", "stop"))
        if self._pipelines[worker.pipeline].state != "live":
            self._answer(worker, number, {})  # it will be told where to go on
            return
        if segment == self._range[0] and (segment, first, stop) != self._range:
            known = f"[{self._range[1]}, {self._range[2]})"
            self._fail(worker, number, "refused", f"segment {segment} is {known}, not [{first}, {stop})")
            return
        if segment > self._range[0]:
            self._range = (segment, first, stop)
            self._shares.begin(segment, first, stop)
        worker.segment = segment
        self._answer(worker, number, {})
        self._admit(now)

    def _ticket(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        assert self._shares is not None
        segment, k = _field(message, "segment", int), _field(message, "k", int)
        entry = self._pipelines[worker.pipeline]
        if segment > self._range[0] and entry.state == "live":
            self._fail(worker, number, "refused", f"nobody has begun segment {segment}")
            return
        if entry.state == "live" and segment == self._range[0]:
            try:
                ticket = self._shares.ask(entry.index, k, now)
            except ValueError as error:
                self._fail(worker, number, "refused", str(error))
                return
            if entry.segment != segment:
                entry.segment, entry.tickets = segment, {}
            if ticket is not None:
                entry.tickets[k] = ticket
        else:  # its stages still agree on what it was given; there is no more for it
            ticket = entry.tickets.get(k) if segment == entry.segment else None
        self._answer(worker, number, {"ticket": ticket})

    def _done(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        assert self._shares is not None
        k = _field(message, "k", int)
        if self._pipelines[worker.pipeline].state == "live":
            self._shares.done(worker.pipeline, k, now)
        self._answer(worker, number, {})

    # --- who averages with whom

    def _ready(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        step, scope = _field(message, "step", int), _field(message, "scope", str)
        index = worker.pipeline
        if self._pipelines[index].state != "live":
            reason = f"pipeline {index} is not whole"
            self._answer(worker, number, {"round": ALONE, "members": [index], "reason": reason})
        elif self._free(worker, number):
            self._join_round(worker, number, "ready", now)
            self._schedule(Ready(worker.stage, index, step, scope), now)

    def _final(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        segment, _ = _field(message, "segment", int), _field(message, "attempt", int)
        entry = self._pipelines[worker.pipeline]
        if entry.state != "live":
            self._fail(worker, number, "fenced", entry.why)
        elif segment < self._range[0]:
            self._fail(worker, number, "fenced", f"the others have finished segment {segment}")
        elif self._free(worker, number):
            self._join_round(worker, number, "final", now)
            self._schedule(Final(worker.stage, worker.pipeline), now)

    def _free(self, worker: _Worker, number: int) -> bool:
        """Whether a worker waits for no other group."""
        if (worker.stage, worker.pipeline) not in self._rounds:
            return True
        text = f"stage {worker.stage} of pipeline {worker.pipeline} already waits for a group"
        self._fail(worker, number, "refused", text)
        return False

    def _join_round(self, worker: _Worker, number: int, kind: str, now: float) -> None:
        self._rounds[worker.stage, worker.pipeline] = (worker, number)
        self._wait(worker, number, kind, now, lambda: self._missing_in_round(worker.stage))

    def _schedule(self, event: Ready | Final | Left | Joined | Tick, now: float) -> None:
        """Lets the scheduler decide and carries its decisions out."""
        assert self._scheduler is not None
        for command in self._scheduler.handle(event, now):
            if isinstance(command, Form):
                self._form(command)
            else:
                self._wake_at = command.time

    def _form(self, form: Form) -> None:
        if form.final:
            self._closing = self._range[0]
        members = list(form.members)
        for member in members:
            worker, number = self._rounds.pop((form.stage, member), (None, 0))
            if worker is not None and number in worker.asks:
                self._answer(worker, number, {"round": form.round, "members": members, "reason": form.reason})

    # --- one answer for all

    def _gather(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        key, scope = _field(message, "key", str), _field(message, "scope", str)
        if scope not in SCOPES or "value" not in message:
            raise Malformed(f"a gather needs a value and a scope of {', '.join(SCOPES)}")
        entry = self._pipelines[worker.pipeline]
        place = {"stage": (worker.stage,), "pipeline": (entry.index, entry.generation)}.get(scope, ())
        name = (scope, place, key)
        if scope == "pipeline":
            members = (self._rank(member) for member in entry.workers.values() if not member.gone)
        else:
            members = (self._rank(member) for member in self._live_workers() if self._within(member, worker, scope))
        answer = self._gathers.give(name, self._rank(worker), message["value"], members)
        if answer is None:
            self._wait(worker, number, "gather", now, lambda: self._missing_in_gather(name, key))
            self._gatherers.setdefault(name, []).append((worker, number))
        else:
            self._answer(worker, number, {"values": list(answer.items())})
            self._complete({name: answer})

    def _within(self, member: _Worker, asker: _Worker, scope: str) -> bool:
        assert self._rules is not None
        stage = {"stage": asker.stage, "last": self._rules.stages - 1}.get(scope, member.stage)
        return member.stage == stage

    def _complete(self, answers: Mapping[Any, Answer]) -> None:
        for name, answer in answers.items():
            values = list(answer.items())
            for worker, number in self._gatherers.pop(name, ()):
                if number in worker.asks:
                    self._answer(worker, number, {"values": values})

    def _first_value(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        if "value" not in message:
            raise Malformed("first without a value")
        value = self._first.setdefault(_field(message, "key", str), message["value"])
        self._answer(worker, number, {"value": value})

    # --- the way back

    def _giver(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        """Names whom to copy from: the same for all stages of a pipeline, but not `not_from` if there is another."""
        entry, refused = self._pipelines[worker.pipeline], _field(message, "not_from", int)
        candidates = [index for index in self.live if index != entry.index]
        if self._is_over():
            self._fail(worker, number, "over", _OVER)
        elif not candidates:
            self._fail(worker, number, "too few", f"no replica of stage {worker.stage} is left to copy from")
        else:
            if entry.giver not in candidates or entry.giver == refused:
                entry.giver = min(candidates, key=lambda index: self._burden(index, entry, refused))
            mesh = self._pipelines[entry.giver].workers[worker.stage].mesh
            self._answer(worker, number, {"pipeline": entry.giver, "mesh": mesh})

    def _burden(self, index: int, joiner: _Pipeline, refused: int) -> tuple[bool, int, int]:
        """Whoever gives to fewest others is asked; equal ones in turn."""
        others = sum(entry.giver == index and entry.state == "away" for entry in self._pipelines)
        return index == refused, others, (index - joiner.index - joiner.generation) % len(self._pipelines)

    def _refreshed(self, worker: _Worker, number: int, message: Message, now: float) -> None:
        if self._pipelines[worker.pipeline].state == "live":
            self._welcome(worker, number)
            return
        worker.refreshed = True
        self._wait(worker, number, "refreshed", now, lambda: self._missing_of(worker.pipeline))
        self._admit(now)

    def _admit(self, now: float) -> None:
        """Takes whole pipelines in again, but never between two segments: all who are live must have begun the newest,
        and none of its final averages."""
        if self._is_over():
            for worker, number, _ in list(self._asking("giver", "refreshed", "hello")):
                self._fail(worker, number, "over", _OVER)
            return
        if self._stopped is not None or self._range[0] < 0 or self._closing == self._range[0]:
            return
        if any(worker.segment != self._range[0] for worker in self._live_workers()):
            return
        for entry in self._pipelines:
            if entry.state == "away" and self._whole(entry):
                self._take_in(entry, now)

    def _whole(self, entry: _Pipeline) -> bool:
        assert self._rules is not None
        return len(entry.workers) == self._rules.stages and all(
            worker.refreshed and not worker.silent for worker in entry.workers.values()
        )

    def _take_in(self, entry: _Pipeline, now: float) -> None:
        assert self._shares is not None
        k = self._shares.next_k(entry.index)
        entry.state, entry.why, entry.giver = "live", "", None
        entry.segment, entry.tickets = -1, {}
        self.notes.append(f"pipeline {entry.index} is live again (generation {entry.generation})")
        for other in self._others(entry):
            mesh = entry.workers[other.stage].mesh
            news = {"type": "joined", "pipeline": entry.index, "g": entry.generation, "mesh": mesh}
            self._push(news, [other])
        self._shares.joined(entry.index, k)
        for worker in entry.workers.values():
            worker.segment, worker.refreshed = self._range[0], False
            for number in [number for number, ask in worker.asks.items() if ask.kind == "refreshed"]:
                self._welcome(worker, number)
        self._schedule(Joined(entry.index), now)

    def _is_over(self) -> bool:
        """Whether all who were live have finished."""
        states = {entry.state for entry in self._pipelines}
        return self._started and "finished" in states and "live" not in states

    # --- who is waited for

    def _expire(self, now: float) -> None:
        """Fails what has waited for too long."""
        for worker, number, ask in list(self._asking()):
            if now >= ask.deadline and number in worker.asks:
                text = f"waited {worker.timeout_s:g} s ({ask.kind}) for {ask.missing()}"
                self._fail(worker, number, "timeout", text)
        self._expire_at = min((ask.deadline for _, _, ask in self._asking()), default=float("inf"))

    def _missing_at_start(self) -> str:
        assert self._rules is not None
        coming = [entry for entry in self._pipelines if entry.state == "coming"]
        stages = range(self._rules.stages)
        return _listed((stage, entry.index) for entry in coming for stage in stages if stage not in entry.workers)

    def _missing_in_round(self, stage: int) -> str:
        return _listed((stage, index) for index in self.live if (stage, index) not in self._rounds)

    def _missing_in_gather(self, name: Any, key: str) -> str:
        assert self._rules is not None
        places = [divmod(rank, self._rules.stages) for rank in self._gathers.missing(name)]
        return f"{_listed((stage, index) for index, stage in places)} to give {key!r}"

    def _missing_of(self, pipeline: int) -> str:
        assert self._rules is not None
        workers = self._pipelines[pipeline].workers
        ready = {stage for stage, worker in workers.items() if worker.refreshed and not worker.silent}
        missing = [(stage, pipeline) for stage in range(self._rules.stages) if stage not in ready]
        return _listed(missing) if missing else "the others to begin the next segment"

    # --- who is who

    def _rank(self, worker: _Worker) -> int:
        assert self._rules is not None
        return worker.pipeline * self._rules.stages + worker.stage

    def _live_workers(self) -> Iterator[_Worker]:
        for entry in self._pipelines:
            if entry.state == "live":
                yield from (worker for worker in entry.workers.values() if not worker.gone)

    def _others(self, entry: _Pipeline) -> Iterator[_Worker]:
        return (worker for worker in self._workers.values() if worker.pipeline != entry.index)

    def _asking(self, *kinds: str) -> Iterator[tuple[_Worker, int, _Ask]]:
        """Every question that waits for its answer, of these kinds or of all."""
        for worker in self._workers.values():
            for number, ask in worker.asks.items():
                if not kinds or ask.kind in kinds:
                    yield worker, number, ask


_OVER = "the job is over: the other pipelines finished it while this one was away"


def _group_rules(rules: JobRules) -> Rules:
    """The scheduler's part of the rules; a synchroniser that forms no groups ("none") still has final averages."""
    try:
        return Rules(
            policy="partial" if rules.policy == "none" else rules.policy,  # type: ignore[arg-type]
            max_group=rules.max_group,
            connect_within=rules.connect_within,
            wait=rules.wait,  # type: ignore[arg-type]
            seed=rules.seed,
        )
    except (ValueError, TypeError) as error:
        raise Malformed(f"rules: {error}") from error


def _listed(places: Iterable[tuple[int, int]]) -> str:
    """(stage, pipeline) pairs in words, at most eight of them."""
    names = [f"stage {stage} of pipeline {pipeline}" for stage, pipeline in places]
    more = [f"{len(names) - 8} more"] if len(names) > 8 else []
    return ", ".join(names[:8] + more) or "nobody"


def _field(message: Message, name: str, kind: type[T] | tuple[type[T], ...]) -> T:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise Malformed(f"{message.get('type')!s:.40} with {name} = {value!r:.60}")
    return value
