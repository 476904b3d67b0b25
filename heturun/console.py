"""What the user sees: one stream of whole lines with the place they come from, a log per rank, and a live bar.

[w1/0/2] epoch 3, step 120                 host/stage/pipeline
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from heturun.outcome import Output, Progress
from heturun.plan import Coordinator, Process
from pipeline.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

TAIL_LINES = 30
PLAIN_EVERY_S = 10.0


class Console:
    """Prints for all ranks; may be used by several threads. `broken` is set when nobody reads stdout any more."""

    def __init__(self, processes: Sequence[Process], log_dir: Path | None) -> None:
        self._lock = threading.Lock()
        self._prefixes: dict[int, str] = {}
        self._tails: dict[int, deque[str]] = {}
        self._logs: dict[int, IO[str]] = {}
        self._log_dir = log_dir
        self._bars: Bars | None = None
        self._tasks: dict[int, TaskID] = {}
        self._plain_at = time.monotonic()
        self.broken = False
        self.add(*processes)

    def add(self, *processes: Process | Coordinator) -> None:
        """Expects the output of these processes, too."""
        with self._lock:
            for process in processes:
                self._prefixes[process.rank] = f"[{process.where}] "
                self._tails[process.rank] = deque(maxlen=TAIL_LINES)
            if self._log_dir is not None:
                self._logs.update(_open_logs(processes, self._log_dir))

    def output(self, event: Output) -> None:
        """Prints and keeps lines of a rank."""
        prefix = self._prefixes[event.rank]
        with self._lock:
            for line in event.lines:
                self._print(event.stream, prefix + line)
            if event.stream == "stderr":
                self._tails[event.rank].extend(event.lines)
            if event.rank in self._logs:
                self._logs[event.rank].writelines(line + "\n" for line in event.lines)
                self._logs[event.rank].flush()

    def say(self, line: str) -> None:
        """A line of heturun's own, on stderr."""
        with self._lock:
            self._print("stderr", f"heturun: {line}")

    def tail(self, rank: int) -> list[str]:
        """The last lines that a rank wrote to its stderr."""
        with self._lock:
            return list(self._tails[rank])

    def progress(self, event: Progress) -> None:
        """Moves a rank's bar; where there is no terminal to draw it on, says a line every PLAIN_EVERY_S."""
        if not sys.stderr.isatty():
            self._plain_progress(event, time.monotonic())
            return
        with self._lock:
            bars = self._bars or self._start_bars()
            if event.rank not in self._tasks:
                self._tasks[event.rank] = bars.add_task("", total=event.total)
            bars.update(self._tasks[event.rank], completed=event.done, total=event.total, description=event.text)

    def _plain_progress(self, event: Progress, now: float) -> None:
        if now < self._plain_at + PLAIN_EVERY_S:
            return
        self._plain_at = now
        self.say(f"{event.text} {event.done}/{event.total}")

    def finish(self, *last_words: str) -> None:
        """Takes the bar away, closes the logs and prints the last words, on stderr."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
            for log in self._logs.values():
                log.close()
            self._logs = {}
            for line in last_words:
                self._print("stderr", line)

    def _start_bars(self) -> Bars:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # our own lines go through `_print`; rich must not replace sys.stdout under several threads
        self._bars = Bars(*columns, console=Terminal(stderr=True), redirect_stdout=False, redirect_stderr=False)
        self._bars.start()
        return self._bars

    def _print(self, stream: str, line: str) -> None:
        """Whole lines, above the bar where there is one."""
        target = sys.stdout if stream == "stdout" else sys.stderr
        if self._bars is not None and target.isatty():
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            target.buffer.write((line + "\n").encode(errors="replace"))
            target.buffer.flush()
        except BrokenPipeError:
            self.broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), target.fileno())


def log_name(process: Process | Coordinator) -> str:
    if isinstance(process, Coordinator):
        return f"coordinator-{process.host}.log"
    return f"rank{process.rank}-{process.host}-stage{process.stage}-pipeline{process.pipeline}.log"


def _open_logs(processes: Sequence[Process | Coordinator], log_dir: Path) -> dict[int, IO[str]]:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        return {process.rank: (log_dir / log_name(process)).open("w", encoding="utf-8") for process in processes}
    except OSError as error:
        raise UserError(f"--log-dir {log_dir}: {error.strerror}; give a directory that can be written") from error
