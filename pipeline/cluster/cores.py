"""How many cores a process may use: those it may run on, no more than its container grants, shared among workers.

host of 8 cores, 3 workers, quota 4.0   ->   min(8, 4.0) / 3 = 1 thread each
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def share(cores: int, quota: float, workers: int) -> int:
    """The threads of each of a host's workers; at least one."""
    return max(1, int(min(cores, quota) / max(1, workers)))


def own_share(workers: int) -> int:
    """The same on this host, for this process's part of it."""
    return share(len(own_cores()), granted(), workers)


def own_cores() -> tuple[int, ...]:
    """The cores that this process may run on; where the system does not tell, all."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def granted(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """How many cores' time the control groups of this process grant it, the smallest counts; infinite if unlimited.

    In a container the own group is mounted as the root; elsewhere it and all groups above it lie below the root.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    quotas = [_of_group(root), _of_group(root / "cpu")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            mounted = root if controllers == "" else root / "cpu"
            group = mounted / path.strip("/")
            quotas += [_of_group(folder) for folder in (group, *group.parents) if mounted in (folder, *folder.parents)]
    return min(quotas)


def _of_group(group: Path) -> float:
    """Of one control group, of version 2 or 1."""
    quota = cpu_quota(group / "cpu.max")
    return quota if quota != math.inf else _quota_v1(group)


def cpu_quota(file: Path = CGROUPS / "cpu.max") -> float:
    """How many cores' time a file of version 2 grants; infinite where nothing is said."""
    try:
        time_us, period_us = file.read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if time_us == "max" else int(time_us) / int(period_us)


def _quota_v1(group: Path) -> float:
    try:
        time_us, period_us = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return math.inf if time_us < 0 else time_us / period_us
