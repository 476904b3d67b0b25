"""What --emulate trains: the model that waits, on numbers made up here, so that no data set has to be there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.actions import Op
from pipeline.core.draw import mix
from pipeline.data.loader import Batch, Key
from pipeline.settings import Settings
from pipeline.simulation.clocks import SharpClock, Waiting
from pipeline.simulation.emulated_model import EmulatedBlock, SumOfShares, emulated_model, samples
from pipeline.simulation.emulation import Emulation, parse_emulate
from pipeline.train.plan import Pace, Task

STEPS = 100  # updates of an epoch unless --max-steps says


@dataclass(frozen=True, eq=False)
class Rows:
    """Sample i is row i; (size, ...)."""

    rows: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Batch:
        return (torch.from_numpy(self.rows[[key if isinstance(key, int) else key[1]]])[0],)

    def together(self, keys: list[tuple[int, int]]) -> Batch:
        """Samples of a micro-batch, stacked; NumPy is five times as fast as torch at picking so few."""
        return (torch.from_numpy(self.rows[[index for _, index in keys]]),)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Samples whose targets are their numbers; there is nothing to compare with but the weights."""

    inputs: Rows
    targets: Rows
    size: int


def make_emulated(settings: Settings, *, stages: int, pipelines: int, clock: Waiting | None = None) -> Task:
    """The task of a run with --emulate: an epoch is as many updates as --max-steps says, or 100.

    Raises:
        UserError: an --emulate that makes no sense.
    """
    emulation = parse_emulate(settings.emulate or "")
    _warm_up(emulation)
    size = settings.batch_size * pipelines * settings.accumulate * (settings.max_steps or STEPS)
    rows = samples(size, mix(settings.seed)).numpy()
    pace = {Op.FORWARD: emulation.forward_ms / 1e3, Op.BACKWARD: emulation.backward_ms / 1e3}
    return Task(
        model=emulated_model(stages, emulation),
        criterion=SumOfShares(),
        train=Numbers(inputs=Rows(rows), targets=Rows(rows[:, 0]), size=size),
        val=None,
        pace=Pace(pace, clock or SharpClock()),
    )


def _warm_up(emulation: Emulation) -> None:
    """Torch's first steps take longer than an emulated one lasts."""
    block, inputs = EmulatedBlock(emulation), torch.zeros(1, 2)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        block(inputs)[:, 1].mean().backward()
        optimizer.step()
