"""What replicas mix, as one flat tensor: the weights of a stage, and if wanted optimiser state and running statistics.

| weights, as they lie in their flat buffer | momentum of each parameter | running means and variances |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from pipeline.stage.stage import Stage


class StageVector:
    """Reads and writes the newest weights of a stage and what goes with them, (n,) in the widest dtype of the weights.

    Frozen parameters are no part of it: they are equal everywhere, and stay so.

    Args:
        state: also the floating optimiser state that is shaped like its parameter. buffers: also floating buffers.
    """

    def __init__(self, stage: Stage, *, state: bool = False, buffers: bool = False) -> None:
        self._stage = stage
        self._state: Callable[[], list[Tensor]] = stage.optimizer_tensors if state else list
        self._buffers = stage.floating_buffers() if buffers else []
        flats = stage.weights.newest.flats
        self._sizes = {dtype: flat.numel() for dtype, flat in flats.items()}
        self._dtype = reduce(torch.promote_types, flats, torch.float32 if len(flats) != 1 else next(iter(flats)))

    @property
    def size(self) -> int:
        """n, which grows when the optimiser's state comes into being."""
        return self.weights + sum(extra.numel() for extra in self._extras())

    @property
    def weights(self) -> int:
        """How many of the first entries are weights."""
        return sum(self._sizes.values())

    def read(self) -> Tensor:
        """A copy, (n,)."""
        x = torch.empty(self.size, dtype=self._dtype, device=self._stage.weights.device)
        self.read_into(x)
        return x

    @torch.no_grad()
    def read_into(self, x: Tensor) -> None:
        """Copies into `x`, (n,)."""
        for live, part in self._pairs(x):
            part.copy_(live.flatten())

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Replaces everything; micro-batches in flight keep the weights they ran with."""
        self._stage.make_writable()
        for live, part in self._pairs(x):
            live.copy_(part.view_as(live))

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Adds a correction to everything."""
        self._stage.make_writable()
        for live, part in self._pairs(delta):
            live.add_(part.view_as(live).to(live.dtype))

    def look(self) -> Tensor:
        """The weights alone, (weights,), to be read at once: no copy where they are of one dtype."""
        flats = list(self._stage.weights.newest.flats.values())
        return flats[0] if len(flats) == 1 else torch.cat([flat.to(self._dtype) for flat in flats] or [self.empty()])

    def empty(self) -> Tensor:
        """A vector of zeros for weights alone, (weights,)."""
        return torch.zeros(self.weights, dtype=self._dtype, device=self._stage.weights.device)

    def parameters(self, x: Tensor) -> dict[str, Tensor]:
        """The weights in `x` by parameter; views, not copies."""
        parts = torch.split(x[: self.weights], list(self._sizes.values())) if self._sizes else ()
        by_dtype = dict(zip(self._sizes, parts, strict=True))
        return {slot.name: slot.view(by_dtype) for slot in self._stage.weights.slots}

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `parameters`, (weights,); what is absent is zero."""
        x = self.empty()
        for name, part in self.parameters(x).items():
            if name in parts:
                part.copy_(parts[name])
        return x

    def _extras(self) -> list[Tensor]:
        return [*self._state(), *self._buffers]

    def _pairs(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Live tensors, and their parts of `x`."""
        live = [*self._stage.weights.newest.flats.values(), *self._extras()]
        return list(zip(live, torch.split(x, [each.numel() for each in live]), strict=True)) if live else []
