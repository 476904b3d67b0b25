"""A job whose rules are known: what the Director answers to each of its workers' messages, and what the others hear.

message ──► handler ──► Roll, Shares, GroupScheduler, Gathers decide ──► Post: answers and news
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pipeline.coordination.gather import WAITING, Asker, Complete, FirstValues, Gathers, Name, objection
from pipeline.coordination.groups.events import Final, Form, Joined, Left, Ready, Tick
from pipeline.coordination.groups.scheduler import GroupScheduler
from pipeline.coordination.membership import Pipeline, Roll, Worker, listed
from pipeline.coordination.messages import JobRules, Malformed, Message, field_of
from pipeline.coordination.replies import NEVER, Outgoing, Post
from pipeline.coordination.work_queue import Shares

ALONE = -1  # the round of a group that nobody formed
SCOPES = ("stage", "pipeline", "all", "last")
OVER = "the job is over: the other pipelines finished it while this one was away"
STRANGER = "another incarnation of this process has taken its place, or it never said hello"
_FENCED_MAY = ("ticket", "first", "bye")  # even with an old generation
PATIENCE = 10  # heartbeat timeouts that the last pipelines may be silent


class Job:
    """A job whose rules are known."""

    def __init__(self, rules: Message) -> None:
        self.rules = JobRules.from_message(rules)
        self.roll = Roll(self.rules, rules)
        self.notes: list[str] = []
        self._post = Post()
        self._shares = Shares(self.rules.pipelines, even=self.rules.even)
        self._gathers = Gathers(self.rules.stages)
        self._first = FirstValues()
        self._scheduler: GroupScheduler | None = None  # since the start
        self._wake_at = NEVER  # the scheduler has nothing to do before that
        self._look_at = NEVER  # nobody is silent for too long before that
        self.stopped: str | None = None  # too few are left
        self._range = (-1, 0, 0)  # segment, first ticket, stop
        self._closing = -1  # the segment whose final averages have begun
        self._rounds: dict[tuple[int, int], tuple[Worker, int]] = {}  # (stage, pipeline) -> who waits for a group
        self._handlers: Mapping[str, Callable[[Worker, int, Message, float], None]] = {
            "ready": self._ready,
            "ticket": self._ticket,
            "final": self._final,
            "begin": self._begin,
            "gather": self._gather,
            "first": self._first_value,
            "giver": self._giver,
            "refreshed": self._refreshed,
            "suspect": self._suspect,
            "tell": self._tell,
            "bye": self._bye,
        }

    # --- in

    def handle(self, worker_id: bytes, message: Message, now: float) -> Outgoing:
        kind, post = message.get("type"), self._post
        worker = self.roll.workers.get(worker_id)
        if worker is None:
            return [turn_away(worker_id, message)]
        worker.heard = now
        if worker.silent:
            self._speaks_again(worker, now)
        pipeline = self.roll.pipelines[worker.pipeline]
        old = field_of(message, "g", int) < pipeline.generation
        if "a" in message:
            post.acknowledged(worker, field_of(message, "a", int))
        if kind == "ping":
            post.send(worker_id, {"type": "pong"})
            if old:
                post.push(pipeline.fence(), [worker])
            return post.taken()
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        if handler is None:
            raise Malformed(f"unknown type {str(kind)[:40]!r}")
        number = field_of(message, "n", int)
        if post.repeated(worker, number):
            pass
        elif old and kind not in _FENCED_MAY:
            self._fail(worker, number, "fenced", pipeline.why)
        elif self.stopped is not None and kind != "bye":
            self._fail(worker, number, "too few", self.stopped)
        else:
            if "done" in message and pipeline.state == "live":
                self._shares.done(pipeline.index, field_of(message, "done", int), now)
            handler(worker, number, message, now)
        return post.taken()

    def tick(self, now: float) -> Outgoing:
        if now >= self._wake_at:
            self._wake_at = NEVER
            self._schedule(Tick(), now)
        if now >= self._look_at:
            self._look(now)
        if now >= self._post.expire_at:
            for worker, expired in self._post.expire(self.roll.asking(), now):
                self._gathers.withdraw(Asker(worker, expired))
        return self._post.taken()

    def lost(self, index: int, reason: str, now: float, incarnation: int | None) -> Outgoing:
        if 0 <= index < self.rules.pipelines:
            pipeline = self.roll.pipelines[index]
            if incarnation is None or incarnation >= pipeline.incarnation:
                for worker in pipeline.workers.values():
                    worker.silent = True
                self._lose(pipeline, reason, now)
        return self._post.taken()

    @property
    def next_wake(self) -> float:
        return min(self._wake_at, self._look_at, self._post.expire_at)

    def _fail(self, worker: Worker, number: int, error: str, text: str) -> None:
        self._gathers.withdraw(Asker(worker, number))
        self._post.fail(worker, number, error, text, self.roll.pipelines[worker.pipeline].generation)

    # --- the start

    def hello(self, worker_id: bytes, message: Message, now: float) -> Outgoing:
        number, stage, index = (field_of(message, name, int) for name in ("n", "stage", "pipeline"))
        incarnation, mesh = field_of(message, "incarnation", int), field_of(message, "mesh", str)
        timeout_s, rules = field_of(message, "timeout", float), field_of(message, "rules", dict)
        if not 0 < timeout_s < NEVER:
            raise Malformed(f"hello with timeout = {timeout_s}")
        known = self.roll.workers.get(worker_id)
        if known is not None and self._post.repeated(known, number):
            return self._post.taken()
        refusal = self.roll.objection(rules, stage, index, incarnation, known=known is not None)
        if refusal is not None:
            error, text = refusal
            return [(worker_id, {"n": number, "error": error, "text": text})]
        pipeline = self.roll.pipelines[index]
        if incarnation > pipeline.incarnation:
            self._renew(pipeline, incarnation, now)
        worker = Worker(worker_id, index * self.rules.stages + stage, stage, index, mesh, timeout_s, now)
        self.roll.enter(worker)
        self._look_at = min(self._look_at, now + self.rules.heartbeat_timeout_s)
        self._post.ask(worker, number, "hello", now, self.roll.missing_at_start)
        if self.stopped is not None:
            self._fail(worker, number, "too few", self.stopped)
        elif self._scheduler is not None:
            self._welcome(worker, number)
            self._admit(now)
        else:
            self._start()
        return self._post.taken()

    def _renew(self, pipeline: Pipeline, incarnation: int, now: float) -> None:
        """A pipeline's processes were started again."""
        if pipeline.state == "live":
            self._lose(pipeline, f"its processes were started again (incarnation {incarnation})", now)
        else:
            pipeline.generation += 1
        for worker in pipeline.workers.values():
            for asked in list(worker.asks):
                self._fail(worker, asked, "replaced", STRANGER)
        self.roll.renew(pipeline, incarnation)
        pipeline.state = "coming" if self._scheduler is None else "away"

    def _start(self) -> None:
        """Begins the job when everybody is there who still can come."""
        coming = self.roll.of("coming")
        if not all(map(self.roll.complete, coming)) or not self._enough():
            return
        for pipeline in coming:
            pipeline.state = "live"
        for pipeline in self.roll.of("away"):
            self._shares.left(pipeline.index)
        rules = self.rules
        self._scheduler = GroupScheduler(
            rules.stages, rules.pipelines, rules.groups, hosts=rules.hosts, live=self.roll.live
        )
        for worker, number, _ in self.roll.asking("hello"):
            self._welcome(worker, number)

    def _welcome(self, worker: Worker, number: int) -> None:
        next_k = self._shares.next_k(worker.pipeline)
        self._post.answer(worker, number, self.roll.welcome(worker, segment=self._range[0], next_k=next_k))

    # --- who is alive

    def _look(self, now: float) -> None:
        """Finds the silent ones; with more patience if too few would be left, since that would be the job's end."""
        timeout_s, spared = self.rules.heartbeat_timeout_s, False
        for worker in self.roll.silent_at(now):
            pipeline = self.roll.pipelines[worker.pipeline]
            if pipeline.state not in ("live", "coming"):
                continue
            last = len(self.roll.of("coming", "live", "finished")) <= self.rules.min_replicas
            if last and now < worker.heard + PATIENCE * timeout_s:
                worker.silent, spared = False, True
            else:
                self._lose(pipeline, f"stage {worker.stage} was silent for {now - worker.heard:.3g} s", now)
        self._look_at = max(self.roll.look_at, now + timeout_s / 4) if spared else self.roll.look_at

    def _speaks_again(self, worker: Worker, now: float) -> None:
        worker.silent = False
        self._look_at = min(self._look_at, now + self.rules.heartbeat_timeout_s)
        self._admit(now)

    def _suspect(self, worker: Worker, number: int, message: Message, now: float) -> None:
        index = field_of(message, "pipeline", int)
        if not 0 <= index < self.rules.pipelines:
            raise Malformed(f"suspects pipeline {index}")
        self._post.answer(worker, number, {})
        suspected, sure = self.roll.pipelines[index], self.roll.pipelines[worker.pipeline].state == "live"
        if sure and index != worker.pipeline and suspected.state == "live":
            self._lose(suspected, f"its connection to pipeline {worker.pipeline} broke (stage {worker.stage})", now)

    def _lose(self, pipeline: Pipeline, why: str, now: float) -> None:
        """Declares a pipeline lost: the others go on, and what it said until now no longer counts."""
        if pipeline.state == "finished":
            return
        before = pipeline.lose(why)
        self._post.push(pipeline.fence(), pipeline.workers.values())
        self._abandon(pipeline)
        if before == "away":  # on its way back: it begins again
            return
        self.notes.append(pipeline.why)
        if not self._enough():
            return
        if before == "live":
            self._bury(pipeline, now)
        else:
            self._start()
        self._admit(now)

    def _abandon(self, pipeline: Pipeline) -> None:
        """What a lost pipeline waits for fails, but for its welcome."""
        for worker in pipeline.workers.values():
            worker.refreshed = False
            self._rounds.pop((worker.stage, worker.pipeline), None)
            for number in [number for number, ask in worker.asks.items() if ask.kind != "hello"]:
                self._fail(worker, number, "fenced", pipeline.why)

    def _bury(self, pipeline: Pipeline, now: float) -> None:
        """Tells the others, and lets them go on."""
        news = {"type": "lost", "pipeline": pipeline.index, "g": pipeline.generation, "text": pipeline.why}
        self._post.push(news, self.roll.others(pipeline))
        self._shares.left(pipeline.index)
        self._schedule(Left(pipeline.index), now)
        self._complete(self._gathers.left(worker.rank for worker in pipeline.workers.values()))

    def _enough(self) -> bool:
        """Whether enough pipelines are left; otherwise the job stops."""
        too_few = self.roll.too_few()
        if self.stopped is None and too_few is not None:
            self.stopped = too_few
            self.notes.append(self.stopped)
            self._post.push({"type": "stop", "text": self.stopped}, self.roll.workers.values())
            for worker, number, _ in self.roll.asking():
                self._fail(worker, number, "too few", self.stopped)
        return self.stopped is None

    def _bye(self, worker: Worker, number: int, message: Message, now: float) -> None:
        self._post.answer(worker, number, {})
        worker.gone = True
        self._complete(self._gathers.left([worker.rank]))
        pipeline = self.roll.pipelines[worker.pipeline]
        if pipeline.state == "live" and all(other.gone for other in pipeline.workers.values()):
            pipeline.state = "finished"
            self._shares.left(pipeline.index)
            self._schedule(Left(pipeline.index), now)
        self._admit(now)

    # --- who does which batch

    def _begin(self, worker: Worker, number: int, message: Message, now: float) -> None:
        segment, first, stop = (field_of(message, name, int) for name in ("segment", "first", "stop"))
        if self.roll.pipelines[worker.pipeline].state != "live":
            self._post.answer(worker, number, {})  # it will be told where to go on
            return
        if segment == self._range[0] and (segment, first, stop) != self._range:
            known = f"[{self._range[1]}, {self._range[2]})"
            self._fail(worker, number, "refused", f"segment {segment} is {known}, not [{first}, {stop})")
            return
        if segment > self._range[0]:
            self._first.keep({segment, self._range[0], *(other.segment for other in self.roll.workers.values())})
            self._range = (segment, first, stop)
            self._shares.begin(segment, first, stop)
        worker.segment = segment
        self._post.answer(worker, number, {})
        self._admit(now)

    def _ticket(self, worker: Worker, number: int, message: Message, now: float) -> None:
        """Stages agree even when their pipeline was lost meanwhile: what one was told, all are told."""
        segment, k = field_of(message, "segment", int), field_of(message, "k", int)
        pipeline = self.roll.pipelines[worker.pipeline]
        if segment > self._range[0]:
            self._fail(worker, number, "refused", f"nobody has begun segment {segment}")
            return
        if pipeline.state == "live" and segment == self._range[0]:
            try:
                ticket = self._shares.ask(pipeline.index, k, now)
            except ValueError as error:
                self._fail(worker, number, "refused", str(error))
                return
            pipeline.keep(segment, k, ticket)
            more = self._shares.ahead(pipeline.index, k)
        else:
            ticket = pipeline.tickets.get(k) if segment == pipeline.segment else None
            more = []
        self._post.answer(worker, number, {"ticket": ticket, "more": more})

    # --- who averages with whom

    def _ready(self, worker: Worker, number: int, message: Message, now: float) -> None:
        step, scope = field_of(message, "step", int), field_of(message, "scope", str)
        index = worker.pipeline
        if self.roll.pipelines[index].state != "live":
            reason = f"pipeline {index} is not whole"
            self._post.answer(worker, number, {"round": ALONE, "members": [index], "reason": reason})
        else:
            self._join_round(worker, number, Ready(worker.stage, index, step, scope), now)

    def _final(self, worker: Worker, number: int, message: Message, now: float) -> None:
        """`attempt` tells one final average of a segment from the next, for whoever reads the messages."""
        segment, _ = field_of(message, "segment", int), field_of(message, "attempt", int)
        pipeline = self.roll.pipelines[worker.pipeline]
        if pipeline.state != "live":
            self._fail(worker, number, "fenced", pipeline.why)
        elif segment < self._range[0]:
            self._fail(worker, number, "fenced", f"the others have finished segment {segment}")
        else:
            self._join_round(worker, number, Final(worker.stage, worker.pipeline), now)

    def _join_round(self, worker: Worker, number: int, event: Ready | Final, now: float) -> None:
        place = (worker.stage, worker.pipeline)
        if place in self._rounds:
            self._fail(worker, number, "refused", f"{listed([place])} already waits for a group")
            return
        self._rounds[place] = (worker, number)
        kind = "ready" if isinstance(event, Ready) else "final"
        self._post.ask(worker, number, kind, now, lambda: self._missing_in_round(worker.stage))
        try:
            self._schedule(event, now)
        except ValueError as error:  # an unknown scope
            del self._rounds[place]
            self._fail(worker, number, "refused", str(error))

    def _missing_in_round(self, stage: int) -> str:
        return listed((stage, index) for index in self.roll.live if (stage, index) not in self._rounds)

    def _schedule(self, event: Ready | Final | Left | Joined | Tick, now: float) -> None:
        """Lets the scheduler decide and carries its decisions out."""
        assert self._scheduler is not None, "nobody is live before the start"
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
            worker, number = self._rounds.pop((form.stage, member))
            if number in worker.asks:  # else its time limit has passed
                self._post.answer(worker, number, {"round": form.round, "members": members, "reason": form.reason})

    # --- one answer for all

    def _gather(self, worker: Worker, number: int, message: Message, now: float) -> None:
        key, scope, fold = (field_of(message, name, str) for name in ("key", "scope", "fold"))
        if scope not in SCOPES or "value" not in message:
            raise Malformed(f"a gather needs a value and a scope of {', '.join(SCOPES)}")
        pipeline = self.roll.pipelines[worker.pipeline]
        if (wrong := objection(fold, message["value"])) is not None:
            self._fail(worker, number, "refused", wrong)
            return
        if scope != "pipeline" and pipeline.state != "live":
            self._fail(worker, number, "fenced", pipeline.why)
            return
        place = {"stage": (worker.stage,), "pipeline": (pipeline.index, pipeline.generation)}.get(scope, ())
        name = Name(scope, place, key, fold)
        members = (other.rank for other in self.roll.scope(worker, scope))
        complete = self._gathers.ask(name, Asker(worker, number), worker.rank, message["value"], members)
        self._post.ask(worker, number, "gather", now, lambda: self._missing_in_gather(name))
        if complete is not None:
            self._complete([complete])
        elif len(waiting := [asked for asked, ask in worker.asks.items() if ask.kind == "gather"]) > WAITING:
            text = f"{WAITING} later questions wait as well for {worker.asks[waiting[0]].missing()}"
            self._fail(worker, waiting[0], "timeout", text)

    def _missing_in_gather(self, name: Name) -> str:
        return f"{self.roll.named(self._gathers.missing(name))} to give {name.key!r}"

    def _complete(self, gathers: Iterable[Complete]) -> None:
        """Answers all who wait for these gathers."""
        for _, value, receiver, rows, askers in gathers:
            for asker, rank in askers:
                worker, number = asker
                assert isinstance(worker, Worker)
                answer = {"rows": list(rows.items())} if rank == receiver else {"value": value}
                if number in worker.asks:
                    self._post.answer(worker, number, answer)

    def _first_value(self, worker: Worker, number: int, message: Message, now: float) -> None:
        if "value" not in message:
            raise Malformed("first without a value")
        segment, key = field_of(message, "segment", int), field_of(message, "key", str)
        self._post.answer(worker, number, {"value": self._first.give(segment, key, message["value"])})

    def _tell(self, worker: Worker, number: int, message: Message, now: float) -> None:
        """Passes a value on to the one that speaks: the last stage of the first pipeline that is live."""
        if "value" not in message:
            raise Malformed("tell without a value")
        self._post.answer(worker, number, {})
        if self.roll.live:
            speaker = self.roll.pipelines[min(self.roll.live)].workers[self.rules.stages - 1]
            self._post.push({"type": "told", "value": message["value"]}, [speaker])

    # --- the way back

    def _giver(self, worker: Worker, number: int, message: Message, now: float) -> None:
        """Names whom to copy from: the same for all stages of a pipeline, but not `not_from` if there is another."""
        pipeline, refused = self.roll.pipelines[worker.pipeline], field_of(message, "not_from", int)
        candidates = [index for index in self.roll.live if index != pipeline.index]
        if self._is_over:
            self._fail(worker, number, "over", OVER)
        elif not candidates:
            self._fail(worker, number, "too few", f"no other replica of stage {worker.stage} is live to copy from")
        else:
            giver = self.roll.choose_giver(pipeline, candidates, refused)
            mesh = self.roll.pipelines[giver].workers[worker.stage].mesh
            self._post.answer(worker, number, {"pipeline": giver, "mesh": mesh})

    def _refreshed(self, worker: Worker, number: int, message: Message, now: float) -> None:
        pipeline = self.roll.pipelines[worker.pipeline]
        if pipeline.state == "live":
            self._welcome(worker, number)
            return
        worker.refreshed = True
        self._post.ask(worker, number, "refreshed", now, lambda: self.roll.missing_of(pipeline))
        self._admit(now)

    def _admit(self, now: float) -> None:
        """Takes whole pipelines in again, but never between two segments.

        All who are live must have begun the newest segment, and none of its final averages: whoever joins then takes
        part in all that is still to come of it, and in nothing that others have had without it.
        """
        if self._is_over:
            for worker, number, _ in self.roll.asking("giver", "refreshed", "hello"):
                self._fail(worker, number, "over", OVER)
            return
        segment = self._range[0]
        if self.stopped is not None or segment < 0 or segment == self._closing:
            return
        returning = [pipeline for pipeline in self.roll.of("away") if self.roll.whole(pipeline)]
        if returning and all(worker.segment == segment for worker in self.roll.live_workers()):
            for pipeline in returning:
                self._take_in(pipeline, now)

    def _take_in(self, pipeline: Pipeline, now: float) -> None:
        pipeline.take_in()
        self.notes.append(f"pipeline {pipeline.index} is live again (generation {pipeline.generation})")
        news = {"type": "joined", "pipeline": pipeline.index, "g": pipeline.generation}
        for other in self.roll.others(pipeline):
            self._post.push({**news, "mesh": pipeline.workers[other.stage].mesh}, [other])
        self._shares.joined(pipeline.index, self._shares.next_k(pipeline.index))
        for worker in pipeline.workers.values():
            worker.segment, worker.refreshed = self._range[0], False
            for number in [number for number, ask in worker.asks.items() if ask.kind == "refreshed"]:
                self._welcome(worker, number)
        self._schedule(Joined(pipeline.index), now)

    @property
    def _is_over(self) -> bool:
        """Whether all who were live have finished."""
        return self._scheduler is not None and not self.roll.live and bool(self.roll.of("finished"))


def turn_away(worker_id: bytes, message: Message) -> tuple[bytes, Message]:
    """What a process of an older incarnation is told."""
    if message.get("type") == "ping":
        return worker_id, {"type": "replaced", "text": STRANGER}
    return worker_id, {"n": field_of(message, "n", int), "error": "replaced", "text": STRANGER}
