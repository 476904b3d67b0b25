"""CIFAR-10 and CIFAR-100 as their authors and torchvision store them: pickles of (images, 3072) bytes.

(A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.)
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.augment import Chain, Normalise, Step, thumbnail_training, thumbnail_validation
from datasets.base import Labels, Options, Split, Splits, existing_folder, given_folder
from datasets.images import Images, Stored
from pipeline.errors import UserError


@dataclass(frozen=True)
class Variant:
    """Where the two sets differ."""

    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    label_key: str
    num_classes: int
    normalise: Normalise


CIFAR10 = Variant(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    val=("test_batch",),
    label_key="labels",
    num_classes=10,
    normalise=Normalise((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)
CIFAR100 = Variant(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    val=("test",),
    label_key="fine_labels",
    num_classes=100,
    normalise=Normalise((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)


def load_cifar10(options: Options) -> Splits:
    return _load(CIFAR10, options)


def load_cifar100(options: Options) -> Splits:
    return _load(CIFAR100, options)


def _load(variant: Variant, options: Options) -> Splits:
    folder = _find_folder(variant, options.data_dir)
    size = options.image_size or 32
    training = thumbnail_training(size, options.rotation_degrees)
    return Splits(
        _split(variant, folder, variant.train, training, options.seed),
        _split(variant, folder, variant.val, thumbnail_validation(size), options.seed) if options.validation else None,
    )


def _find_folder(variant: Variant, data_dir: Path | None) -> Path:
    remedy = (
        f"give --data DIR with {variant.folder}/ in it, "
        f"unpacked from https://www.cs.toronto.edu/~kriz/{variant.archive}"
    )
    given = given_folder(data_dir, what=variant.name, remedy=remedy)
    if given.name == variant.folder:
        return given
    return existing_folder(given / variant.folder, what=variant.name, remedy=remedy)


def _split(variant: Variant, folder: Path, files: tuple[str, ...], steps: tuple[Step, ...], seed: int) -> Split:
    read = [_read(folder / file, variant) for file in files]
    pixels, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
    images = Images(Stored(pixels), len(labels), Chain((*steps, variant.normalise)), seed)
    return Split(inputs=images, targets=Labels(labels), size=len(labels), num_classes=variant.num_classes)


def _read(path: Path, variant: Variant) -> tuple[Tensor, Tensor]:
    """(images, 3, 32, 32) uint8 and (images,) int64 of one file."""
    content = _unpickle(path, variant)
    for key in ("data", variant.label_key):
        if key not in content:
            raise UserError(f"{path}: no {key!r} in it; unpack {variant.archive} again")
    pixels, labels = np.asarray(content["data"]), np.asarray(content[variant.label_key])
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or labels.shape != pixels.shape[:1]:
        raise UserError(
            f"{path}: {pixels.dtype} images {pixels.shape} with labels {labels.shape}, expected "
            f"uint8 (n, 3072) with (n,); unpack {variant.archive} again"
        )
    if len(labels) == 0:
        raise UserError(f"{path}: no images in it; unpack {variant.archive} again")
    if labels.min() < 0 or labels.max() >= variant.num_classes:
        wrong = labels[(labels < 0) | (labels >= variant.num_classes)][0]
        raise UserError(f"{path}: label {wrong} is none of {variant.num_classes} classes; is this {variant.name}?")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64))


def _unpickle(path: Path, variant: Variant) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{variant.name}: no file {path}; unpack {variant.archive} again")
    try:
        with path.open("rb") as file:
            content = _NumpyOnly(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); unpack {variant.archive} again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict; unpack {variant.archive} again")
    return content


class _NumpyOnly(pickle.Unpickler):
    """Arrays and plain values; a pickle that would call anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}
        if (module.split(".")[0] == "numpy" and name in allowed) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
