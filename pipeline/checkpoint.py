"""Checkpoints keyed by parameter name, through torch.distributed.checkpoint: any number of stages reads any other's.

    DIR/step-00000100/   .metadata  __0_0.distcp  __1_0.distcp   one file of tensors per stage, and who holds which
                         checkpoint.json                         LR, seeds, data position ...; size and CRC of each file
    DIR/latest           "step-00000100"
    DIR/.step-00000200.tmp-5f0c/                                 being written: nobody reads it

A folder gets its name by one rename after everything in it has reached the disk, and `latest` changes by another, so a
kill at any moment leaves the last good checkpoint. Tensors are named "model.<parameter>", "optim.<parameter>.<state>"
or as the caller likes; a stage passes its own, and asks for its own.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
import socket
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pipeline.errors import PeerLost, UserError

VALUES_FILE = "checkpoint.json"
METADATA_FILE = ".metadata"
POINTER = "latest"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_UNFINISHED = re.compile(r"\.(step-.*|latest)\.tmp-[0-9a-f]+")
_CHUNK_BYTES = 1 << 20


class FileSum(NamedTuple):
    """What a file must look like: its size in bytes and its CRC-32."""

    size: int
    crc: int


def save(
    directory: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    keep: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and return its folder; called by every rank of `group` (the stages of one pipeline) at once.

    Each rank passes its own `tensors`; a name that several pass is written once. The first rank's `values` (JSON-able)
    are kept. Without a group this process alone writes. The newest `keep` checkpoints stay.

    Raises:
        UserError: the folder cannot be written, or is not the same folder on every host.
        PeerLost: another rank of the group went away.
    """
    ring = _Ranks(group)
    directory = Path(directory)
    with ring.agreeing(f"checkpoint {directory}, step {step}"):
        folder = ring.from_first(lambda: _start(directory, step))
        try:
            ring.each(lambda: _check_shared(folder, ring))
            _write_tensors(folder, tensors, ring)
            sums = ring.each(lambda: _sync_own_files(folder, rank=ring.rank, first=ring.is_first))
            name: str = ring.from_first(lambda: _publish(folder, directory, step, values=values, sums=sums, keep=keep))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return directory / name


def find_latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, or None; a folder that is itself a checkpoint is returned as is."""
    directory = Path(directory)
    if (directory / VALUES_FILE).is_file():
        return directory
    try:
        pointed = directory / (directory / POINTER).read_text(encoding="utf-8").strip()
        if (pointed / VALUES_FILE).is_file() and _NAME.fullmatch(pointed.name):
            return pointed
    except (OSError, UnicodeDecodeError):
        pass  # no pointer yet, or a damaged one: the folders themselves tell
    complete = _checkpoints(directory)
    return complete[-1] if complete else None


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
    return {**described["values"], "step": described["step"]}


def read_shapes(checkpoint: str | Path) -> dict[str, torch.Size]:
    """The name and shape of every tensor in a checkpoint."""
    stored = _read_metadata(Path(checkpoint)).state_dict_metadata
    return {name: item.size for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def load(checkpoint: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Fill the `wanted` tensors by name, wherever they lie; every rank calls it for itself, no process group needed.

    Raises:
        UserError: a name is absent, a shape differs, or a file is absent or damaged; one line names it.
    """
    checkpoint = Path(checkpoint)
    metadata = _read_metadata(checkpoint)
    _check_wanted(checkpoint, metadata, wanted)
    _check_files(checkpoint, {info.relative_path for info in _infos(metadata, wanted)})
    with _reading(checkpoint):
        state_dict_loader.load(
            {name: tensor.detach() for name, tensor in wanted.items()},
            storage_reader=FileSystemReader(checkpoint),
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

    stored = _read_metadata(Path(checkpoint)).state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in stored.items()
        if name.startswith(prefix) and isinstance(item, TensorStorageMetadata)
    }
    load(checkpoint, tensors)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for borrower, owner in (ties or {}).items():
        named[borrower] = named[owner].clone()
    with _writing(f"--export {path}", Path(path)) as unfinished:
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
        except UserError:
            raise
        except RuntimeError as error:
            if self.group is None:
                raise
            raise PeerLost(f"{what}: another stage went away ({_first_line(error)})") from error

    def each(self, act: Any) -> list[Any]:
        """`act()` on every rank, and the results of all, in the order of the ranks."""
        return [result for result, _ in self._exchange(act)]

    def from_first(self, act: Any) -> Any:
        """`act()` on the first rank only; its result, on all."""
        return self._exchange(act if self.is_first else lambda: None)[0][0]

    def _exchange(self, act: Any) -> list[tuple[Any, str]]:
        try:
            mine = (act(), "")
        except (OSError, UserError, TypeError, ValueError) as error:
            mine = (None, _first_line(error))
        everyone = [mine]
        if self.group is not None:
            everyone = [mine] * dist.get_world_size(self.group)
            dist.all_gather_object(everyone, mine, group=self.group)
        for _, complaint in everyone:
            if complaint:
                raise UserError(f"{self._what}: {complaint}")
        return everyone


