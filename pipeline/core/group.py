"""Who averages with whom: the coordinator answers with it, and dialogues hold it in their hands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Group(NamedTuple):
    """Replicas of one stage that average together: pipelines in ascending order, a number used once in the job.

    `round` is -1 for a pipeline that is not whole and stays alone. `generations`, if known: how often each member had
    been lost when the group was formed; who has been lost since will not come.
    """

    round: int
    members: tuple[int, ...]
    reason: str = ""
    generations: Mapping[int, int] | None = None
