"""Partial reduce: after every update average with those who are ready, and never wait for more.

Miao et al., "Heterogeneity-Aware Distributed Machine Learning Training via Partial Reduce", SIGMOD 2021;
with pipelines: "SDPipe", VLDB 2023.

    X <- (X - lr G) W_k      X: a column per replica; W_k averages within each group of round k. Its rows and columns
                             sum to 1, so the mean of the replicas is preserved
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.sync.averaging import group_mean
from pipeline.sync.dialogue import Dialogue, unless_broken
from pipeline.sync.protocol import Stateless


@dataclass(frozen=True, kw_only=True)
class PartialReduce(Stateless):
    """Averages after every update with a group of whoever is ready."""

    blocking: bool = True
    policy: str = "partial"
    even: bool = False
    every: int = 1

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Dialogue[Tensor]:
        return unless_broken(group_mean(x, step), x)
