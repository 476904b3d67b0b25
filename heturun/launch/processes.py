"""Who runs where: cluster, layout and command in, the list of processes out; nothing is started here.

cluster  w0: 8 workers, w1: 8        layout pipe_2_2                    processes, by rank
                                     w0:gpu0  w1:gpu0    --------->     0 w0 0/0   1 w0 1/0
                                     w0:gpu1  w1:gpu1                   2 w1 0/1   3 w1 1/1    (stage/pipeline)
Without a layout: as many processes on every host as it has workers, each a pipeline of one stage.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heturun.launch.cluster import LOCAL, Cluster, Node
from pipeline.cluster.wire import LOST_S, OUTAGE_S
from pipeline.errors import UserError
from pipeline.placement import (
    DEFAULT_FILE,
    Device,
    HostLimits,
    Placement,
    check,
    cpu,
    gpu,
    grid,
    load_placement,
    rgpu,
)

MIRRORED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")  # as here, also when unset here
FORWARDED = re.compile(
    r"LD_LIBRARY_PATH|CONDA_DEFAULT_ENV|LANG|LC_.*|TZ|PYTHON.*|OMP_.*|MKL_.*|OPENBLAS_.*|KMP_.*|GOMP_.*|NCCL_.*|GLOO_.*"
    r"|UCX_.*|FI_.*|OMPI_MCA_(?!orte|ess|pmix|initial).*|TORCH.*|PYTORCH_.*|CUDA_(?!VISIBLE_DEVICES).*|HF_.*"
    r"|TRANSFORMERS_.*|TOKENIZERS_.*|IMAGENET_.*|HETURUN_.*"
)
OF_ANOTHER_JOB = re.compile(
    r"PMIX_.*|PMI_.*|PRTE_(?!MCA).*|OMPI_(COMM_WORLD|UNIVERSE|FILE|FIRST|NUM|APP)_.*|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)"
    r"|HETURUN_(HOST|PIPELINE|STAGE|PLACEMENT|ADDRESS|INTERFACE|CONTROL|KEY|TIMEOUT|INCARNATION|THREADS|LOST_AFTER)"
)
COORDINATOR = (sys.executable, "-m", "pipeline.coordination.server")
ELASTIC = ("--preduce", "--adpsgd", "--local-sgd")  # with these a job survives the loss of a pipeline


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the job; `env` is what distinguishes it from the others."""

    rank: int
    pipeline: int
    stage: int
    host: str
    device: str
    local_rank: int
    env: Mapping[str, str]

    @property
    def where(self) -> str:
        """ "w1/0/2": host, stage and pipeline, as lines of output are prefixed."""
        return f"{self.host}/{self.stage}/{self.pipeline}"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, stage {self.stage}, pipeline {self.pipeline})"


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """The process that is started when the job asks for it; `rank`: the number of workers, so that it is nobody's."""

    rank: int
    host: str
    command: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.host}/coordinator"

    def __str__(self) -> str:
        return f"the coordinator ({self.host})"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The processes of a job in the order of ranks, what they have in common, and what the user should know."""

    cluster: Cluster
    placement: Placement | None
    processes: tuple[Process, ...]
    coordinator: Coordinator
    command: tuple[str, ...]
    directory: str
    env: Mapping[str, str | None]  # for every process; None takes the variable away
    notes: tuple[str, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The hosts on which workers run."""
        used = {process.host for process in self.processes}
        return tuple(node for node in self.cluster.nodes if node.host in used)

    @property
    def all_nodes(self) -> tuple[Node, ...]:
        """The hosts on which something runs, or may: the coordinator's, too."""
        more = () if self.coordinator.host in {node.host for node in self.nodes} else (self.coordinator.host,)
        return (*self.nodes, *(self.node(host) for host in more))

    def node(self, host: str) -> Node:
        """A host of the cluster, or this machine, which need not be one."""
        return next((node for node in self.cluster.nodes if node.host == host), Node(host=host))

    def pipelines(self) -> tuple[tuple[Process, ...], ...]:
        """The processes by pipeline, each in the order of stages."""
        numbers = sorted({process.pipeline for process in self.processes})
        return tuple(tuple(p for p in self.processes if p.pipeline == number) for number in numbers)

    @property
    def lost_s(self) -> int:
        """After how much silence a host counts as gone: an elastic job waits longer, for the cable may come back."""
        return OUTAGE_S if self.least_replicas is not None else LOST_S

    @property
    def least_replicas(self) -> int | None:
        """How few pipelines an elastic job goes on with if the launcher's user does not say; None of any other."""
        return least_replicas(self.command) if len(self.pipelines()) > 1 and is_elastic(self.command) else None

    def worlds(self) -> tuple[tuple[Process, ...], ...]:
        """The MPI worlds: one per pipeline, its ranks are the stages; without a layout one of all processes."""
        return (self.processes,) if self.placement is None else self.pipelines()

    def on(self, host: str) -> tuple[Process, ...]:
        return tuple(process for process in self.processes if process.host == host)


