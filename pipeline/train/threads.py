"""All workers of a job as threads of one process: real schedule, coordinator, synchroniser and wires, one Python.

For comparing many replicas on a small machine; a stage's neighbours are queues away, its replicas a socket.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pipeline.cluster.failures import is_secondary
from pipeline.cluster.world import World
from pipeline.errors import Fenced, GroupBroken, TooFewReplicas, UserError
from pipeline.replicas.elastic import ElasticWorld
from pipeline.settings import Settings
from pipeline.train.plan import Task
from pipeline.transport.local import local_transports
from pipeline.transport.protocol import Transport

TrainRank = Callable[[Settings, Task, World, Transport], None]

CAUSE_S = 5.0  # after an error that another thread's has led to, for that one to be told


def run_threads(settings: Settings, task: Task, world: World, train_rank: TrainRank) -> None:
    """Runs `train_rank` for every worker of the layout in a thread of its own; raises the first real error.

    Raises:
        UserError: settings that need processes.
    """
    if (settings.checkpoint or settings.export) and world.num_stages > 1:
        raise UserError("--checkpoint and --export of several stages need processes; leave out --launcher threads")
    torch.set_num_threads(1)
    placement = world.placement
    transports = [
        transport
        for pipeline in range(placement.num_pipelines)
        for transport in local_transports(placement.num_stages, pipeline=pipeline, timeout_s=world.timeout_s)
    ]

    def work(rank: int) -> None:
        train_rank(settings, task, _world_of(world, settings, rank), transports[rank])

    run_together([partial(work, rank) for rank in range(placement.size)])


def run_together(works: Sequence[Callable[[], None]], *, cause_s: float = CAUSE_S) -> None:
    """Carries out each in a thread of its own; returns when all have, or raises the error that made the others."""
    errors: list[BaseException] = []
    ended = 0
    changed = threading.Condition()

    def carry_out(work: Callable[[], None]) -> None:
        nonlocal ended
        error: BaseException | None = None
        try:
            work()
        except BaseException as mine:  # handed to the main thread
            error = mine
        with changed:
            ended += 1
            errors.extend([] if error is None else [error])
            changed.notify_all()

    for work in works:
        threading.Thread(target=carry_out, args=(work,), daemon=True).start()
    with changed:
        changed.wait_for(lambda: errors or ended == len(works))
        changed.wait_for(lambda: ended == len(works) or not all(map(is_consequence, errors)), cause_s)
    if errors:
        raise first_cause(errors)


def first_cause(errors: Sequence[BaseException]) -> BaseException:
    """The first that is no consequence of another's; if all are, the first."""
    return next((error for error in errors if not is_consequence(error)), errors[0])


def is_consequence(error: BaseException) -> bool:
    """Whether an error says that somebody else went away."""
    return isinstance(error, Fenced | GroupBroken | TooFewReplicas) or is_secondary(error)


def _world_of(world: World, settings: Settings, rank: int) -> ElasticWorld:
    placement = world.placement
    me = dataclasses.replace(
        world.identity, rank=rank, size=placement.size, local_rank=rank, local_size=placement.size, mpi=False
    )
    one = World(me, placement, timeout_s=world.timeout_s, control=world.control)
    return ElasticWorld(one, settings)
