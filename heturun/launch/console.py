"""What the user sees: one stream of whole lines with the place they come from, a log per rank, and a live bar.

[w1/0/2] epoch 3, step 120                 host/stage/pipeline
stdout or stderr is closed or full         nothing is printed there any more, the job and its logs go on
stdout or stderr is not read               the lines wait (`printer`)
nobody will ever read (`| head`)           the job ends
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TextIO

from heturun.launch.outcome import Output, Progress
from heturun.launch.printer import Printer, write_to
from heturun.launch.processes import Coordinator, Process
from pipeline.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

TAIL_LINES = 30
PLAIN_EVERY_S = 10.0
PLAIN_GROWTH = 0.1  # of the job's time so far, so that a long job's log is not filled with it
IDLE_S = 30.0  # at the end, a reader who takes nothing for so long is not waited for


class Plain(NamedTuple):
    """Progress as lines, where there is no terminal: when the next one is due, and what the last one said."""

    began: float
    due: float
    said: str = ""

    def after(self, progress: Progress, now: float) -> tuple[Plain, str | None]:
        """The line to say now, if any: never one twice, and the later the rarer."""
        line = f"{progress.text} {progress.done}/{progress.total}"
        if now < self.due or line == self.said:
            return self, None
        return Plain(self.began, now + max(PLAIN_EVERY_S, PLAIN_GROWTH * (now - self.began)), line), line


class Console:
    """Prints for all ranks; may be used by several threads, and holds none of them up.

    `on_broken` is called, once, when nobody will read stdout or stderr any more.
    """

    def __init__(self, processes: Sequence[Process], log_dir: Path | None) -> None:
        self._lock = threading.Lock()
        self._prefixes: dict[int, str] = {}
        self._tails: dict[int, deque[str]] = {}
        self._logs: dict[int, IO[str]] = {}
        self._log_dir = log_dir
        now = time.monotonic()
        self._plain = Plain(now, now + PLAIN_EVERY_S)
        self.broken = False
        self.on_broken: Callable[[], None] = lambda: None
        self._bars = _Terminal(sys.stderr) if _is_terminal(sys.stderr) else None
        self._err = self._printer(sys.stderr, self._bars)
        self._out = self._err if _same_file(sys.stdout, sys.stderr) else self._printer(sys.stdout, None)
        self.add(*processes)

    def _printer(self, stream: TextIO | None, bars: _Terminal | None) -> Printer | None:
        """None for a stream that was closed from the beginning."""
        if stream is None:
            return None
        name = "stdout" if stream is sys.stdout else "stderr"

        def failed(error: OSError) -> None:
            self._cannot_print(name, error)

        if bars is not None:
            return Printer(bars.write, draw=bars.draw, close=bars.close, failed=failed)
        stream.flush()
        return Printer(write_to(stream.fileno()), failed=failed)

    def _cannot_print(self, name: str, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self.broken = True
            self.on_broken()
        elif name == "stdout" and self._err is not None:
            self._err.put(f"heturun: stdout cannot be written ({error.strerror}); the job goes on without it")

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
            printer = self._out if event.stream == "stdout" else self._err
            if printer is not None:
                printer.put(*[prefix + line for line in event.lines])
            if event.stream == "stderr":
                self._tails[event.rank].extend(event.lines)
            if event.rank in self._logs:
                self._log(event)

    def _log(self, event: Output) -> None:
        """A log that cannot be written any more ends; the job does not."""
        log = self._logs[event.rank]
        try:
            log.writelines(line + "\n" for line in event.lines)
            log.flush()
        except OSError as error:
            del self._logs[event.rank]
            self.say(f"--log-dir: {log.name} cannot be written ({error.strerror}); this log ends here")

    def say(self, *lines: str) -> None:
        """Lines of heturun's own, on stderr."""
        if self._err is not None:
            self._err.put(*[f"heturun: {line}" for line in lines])

    def tail(self, rank: int) -> list[str]:
        """The last lines that a rank wrote to its stderr."""
        with self._lock:
            return list(self._tails[rank])

    def progress(self, event: Progress) -> None:
        """Moves a rank's bar; where there is no terminal to draw it on, says a line now and then."""
        if self._bars is not None and self._err is not None:
            self._err.show(event)
            return
        with self._lock:
            self._plain, line = self._plain.after(event, time.monotonic())
        if line is not None:
            self.say(line)

    def finish(self, *last_words: str, idle_s: float = IDLE_S, give_up: Callable[[], bool] = lambda: False) -> None:
        """Closes the logs, prints what waits and the last words, on stderr, and takes the bar away.

        A reader who is there but slow is waited for; nobody is once `give_up` says so.
        """
        with self._lock:
            for log in self._logs.values():
                _close(log)
            self._logs = {}
        if self._out is not None and self._out is not self._err:
            self._out.finish(idle_s=idle_s, give_up=give_up)
        if self._err is not None:
            self._err.put(*last_words)
            self._err.finish(idle_s=idle_s, give_up=give_up)


class _Terminal:
    """A terminal with bars below the lines; used by the printer's thread alone, so nothing else waits for it."""

    def __init__(self, stream: TextIO) -> None:
        self._plain = write_to(stream.fileno())
        self._bars: Bars | None = None
        self._tasks: dict[int, TaskID] = {}

    def write(self, lines: Sequence[bytes]) -> None:
        if self._bars is None:
            self._plain(lines)
            return
        for line in lines:
            self._bars.console.print(line.decode(errors="replace"), markup=False, highlight=False, soft_wrap=True)

    def draw(self, newest: Sequence[Progress]) -> None:
        bars = self._bars or self._start()
        for event in newest:
            if event.rank not in self._tasks:
                self._tasks[event.rank] = bars.add_task("", total=event.total)
            bars.update(self._tasks[event.rank], completed=event.done, total=event.total, description=event.text)
        bars.refresh()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _start(self) -> Bars:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # no thread of rich's own may hold a lock while the terminal stands still, and sys.stdout stays as it is
        options = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        self._bars = Bars(*columns, console=Screen(stderr=True), **options)  # type: ignore[arg-type]
        self._bars.start()
        return self._bars


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _same_file(one: TextIO | None, other: TextIO | None) -> bool:
    """Whether both lead to the same place, where their lines must keep their order."""
    return one is not None and other is not None and os.path.sameopenfile(one.fileno(), other.fileno())


def _close(log: IO[str]) -> None:
    try:
        log.close()
    except OSError:  # what could not be written was said when it was to be
        return


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
