"""Ways of moving tensors between stages; `choose_transport` picks one for a rank, and every rank of a job the same.

GPUs of their own            NCCL, headers over Gloo
CPUs, an MPI world           MPI
otherwise                    Gloo
GPUs over MPI or Gloo        the same through pinned host memory (ranks that share a GPU)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.transport.protocol import Transport, Who

if TYPE_CHECKING:
    from pipeline.transport.nccl import NcclCarrier
    from pipeline.world import World

__all__ = ["Transport", "Who", "choose_transport"]


def choose_transport(backend: str, world: World) -> Transport:
    """The transport between the stages of `world`'s pipeline; collective over all ranks of the job.

    Args:
        backend: auto, mpi, gloo or nccl.

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

        carrier = _nccl_carrier(world) if name == "nccl" else None
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


def _nccl_carrier(world: World) -> NcclCarrier:
    """Two-rank NCCL groups for every directed edge of every pipeline, made by all ranks in the same order."""
    import torch.distributed as dist

    from pipeline.transport.nccl import NcclCarrier

    edges: dict[tuple[int, int], dist.ProcessGroup] = {}
    last = world.num_stages - 1
    for pipeline in range(world.num_pipelines):
        ranks = [pipeline * world.num_stages + stage for stage in range(world.num_stages)]
        pairs = {(s, t) for s in range(last) for t in (s + 1, last)} | {(0, last)}
        for low, high in sorted(pairs):
            for source, to in ((low, high), (high, low)):
                group = dist.new_group([ranks[source], ranks[to]], backend="nccl")
                if pipeline == world.pipeline and world.stage in (source, to):
                    assert isinstance(group, dist.ProcessGroup)
                    edges[source, to] = group
    mine = [world.pipeline * world.num_stages + stage for stage in range(world.num_stages)]
    return NcclCarrier(edges, stage=world.stage, ranks=mine, device=world.device)
