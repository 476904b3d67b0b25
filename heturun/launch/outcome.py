"""Which failure was the first real one: events and times in, a verdict out.

rank 3 exits with 1, no word sent        primary: a failure of its own
rank 1 says failed(..., secondary)       secondary: it lost its peer; wait SETTLE_S for the peer's own report
rank 2 ended by mpirun or by us          secondary
mpirun itself is killed                  primary: what it had started ended for that reason only
the first primary failure wins; without one, the first secondary, when SETTLE_S have passed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

SETTLE_S = 1.5  # how long secondary failures wait for a primary one
USERS_MISTAKE = 2  # the exit status
SIGNALLED = 128  # a status above it: a signal ended the process
EXIT_S = 2.0  # how long a rank that said why it fails is given to exit with its own status


class Started(NamedTuple):
    """The process of a rank runs. `incarnation`, here and below: how often its pipeline had been started again."""

    rank: int
    incarnation: int = 0


class Output(NamedTuple):
    """Whole lines of a rank's stream ("stdout" or "stderr")."""

    rank: int
    stream: str
    lines: list[str]


class Progress(NamedTuple):
    """A rank's bar."""

    rank: int
    done: int
    total: int
    text: str


class Exited(NamedTuple):
    """The process of a rank ended (128 + number when by a signal); `killed`: it was told to, by heturun or mpirun."""

    rank: int
    status: int
    killed: bool
    incarnation: int = 0


class Closed(NamedTuple):
    """All output of a rank has arrived."""

    rank: int
    incarnation: int = 0


class Failed(NamedTuple):
    """A process says why it is about to end, and with which status, for its end may be long in coming."""

    rank: int
    message: str
    secondary: bool
    incarnation: int = 0
    status: int | None = None


class Joined(NamedTuple):
    """The agent of these ranks is there; what it has to say ends with `Lost`."""

    ranks: tuple[int, ...]
    incarnation: int = 0


class Lost(NamedTuple):
    """Ranks whose agent went away without a word, or that could not be started; `message` says what is known.

    `status`: of the program that had started them, if a signal ended it, and thereby them. `explained`: nobody will
    know more, so that there is nothing to wait for.
    """

    ranks: tuple[int, ...]
    message: str
    incarnation: int = 0
    status: int | None = None
    explained: bool = True


class Silent(NamedTuple):
    """The host of these ranks' agent has not answered for a while or, if not `silent`, does so again."""

    ranks: tuple[int, ...]
    silent: bool
    incarnation: int = 0


class Elastic(NamedTuple):
    """A process says that from now on the job survives the loss of a pipeline, as long as `min_replicas` are left."""

    rank: int
    min_replicas: int


class Published(NamedTuple):
    """A process published a value."""

    rank: int
    key: str
    value: str


class Wanted(NamedTuple):
    """A process waits for a value that nobody has published yet."""

    rank: int
    key: str


class Signalled(NamedTuple):
    """The launcher got SIGINT or SIGTERM."""

    number: int


Event = (
    Started
    | Output
    | Progress
    | Exited
    | Closed
    | Failed
    | Joined
    | Lost
    | Silent
    | Elastic
    | Published
    | Wanted
    | Signalled
)


class Verdict(NamedTuple):
    """The first real failure: its exit status, None when none is known; and its own words, if any."""

    rank: int
    exited: int | None
    message: str | None


class Complaint(NamedTuple):
    """A sign of failure: when, whose, in what words, and whether it only follows from another failure.

    `status`: what the rank said that it would end with, or what ended its starter. `said`: by the rank itself.
    """

    time: float
    rank: int
    message: str | None
    secondary: bool
    status: int | None = None
    said: bool = False
    explained: bool = True


