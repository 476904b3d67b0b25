"""The data sets by name: `load("digits", seed=0)` gives what to train on and what to validate on.

A new data set is one new file with a function `Options -> Splits`, and one line here. Modules are imported when they
are needed: preparing text needs no torch, and BERT no torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets.base import Options, Split, Splits
    from datasets.speed import test_io

__all__ = ["DATASETS", "Options", "Split", "Splits", "load", "test_io"]

DATASETS: Mapping[str, Mapping[str, str]] = {
    "images": {
        "cifar10": "datasets.cifar:load_cifar10",
        "cifar100": "datasets.cifar:load_cifar100",
        "digits": "datasets.digits:load",
        "imagefolder": "datasets.imagefolder:load",
        "imagenet": "datasets.imagenet:load",
        "synthetic": "datasets.synthetic:load_images",
    },
    "tokens": {
        "synthetic": "datasets.synthetic:load_tokens",
        "wiki": "datasets.wiki:load",
    },
}
_ELSEWHERE = {"Options": "base", "Split": "base", "Splits": "base", "test_io": "speed"}


def load(name: str, *, kind: str = "images", data_dir: str | Path | None = None, **options: Any) -> Splits:
    """The data set of that name among the images or the tokens; the other options are those of `Options`.

    Raises:
        UserError: an unknown name, a missing folder, damaged files, a vocabulary or length that does not fit.
    """
    from datasets.base import Options

    if name not in DATASETS[kind]:
        raise UserError(f"unknown dataset {name!r} of {kind}; choose from {', '.join(DATASETS[kind])}")
    module, function = DATASETS[kind][name].split(":")
    folder = None if data_dir is None else Path(data_dir)
    splits: Splits = getattr(import_module(module), function)(Options(data_dir=folder, **options))
    return splits


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'datasets' has no attribute {name!r}")
    return getattr(import_module(f"datasets.{_ELSEWHERE[name]}"), name)
