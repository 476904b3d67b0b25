"""Processes whose tensors meet over torch.distributed: a mean in one flat buffer, a copy of the leader's, a gather."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.cluster.json_exchange import gather_values
from pipeline.errors import Forged, PeerLost, UserError


@dataclass(frozen=True)
class Team:
    """The processes whose models meet; a team of one (`handle` None) needs no messages.

    `ranks` ascend and are those of the whole job; the first is the leader.
    """

    rank: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None

    def average(self, tensors: Sequence[Tensor], what: str) -> None:
        """Every floating point tensor becomes its mean over the team: one all-reduce per device and type.

        Half precision is summed in float32.
        """
        if self.handle is None:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                kinds.setdefault((tensor.device, torch.promote_types(tensor.dtype, torch.float32)), []).append(tensor)
        for (_, dtype), alike in kinds.items():
            flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in alike])
            with self._waiting(what):
                dist.all_reduce(flat, group=self.handle)
            flat.div_(len(self.ranks))
            for tensor, piece in zip(alike, torch.split(flat, [t.numel() for t in alike]), strict=True):
                tensor.detach().copy_(piece.view(tensor.shape))

    def copy_from_leader(self, tensors: Sequence[Tensor], what: str) -> None:
        """Every tensor becomes the leader's, bit for bit: one broadcast of bytes per device."""
        if self.handle is None:
            return
        kinds: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.device, []).append(tensor.detach())
        for alike in kinds.values():
            flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in alike])
            with self._waiting(what):
                dist.broadcast(flat, src=self.ranks[0], group=self.handle)
            if self.rank != self.ranks[0]:
                for tensor, piece in zip(alike, torch.split(flat, [t.nbytes for t in alike]), strict=True):
                    tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))

    def gather(self, value: Any, device: torch.device) -> list[Any]:
        """What each process gave, as JSON, in the order of `ranks`; sent over `device` if NCCL needs one."""
        by_gpu = self.handle is not None and "cpu:" not in dist.get_backend_config(self.handle)
        with self._waiting("its settings"):
            return gather_values(value, self.handle, device=device if by_gpu else torch.device("cpu"))

    def check_devices(self, tensors: Sequence[Tensor]) -> None:
        """Raises `UserError` where the process group has no backend for a tensor's device."""
        for kind in {tensor.device.type for tensor in tensors} if self.handle is not None else ():
            backends = dist.get_backend_config(self.handle)
            if f"{kind}:" not in backends:
                raise UserError(
                    f"parameters on {kind}, but the process group only has {backends}; move the model, "
                    "or give init_process_group another backend (gloo for cpu, nccl for cuda)"
                )

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Forged:
            raise
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} waited for {what} of ranks {list(self.ranks)}: {error}") from error


def team_of(rank: int, world_size: int, group: Sequence[int] | dist.ProcessGroup | None) -> Team:
    """The team of `get_distributed_optimizer`'s arguments.

    Raises:
        UserError: the arguments and torch.distributed do not say the same.
    """
    if not dist.is_initialized():
        if world_size != 1:
            raise UserError(f"world_size is {world_size} without connections; call init_process_group first")
        return Team(rank, (rank,), None)
    here, ranks = dist.get_rank(), _ranks(group)
    if here not in ranks:
        raise UserError(f"group {list(ranks)} is without this process, rank {here}; only its members may call this")
    if world_size != len(ranks):
        raise UserError(f"world_size is {world_size}, but the group has {len(ranks)} processes: {list(ranks)}")
    if rank not in (here, ranks.index(here)):
        raise UserError(f"rank is {rank}, but torch.distributed knows this process as {here}")
    return Team(here, ranks, group if isinstance(group, dist.ProcessGroup) else connect(ranks))


def _ranks(group: Sequence[int] | dist.ProcessGroup | None) -> tuple[int, ...]:
    size = dist.get_world_size()
    if group is None:
        return tuple(range(size))
    if isinstance(group, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(group))
    if not isinstance(group, Sequence):
        raise UserError("group is not one that this process belongs to; give a list of ranks, a ProcessGroup, or None")
    if len(set(group)) != len(group) or not set(group) <= set(range(size)):
        raise UserError(f"group is {list(group)}; give different ranks from 0 to {size - 1}")
    return tuple(sorted(group))


def connect(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """A process group of these ranks, among whom this process is; only they take part in making it."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    made = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup), "this process is among the ranks"
    return made
