"""The training loop of a job whose pipelines do as much as they can, mix their weights, and may be lost and come back.

    hello ── copy the first pipeline's weights ──┐                     late or fenced: copy a live replica's
             ┌───────────────────────────────────┴───────────────┐
    segment  │ tickets until there are none ── drain ── average  │ validate, checkpoint ── next segment ── ...
             └────── mixing after every update ──────────────────┘

A segment is the work between two stops of the calendar. It ends for a pipeline when the coordinator has no more
tickets for it, at the same batch on all its stages; then all live replicas of a stage average, and agree again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import count
from threading import RLock
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

from pipeline.coordination.patience import Patience
from pipeline.coordination.questions import JobOver
from pipeline.data.dynamic_batches import TicketBook, TicketFeed, TicketPlan
from pipeline.data.epochs import Position, Segments
from pipeline.data.plan import Plan
from pipeline.data.supply import InputSupply, TargetSupply
from pipeline.errors import CoordinatorLost, Fenced, GroupBroken, PeerLost, TooFewReplicas
from pipeline.replicas.consensus import ConsensusProbe
from pipeline.replicas.conversation import mean_of
from pipeline.replicas.elastic import ElasticWorld
from pipeline.replicas.flat_state import StageVector
from pipeline.replicas.gradients import MeshReducer
from pipeline.replicas.mixers import AsynchronousMixer, BlockingMixer, NothingToMix, OverlappedMixer
from pipeline.report.run_log import run_name
from pipeline.report.summary import RankReport
from pipeline.report.training_log import ElasticJournal
from pipeline.simulation.profile import Profile
from pipeline.stage.executor import Executor, NoReducer, Reducer
from pipeline.sync import Synchroniser, make_synchroniser
from pipeline.train.plan import EVEN, RunPlan, Task
from pipeline.train.state import MixingState, Stateful, SynchroniserState
from pipeline.train.trainer import Trainer
from pipeline.transport.protocol import Transport


class ElasticTrainer(Trainer):
    """One rank of such a job."""

    world: ElasticWorld
    journal: ElasticJournal | None

    def __init__(
        self, plan: RunPlan, task: Task, world: ElasticWorld, transport: Transport, profile: Profile = EVEN
    ) -> None:
        self.guard = RLock()  # held while weights change, and while somebody copies them
        self.book = TicketBook(
            world.client, transport, stage=world.stage, stages=world.num_stages, accumulate=plan.settings.accumulate
        )
        self.common = _common_plan(plan, task)
        super().__init__(plan, task, world, transport, profile)
        self.segment, self.k = 0, 0
        self._deserted = False  # whether the coordinator is gone
        self.ticket = 0  # the last one that was begun here
        self._counted = 0  # batches whose samples are counted
        self.distance = 0.0  # between this replica and the mean, at the last stop
        self.hooks.rate_at = self._rate_at
        self.probe = ConsensusProbe(
            world.client.gather,
            StageVector(self.stage).look,
            every=self.settings.consensus_every,
            stages=self.stages,
            tell=self._tell_distance,
        )
        world.mesh.serve_state(self._provide)

    # --- what is built differently

    def _make_reducer(self) -> Reducer:
        return NoReducer() if self.settings.elastic else MeshReducer(self.stage.weights, self.world.link)

    def _mixing(self) -> dict[str, float]:
        """What mixing did so far, in numbers."""
        world = self.world
        stats = world.stats.now()
        return {
            "partner": mean_of(stats.sizes),
            "waited_s": stats.waited_s,
            "mixed_s": stats.mixed_s,
            "staleness": mean_of(stats.staleness),
            "distance": self.distance,
            "mixed_bytes": world.mesh.bytes_sent,
            "lost": len(world.lost),
            **{f"groups_of_{size}": times for size, times in sorted(stats.sizes.items())},
        }

    def report(self) -> RankReport:
        world = self.world
        mixing = {**self._mixing(), "broken": world.stats.now().broken, "lost": list(world.lost)}
        whole = super().report()
        return dataclasses.replace(
            whole,
            mixing=mixing,
            bytes_sent=whole.bytes_sent + world.mesh.bytes_sent,
        )

    def curve(self) -> list[tuple[float, float]]:
        """Of whoever speaks."""
        return super().curve() if self.journal is not None and self._speaks() else []

    def _make_executor(self, **more: Any) -> Executor:
        self.sync = make_synchroniser(self.settings) if self.settings.elastic else None
        self.mixer = NothingToMix() if self.sync is None else self._make_mixer(self.sync)
        ahead = {} if self.stages > 1 else {"look_ahead": 1}  # nothing is received, and no ticket needed, ahead of time
        return super()._make_executor(mixer=self.mixer, guard=self.guard, **ahead, **more)

    def _stateful(self) -> list[Stateful]:
        found = super()._stateful()
        if self.sync is not None:
            found += [MixingState(self.mixer, self.stage), SynchroniserState(self.sync, self._vector)]
        return found

    def _make_mixer(self, sync: Synchroniser) -> BlockingMixer | OverlappedMixer | AsynchronousMixer:
        settings, link = self.settings, self.world.link
        vector = StageVector(self.stage, state=settings.sync_momentum == "average", buffers=settings.sync_buffers)
        self._vector = vector
        if sync.policy == "none":
            return AsynchronousMixer(vector, sync, link, guard=self.guard)
        if not sync.blocking:
            return OverlappedMixer(vector, sync, link, guard=self.guard)
        after = self.stage.reset_momentum if settings.sync_momentum == "reset" else (lambda: None)
        return BlockingMixer(vector, sync, link, guard=self.guard, after=after)

    def _speaks(self) -> bool:
        """Whether this pipeline's last stage logs for all: that of the lowest one that is live."""
        return self.world.pipeline == min(self.world.client.live, default=-1)

    def _make_journal(self) -> ElasticJournal:
        world = self.world
        return ElasticJournal(
            self.settings,
            self.calendar,
            self.task.criterion,
            speaks=self._speaks,
            told=world,
            length=self.common.batch_length,
            rate=self.rate,
            sum_over_pipelines=world.sum_over_pipelines,
            progress=self.progress,
            busy_s=lambda: self.executor.busy_s,
            device=str(world.device),
            run_name=world.agreed_name(run_name(self.settings.name, now=datetime.now())),
            resumed=self.settings.resume is not None or world.late,  # never over what others have written
        )

    def _mean_over_pipelines(self, counts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Where replicas share gradients; with a synchroniser every pipeline updates on its own."""
        return self.reducer.share(counts) if isinstance(self.reducer, MeshReducer) else counts

    # --- running

    def run(self) -> None:
        self.segments = Segments(
            calendar=self.calendar,
            pipelines=self.world.num_pipelines,
            tickets_per_epoch=self.common.batches_per_epoch,
            first_ticket=self.common.first_batch,
        )
        if self.journal is not None:
            self.journal.begin(self.batches)
            if self.segments.stops and not self.world.late:
                self.journal.begin_at(self.segments.tickets(0)[0])
        try:
            self._again_if_fenced(self._meet)
            while self.segment < len(self.segments.stops):
                self._again_if_fenced(self._run_segment)
        except JobOver:
            self.over = True
        except (CoordinatorLost, TooFewReplicas):
            self._leave_checkpoint()
            raise
        self.mixer.close()
        self.world.begin_segment(len(self.segments.stops))

    def _again_if_fenced(self, act: Callable[[], object]) -> None:
        """Whoever finds itself declared lost joins again, as often as it takes."""
        while True:
            try:
                act()
                return
            except Fenced:
                self.world.diary.note("fenced", segment=self.segment)
                self.book.part(self.k)
                act = self._rejoin

    def _meet(self) -> None:
        """At the start: everybody takes the first pipeline's weights, or, when late, those of a live replica.

        When the first pipeline is lost meanwhile, everybody takes those of the next one.
        """
        world = self.world
        if world.late:
            self._rejoin()
            return
        if self.sync is not None and not self.sync.state():  # else it goes on from a checkpoint
            self.sync.begin(self._vector.read(), self._vector.weights)
        world.gather("serving", None, scope="stage", fold="nothing")
        patience = self._patience()
        copied = False
        while not copied:
            refusal = self._copy_the_first()
            world.mesh.connect()
            copied = world.gather("copied", refusal is None, scope="all", fold="all")
            if refusal is not None:
                sleep(patience.pause_s(refusal, perf_counter()))
        self.executor.share_tied_weight(0)

    def _copy_the_first(self) -> str | None:
        """Takes over the state of the first pipeline that is live, if that is another one; why that was impossible."""
        first = min(self.world.live_pipelines())
        address = self.world.client.peers.get(first)
        if first == self.world.pipeline:
            return None
        if address is None:
            return f"pipeline {first} has been lost since"
        adopted = self._adopt(first, address)
        return adopted if isinstance(adopted, str) else None

    def _patience(self) -> Patience:
        return Patience("copying a replica's state", limit_s=self.world.timeout_s, began=perf_counter())

    def _rejoin(self) -> None:
        """Copies a live replica; when all stages have, the coordinator says where to go on.

        A copy made before a stop that the others have passed since is made again.
        """
        client = self.world.client
        copied = self._copy_a_replica()
        welcome = client.refreshed().result()
        self.world.tell_mesh()
        self.probe.begin_anew()
        self.segment, self.k = welcome.segment, welcome.k
        self.book.life = welcome.generation
        if copied < self.segment < len(self.segments.stops):
            self._copy_a_replica(of_segment=self.segment)
        self.executor.share_tied_weight(self.k * self.plan.microbatches)
        if self.journal is not None:
            self.journal.joined()
        self.world.diary.note("joined", segment=self.segment, k=self.k, generation=welcome.generation)

    def _copy_a_replica(self, *, of_segment: int = 0) -> int:
        """Takes over the state of whoever can give it, in that segment or a later one; the segment it is of.

        Raises:
            PeerLate: nobody could, for as long as this process waits for a peer.
        """
        patience = self._patience()
        while True:
            giver, address = self.world.client.giver().result()
            copied = self._adopt(giver, address)
            if isinstance(copied, int) and copied >= of_segment:
                return copied
            refusal = f"pipeline {giver} is in segment {copied} still" if isinstance(copied, int) else copied
            sleep(patience.pause_s(refusal, perf_counter()))

    def _run_segment(self) -> None:
        world, segment, began = self.world, self.segment, perf_counter()
        world.begin_segment(segment)
        world.client.begin(segment, *self.segments.tickets(segment))
        self.book.begin(segment, self.k)
        self._counted = self.k
        self._train()
        if self.book.abandoned:
            raise world.client.failure or CoordinatorLost("the coordinator is gone")
        self._average(segment)
        self.stretches.append((began, perf_counter()))
        self._at_stop(segment)
        self.segment = segment + 1

    def _train(self) -> None:
        started = perf_counter()
        self._supply_data()
        feed = TicketFeed(self.book, self.k, self.plan.microbatches)
        self._carry_out(feed)
        assert self.book.end is not None
        self.seconds += perf_counter() - started
        self.k = self.book.end
        self.mixer.drain()
        first, stop = self.segments.tickets(self.segment)
        if stop > first:  # the last probes are of all as well, whoever did the last tickets
            self.probe.updated(self.segments.update(stop - 1) + 1)

    def _at_stop(self, segment: int) -> None:
        """Everybody has the same weights: closes the books of the segment, validates, saves."""
        started = perf_counter()
        self.batches = self.segments.stops[segment]
        live = self.world.live_pipelines()
        if self.journal is not None:
            self.journal.stopped(
                self.batches,
                self._mixing(),
                ticket=self.segments.tickets(segment)[1],
                pipeline=self.world.pipeline,
                samples=float(self.samples),
            )
        self.saver = min(live)
        if self.world.pipeline not in live:
            raise Fenced("the others agreed on going on without this pipeline")
        if self.calendar.validates(self.batches):
            self._validate(pipelines=len(live), pipeline=list(live).index(self.world.pipeline))
        if self.calendar.checkpoints(self.batches):
            self.save()
        if self.journal is not None:
            self.journal.paused(perf_counter() - started)

    # --- data

    def _supply_data(self) -> None:
        start = self.k * self.plan.microbatches
        plan = TicketPlan(self.common, self.book)
        if self.position == 0:
            self.hooks.inputs = InputSupply(
                iter(self._feed(self.task.train.inputs, plan, start, None, self._workers()))
            )
        if self.is_last:
            feed = self._feed(self.task.train.targets, plan, start, None, 0)
            self.hooks.targets = TargetSupply(
                iter(feed),
                self.task.criterion,
                ends_update=self.plan.shape.ends_update,
                device=self.world.device,
                shared=self._mean_over_pipelines if self.task.criterion.uneven else None,
            )

    def _ticket_of(self, microbatch: int) -> int:
        ticket = self.book.ticket(microbatch // self.plan.microbatches)
        assert ticket is not None
        return ticket

    def _name_of(self, microbatch: int) -> int:
        part = microbatch % self.plan.microbatches
        return self.common.name(self._ticket_of(microbatch) * self.plan.microbatches + part)

    def _rate_at(self, microbatch: int) -> float:
        return self.rate(self.segments.update(self._ticket_of(microbatch)))

    def _updated(self, microbatch: int) -> None:
        self._end_step()
        k = microbatch // self.plan.microbatches
        ticket = self.ticket = self._ticket_of(microbatch)
        for batch in range(self._counted, k + 1):
            self.samples += self.common.batch_length(self._ticket_of(batch * self.plan.microbatches))
            if self.position == 0:
                self.world.client.done(batch)
        self._counted = k + 1
        self.world.diary.note("update", k=k, ticket=ticket, mixed=self.world.stats.now().mixed)
        self.probe.updated(self.segments.update(ticket) + 1)
        if self.journal is not None:
            self.journal.progressed(self.segments.batch(ticket) + 1, ticket, self.stage.take_sums())

    def _tell_distance(self, update: int, distance: float) -> None:
        if self.journal is not None:
            self.journal.log.event("consensus", {"update": update, "distance": distance})

    # --- agreeing

    def _average(self, segment: int) -> None:
        """The mean over all live replicas, statistics of BatchNorm included; tried again when one is lost meanwhile."""
        world = self.world
        vector = StageVector(self.stage, buffers=True)
        mine = vector.read()
        for attempt in count():
            group = world.client.final(segment, attempt).result()
            mean: Tensor | None = None
            with suppress(GroupBroken):  # the survivors try again
                mean = world.mesh.average(mine, group.members, group.round, generations=group.generations)
            # of all stages: nobody begins the next segment while others still average
            whole = world.client.gather(f"final/{segment}/{attempt}", mean is not None, "all", "all").result()
            if mean is not None and whole:
                with self.guard:
                    vector.write(mean)
                self.executor.share_tied_weight(self.k * self.plan.microbatches)
                difference = mine.sub_(mean)
                self.distance = float(torch.dot(difference, difference)) ** 0.5
                world.diary.note_state("averaged", {"x": mean}, segment=segment, members=group.members)
                return

    def _read_so_far(self) -> Position:
        return self.common.position(self.segments.ticket(self.batches))

    def by_saver(self, write: Callable[[], None]) -> None:
        """At the very end the next pipeline writes where the one that should is lost: no other chance comes."""
        if self._deserted or self.batches < self.calendar.total_batches:
            super().by_saver(write)
            return
        written = False
        while not written:
            mine = self.saver == self.world.pipeline
            if mine:
                write()
            written = self.world.anybody("written", mine)
            if not written:
                self.saver = min(self.world.live_pipelines(), default=self.saver)

    def may_write(self) -> None:
        if self._deserted:  # there is nobody to ask, and no other who would write
            return
        client = self.world.client
        self.world.gather("writes", None, scope="pipeline", fold="nothing")
        if client.fenced:  # it knows already, and asked in its new life
            raise Fenced(f"pipeline {self.world.pipeline} was declared lost before its checkpoint was written")

    def _leave_checkpoint(self) -> None:
        """The coordinator is gone: what this pipeline has learnt is not lost. All its stages come here."""
        client = self.world.client
        if self.settings.checkpoint is None or client.fenced or self.world.pipeline != min(client.live, default=0):
            return
        calendar = self.calendar
        self.batches = calendar.batch_after(calendar.updates_after(self.segments.batch(self.ticket)))
        self.saver, self._deserted = self.world.pipeline, True
        self.save()

    def _provide(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a joiner copies: everything between two updates, and between two forwards."""
        with self.guard:
            started = perf_counter()
            tensors = self.stage.snapshot(self.states.tensors())
            values = {"states": self.states.values(), "segment": self.segment}
            paused_s = perf_counter() - started
        self.world.diary.note_state("gave", _of_stage(tensors), paused_s=paused_s, segment=values["segment"])
        return tensors, values

    def _adopt(self, giver: int, address: str) -> int | str:
        """Takes over a replica's state, bit for bit; the segment it was in, or why it cannot be had from there."""
        try:
            tensors, values = self.world.mesh.pull_state(giver, address)
        except GroupBroken:
            return f"pipeline {giver} went away"
        except PeerLost as error:
            return str(error)
        with self.guard:
            self.states.adopt(tensors, values["states"])
        self.world.diary.note_state("took", _of_stage(self.states.tensors()), giver=giver)
        segment: int = values["segment"]
        return segment


def _of_stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("sync.")}


def _common_plan(plan: RunPlan, task: Task) -> Plan:
    """The order of all samples as one pipeline would read them: batch n of it is ticket n."""
    settings = plan.settings
    return Plan(
        size=task.train.size,
        batch_size=settings.batch_size,
        microbatches=settings.num_microbatches,
        least=plan.least,
        seed=settings.seed,
        begun=plan.position,
    )
