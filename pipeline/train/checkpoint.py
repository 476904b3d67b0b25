"""Checkpoints keyed by parameter name, through torch.distributed.checkpoint: any number of stages reads any other's.

    DIR/step-00000100/   .metadata  __0_0.distcp  __1_0.distcp   one file of tensors per stage, and who holds which
                         checkpoint.json                         LR, seeds, data position ...; sums of all files

Every stage writes alone, without a word to the others: its tensors into the folder that the first has made, with a list
of its own. The first makes one list of all, asks whether it still may, and gives the folder its name
(`pipeline.train.checkpoint_folder`), so that a kill at any moment leaves the last good checkpoint. Tensors are named
"model.<parameter>", "optim.<parameter>.<state>" or as the caller likes; a stage passes its own, and asks for its own.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pipeline.cluster.json_exchange import gather_values
from pipeline.core.durable import FileSum, first_line, replacing, sum_of, why_not_written, write_bytes
from pipeline.errors import CoordinatorLost, Fenced, Forged, PeerLost, TooFewReplicas, UserError
from pipeline.train import tensor_list
from pipeline.train.checkpoint_folder import (
    VALUES_FILE,
    Writer,
    begin,
    checkpoints,
    next_number,
    passing_writer,
    publish,
)
from pipeline.train.checkpoint_folder import find_latest as find_latest
from pipeline.train.description import Description, from_text, to_text

METADATA_FILE = ".metadata"
_TOLD: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (CoordinatorLost, Fenced, PeerLost, TooFewReplicas)
}

_CLEAR: tuple[type[Exception], ...] = (UserError, Forged, *_TOLD.values())  # say by themselves what is the matter


def _nothing() -> None:
    return None


def save(
    directory: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    keep: int = 3,
    group: dist.ProcessGroup | None = None,
    writer: Callable[[], Writer] = passing_writer,
    ask: Callable[[], object] = _nothing,
    finite: Collection[str] = (),
) -> Path:
    """Write one checkpoint and return its folder; called by every rank of `group` (the stages of one pipeline) at once.

    Each rank passes its own `tensors`; a name that several pass is taken from the first of them. The first rank's
    `values` (JSON-able) are kept. Without a group this process alone writes. The newest `keep` of the run stay.

    Args:
        writer: for whom; asked for on the first rank, at the beginning and before the end, and raises `UserError` where
            the folder is somebody else's. Without it, this is the only one who writes into the folder.
        ask: raises `Fenced` where this pipeline may no longer publish; called by every rank.
        finite: names of tensors without which, if a number in them is not finite, there is no checkpoint.

    Raises:
        UserError: the folder cannot be written, is not the same folder on every host, or a tensor is not finite.
        PeerLost: another rank of the group went away.
        Fenced: on every rank, if `ask` raised it on one.
    """
    ring = _Ranks(group)
    directory = Path(directory)
    with ring.agreeing(f"checkpoint {directory}, step {step}"):
        ring.each(lambda: _check_finite(tensors, finite))
        folder = Path(ring.from_first(lambda: str(_begin(directory, step, writer()))))
        try:
            ring.each(lambda: _check_shared(folder, ring))
            sums = ring.each(lambda: _write_tensors(folder, tensors, ring.rank))
            ring.from_first(lambda: _describe_all(folder, directory, step, values=values, sums=sums, writer=writer()))
            ring.all_may(ask)
            name: str = ring.from_first(lambda: _publish(folder, directory, step, writer(), keep=keep))
        except BaseException as failed:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(failed, UserError):
                ring.all_may(ask)  # of one that was replaced others may have removed what it wrote
            raise
    return directory / name


def latest(directory: str | Path) -> Path:
    """The newest complete checkpoint of a folder; raises `UserError` where there is none."""
    if not Path(directory).is_dir():
        raise UserError(f"--resume {directory}: there is no such folder")
    found = find_latest(directory)
    if found is None:
        raise UserError(f"--resume {directory}: there is no complete checkpoint in it (a folder step-N)")
    return found


def read_values(checkpoint: str | Path) -> dict[str, Any]:
    """The values that `save` was given, and "step"; raises `UserError` if the file is absent or damaged."""
    described = _describe(Path(checkpoint))
    return {**described.values, "step": described.step}


def read_shapes(checkpoint: str | Path) -> dict[str, torch.Size]:
    """The name and shape of every tensor in a checkpoint."""
    return tensor_list.shapes(_read_list(Path(checkpoint)))


def load(checkpoint: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill the `wanted` tensors by name, wherever they lie; every rank calls it for itself, no process group needed.

    Raises:
        UserError: a name is absent, a shape differs, or a file is absent or damaged; one line names it.
    """
    checkpoint = Path(checkpoint)
    stored = _read_list(checkpoint)
    _check_wanted(checkpoint, stored, wanted)
    _check_files(checkpoint, {info.relative_path for info in _infos(stored, wanted)})
    with _reading(checkpoint):
        state_dict_loader.load(
            {name: tensor.detach() for name, tensor in wanted.items()},
            storage_reader=tensor_list.ListReader(checkpoint, stored),
            no_dist=True,
        )