def _start(directory: Path, step: int) -> Path:
    """A fresh folder to write into; what killed runs left unfinished goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.iterdir():
        if _UNFINISHED.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    folder = directory / f".step-{step:08d}.tmp-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder.absolute()


def _check_shared(folder: Path, ring: _Ranks) -> None:
    if not folder.is_dir():
        raise UserError(
            f"host {socket.gethostname()} (stage {ring.rank}) does not see the folder that stage 0 made; "
            "put --checkpoint on a file system that all hosts share"
        )


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], ring: _Ranks) -> None:
    with _quiet():
        try:
            state_dict_saver.save(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_writer=FileSystemWriter(folder, sync_files=True),
                process_group=ring.group,
                no_dist=ring.group is None,
            )
        except CheckpointException as failed:  # not an Exception, and a page long
            rank, (error, _) = next(iter(failed.failures.items()))
            raise UserError(f"checkpoint {folder.parent}: stage {rank} cannot write: {_first_line(error)}") from None


def _sync_own_files(folder: Path, *, rank: int, first: bool) -> dict[str, FileSum]:
    own = {path.name: path for path in folder.glob(f"__{rank}_*")}
    if first:
        own[METADATA_FILE] = folder / METADATA_FILE
    return {name: _sum(path) for name, path in own.items()}


def _publish(
    folder: Path,
    directory: Path,
    step: int,
    *,
    values: Mapping[str, Any],
    sums: Sequence[Mapping[str, FileSum]],
    keep: int,
) -> str:
    """Describe the files, give the folder its name, point at it, forget the oldest; returns the name."""
    files = {name: file_sum for part in sums for name, file_sum in part.items()}
    for name, file_sum in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file_sum.size:
            raise UserError(f"{name} of another host is not here; put --checkpoint on a file system all hosts share")
    described = {"format": 1, "step": step, "values": dict(values), "files": files}
    _write_text(folder / VALUES_FILE, json.dumps(described, indent=1))
    _sync_folder(folder)
    name = _free_name(directory, step)
    os.rename(folder, directory / name)
    _sync_folder(directory)
    _point(directory, name)
    _forget(directory, keep=keep, pointed=name)
    return name


def _free_name(directory: Path, step: int) -> str:
    """A step written for the second time, after a resume, stands beside the first until that is forgotten."""
    name = f"step-{step:08d}"
    again = 1
    while (directory / name).exists():
        again += 1
        name = f"step-{step:08d}-{again}"
    return name


def _point(directory: Path, name: str) -> None:
    with _writing(f"checkpoint {directory}", directory / POINTER) as unfinished:
        _write_text(unfinished, name + "\n")


def _forget(directory: Path, *, keep: int, pointed: str) -> None:
    for old in _checkpoints(directory)[:-keep]:
        if old.name != pointed:
            unfinished = directory / f".{old.name}.tmp-{secrets.token_hex(8)}"
            os.rename(old, unfinished)  # so that nobody reads half a checkpoint
            shutil.rmtree(unfinished, ignore_errors=True)


def _checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / VALUES_FILE).is_file():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def _describe(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / VALUES_FILE
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        described["values"], described["step"], described["files"]
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint}: {VALUES_FILE} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {checkpoint}: {VALUES_FILE} is damaged; {_remedy(checkpoint)}") from None
    return described


def _read_metadata(checkpoint: Path) -> Metadata:
    _check_files(checkpoint, {METADATA_FILE})
    with _reading(checkpoint):
        return FileSystemReader(checkpoint).read_metadata()


def _check_wanted(checkpoint: Path, metadata: Metadata, wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        stored = metadata.state_dict_metadata.get(name)
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
    files = _describe(checkpoint)["files"]
    for name in sorted(names):
        path = checkpoint / name
        try:
            found = _sum(path)
        except OSError as error:
            raise UserError(
                f"checkpoint {checkpoint}: {name} cannot be read ({error.strerror}); {_remedy(checkpoint)}"
            ) from None
        if name not in files or found != tuple(files[name]):
            raise UserError(f"checkpoint {checkpoint}: {name} is damaged; {_remedy(checkpoint)}")


def _infos(metadata: Metadata, wanted: Mapping[str, Tensor]) -> Iterator[Any]:
    return (info for index, info in metadata.storage_data.items() if index.fqn in wanted)


def _remedy(checkpoint: Path) -> str:
    others = [path.name for path in _checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    return f"--resume {checkpoint.parent / others[-1]} instead" if others else "there is no other one beside it"


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {_first_line(error)}") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {_first_line(error)}") from None


@contextmanager
def _writing(what: str, path: Path) -> Iterator[Path]:
    """A name to write to; at the end it becomes `path` by one rename."""
    unfinished = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except Exception as error:
        with suppress(OSError):  # the first error is the one to tell
            unfinished.unlink()
        raise UserError(f"{what}: cannot be written: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remarks that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        yield


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sum(path: Path) -> FileSum:
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return FileSum(size, crc)


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
