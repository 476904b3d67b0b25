"""The lock of a folder of checkpoints: one job at a time writes there. It belongs to the job, not to a process.

    DIR/.lock       {"job": "5f0c91", "run": "77a0b2", "host": "w0 ...", "pid": 4711, "since": "12:03:44", ...}

The process that takes it writes it; whichever of the job may come to write checkpoints touches it every second. So it
is nobody's when its process on this host has ended and nobody touches it, or when it is another host's and has not been
touched for long. What is judged is the age that the file system itself sees, whatever the clocks of the hosts say.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from pipeline.core.durable import why_not_written
from pipeline.core.outside import parse_json
from pipeline.errors import UserError

NAME = ".lock"
TOUCH_S = 1.0
DEAD_S = 3.0  # untouched for so long, a lock whose process here has ended is nobody's
SILENT_S = 10.0  # and one of another host
LOOK_S = 0.2
SAME_START_S = 2.0  # the clock of the day moves a little

Verdict = Literal["free", "ours", "held", "wait"]


class Owner(NamedTuple):
    """Who took a lock: the job and run, and its process."""

    job: str
    run: str
    host: str
    pid: int
    began: float  # when that process was started: numbers of processes are used again
    since: str
    shared: bool  # whether other processes of the job may touch it when this one has ended

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host.partition(' ')[0]}, since {self.since}"


class _Found(NamedTuple):
    """A lock as it lies there: the number of its file, and when it was touched."""

    owner: Owner | None
    number: int
    touched: float

    @property
    def state(self) -> tuple[int, float]:
        return self.number, self.touched


def this_process(job: str, run: str, *, shared: bool) -> Owner:
    """This process as the owner of a lock."""
    began = psutil.Process().create_time()
    return Owner(job, run, this_host(), os.getpid(), began, time.strftime("%H:%M:%S"), shared)


def judge(owner: Owner | None, *, job: str, here: str, alive: bool, age_s: float) -> Verdict:
    """What a job may think of a lock.

    Args:
        owner: what stands in it; None where that cannot be read.
        here: this host. alive: whether the owner's process lives, if it is of this host.
        age_s: how long nobody has touched it.
    """
    if owner is not None and owner.job == job:
        return "ours"
    if owner is not None and owner.host == here:
        if alive:
            return "held"
        return "free" if age_s > DEAD_S or not owner.shared else "wait"
    return "free" if age_s > SILENT_S else "wait"


class FolderLock:
    """The lock of one folder, for one job; a thread touches it while this process may come to write.

    Args:
        shared: whether other processes of the job may go on when this one has ended.
        touches: whether this process is one of those who touch it.
        clock, sleep: of waiting to see whether somebody else touches it.
    """

    def __init__(
        self,
        directory: Path,
        job: str,
        *,
        shared: bool,
        touches: Callable[[], bool],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.path, self.job = directory / NAME, job
        self._directory, self._shared, self._touches = directory, shared, touches
        self._clock, self._sleep = clock, sleep
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="folder lock", daemon=True)
        self._thread.start()

    def take(self, run: str) -> str:
        """Takes the lock for `run`, or finds that the job has it; the run that it is for.

        Raises:
            UserError: another job writes there, or the folder cannot be written.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            while not self._create(run):
                owner = self._wait_for_a_verdict()
                if owner is not None:
                    return owner.run
        except OSError as error:
            why = why_not_written(error, self._directory)
            raise UserError(f"--checkpoint {self._directory}: cannot be written: {why}") from error
        return run

    def release(self) -> None:
        """Gives it back, if it is the job's."""
        self.stop()
        try:
            found = self._look()
            if found is not None and found.owner is not None and found.owner.job == self.job:
                self._take_away(found)
        except OSError as error:  # what was written stays, whatever becomes of the lock
            sys.stderr.write(f"warning: the lock {self.path} cannot be given back: {error}\n")

    def stop(self) -> None:
        """Touches it no more; it lasts for a moment, or for as long as others of the job touch it."""
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(TOUCH_S):
            try:
                found = self._look() if self._touches() else None
                if found is not None and found.owner is not None and found.owner.job == self.job:
                    os.utime(self.path)
            except FileNotFoundError:
                continue  # another of the job has released it
            except OSError as error:
                sys.stderr.write(f"warning: the lock {self.path} cannot be kept: {error}\n")
                return

    def _create(self, run: str) -> bool:
        """Whether there was none, and now it is ours."""
        content = json.dumps(this_process(self.job, run, shared=self._shared)._asdict()).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
        except OSError:
            self.path.unlink(missing_ok=True)  # a lock that names nobody would be waited for
            raise
        return True

    def _wait_for_a_verdict(self) -> Owner | None:
        """The owner, if that is this job; None when the lock has been taken away from one who is gone.

        Raises:
            UserError: it is another job's.
        """
        first, told = self._look(), False
        deadline = self._clock() + DEAD_S + SILENT_S
        while first is not None:
            found = self._look()
            if found is None:
                break
            owner, here = found.owner, this_host()
            alive = owner is not None and owner.host == here and _lives(owner)
            verdict = judge(owner, job=self.job, here=here, alive=alive, age_s=self._now() - found.touched)
            if verdict == "ours":
                return owner
            if verdict == "held" or found.state != first.state or self._clock() > deadline:
                raise UserError(
                    f"--checkpoint {self._directory}: another job writes there "
                    f"({'its lock is new' if owner is None else owner.words}); "
                    "give this one a folder of its own, or end that one first"
                )
            if verdict == "free":
                self._take_away(found)
                break
            if not told:
                told = True
                sys.stderr.write(f"{self.path}: waiting to see whether the job that wrote there still lives\n")
            self._sleep(LOOK_S)
        return None

    def _take_away(self, judged: _Found) -> None:
        """Removes the lock that was judged; another that has come meanwhile is put back."""
        aside = self.path.with_name(f"{NAME}.{secrets.token_hex(8)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return  # somebody else was quicker
        found = _look_at(aside)
        if found is not None and (found.owner, found.number) != (judged.owner, judged.number):
            with suppress(FileExistsError):
                os.link(aside, self.path)
        os.unlink(aside)

    def _look(self) -> _Found | None:
        return _look_at(self.path)

    def _now(self) -> float:
        """The time of the file system's clock."""
        probe = self.path.with_name(f"{NAME}.tmp-{secrets.token_hex(8)}")
        with open(probe, "xb") as file:
            probe.unlink(missing_ok=True)
            return os.fstat(file.fileno()).st_mtime


def _look_at(path: Path) -> _Found | None:
    """What is there; the owner is None where the content makes no sense, as in the moment of its writing."""
    try:
        with open(path, "rb") as file:  # opened: a network's file system then asks its server
            state, content = os.fstat(file.fileno()), file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    owner = None
    with suppress(ValueError, TypeError, KeyError):
        fields = parse_json(content)
        owner = Owner(
            str(fields["job"]), str(fields["run"]), str(fields["host"]), int(fields["pid"]),
            float(fields["began"]), str(fields["since"]), bool(fields["shared"]),
        )  # fmt: skip
    return _Found(owner, state.st_ino, state.st_mtime)


def this_host() -> str:
    """This host, since it was started, as those processes see it that see each other."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        same = abs(process.create_time() - owner.began) < SAME_START_S
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