def export(
    checkpoint: str | Path,
    path: str | Path,
    *,
    prefix: str = "model.",
    ties: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of a checkpoint, from whatever stages, as one safetensors file with the model's own names.

    `ties` maps a borrower's name to its owner's, for tied weights that were saved once: both are written.

    Raises:
        UserError: the checkpoint is damaged, or the file cannot be written.
    """
    from safetensors.torch import save_file

    stored = _read_list(Path(checkpoint)).state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in stored.items()
        if name.startswith(prefix) and isinstance(item, TensorStorageMetadata)
    }
    load(checkpoint, tensors)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for borrower, owner in (ties or {}).items():
        named[borrower] = named[owner].clone()
    with replacing(f"--export {path}", Path(path)) as unfinished:
        save_file(named, unfinished, metadata={"format": "pt"})


class _Ranks:
    """The ranks that write together: each step either succeeds on all of them or raises the same error on all."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.is_first = self.rank == 0
        self._what = ""

    @contextmanager
    def agreeing(self, what: str) -> Iterator[None]:
        """Turn a broken connection into a `PeerLost` that says `what` was being done."""
        self._what = what
        try:
            yield
        except _CLEAR:
            raise
        except RuntimeError as error:
            if self.group is None:
                raise
            raise PeerLost(f"{what}: another stage went away ({first_line(error)})") from error

    def each(self, act: Callable[[], Any]) -> list[Any]:
        """`act()` on every rank, and the results of all, as JSON has them, in the order of the ranks."""
        mine: Any
        try:
            mine = ["done", act()]
        except tuple(_TOLD.values()) as error:
            mine = [type(error).__name__, str(error)]
        except (OSError, UserError, TypeError, ValueError) as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # not the system's: somebody did not come
                mine = [PeerLost.__name__, str(error)]
            else:
                mine = UserError(f"{self._what}: {first_line(error)}")
        everyone = gather_values(mine, self.group)
        for kind, text in everyone:
            if kind in _TOLD:
                raise _TOLD[kind](text)
        return [result for _, result in everyone]

    def all_may(self, ask: Callable[[], object]) -> None:
        """Every rank asks; what one is told, all are told."""

        def asked() -> None:
            ask()

        self.each(asked)

    def from_first(self, act: Callable[[], Any]) -> Any:
        """`act()` on the first rank only; its result, on all."""
        return self.each(act if self.is_first else _nothing)[0]


def _check_finite(tensors: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Raises `UserError` where a number in one of these tensors is not finite."""
    for name in names:
        tensor = tensors.get(name)
        if tensor is not None and not bool(torch.isfinite(tensor.detach()).all()):
            raise UserError(f"{name} has numbers that are not finite; nothing is written over good weights")


def _begin(directory: Path, step: int, writer: Writer) -> Path:
    try:
        return begin(directory, step, writer)
    except OSError as error:
        raise UserError(why_not_written(error, directory)) from error


def _check_shared(folder: Path, ring: _Ranks) -> None:
    if not folder.is_dir():
        raise UserError(
            f"host {socket.gethostname()} (stage {ring.rank}) does not see the folder that stage 0 made; "
            "put --checkpoint on a file system that all hosts share"
        )


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], stage: int) -> dict[str, FileSum]:
    """Writes what this stage has, and its list, as if there were no others; the sums of its files."""
    own = folder / f"stage-{stage}"
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with _quiet():
            state_dict_saver.save(detached, storage_writer=FileSystemWriter(own, sync_files=True), no_dist=True)
        sums = {}
        for path in list(own.glob("*.distcp")):
            name = tensor_list.file_of(stage, path.name)
            os.rename(path, folder / name)
            sums[name] = sum_of(folder / name)
    except (CheckpointException, OSError) as failed:  # the first is not an Exception, and a page long
        error = next(iter(failed.failures.values()))[0] if isinstance(failed, CheckpointException) else failed
        why = why_not_written(error, folder, needed_bytes=sum(tensor.nbytes for tensor in detached.values()))
        raise UserError(f"stage {stage} cannot write: {why}") from None
    return sums


def _describe_all(
    folder: Path,
    directory: Path,
    step: int,
    *,
    values: Mapping[str, Any],
    sums: Sequence[Mapping[str, Sequence[int]]],
    writer: Writer,
) -> None:
    """Makes one list of the lists of all stages, and describes everything."""
    files = {name: FileSum(*pair) for part in sums for name, pair in part.items()}
    for name, file_sum in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file_sum.size:
            raise UserError(f"{name} of another host is not here; put --checkpoint on a file system all hosts share")
    lists = {stage: tensor_list.read_list(folder / f"stage-{stage}" / METADATA_FILE) for stage in range(len(sums))}
    try:
        write_bytes(folder / METADATA_FILE, tensor_list.write_list(tensor_list.merge(lists)))
        for stage in lists:
            shutil.rmtree(folder / f"stage-{stage}")
        files[METADATA_FILE] = sum_of(folder / METADATA_FILE)
        described = Description(step, dict(values), files, writer.run, writer.job, next_number(directory))
        write_bytes(folder / VALUES_FILE, to_text(described).encode())
    except OSError as error:
        raise UserError(why_not_written(error, folder)) from error


def _publish(folder: Path, directory: Path, step: int, writer: Writer, *, keep: int) -> str:
    try:
        return publish(folder, directory, step, writer, keep=keep)
    except OSError as error:
        raise UserError(why_not_written(error, directory)) from error


def _describe(checkpoint: Path) -> Description:
    try:
        return from_text((checkpoint / VALUES_FILE).read_bytes())
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {VALUES_FILE} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint}: {VALUES_FILE} {error}; {_remedy(checkpoint)}") from None


def _read_list(checkpoint: Path) -> Metadata:
    _check_files(checkpoint, {METADATA_FILE})
    try:
        return tensor_list.read_list(checkpoint / METADATA_FILE)
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {METADATA_FILE} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint}: {METADATA_FILE} is refused: {error}") from None


def _check_wanted(checkpoint: Path, tensors: Metadata, wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        stored = tensors.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(
                f"checkpoint {checkpoint}: {name} is not in it; was it written by another model or optimizer?"
            )
        if stored.size != tensor.shape:
            raise UserError(
                f"checkpoint {checkpoint}: {name} has shape {tuple(stored.size)}, this run needs "
                f"{tuple(tensor.shape)}; was it written with another model, data set or option?"
            )


def _check_files(checkpoint: Path, names: set[str]) -> None:
    files = _describe(checkpoint).files
    for name in sorted(names):
        path = checkpoint / name
        try:
            found = sum_of(path)
        except OSError as error:
            raise UserError(
                f"checkpoint {checkpoint}: {name} cannot be read ({error.strerror}); {_remedy(checkpoint)}"
            ) from None
        if name not in files or found != files[name]:
            raise UserError(f"checkpoint {checkpoint}: {name} is damaged; {_remedy(checkpoint)}")


def _infos(tensors: Metadata, wanted: Mapping[str, Tensor]) -> Iterator[Any]:
    return (info for index, info in tensors.storage_data.items() if index.fqn in wanted)


def _remedy(checkpoint: Path) -> str:
    others = [path.name for path in checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    return f"--resume {checkpoint.parent / others[-1]} instead" if others else "there is no other one beside it"


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {first_line(error)}") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {first_line(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remarks that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        yield
