"""Batch normalisation whose running statistics are those of the whole batch, however many micro-batches it is cut into.

Each micro-batch is normalised by its own mean and variance, as ever; what was seen is kept, and the running
statistics are updated once per batch (torchgpipe's DeferredBatchNorm, Kim et al., 2020, section 3.2).

Kept are count, mean and sum of squared deviations, joined as Chan, Golub and LeVeque (1979) join two samples: the
difference of large sums of squares, which would tell the variance as well, has no digits left where the mean is large.

    n = n1 + n2;  d = mean2 - mean1;  mean = mean1 + d n2 / n;  M = M1 + M2 + d^2 n1 n2 / n
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

from pipeline.errors import UserError


class DeferredBatchNorm(_BatchNorm):
    """A BatchNorm of 1, 2 or 3 dimensions that updates its statistics at `commit()`; state dict as the original's."""

    def __init__(self, original: _BatchNorm) -> None:
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        self._parameters, self._buffers = original._parameters, original._buffers
        self._check: Callable[[Any, Tensor], Any] = type(original)._check_input_dim
        self.train(original.training)
        if self.running_mean is not None:  # since the last commit: of every channel, and how many values in each
            wide = _wide(self.running_mean)
            for name, shape in (("_mean", self.num_features), ("_deviations", self.num_features), ("_count", 1)):
                self.register_buffer(name, torch.zeros(shape, dtype=wide.dtype, device=wide.device), persistent=False)

    _mean: Tensor
    _deviations: Tensor
    _count: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        self._check(self, input)

    def forward(self, input: Tensor) -> Tensor:  # (batch, channels, ...)
        if not self.training or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            self._keep(input.to(self._mean.dtype))
        return functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def _keep(self, values: Tensor) -> None:
        """Joins these values to those that were seen since the last commit."""
        count = values.numel() // values.shape[1]
        dimensions = [n for n in range(values.dim()) if n != 1]
        variance, mean = torch.var_mean(values, dimensions, correction=0)
        difference, total = mean - self._mean, self._count + count
        self._deviations.add_(variance * count + difference.square() * self._count * (count / total))
        self._mean.add_(difference * (count / total))
        self._count.copy_(total)

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running statistics by what was seen since the last call, without asking the device for numbers."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        seen = (self._count > 0).to(self._count.dtype)  # (1,); without a forward nothing moves
        variance = self._deviations / (self._count - 1).clamp(min=1)
        self.num_batches_tracked.add_(seen[0].long())
        weight = seen / self.num_batches_tracked.clamp(min=1) if self.momentum is None else seen * self.momentum
        for running, value in ((self.running_mean, self._mean), (self.running_var, variance)):
            running.copy_(torch.lerp(running.to(value.dtype), value, weight))
        for kept in (self._mean, self._deviations, self._count):
            kept.zero_()


def defer_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm replaced by a deferred one that shares its parameters and buffers.

    Raises:
        UserError: a norm whose running statistics are not those of a BatchNorm.
    """
    return _deferred(module, {})


def _deferred(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """The same, where modules that are met again (`known`, by identity) stay one."""
    if id(module) not in known:
        known[id(module)] = _replacement(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _deferred(child, known)
    return known[id(module)]


def _replacement(module: nn.Module) -> nn.Module:
    if not isinstance(module, _NormBase) or not module.track_running_stats:
        return module
    usual = isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward
    if usual and not isinstance(module, _LazyNormBase):
        return DeferredBatchNorm(cast(_BatchNorm, module))
    raise UserError(
        f"--batchnorm deferred cannot keep the running statistics of a {type(module).__name__}; give the model "
        "BatchNorm1d, BatchNorm2d or BatchNorm3d, or choose --batchnorm microbatch"
    )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
