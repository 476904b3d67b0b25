"""Which samples a stage reads: those of micro-batch n of pipeline p, for ever.

    epoch e, 11 samples shuffled    7 2 9 4 | 0 5 1 8 | 3 6 10      P = 2 pipelines, batch b = 2
    pipeline 0 reads                7 2       0 5       3
    pipeline 1 reads                    9 4       1 8     6         and 10 is the tail that nobody sees

Slice k of P * b samples is everybody's batch k: P pipelines with batch b see what one with batch P * b sees.
The last slice may be short, but equally short on all pipelines, so that all make equally many updates. At
most P - 1 samples of an epoch are left out (P * M - 1 where the rest is too short for M micro-batches, P * 2 M - 1
where each needs two samples), other ones in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.core.draw import mix
from pipeline.data.epochs import BEGINNING, Position
from pipeline.errors import UserError


@lru_cache(maxsize=2)
def epoch_order(size: int, *, epoch: int, seed: int) -> Tensor:
    """The order of all `size` samples in that epoch: a permutation, (size,) int64; do not write to it."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def shard(
    order: Tensor, *, pipelines: int, pipeline: int, batch_size: int, drop_last: bool, least: int = 1
) -> list[Tensor]:
    """The batches of one pipeline in an epoch of this `order`; a short last one below `least` is dropped.

    >>> shard(torch.arange(7), pipelines=2, pipeline=1, batch_size=2, drop_last=False)
    [tensor([2, 3]), tensor([5])]
    """
    count = _count_batches(len(order), pipelines * batch_size, pipelines, 0 if drop_last else least)
    return [_slice(order, batch, batch_size, pipelines, pipeline) for batch in range(count)]


