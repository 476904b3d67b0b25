"""Batch normalisation whose running statistics are those of the whole batch, however many micro-batches it is cut into.

Each micro-batch is normalised by its own mean and variance, as ever; their sums are kept, and the running
statistics are updated once per batch (torchgpipe's DeferredBatchNorm, Kim et al., 2020, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DeferredBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that updates its running statistics at `commit()`; state dict as BatchNorm2d's."""

    def __init__(self, original: nn.BatchNorm2d) -> None:
        super().__init__(original.num_features, original.eps, original.momentum, original.affine)
        self._parameters, self._buffers = original._parameters, original._buffers
        # since the last commit: sum and sum of squares per channel, and how many values per channel
        example = original.weight if original.running_mean is None else original.running_mean
        for name, shape in (("_sum", self.num_features), ("_squares", self.num_features), ("_count", 1)):
            self.register_buffer(name, torch.zeros(shape, device=example.device), persistent=False)

    _sum: Tensor
    _squares: Tensor
    _count: Tensor

    def forward(self, input: Tensor) -> Tensor:  # (batch, channels, height, width)
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            wide = input.float()
            self._sum.add_(wide.sum((0, 2, 3)))
            self._squares.add_((wide * wide).sum((0, 2, 3)))
            self._count.add_(input.numel() // input.shape[1])
        return functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running statistics by what was seen since the last call, without asking the device for numbers."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        seen = (self._count > 0).float()  # (1,); without a forward nothing moves
        count = self._count.clamp(min=1)
        mean = self._sum / count
        variance = (self._squares / count - mean * mean) * (count / (count - 1).clamp(min=1))
        self.num_batches_tracked.add_(seen[0].long())
        weight = seen / self.num_batches_tracked.clamp(min=1) if self.momentum is None else seen * self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)
        for total in (self._sum, self._squares, self._count):
            total.zero_()


def defer_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm2d replaced by a deferred one that shares its parameters and buffers."""
    if isinstance(module, nn.BatchNorm2d):
        return DeferredBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, defer_batch_norm(child))
    return module
