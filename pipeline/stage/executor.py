"""The one interpreter: carries out a program, action by action, on a stage and a transport.

It decides nothing. What is done in which order was written by `schedules.program`; what an action means for the
numbers is the stage's affair; how tensors travel is the transport's. A program read a few actions ahead tells the
transport which messages to expect.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from itertools import islice
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from pipeline.core.actions import Action, Handlers, Op
from pipeline.schedules.orders import Program
from pipeline.stage.gpu_clock import GpuClock
from pipeline.stage.stage import Stage
from pipeline.stage.tied import Tie
from pipeline.transport.protocol import Transport

Tensors = tuple[Tensor, ...]
Inputs = Callable[[int], Tensors]
Targets = Callable[[int], tuple[Tensors, Any]]
Record = Callable[[Action, float, float], object]

LOOK_AHEAD = 6  # actions; a receive that far ahead is posted now


@dataclass(kw_only=True)
class Hooks:
    """What the training loop plugs in: data, the learning rate, and being told about updates.

    inputs: micro-batch -> inputs of the first stage. targets: micro-batch -> (targets, normalisers of its batch), for
    the last stage. learning_rate: update number from 0 -> rate; rate_at, in its place: micro-batch -> rate. updated:
    called after each update with its micro-batch.
    """

    inputs: Inputs | None = None
    targets: Targets | None = None
    learning_rate: Callable[[int], float] = lambda update: 0.0
    rate_at: Callable[[int], float] | None = None
    updated: Callable[[int], object] | None = None
    record: Record | None = None


class Reducer(Protocol):
    """What the executor asks of whoever keeps the gradients of the replicas together."""

    bytes_sent: int

    def open(self) -> None: ...
    def finish(self) -> None: ...


class NoReducer:
    """A single pipeline has nobody to agree with."""

    bytes_sent = 0

    def open(self) -> None:
        return None

    def finish(self) -> None:
        return None


class Mixer(Protocol):
    """Keeps the weights of a stage together with those of its replicas; every method is called once per update."""

    def request(self, rate: float) -> None:
        """Before the backward that leads to an update at this learning rate: asks for partners; returns at once."""

    def wait(self) -> None:
        """After the update: returns when the partners are known."""

    def mix(self) -> None:
        """Changes the newest weights of the stage."""


class NoMixer:
    """A stage whose replicas share gradients, or that has none."""

    def request(self, rate: float) -> None:
        return None

    def wait(self) -> None:
        return None

    def mix(self) -> None:
        return None


@dataclass
class _Mail:
    """Tensors on their way between two actions of this stage, by micro-batch."""

    inputs: dict[int, Tensors] = field(default_factory=dict)
    targets: dict[int, tuple[Tensors, Any]] = field(default_factory=dict)
    outputs: dict[int, Tensors] = field(default_factory=dict)
    gradients: dict[int, Tensors] = field(default_factory=dict)
    input_gradients: dict[int, Tensors] = field(default_factory=dict)

    def left(self) -> dict[str, list[int]]:
        """Micro-batches that nobody has fetched, by book; nothing after a program."""
        books = {each.name: list(getattr(self, each.name)) for each in fields(self)}
        return {name: numbers for name, numbers in books.items() if numbers}


class Executor:
    """Runs programs for stage `position` of `stages`.

    Args:
        mixer: mixes weights with other replicas. guard: held while weights or optimiser state change, so that others
            may copy them. wrap: gives other handlers for training (a simulated straggler). look_ahead: how many actions
            a program is read ahead.
        clock: tells the time of a device that the host runs ahead of, and records in place of `hooks.record`.
    """

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        *,
        position: int,
        stages: int,
        hooks: Hooks,
        reducer: Reducer | None = None,
        tie: Tie | None = None,
        mixer: Mixer | None = None,
        guard: AbstractContextManager[Any] | None = None,
        wrap: Callable[[Handlers], Handlers] | None = None,
        look_ahead: int = LOOK_AHEAD,
        clock: GpuClock | None = None,
    ) -> None:
        self.stage, self.transport, self.hooks = stage, transport, hooks
        self.position, self.stages = position, stages
        self.reducer = reducer or NoReducer()
        self.mixer = mixer or NoMixer()
        self.tie = tie
        self._guard = guard or nullcontext()
        self._look_ahead = look_ahead
        self._tied_slot = self._find_tied_slot()
        self._mail = _Mail()
        self._apply = True
        self._clock = clock
        self._busy_s = 0.0
        handlers = self._handlers()
        self._evaluation = handlers | {Op.FORWARD: self._evaluate, Op.BACKWARD: self._acknowledge}
        training = handlers if wrap is None else wrap(handlers)
        self._training = training if clock is None else clock.timed(training)

    def _find_tied_slot(self) -> int:
        """Of the tied parameter, where this stage owns it and trains it; else -1."""
        names = [slot.name for slot in self.stage.weights.slots]
        owns = self.tie is not None and self.tie.owner == self.position and self.tie.owner_name in names
        return names.index(self.tie.owner_name) if self.tie is not None and owns else -1

    def _handlers(self) -> Handlers:
        return {
            Op.LOAD: self._load,
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.SEND_ACTIVATION: self._send_activation,
            Op.RECV_ACTIVATION: self._recv_activation,
            Op.SEND_GRADIENT: self._send_gradient,
            Op.RECV_GRADIENT: self._recv_gradient,
            Op.OPEN_REDUCE: lambda microbatch: self.reducer.open(),
            Op.REDUCE: lambda microbatch: self.reducer.finish(),
            Op.NORM: self._norm,
            Op.UPDATE: self._update,
            Op.JOIN: lambda microbatch: self.mixer.request(self._rate(microbatch)),
            Op.WAIT: lambda microbatch: self.mixer.wait(),
            Op.MIX: lambda microbatch: self.mixer.mix(),
            Op.SEND_TIED_GRADIENT: self._send_tied_gradient,
            Op.RECV_TIED_GRADIENT: self._recv_tied_gradient,
            Op.SEND_TIED_WEIGHT: self._send_tied_weight,
            Op.RECV_TIED_WEIGHT: self._recv_tied_weight,
        }

    def run(self, program: Program) -> None:
        """Trains: carries out `program` to its end.

        Raises:
            PeerLost: a neighbour did not answer in time.
        """
        if self._clock is not None:
            self._clock.begin()
        self._run(program, self._training)

    @property
    def busy_s(self) -> float:
        """Seconds of training spent in forwards, backwards and updates so far; on a GPU, its own seconds."""
        return self._busy_s if self._clock is None else self._clock.busy_s()

    def evaluate(self, program: Program) -> dict[str, float]:
        """Carries out a forward-only program; returns the criterion's sums on the last stage, {} elsewhere."""
        self.stage.train(False)
        kept, busy_s = self.stage.take_sums(), self._busy_s
        try:
            self._run(program, self._evaluation)
        finally:
            self.stage.train(True)
            self._busy_s = busy_s
        sums = self.stage.take_sums()
        self.stage.restore_sums(kept)
        return {key: float(value) for key, value in sums.items()}

    def _run(self, program: Program, handlers: Handlers) -> None:
        record, updated = self.hooks.record, self.hooks.updated
        ahead: deque[Action] = deque()
        self._look(ahead, program, self._look_ahead)
        while ahead:
            action = ahead.popleft()
            self._look(ahead, program, 1)
            op = action.op
            start = perf_counter()
            handlers[op](action.microbatch)
            end = perf_counter()
            if op is Op.FORWARD or op is Op.BACKWARD or op is Op.UPDATE:
                self._busy_s += end - start
            if record is not None:
                record(action, start, end)
            if op is Op.UPDATE and updated is not None:
                updated(action.microbatch)
        assert not self.left(), f"nobody has fetched {self.left()}"

    def left(self) -> dict[str, list[int]]:
        """Micro-batches that are still in some book of this executor or its stage; {} between two programs."""
        in_flight = self.stage.in_flight
        return self._mail.left() | ({"in flight": in_flight} if in_flight else {})

    def _look(self, ahead: deque[Action], program: Program, count: int) -> None:
        for action in islice(program, count):
            ahead.append(action)
            if action.op is Op.RECV_ACTIVATION:
                self.transport.post(self.position - 1, "A", action.microbatch)
            elif action.op is Op.RECV_GRADIENT:
                self.transport.post(self.position + 1, "G", action.microbatch)

    # --- one method per action; the argument is the micro-batch

    def _load(self, microbatch: int) -> None:
        if self.position == 0 and self.hooks.inputs is not None:
            self._mail.inputs[microbatch] = self.hooks.inputs(microbatch)
        if self.position == self.stages - 1 and self.hooks.targets is not None:
            self._mail.targets[microbatch] = self.hooks.targets(microbatch)

    def _recv_activation(self, microbatch: int) -> None:
        self._mail.inputs[microbatch] = self.transport.recv(self.position - 1, "A", microbatch)

    def _forward(self, microbatch: int) -> None:
        inputs = self._mail.inputs.pop(microbatch)
        targets, counts = self._mail.targets.pop(microbatch, ((), None))
        self._mail.outputs[microbatch] = self.stage.forward(microbatch, inputs, targets, counts)

    def _send_activation(self, microbatch: int) -> None:
        self.transport.send(self.position + 1, "A", microbatch, self._mail.outputs.pop(microbatch))

    def _recv_gradient(self, microbatch: int) -> None:
        self._mail.gradients[microbatch] = self.transport.recv(self.position + 1, "G", microbatch)

    def _backward(self, microbatch: int) -> None:
        self._mail.outputs.pop(microbatch, None)
        gradients = self._mail.gradients.pop(microbatch, ())
        self._answer(microbatch, self.stage.backward(microbatch, gradients))

    def _answer(self, microbatch: int, input_gradients: Tensors) -> None:
        """What the stage before waits for; the first stage has nobody to answer."""
        if self.position > 0:
            self._mail.input_gradients[microbatch] = input_gradients

    def _send_gradient(self, microbatch: int) -> None:
        self.transport.send(self.position - 1, "G", microbatch, self._mail.input_gradients.pop(microbatch))

    def _norm(self, microbatch: int) -> None:
        """Every stage tells every other the squares of its parameters; all get the same sum, whatever the cut."""
        mine = self.stage.gradient_squares().cpu()
        others = [stage for stage in range(self.stages) if stage != self.position]
        for stage in others:
            self.transport.send(stage, "N", microbatch, (mine,))
        theirs = [self.transport.recv(stage, "N", microbatch)[0] for stage in others]
        self._apply = self.stage.apply_norm(_exact_sum(mine, *theirs))

    def _update(self, microbatch: int) -> None:
        if self._apply:
            rate = self._rate(microbatch)
            with self._guard:
                self.stage.update(rate)
        self._apply = True

    def _rate(self, microbatch: int) -> float:
        """The learning rate of the next update, which follows this micro-batch."""
        hooks = self.hooks
        return hooks.rate_at(microbatch) if hooks.rate_at else hooks.learning_rate(self.stage.updates)

    def _send_tied_gradient(self, microbatch: int) -> None:
        assert self.tie is not None
        gradient = self.stage.borrowed[0].take_gradient()
        self.transport.send(self.tie.owner, "T", microbatch, (gradient,))

    def _recv_tied_gradient(self, microbatch: int) -> None:
        assert self.tie is not None
        (gradient,) = self.transport.recv(self.tie.borrower, "T", microbatch)
        if self._tied_slot >= 0:
            self.stage.add_gradient(self._tied_slot, gradient)

    def _send_tied_weight(self, microbatch: int) -> None:
        assert self.tie is not None
        value = self.stage.value_of(self.tie.owner_name)
        self.transport.send(self.tie.borrower, "W", microbatch, (value.clone(),))

    def _recv_tied_weight(self, microbatch: int) -> None:
        assert self.tie is not None
        (value,) = self.transport.recv(self.tie.owner, "W", microbatch)
        self.stage.borrowed[0].receive(value)

    def share_tied_weight(self, number: int) -> None:
        """Between two programs: the borrower of a tied parameter takes over its owner's newest; both call this."""
        if self.tie is not None and self.tie.owner == self.position:
            self._send_tied_weight(number)
        elif self.tie is not None and self.tie.borrower == self.position:
            self._recv_tied_weight(number)

    def _evaluate(self, microbatch: int) -> None:
        targets, _ = self._mail.targets.pop(microbatch, ((), None))
        self._mail.outputs[microbatch] = self.stage.evaluate(self._mail.inputs.pop(microbatch), targets)

    def _acknowledge(self, microbatch: int) -> None:
        self._mail.outputs.pop(microbatch, None)
        self._mail.gradients.pop(microbatch, None)
        self._answer(microbatch, ())


def _exact_sum(*parts: Tensor) -> float:
    """The sum of all float64 entries, rounded once: the same digits in whatever order and parts they come."""
    try:
        return math.fsum(value for part in parts for value in part.tolist())
    except OverflowError:  # finite squares whose sum is not
        return math.inf
