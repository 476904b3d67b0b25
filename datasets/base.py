"""A split of a data set in two halves: what the first stage reads and what the last stage compares with.

    inputs[epoch, index]  -> (image,)            or (input_ids, segment_ids, input_mask)
    targets[epoch, index] -> (label,)            or (labels, next_sentence_label); never decodes an input

A plain index means epoch 0. Augmentation depends on (seed, epoch, index) and on nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.draw import mix
from pipeline.data.loader import Key, Samples
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Split:
    """`size` samples; image sets know their `num_classes`, token sets their `sequence_length`."""

    inputs: Samples
    targets: Samples
    size: int
    num_classes: int | None = None
    vocab_size: int | None = None
    sequence_length: int | None = None


@dataclass(frozen=True)
class Splits:
    """What is trained on, and what is validated on where there is something."""

    train: Split
    val: Split | None


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of a data set; None is that data set's own default.

    `samples` and `num_classes` are for the synthetic ones; `vocab_size` and `sequence_length` are what the
    model was built for and are checked against what is read; `rotation_degrees` turns CIFAR images at random.
    """

    data_dir: Path | None = None
    image_size: int | None = None
    seed: int = 0
    samples: int | None = None
    num_classes: int | None = None
    vocab_size: int | None = None
    sequence_length: int | None = None
    rotation_degrees: float = 0.0
    validation: bool = True
    warn: Callable[[str], None] = to_stderr
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        for name in ("image_size", "samples", "num_classes", "vocab_size", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', ' ')} is {value}; give 1 or more")


def epoch_and_index(key: Key) -> tuple[int, int]:
    return (0, key) if isinstance(key, int) else key


def generator_for(*numbers: int) -> torch.Generator:
    """A generator of its own for these numbers; global random state is neither read nor written."""
    return torch.Generator().manual_seed(mix(*numbers))


@dataclass(frozen=True, eq=False)
class Labels:
    """Class numbers as targets; `labels` is (size,) int64."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        _, index = epoch_and_index(key)
        return (self.labels[index],)


def existing_folder(path: Path, *, what: str, remedy: str) -> Path:
    """`path` itself; a UserError that names it where it is no folder."""
    if not path.is_dir():
        raise UserError(f"{what}: no folder {path}; {remedy}")
    return path


def given_folder(data_dir: Path | None, *, what: str, remedy: str) -> Path:
    """The folder given by --data."""
    if data_dir is None:
        raise UserError(f"{what}: no folder given; {remedy}")
    return existing_folder(data_dir.expanduser(), what=what, remedy=remedy)