def plan_job(
    cluster: Cluster,
    placement: Placement | None,
    command: Sequence[str],
    *,
    directory: str,
    env: Mapping[str, str | None],
    launching_host: str = LOCAL,
    coordinator: Sequence[str] = COORDINATOR,
) -> Plan:
    """Puts every process of the job on its host.

    Args:
        launching_host: this machine, which has the coordinator when the cluster has no servers.
        coordinator: its command.

    Raises:
        UserError: the layout does not fit the cluster.
    """
    notes = [_servers_note(cluster)] if cluster.servers else []
    if placement is None:
        processes = _without_layout(cluster)
    else:
        check(placement, {node.host: HostLimits(node.workers, node.gpus) for node in cluster.nodes})
        processes = _with_layout(cluster, placement)
        notes += _idle_note(cluster, placement, processes)
    return Plan(
        cluster=cluster,
        placement=placement,
        processes=processes,
        coordinator=_coordinator(cluster, processes, launching_host=launching_host, command=coordinator),
        command=tuple(command),
        directory=directory,
        env=env,
        notes=tuple(notes),
    )


def as_threads(plan: Plan) -> Plan:
    """One process here, in the place of rank 0, that runs every worker as a thread of its own."""
    first = plan.processes[0]
    env = {**first.env, "HETURUN_THREADS": "1"}
    note = f"--launcher threads: one process runs all {len(plan.processes)} workers, as threads"
    return replace(plan, processes=(replace(first, env=env),), notes=(*plan.notes, note))


def layout_of(command: Sequence[str], *, directory: Path) -> Placement | None:
    """The layout that a command is started with: its `--placement`, else the device_list.py beside its Python script.

    Raises:
        UserError: as `load_placement`.
    """
    script = next((directory / word for word in command if word.endswith(".py") and (directory / word).is_file()), None)
    beside = script.parent if script is not None else directory
    spec = _option(command, "--placement")
    if spec is None and (script is None or not (beside / DEFAULT_FILE).is_file()):
        return None
    return load_placement(spec, directory=beside)


