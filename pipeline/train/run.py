"""One rank of a job from settings to summary: what train_resnet.py and train_bert.py have in common."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from pipeline.cluster.cores import own_share
from pipeline.cluster.world import World
from pipeline.core.plain import write_line
from pipeline.errors import Fenced, UserError
from pipeline.models.costs import profile_blocks
from pipeline.models.partition import (
    Profile,
    conditions_of,
    cut_points,
    cut_table,
    load_profile,
    needs_profile,
    save_profile,
)
from pipeline.replicas.elastic import ElasticWorld
from pipeline.report.summary import RankReport, write_reports
from pipeline.schedules.program import edges
from pipeline.settings import Settings
from pipeline.simulation.profile import Profile as Hetero
from pipeline.simulation.profile import check_places
from pipeline.simulation.read_profile import read_profile
from pipeline.simulation.throttled import throttled
from pipeline.train.elastic import ElasticTrainer
from pipeline.train.optim import scaled
from pipeline.train.outputs import Output, outputs_of, rescue_weights, try_outputs
from pipeline.train.plan import AMP, EVEN, RunPlan, Task, plan_run
from pipeline.train.resuming import Begun, find_begun
from pipeline.train.threads import run_threads
from pipeline.train.trainer import Trainer
from pipeline.transport import choose_transport
from pipeline.transport.protocol import Transport

Say = Callable[[str], None]
DEFAULT_TIMEOUT_S = 300.0


def train(settings: Settings, task: Task, world: World) -> None:
    """Trains `task` as this rank of `world`; rank 0 prints the summary and draws the pictures.

    Under `heturun --launcher threads` this one process is all ranks.

    Raises:
        UserError: settings, layout, model and data that do not go together.
        PeerLost: another rank went away.
    """
    check_layout(settings, world)
    if world.identity.threads:
        run_threads(settings, task, world, train_rank)
        return
    if settings.elastic and world.num_pipelines > 1:
        world = ElasticWorld(world, settings)
    train_rank(settings, task, world)


def train_rank(settings: Settings, task: Task, world: World, transport: Transport | None = None) -> None:
    """Trains as one rank, over `transport` or the one that --backend chooses."""
    say = say_on_rank_zero(world)
    counts = choose_cut(settings, task, world, say)
    elastic = isinstance(world, ElasticWorld)
    begun = find_begun_for_all(settings, task, world)
    plan = plan_run(settings, task, counts, pipelines=world.num_pipelines, say=say, elastic=elastic, begun=begun)
    say(describe_run(plan, world))
    world.connect()
    if not world.late:  # else the others are training already, and what they need is there
        outputs = outputs_of(settings, pipeline=world.pipeline, stage=world.stage, stages=world.num_stages)
        try_outputs(outputs, rank=world.rank, host=world.host)
    hetero = read_profile(settings.hetero) if settings.hetero else EVEN
    check_places(hetero, world.places)
    transport = transport or choose_transport(settings.backend, world, edges(plan.schedule, plan.shape))
    transport = throttled(transport, hetero, world.row, stage=world.stage, device=world.device)
    trainer = make_trainer(plan, task, world, transport, hetero)
    with trainer.archive.open():
        if begun is not None and not world.late:
            trainer.resume(begun)
        elif begun is None and settings.init is not None and not world.late:
            say(start_from(trainer, settings.init))
        world.barrier()
        trainer.run()
        try:
            if not trainer.over:
                export(trainer)
                rescue(trainer)
                finish(trainer)
        except Fenced:  # so late that the others have ended without it
            pass
    trainer.progress.close()
    world.close()
    trainer.archive.complain()


def make_trainer(plan: RunPlan, task: Task, world: World, transport: Transport, hetero: Hetero) -> Trainer:
    """The training loop that goes with this world."""
    if isinstance(world, ElasticWorld):
        return ElasticTrainer(plan, task, world, transport, hetero)
    return Trainer(plan, task, world, transport, hetero)


def check_layout(settings: Settings, world: World) -> None:
    """A schedule that needs one stage gets a layout of one stage."""
    if settings.pipeline == "dp" and world.num_stages > 1:
        raise UserError(
            f"--pipeline dp trains replicas of the whole model, but the layout has {world.num_stages} stages; "
            "choose a layout of one stage (as device_8dp, local_1x2), or another --pipeline"
        )


def choose_cut(settings: Settings, task: Task, world: World, say: Say) -> tuple[int, ...]:
    """Blocks per stage: as given, as the reference cuts this model, or balanced by a profile that rank 0 measures."""
    bandwidth = settings.bandwidth or math.inf
    rows = world.rows_per_stage
    if not needs_profile(task.model, settings.partition, rows):
        return cut_points(task.model, settings.partition, rows)
    world.connect()
    found: Any = None
    if world.decides and not world.late:
        found = _try(lambda: _balanced(settings, task, world, rows, bandwidth, say))
    return tuple(world.broadcast_from_zero(found))  # a UserError is raised on all ranks


def find_begun_for_all(settings: Settings, task: Task, world: World) -> Begun | None:
    """What is gone on with, as rank 0 finds it: the others, those too who join later, need no look at the folder."""
    directory = settings.resume_directory
    if directory is None:
        return None
    world.connect()
    found: Any = None
    if world.rank == 0 and not world.late:
        found = _try(lambda: find_begun(directory, settings, samples=task.train.size).to_values())
    return Begun.from_values(world.broadcast_from_zero(found))  # a UserError is raised on all ranks


def _try(act: Callable[[], Any]) -> Any:
    """What `act` returns, or the UserError that it raises: rank 0 must not leave the others waiting."""
    try:
        return act()
    except UserError as error:
        return error


def _balanced(
    settings: Settings, task: Task, world: World, rows: tuple[int, ...], bandwidth: float, say: Say
) -> tuple[int, ...]:
    batch = max(1, settings.batch_size // settings.num_microbatches)
    autocast = AMP[settings.amp]
    path = Path(settings.profile) if settings.profile else None
    if path is not None and path.exists():
        costs = load_profile(path, task.model, batch=batch, device=world.device, autocast=autocast).costs
    else:
        if path is not None:
            try_outputs([Output("profile", path, "whole file")], rank=world.rank, host=world.host)
        measured = profile_blocks(
            task.model, batch=batch, device=world.device, clock=perf_counter, repeats=3, warmup=1, autocast=autocast
        )
        costs = tuple(measured)
        if path is not None:
            conditions = conditions_of(task.model, batch=batch, device=world.device, autocast=autocast)
            save_profile(path, Profile(conditions, costs))
    counts = cut_points(task.model, settings.partition, rows, costs, bandwidth_bytes_per_s=bandwidth)
    say(cut_table(costs, counts, bandwidth_bytes_per_s=bandwidth))
    return counts


def describe_run(plan: RunPlan, world: World) -> str:
    """One line that says what is about to happen."""
    shape = plan.shape
    parts = [
        f"{world.num_pipelines} pipeline(s) x {shape.stages} stage(s)",
        f"schedule {plan.schedule.name}",
        f"blocks per stage {','.join(map(str, plan.counts))}",
    ]
    if shape.microbatches > 1:
        parts.append(f"{shape.microbatches} micro-batches a batch")
    if plan.tie is not None:
        parts.append(f"{plan.tie.owner_name} of stage {plan.tie.owner} lent to stage {plan.tie.borrower}")
    if plan.settings.scale_lr != "none":
        rate = scaled(plan.settings, pipelines=world.num_pipelines).learning_rate
        parts.append(f"learning rate {rate:g} (--scale-lr {plan.settings.scale_lr})")
    return "; ".join(parts)


def export(trainer: Trainer) -> None:
    """Writes the whole model to --export, by way of a checkpoint: that is where the stages come together."""
    path = trainer.settings.export
    if path is not None:
        trainer.by_saver(lambda: _export(trainer, path))


def _export(trainer: Trainer, path: str) -> None:
    from pipeline.train import checkpoint

    folder, world = Path(path + ".parts"), trainer.world
    tensors = trainer.stage.model_state()
    try:
        saved = checkpoint.save(
            folder,
            trainer.calendar.updates_after(trainer.batches),
            tensors=tensors,
            values={},
            group=world.pipeline_group(),
            writer=trainer.archive.passing_writer,
            ask=trainer.may_write,
            finite=tensors.keys(),
        )
        if world.stage == 0:
            checkpoint.export(saved, path, ties=dict(trainer.task.model.ties))
            shutil.rmtree(folder)
            print_line(f"exported {path}")
    except UserError as error:  # said when everything else is written
        trainer.archive.export_failure = f"--export {path}: {error}"


def start_from(trainer: Trainer, path: str) -> str:
    """Takes this stage's weights from --init; a line about it.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    from pipeline.train.initial import open_source, take_initial

    model, stage = trainer.task.model, trainer.stage
    live = stage.model_state() | stage.borrowed_state()
    return take_initial(live, model, open_source(path, model.config), partial=trainer.settings.init_partial)


