"""The two kinds of failure that are told apart: the user's mistake, and a peer that went away."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake: printed as one line (given, expected, remedy), exit status 2."""


class PeerLost(RuntimeError):
    """A peer did not answer before the deadline, or its connection broke: this process fails because another did."""
