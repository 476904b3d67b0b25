"""Where to cut a list of blocks into stages: as given, as the reference system does, or balanced by measured cost.

A pipeline runs at the pace of its slowest stage, so the balanced cut minimises, over all ways to cut,

    max over stages of  T(stage) = sum of forward + backward of its blocks + time of the tensors at its two ends,

where at each end an activation crosses forwards and its gradient, as large, backwards. PipeDream (Narayanan et al.,
2019, section 3.1) finds it by dynamic programming over measured blocks; with tens of blocks that is exact and quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pipeline.errors import UserError
from pipeline.models.costs import BlockCost, Profile, conditions_of, load_profile, profile_blocks, save_profile
from pipeline.models.layered import LayeredModel

__all__ = [
    "BALANCED",
    "REFERENCE",
    "BlockCost",
    "Profile",
    "StageCost",
    "balance",
    "check_enough",
    "conditions_of",
    "cut_points",
    "cut_table",
    "imbalance",
    "load_profile",
    "needs_profile",
    "profile_blocks",
    "save_profile",
    "stage_costs",
    "stage_ranges",
]

BALANCED, REFERENCE = "balanced", "reference"


@dataclass(frozen=True)
class StageCost:
    """A stage of a cut: seconds of computing, and of moving the tensors at its two ends, per micro-batch."""

    first: str
    last: str
    compute_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.transfer_s


def balance(costs: Sequence[BlockCost], num_stages: int, *, bandwidth_bytes_per_s: float = math.inf) -> tuple[int, ...]:
    """Blocks per stage, so that the slowest stage, its transfers included, is as fast as any cut can make it.

    Among the cuts that are equally good in this, the most even one: the least sum of squared stage times.

    >>> unit = BlockCost("", 1.0, 2.0, 0, 0)
    >>> balance([unit] * 7, 3)
    (2, 2, 3)
    """
    check_enough(len(costs), num_stages)
    if not bandwidth_bytes_per_s > 0:
        raise UserError(f"a bandwidth of {bandwidth_bytes_per_s} bytes/s moves nothing; give more than 0")
    time = _stage_time(costs, bandwidth_bytes_per_s)
    slowest, _ = _best_cut(len(costs), num_stages, time, max)
    _, counts = _best_cut(
        len(costs), num_stages, lambda i, j: time(i, j) ** 2 if time(i, j) <= slowest else math.inf, _plus
    )
    return counts


def check_enough(num_blocks: int, num_stages: int) -> None:
    """UserError unless every stage can have a block."""
    if num_stages < 1:
        raise UserError(f"a pipeline has at least one stage; got {num_stages}")
    if num_blocks < num_stages:
        raise UserError(
            f"{num_blocks} blocks cannot fill {num_stages} stages; "
            f"use a layout of at most {num_blocks} stages or a deeper model"
        )


def _stage_time(costs: Sequence[BlockCost], bandwidth: float) -> Callable[[int, int], float]:
    """(i, j) -> seconds of a stage of blocks i..j-1."""
    compute = list(accumulate((c.forward_s + c.backward_s for c in costs), initial=0.0))
    edges = [0.0] + [2 * c.output_bytes / bandwidth for c in costs[:-1]] + [0.0]  # before block i
    return lambda i, j: compute[j] - compute[i] + edges[i] + edges[j]


def _plus(a: float, b: float) -> float:
    return a + b


def _best_cut(
    num_blocks: int,
    num_stages: int,
    cost: Callable[[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least join (max or sum) of stage costs over all cuts into non-empty stages, and the counts of one such cut.

    best[j] = min over i of join(best of one stage less at i, cost(i, j)), stage by stage.
    """
    nothing: tuple[float, tuple[int, ...]] = (math.inf, ())
    best = [(0.0, nothing[1])] + [nothing] * num_blocks
    for stage in range(1, num_stages + 1):
        best = [
            min(
                ((join(best[i][0], cost(i, j)), (*best[i][1], j - i)) for i in range(stage - 1, j)),
                default=nothing,
            )
            for j in range(num_blocks + 1)
        ]
    return best[num_blocks]


def needs_profile(model: LayeredModel, spec: str | None, rows_per_stage: Sequence[int]) -> bool:
    """Whether `cut_points` with the same arguments looks at the costs, so that they have to be measured."""
    if len(rows_per_stage) == 1:
        return False
    return spec == BALANCED or (spec is None and _reference(model, rows_per_stage) is None)