def _count_batches(size: int, global_batch: int, pipelines: int, least: int) -> int:
    full, rest = divmod(size, global_batch)
    return full + (1 if least and rest // pipelines >= least else 0)


def _slice(order: Tensor, batch: int, batch_size: int, pipelines: int, pipeline: int) -> Tensor:
    start = batch * batch_size * pipelines
    length = min(batch_size, (len(order) - start) // pipelines)
    return order[start + pipeline * length : start + (pipeline + 1) * length]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The training samples of one pipeline, by a batch number that never ends; see the picture above.

    `begun`: where another run has come to, perhaps with another number of pipelines. The rest of that epoch is cut
    anew, into batches so numbered that the epoch ends where it always does: `first_batch` is the first of them.

    `batch_size` is per pipeline; every batch is cut into exactly `microbatches` parts of `least` samples or more
    whose sizes differ by at most one, and micro-batch n is part n % M of batch n // M.

    Raises:
        UserError: too few samples for one batch of every pipeline, or a batch smaller than its micro-batches.
    """

    size: int
    batch_size: int
    pipelines: int = 1
    pipeline: int = 0
    microbatches: int = 1
    least: int = 1
    seed: int = 0
    drop_last: bool = False
    begun: Position = BEGINNING

    def __post_init__(self) -> None:
        _check_positive(batch_size=self.batch_size, microbatches=self.microbatches)
        _check_pipeline(self.pipeline, self.pipelines)
        if self.batch_size < self.microbatches * self.least:
            raise UserError(self._too_small())
        if self.size < self.pipelines * self.batch_size:
            raise UserError(
                f"{self.size} training samples are fewer than one batch of {self.batch_size} for each of "
                f"{self.pipelines} pipelines; give more data, or a smaller --batch-size or fewer pipelines"
            )

    def _too_small(self) -> str:
        enough, fewer = self.microbatches * self.least, self.batch_size // self.least
        cut = f"a batch of {self.batch_size} cannot be cut into {self.microbatches} micro-batches"
        if self.least > 1:
            cut += f" of {self.least} samples or more, without which BatchNorm has no variance"
        remedy = f"give --batch-size {enough} or more"
        return f"{cut}; {remedy}" + (f", or --microbatches {fewer} or fewer" if fewer else "")

    @property
    def shortest(self) -> int:
        """Samples in the smallest micro-batch."""
        last = self.batches_per_epoch - 1
        return min(self.batch_size, self.samples_per_epoch - last * self.batch_size) // self.microbatches

    @property
    def left_out(self) -> str:
        """Which samples of an epoch nobody reads because a micro-batch of them would be too small; "" for none."""
        count = self.size // self.pipelines - self.samples_per_epoch
        if self.drop_last or self.least == 1 or not count:
            return ""
        return (
            f"{count * self.pipelines} of {self.size} samples are left out of every epoch, others each time: "
            f"they would make a micro-batch of fewer than {self.least}, without which BatchNorm has no variance"
        )

    @property
    def batches_per_epoch(self) -> int:
        return self._batches(self.size)

    def _batches(self, samples: int) -> int:
        """How many batches so many samples make."""
        least = 0 if self.drop_last else self.microbatches * self.least
        return _count_batches(samples, self.pipelines * self.batch_size, self.pipelines, least)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that this pipeline (and every other) reads in an epoch."""
        last = self.batches_per_epoch - 1
        return last * self.batch_size + self._length(last * self.batch_size * self.pipelines)

    @property
    def count(self) -> None:
        """Micro-batches never end."""
        return None

    @property
    def first_batch(self) -> int:
        """The batch that begins where the other run has ended."""
        left = self._batches(self.size - self.begun.samples)
        return (self.begun.epoch + 1) * self.batches_per_epoch - left

    def position(self, batch: int) -> Position:
        """Where a run is before that batch."""
        return Position(batch // self.batches_per_epoch, self._before(batch))

    def _before(self, batch: int) -> int:
        """Samples of the epoch's order that batches before this one have taken, of all pipelines."""
        epoch, within = divmod(batch, self.batches_per_epoch)
        begun = 0
        if epoch == self.begun.epoch and self.begun.samples:
            begun, within = self.begun.samples, batch - self.first_batch
        return begun + within * self.batch_size * self.pipelines

    def epoch(self, batch: int) -> int:
        return batch // self.batches_per_epoch

    def batch_length(self, batch: int) -> int:
        """Samples of this pipeline in that batch: the batch size, or less in the last batch of an epoch."""
        return self._length(self._before(batch))

    def _length(self, before: int) -> int:
        return min(self.batch_size, (self.size - before) // self.pipelines)

    def indices(self, batch: int) -> list[int]:
        """The samples of this pipeline in that batch of the never-ending count."""
        order = epoch_order(self.size, epoch=self.epoch(batch), seed=self.seed)[self._before(batch) :]
        chosen: list[int] = _slice(order, 0, self.batch_size, self.pipelines, self.pipeline).tolist()
        return chosen

    def microbatch_indices(self, batch: int, part: int) -> list[int]:
        """Part `part` of M of that batch; never empty."""
        return self.indices(batch)[slice(*self._bounds(batch, part))]

    def microbatch_length(self, microbatch: int) -> int:
        """Samples in a micro-batch, known to every stage without reading any."""
        start, stop = self._bounds(*divmod(microbatch, self.microbatches))
        return stop - start

    def keys(self, microbatch: int) -> list[tuple[int, int]]:
        batch, part = divmod(microbatch, self.microbatches)
        epoch = self.epoch(batch)
        return [(epoch, index) for index in self.microbatch_indices(batch, part)]

    def name(self, microbatch: int) -> int:
        """A number that no other micro-batch of the run has, of any pipeline: the samples that come before its own."""
        batch, part = divmod(microbatch, self.microbatches)
        before = self.epoch(batch) * self.size + self._before(batch)
        return before + self.pipeline * self.batch_length(batch) + self._bounds(batch, part)[0]

    def _bounds(self, batch: int, part: int) -> tuple[int, int]:
        """Nearly equal parts, the longer ones first, as torch.tensor_split cuts them."""
        least, longer = divmod(self.batch_length(batch), self.microbatches)
        start = part * least + min(part, longer)
        return start, start + least + (1 if part < longer else 0)


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """The samples of one pipeline in a validation: every sample once, in order, in contiguous parts.

    Pipelines may have different numbers of micro-batches (`count`, 0 where there are fewer samples than
    pipelines), and the last one of each may be short: weight the results by the samples in them.
    """

    size: int
    batch_size: int
    pipelines: int = 1
    pipeline: int = 0

    def __post_init__(self) -> None:
        _check_positive(batch_size=self.batch_size)
        _check_pipeline(self.pipeline, self.pipelines)

    @property
    def count(self) -> int:
        start, stop = self._range()
        return -(-(stop - start) // self.batch_size)

    def microbatch_length(self, microbatch: int) -> int:
        return len(self.keys(microbatch))

    def keys(self, microbatch: int) -> list[tuple[int, int]]:
        first, stop = self._range()
        start = first + microbatch * self.batch_size
        return [(0, index) for index in range(start, min(start + self.batch_size, stop))]

    def _range(self) -> tuple[int, int]:
        start = self.size * self.pipeline // self.pipelines
        return start, self.size * (self.pipeline + 1) // self.pipelines


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}; give 1 or more")


def _check_pipeline(pipeline: int, pipelines: int) -> None:
    if not 0 <= pipeline < pipelines:
        raise UserError(f"pipeline {pipeline} of {pipelines} does not exist; give 0 to {pipelines - 1}")
