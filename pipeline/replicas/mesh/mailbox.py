"""Where parts of rounds wait for whoever averages, and the knowledge of who can still send them.

    reader threads --put--> | (sender, round, part): memory | --collect--> the thread that averages
    coordinator --update, lose--> | generations, who is gone | --wakes--^  GroupBroken: a missing part's sender is gone

A generation is a fence: it grows when a pipeline is declared lost, and what an older one sends is dropped. Rounds are
averaged in ascending order, so whatever belongs to one before the oldest under way is garbage.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import NamedTuple

from torch import Tensor

from pipeline.errors import GroupBroken, PeerLost

PROBE_S = 0.05  # how often a waiting average looks whether connections to those it waits for still stand


class Key(NamedTuple):
    sender: int
    round: int
    part: int


class Mailbox:
    """Parts that came, of one replica; every method may be called by any thread."""

    def __init__(self, pipeline: int) -> None:
        self.pipeline = pipeline
        self.generation = 0
        self._generations: dict[int, int] = {}
        self._known: frozenset[int] | None = None  # pipelines that live; None: nobody has said yet
        self._gone: dict[int, tuple[int, int]] = {}  # pipeline -> (its generation, own generation) that are over
        self._parts: dict[Key, Tensor] = {}
        self._posted: dict[Key, Tensor] = {}
        self._missing: list[set[Key]] = []  # of each thread that collects
        self._gave_up: dict[tuple[int, int], int] = {}  # (sender, round) -> the pipeline that was lost
        self._active: list[int] = []
        self._floor = -1  # rounds below are over
        self._closed = False
        self._error: Exception | None = None  # of a thread that reads
        self._changed = threading.Condition()

    # who can send

    def update(self, live: Sequence[int], generations: Mapping[int, int], own: int) -> None:
        """Replaces who lives, and with which generation."""
        with self._changed:
            self._known = frozenset(live)
            self._generations = {**self._generations, **generations}
            self.generation = own
            for pipeline, (theirs, mine) in list(self._gone.items()):
                if self._generations.get(pipeline, 0) > theirs or own > mine:
                    del self._gone[pipeline]
            self._changed.notify_all()

    def generation_of(self, pipeline: int) -> int:
        with self._changed:
            return self._generations.get(pipeline, 0)

    def lose(self, pipeline: int, *, before: int | None = None) -> None:
        """The coordinator's word: a pipeline sends no more until `update` names it again.

        Args:
            before: its new generation, if known; then not even a late `update` revives an older one.
        """
        with self._changed:
            if self._known is not None:
                self._known -= {pipeline}
            if before is not None or self._known is None or pipeline == self.pipeline:
                generation = self._generations.get(pipeline, 0) if before is None else before - 1
                self._mark(pipeline, generation, self.generation)
            self._changed.notify_all()

    def cut(self, pipeline: int, generation: int, own: int) -> bool:
        """A connection broke that the two had made with these generations; False when it was over anyway."""
        with self._changed:
            self._mark(pipeline, generation, own)
            self._changed.notify_all()
            current = generation >= self._generations.get(pipeline, 0) and own >= self.generation
            return current and (self._known is None or pipeline in self._known)

    def _mark(self, pipeline: int, generation: int, own: int) -> None:
        theirs, mine = self._gone.get(pipeline, (-1, -1))
        self._gone[pipeline] = (max(theirs, generation), max(mine, own))

    def is_gone(self, pipeline: int) -> bool:
        with self._changed:
            return self._is_gone(pipeline)

    def _is_gone(self, pipeline: int) -> bool:
        if pipeline in self._gone:
            theirs, mine = self._gone[pipeline]
            if self._generations.get(pipeline, 0) <= theirs and self.generation <= mine:
                return True
        return self._known is not None and pipeline != self.pipeline and pipeline not in self._known

    def close(self) -> None:
        """Nobody sends any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """A thread that reads has failed in a way that nobody foresaw: whoever waits here, now or later, is told."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    # what came

    def posted(self, key: Key, nbytes: int) -> Tensor | None:
        """The memory that waits for this part, if some does."""
        with self._changed:
            memory = self._posted.get(key)
            return memory if memory is not None and memory.nbytes == nbytes else None

    def put(self, key: Key, memory: Tensor, generation: int) -> None:
        """Takes a part, unless its sender's generation or its round is over."""
        with self._changed:
            if generation >= self._generations.get(key.sender, 0) and key.round >= self._floor:
                self._parts[key] = memory
                for missing in self._missing:
                    missing.discard(key)
                if not all(self._missing):  # somebody has everything now
                    self._changed.notify_all()

    def put_gave_up(self, sender: int, round: int, lost: int) -> None:
        with self._changed:
            if round >= self._floor:
                self._gave_up[sender, round] = lost
                self._changed.notify_all()

    # who waits

    @contextlib.contextmanager
    def round(self, number: int) -> Iterator[None]:
        """While a round is under way; forgets what belongs to earlier ones."""
        with self._changed:
            self._active.append(number)
            self._floor = max(self._floor, min(self._active))
            for table in (self._parts, self._posted):
                for key in [key for key in table if key.round < self._floor]:
                    del table[key]
            for at in [at for at in self._gave_up if at[1] < self._floor]:
                del self._gave_up[at]
        try:
            yield
        finally:
            with self._changed:
                self._active.remove(number)

    def post(self, key: Key, memory: Tensor) -> None:
        """Lets this part, unless it is here already, come straight into `memory`."""
        with self._changed:
            if key not in self._parts:
                self._posted[key] = memory

    def collect(
        self,
        keys: Sequence[Key],
        members: Mapping[int, int],
        *,
        deadline: float,
        probe: Callable[[int], bool],
    ) -> list[Tensor]:
        """The parts `keys`, in that order; waits for them.

        Args:
            members: pipelines of the round with the generations they had when it began.
            deadline: by `time.monotonic`.
            probe: whether the connection to a pipeline is cut; asked now and then.

        Raises:
            GroupBroken: a missing part's sender is gone, or a member gave up since another was.
            PeerLost: the deadline passed.
            RuntimeError: a thread that reads has failed.
        """
        started = monotonic()
        while True:
            with self._changed:
                missing = {key for key in keys if key not in self._parts}
                if not missing:
                    for key in keys:
                        self._posted.pop(key, None)
                    return [self._parts.pop(key) for key in keys]
                self._check(missing, members)
                now = monotonic()
                if now >= deadline:
                    raise PeerLost(self._complaint(missing, now - started))
                if self._wait(missing, min(PROBE_S, deadline - now)):
                    continue
            for sender in {key.sender for key in missing}:
                if probe(sender):  # not under the lock: it takes others
                    self.cut(sender, members[sender], members[self.pipeline])

    def _wait(self, missing: set[Key], seconds: float) -> bool:
        """Until all have come or something else has changed; False after so many seconds."""
        self._missing.append(missing)
        try:
            return self._changed.wait(seconds)
        finally:
            self._missing = [other for other in self._missing if other is not missing]

    def _check(self, missing: Iterable[Key], members: Mapping[int, int]) -> None:
        if self._error is not None:
            raise RuntimeError(
                f"pipeline {self.pipeline} could not read what others sent: {self._error!r}"
            ) from self._error
        if (
            self._closed
            or self._is_gone(self.pipeline)
            or members.get(self.pipeline, self.generation) != self.generation
        ):
            raise GroupBroken(self.pipeline)
        for sender, round, _ in missing:
            for member in members:
                if (member, round) in self._gave_up:
                    raise GroupBroken(self._gave_up[member, round])
            if self._is_gone(sender) or self._generations.get(sender, 0) != members[sender]:
                raise GroupBroken(sender)

    def _complaint(self, missing: Iterable[Key], waited_s: float) -> str:
        names = ", ".join(f"pipeline {sender}" for sender in sorted({key.sender for key in missing}))
        return (
            f"pipeline {self.pipeline} waited {round(waited_s, 1):g} s for the weights of {names} "
            f"in round {min(key.round for key in missing)}"
        )
