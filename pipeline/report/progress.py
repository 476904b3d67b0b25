"""How far the job is, as a live bar: the launcher's if there is one, else our own on a terminal, else nothing."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO


class Draws(Protocol):
    """The launcher's end: `pipeline.cluster.control.Control`."""

    def progress(self, done: int, total: int, text: str) -> None: ...


class Progress(Protocol):
    def show(self, done: int, total: int, text: str) -> None: ...
    def close(self) -> None: ...


class NoProgress:
    """Nobody looks."""

    def show(self, done: int, total: int, text: str) -> None:
        return None

    def close(self) -> None:
        return None


class LauncherProgress:
    """The launcher draws."""

    def __init__(self, control: Draws) -> None:
        self._control = control

    def show(self, done: int, total: int, text: str) -> None:
        self._control.progress(done, total, text)

    def close(self) -> None:
        return None


class BarProgress:
    """A bar in the last line of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(file=stream))
        self._task: Any = None

    def show(self, done: int, total: int, text: str) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, completed=done, total=total, description=text)

    def close(self) -> None:
        if self._task is not None:
            self._bar.stop()


def make_progress(control: Draws | None, stream: TextIO) -> Progress:
    """Whichever there is to show it."""
    if control is not None:
        return LauncherProgress(control)
    return BarProgress(stream) if stream.isatty() else NoProgress()


class LiveProgress:
    """Shows how far the job is, from the first call on: through the launcher, or here if stderr is a terminal."""

    def __init__(self, control: Draws | None) -> None:
        self._control = control
        self._shown: Progress | None = None

    def __call__(self, done: int, total: int, text: str) -> None:
        if self._shown is None:
            self._shown = make_progress(self._control, sys.stderr)
        self._shown.show(done, total, text)

    def close(self) -> None:
        if self._shown is not None:
            self._shown.close()
