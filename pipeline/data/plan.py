"""What a stage reads: the samples of micro-batch n of pipeline p, for ever, and the loader that fetches them.

    epoch e, 11 samples shuffled    7 2 9 4 | 0 5 1 8 | 3 6 10      P = 2 pipelines, batch b = 2
    pipeline 0 reads                7 2       0 5       3
    pipeline 1 reads                    9 4       1 8     6         and 10 is the tail that nobody sees

Slice k of P * b samples is everybody's batch k: P pipelines with batch b see what one with batch P * b sees.
The last slice may be short, but equally short on all pipelines, so that all make equally many updates. At
most P - 1 samples of an epoch are left out (P * M - 1 where the rest is too short for M micro-batches, P * 2 M - 1
where each needs two samples), other ones in every epoch.

A sample is asked for by the key (epoch, index): loader workers that run ahead into the next epoch need not be
told, and what a key gives depends on nothing but the key.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from pipeline.core.draw import mix
from pipeline.data.epochs import BEGINNING, Position
from pipeline.errors import UserError

SHARED_MEMORY = "/dev/shm"
IN_FLIGHT = 16  # micro-batches per worker that /dev/shm shall hold: read ahead, being used, and those of other ranks
LONGEST_TEMPORARY = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")

Key = int | tuple[int, int]
Batch = tuple[Tensor, ...]


class Samples(Protocol):
    """A map-style data set: a key `(epoch, index)`, or an index for epoch 0, gives one sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key, /) -> Batch: ...


@runtime_checkable
class Stacked(Protocol):
    """Samples that read those of a whole micro-batch at once, faster than one by one."""

    def together(self, keys: list[tuple[int, int]], /) -> Batch: ...


@runtime_checkable
class Placed(Protocol):
    """Samples that can say where one of them lies: a file, and perhaps a row of it."""

    def place(self, index: int, /) -> str: ...


class Microbatches(Protocol):
    """Which samples stand in micro-batch n; `count` is None where their end is not known.

    An empty list of keys ends such a feed.
    """

    @property
    def count(self) -> int | None: ...

    def keys(self, number: int, /) -> list[tuple[int, int]]: ...


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


