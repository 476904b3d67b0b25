"""A folder of checkpoints: which are whole, which is the newest, what is half written and whose it is.

    DIR/step-00000100/                                one checkpoint
    DIR/latest                                        "step-00000100"
    DIR/.step-00000200.tmp-5f0c91.p1.g2.9a01.../      being written: job 5f0c91, its pipeline 1 in its second life
    DIR/.lock                                         the job that writes here (`pipeline.train.folder_lock`)

A checkpoint gets its name by one rename after everything in it has reached the disk, and `latest` changes by another.
What is half written goes when its writer is surely gone: it is of another job (which does not hold the lock any more),
or of an earlier life of a pipeline. Rotation touches only what the same run has written, oldest first by its number.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pipeline.core.durable import replacing, sync_folder, write_bytes
from pipeline.train.description import HEAD_BYTES, Head, head

VALUES_FILE = "checkpoint.json"
POINTER = "latest"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_UNFINISHED = re.compile(r"\.(?:step-.*|latest|lock)\.tmp-(?:([0-9a-f]+)\.p(\d+)\.g(\d+)\.)?[0-9a-f]+")
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class Writer(NamedTuple):
    """Who writes: a pipeline of a job, in one of its lives; and for which run (a job that resumes goes on with a run).

    `generations` are the newest lives of all pipelines that are known: of older ones nobody writes any more.
    """

    job: str
    run: str = ""
    pipeline: int = 0
    generation: int = 0
    generations: Mapping[int, int] = MappingProxyType({})

    @property
    def mark(self) -> str:
        """What the names of its unfinished files carry."""
        return f"{self.job}.p{self.pipeline}.g{self.generation}."


def passing_writer() -> Writer:
    """A writer who is alone in a folder, for as long as one checkpoint takes."""
    return Writer(secrets.token_hex(8))


def is_left_behind(name: str, writer: Writer) -> bool:
    """Whether this is the name of something half written whose writer is gone, as `writer` knows.

    >>> mine = Writer("5f", pipeline=0, generation=1, generations={0: 1, 1: 3})
    >>> [is_left_behind(f".step-00000009.tmp-{mark}9a", mine) for mark in ("", "77.p1.g0.", "5f.p1.g3.", "5f.p1.g2.")]
    [True, True, False, True]
    """
    match = _UNFINISHED.fullmatch(name)
    if match is None:
        return False
    job, pipeline, generation = match[1], int(match[2] or 0), int(match[3] or 0)
    newest = writer.generation if pipeline == writer.pipeline else writer.generations.get(pipeline, 0)
    return job != writer.job or generation < newest


def sweep(directory: Path, writer: Writer) -> None:
    """Removes what those who are gone left half written."""
    for left in directory.iterdir():
        if is_left_behind(left.name, writer):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def begin(directory: Path, step: int, writer: Writer) -> Path:
    """A fresh folder to write into."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory, writer)
    folder = directory / _unfinished_name(f"step-{step:08d}", writer)
    folder.mkdir()
    return folder.absolute()


def publish(folder: Path, directory: Path, step: int, writer: Writer, *, keep: int) -> str:
    """Gives an unfinished folder its name, points at it, forgets the run's oldest; returns the name."""
    sync_folder(folder)
    name = _give_name(folder, directory, step)
    sync_folder(directory)
    if not _is_behind(directory, step, writer):
        _point(directory, name, writer)
    _forget(directory, writer, keep=keep, but=name)
    return name


def find_latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, or None; a folder that is itself a checkpoint is returned as is."""
    directory = Path(directory)
    if (directory / VALUES_FILE).is_file():
        return directory
    found = _pointed(directory)
    if found is not None:
        return found
    complete = checkpoints(directory)
    return complete[-1] if complete else None


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first: as they were written, those without a number by step."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / VALUES_FILE).is_file():
            found.append((head_of(path).number, int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def head_of(checkpoint: Path) -> Head:
    """Run, job, number and step of a checkpoint, without its values."""
    try:
        with open(checkpoint / VALUES_FILE, "rb") as file:
            return head(file.read(HEAD_BYTES))
    except OSError:  # it goes just now, or cannot be read: it is no run's
        return head(b"")


def run_of(checkpoint: Path) -> str:
    """The run that wrote a checkpoint; "" where that is not known."""
    return head_of(checkpoint).run


def next_number(directory: Path) -> int:
    """The number of the next checkpoint."""
    return 1 + max((head_of(path).number for path in checkpoints(directory)), default=0)


def _unfinished_name(name: str, writer: Writer) -> str:
    return f".{name}.tmp-{writer.mark}{secrets.token_hex(8)}"


def _give_name(folder: Path, directory: Path, step: int) -> str:
    """A step written for the second time, after a resume, stands beside the first until that is forgotten."""
    name, again = f"step-{step:08d}", 1
    while True:
        try:
            if not (directory / name).exists():  # an empty folder would be replaced
                os.rename(folder, directory / name)
                return name
        except OSError as error:
            if error.errno not in _TAKEN:  # by somebody else, meanwhile
                raise
        again += 1
        name = f"step-{step:08d}-{again}"


def _pointed(directory: Path) -> Path | None:
    """The checkpoint that `latest` names, if there is one."""
    try:
        pointed = directory / (directory / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None  # no pointer yet, or a damaged one: the folders themselves tell
    return pointed if _NAME.fullmatch(pointed.name) and (pointed / VALUES_FILE).is_file() else None


def _is_behind(directory: Path, step: int, writer: Writer) -> bool:
    """Whether the same job has come further: this writer stood still in the middle of a checkpoint."""
    pointed = _pointed(directory)
    newest = None if pointed is None else head_of(pointed)
    return newest is not None and newest.job == writer.job and newest.step > step


def _point(directory: Path, name: str, writer: Writer) -> None:
    with replacing(f"checkpoint {directory}", directory / POINTER, mark=writer.mark) as unfinished:
        write_bytes(unfinished, f"{name}\n".encode())


def _forget(directory: Path, writer: Writer, *, keep: int, but: str) -> None:
    own = [path for path in checkpoints(directory) if run_of(path) == writer.run]
    for old in own[:-keep]:
        if old.name != but:
            unfinished = directory / _unfinished_name(old.name, writer)
            os.rename(old, unfinished)  # so that nobody reads half a checkpoint
            shutil.rmtree(unfinished, ignore_errors=True)
