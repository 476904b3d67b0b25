"""The world of one process: its stage and pipeline, its device, and the groups in which it talks to the others.

                 stage 0   stage 1   stage 2
    pipeline 0      0         1         2     pipeline_group, pipeline_comm: a row
    pipeline 1      3         4         5     replicas: a column; last_row: the last column

Every wait has a deadline, and the message on expiry says who was waited for.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from pipeline.cluster.cores import granted, own_cores
from pipeline.cluster.failures import abort_mpi, control_channel, is_secondary, report_failures
from pipeline.cluster.identity import Identity, identify, import_mpi
from pipeline.cluster.json_exchange import broadcast_value, gather_values, gather_values_at
from pipeline.cluster.rendezvous import Channel, Meeting, open_store, read_value
from pipeline.errors import Forged, PeerLost, UserError
from pipeline.placement import LOCAL, Device, Place, Placement, gpu, load_placement

__all__ = ["World", "abort_mpi", "control_channel", "join_world", "report_failures"]

_PARTING_S = 10.0  # how long rank 0 keeps the store for the others when the job is over


def join_world(
    placement_spec: str | None, *, timeout_s: float, directory: Path, control: Channel | None = None
) -> World:
    """Finds out who this process is; talks to nobody until `World.connect`.

    Args:
        placement_spec: what --placement says; under heturun the launcher has read it already.
        timeout_s: how long any wait for a peer lasts.
        directory: where device_list.py lies.
        control: the launcher's channel; without it, the one that the environment names is used.

    Raises:
        UserError: a layout that does not exist or that needs another number of processes.
    """
    me = identify(os.environ, hostname=socket.gethostname())
    placement = me.placement or _own_placement(me, placement_spec, directory)
    if placement.size != me.size:
        raise UserError(_wrong_size(me, placement))
    channel = control if control is not None else control_channel()
    return World(me, placement, timeout_s=timeout_s, control=channel)


def _own_placement(me: Identity, spec: str | None, directory: Path) -> Placement:
    """The layout in a start without heturun; a lone process needs none."""
    if spec is None and me.size == 1:
        anything = gpu(0) if torch.cuda.is_available() else Device(LOCAL, "cpu", 0)
        return Placement("single", ((anything,),))
    return load_placement(spec, directory=directory)


def _wrong_size(me: Identity, placement: Placement) -> str:
    stages, pipelines = placement.num_stages, placement.num_pipelines
    started = "1 process was" if me.size == 1 else f"{me.size} processes were"
    fitting = [layout.name for layout in placement.siblings if layout.size == me.size]
    choose = f", or give --placement with one of {me.size}: {', '.join(fitting)}" if fitting else ""
    return (
        f"layout {placement.name} needs {placement.size} processes ({stages} stages x {pipelines} pipelines), "
        f"{started} started; start {placement.size}{choose}"
    )


@dataclass(frozen=True)
class Peer:
    """What every process says of itself when it joins."""

    host: str
    cuda: bool
    shares_gpu: bool
    cores: tuple[int, ...]  # numbers of those that it may run on

    def to_text(self) -> str:
        return json.dumps([self.host, self.cuda, self.shares_gpu, self.cores])

    @staticmethod
    def of(values: Any, rank: int) -> Peer:
        """The inverse of `to_text`, of values that may have come from anybody."""
        try:
            host, cuda, shares_gpu, cores = values
            return Peer(str(host), bool(cuda), bool(shares_gpu), tuple(int(core) for core in cores))
        except (TypeError, ValueError):
            raise Forged(f"what joined as rank {rank} is no process of this job: it said {values!r:.60}") from None


def nccl_fails(peers: Sequence[Peer]) -> bool:
    """Whether GPUs are used in a way that NCCL cannot serve: several ranks on one, or a rank without any."""
    return any(peer.cuda for peer in peers) and not all(peer.cuda and not peer.shares_gpu for peer in peers)


def is_oversubscribed(peers: Sequence[Peer], host: str, *, quota: float, ranks: int = 0) -> bool:
    """Whether a host has more ranks than cores: those that any of its ranks may run on, and no more than the quota.

    Args:
        ranks: how many there are on this host, where `peers` are not all; these are thought to share the cores of the
            peers unless those have been given different ones.
    """
    here = [peer for peer in peers if peer.host == host]
    cores = len({core for peer in here for core in peer.cores})
    together = len({peer.cores for peer in here}) == 1
    return max(len(here), ranks if together else 0) > cores or max(len(here), ranks) > quota


def add_rows(rows: Collection[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each value over the rows; a missing key counts as 0."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(sum(row.get(key, 0.0) for row in rows)) for key in keys}


class World:
    """One process among those of its job; built by `join_world`, usable alone, joined to the others by `connect`."""

    def __init__(self, me: Identity, placement: Placement, *, timeout_s: float, control: Channel | None = None) -> None:
        self.identity, self.placement, self.timeout_s = me, placement, timeout_s
        self.rank, self.size = me.rank, me.size
        self.job = secrets.token_hex(8)  # the same on all ranks only where pipelines may be lost
        self.local_rank, self.local_size = me.local_rank, me.local_size
        self.host, self.launcher, self.mpi = me.host, me.launcher, me.mpi
        self.num_stages, self.num_pipelines = placement.num_stages, placement.num_pipelines
        self.rows_per_stage = placement.rows_per_stage
        self.pipeline, self.stage = divmod(me.rank, self.num_stages)
        self.address = os.environ.get("HETURUN_ADDRESS") or "127.0.0.1"
        self._workers = placement.workers()
        self.device = _torch_device(self._workers[self.rank].device, warn=me.local_rank == 0)
        self.shares_gpu = self.device.type == "cuda" and _is_shared(placement, self._workers[self.rank].device)
        self.oversubscribed = me.local_size > len(own_cores())  # more ranks than cores here: nobody may spin
        self.late = False  # whether the others are already training; known after connect()
        self.uses_nccl = False  # whether replicas() may reduce on GPUs through NCCL; known after connect()
        self._hosts = tuple(worker.device.host for worker in self._workers)
        self.control = control
        self._store: Any = None
        self._meeting: Meeting | None = None
        self._job_key: bytes | None = None  # the job's, if there is one; known after the meeting
        self._replicas: Any = None
        self._pipeline_group: Any = None
        self._last_row: Any = None
        self._communicator: Any = None
        self._visits: Counter[str] = Counter()

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def decides(self) -> bool:
        """Whether this rank's is the value that `broadcast_from_zero` hands to all."""
        return self.rank == 0

    @property
    def hosts_of_pipeline(self) -> list[str]:
        """The host of each stage of this pipeline; before `connect`, as the layout names them."""
        return [self._hosts[self._rank_of(self.pipeline, stage)] for stage in range(self.num_stages)]

    @property
    def places(self) -> list[Place]:
        """Every worker of the job, by rank."""
        return [Place(*divmod(rank, self.num_stages), host) for rank, host in enumerate(self._hosts)]

    @property
    def row(self) -> list[Place]:
        """The workers of this pipeline, by stage."""
        return self.places[self.pipeline * self.num_stages :][: self.num_stages]

    @property
    def remote_stages(self) -> frozenset[int]:
        """The stages of this pipeline that are on other hosts."""
        mine = self._hosts[self.rank]
        return frozenset(stage for stage, host in enumerate(self.hosts_of_pipeline) if host != mine)

    def _rank_of(self, pipeline: int, stage: int) -> int:
        return pipeline * self.num_stages + stage

    # --- joining the others

    def connect(self) -> None:
        """Joins torch.distributed (Gloo) with all other ranks and makes the groups; a second call does nothing.

        Raises:
            PeerLost: ranks that have not joined in time, by number and host.
            UserError: an address, an interface or a port that cannot be used, or ranks on other hosts than laid out.
        """
        if self.size == 1 or self._store is not None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        store = self._meet(self.control)
        peers = self._wait_for_all(store, range(self.size))
        self._hosts = tuple(peer.host for peer in peers)
        self._check_hosts()
        self._judge(peers, is_oversubscribed(peers, self.host, quota=granted()))
        with self._waiting("connecting", range(self.size)):
            dist.init_process_group(
                "gloo",
                store=PrefixStore("torch", store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout_s),
            )
            self._make_groups()

    def _judge(self, peers: Sequence[Peer], oversubscribed: bool) -> None:
        """What all of these peers, who exchange tensors, must choose alike."""
        self.shares_gpu, self.oversubscribed = nccl_fails(peers), oversubscribed
        self.uses_nccl = self.device.type == "cuda" and not self.shares_gpu and dist.is_nccl_available()

    def _meet(self, control: Channel | None) -> Any:
        """Opens the store that all processes of the job share, and returns it."""
        meeting = open_store(self.identity, control, timeout_s=self.timeout_s, rank_zero=self._name([0]))
        self._meeting = meeting  # kept while its store is used
        self.address, self._job_key = meeting.address, meeting.key
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"heturun/{restarts}", meeting.store)
        return self._store

    def _peer(self) -> Peer:
        return Peer(self.host, self.device.type == "cuda", self.shares_gpu, own_cores())

    def _wait_for_all(self, store: Any, ranks: Sequence[int]) -> list[Peer]:
        """What each of these ranks, this one among them, says of itself in the store."""
        keys = {rank: f"joined/{rank}" for rank in ranks}
        try:
            store.set(keys[self.rank], self._peer().to_text())
            store.wait(list(keys.values()), timedelta(seconds=self.timeout_s))
            return [Peer.of(read_value(store, key), rank) for rank, key in keys.items()]
        except Forged:
            raise
        except RuntimeError as error:
            missing = self._missing(lambda rank: bool(store.check([keys[rank]])), ranks)
            raise PeerLost(f"{missing} not joined after {self.timeout_s:g} s") from error

    def _missing(self, is_here: Callable[[int], bool], ranks: Iterable[int]) -> str:
        """ "ranks 2, 3 (w1) have"; if the store is gone too, rank 0, who holds it, is."""
        try:
            absent = [rank for rank in ranks if not is_here(rank)]
        except RuntimeError:
            absent = [0]
        return f"{self._name(absent)} {'has' if len(absent) == 1 else 'have'}" if absent else "some rank has"

    def _name(self, ranks: Sequence[int]) -> str:
        """ "ranks 2, 3 (w1)"."""
        hosts = ", ".join(dict.fromkeys(self._hosts[rank] for rank in ranks if self._hosts[rank] != LOCAL))
        word = "rank" if len(ranks) == 1 else "ranks"
        return f"{word} {', '.join(map(str, ranks))}" + (f" ({hosts})" if hosts else "")

    def _check_hosts(self) -> None:
        """In a start without heturun, ranks must be on the hosts where a layout of these very hosts has them."""
        wanted = [worker.device.host for worker in self._workers]
        if self.launcher == "heturun" or not set(wanted) <= set(self._hosts):
            return
        for rank, (host, here) in enumerate(zip(wanted, self._hosts, strict=True)):
            if host != here:
                raise UserError(
                    f"layout {self.placement.name} has rank {rank} on {host}, but {self.launcher} started it on "
                    f"{here}; start the job with heturun, which puts every rank where its layout says"
                )

    def _make_groups(self) -> None:
        """All groups, on every rank, in the same order."""
        stages, pipelines = range(self.num_stages), range(self.num_pipelines)
        if self.num_pipelines > 1:
            backend = "cpu:gloo,cuda:nccl" if self.uses_nccl else "gloo"
            columns = [self._group([self._rank_of(p, s) for p in pipelines], backend) for s in stages]
            self._replicas = columns[self.stage]
            self._last_row = self._group([self._rank_of(p, self.num_stages - 1) for p in pipelines])
        if self.num_stages > 1:
            rows = [self._group(row) for row in self.rows_of_ranks.values()]
            self._pipeline_group = rows[self.pipeline]

    def _group(self, ranks: Sequence[int], backend: str = "gloo") -> Any:
        return dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_s), backend=backend)

    # --- groups

    def replicas(self) -> dist.ProcessGroup:
        """This stage of all pipelines, of which there are at least two."""
        return _connected(self._replicas, self.num_pipelines > 1)

    def last_row(self) -> dist.ProcessGroup:
        """The last stages of all pipelines, of which there are at least two."""
        return _connected(self._last_row, self.num_pipelines > 1)

    def pipeline_group(self) -> dist.ProcessGroup | None:
        """The stages of this pipeline; None if it is one stage."""
        return None if self.num_stages == 1 else _connected(self._pipeline_group, True)

    @property
    def rows_of_ranks(self) -> dict[int, list[int]]:
        """Pipeline -> its stages' ranks in torch.distributed, of all pipelines that make their groups together."""
        stages, pipelines = range(self.num_stages), range(self.num_pipelines)
        return {pipeline: [self._rank_of(pipeline, stage) for stage in stages] for pipeline in pipelines}

    def pipeline_comm(self) -> Any:
        """The mpi4py communicator whose rank s is stage s of this pipeline, or None without MPI; all ranks call it."""
        if not self.mpi:
            return None
        if self._communicator is None:
            everyone = import_mpi().COMM_WORLD
            whole = everyone.Get_size() == self.num_stages and everyone.Get_rank() == self.stage
            self._communicator = everyone if whole else everyone.Split(self.pipeline, self.stage)
        return self._communicator if self._communicator.Get_size() == self.num_stages else None

    # --- who writes for all

    @property
    def outlives_this(self) -> bool:
        """Whether the job may go on when this process has ended."""
        return False

    def leads(self) -> bool:
        """Whether this pipeline acts for all at the start."""
        return self.pipeline == 0

    def may_write(self) -> bool:
        """Whether this pipeline is one of those that may come to write checkpoints."""
        return self.pipeline == 0

    def lives(self) -> tuple[int, Mapping[int, int]]:
        """The generation of this pipeline, and those of all; without losses there is one."""
        return 0, {}

    # --- values from and to others: JSON, so that tuples come back as lists; a UserError is raised on all ranks

    def sum_over_pipelines(self, sums: dict[str, float]) -> dict[str, float]:
        """The sum of each value over the last stages of all pipelines, who all call it; a missing key counts as 0."""
        if self.num_pipelines == 1:
            return dict(sums)
        last = self.num_stages - 1
        ranks = [self._rank_of(pipeline, last) for pipeline in range(self.num_pipelines)]
        with self._waiting("adding up metrics", ranks):
            return add_rows(gather_values(sums, self.last_row()))

    def from_last_stage(self, value: Any) -> Any:
        """The last stage's `value`; called by all stages of a pipeline."""
        if self.num_stages == 1:
            return broadcast_value(value, None, source=0)
        last = self.num_stages - 1
        with self._waiting("a value of the last stage", [self._rank_of(self.pipeline, last)]):
            return broadcast_value(value, self.pipeline_group(), source=last)

    def broadcast_from_zero(self, value: Any) -> Any:
        """Rank 0's `value`; called by all."""
        with self._waiting("a value of rank 0", [0]):
            return broadcast_value(value, self._everyone(), source=0)

    def gather_to_zero(self, value: Any) -> list[Any] | None:
        """Every rank's `value` in the order of ranks, on rank 0; None on the others. Called by all."""
        with self._waiting("gathering results", range(self.size)):
            return gather_values_at(value, self._everyone(), receiver=0)

    def _everyone(self) -> dist.ProcessGroup | None:
        return None if self.size == 1 else dist.group.WORLD

    def any_of(self, mine: bool) -> bool:
        """Whether any rank says so, when all have come: here all must live, so rank 0, who gathers, is among them."""
        self.barrier()
        return True

    def barrier(self) -> None:
        """Returns when all ranks have come."""
        if self.size > 1:
            with self._waiting("a barrier", range(self.size)):
                dist.monitored_barrier(timeout=timedelta(seconds=self.timeout_s))

    @contextmanager
    def _waiting(self, what: str, ranks: Sequence[int]) -> Iterator[None]:
        """Turns a failed wait for `ranks` into a `PeerLost` that says which of them have not come as far as this."""
        key = f"at/{what}/{len(ranks)}/"
        self._visits[key] += 1
        visit = self._visits[key]
        try:
            if self._store is not None:
                self._store.set(f"{key}{self.rank}", str(visit))
            yield
        except RuntimeError as error:
            if isinstance(error, PeerLost) or not is_secondary(error):
                raise
            missing = self._missing(lambda rank: self._visit(f"{key}{rank}") >= visit, ranks)
            why = " ".join(str(error).split())
            waited = f"gone away or kept the others waiting for {self.timeout_s:g} s"
            raise PeerLost(f"{what}: {missing} {waited} ({why})") from error

    def _visit(self, key: str) -> int:
        found = read_value(self._store, key) if self._store.check([key]) else 0
        return found if isinstance(found, int) else 0

    # --- the rest

    def close(self) -> None:
        """Leaves the others, at the end of a job that went well."""
        if self._store is None:
            return
        self._part()
        dist.destroy_process_group()
        self._store = self._replicas = self._pipeline_group = self._last_row = self._meeting = None

    def _part(self) -> None:
        """Rank 0, who holds the store, leaves last; a peer that dies now no longer matters."""
        keys = [f"left/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], "")
            if self.rank == 0:
                self._store.wait(keys, timedelta(seconds=min(self.timeout_s, _PARTING_S)))
        except RuntimeError as error:
            sys.stderr.write(f"warning: a rank left without a word: {' '.join(str(error).split())}\n")


def _connected(group: Any, expected: bool) -> dist.ProcessGroup:
    assert expected and group is not None, "this group exists after World.connect(), where there is more than one"
    found: dist.ProcessGroup = group
    return found


def _is_shared(placement: Placement, device: Device) -> bool:
    return sum(other == device for row in placement.stages for other in row) > 1


def _torch_device(device: Device, *, warn: bool) -> torch.device:
    """The device to compute on; a GPU where there is no CUDA is the CPU, which is said once per host."""
    if device.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if warn:
            sys.stderr.write(f"warning: no CUDA on {socket.gethostname()}: {device} and its like run on the CPU\n")
            sys.stderr.flush()
        return torch.device("cpu")
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"{device} does not exist: {socket.gethostname()} has {torch.cuda.device_count()} GPUs; "
            "choose a --placement for them, or let workers share one with shared=True"
        )
    return torch.device("cuda", device.index)
