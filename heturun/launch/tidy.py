"""What agents tidy up behind Open MPI, which leaves it where a process was killed: shared memory, files, daemons.

    agent ──fork──► heir, in a session of its own              /dev/shm/heturun-XXXX   segments of this agent's ranks
      │               waits at a pipe for its agent's end      DIR on another host     session files, see `deliver`
      ├── in order: "go" ──► leaves                            prted                   mpirun's daemon there
      └── killed, or its launcher is gone ──► the pipe closes ──► settles all of these

prted kills its agents a second after it has lost mpirun, and would wait long for a host that is gone: so an heir.
Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

SHARED_MEMORY = Path("/dev/shm")
BACKING = (  # who puts segments there: Open MPI 5, Open MPI 4, and their windows
    "OMPI_MCA_btl_sm_backing_directory",
    "OMPI_MCA_btl_vader_backing_directory",
    "OMPI_MCA_osc_sm_backing_directory",
    "OMPI_MCA_osc_rdma_backing_directory",
)
DAEMONS = ("prted", "orted")
REMOVE_S = 2.0
GO = b"."


class Estate(NamedTuple):
    """What has to go when an agent that mpirun started ends.

    segments: None where there is no /dev/shm. starter: mpirun, or its daemon. folder: the job's on this host.
    launcher: if it is on this host, the process that removes the folder as long as it is there.
    """

    segments: Path | None
    starter: int
    folder: str | None
    launcher: int | None

    @property
    def variables(self) -> dict[str, str]:
        """They lead Open MPI's segments to where they belong."""
        return {} if self.segments is None else dict.fromkeys(BACKING, str(self.segments))

    def remove_segments(self) -> None:
        if self.segments is not None:
            shutil.rmtree(self.segments, ignore_errors=True)

    def settle(self) -> None:
        """Everything, as nobody else will: the rank's pipeline is lost."""
        end_daemon(self.starter)
        self.remove_segments()
        if self.folder is not None and (self.launcher is None or not _runs(self.launcher)):
            end_watcher(self.folder)
            remove(self.folder)


def is_needed() -> bool:
    """Whether mpirun has started this agent, on a system where the rest can be done."""
    return sys.platform == "linux" and ("PMIX_NAMESPACE" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ)


def make_estate(starter: int, folder: str | None, *, far: bool, parent: Path = SHARED_MEMORY) -> Estate:
    """With a directory for segments in `parent`; `far`: the launcher is on another host."""
    there = os.access(parent, os.W_OK)
    segments = Path(tempfile.mkdtemp(prefix="heturun-", dir=parent)) if there else None
    return Estate(segments, starter, folder, None if far else _parent(starter))


def _parent(process: int) -> int:
    return int(_status(process)[1])


def _runs(process: int) -> bool:
    with contextlib.suppress(OSError):
        return _status(process)[0] != "Z"
    return False


def _status(process: int) -> list[str]:
    """State, parent, group, session ... of a process, as Linux tells them."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


class Heir:
    """A process that calls `settle` when this one ends without having dismissed it.

    Made before any thread, and before this process becomes the parent of all orphans below it.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        waits, self._end = os.pipe()
        child = os.fork()
        if child == 0:
            _become_heir(waits, settle)
        os.close(waits)
        os.waitpid(child, 0)

    def dismiss(self) -> None:
        os.write(self._end, GO)
        os.close(self._end)


def _become_heir(waits: int, settle: Callable[[], None]) -> NoReturn:
    """In the child; its own child is nobody's, so that neither the agent nor mpirun ends it with theirs."""
    try:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            _keep_only(waits)
            if os.read(waits, 1) != GO:
                settle()
    finally:
        os._exit(0)


def _keep_only(descriptor: int) -> None:
    """Lets go of the agent's connections and streams, whose ends others wait for."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))


def end_daemon(starter: int) -> None:
    """Ends mpirun's daemon on this host; at once, for it would take its time."""
    with contextlib.suppress(OSError):  # it has gone already
        if Path(f"/proc/{starter}/comm").read_text().strip() in DAEMONS:
            os.kill(starter, signal.SIGKILL)


def end_watcher(folder: str) -> None:
    """Ends the shell that would remove the folder when the launcher says so, which it may never."""
    with contextlib.suppress(OSError, ValueError):  # there is none, or no longer
        watcher = int(Path(folder, "watcher").read_text())
        if folder.encode() in Path(f"/proc/{watcher}/cmdline").read_bytes():
            os.kill(watcher, signal.SIGTERM)


def remove(folder: str) -> None:
    """Removes a job's directory, in which mpirun may still be tidying up."""
    deadline = time.monotonic() + REMOVE_S
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
