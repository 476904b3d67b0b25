"""What a validation needs: supplies of its samples, and a run of forwards alone in the midst of a training."""

from __future__ import annotations

import torch

from pipeline.data.loader import MicrobatchFeed
from pipeline.data.supply import InputSupply
from pipeline.schedules.orders import Program
from pipeline.stage.executor import Executor, Hooks
from pipeline.transport.protocol import Transport


def validation_hooks(inputs: MicrobatchFeed | None, targets: MicrobatchFeed | None, *, device: torch.device) -> Hooks:
    """Those of a stage that reads these; None for what it does not read. Targets are taken to `device`."""
    hooks = Hooks()
    if inputs is not None:
        hooks.inputs = InputSupply(iter(inputs))
    if targets is not None:
        supply = InputSupply(iter(targets))
        hooks.targets = lambda number: (tuple(t.to(device, non_blocking=True) for t in supply(number)), None)
    return hooks


def run_validation(executor: Executor, transport: Transport, program: Program, hooks: Hooks) -> dict[str, float]:
    """Forwards with `hooks` in place of those of training; the criterion's sums on the last stage, {} elsewhere."""
    training, executor.hooks = executor.hooks, hooks
    with transport.unlimited():
        sums = executor.evaluate(program)
        transport.flush()
    executor.hooks = training
    return sums
