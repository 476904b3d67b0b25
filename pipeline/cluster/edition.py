"""Which heturun this is: its version and a hash of its sources, so that hosts with different ones notice.

launcher  ◄── hello of an agent: as the launcher's own?          at the start: an error
launcher  ◄── hello of a process: as that of the first one?      later: a warning, for people edit while a job runs
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

from pipeline.cluster.wire import Message
from pipeline.core.version import VERSION

PACKAGES = ("heturun", "pipeline")
DIGITS = 12


def edition(root: Path | None = None) -> str:
    """For example "0.1.0 (sources 3fa29c1b77aa)"; `root`: where the packages lie."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    found = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        data = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return f"{VERSION} (sources {found.hexdigest()[:DIGITS]})"


def introduction() -> Message:
    """What a hello says of this."""
    return {"host": socket.gethostname(), "edition": edition()}


class Editions:
    """The launcher's own, and that of the first process that introduced itself."""

    def __init__(self, own: Message) -> None:
        self._own = own
        self._first: Message | None = None

    def complaint(self, hello: Message) -> str | None:
        """One line that names both hosts and what they have; None if they have the same."""
        if hello["type"] == "agent":
            known = self._own
        else:
            known = self._first = self._first or hello
        here, there = known.get("edition"), hello.get("edition")
        if here == there:
            return None
        return (
            f"{hello.get('host', 'a host')} has heturun {there or 'without a version'}, {known['host']} has {here}; "
            "install the same on every host"
        )