class MicrobatchFeed:
    """Fetches the micro-batches of a plan in order, with `workers` processes reading ahead (0: none).

    Iterating gives `(microbatch, tensors)`, each tensor (samples, ...), from `start_microbatch` up to
    `stop_microbatch` (None: the end of the plan, if it has one). Iterating again starts over with the same
    workers. What comes out depends on the data set and the plan only; global random state is left alone.

    Raises, while iterating:
        UserError: a sample cannot be read (its own message, also when a worker process found it), or a worker
            sent nothing for `timeout_s` seconds (0: wait for ever): the message says what it was reading.
        RuntimeError: a worker died.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Microbatches,
        *,
        start_microbatch: int = 0,
        stop_microbatch: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        timeout_s: float = 0.0,
    ) -> None:
        if workers < 0:
            raise UserError(f"{workers} loader workers; give 0 (read in the training process) or more")
        self._samples = _Guarded(samples, workers)
        self._keys = _KeyLists(plan, start_microbatch, stop_microbatch)
        self._workers = workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._timeout_s = timeout_s
        self._loader: DataLoader[Batch] | None = None

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for microbatch, loaded in enumerate(self._fetched(), self._keys.start):
            if isinstance(loaded, _Unreadable):
                self.close()  # the traceback keeps this feed alive, and with it the workers
                raise UserError(loaded.message)
            yield microbatch, loaded

    def _fetched(self) -> Iterator[Batch | _Unreadable]:
        if self._workers == 0 and not self._pin_memory:  # a DataLoader would do the same, ten times as slowly
            return map(self._samples.__getitems__, self._keys)
        return self._told_apart(iter(self._opened()))

    def close(self) -> None:
        """Lets the worker processes go once nobody iterates; iterating again starts new ones."""
        self._loader = None

    def _opened(self) -> DataLoader[Batch]:
        if self._loader is None:
            first = next(iter(self._keys), [])
            by_pipe = self._workers > 0 and not shared_memory_serves(
                needed_bytes=self._samples.size_bytes(first) * IN_FLIGHT * self._workers,
                free_bytes=_free_shared_memory(),
                temporary=tempfile.gettempdir(),
            )
            if by_pipe:
                self._samples.stay_out_of_shared_memory()
            self._loader = DataLoader(
                self._samples,  # type: ignore[arg-type]  # only __getitems__ and __len__ are used
                batch_sampler=self._keys,
                collate_fn=_as_arrays if by_pipe else _unchanged,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=self._pin_memory,
                timeout=self._timeout_s if self._workers else 0.0,
                generator=torch.Generator().manual_seed(0),
            )
        return self._loader

    def _told_apart(self, loader: Iterator[Any]) -> Iterator[Any]:
        """What the loader gives; the death of a worker is one kind of error, wherever torch was when it came to light.

        torch raises a RuntimeError of its own if it was waiting, or the broken connection if it was fetching a tensor.
        """
        while True:
            try:
                loaded = next(loader)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                raise RuntimeError(f"a process that reads data died: its connection is broken ({error})") from error
            except RuntimeError as error:
                self.close()
                if "timed out" not in str(error):
                    raise
                raise UserError(
                    f"the processes that read data sent nothing for {self._timeout_s:g} s; {self._samples.doing()}; "
                    "is the file system there? (--timeout gives it more time, --workers 0 reads without processes)"
                ) from error
            yield _as_tensors(loaded)


@dataclass(frozen=True)
class _Unreadable:
    """What a worker sends instead of a micro-batch; an exception would arrive wrapped in a traceback."""

    message: str


class _Guarded:
    """Reads the samples of one micro-batch, stacked; a UserError becomes a value.

    Each of the `workers` processes notes the sample that it is reading where the training process sees it.
    """

    def __init__(self, samples: Samples, workers: int = 0) -> None:
        self._samples = samples
        self._read = samples.together if isinstance(samples, Stacked) else self._one_by_one
        self._stack: Callable[[list[Tensor]], Tensor] = default_collate  # into shared memory, in a worker
        self._reading = multiprocessing.RawArray("q", [-1] * workers) if workers else None

    def stay_out_of_shared_memory(self) -> None:
        self._stack = torch.stack

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | _Unreadable:
        try:
            return self._read(keys)
        except UserError as error:
            return _Unreadable(str(error))
        finally:
            self._note(-1)

    def size_bytes(self, keys: list[tuple[int, int]]) -> int:
        """Bytes of a micro-batch of these samples, from the first of them; 0 where it cannot be read."""
        read = self.__getitems__(keys[:1]) if keys else ()
        if isinstance(read, _Unreadable):
            return 0
        return sum(tensor.nbytes for tensor in read) * len(keys)

    def doing(self) -> str:
        """What each worker is reading, in words."""
        reading = [(worker, index) for worker, index in enumerate(self._reading or ()) if index >= 0]
        if not reading:
            return "none of them was reading a sample"
        return ", ".join(f"process {worker} was reading {self._place(index)}" for worker, index in reading)

    def _place(self, index: int) -> str:
        return self._samples.place(index) if isinstance(self._samples, Placed) else f"sample {index}"

    def _note(self, index: int) -> None:
        process = get_worker_info()
        if process is not None and self._reading is not None:
            self._reading[process.id] = index

    def _one_by_one(self, keys: list[tuple[int, int]]) -> Batch:
        columns = zip(*map(self._one, keys), strict=True)
        return tuple(self._stack(list(column)) for column in columns)

    def _one(self, key: tuple[int, int]) -> Batch:
        self._note(key[1])
        return self._samples[key]


@dataclass(frozen=True)
class _KeyLists:
    """The batch sampler of the loader: one list of keys per micro-batch."""

    plan: Microbatches
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ends = [end for end in (self.stop, self.plan.count) if end is not None]
        microbatch = self.start
        while not ends or microbatch < min(ends):
            keys = self.plan.keys(microbatch)
            if not keys:
                return
            yield keys
            microbatch += 1


def shared_memory_serves(*, needed_bytes: int, free_bytes: int | None, temporary: str) -> bool:
    """Whether worker processes can hand over tensors in shared memory; otherwise they send them through pipes.

    torch needs room in /dev/shm (None: nobody knows how much there is), and a socket in the temporary folder, whose
    path may not be longer than a socket's can be.
    """
    return (free_bytes is None or needed_bytes <= free_bytes) and len(os.fsencode(temporary)) <= LONGEST_TEMPORARY


def _free_shared_memory() -> int | None:
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None


def _unchanged(batch: Any) -> Any:
    return batch


def _as_arrays(batch: Any) -> Any:
    """A worker's micro-batch as arrays, whose bytes go through a pipe, with neither shared memory nor a socket."""
    return batch if isinstance(batch, _Unreadable) else tuple(tensor.numpy() for tensor in batch)


def _as_tensors(loaded: Any) -> Any:
    if isinstance(loaded, tuple) and loaded and isinstance(loaded[0], np.ndarray):
        return tuple(torch.from_numpy(array) for array in loaded)
    return loaded


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} is {number}; give 1 or more")


def _check_pipeline(pipeline: int, pipelines: int) -> None:
    if not 0 <= pipeline < pipelines:
        raise UserError(f"pipeline {pipeline} of {pipelines} does not exist; give 0 to {pipelines - 1}")
