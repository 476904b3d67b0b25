"""Models as lists of blocks, by name: `make_model("resnet50", num_classes=10, stem="cifar")`.

torchvision and transformers are imported only when one of their models is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.errors import UserError
from pipeline.models.layered import (
    Block,
    Chain,
    LayeredModel,
    Tensors,
    as_tuple,
    block_seed,
    build_blocks,
    build_whole,
    full_state,
    load_full_state,
    locate,
    named_parameters,
    tie,
)
from pipeline.models.mlp import mlp

__all__ = [
    "MODELS",
    "Block",
    "Chain",
    "LayeredModel",
    "Tensors",
    "as_tuple",
    "block_seed",
    "build_blocks",
    "build_whole",
    "full_state",
    "load_full_state",
    "locate",
    "make_model",
    "named_parameters",
    "tie",
]


def _resnet(name: str, **options: Any) -> LayeredModel:
    from pipeline.models.resnet import resnet

    return resnet(name, **options)


def _bert(name: str, *, config: str | None = None, **options: Any) -> LayeredModel:
    from pipeline.models.bert import bert
    from pipeline.models.bert_config import read_shape

    return bert(name, read_shape(config or name), **options)


MODELS: dict[str, Callable[..., LayeredModel]] = {
    "mlp": mlp,
    "bert": partial(_bert, "bert"),  # config="bert-base", a path of a JSON file, or JSON
    "bert-base": partial(_bert, "bert-base"),
    "bert-large": partial(_bert, "bert-large"),
    "resnet18": partial(_resnet, "resnet18"),
    "resnet34": partial(_resnet, "resnet34"),
    "resnet50": partial(_resnet, "resnet50"),
    "resnet101": partial(_resnet, "resnet101"),
    "resnet152": partial(_resnet, "resnet152"),
}


def make_model(name: str, **options: Any) -> LayeredModel:
    """The model of this name with its maker's options; UserError if there is none of that name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose from {sorted(MODELS)}")
    return MODELS[name](**options)
