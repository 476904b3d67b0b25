"""Programs run against each other on a virtual clock: the validator (every cost 0) and the model of a timeline.

The programs are the very ones that the executor carries out. Sends never block; a receive waits for its message; a
reduction waits for the same reduction of every replica; a norm waits for all stages of its pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.core.actions import Action, Op
from pipeline.core.trace import Span
from pipeline.schedules.orders import Program, Schedule
from pipeline.schedules.program import Shape, program

Place = tuple[int, int]  # (pipeline, stage)
Cost = Callable[[int, int, Action], float]  # (pipeline, stage, action) -> seconds


class DeadlockError(RuntimeError):
    """Programs that cannot finish; the message names the action at which each one stands."""


# What a receive takes: the operation that sends it, and where its sender is relative to the receiver.
_RECEIVES: dict[Op, Op] = {
    Op.RECV_ACTIVATION: Op.SEND_ACTIVATION,
    Op.RECV_GRADIENT: Op.SEND_GRADIENT,
    Op.RECV_TIED_GRADIENT: Op.SEND_TIED_GRADIENT,
    Op.RECV_TIED_WEIGHT: Op.SEND_TIED_WEIGHT,
}
_SENDS = frozenset(_RECEIVES.values())


def _free(pipeline: int, stage: int, action: Action) -> float:
    return 0.0


@dataclass
class _Worker:
    """One program on its way: its clock, and the action it stands at."""

    actions: Program
    clock: float = 0.0
    at: Action | None = None

    def advance(self) -> None:
        self.at = next(self.actions, None)


@dataclass
class _World:
    """All programs, the messages under way, and who has arrived at which meeting."""

    workers: Mapping[Place, _Worker]
    cost: Cost
    messages: dict[tuple[int, int, Op], deque[tuple[int, float]]] = field(default_factory=dict)
    meetings: dict[tuple[Op, int, int], dict[Place, float]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def sources(self, place: Place, op: Op) -> Iterable[tuple[int, int, Op]]:
        """Where the message of a receive may lie: from the neighbour, or from the other end of a tie."""
        pipeline, stage = place
        if op is Op.RECV_ACTIVATION:
            return [(pipeline, stage - 1, Op.SEND_ACTIVATION)]
        if op is Op.RECV_GRADIENT:
            return [(pipeline, stage + 1, Op.SEND_GRADIENT)]
        sent = _RECEIVES[op]
        return [key for key in self.messages if key[0] == pipeline and key[2] is sent]

    def partners(self, place: Place, op: Op) -> list[Place]:
        pipeline, stage = place
        if op is Op.REDUCE:
            return [other for other in self.workers if other[1] == stage]
        return [other for other in self.workers if other[0] == pipeline]

    def ready_at(self, place: Place, action: Action) -> float | None:
        """When `action` may start as far as others are concerned; None while it has to wait for one of them."""
        op, microbatch = action
        if op in _RECEIVES:
            return self._take_message(place, action)
        if op in (Op.REDUCE, Op.NORM):
            lane = place[1] if op is Op.REDUCE else place[0]
            arrived = self.meetings.setdefault((op, lane, microbatch), {})
            arrived[place] = self.workers[place].clock
            missing = [other for other in self.partners(place, op) if other not in arrived]
            return None if missing else max(arrived.values())
        return 0.0

    def _take_message(self, place: Place, action: Action) -> float | None:
        for key in self.sources(place, action.op):
            queue = self.messages.get(key)
            if queue:
                microbatch, sent_at = queue[0]
                if microbatch != action.microbatch:
                    raise DeadlockError(
                        f"stage {place[1]} at {action} finds {Action(key[2], microbatch)} of stage {key[1]}"
                    )
                queue.popleft()
                return sent_at
        return None

    def step(self, place: Place) -> bool:
        """Carries out the action that `place` stands at, if nothing holds it; says whether it did."""
        worker = self.workers[place]
        if worker.at is None:
            return False
        action = worker.at
        ready = self.ready_at(place, action)
        if ready is None:
            return False
        start = max(worker.clock, ready)
        worker.clock = start + self.cost(*place, action)
        if action.op in _SENDS:
            self.messages.setdefault((*place, action.op), deque()).append((action.microbatch, worker.clock))
        self.spans.append(Span(*place, action, start, worker.clock))
        worker.advance()
        return True


def simulate(programs: Mapping[Place, Program], *, cost: Cost = _free) -> list[Span]:
    """Runs the programs to their end and returns what happened when, in virtual seconds.

    Raises:
        DeadlockError: programs that wait for each other for ever, messages out of order or never received.
    """
    world = _World({place: _Worker(actions) for place, actions in programs.items()}, cost)
    for worker in world.workers.values():
        worker.advance()
    moving = True
    while moving:
        moving = False
        for place in world.workers:
            while world.step(place):
                moving = True
    _check_finished(world)
    return world.spans


def _check_finished(world: _World) -> None:
    stuck = [
        f"stage {stage} at {worker.at}" + (f" of pipeline {pipeline}" if pipeline else "")
        for (pipeline, stage), worker in world.workers.items()
        if worker.at is not None
    ]
    if stuck:
        raise DeadlockError(", ".join(stuck))
    for (pipeline, stage, op), queue in world.messages.items():
        if queue:
            raise DeadlockError(f"nobody receives {Action(op, queue[0][0])} of stage {stage}, pipeline {pipeline}")


def validate(schedule: Schedule, shape: Shape, microbatches: int) -> None:
    """Runs all programs of a job against each other with every cost 0, before any process group exists.

    `microbatches`: how many each pipeline would process; a long run is judged by its first and last few batches,
    since the programs repeat themselves in between.

    Raises:
        DeadlockError: programs that cannot finish.
    """
    batch = shape.microbatches * shape.accumulate
    few = (4 * shape.stages // batch + 3) * batch
    count = microbatches if microbatches <= 2 * few else few + microbatches % batch
    places = [(pipeline, stage) for pipeline in range(shape.replicas) for stage in range(shape.stages)]
    simulate({place: program(schedule, shape, place[1], range(count)) for place in places})
