"""The reference's log lines, to the letter, and the sums that they are made of."""

from __future__ import annotations

from collections.abc import Mapping

Sums = Mapping[str, float]


def training_line(epochs: int, iterations: int) -> str:
    """The reference's first line, printed by rank 0."""
    return f"Training {epochs} epoch, each epoch runs {iterations} iteration"


def speed_line(epoch: int, batch: int, *, samples_per_s: float, shown: str) -> str:
    """MXNet's Speedometer line: the speed of the last window, and what its means are."""
    return f"Epoch[{epoch}] Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec\t{shown}"


def io_line(batch: int, *, samples_per_s: float) -> str:
    """The line of --test-io 1."""
    return f"Batch [{batch}]\tSpeed: {samples_per_s:.2f} samples/sec"


def add_sums(first: Sums, second: Sums) -> dict[str, float]:
    """The sums of two windows, or of two replicas, as one."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
