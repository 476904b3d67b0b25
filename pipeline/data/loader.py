"""The loader: fetches the samples of one micro-batch after the other, in processes that read ahead.

    plan        keys of micro-batch 5     6         7         8
    worker 0         reads 5 ........ 7 ........
    worker 1              6 ........ 8 ........
    feed                        (5, tensors)  (6, tensors)         in the plan's order, whoever was faster

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
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling

from pipeline.errors import UserError

SHARED_MEMORY = "/dev/shm"
IN_FLIGHT = 16  # micro-batches per worker that /dev/shm shall hold: read ahead, being used, and those of other ranks
KILLED_S = 5.0  # for a process to be gone
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
                self.close()
                _give_up(loader)
                raise RuntimeError(f"a process that reads data died: its connection is broken ({error})") from error
            except RuntimeError as error:
                self.close()
                _give_up(loader)
                if "timed out" not in str(error):
                    raise
                raise UserError(
                    f"the processes that read data sent nothing for {self._timeout_s:g} s; {self._samples.doing()}; "
                    "is the file system there? (--timeout gives it more time, --workers 0 reads without processes)"
                ) from error
            yield _as_tensors(loaded)


def _give_up(loader: Any) -> None:
    """Ends the workers of an iterator one of whose workers is dead or stuck, by force.

    torch's own end asks them politely, and for that takes a lock that the dead one may have held: it would hang
    (`Event.set()` in `_shutdown_workers`).
    """
    if getattr(loader, "_shutdown", True):
        return
    loader._shutdown = True
    if loader._worker_pids_set:  # their end would be an error, wherever this process is then
        signal_handling._remove_worker_pids(id(loader))  # type: ignore[attr-defined]
        loader._worker_pids_set = False
    for worker in loader._workers:
        worker.kill()
    for worker in loader._workers:
        worker.join(KILLED_S)


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
