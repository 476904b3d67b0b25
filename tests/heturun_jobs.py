"""Starting heturun from tests: jobs of small Python programs, and looking for what they leave behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HETURUN = (sys.executable, "-m", "heturun")
WITH_COORDINATOR = (
    "import sys; from heturun.__main__ import main; sys.exit(main(sys.argv[5:], coordinator=sys.argv[1:5]))"
)
LIMIT_S = 60.0


def clean_environment(**extra: str) -> dict[str, str]:
    """Ours, with heturun importable and without what a launcher around the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "HETURUN_C"))}
    return {**kept, "PYTHONPATH": str(ROOT), **extra}


def heturun(*arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run heturun to its end."""
    return subprocess.run(
        [*HETURUN, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=cwd,
        env=clean_environment(**extra),
        stdin=subprocess.DEVNULL,
    )


def program(code: str) -> list[str]:
    """A command that runs `code`, with the usual imports."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


class RunningJob:
    """heturun in the background; `marker` stands in the command line of every process of the job."""

    def __init__(self, process: subprocess.Popen[str], marker: str) -> None:
        self.process, self.marker = process, marker
        self.lines: list[str] = []

    def wait_for_lines(self, word: str, count: int) -> None:
        """Read the job's output until `count` lines contain `word`."""
        assert self.process.stdout is not None
        while sum(word in line for line in self.lines) < count:
            line = self.process.stdout.readline()
            assert line, f"the job ended before {count} x {word!r}: {self.lines}"
            self.lines.append(line.rstrip("\n"))

    def finish(self, *, within_s: float) -> int:
        """The exit status; the rest of the output is added to `lines`."""
        rest, _ = self.process.communicate(timeout=within_s)
        self.lines += rest.splitlines()
        return self.process.returncode

    def left_but(self, launcher: int, *, within_s: float = 20.0) -> list[str]:
        """The same of all but the launcher; agents, which have no marker, are known as its children."""
        deadline = time.monotonic() + within_s
        while (found := [pid for pid in children_of(launcher) if not is_zombie(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [str(pid) for pid in found]

    def left(self, *, within_s: float = 8.0) -> list[str]:
        """Command lines of the job's processes that are still there after `within_s`."""
        deadline = time.monotonic() + within_s
        while (found := processes_with(self.marker)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return list(found.values())


@contextmanager
def job(
    *arguments: str, code: str, more: Sequence[str] = (), coordinator: str | None = None, **popen: Any
) -> Iterator[RunningJob]:
    """heturun with `code` on every rank, in the background; killed in the end if it is still there.

    `coordinator`: what the coordinator runs instead of the real one.
    """
    marker = f"job-{secrets.token_hex(8)}"
    starter = HETURUN
    if coordinator is not None:
        starter = (sys.executable, "-c", WITH_COORDINATOR, *program(coordinator), marker)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a killed launcher cannot tidy up
        process = subprocess.Popen(
            [*starter, *arguments, *program(code), marker, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=clean_environment(TMPDIR=folder),
            start_new_session=True,
            **popen,
        )
        try:
            yield RunningJob(process, marker)
        finally:
            end(process, marker)


def end(process: subprocess.Popen[str], marker: str) -> None:
    """Kill what is left of a job."""
    process.kill()
    if process.stdout is not None:
        process.communicate()
    process.wait()
    for pid in processes_with(marker):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_with(marker: str) -> dict[int, str]:
    """The living processes whose command line contains `marker`, and those command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if marker in line:
                found[int(entry.name)] = line
    return found


def children_of(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children_of(child)]
    return found


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
