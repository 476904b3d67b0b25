"""From a model and a cut to one stage: builds only that stage's blocks, makes or lends the tied parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from pipeline.models.criterion import Criterion
from pipeline.models.layered import LayeredModel, build_blocks, locate, tie
from pipeline.stage.seeding import GENERATOR_LOCK
from pipeline.stage.stage import BlockModule, OptimizerFactory, Stage, StageOptions
from pipeline.stage.tied import Tie


def bounds(counts: Sequence[int], stage: int) -> tuple[int, int]:
    """First block of `stage` and the one after its last, for `counts` blocks per stage."""
    ends = list(accumulate(counts))
    return ends[stage] - counts[stage], ends[stage]


def stage_of_parameter(model: LayeredModel, counts: Sequence[int], name: str) -> tuple[int, int]:
    """(stage, block) that hold the parameter called `name`: the block with the longest matching prefix that has it."""
    for index in range(len(model.blocks)):
        if not name.startswith(model.blocks[index].prefix):
            continue
        module = build_blocks(model, index, index + 1, 0)
        if locate(model, module, name, start=index) is not None:
            ends = list(accumulate(counts))
            return next(stage for stage, end in enumerate(ends) if index < end), index
    raise ValueError(f"{model.name} has no parameter {name!r}")


def tie_of(model: LayeredModel, counts: Sequence[int]) -> Tie | None:
    """The tie of `model` if this cut puts its two ends on different stages, else None."""
    for borrower_name, owner_name in model.ties.items():
        borrower, _ = stage_of_parameter(model, counts, borrower_name)
        owner, _ = stage_of_parameter(model, counts, owner_name)
        if owner != borrower:
            return Tie(owner, borrower, owner_name, borrower_name)
    return None


def make_stage(
    model: LayeredModel,
    counts: Sequence[int],
    stage: int,
    optimizer: OptimizerFactory,
    *,
    seed: int,
    criterion: Criterion | None,
    window: int = 1,
    device: torch.device | None = None,
    options: StageOptions | None = None,
) -> Stage:
    """Stage `stage` of `model` cut into `counts` blocks per stage, with weights that do not depend on the cut.

    criterion: used on the last stage only. window: most micro-batches in flight here.
    """
    device = device or torch.device("cpu")
    start, stop = bounds(counts, stage)
    borrowed = {}
    with GENERATOR_LOCK:
        modules = build_blocks(model, start, stop, seed)
        tie(model, modules, start=start)
        lent = tie_of(model, counts)
        if lent is not None and lent.borrower == stage:
            borrowed = {lent.borrower_name: lent.owner_name}
            _copy_initial(model, counts, modules, lent, start, seed)
    placed = [module.to(device) for module in modules]
    return Stage(
        [BlockModule(start + n, model.blocks[start + n].prefix, module) for n, module in enumerate(placed)],
        optimizer,
        device=device,
        criterion=criterion if stage == len(counts) - 1 else None,
        first=stage == 0,
        window=window,
        borrowed=borrowed,
        aliases=frozenset(model.ties),
        options=options,
    )


def _copy_initial(
    model: LayeredModel, counts: Sequence[int], modules: list[nn.Module], lent: Tie, start: int, seed: int
) -> None:
    """Gives the borrower the value its owner starts from, by building the owner's block once more."""
    _, block = stage_of_parameter(model, counts, lent.owner_name)
    there = locate(model, build_blocks(model, block, block + 1, seed), lent.owner_name, start=block)
    here = locate(model, modules, lent.borrower_name, start=start)
    assert here is not None and there is not None
    with torch.no_grad():
        here[0].get_parameter(here[1]).copy_(there[0].get_parameter(there[1]))
