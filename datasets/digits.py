"""scikit-learn's bundled handwritten digits: 1797 images of 8x8, enlarged; needs no download.

One fifth of each class is held out for validation, always the same one. Training images are moved by up to two
of 32 pixels, half an original pixel.
(E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.)
"""

from __future__ import annotations

import torch
import torch.nn.functional
from torch import Tensor

from datasets.augment import Chain, Normalise, PadAndCrop
from datasets.base import Labels, Options, Split, Splits, generator_for
from datasets.images import Images, Stored

MEAN, STD = 0.3057, 0.3236  # of the enlarged training images, from 0 to 1
_SPLIT_SEED = 1797


def load(options: Options) -> Splits:
    """The digits as (3, image_size, image_size), 32 unless asked otherwise; 10 classes."""
    pixels, labels = _read(options.image_size or 32)
    train, val = _held_out(labels)
    normalise = Normalise((MEAN,) * 3, (STD,) * 3)
    shift = Chain((PadAndCrop(max(1, pixels.shape[-1] // 16)), normalise))
    return Splits(
        _split(pixels[train], labels[train], shift, options.seed),
        _split(pixels[val], labels[val], normalise, options.seed) if options.validation else None,
    )


def _split(pixels: Tensor, labels: Tensor, transform: Chain | Normalise, seed: int) -> Split:
    images = Images(Stored(pixels), len(labels), transform, seed)
    return Split(inputs=images, targets=Labels(labels), size=len(labels), num_classes=10)


def _read(image_size: int) -> tuple[Tensor, Tensor]:
    """(1797, 1, image_size, image_size) from 0 to 1, and (1797,) int64."""
    from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    pixels = torch.nn.functional.interpolate(small, size=image_size, mode="bilinear", align_corners=False)
    return pixels, torch.from_numpy(digits.target).long()


def _held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on and to validate on: one fifth of each class."""
    train, val = [], []
    for label in range(10):
        of_class = torch.nonzero(labels == label)[:, 0]
        shuffled = of_class[torch.randperm(len(of_class), generator=generator_for(_SPLIT_SEED, label))]
        fifth = len(of_class) // 5
        val.append(shuffled[:fifth])
        train.append(shuffled[fifth:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values
