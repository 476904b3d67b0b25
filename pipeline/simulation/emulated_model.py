"""A model that waits instead of computing, for comparing schedules and synchronisers on a small machine.

    (number, loss so far)  ->  block 0  ->  (number, + share of block 0)  ->  block 1  ->  ...      (batch, 2)

One block per stage. A sample is one number x, and what a block with weights w adds to the loss is half the mean over
its first 4,096 weights of (w - x)^2, so the loss falls as the weights approach the mean of the samples. The gradient is
that of the sum over all weights, w - x, which moves them at the same pace however many there are. Replicas see other
samples: they drift apart, and averaging brings them together. This arithmetic takes a fraction of a millisecond, within
the time that an op lasts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.criterion import Sums, Wording, per
from pipeline.models.layered import Block, LayeredModel, Tensors
from pipeline.simulation.emulation import Emulation
from pipeline.transport.pool import Memory

SPREAD = 0.5  # standard deviation of the samples
MEASURED = 4096  # weights whose loss is shown


class _Share(torch.autograd.Function):
    """What a block does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, memory: Memory) -> Tensor:
        number, so_far = x.unbind(1)  # (batch,) each
        measured = weight[:MEASURED]
        square = torch.dot(measured, measured) / len(measured)
        share = number * (number / 2 - measured.mean()) + square / 2
        y = torch.stack((number, so_far + share), 1)
        ctx.save_for_backward(number, weight)
        ctx.memory = memory
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        number, weight = ctx.saved_tensors
        pull = gradient[:, 1]  # how much each sample's share counts in the loss
        of_weight = ctx.memory.like(weight) if weight.device.type == "cpu" else torch.empty_like(weight)
        torch.add(-torch.dot(pull, number), weight, alpha=float(pull.sum()), out=of_weight)
        return gradient if ctx.needs_input_grad[0] else None, of_weight, None


class EmulatedBlock(nn.Module):
    """(batch, 2) -> (batch, 2)."""

    def __init__(self, emulation: Emulation) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(max(1, round(emulation.param_mb * 1e6 / 4))))
        self._memory = Memory()  # of gradients

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Share.apply(x, self.weight, self._memory)
        return y


class SumOfShares:
    """The mean over the samples of what all blocks together have added.

    outputs: ((batch, 2),) of the last block; targets: (anything (batch, ...),). There is nothing to be right about, so
    no accuracy is said.
    """

    names = ("loss", "samples")
    uneven = False
    wording = Wording(
        "{epoch} TRAIN loss {loss:.4f} lr {lr:.2e}, time {seconds:.4f}",
        "{epoch} EVAL  loss {loss:.4f}",
        "loss={loss:f}",
    )

    def count(self, targets: Tensors) -> Tensors:
        return (torch.full((), float(len(targets[0])), device=targets[0].device),)

    def __call__(self, outputs: Tensors, targets: Tensors, counts: Tensors) -> tuple[Tensor, Sums]:
        total, samples = outputs[0][:, 1].sum(), self.count(targets)[0]
        return total / counts[0], {"loss": total.detach(), "samples": samples}

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": per(sums, "loss", sums.get("samples", 0.0))}


def emulated_model(stages: int, emulation: Emulation) -> LayeredModel:
    """One block per stage, each of `emulation`'s size; `straggler.EmulatedDevice` makes their ops last long enough."""
    build = partial(EmulatedBlock, emulation)
    blocks = tuple(Block(f"stage{stage}", f"stage{stage}.", build) for stage in range(stages))
    return LayeredModel("emulated", blocks, 0, 0, _sample, reference_cut=(1,) * stages)


def samples(size: int, seed: int) -> Tensor:
    """Inputs of the first block: (size, 2), numbers beside zeros."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul_(SPREAD)
    return torch.stack((numbers, torch.zeros(size)), 1)


def _sample(batch: int) -> Tensors:
    return (samples(batch, 0),)
