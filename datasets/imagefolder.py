"""Any folder of images: DIR/train/<class>/*.jpg, and the same classes in DIR/val or DIR/test.

Images up to 64 pixels are treated as CIFAR's are (padded crop, flip), larger ones as ImageNet's (random resized crop,
flip). The classes of train, sorted, are the classes; names that begin with a dot are passed over.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from datasets.augment import (
    Chain,
    Normalise,
    Step,
    photo_training,
    photo_validation,
    thumbnail_training,
    thumbnail_validation,
)
from datasets.base import Labels, Options, Split, Splits, existing_folder, given_folder
from datasets.images import Images
from datasets.pictures import read_rgb, size_of
from pipeline.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet
SIZES_LOOKED_AT = 200  # images whose headers are read, to tell thumbnails from photographs
THUMBNAIL = 64  # the largest side, in pixels, of what is treated as CIFAR's images are


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The files under a root, in the order of their classes; called with an index it decodes one.

    Paths are held as one array of bytes: a million Python strings would be copied into every loader worker.
    """

    root: Path
    paths: NDArray[np.bytes_]  # (size,), relative to root
    labels: torch.Tensor  # (size,) int64

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def __call__(self, index: int) -> Pillow.Image:
        return read_rgb(self.path(index))


def load(options: Options) -> Splits:
    """DIR/train, and DIR/val or DIR/test where there is one."""
    remedy = "give --data DIR with train/<class>/*.jpg and val/<class>/*.jpg in it"
    folder = given_folder(options.data_dir, what="imagefolder", remedy=remedy)
    train = existing_folder(folder / "train", what="imagefolder", remedy=remedy)
    held_out = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if not held_out and options.validation:
        options.warn(f"imagefolder: neither val/ nor test/ in {folder}; training goes on without validation")
    return from_folders(train, held_out[0] if held_out else None, options)


def from_folders(train: Path, val: Path | None, options: Options) -> Splits:
    """Both splits; `val` None goes without. The classes of `train` count for both."""
    classes = class_names(train)
    train_files = scan(train, classes)
    size = options.image_size or default_size(train_files, options.warn)
    training, validation = photo_training(size), photo_validation(size)
    if size <= THUMBNAIL:
        training, validation = thumbnail_training(size), thumbnail_validation(size)
    splits = Splits(_split(train_files, training, len(classes), options.seed), None)
    if val is None or not options.validation:
        return splits
    val_files = scan(val, _known(class_names(val), classes, val, train), classes)
    return Splits(splits.train, _split(val_files, validation, len(classes), options.seed))


def _split(files: ImageFiles, steps: tuple[Step, ...], num_classes: int, seed: int) -> Split:
    size = len(files.labels)
    images = Images(files, size, Chain((*steps, NORMALISE)), seed)
    return Split(inputs=images, targets=Labels(files.labels), size=size, num_classes=num_classes)


def default_size(files: ImageFiles, warn: Callable[[str], None]) -> int:
    """224, or the size that most images have where most are thumbnails; a sample over all classes decides."""
    step = max(1, len(files.labels) // SIZES_LOOKED_AT)
    sizes = [size_of(files.path(index)) for index in range(0, len(files.labels), step)]
    sides = Counter(min(size) for size in sizes if size is not None)
    thumbnails = Counter({side: count for side, count in sides.items() if side <= THUMBNAIL})
    if 2 * thumbnails.total() <= sides.total():
        return 224
    side = max(thumbnails, key=lambda side: (thumbnails[side], side))
    if len(sides) > 1:
        warn(
            f"{files.root}: images of {min(sides)} to {max(sides)} pixels, most of {side}; "
            f"all are resized to {side}, or give --image-size"
        )
    return side


def class_names(root: Path) -> list[str]:
    """The folders in `root`, sorted."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root}: no class folders in it; expected {root}/<class>/*.jpg")
    return names


def scan(root: Path, present: list[str], classes: list[str] | None = None) -> ImageFiles:
    """The images of the classes `present`, numbered by their place in `classes` (None: in `present`)."""
    numbers = {name: number for number, name in enumerate(classes or present)}
    paths: list[bytes] = []
    labels: list[int] = []
    for name in present:
        found = sorted(_images_below(root, name))
        if not found:
            raise UserError(f"{root / name}: no images in this class folder; add some or remove the folder")
        paths += found
        labels += [numbers[name]] * len(found)
    return ImageFiles(root, np.array(paths), torch.tensor(labels))


def _images_below(root: Path, name: str) -> Iterator[bytes]:
    for folder, _, files in os.walk(root / name, followlinks=True):
        inside = os.path.relpath(folder, root)
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.fsencode(os.path.join(inside, file))


def _known(present: list[str], classes: list[str], val: Path, train: Path) -> list[str]:
    strange = sorted(set(present) - set(classes))
    if strange:
        raise UserError(f"{val / strange[0]}: no class {strange[0]!r} in {train}; remove it, or add it there")
    return present
