"""All workers of a job as threads of one process: real schedule, coordinator, synchroniser and wires, one Python.

For comparing many replicas on a small machine; a stage's neighbours are queues away, its replicas a socket.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable

import torch

from pipeline.elastic_world import ElasticWorld
from pipeline.errors import UserError
from pipeline.settings import Settings
from pipeline.training import Task
from pipeline.transport.local import local_transports
from pipeline.transport.protocol import Transport
from pipeline.world import World

TrainRank = Callable[[Settings, Task, World, Transport], None]


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
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            train_rank(settings, task, _world_of(world, settings, rank), transports[rank])
        except BaseException as error:  # handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(placement.size)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
        for thread in threads:
            thread.join(timeout=0.1)
    if errors:
        raise errors[0]


def _world_of(world: World, settings: Settings, rank: int) -> ElasticWorld:
    placement = world.placement
    me = dataclasses.replace(
        world.identity, rank=rank, size=placement.size, local_rank=rank, local_size=placement.size, mpi=False
    )
    one = World(me, placement, timeout_s=world.timeout_s, control=world.control)
    one.oversubscribed = placement.size > (os.cpu_count() or 1)
    return ElasticWorld(one, settings)
