"""Outer optimisers of local SGD: what is done with the mean of the replicas instead of just adopting it.

    anchor a ---- H local steps of each replica ----> mean m          a - m is the step that the replicas took together
       |                                                |
       '--- outer step with the momentum of such steps -'--> x, the next anchor

Anchor and momentum are equal on all replicas, since they only ever see means. With no momentum and rate 1, x = m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

ANCHOR = "anchor"


class OuterRule(Protocol):
    """(anchor, mean, momentum, learning rate of the local steps) -> (x, momentum), all (n,) and new memory.

    `momentum_name` is the momentum's in a checkpoint: that of one rule means nothing to another.
    """

    @property
    def momentum_name(self) -> str: ...

    def __call__(
        self, anchor: Tensor, mean: Tensor, momentum: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class SlowMo:
    """Slow momentum (Wang et al., "SlowMo", ICLR 2020, algorithm 1).

    u <- beta u + (a - m) / lr ;  x <- a - alpha lr u       lr: the learning rate of the local steps
    """

    beta: float = 0.5
    alpha: float = 1.0
    momentum_name: ClassVar[str] = "slowmo_momentum"

    def __call__(self, anchor: Tensor, mean: Tensor, momentum: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        if learning_rate == 0:  # nobody moved, and 0 / 0 is no direction
            return mean.clone(), momentum * self.beta
        u = momentum * self.beta + (anchor - mean) / learning_rate
        return anchor - self.alpha * learning_rate * u, u


@dataclass(frozen=True, kw_only=True)
class DiLoCo:
    """Nesterov momentum on the averaged step (Douillard et al., "DiLoCo", 2023, algorithm 1; Sutskever et al., 2013).

    b <- mu b + (a - m) ;  x <- a - lr (a - m + mu b)       lr: of the outer steps, as torch.optim.SGD(nesterov=True)
    """

    momentum: float = 0.9
    outer_learning_rate: float = 0.7
    momentum_name: ClassVar[str] = "diloco_momentum"

    def __call__(self, anchor: Tensor, mean: Tensor, momentum: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        delta = anchor - mean
        b = momentum * self.momentum + delta
        return anchor - self.outer_learning_rate * (delta + self.momentum * b), b


class Outer:
    """Anchor and momentum of one stage, moved by `rule` at every mean; the first mean without an anchor becomes it."""

    def __init__(self, rule: OuterRule) -> None:
        self._rule = rule
        self._anchor: Tensor | None = None  # (weights,)
        self._momentum: Tensor | None = None
        self._weights: int | None = None

    def begin(self, x: Tensor, weights: int | None = None) -> None:
        """All replicas have this x; the entries after the first `weights` are statistics and are left alone."""
        self._weights = x.numel() if weights is None else weights
        self._anchor = x[: self._weights].clone()
        self._momentum = torch.zeros_like(self._anchor)

    def restart(self, x: Tensor) -> None:
        """All replicas have this x after a mean or a copy that was no outer step."""
        self.begin(x, self._weights)

    def step(self, mean: Tensor, learning_rate: float) -> Tensor:
        """The x to go on with, in new memory."""
        if self._anchor is None or self._momentum is None:
            self.restart(mean)
            return mean.clone()
        count = self._anchor.numel()
        moved, self._momentum = self._rule(self._anchor, mean[:count], self._momentum, learning_rate)
        self._anchor = moved
        return torch.cat([moved, mean[count:]])

    @property
    def remembers(self) -> frozenset[str]:
        return frozenset({ANCHOR, self._rule.momentum_name})

    def state(self) -> dict[str, Tensor]:
        if self._anchor is None or self._momentum is None:
            return {}
        return {ANCHOR: self._anchor, self._rule.momentum_name: self._momentum}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over another replica's; without an anchor it has not begun, without a momentum it has none yet."""
        if ANCHOR not in tensors:
            self._anchor = self._momentum = None
            return
        self._anchor = tensors[ANCHOR].clone()
        momentum = tensors.get(self._rule.momentum_name)
        self._momentum = torch.zeros_like(self._anchor) if momentum is None else momentum.clone()
        self._weights = self._anchor.numel()
