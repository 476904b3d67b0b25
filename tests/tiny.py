"""A task small enough to train in a moment: a perceptron on random points, for tests of the training loop.

As a program it is one rank of a job: `python tests/tiny.py SETTINGS_JSON OPTIONS_JSON`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cluster.world import join_world, report_failures
from pipeline.models.criterion import Classification
from pipeline.models.mlp import mlp
from pipeline.settings import Settings
from pipeline.train.plan import Task
from pipeline.train.run import deadline, train

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Column:
    """One half of a data set: a key (epoch, index) or an index gives one sample."""

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> tuple[Tensor, ...]:
        return (self.rows[key[1] if isinstance(key, tuple) else key],)


@dataclass(frozen=True)
class Points:
    """`size` points in 12 dimensions, with one of 5 labels that a linear map decides."""

    inputs: Column
    targets: Column
    size: int

    @staticmethod
    def make(size: int, seed: int) -> Points:
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(size, 12, generator=generator)
        truth = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        return Points(Column(points), Column((points @ truth).argmax(1)), size)


class Masked(Classification):
    """Like BERT's: the mean over those samples whose label is not masked, of which batches have more or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven = True

    def count(self, targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_unmasked(targets[0]).sum().float(),)

    def __call__(
        self, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], counts: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kept = _unmasked(targets[0])
        return super().__call__((outputs[0][kept],), (targets[0][kept],), counts)


def _unmasked(labels: Tensor) -> Tensor:
    return labels % 5 > 1


def tiny_task(
    *,
    batchnorm: bool = False,
    dropout: float = 0.0,
    train_size: int = 44,
    val_size: int = 21,
    masked: bool = False,
) -> Task:
    model = mlp(inputs=12, width=16, depth=8, num_classes=5, activation="tanh", batchnorm=batchnorm, dropout=dropout)
    train_points, val_points = Points.make(train_size, 1), Points.make(val_size, 2)
    return Task(model=model, criterion=Masked() if masked else Classification(), train=train_points, val=val_points)


def tiny_settings(folder: Path, **values: Any) -> Settings:
    """Settings of a short run whose files lie in `folder`."""
    defaults: dict[str, Any] = {
        "batch_size": 8, "epochs": 2, "learning_rate": 0.05, "disp_batches": 2, "pipeline": "1f1b", "microbatches": 2,
        "runs": str(folder / "runs"), "out": str(folder / "out"), "metrics": str(folder / "metrics.jsonl"),
        "lr_schedule": "cosine", "warmup_epochs": 0.5, "timeout": 60.0,
    }  # fmt: skip
    return Settings(**{**defaults, **values})


def run_here(folder: Path, *, task: dict[str, Any] | None = None, **values: Any) -> Settings:
    """Trains in this process alone."""
    settings = tiny_settings(folder, **values)
    train(settings, tiny_task(**(task or {})), join_world(None, timeout_s=60, directory=ROOT))
    return settings


def losses(folder: Path) -> list[float]:
    """The loss after every batch, as the loss curve of the summary has it."""
    curve = json.loads((folder / "out" / "summary.json").read_text())["curve"]
    return [loss for _, loss in curve]


def main() -> None:
    folder, values, task = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    with report_failures():
        settings = tiny_settings(folder, **values)
        world = join_world(settings.placement, timeout_s=deadline(settings), directory=ROOT)
        train(settings, tiny_task(**task), world)


if __name__ == "__main__":
    main()
