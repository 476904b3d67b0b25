"""A job under heturun whose workers are killed and frozen from outside, and what their diaries say about it.

    with FaultyJob(folder, stages=2, pipelines=3, options=["--preduce"]) as job:
        job.wait_for_updates(20)
        killed = job.kill(1, stage=0)
        job.wait_for(lambda entry: entry.event == "joined" and entry.time > killed)
        print(longest_pause([e.time for e in job.entries("update", pipeline=0)], killed, killed + 3))

It sees nothing of the job but `HETURUN_DIARY` (pipeline/report/event_log.py), the processes of this machine, and
the output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from heturun.launch.agent import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.05
END_S = 20.0  # for a job that was told to end


class Entry(NamedTuple):
    """One line of a worker's diary."""

    time: float
    pipeline: int
    stage: int
    incarnation: int
    event: str
    values: Mapping[str, Any]


class FaultyJob:
    """heturun in the background; nothing of it is left at the end of the `with`, whatever happens.

    Args:
        folder: an empty one, for all files of the job; its name is in the command line of every worker.
        command: of a worker, without --placement; by default train_resnet.py with `options`.
        launcher, restarts: heturun's --launcher and --max-restarts. environment: variables besides this process's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stages: int,
        pipelines: int,
        options: Sequence[str] = (),
        command: Sequence[str] | None = None,
        launcher: str = "local",
        restarts: int = 0,
        more: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._environment = environment
        self.folder, self.stages, self.pipelines = folder, stages, pipelines
        self.output = folder / "output.txt"
        layout = write_layout(folder / "layout.py", stages, pipelines)
        train = [str(ROOT / "train_resnet.py"), *_files_in(folder), *options]
        self._argv = [
            sys.executable, "-m", "heturun", "-w", str(stages * pipelines), "--launcher", launcher,
            "--max-restarts", str(restarts), *more,
            sys.executable, *(train if command is None else command), "--placement", layout,
        ]  # fmt: skip
        self._read: dict[Path, int] = {}
        self._entries: list[Entry] = []
        self._frozen: set[int] = set()

    def __enter__(self) -> FaultyJob:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HETURUN_DIARY": str(self.folder / "diary")}
        environment |= {
            **self._environment,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the job, politely first."""
        for pid in self._frozen:
            _signal(pid, signal.SIGCONT)
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        _signal(self.process.pid, signal.SIGKILL, group=True)
        self.process.wait()
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)

    # --- faults

    def kill(self, pipeline: int, *, stage: int = 0) -> float:
        """kill -9 of one worker; the time of day."""
        pid, now = self.pid(pipeline, stage), time.time()
        os.kill(pid, signal.SIGKILL)
        return now

    def freeze(self, pipeline: int, *, stage: int = 0) -> float:
        pid, now = self.pid(pipeline, stage), time.time()
        self._frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)
        return now

    def thaw(self, pipeline: int, *, stage: int = 0) -> float:
        pid, now = self.pid(pipeline, stage), time.time()
        self._frozen.discard(pid)
        _signal(pid, signal.SIGCONT)
        return now

    def pid(self, pipeline: int, stage: int = 0) -> int:
        """Of a worker's newest incarnation."""
        return int(self.entries("start", pipeline=pipeline, stage=stage)[-1].values["pid"])

    # --- what is seen

    def entries(
        self, event: str | None = None, *, pipeline: int | None = None, stage: int | None = None, after: float = 0.0
    ) -> list[Entry]:
        """The lines of all diaries that were written so far, in the order of their times."""
        self._look()
        return [
            entry
            for entry in islice(self._entries, bisect_right(self._entries, after, key=_when), None)
            if (event is None or entry.event == event)
            and (pipeline is None or entry.pipeline == pipeline)
            and (stage is None or entry.stage == stage)
        ]

    def _look(self) -> None:
        for path in (self.folder / "diary").glob("p*.jsonl"):
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                place = tuple(int(word[1:]) for word in path.stem.split("."))
                while (line := file.readline()).endswith("\n"):
                    self._read[path] = file.tell()
                    values = json.loads(line)
                    self._entries.append(Entry(values.pop("time"), *place, values.pop("event"), values))
        self._entries.sort(key=_when)

    def wait_until(self, condition: Callable[[], Any], *, within_s: float = 60.0, what: str = "it") -> Any:
        """What `condition` returns, when it is true; an error if the job ends before or nothing comes of it."""
        deadline = time.monotonic() + within_s
        while not (found := condition()):
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}:\n{self.tail()}"
            time.sleep(POLL_S)
        return found

    def wait_for(self, event: str, count: int = 1, *, within_s: float = 60.0, **where: Any) -> list[Entry]:
        """The entries `event`, when there are so many."""

        def enough() -> list[Entry]:
            found = self.entries(event, **where)
            return found if len(found) >= count else []

        found: list[Entry] = self.wait_until(enough, within_s=within_s, what=f"{count} x {event} {where}")
        return found

    def wait_for_updates(self, count: int, *, after: float = 0.0, within_s: float = 60.0) -> None:
        """Until every worker has made so many updates after that time."""
        for pipeline in range(self.pipelines):
            for stage in range(self.stages):
                self.wait_for("update", count, pipeline=pipeline, stage=stage, after=after, within_s=within_s)

    def finish(self, *, within_s: float) -> int:
        """The exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job had not ended after {within_s:g} s:\n{self.tail()}") from None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def tail(self, count: int = 40) -> str:
        return "\n".join(self.text().splitlines()[-count:])

    def processes(self) -> dict[int, str]:
        """The living processes of this job that have its folder in their command line or environment."""
        found = {}
        for place in Path("/proc").iterdir():
            if place.name.isdigit() and int(place.name) != os.getpid():
                with suppress(OSError):
                    words = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
                    state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                    if str(self.folder).encode() in words and state != "Z":
                        found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


def _when(entry: Entry) -> float:
    return entry.time


def write_layout(path: Path, stages: int, pipelines: int) -> str:
    """A device list of processes on this machine's CPUs; FILE:NAME."""
    rows = [[f"cpu({pipeline * stages + stage})" for pipeline in range(pipelines)] for stage in range(stages)]
    text = ",\n    ".join(f"[{', '.join(row)}]" for row in rows)
    path.write_text(f"from pipeline.placement import cpu\n\ngrid = [\n    {text},\n]\n")
    return f"{path}:grid"


def _files_in(folder: Path) -> list[str]:
    return ["--out", str(folder / "out"), "--runs", str(folder / "runs")]


def _signal(pid: int, number: int, *, group: bool = False) -> None:
    with suppress(ProcessLookupError):
        if group:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def process_start(pid: int) -> float:
    """When a process of this machine began, as a time of day."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


def longest_pause(times: Sequence[float], start: float, stop: float) -> float:
    """The longest interval between two successive times that has a part in [start, stop].

    >>> longest_pause([1.0, 2.0, 4.5, 5.0], 3.0, 5.0)
    2.5
    """
    return max((after - before for before, after in pairwise(sorted(times)) if after > start and before < stop))