def cut_points(
    model: LayeredModel,
    spec: str | None,
    rows_per_stage: Sequence[int],
    costs: Sequence[BlockCost] | None = None,
    *,
    bandwidth_bytes_per_s: float = math.inf,
) -> tuple[int, ...]:
    """Blocks per stage, stem and head included.

    spec: None for the reference's cut of four rows, else balanced; "reference" or "balanced" to insist; or counts
        "a,b,c,d", one per row of the layout or per merged stage, over the body (the stem then goes to the first
        stage, the head to the last) or over all blocks.
    rows_per_stage: rows of the layout that were merged into each stage.
    costs: one per block; needed where `needs_profile` says so.
    """
    check_enough(len(model.blocks), len(rows_per_stage))
    reference = _reference(model, rows_per_stage)
    if spec == REFERENCE and reference is None:
        raise UserError(
            f"the reference has no cut of {model.name} for {sum(rows_per_stage)} rows; "
            f"give --partition {BALANCED} or counts"
        )
    if spec not in (None, REFERENCE, BALANCED):
        return _explicit(model, spec, rows_per_stage)
    if len(rows_per_stage) == 1:
        return (len(model.blocks),)
    if spec != BALANCED and reference is not None:
        return _whole(model, _merged(reference, rows_per_stage))
    if costs is None or len(costs) != len(model.blocks):
        raise ValueError(f"{model.name} has {len(model.blocks)} blocks; a balanced cut needs the cost of each")
    return balance(costs, len(rows_per_stage), bandwidth_bytes_per_s=bandwidth_bytes_per_s)


def stage_ranges(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(first block, one past the last) of each stage.

    >>> stage_ranges((2, 3))
    ((0, 2), (2, 5))
    """
    return tuple(pairwise(accumulate(counts, initial=0)))


def _reference(model: LayeredModel, rows_per_stage: Sequence[int]) -> tuple[int, ...] | None:
    cut = model.reference_cut
    return cut if cut is not None and sum(rows_per_stage) == len(cut) else None


def _explicit(model: LayeredModel, spec: str, rows_per_stage: Sequence[int]) -> tuple[int, ...]:
    given = f"--partition {spec}"
    counts = _parse(spec)
    rows, stages, body, blocks = sum(rows_per_stage), len(rows_per_stage), model.num_body, len(model.blocks)
    if len(counts) not in (rows, stages):
        wanted = f"{rows} (one per row)" + (f" or {stages} (one per stage)" if stages != rows else "")
        raise UserError(f"{given} has {len(counts)} counts; this layout needs {wanted}")
    if sum(counts) not in (body, blocks):
        extra = f", or {blocks} with its stem and head" if blocks != body else ""
        raise UserError(f"{given} adds up to {sum(counts)}; {model.name} has {body} blocks to divide{extra}")
    merged = counts if len(counts) == stages else _merged(counts, rows_per_stage)
    result = merged if sum(counts) == blocks else _whole(model, merged)
    if 0 in result:
        raise UserError(f"{given} leaves stage {result.index(0)} without a block; give every stage at least one")
    return result


def _parse(spec: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in spec.split(","))
    except ValueError:
        counts = (-1,)
    if min(counts) < 0:
        raise UserError(f"--partition {spec}: expected counts such as 4,4,4,4, or {BALANCED} or {REFERENCE}")
    return counts


def _merged(counts: Sequence[int], rows_per_stage: Sequence[int]) -> tuple[int, ...]:
    """Counts per row -> counts per stage."""
    return tuple(sum(counts[start:stop]) for start, stop in stage_ranges(rows_per_stage))


def _whole(model: LayeredModel, body: Sequence[int]) -> tuple[int, ...]:
    """Counts of body blocks -> counts of all blocks: the stem goes to the first stage, the head to the last."""
    counts = list(body)
    counts[0] += model.stem
    counts[-1] += model.head
    return tuple(counts)


def stage_costs(
    costs: Sequence[BlockCost], counts: Sequence[int], *, bandwidth_bytes_per_s: float = math.inf
) -> tuple[StageCost, ...]:
    """What each stage of this cut takes."""
    time, compute = _stage_time(costs, bandwidth_bytes_per_s), _stage_time(costs, math.inf)
    return tuple(
        StageCost(costs[i].name, costs[j - 1].name, compute(i, j), time(i, j) - compute(i, j))
        for i, j in stage_ranges(counts)
    )


def cut_table(costs: Sequence[BlockCost], counts: Sequence[int], *, bandwidth_bytes_per_s: float = math.inf) -> str:
    """The measured blocks and the stages made of them, as aligned plain text."""
    owner = [stage for stage, count in enumerate(counts) for _ in range(count)]
    blocks = [("block", "parameters", "output", "forward", "backward", "stage")] + [
        (c.name, _size(c.parameter_bytes), _size(c.output_bytes), _ms(c.forward_s), _ms(c.backward_s), str(stage))
        for c, stage in zip(costs, owner, strict=True)
    ]
    stages = stage_costs(costs, counts, bandwidth_bytes_per_s=bandwidth_bytes_per_s)
    rows = [("stage", "blocks", "compute", "transfer", "total")] + [
        (f"{i}: {s.first} .. {s.last}", str(count), _ms(s.compute_s), _ms(s.transfer_s), _ms(s.total_s))
        for i, (s, count) in enumerate(zip(stages, counts, strict=True))
    ]
    return f"{_aligned(blocks)}\n\n{_aligned(rows)}\nimbalance (slowest stage / mean): {imbalance(stages):.2f}"


def imbalance(stages: Sequence[StageCost]) -> float:
    """Slowest stage over the mean: 1 is perfect, 2 means that the others idle half the time."""
    total = sum(stage.total_s for stage in stages)
    return max(stage.total_s for stage in stages) * len(stages) / total if total > 0 else 1.0


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
