"""The world of a process in an elastic job: its pipeline is all it depends on; other pipelines may come and go.

                 stage 0   stage 1   stage 2
    pipeline 0      0         1         2      within a row: MPI, or torch.distributed over this row alone
    pipeline 1      3         4         5      within a column: the mesh; across everything: the coordinator

Whatever the others have to say (sums, reports) comes through the coordinator, which knows who is alive, so nobody
waits for a pipeline that is gone. Keys are numbered within a segment, so that one who joins later counts alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from pipeline.cluster.cores import granted
from pipeline.cluster.json_exchange import broadcast_value, packed, unpacked
from pipeline.cluster.rendezvous import Networks, choose_address, networks, pipeline_store, read_value
from pipeline.cluster.wire import OUTAGE_S
from pipeline.cluster.world import Peer, World, is_oversubscribed
from pipeline.coordination.client import FRAME_BYTES, Client
from pipeline.coordination.gather import add_up
from pipeline.coordination.messages import JobRules
from pipeline.coordination.questions import Welcome
from pipeline.coordination.thinning import fit
from pipeline.errors import CoordinatorLost, Fenced, Forged, PeerLost, TooFewReplicas
from pipeline.replicas.conversation import Link, MixStats
from pipeline.replicas.mesh.mesh import Mesh
from pipeline.report.event_log import Diary
from pipeline.sync import make_synchroniser

if TYPE_CHECKING:
    from pipeline.settings import Settings

T = TypeVar("T")

MESSAGE_BYTES = FRAME_BYTES - (16 << 10)  # of a value, beside its key and its numbers
RECEIVED_BYTES = 32 << 20  # of the values of all workers, which the coordinator passes on as one message
NEWEST = ("spans",)  # lists whose end is wanted when they are too long; else entries from all over


def share_bytes(workers: int) -> int:
    """How long the value may be that each of so many workers gives to one of them."""
    return min(MESSAGE_BYTES, RECEIVED_BYTES // workers)


MOST_WRITERS = 3  # pipelines that are ready to write for all: the lowest does, the others should it be lost


class ElasticWorld(World):
    """A `World` whose other pipelines may be lost; made from one that is not yet connected.

    Attributes (after `connect`):
        client, mesh, stats: the ways to the replicas. welcome: what the coordinator said at the start.
    """

    client: Client
    mesh: Mesh

    def __init__(self, world: World, settings: Settings) -> None:
        super().__init__(world.identity, world.placement, timeout_s=world.timeout_s, control=world.control)
        self.settings = settings
        self.incarnation = int(os.environ.get("HETURUN_INCARNATION", "0"))
        self.stats = MixStats()
        self.diary = Diary.of(pipeline=self.pipeline, stage=self.stage, incarnation=self.incarnation)
        self.welcome = Welcome(generation=0, late=False, segment=0, k=0)
        self._leader = 0  # the lowest rank of those that began; known after connect()
        self.lost: list[int] = []  # pipelines, in the order of their losses
        self._segment = -1  # the start
        self._calls: Counter[str] = Counter()
        self._joined = False

    # --- joining

    def connect(self) -> None:
        if self._joined:
            return
        self._joined = True
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._join_pipeline()
        address, key = self._find_coordinator()
        self.job = hashlib.sha256(b"the job of " + address.encode() + key).hexdigest()[:16]
        self.mesh = Mesh(self.pipeline, key, address=self.address, timeout_s=self.timeout_s)
        self.client = Client(
            address,
            key,
            self._rules(),
            stage=self.stage,
            pipeline=self.pipeline,
            incarnation=self.incarnation,
            mesh_address=self.mesh.address,
            timeout_s=self.timeout_s,
            on_lost=self._on_lost,
            on_joined=self._on_joined,
            patience_s=OUTAGE_S,
        )
        self.mesh.on_broken = self.client.suspect
        self.diary.note("hello")
        self.welcome = self.client.hello()
        self.diary.note("welcome", late=self.welcome.late)
        self.late = self.welcome.late
        self._leader = self._rank_of(min(self.client.live, default=0), 0)  # pipeline 0 may have been lost before
        self.tell_mesh()
        if self.control is not None:
            self.control.elastic(self.settings.min_replicas)

    @property
    def decides(self) -> bool:
        return self.rank == self._leader

    @property
    def link(self) -> Link:
        return Link(self.client, self.mesh, self.stats, self.stage, self.pipeline)

    def _rules(self) -> JobRules:
        settings, stages = self.settings, range(self.num_stages)
        policy, even = "all", True  # all-reduce
        if settings.elastic:
            sync = make_synchroniser(settings)
            policy, even = sync.policy, sync.even
        return JobRules(
            stages=self.num_stages,
            pipelines=self.num_pipelines,
            policy="partial" if policy == "none" else policy,  # none: only ends of segments form groups
            max_group=settings.max_group,
            connect_within=settings.connect_within,
            wait="hidden" if settings.overlap_sync and settings.wait == "adaptive" else settings.wait,
            seed=settings.seed,
            even=even,
            min_replicas=settings.min_replicas,
            heartbeat_timeout_s=settings.heartbeat_timeout,
            hosts=tuple(tuple(self._hosts[self._rank_of(p, s)] for p in range(self.num_pipelines)) for s in stages),
        )

    def _on_lost(self, pipeline: int, generation: int) -> None:
        self.lost.append(pipeline)
        self.tell_mesh()
        self.mesh.lost(pipeline, generation)

    def _on_joined(self, pipeline: int, generation: int) -> None:
        self.tell_mesh()

    def tell_mesh(self) -> None:
        self.mesh.set_peers(self.client.peers, self.client.generations, self.client.generation)

    def _join_pipeline(self) -> None:
        """torch.distributed over the stages of this pipeline, where there are several in processes of their own."""
        here = networks()
        one_host = self.identity.one_host
        self.address = choose_address(os.environ, here, one_host=one_host, towards=None)
        if self.identity.threads:
            return
        row = [self._rank_of(self.pipeline, stage) for stage in range(self.num_stages)]
        if self.control is None:
            peers = self._meet_everybody()
            store = PrefixStore(f"pipeline {self.pipeline}", self._store)
        elif self.num_stages == 1:
            peers, store = {self.rank: self._peer()}, None
        else:
            peers = self._meet_row(here, row)
            store = PrefixStore("torch", self._pipeline_store)
        # of other pipelines of this host, heturun only tells how many ranks they have
        crowded = is_oversubscribed(list(peers.values()), self.host, quota=granted(), ranks=self.local_size)
        self._judge([peers[rank] for rank in row], crowded)
        if store is None or self.num_stages == 1:
            return
        dist.init_process_group(
            "gloo", store=store, rank=self.stage, world_size=self.num_stages, timeout=timedelta(seconds=self.timeout_s)
        )
        self._pipeline_group = dist.group.WORLD

    def _meet_everybody(self) -> dict[int, Peer]:
        """Without heturun: all ranks of the job come to one store, and are where the layout has them."""
        peers = self._wait_for_all(self._meet(None), range(self.size))
        self._hosts = tuple(peer.host for peer in peers)
        self._check_hosts()
        return dict(enumerate(peers))

    def _meet_row(self, here: Networks, row: Sequence[int]) -> dict[int, Peer]:
        """Under heturun: the stages of this pipeline come to a store of their own."""
        assert self.control is not None
        self._pipeline_store = pipeline_store(  # kept while it is used, which stage 0 serves
            self.control,
            self.address,
            here,
            name=f"pipeline {self.pipeline} ({self.incarnation})",
            serves=self.stage == 0,
            timeout_s=self.timeout_s,
        )
        return dict(zip(row, self._wait_for_all(self._pipeline_store, row), strict=True))

    @property
    def rows_of_ranks(self) -> dict[int, list[int]]:
        """torch.distributed knows this pipeline alone."""
        return {self.pipeline: list(range(self.num_stages))}

    def _find_coordinator(self) -> tuple[str, bytes]:
        """Its address and the job's key: from the launcher, which starts one; without it rank 0 does.

        The key does not go through the store unless nobody has given one (`pipeline.cluster.sealed_store.job_key`).
        """
        if self.control is not None:
            try:
                address = self.control.lookup("coordinator", timeout_s=self.timeout_s)
            except (TimeoutError, ConnectionError) as error:
                raise PeerLost(f"no coordinator: {error}") from error
            return address, bytes.fromhex(os.environ["HETURUN_KEY"])
        if self.rank == 0:
            from pipeline.coordination.server import spawn_coordinator

            key = self._job_key or secrets.token_bytes(32)
            self._coordinator, address = spawn_coordinator(key, self.address)
            self._store.set("coordinator", json.dumps([address, None if self._job_key else key.hex()]))
        self._store.wait(["coordinator"], timedelta(seconds=self.timeout_s))
        told = read_value(self._store, "coordinator")
        try:
            address, text = told
            return str(address), self._job_key or bytes.fromhex(text)
        except (TypeError, ValueError):
            raise Forged(f"the store names {told!r:.60} as the coordinator, which no rank 0 would") from None

    # --- who writes for all

    @property
    def outlives_this(self) -> bool:
        return True

    def leads(self) -> bool:
        return not self.late and self.pipeline == min(self.client.live, default=-1)

    def may_write(self) -> bool:
        return self.pipeline in sorted(self.client.live)[:MOST_WRITERS]

    def lives(self) -> tuple[int, Mapping[int, int]]:
        return self.client.generation, self.client.generations

    # --- values from and to others

    def begin_segment(self, segment: int) -> None:
        """Keys are counted anew: all replicas call alike from here on."""
        self._segment = segment
        self._calls.clear()

    def _key(self, what: str) -> str:
        self._calls[what] += 1
        return f"{what}/{'start' if self._segment < 0 else self._segment}/{self._calls[what]}"

    def gather(self, what: str, value: Any, *, scope: str, fold: str) -> Any:
        """What the values of all live members of the scope ("stage", "pipeline", "last", "all") come to.

        Args:
            fold: as in `Client.gather`.
        """
        return self.client.gather(self._key(f"{what}/{scope}"), value, scope, fold).result()

    def agree(self, what: str, value: T) -> T:
        """Whichever live worker's value came first."""
        answer: Future[Any] = self.client.first(self._key(what), value, self._segment)
        agreed: T = answer.result()
        return agreed

    def agreed_name(self, own: str) -> str:
        """The run's name that was proposed first, so that whoever speaks later writes to the same folder."""
        with suppress(Fenced):  # whoever was declared lost so early meets it again in the training loop
            return self.agree("run name", own)
        return own

    def tell(self, value: Any) -> None:
        """Sends a value to the one that speaks; nobody waits for it."""
        self.client.tell(value)

    def told(self) -> list[Any]:
        """What was told to this one since the last call."""
        return self.client.told()

    def sum_over_pipelines(self, sums: dict[str, float]) -> dict[str, float]:
        """Alone, a pipeline that was declared lost, or that has lost the coordinator, has only its own.

        It does not fail here, since the other stages of its pipeline, which add up nothing, would not: the next ticket
        ends the work of all of them alike.
        """
        try:
            added: dict[str, float] = self.gather("sums", sums, scope="last", fold="sum")
        except (Fenced, CoordinatorLost, TooFewReplicas):
            return dict(sums)
        return added

    def sum_to_speaker(self, sums: dict[str, float]) -> dict[str, float]:
        """The same for the one that speaks, {} for the others: for sums whose names are many."""
        try:
            rows = self.gather("sums to speaker", sums, scope="last", fold="rows to speaker")
        except (Fenced, CoordinatorLost, TooFewReplicas):
            return dict(sums)
        return {} if rows is None else add_up(rows.values())

    def from_last_stage(self, value: Any) -> Any:
        if self.num_stages == 1:
            return value
        if self._pipeline_group is not None:  # needs no coordinator, which may be gone
            return broadcast_value(value, self._pipeline_group, source=self.num_stages - 1)
        mine = fit(value, MESSAGE_BYTES) if self.is_last_stage else None
        return self.gather("from last", mine, scope="pipeline", fold="given")

    def broadcast_from_zero(self, value: Any) -> Any:
        """Rank 0's value, or the `UserError` that it found instead; one who joins later gets what was agreed then."""
        zero: Any = None
        if not self.late:
            zero = self.gather("from zero", packed(value) if self.decides else None, scope="all", fold="given")
            if zero is None:
                raise PeerLost(
                    f"rank {self._leader} was lost before it could say what all must know; start the job again"
                )
        return unpacked(self.agree("from zero", zero), f"rank {self._leader}")

    def gather_to_zero(self, value: Any) -> list[Any] | None:
        """Every live rank's value, on the lowest of them; long lists in it are thinned, for it must fit a message."""
        mine = fit(value, share_bytes(self.size), newest=NEWEST)
        rows: dict[int, Any] | None = self.gather("to zero", mine, scope="all", fold="rows to first")
        return None if rows is None else [rows[rank] for rank in sorted(rows)]

    def any_of(self, mine: bool) -> bool:
        """Whether any rank says so, when all who are live have come."""
        return bool(self.gather("any of", mine, scope="all", fold="any"))

    def barrier(self) -> None:
        if not self.late or self._segment >= 0:
            with suppress(Fenced):  # whoever was declared lost meets it again in the training loop
                self.gather("barrier", None, scope="all", fold="nothing")

    def anybody(self, what: str, value: bool) -> bool:
        """Whether it is true of any live worker; all of them call this."""
        found: bool = self.gather(what, value, scope="all", fold="any")
        return found

    def live_pipelines(self) -> Sequence[int]:
        """Who is alive, as all agree."""
        agreed: list[int] = self.agree("live", list(self.client.live))
        return agreed

    def close(self) -> None:
        if not self._joined:
            return
        self.client.bye()
        self.client.close()
        self.mesh.close()
        if self._pipeline_group is not None:
            dist.destroy_process_group()
        self._pipeline_group = self._store = None
        self._joined = False
