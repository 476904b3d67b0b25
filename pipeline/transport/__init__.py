"""Ways of moving tensors between stages; `choose_transport` picks one for a rank, and every rank of a job the same.

GPUs of their own            NCCL, headers over Gloo
CPUs, an MPI world           MPI
otherwise                    Gloo
GPUs over MPI or Gloo        the same through pinned host memory (ranks that share a GPU)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.transport.protocol import Transport, Who

if TYPE_CHECKING:
    from pipeline.cluster.world import World
    from pipeline.transport.nccl import NcclCarrier

__all__ = ["Transport", "Who", "choose_transport"]


def choose_transport(backend: str, world: World, edges: Collection[tuple[int, int]]) -> Transport:
    """The transport between the stages of `world`'s pipeline; collective over all ranks of the job.

    Args:
        backend: auto, mpi, gloo or nccl.
        edges: (source, destination) of all messages between devices: `schedules.edges` of what will be run.

    Raises:
        UserError: a backend that cannot work here.
    """
    name = resolve_backend(backend, world)
    who = Who(world.stage, world.pipeline, tuple(world.hosts_of_pipeline))
    if world.num_stages == 1:
        from pipeline.transport.local import local_transports

        return local_transports(1)[0]
    if name == "mpi":
        transport: Transport = _mpi(world, who)
    else:
        from pipeline.transport.torch_dist import TorchTransport

        carrier = _nccl_carrier(world, edges) if name == "nccl" else None
        group = world.pipeline_group()
        assert group is not None
        transport = TorchTransport(group, who=who, timeout_s=world.timeout_s, carrier=carrier)
    if world.device.type == "cuda" and name != "nccl":
        from pipeline.transport.staged import StagedTransport

        return StagedTransport(transport, world.device)
    return transport


def resolve_backend(backend: str, world: World) -> str:
    """The name of the transport that `auto` stands for; the given name if it can work."""
    on_gpu = world.device.type == "cuda"
    if backend == "nccl" and not on_gpu:
        raise UserError("--backend nccl needs a GPU for every rank; this layout computes on CPUs: choose mpi or gloo")
    if backend == "nccl" and not world.uses_nccl:
        raise UserError("--backend nccl needs a GPU of its own for every rank; choose mpi or gloo")
    if backend == "mpi" and not world.mpi:
        raise UserError(
            "--backend mpi needs an MPI world: start with heturun where an Open MPI is found, or mpirun; or choose gloo"
        )
    if backend != "auto":
        return backend
    if on_gpu and world.uses_nccl:
        return "nccl"
    return "mpi" if world.mpi else "gloo"


def _mpi(world: World, who: Who) -> Transport:
    from pipeline.transport.mpi import MpiTransport

    return MpiTransport(
        world.pipeline_comm(),
        who=who,
        timeout_s=world.timeout_s,
        oversubscribed=world.oversubscribed,
        remote=world.remote_stages,
    )


def _nccl_carrier(world: World, edges: Collection[tuple[int, int]]) -> NcclCarrier:
    """Two-rank NCCL groups for every directed edge of every pipeline, made by all ranks in the same order."""
    import torch.distributed as dist

    from pipeline.transport.nccl import NcclCarrier

    groups: dict[tuple[int, int], dist.ProcessGroup] = {}
    rows = world.rows_of_ranks
    for pipeline, ranks in rows.items():
        for source, to in sorted(edges):
            group = dist.new_group([ranks[source], ranks[to]], backend="nccl")
            if pipeline == world.pipeline and world.stage in (source, to):
                assert isinstance(group, dist.ProcessGroup)
                groups[source, to] = group
    return NcclCarrier(groups, stage=world.stage, ranks=rows[world.pipeline], device=world.device)
