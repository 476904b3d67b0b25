"""Who this process is: its rank, the size of the job, its place on its host, from whoever started it.

heturun      RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, HETURUN_HOST, HETURUN_PLACEMENT
torchrun     RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
mpirun       mpi4py's COMM_WORLD
srun         SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_NODELIST, SLURM_JOB_ID
nobody       a lone process
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.placement import Placement

_MPI_SIGNS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SLURM_FIRST_PORT, _SLURM_PORTS = 20000, 10000  # below the ports that the kernel gives out by itself


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process among those of its job.

    `placement` is the launcher's, if it gave one; `meeting` is the address and port of rank 0's store where these are
    agreed beforehand, and `hosted` says that the launcher runs that store itself. `threads`: this one process runs all
    workers as threads.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    mpi: bool = False
    placement: Placement | None = None
    meeting: tuple[str, int] | None = None
    hosted: bool = False
    threads: bool = False

    @property
    def one_host(self) -> bool:
        """Whether all processes of the job are on this host."""
        return self.local_size == self.size


def identify(environment: Mapping[str, str], *, hostname: str) -> Identity:
    """Finds out who this process is; imports mpi4py only in a process that an MPI launcher started.

    Raises:
        UserError: variables that contradict each other or are no numbers, or mpirun without mpi4py.
    """
    if "HETURUN_CONTROL" in environment:
        return _from_heturun(environment, hostname)
    if "RANK" in environment and "WORLD_SIZE" in environment and "MASTER_ADDR" in environment:
        return _from_torchrun(environment, hostname)
    slurm = int(_first(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default="1"))
    in_slurm = "SLURM_PROCID" in environment and slurm > 1
    if under_mpi(environment):
        found = _from_mpi(environment, hostname)
        if found.size > 1 or not in_slurm:
            return found
    if in_slurm:
        return _from_slurm(environment, hostname, slurm)
    return Identity(launcher="nobody", rank=0, size=1, local_rank=0, local_size=1, host=hostname)


def under_mpi(environment: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process (importing mpi4py elsewhere would start an MPI of one)."""
    return any(sign in environment for sign in _MPI_SIGNS)


def import_mpi() -> Any:
    """mpi4py's MPI module, or None where it cannot be loaded."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py is there, but no MPI library
        return None
    return MPI


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: "node[07-09,12],login1" gives "node07"."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if not match or not match.group(0):
        raise UserError(f"SLURM_JOB_NODELIST={nodelist}: expected host names, as in node[01-04]")
    return match.group(1) + (match.group(2) or "") + match.group(3)


def tasks_on_node(counts: str, node: int) -> int:
    """How many tasks the node of that index has in Slurm's notation: "4(x2),1" is 4, 4 and 1."""
    tasks: list[int] = []
    for word in counts.split(","):
        number, _, times = word.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks[node]


def _from_heturun(environment: Mapping[str, str], hostname: str) -> Identity:
    text = environment.get("HETURUN_PLACEMENT")
    host = environment.get("HETURUN_HOST", hostname)
    placement = Placement.from_json(text) if text else None
    return _checked(
        Identity(
            launcher="heturun",
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            local_size=_number(environment, "LOCAL_WORLD_SIZE"),
            host=host,
            mpi=under_mpi(environment) and import_mpi() is not None,
            placement=placement.on_cluster([host]) if placement is not None else None,
            threads="HETURUN_THREADS" in environment,
        )
    )


def _from_torchrun(environment: Mapping[str, str], hostname: str) -> Identity:
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    address = environment["MASTER_ADDR"]
    local_size = size if address in _LOOPBACK else 1
    return _checked(
        Identity(
            launcher="torchrun",
            rank=rank,
            size=size,
            local_rank=_number(environment, "LOCAL_RANK", default=rank if local_size == size else 0),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", default=local_size),
            host=hostname,
            meeting=(address, _number(environment, "MASTER_PORT", default=29500)),
            hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _from_slurm(environment: Mapping[str, str], hostname: str, size: int) -> Identity:
    nodelist = _first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST", default=hostname)
    tasks = _first(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", default="")
    node = _number(environment, "SLURM_NODEID", default=0)
    local_size = tasks_on_node(tasks, node) if tasks else (1 if re.search(r"[\[,]", nodelist) else size)
    job, step = (_number(environment, f"SLURM_{kind}_ID", default=0) for kind in ("JOB", "STEP"))
    address = "127.0.0.1" if local_size == size else first_host(nodelist)
    return _checked(
        Identity(
            launcher="srun",
            rank=_number(environment, "SLURM_PROCID"),
            size=size,
            local_rank=_number(environment, "SLURM_LOCALID", default=0),
            local_size=local_size,
            host=hostname,
            meeting=(address, _SLURM_FIRST_PORT + (job + 101 * step) % _SLURM_PORTS),
        )
    )


def _from_mpi(environment: Mapping[str, str], hostname: str) -> Identity:
    mpi = import_mpi()
    if mpi is None:
        raise UserError("started by mpirun, but mpi4py cannot be loaded; pip install mpi4py, or use heturun")
    world = mpi.COMM_WORLD
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        local_rank, local_size = (_number(environment, f"OMPI_COMM_WORLD_LOCAL_{word}") for word in ("RANK", "SIZE"))
    else:
        host = world.Split_type(mpi.COMM_TYPE_SHARED)
        local_rank, local_size = host.Get_rank(), host.Get_size()
        host.Free()
    return Identity(
        launcher="mpirun",
        rank=world.Get_rank(),
        size=world.Get_size(),
        local_rank=local_rank,
        local_size=local_size,
        host=hostname,
        mpi=True,
    )


def _checked(identity: Identity) -> Identity:
    if not 0 <= identity.rank < identity.size:
        raise UserError(
            f"{identity.launcher} says rank {identity.rank} of {identity.size}; "
            f"expected 0 to {identity.size - 1}: check RANK and WORLD_SIZE"
        )
    return identity


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        given = "is not set" if text is None else f"is {text!r}"
        raise UserError(f"{name} {given}; expected a whole number from whoever starts the processes") from None


def _first(environment: Mapping[str, str], *names: str, default: str) -> str:
    """The value of the first variable that is set."""
    return next((environment[name] for name in names if environment.get(name)), default)
