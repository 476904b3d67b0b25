"""The kinds of failure that are told apart: the user's mistake, a peer that went away, and what replicas survive."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake: printed as one line (given, expected, remedy), exit status 2."""


class PeerLost(RuntimeError):
    """A peer did not answer before the deadline, or its connection broke: this process fails because another did."""


class PeerLate(PeerLost, TimeoutError):
    """The others kept this process waiting for longer than --timeout; its words name whom it waited for."""


class CoordinatorLost(PeerLost):
    """The coordinator went away: nobody can form groups or hand out work any more."""


class Forged(RuntimeError):
    """What came over the network cannot be from a process of this job: refused in one line, and nothing of it runs."""


class Fenced(RuntimeError):
    """This pipeline was declared lost while it was silent: it copies a live replica's state and joins again."""


class GroupBroken(RuntimeError):
    """A member of a group was lost while the group averaged: the others keep their own weights."""

    def __init__(self, pipeline: int) -> None:
        super().__init__(f"pipeline {pipeline} was lost while its group averaged")
        self.pipeline = pipeline


class TooFewReplicas(RuntimeError):
    """Fewer pipelines are left than --min-replicas asks for."""
