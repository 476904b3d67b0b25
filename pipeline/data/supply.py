"""What the executor's LOAD actions take: inputs on the first stage, targets with their normalisers on the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.models.criterion import Criterion

Tensors = tuple[Tensor, ...]
Feed = Iterator[tuple[int, Tensors]]


class InputSupply:
    """Hands out the feed's micro-batches in order."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __call__(self, microbatch: int) -> Tensors:
        number, tensors = next(self._feed)
        assert number == microbatch, f"the feed is at micro-batch {number}, the program at {microbatch}"
        return tensors


class TargetSupply:
    """Hands out targets, with the normalisers of everything that goes into the same update.

    A loss is a sum over micro-batches divided by what the whole update holds (samples, masked tokens), so the targets
    of all its micro-batches are fetched when the first one is asked for. `shared` makes the normalisers of this
    pipeline those of all pipelines (their mean), where batches of equal size may hold different amounts.
    """

    def __init__(
        self,
        feed: Feed,
        criterion: Criterion,
        *,
        ends_update: Callable[[int], bool],
        device: torch.device,
        shared: Callable[[Tensors], Tensors] | None = None,
    ) -> None:
        self._feed, self._criterion = feed, criterion
        self._ends_update, self._device = ends_update, device
        self._shared = shared
        self._ready: dict[int, Tensors] = {}
        self._counts: Tensors = ()

    def __call__(self, microbatch: int) -> tuple[Tensors, Tensors]:
        if microbatch not in self._ready:
            self._fetch_update()
        return self._ready.pop(microbatch), self._counts

    def _fetch_update(self) -> None:
        for number, tensors in self._feed:
            self._ready[number] = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            if self._ends_update(number):
                break
        columns = zip(*self._ready.values(), strict=True)
        counts = self._criterion.count(tuple(torch.cat(column) for column in columns))
        self._counts = self._shared(counts) if self._shared is not None else counts
