"""All replicas of a stage, or all of a host, average together: a round waits for everybody of its scope."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.coordination.groups.events import Form, Ready
from pipeline.coordination.groups.policy import Attendance, Shared


class Everybody:
    """One stage where a round has everybody of its scope."""

    deadline: float | None = None

    def __init__(self, stage: Attendance, job: Shared) -> None:
        self.waiting: dict[int, str] = {}  # pipeline -> scope
        self._stage, self._job = stage, job

    def ready(self, event: Ready, now: float, *, urgent: bool = False) -> list[Form]:
        stage = self._stage
        if event.scope == "host" and event.pipeline in stage.late:
            return [self._job.form(stage.number, [event.pipeline], "it has not met all others since it joined")]
        self.waiting[event.pipeline] = event.scope
        return self._settle({stage.hosts[event.pipeline]})

    def absent(self, pipeline: int, now: float) -> list[Form]:
        self.waiting.pop(pipeline, None)
        return self._settle({self._stage.hosts[pipeline]})

    def left(self, pipeline: int, now: float) -> list[Form]:
        return []

    def present(self, pipeline: int) -> None:
        """Counts from now on."""

    def restarted(self) -> None:
        """Nothing to forget."""

    def tick(self, now: float) -> list[Form]:
        return []

    def _settle(self, hosts: Iterable[str]) -> list[Form]:
        """Closes the round of all, or those of these hosts."""
        stage, waiting = self._stage, self.waiting
        forms = []
        if len(waiting) >= len(stage.working) - len(stage.late):
            meeting = [pipeline for pipeline in stage.working if pipeline not in stage.late]
            if meeting and all(waiting.get(pipeline) == "" for pipeline in meeting):
                stage.meet()
                forms.append(self._form(meeting, "everybody is here"))
        for host in hosts if any(waiting.values()) else ():
            expected = [
                pipeline
                for pipeline in stage.working
                if stage.hosts[pipeline] == host and pipeline not in stage.late and waiting.get(pipeline) != ""
            ]  # who waits for all others cannot come before this round is over
            if expected and all(pipeline in waiting for pipeline in expected):
                forms.append(self._form(expected, f"everybody of {host} is here"))
        return forms

    def _form(self, members: list[int], reason: str) -> Form:
        for member in members:
            del self.waiting[member]
        return self._job.form(self._stage.number, members, reason)
