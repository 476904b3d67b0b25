"""The mean of the gradients over the replicas of a stage: by all-reduce while the backward runs, or through the mesh.

An all-reduce takes flat buckets. They are filled from the last parameter to the first, the order in which a backward
finishes them. Every replica starts them in the same order, whichever of its gradients happens to be ready first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.group import Group
from pipeline.errors import PeerLost
from pipeline.replicas.conversation import Link
from pipeline.stage.weights import Slot, Weights

DEFAULT_BUCKET_BYTES = 4 << 20


@dataclass
class _Bucket:
    """A flat piece of the gradients: which slots it holds, how many are still missing, and its all-reduce."""

    flat: Tensor
    indices: list[int]
    offsets: list[int]
    missing: set[int] = field(default_factory=set)
    work: Any = None


class GradientReducer:
    """Averages `weights.gradients` over `group`; `late` slots only become final between open and finish.

    Args:
        weights: of this stage.
        group: the replicas of this stage, all with the same parameters.
        late: names of parameters that receive more gradient after the backward (tied ones).
        timeout_s: how long to wait for the slowest replica.
        description: who the replicas are, for the message when one does not come.
    """

    def __init__(
        self,
        weights: Weights,
        group: dist.ProcessGroup,
        *,
        late: frozenset[str] = frozenset(),
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        timeout_s: float = 300.0,
        description: str = "the replicas of this stage",
    ) -> None:
        self._weights, self._group = weights, group
        self._replicas = dist.get_world_size(group)
        self._timeout_s, self._description = timeout_s, description
        self._patience = _patience(group, weights.device, timeout_s)
        self._buckets = _make_buckets(weights.slots, late, bucket_bytes, weights.device)
        self._place = {index: (bucket, n) for bucket in self._buckets for n, index in enumerate(bucket.indices)}
        self._late = {index for index, slot in enumerate(weights.slots) if slot.name in late}
        self._open = False
        self._started = 0
        self.bytes_sent = 0
        weights.on_new_leaf(self._watch)

    def _watch(self, index: int, leaf: nn.Parameter) -> None:
        if index not in self._late:
            leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda parameter: self._arrived(index, parameter.grad)
            )

    def open(self) -> None:
        """The next backward is the last one before the update: its gradients are final."""
        self._open = True
        self._started = 0
        for bucket in self._buckets:
            bucket.missing = set(bucket.indices)

    def _arrived(self, index: int, gradient: Tensor | None) -> None:
        if not self._open:
            return
        bucket, n = self._place[index]
        self._fill(bucket, n, gradient)
        bucket.missing.discard(index)
        self._start_complete_buckets()

    def _fill(self, bucket: _Bucket, n: int, gradient: Tensor | None) -> None:
        view = self._view(bucket, n)
        with torch.no_grad():
            view.zero_() if gradient is None else view.copy_(gradient)

    def _view(self, bucket: _Bucket, n: int) -> Tensor:
        slot = self._weights.slots[bucket.indices[n]]
        return bucket.flat.as_strided(slot.shape, slot.stride, bucket.offsets[n])

    def _start_complete_buckets(self) -> None:
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            bucket = self._buckets[self._started]
            bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
            self.bytes_sent += 2 * bucket.flat.nbytes * (self._replicas - 1) // self._replicas
            self._started += 1

    def finish(self) -> None:
        """Waits for the sums and leaves the means in `weights.gradients`.

        Raises:
            PeerLost: a replica did not take part in time.
        """
        self._open = False
        for bucket in self._buckets:
            for n, index in enumerate(bucket.indices):
                if index in bucket.missing:
                    self._fill(bucket, n, self._weights.gradients[index])
            bucket.missing.clear()
        self._start_complete_buckets()
        for bucket in self._buckets:
            self._wait(bucket)
            bucket.flat.div_(self._replicas)
            for n, index in enumerate(bucket.indices):
                self._weights.gradients[index] = self._view(bucket, n)

    def _wait(self, bucket: _Bucket) -> None:
        try:
            bucket.work.wait(*self._patience)
        except RuntimeError as error:
            raise PeerLost(f"waited {self._timeout_s:g} s for the gradients of {self._description}: {error}") from error
        bucket.work = None


def _patience(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> tuple[timedelta, ...]:
    """What to give to `wait`: told a time, NCCL would hold up the host; its own watchdog keeps the group's deadline."""
    nccl = f"{device.type}:nccl" in dist.get_backend_config(group)
    return () if nccl else (timedelta(seconds=timeout_s),)


def _make_buckets(
    slots: Sequence[Slot], late: frozenset[str], bucket_bytes: int, device: torch.device
) -> list[_Bucket]:
    """Slots from last to first in pieces of one dtype and about `bucket_bytes`; late ones alone, at the end."""
    backwards = [i for i in reversed(range(len(slots))) if slots[i].name not in late]
    pieces: list[list[int]] = []
    room = 0
    for index in backwards:
        if room <= 0 or slots[pieces[-1][-1]].dtype != slots[index].dtype:
            pieces.append([])
            room = bucket_bytes
        pieces[-1].append(index)
        room -= slots[index].size * slots[index].dtype.itemsize
    pieces += [[index] for index, slot in enumerate(slots) if slot.name in late]
    return [_make_bucket(piece, slots, device) for piece in pieces]


def _make_bucket(indices: list[int], slots: Sequence[Slot], device: torch.device) -> _Bucket:
    offsets, size = [], 0
    for index in indices:
        offsets.append(size)
        size += slots[index].size
    return _Bucket(torch.zeros(size, dtype=slots[indices[0]].dtype, device=device), indices, offsets)


class MeshReducer:
    """The mean of the gradients over all live replicas, through the mesh: all-reduce for workers that are threads.

    last stage   L0: join a group, mean of the normalisers ── F0 B0 ── mean of the gradients in the same group ── U0
    the others       F0 B0 ── join a group, mean of the gradients ── U0
    """

    def __init__(self, weights: Weights, link: Link) -> None:
        self._weights, self._link = weights, link
        self._step = 0
        self._group: Group | None = None  # of the update under way
        self.bytes_sent = 0  # the mesh counts them

    def open(self) -> None:
        return None

    def share(self, counts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of the normalisers, scalars, over those with whom the next update's gradients are averaged."""
        group = self._group = self._join()
        if len(group.members) == 1:
            return counts
        mesh, generations = self._link.mesh, group.generations
        mean = mesh.average(torch.stack(counts), group.members, group.round, part=1, generations=generations)
        return tuple(mean)

    def finish(self) -> None:
        group, self._group = self._group or self._join(), None
        met = perf_counter()
        if len(group.members) > 1:
            slots, leaves = self._weights.slots, self._weights.newest.leaves
            pairs = zip(self._weights.gradients, leaves, strict=True)
            flat = torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for g, leaf in pairs])
            mean = self._link.mesh.average(flat, group.members, group.round, generations=group.generations)
            parts = torch.split(mean, [slot.size for slot in slots])
            self._weights.gradients[:] = [
                part.view(slot.shape).to(slot.dtype) for part, slot in zip(parts, slots, strict=True)
            ]
        self._link.stats.spent(mixing_s=perf_counter() - met)

    def _join(self) -> Group:
        started = perf_counter()
        self._step += 1
        group = self._link.joined(self._link.client.ready(self._step, ""))
        self._link.stats.spent(waiting_s=perf_counter() - started)
        return group
