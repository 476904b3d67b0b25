"""Files that are whole or absent, also after a power cut; and, in one line, why one could not be written."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError

_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FileSum(NamedTuple):
    """What a file must look like: its size in bytes and its CRC-32."""

    size: int
    crc: int


def sum_of(path: Path) -> FileSum:
    """The sum of a file as it lies there."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return FileSum(size, crc)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file and waits until it has reached the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder have reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(what: str, path: Path, *, mark: str = "") -> Iterator[Path]:
    """A name to write to; at the end it becomes `path` by one rename.

    Args:
        mark: goes into that name, so that whoever finds it knows whose it was.

    Raises:
        UserError: it cannot be written; begins with `what`.
    """
    unfinished = path.with_name(f".{path.name}.tmp-{mark}{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except Exception as error:
        why = why_not_written(error, path.parent)
        with suppress(OSError):  # the first error is the one to tell
            unfinished.unlink()
        raise UserError(f"{what}: cannot be written: {why}") from error


def why_not_written(error: BaseException, folder: Path, *, needed_bytes: int = 0) -> str:
    """One line: the error, or, where the disk is full, which one, and how many bytes are free.

    Args:
        folder: where it was to be written; ask before what is half written is removed.
        needed_bytes: how many were to be written; libraries hide the system's error behind one of their own.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:
        return first_line(error)
    if not is_full(error, free_bytes=free_bytes, needed_bytes=needed_bytes):
        return first_line(error)
    needed = f", {needed_bytes:,} are needed" if needed_bytes else ""
    return f"the disk is full: {free_bytes:,} bytes are free on {_disk_of(folder)}{needed}"


def is_full(error: BaseException, *, free_bytes: int, needed_bytes: int) -> bool:
    """Whether a full disk (or a quota) explains this error."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    numbers = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
    return any(number in _FULL for number in numbers) if numbers else free_bytes < needed_bytes


def _disk_of(folder: Path) -> str:
    """ "/mnt/data of host w0"."""
    mount = folder.absolute()
    while not os.path.ismount(mount):
        mount = mount.parent
    return f"{mount} of host {socket.gethostname()}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