def rescue(trainer: Trainer) -> None:
    """Puts weights that could not be written where they should be somewhere else, while all stages are there."""
    world = trainer.world
    if trainer.archive.lacks_weights and world.pipeline == trainer.saver:
        trainer.archive.rescued = rescue_weights(
            trainer.stage.model_state(),
            trainer.task.model.ties,
            stage=world.stage,
            stages=world.num_stages,
            host=world.host,
        )


def finish(trainer: Trainer) -> None:
    """Gathers what every rank did; whoever gets it prints the table and writes the pictures.

    That is the lowest rank that is live; if it is lost meanwhile, the next one does it.
    """
    world, journal = trainer.world, trainer.journal
    mine: dict[str, Any] = {"report": trainer.report().to_values(), "curve": [], "validations": []}
    if journal is not None:
        mine |= {"curve": trainer.curve(), "validations": journal.log.validations}
    if journal is not None:
        journal.log.close()
    trainer.transport.close()
    written = False
    while not written:
        gathered = world.gather_to_zero(mine)
        if gathered is not None and trainer.had_nothing_to_do:
            kept = f"{trainer.settings.out} is left as it was"
            print_line(f"this run was over before, after {trainer.calendar.made} updates: nothing was trained, {kept}")
        elif gathered is not None:
            try:
                write_gathered(gathered, trainer.settings.out)
            except UserError as error:  # told when all else is done
                trainer.archive.report_failure = str(error)
        written = world.any_of(gathered is not None)


def write_gathered(gathered: Sequence[Mapping[str, Any]], out: str) -> None:
    """Prints the table of what all ranks did, and writes it and the pictures."""
    reports = [RankReport.from_values(each["report"]) for each in gathered]
    drawn = next((each for each in gathered if each["curve"]), gathered[-1])  # a last stage's
    write_reports(out, reports, curve=drawn["curve"], validations=drawn["validations"], say=print_line)


def say_on_rank_zero(world: World) -> Say:
    """Prints a line, on rank 0 only."""
    return print_line if world.rank == 0 else (lambda line: None)


def deadline(settings: Settings) -> float:
    """Seconds to wait for a peer: as given, else the launcher's, else 300."""
    return settings.timeout or float(os.environ.get("HETURUN_TIMEOUT") or DEFAULT_TIMEOUT_S)


def print_line(line: str) -> None:
    """Prints a line, whatever the terminal can show."""
    write_line(line, sys.stdout)


def use_threads(world: World) -> None:
    """One thread per rank where ranks share the cores, unless the user has said otherwise (OMP_NUM_THREADS)."""
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_share(world.local_size))
