"""A worker's line to the coordinator: questions out, futures back, and news of the other pipelines.

    caller                 client thread                          coordinator
      ready(step) ──────────► DEALER ──► {"type":"ready","n":7,"g":0,...} ──►
      future.result() ◄────── Future 7 ◄── {"n":7,"round":41,"members":[0,2],...} ◄──
      on_lost(1, 1)  ◄─────────────────◄── {"type":"lost","pipeline":1,"g":1,...} ◄──
                              ping every heartbeat_timeout / 4 ──►  ◄── pong

Unanswered questions are sent again after every new connection, and the coordinator answers each once, so that a cut
cable loses nothing. Its end is known at once when its port refuses connections; its silence is borne for a while.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import zmq

from pipeline.coordination.answers import Answer
from pipeline.coordination.keys import curve_keys
from pipeline.coordination.line import Line
from pipeline.coordination.messages import JobRules, Message, T
from pipeline.coordination.questions import Call, Replaced, Welcome, gathered
from pipeline.core.group import Group
from pipeline.errors import CoordinatorLost, Fenced, TooFewReplicas

FRAME_BYTES = 1 << 20  # the coordinator takes no longer message
PAUSE_S = 0.5  # oversleeping by more than that means that this process was frozen, not the coordinator
FAREWELL_S = 2.0
GRACE_S = 30.0  # beyond every other limit, for a thread that would say why
PATIENCE_S = 10.0  # the least silence of the coordinator that is taken for its end

_encode = json.JSONEncoder(separators=(",", ":")).encode
_SURVIVE_A_FENCE = ("hello", "ticket", "first", "bye")

_NEWS: Mapping[str, Mapping[str, type]] = {  # what comes unasked, and what it must hold
    "pong": {},
    "lost": {"pipeline": int, "g": int},
    "joined": {"pipeline": int, "g": int, "mesh": str},
    "fenced": {"g": int, "text": str},
    "told": {"value": object},
    "stop": {"text": str},
    "replaced": {"text": str},
}


def _ignore(pipeline: int, generation: int) -> None:
    pass


class Client:
    """One worker's connection; its methods may be called by any thread. A process may have many.

    Futures fail with `Fenced` (this pipeline was declared lost: copy from `giver()`, then call `refreshed()`),
    `CoordinatorLost`, `TooFewReplicas`, `PeerLate` (which names who is missing), `JobOver`, `Replaced` or, for a
    call that makes no sense, `ValueError`. No wait for them is without end, whatever becomes of the thread.

    Args:
        address: the coordinator's, "host:port".
        key: the job's.
        incarnation: how many times this process has been started again.
        mesh_address: where the replicas of this stage reach it.
        timeout_s: how long a question may wait for others.
        on_lost, on_joined: called with (pipeline, its new generation), on the client's thread, before any answer that
            takes it into account; `on_lost` also with the own pipeline. They must not wait.
        patience_s: silence of the coordinator after which it is lost; default 5 heartbeat timeouts, at least 10 s.
    """

    def __init__(
        self,
        address: str,
        key: bytes,
        rules: JobRules,
        *,
        stage: int,
        pipeline: int,
        incarnation: int = 0,
        mesh_address: str = "",
        timeout_s: float = 300.0,
        on_lost: Callable[[int, int], None] = _ignore,
        on_joined: Callable[[int, int], None] = _ignore,
        patience_s: float | None = None,
    ) -> None:
        self.stage, self.pipeline, self.incarnation = stage, pipeline, incarnation
        self.generation = 0
        self.fenced = False  # from the declaration until the pipeline is live again
        self.live: tuple[int, ...] = ()
        self.peers: Mapping[int, str] = {}
        self.generations: Mapping[int, int] = {}
        self._address, self._rules = address, rules
        self._mesh, self._timeout_s = mesh_address, timeout_s
        self._on_lost, self._on_joined = on_lost, on_joined
        self._ping_s = rules.heartbeat_timeout_s / 4
        self._patience_s = patience_s or max(PATIENCE_S, 5 * rules.heartbeat_timeout_s)
        # the coordinator answers within `timeout_s`, once this thread has found it or given it up
        self._longest_s = timeout_s + self._patience_s + GRACE_S
        self._server_key, self._keys = curve_keys(key, "server").public, curve_keys(key, "client")
        self._lock = threading.Lock()
        self._asked = 0
        self._calls: dict[int, Call] = {}
        self._outbox: deque[bytes] = deque()
        self._rung = False  # whether the thread has been told that there is something to send
        self._failure: Callable[[], Exception] | None = None  # what all questions fail with from now on
        self._closed = False
        self._ended = False  # the thread
        self._complained = False
        self._giver: int | None = None
        self._told: list[Any] = []
        self._granted: dict[tuple[int, int], int] = {}  # (segment, k) -> ticket, not asked for yet
        self._done: int | None = None  # the last batch that is through, if the coordinator is not told yet
        self._wake_end, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="coordination", daemon=True)

    @property
    def failure(self) -> Exception | None:
        """What everything asked from now on fails with, if it does."""
        failure = self._failure
        return None if failure is None else failure()

    # --- questions

    def hello(self) -> Welcome:
        """Takes part: returns when all workers of the job are there, or were lost; late, it returns at once.

        Raises:
            UserError: this worker's rules are not those of the others.
            PeerLate: somebody did not come in time.
            CoordinatorLost: it cannot be reached, or this process has no means left to reach it.
        """
        fields = {
            "stage": self.stage,
            "pipeline": self.pipeline,
            "incarnation": self.incarnation,
            "mesh": self._mesh,
            "timeout": float(self._timeout_s),
            "rules": self._rules.message(),
        }
        future = self._ask("hello", fields, self._welcomed)
        self._thread.start()
        return future.result()

    def begin(self, segment: int, first: int, stop: int) -> None:
        """The segment's tickets are [first, stop); every worker says so, the first one counts."""
        self._note("begin", {"segment": segment, "first": first, "stop": stop})

    def ticket(self, segment: int, k: int) -> Future[int | None]:
        """The ticket of this pipeline's k-th batch; None: its segment ends at k. Some come unasked, ahead of time."""
        with self._lock:
            given = self._granted.pop((segment, k), None)
        if given is None:
            return self._ask("ticket", {"segment": segment, "k": k}, partial(self._ticketed, segment, k))
        known: Future[int | None] = Future()
        known.set_result(given)
        return known

    def done(self, k: int) -> None:
        """This pipeline's batches up to `k` are through; stage 0 says so. Leaves with its next question."""
        with self._lock:
            self._done = k

    def ready(self, step: int, scope: str = "") -> Future[Group]:
        """Asks for a group to average with; a pipeline that is not whole stays alone."""
        return self._ask("ready", {"step": step, "scope": scope}, self._formed)

    def final(self, segment: int, attempt: int = 0) -> Future[Group]:
        """All live replicas of this stage, when all have drained; the next attempt after a member was lost."""
        return self._ask("final", {"segment": segment, "attempt": attempt}, self._formed)

    def gather(self, key: str, value: Any, scope: str, fold: str) -> Future[Any]:
        """What the values of all live members of the scope come to; the same for all of them.

        Args:
            fold: "nothing" (all have come), "all", "any", "sum" (of numbers by name), "given" (the only value that is
                not None). With "rows to first" or "rows to speaker" one of them gets the values by worker rank, the
                others None: the first rank, or the last stage of the first pipeline.
            scope: "stage" (its replicas), "pipeline" (its stages), "all", or "last" (the last stage's replicas; others
                may listen, their value does not count).
        """
        return self._ask("gather", {"key": key, "value": value, "scope": scope, "fold": fold}, gathered)

    def first(self, key: str, value: Any, segment: int = -1) -> Future[Any]:
        """The value of whoever was the first to give one; forgotten when the segment is over (-1, the start, never)."""
        return self._ask("first", {"key": key, "value": value, "segment": segment}, lambda answer: answer["value"])

    def tell(self, value: Any) -> None:
        """Sends a JSON-able value to whoever speaks: the last stage of the first live pipeline. Nobody waits for it."""
        self._note("tell", {"value": value})

    def told(self) -> list[Any]:
        """What others have told this worker since the last call."""
        with self._lock:
            told, self._told = self._told, []
        return told

    def giver(self) -> Future[tuple[int, str]]:
        """A live replica of this stage to copy from, and its mesh address; called again, another one if there is."""
        refused = -1 if self._giver is None else self._giver
        return self._ask("giver", {"not_from": refused}, self._given)

    def refreshed(self) -> Future[Welcome]:
        """This worker has copied; answered when its whole pipeline has and is live again."""
        return self._ask("refreshed", {}, self._welcomed)

    def suspect(self, pipeline: int) -> None:
        """Its connection broke: it is to be declared lost."""
        self._note("suspect", {"pipeline": pipeline})

    def bye(self) -> None:
        """Takes no part any more; returns when the coordinator knows, or is gone."""
        with suppress(Exception):  # the job is over either way
            self._ask("bye", {}, lambda answer: None).result(FAREWELL_S)

    def close(self) -> None:
        """Ends the connection; questions that still wait fail."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ring()
        if self._thread.ident is None:  # never started
            self._dispose()
        else:
            self._thread.join(GRACE_S)

    def _ask(self, kind: str, fields: Message, decode: Callable[[Message], T]) -> Future[T]:
        future: Future[T] = Answer(self._longest_s, f"the coordinator's answer ({kind})")
        with self._lock:
            failure = self._failure
            if failure is None and self._closed:
                failure = _closed
            if failure is None or (kind == "bye" and not self._ended):
                acked = self._acked()
                self._asked += 1
                message = {"type": kind, "n": self._asked, "g": self.generation, "a": acked, **fields}
                if self._done is not None:
                    message["done"], self._done = self._done, None
                payload = _encode(message).encode()
                if len(payload) > FRAME_BYTES:
                    raise ValueError(f"{kind} of {len(payload)} bytes; the coordinator takes {FRAME_BYTES}")
                self._calls[self._asked] = Call(kind, self.generation, payload, future, decode)
                self._outbox.append(payload)
                if not self._rung:
                    self._rung = True
                    self._ring()
                failure = None
        if failure is not None:
            future.set_exception(failure())
        return future

    def _acked(self) -> int:
        """All questions with smaller numbers are answered; to be called with the lock held."""
        return next(iter(self._calls), self._asked + 1)

    def _ping(self) -> Message:
        with self._lock:
            return {"type": "ping", "g": self.generation, "a": self._acked()}

    def _note(self, kind: str, fields: Message) -> None:
        """A question whose answer nobody waits for; a refusal is a mistake that ends this client."""
        self._ask(kind, fields, lambda answer: None).add_done_callback(self._check_note)

    def _check_note(self, future: Future[None]) -> None:
        error = future.exception()
        if type(error) is ValueError:
            self._fail(lambda: ValueError(*error.args))

    def _ring(self) -> None:
        """Wakes the thread; to be called with the lock held."""
        with suppress(BlockingIOError):  # it is full of rings already
            if self._wake >= 0:
                os.write(self._wake, b"!")

    # --- answers, on the client's thread

    def _welcomed(self, answer: Message) -> Welcome:
        with self._lock:
            self.generation = answer["g"]
            self.fenced = bool(answer["late"])
            self.live = tuple(answer["live"])
            self.generations = dict(enumerate(answer["generations"]))
            self.peers = dict(answer["peers"])
            self._giver = None
            self._granted.clear()
        return Welcome(answer["g"], answer["late"], answer["segment"], answer["k"])

    def _formed(self, answer: Message) -> Group:
        members = tuple(answer["members"])
        generations = {member: self.generations.get(member, 0) for member in members}
        return Group(answer["round"], members, answer["reason"], generations)

    def _ticketed(self, segment: int, k: int, answer: Message) -> int | None:
        with self._lock:
            self._granted.update({(segment, k + 1 + i): ticket for i, ticket in enumerate(answer["more"])})
        return answer["ticket"]  # type: ignore[no-any-return]

    def _given(self, answer: Message) -> tuple[int, str]:
        self._giver = answer["pipeline"]
        return answer["pipeline"], answer["mesh"]

    def _take(self, message: Message) -> None:
        """An answer, or news."""
        number = message.get("n")
        if number is None:
            self._news(message)
            return
        with self._lock:
            call = self._calls.pop(number, None) if isinstance(number, int) else None
        if call is None:
            return  # it came twice, or its future has failed already
        if message.get("error") == "fenced" and isinstance(message.get("g"), int):
            self._fence(message["g"])
        call.settle(message)

    def _news(self, message: Message) -> None:
        kind = message.get("type")
        fields = _NEWS.get(kind) if isinstance(kind, str) else None
        if fields is None or not all(isinstance(message.get(name), type_) for name, type_ in fields.items()):
            self._complain(message)
        elif kind == "lost":
            self._set_generation(message["pipeline"], message["g"], live=False)
            self._on_lost(message["pipeline"], message["g"])
        elif kind == "joined":
            self._set_generation(message["pipeline"], message["g"], live=True, mesh=message["mesh"])
            self._on_joined(message["pipeline"], message["g"])
        elif kind == "fenced":
            self._fence(message["g"], message["text"])
        elif kind == "told":
            with self._lock:
                self._told.append(message["value"])
        elif kind == "stop":
            self._fail(lambda: TooFewReplicas(message["text"]))
        elif kind == "replaced" and not any(call.kind == "hello" for call in self._calls.values()):
            self._fail(lambda: Replaced(message["text"]))

    def _complain(self, message: Any) -> None:
        """Says once that something came that is not understood here."""
        if not self._complained:
            self._complained = True
            sys.stderr.write(f"warning: not understood, from the coordinator: {message!r:.80}\n")

    def _set_generation(self, pipeline: int, generation: int, *, live: bool, mesh: str = "") -> None:
        others = {index: address for index, address in self.peers.items() if index != pipeline}
        with self._lock:
            self.generations = {**self.generations, pipeline: generation}
            self.live = tuple(sorted({*self.live, pipeline} if live else {*self.live} - {pipeline}))
            self.peers = dict(sorted({**others, pipeline: mesh}.items())) if live else others

    def _fence(self, generation: int, text: str = "") -> None:
        """This pipeline was declared lost: what was asked before fails, but for what its stages must agree on."""
        if generation <= self.generation:
            return  # known
        self._set_generation(self.pipeline, generation, live=False)
        with self._lock:
            self.generation, self.fenced, self._giver = generation, True, None
            self._granted.clear()
            stale = [number for number, call in self._calls.items() if call.kind not in _SURVIVE_A_FENCE]
            calls = [self._calls.pop(number) for number in stale if self._calls[number].generation < generation]
        for call in calls:
            call.reject(Fenced(text))
        self._on_lost(self.pipeline, generation)

    def _fail(self, failure: Callable[[], Exception]) -> None:
        """Fails everything that waits, and everything asked from now on."""
        with self._lock:
            self._failure = self._failure or failure
            kept = {number: call for number, call in self._calls.items() if call.kind == "bye"}
            calls = [call for number, call in self._calls.items() if number not in kept]
            self._calls = kept
        for call in calls:
            call.reject(failure())

    # --- the thread

    def _run(self) -> None:
        try:
            self._hold_line()
        except CoordinatorLost as error:
            text = str(error)
            self._fail(lambda: CoordinatorLost(text))
        except BaseException as error:  # a callback's, or ours: whoever waits must know
            cause = error
            self._fail(lambda: _with_cause(cause))
        finally:
            with self._lock:
                self._failure, self._ended = self._failure or _closed, True
                calls, self._calls = list(self._calls.values()), {}
                self._outbox.clear()
            for call in calls:
                call.reject(self._failure())
            self._dispose()

    def _hold_line(self) -> None:
        """Makes the connection and serves it to its end."""
        try:
            line = Line(self._context, self._address, self._identity, self._server_key, self._keys)
        except (zmq.ZMQError, OSError, ValueError) as error:  # no such address, or no file descriptors are left
            raise CoordinatorLost(
                f"no connection to the coordinator at {self._address} can be made: {error}"
            ) from error
        try:
            self._serve(line)
        finally:
            line.close()

    @property
    def _identity(self) -> bytes:
        return b"p%d.s%d.i%d" % (self.pipeline, self.stage, self.incarnation)

    def _dispose(self) -> None:
        self._context.destroy(linger=0)  # also a socket that was half made when files ran out: `term` waits for it
        with self._lock:
            wake, self._wake = self._wake, -1
        os.close(wake)
        os.close(self._wake_end)

    def _serve(self, line: Line) -> None:
        heard = expected = time.monotonic()
        next_ping = heard + self._ping_s
        renewed = heard
        while not self._closed:
            now = time.monotonic()
            if now > expected + PAUSE_S:  # this process stood still
                heard, next_ping = heard + now - expected, now
            renewed = self._mind(line, now, heard, renewed)
            self._flush(line)
            if now >= next_ping:
                line.send(_encode(self._ping()).encode())
                next_ping = now + self._ping_s
            pause_s = max(0.0, next_ping - time.monotonic())
            expected = time.monotonic() + pause_s
            rang = line.wait(self._wake_end, pause_s)
            if rang:
                os.read(self._wake_end, 4096)
            for message in line.receive():
                heard = time.monotonic()
                self._take(message)
            if line.reconnected():
                self._repeat()

    def _flush(self, line: Line) -> None:
        self._rung = False  # whoever asks from here on rings again
        while self._outbox:
            line.send(self._outbox.popleft())

    def _repeat(self) -> None:
        """Everything that waits is asked again, in the same order."""
        with self._lock:
            self._outbox = deque(call.payload for _, call in sorted(self._calls.items()))

    def _mind(self, line: Line, now: float, heard: float, renewed: float) -> float:
        """Looks whether the coordinator is still there; after some silence, renews the connection and says when."""
        if line.broke() and line.refused():
            raise CoordinatorLost(f"the coordinator at {self._address} has ended")
        if line.strange:
            raise CoordinatorLost(f"the coordinator at {self._address} does not know this job's key")
        silence_s = now - heard
        if silence_s >= self._patience_s:
            raise CoordinatorLost(f"the coordinator at {self._address} has been silent for {silence_s:.3g} s")
        if silence_s >= 2 * self._ping_s and now - renewed >= 2 * self._ping_s:
            line.renew()
            self._repeat()
            return now
        return renewed


def _closed() -> Exception:
    return CoordinatorLost("this client of the coordinator is closed")


def _with_cause(cause: BaseException) -> CoordinatorLost:
    error = CoordinatorLost(f"the client of the coordinator failed: {cause!r}")
    error.__cause__ = cause
    return error
