"""Images as inputs: read one, change it at random, normalise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from datasets.augment import Image, Step
from datasets.base import epoch_and_index, generator_for
from pipeline.data.loader import Key


@dataclass(frozen=True, eq=False)
class Images:
    """`size` images; `read(index)` gives a PIL image or a tensor, `transform` (3, height, width) float32."""

    read: Callable[[int], Image]
    size: int
    transform: Step
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        epoch, index = epoch_and_index(key)
        return (self.transform(self.read(index), generator_for(self.seed, epoch, index)),)

    def place(self, index: int) -> str:
        """Where image `index` lies."""
        return str(self.read.path(index)) if isinstance(self.read, InFiles) else f"image {index}"


@runtime_checkable
class InFiles(Protocol):
    """Images that lie in a file each."""

    def path(self, index: int, /) -> Path: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """Images that lie in one tensor, (size, channels, height, width)."""

    pixels: Tensor

    def __call__(self, index: int) -> Tensor:
        return self.pixels[index]
