"""What replicas mix, as one flat tensor: the weights of a stage, and if wanted optimiser state and running statistics.

| weights, as they lie in their flat buffer | momentum of each parameter | running means and variances |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.stage import Stage


class StageVector:
    """Reads and writes the newest weights of a stage and what goes with them, (n,) in the dtype of the weights.

    Args:
        state: also the floating optimiser state that is shaped like its parameter. buffers: also floating buffers.
    """

    def __init__(self, stage: Stage, *, state: bool = False, buffers: bool = False) -> None:
        self._stage = stage
        self._state: Callable[[], list[Tensor]] = stage.optimizer_tensors if state else list
        self._buffers = stage.floating_buffers() if buffers else []

    @property
    def size(self) -> int:
        """n, which grows when the optimiser's state comes into being."""
        return self._stage.weights.newest.flat.numel() + sum(extra.numel() for extra in self._extras())

    def read(self) -> Tensor:
        """A copy, (n,)."""
        x = self._stage.weights.newest.flat.new_empty(self.size)
        self.read_into(x)
        return x

    @torch.no_grad()
    def read_into(self, x: Tensor) -> None:
        """Copies into `x`, (n,)."""
        flat, extras = self._stage.weights.newest.flat, self._extras()
        x[: flat.numel()].copy_(flat)
        for extra, part in zip(extras, self._parts(x, flat, extras), strict=True):
            part.copy_(extra.flatten())

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Replaces everything; micro-batches in flight keep the weights they ran with."""
        self._stage.make_writable()
        flat = self._stage.weights.newest.flat
        flat.copy_(x[: flat.numel()])
        for extra, part in zip(extras := self._extras(), self._parts(x, flat, extras), strict=True):
            extra.copy_(part.view_as(extra))

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Adds a correction to everything."""
        self._stage.make_writable()
        flat = self._stage.weights.newest.flat
        flat.add_(delta[: flat.numel()])
        for extra, part in zip(extras := self._extras(), self._parts(delta, flat, extras), strict=True):
            extra.add_(part.view_as(extra).to(extra.dtype))

    @property
    def weights(self) -> int:
        """How many of the first entries are weights."""
        return self._stage.weights.newest.flat.numel()

    def empty(self) -> Tensor:
        """A vector of zeros for weights alone, (weights,)."""
        return torch.zeros_like(self._stage.weights.newest.flat)

    def parameters(self, x: Tensor) -> dict[str, Tensor]:
        """The weights in `x` by parameter; views, not copies."""
        return {slot.name: slot.view(x) for slot in self._stage.weights.slots}

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `parameters`, (weights,); what is absent is zero."""
        x = self.empty()
        for name, part in self.parameters(x).items():
            if name in parts:
                part.copy_(parts[name])
        return x

    def _extras(self) -> list[Tensor]:
        return [*self._state(), *self._buffers]

    def _parts(self, x: Tensor, flat: Tensor, extras: list[Tensor]) -> list[Tensor]:
        return list(torch.split(x[flat.numel() :], [extra.numel() for extra in extras])) if extras else []
