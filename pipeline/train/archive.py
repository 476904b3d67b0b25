"""The checkpoints of one run: who of a job writes them, and what happens when one cannot be written.

                the first stage of the pipeline that leads             the stages of the pipeline that saves
at the start    takes the folder's lock; a fresh run's is empty
at a stop                                                              the lock is still the job's ─► save
                                                                       it fails ─► a warning, again at the next stop
at the end      gives the lock back                                    the last one failed ─► an error after all else
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipeline.cluster.world import World
from pipeline.errors import UserError
from pipeline.settings import Settings
from pipeline.train.checkpoint_folder import Writer, checkpoints, find_latest, run_of
from pipeline.train.folder_lock import FolderLock


class Archive:
    """The folder that --checkpoint names, for one rank; without --checkpoint, nothing."""

    def __init__(self, settings: Settings, world: World) -> None:
        self._settings, self._world = settings, world
        self._directory = None if settings.checkpoint is None else Path(settings.checkpoint)
        self._run = ""
        self._lock: FolderLock | None = None
        self.failure = ""  # why the newest checkpoint is missing
        self.export_failure = ""
        self.report_failure = ""  # why summary or pictures are missing
        self.rescued = ""  # where the weights are instead

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keeps the folder for this job; around everything from the reading of a checkpoint to the end.

        Raises:
            UserError: another job writes there; or it has the checkpoints of another run.
        """
        world = self._world
        if self._directory is None or world.stage != 0:
            yield
            return
        self._lock = FolderLock(
            self._directory,
            world.job,
            shared=world.outlives_this,
            touches=world.may_write,
            clock=monotonic,
            sleep=sleep,
        )
        try:
            if world.leads():
                self._claim()
            yield
        except BaseException:
            if world.outlives_this:
                self._lock.stop()  # others of the job may go on
            else:
                self._lock.release()
            raise
        self._lock.release()

    def _claim(self) -> None:
        assert self._lock is not None and self._directory is not None
        resumed = self._settings.resume_directory
        found = None if resumed is None else find_latest(resumed)
        before = "" if found is None else run_of(found)
        self._run = self._lock.take(before or self._world.job)
        wrong = why_not_here(self._directory, resumed, run=before)
        if wrong is not None:
            self._lock.release()
            raise UserError(wrong)

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        group: dist.ProcessGroup | None,
        ask: Callable[[], object],
    ) -> Path | None:
        """Writes a checkpoint; None where it failed, which is said loudly. Called by all stages of one pipeline.

        Raises:
            UserError: it failed, and --checkpoint-errors is stop.
            Fenced: `ask` says that this pipeline may not write any more.
        """
        from pipeline.train import checkpoint  # a quarter of all that is imported: only where it is used

        assert self._directory is not None
        settings, world = self._settings, self._world
        try:
            saved = checkpoint.save(
                self._directory,
                step,
                tensors=tensors,
                values=values,
                keep=settings.keep,
                group=group,
                writer=self.writer,
                ask=ask,
                finite=[name for name in tensors if name.startswith("model.")],
            )
        except UserError as error:
            self.failure = " ".join(str(error).split())
            if settings.checkpoint_errors == "stop":
                raise
            if world.stage == 0:
                sys.stderr.write(f"WARNING: NO CHECKPOINT: {self.failure}; it is tried again at the next stop\n")
                sys.stderr.flush()
            return None
        self.failure = ""
        return saved

    def writer(self) -> Writer:
        """Who writes; raises `UserError` if the folder is another job's."""
        assert self._lock is not None, "the first stage asks"
        self._run = self._lock.take(self._run or self._world.job)
        return self.passing_writer()._replace(run=self._run)

    def passing_writer(self) -> Writer:
        """Who writes into a folder that is only there for a moment, and not of a run."""
        generation, generations = self._world.lives()
        return Writer(self._world.job, "", self._world.pipeline, generation, generations)

    @property
    def lacks_weights(self) -> bool:
        """Whether the last checkpoint or the exported weights are missing."""
        return bool(self.failure or self.export_failure)

    def complain(self) -> None:
        """At the very end: raises `UserError` if the last checkpoint, exported weights or the summary are missing."""
        missing = [text for text in (self.failure, self.export_failure, self.report_failure) if text]
        if missing:
            rescued = f"; {self.rescued}" if self.rescued else ""
            raise UserError(f"everything else is written, but not what was to stay: {'; '.join(missing)}{rescued}")


def why_not_here(directory: Path, resumed: str | None, *, run: str) -> str | None:
    """Why a run may not write into a folder: it has the checkpoints of another.

    Args:
        resumed: the folder that this run goes on from. run: the one of the checkpoint there.
    """
    found = checkpoints(directory)
    if not found:
        return None
    if resumed is None:
        return (
            f"--checkpoint {directory}: there are checkpoints of an earlier run in it (the last: {found[-1].name}); "
            "give --resume to go on from there, or another folder"
        )
    if Path(resumed).resolve() in (directory.resolve(), *(path.resolve() for path in found)):
        return None
    if all(run_of(path) == run != "" for path in found):
        return None
    return (
        f"--checkpoint {directory}: there are checkpoints in it of another run than that of --resume {resumed} "
        f"(the last one: {found[-1].name}); give another folder"
    )
