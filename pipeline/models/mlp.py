"""A plain multi-layer perceptron: equal layers that are cheap to build, for benches and tests."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.layered import Block, LayeredModel, Tensors

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Layer(nn.Module):
    """Linear, then optionally BatchNorm, activation and dropout."""

    def __init__(self, inputs: int, outputs: int, *, activation: str, batchnorm: bool, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs) if batchnorm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (batch, inputs), or images of as many numbers -> (batch, outputs)
        y: Tensor = self.dropout(self.activation(self.norm(self.linear(x.flatten(1)))))
        return y


class Head(nn.Module):
    """Linear alone: (batch, inputs) -> scores (batch, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def mlp(
    name: str = "mlp",
    *,
    inputs: int = 1024,
    width: int = 1024,
    depth: int = 8,
    num_classes: int = 1024,
    activation: str = "relu",
    batchnorm: bool = False,
    dropout: float = 0.0,
) -> LayeredModel:
    """`depth` linear layers: depth - 1 hidden ones of `width`, and the scores of `num_classes`.

    >>> [block.name for block in mlp(depth=3).blocks]
    ['layer0', 'layer1', 'head']
    """
    if depth < 2:
        raise ValueError(f"an mlp has at least 2 layers; got depth {depth}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from {sorted(ACTIVATIONS)}")
    layer = partial(Layer, activation=activation, batchnorm=batchnorm, dropout=dropout)
    sizes = [inputs] + [width] * (depth - 1)
    hidden = [Block(f"layer{i}", f"layer{i}.", partial(layer, sizes[i], sizes[i + 1])) for i in range(depth - 1)]
    head = Block("head", "head.", partial(Head, width, num_classes))
    return LayeredModel(name, (*hidden, head), 0, 0, partial(_sample, inputs))


def _sample(inputs: int, batch: int) -> Tensors:
    return (torch.randn(batch, inputs, generator=torch.Generator().manual_seed(0)),)