@dataclass(frozen=True)
class Outcome:
    """What is known of some ranks so far: exit statuses, complaints in the order of arrival, and who is through."""

    ranks: Collection[int]
    started: frozenset[int] = frozenset()
    exits: Mapping[int, int] = field(default_factory=dict)
    complaints: tuple[Complaint, ...] = ()
    closed: frozenset[int] = frozenset()
    killed: frozenset[int] = frozenset()  # those among the exits that were told to end

    def after(self, event: Event, now: float) -> Outcome:
        """The outcome with one more event, which arrived at time `now`; events of other ranks change nothing."""
        if isinstance(event, Lost):
            return self._lost(event, now)
        if isinstance(event, Silent | Signalled | Joined) or event.rank not in self.ranks:
            return self
        if isinstance(event, Started):
            return replace(self, started=self.started | {event.rank})
        if isinstance(event, Closed):
            return replace(self, closed=self.closed | {event.rank})
        if isinstance(event, Failed):
            complaint = Complaint(now, event.rank, event.message, event.secondary, event.status, said=True)
            return self._complained(complaint)
        if isinstance(event, Exited):
            return self._exited(event, now)
        return self

    def _exited(self, event: Exited, now: float) -> Outcome:
        rank = event.rank
        known = replace(self, exits={**self.exits, rank: event.status}, started=self.started | {rank})
        if event.killed:
            known = replace(known, killed=self.killed | {rank})
        complaint = Complaint(now, rank, None, event.killed, explained=not event.killed)  # who told it may yet come out
        return known if event.status == 0 else known._complained(complaint)

    def _lost(self, event: Lost, now: float) -> Outcome:
        ranks = [rank for rank in event.ranks if rank in self.ranks]
        known = replace(self, closed=self.closed | frozenset(ranks))
        if event.status is not None:  # whatever became of them by then, unless they ended by themselves
            victims = [rank for rank in ranks if rank not in self.exits or rank in self.killed]
        else:
            victims = [rank for rank in ranks if rank not in self.exits and rank not in self.closed]
        if not victims:
            return known
        complaint = Complaint(now, victims[0], event.message, event.status is None, event.status)
        return known._complained(complaint._replace(explained=event.explained))

    def _complained(self, complaint: Complaint) -> Outcome:
        return replace(self, complaints=(*self.complaints, complaint))

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have not started."""
        return tuple(rank for rank in self.ranks if rank not in self.started)

    @property
    def over(self) -> bool:
        """Every rank has ended and all its output is here."""
        return len(self.closed) == len(self.ranks)

    @property
    def mistake(self) -> Verdict | None:
        """The first rank that ended with status 2, or said that it would, which means a mistake of the user's."""
        for complaint in self.complaints:
            rank = complaint.rank
            status = self.exits[rank] if complaint.message is None else complaint.status
            if not complaint.secondary and status == USERS_MISTAKE:
                return Verdict(rank, USERS_MISTAKE, self._words(rank, None))
        return None

    def verdict(self, now: float) -> Verdict | None:
        """The failure to report; None while there is none or while its status or a more primary one may yet come."""
        chosen = self._chosen(now)
        if chosen is None:
            return None
        rank = chosen.rank
        if self._may_exit(rank) and chosen.message is not None and now < chosen.time + EXIT_S:
            return None
        return Verdict(rank, self._status(rank), self._words(rank, chosen.message))

    def look_again_at(self, now: float) -> float | None:
        """When time alone turns the complaints into a verdict."""
        if not self.complaints:
            return None
        chosen = self._chosen(now)
        return self.complaints[0].time + SETTLE_S if chosen is None else chosen.time + EXIT_S

    @property
    def primary(self) -> Complaint | None:
        """The first primary complaint of a rank that did not itself say it was secondary."""
        excused = {c.rank for c in self.complaints if c.secondary and c.message is not None}
        for complaint in self.complaints:
            if not complaint.secondary and (complaint.message is not None or complaint.rank not in excused):
                return complaint
        return None

    def _chosen(self, now: float) -> Complaint | None:
        """The first primary complaint; without one, in time, the first."""
        if self.primary is not None:
            return self.primary
        known = self.over and all(complaint.explained for complaint in self.complaints)
        if self.complaints and (known or now >= self.complaints[0].time + SETTLE_S):
            return self.complaints[0]
        return None

    @property
    def ended_from_outside(self) -> bool:
        """Whether these ranks did nothing wrong: a signal ended the first of them, or its host went away."""
        if self.primary is not None:
            return self._taken(self.primary.rank)
        return any(self._taken(complaint.rank) for complaint in self.complaints)

    def _taken(self, rank: int) -> bool:
        """Whether a rank that had started was ended by a signal or lost, and had not said that it would fail."""
        own = any(c.said and not c.secondary for c in self.complaints if c.rank == rank)
        by_signal = self.exits.get(rank, 0) > SIGNALLED and rank not in self.killed
        ended = any(c.status is not None and not c.said for c in self.complaints if c.rank == rank)  # its starter
        lost = rank in self.closed and rank not in self.exits
        return rank in self.started and not own and (by_signal or ended or lost)

    def _status(self, rank: int) -> int | None:
        """What a rank said that it would end with, else how it ended by itself, else what ended it."""
        own = [c for c in self.complaints if c.rank == rank and c.status is not None]
        if rank in self.exits and rank not in self.killed and not any(c.said and not c.secondary for c in own):
            return self.exits[rank]
        said = sorted(own, key=lambda c: c.secondary)
        return said[0].status if said else self.exits.get(rank)

    def _may_exit(self, rank: int) -> bool:
        """Whether the status of a rank may yet come."""
        return rank not in self.exits and rank not in self.closed

    def _words(self, rank: int, message: str | None) -> str | None:
        """The rank's own explanation, a primary one before a secondary one."""
        said = sorted((c.secondary, c.message) for c in self.complaints if c.rank == rank and c.message is not None)
        return said[0][1] if said else message
