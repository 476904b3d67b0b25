"""Transformations of an image, with an explicit generator for what is random.

torchvision's functions do the work; its random classes draw from the global generator, so that an image would
depend on which worker read what before. Here a step is called as `step(image, generator)`; images are PIL images
or tensors (channels, height, width) until `Normalise` makes them float32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Image = Any  # a PIL image or a tensor
Step = Callable[[Image, torch.Generator], Image]


@dataclass(frozen=True)
class Chain:
    """One step after the other."""

    steps: tuple[Step, ...]

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        for step in self.steps:
            image = step(image, generator)
        return image


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, of 8 to 100 % of its area and 3:4 to 4:3 in shape, resized to a square.

    (Szegedy et al., Going Deeper with Convolutions, 2014.) Draws in the order of torchvision's class.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        height, width = F.get_size(image)
        box = self.box(height, width, generator)
        return F.resized_crop(image, *box, [self.size, self.size], antialias=True)

    def box(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width); the largest allowed one in the middle where ten tries do not fit."""
        low, high = (math.log(bound) for bound in self.ratio)
        for _ in range(10):
            area = height * width * _uniform(*self.scale, generator)
            shape = math.exp(_uniform(low, high, generator))
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                top = _integer(height - h + 1, generator)
                return top, _integer(width - w + 1, generator), h, w
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * shape)), min(height, round(width / shape))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class PadAndCrop:
    """The image moved by up to `padding` pixels each way, zeros coming in at the border."""

    padding: int

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        height, width = F.get_size(image)
        padded = F.pad(image, [self.padding] * 4)
        top, left = (_integer(2 * self.padding + 1, generator) for _ in range(2))
        return F.crop(padded, top, left, height, width)


@dataclass(frozen=True)
class RandomFlip:
    """Left and right exchanged, half of the time."""

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        return F.horizontal_flip(image) if _uniform(0.0, 1.0, generator) < 0.5 else image


@dataclass(frozen=True)
class RandomRotation:
    """Turned by up to `degrees` either way."""

    degrees: float

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        angle = _uniform(-self.degrees, self.degrees, generator)
        return F.rotate(image, angle, interpolation=F.InterpolationMode.BILINEAR)


@dataclass(frozen=True)
class ResizeAndCrop:
    """The shorter side resized to `resize`, then the middle square of `size`."""

    resize: int
    size: int

    def __call__(self, image: Image, generator: torch.Generator) -> Image:
        if F.get_size(image) != [self.resize, self.resize]:
            image = F.resize(image, [self.resize], antialias=True)
        return F.center_crop(image, [self.size, self.size])


@dataclass(frozen=True)
class Normalise:
    """(x - mean) / std per channel, x from 0 to 1; (3, height, width) float32, one channel becoming three."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image, generator: torch.Generator) -> Tensor:
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        scaled = F.to_dtype(pixels, torch.float32, scale=True).expand(3, -1, -1)
        normal: Tensor = F.normalize(scaled, list(self.mean), list(self.std))
        return normal


def photo_training(size: int) -> tuple[Step, ...]:
    return RandomResizedCrop(size), RandomFlip()


def photo_validation(size: int) -> tuple[Step, ...]:
    """The middle of an image enlarged by 256/224, as ImageNet's 224 out of 256."""
    return (ResizeAndCrop(round(size * 256 / 224), size),)


def thumbnail_training(size: int, rotation_degrees: float = 0.0) -> tuple[Step, ...]:
    """CIFAR's: 4 pixels of padding where the image has 32, then a flip."""
    turn: tuple[Step, ...] = (RandomRotation(rotation_degrees),) if rotation_degrees else ()
    return ResizeAndCrop(size, size), PadAndCrop(max(1, size // 8)), RandomFlip(), *turn


def thumbnail_validation(size: int) -> tuple[Step, ...]:
    return (ResizeAndCrop(size, size),)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def _integer(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, stop, (1,), generator=generator).item())