def layout_here(command: Sequence[str], layout: Placement, cluster: Cluster, *, gpus: int) -> Placement | None:
    """What to take instead of `my_device` as it comes with heturun, on one machine that is none of its hosts.

    None: the layout was chosen, by the user's own device_list.py or --placement, or it may fit.
    `gpus`: this machine's.
    """
    (node, *others), chosen = cluster.nodes, _option(command, "--placement") is not None
    if chosen or others or layout.rows != _as_it_comes() or node.host in layout.hosts:
        return None
    one_stage = node.workers % 2 or _option(command, "--pipeline") == "dp"
    stages = 1 if one_stage else 2
    return grid(stages, node.workers // stages, gpu if gpus >= node.workers else cpu)


def _as_it_comes() -> tuple[tuple[Device, ...], ...]:
    """The rows of `my_device` in the device_list.py of this project: four pipelines of four stages on two hosts."""
    return tuple(tuple(rgpu(host, first + stage) for host in ("w0", "w1") for first in (0, 4)) for stage in range(4))


def here_note(instead: Placement, layout: Placement) -> str:
    """Says which layout was taken, and why."""
    kind = {"cpu": "CPUs", "gpu": "GPUs"}[instead.rows[0][0].kind]
    return (
        f"layout {layout.name} is for hosts {', '.join(layout.hosts)}; on this machine's {kind}: --placement "
        f"{instead.name} ({instead.num_stages} stage(s) x {instead.num_pipelines} pipeline(s)); "
        "another --placement, or a my_device of your own in device_list.py, is taken instead"
    )


def is_elastic(command: Sequence[str]) -> bool:
    """Whether the command asks for replicas that may be lost and come back."""
    return any(word in ELASTIC for word in command)


def least_replicas(command: Sequence[str]) -> int:
    """What an elastic command's own `--min-replicas` says, else 1; a wrong one is the command's to complain of."""
    given = _option(command, "--min-replicas")
    return int(given) if given is not None and given.isdecimal() else 1


def on_cluster(
    placement: Placement, cluster: Cluster, *, own_names: Collection[str], here: Collection[str]
) -> Placement:
    """The layout with its hosts named as in the cluster: another name of this machine, or w0 for w0.example.org.

    `here`: the hosts of the cluster that are this machine.
    """
    hosts = [node.host for node in cluster.nodes]

    def name(host: str) -> str:
        if host in hosts:
            return host
        alike = (list(here) if host in own_names else []) or [
            other for other in hosts if other.partition(".")[0] == host.partition(".")[0]
        ]
        return alike[0] if len(alike) == 1 else host

    def move(device: Device) -> Device:
        return replace(device, host=name(device.host))

    return replace(placement, rows=tuple(tuple(map(move, row)) for row in placement.rows)).on_cluster(hosts)


def common_environment(
    environ: Mapping[str, str],
    *,
    cluster: Cluster,
    given: Mapping[str, str],
    timeout_s: float | None,
    own_bin: str,
) -> dict[str, str | None]:
    """What every process gets of the launching environment, the cluster file's `env` and `--env`, in rising precedence.

    `own_bin`, where heturun's Python lies, comes first on the PATH if it was not on it at all.
    """
    here = {name: value for name, value in environ.items() if FORWARDED.fullmatch(name) and not is_of_another_job(name)}
    mirrored = {name: environ.get(name) for name in MIRRORED}
    path = mirrored["PATH"] or "/usr/local/bin:/usr/bin:/bin"
    mirrored["PATH"] = path if own_bin in path.split(":") else f"{own_bin}:{path}"
    # torch warns of hosts without reverse DNS on every connection; its errors are still shown
    defaults = {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    timeout = {} if timeout_s is None else {"HETURUN_TIMEOUT": f"{timeout_s:g}"}
    return {**defaults, **here, **mirrored, **cluster.env, **given, **timeout}


def is_of_another_job(name: str) -> bool:
    """Whether a variable belongs to a job that heturun itself is part of, and must not reach this one's processes."""
    return OF_ANOTHER_JOB.fullmatch(name) is not None


def shown(command: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(command)


def _option(command: Sequence[str], name: str) -> str | None:
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            if not following:
                raise UserError(f"{name} at the end of the command: give the name of a layout after it")
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _with_layout(cluster: Cluster, placement: Placement) -> tuple[Process, ...]:
    workers = placement.workers()
    on_host = Counter(worker.device.host for worker in workers)
    shared = {"WORLD_SIZE": str(len(workers)), "HETURUN_PLACEMENT": placement.to_json()}
    return tuple(
        _process(
            cluster.node(worker.device.host),
            rank=worker.rank,
            stage=worker.stage,
            pipeline=worker.pipeline,
            local_rank=worker.local_rank,
            device=f"{worker.device.kind}{worker.device.index}",
            env={**shared, "LOCAL_WORLD_SIZE": str(on_host[worker.device.host])},
        )
        for worker in workers
    )


def _without_layout(cluster: Cluster) -> tuple[Process, ...]:
    places = [(node, local_rank) for node in cluster.nodes for local_rank in range(node.workers)]
    return tuple(
        _process(
            node,
            rank=rank,
            stage=0,
            pipeline=rank,
            local_rank=local_rank,
            device=f"gpu{local_rank % node.gpus}" if node.gpus else "-",
            env={"WORLD_SIZE": str(len(places)), "LOCAL_WORLD_SIZE": str(node.workers)},
        )
        for rank, (node, local_rank) in enumerate(places)
    )


def _process(
    node: Node, *, rank: int, stage: int, pipeline: int, local_rank: int, device: str, env: Mapping[str, str]
) -> Process:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "HETURUN_HOST": node.host,
        "HETURUN_STAGE": str(stage),
        "HETURUN_PIPELINE": str(pipeline),
    }
    interface = {} if node.interface is None else {"HETURUN_INTERFACE": node.interface}
    return Process(
        rank=rank,
        pipeline=pipeline,
        stage=stage,
        host=node.host,
        device=device,
        local_rank=local_rank,
        env={**own, **interface, **env},
    )


def _coordinator(
    cluster: Cluster, processes: Sequence[Process], *, launching_host: str, command: Sequence[str]
) -> Coordinator:
    """On the first host that has a server, else where the launcher is."""
    host = next((node.host for node in cluster.nodes if node.servers), launching_host)
    env = {"RANK": str(len(processes)), "WORLD_SIZE": str(len(processes)), "HETURUN_HOST": host}
    return Coordinator(rank=len(processes), host=host, command=tuple(command), env=env)


def _servers_note(cluster: Cluster) -> str:
    host = next(node.host for node in cluster.nodes if node.servers)
    used = "it" if cluster.servers == 1 else "one of them, on the first such host,"
    return f"servers: {cluster.servers} in the cluster; {used} is started on {host} once the job asks for a coordinator"


def _idle_note(cluster: Cluster, placement: Placement, processes: Sequence[Process]) -> list[str]:
    if len(processes) == cluster.workers:
        return []
    return [
        f"layout {placement.name} uses {len(processes)} of the {cluster.workers} workers; the others are not started"
    ]
