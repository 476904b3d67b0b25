"""ResNet-18/34/50/101/152 (He et al. 2015, arXiv:1512.03385) as a list of torchvision's own residual blocks.

    ImageNet stem:  conv 7x7 stride 2, bn, relu, maxpool     CIFAR stem:  conv 3x3, bn, relu
    body:           layer1.0 .. layer4.n                     head:        average pool, flatten, fc

Names are torchvision's: the gathered weights load `strict=True` into torchvision.models.resnet50, and back.
The in-place ReLUs of torchvision's blocks write to outputs of their own batch norms only, never to a block's
input, which may be a tensor still on its way to another stage or one kept for recomputation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from pipeline.models.layered import Block, LayeredModel, Tensors


@dataclass(frozen=True)
class Shape:
    """The residual block, how many of them each of the four layers has, and the reference's cut into four."""

    kind: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    reference_cut: tuple[int, int, int, int]


SHAPES = {
    "resnet18": Shape(BasicBlock, (2, 2, 2, 2), (2, 2, 2, 2)),
    "resnet34": Shape(BasicBlock, (3, 4, 6, 3), (4, 4, 4, 4)),
    "resnet50": Shape(Bottleneck, (3, 4, 6, 3), (4, 4, 4, 4)),
    "resnet101": Shape(Bottleneck, (3, 4, 23, 3), (8, 9, 8, 8)),
    "resnet152": Shape(Bottleneck, (3, 8, 36, 3), (12, 13, 13, 12)),
}
PLANES = (64, 128, 256, 512)


def resnet(
    name: str,
    *,
    num_classes: int = 1000,
    stem: str = "imagenet",
    image_size: int | None = None,
    zero_init_residual: bool = False,
) -> LayeredModel:
    """The ResNet of this name for images (batch, 3, side, side) -> scores (batch, num_classes).

    stem: "imagenet" or "cifar". image_size only sizes the profiling sample: 224, or 32 with the CIFAR stem.
    zero_init_residual: the last batch norm of each branch starts at zero: each block starts as the identity.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown ResNet {name!r}; choose from {sorted(SHAPES)}")
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose from {sorted(STEMS)}")
    shape = SHAPES[name]
    side = image_size or {"imagenet": 224, "cifar": 32}[stem]
    blocks = (
        Block("stem", "", STEMS[stem]),
        *_body(shape, zero_init_residual=zero_init_residual),
        Block("head", "", partial(_head, 512 * shape.kind.expansion, num_classes)),
    )
    return LayeredModel(name, blocks, 1, 1, partial(_sample, side), shape.reference_cut)


def _body(shape: Shape, *, zero_init_residual: bool) -> list[Block]:
    blocks, channels = [], 64
    for layer, (planes, count) in enumerate(zip(PLANES, shape.layers, strict=True), start=1):
        for index in range(count):
            stride = 2 if layer > 1 and index == 0 else 1
            build = partial(_residual, shape.kind, channels, planes, stride, zero_init_residual=zero_init_residual)
            blocks.append(Block(f"layer{layer}.{index}", f"layer{layer}.{index}.", build))
            channels = planes * shape.kind.expansion
    return blocks


def _residual(
    kind: type[BasicBlock] | type[Bottleneck],
    channels: int,
    planes: int,
    stride: int,
    *,
    zero_init_residual: bool,
) -> nn.Module:
    outputs = planes * kind.expansion
    shortcut = None
    if stride != 1 or channels != outputs:
        shortcut = nn.Sequential(conv1x1(channels, outputs, stride), nn.BatchNorm2d(outputs))
    block = initialise(kind(channels, planes, stride, shortcut))
    if zero_init_residual:
        nn.init.zeros_(block.get_parameter("bn3.weight" if kind is Bottleneck else "bn2.weight"))
    return block


def _imagenet_stem() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    return initialise(nn.Sequential(layers))


def _cifar_stem() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
    )
    return initialise(nn.Sequential(layers))


STEMS: dict[str, Callable[[], nn.Module]] = {"imagenet": _imagenet_stem, "cifar": _cifar_stem}


def _head(channels: int, num_classes: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        avgpool=nn.AdaptiveAvgPool2d((1, 1)),
        flatten=nn.Flatten(1),
        fc=nn.Linear(channels, num_classes),
    )
    return nn.Sequential(layers)


def initialise(module: nn.Module) -> nn.Module:
    """torchvision's initialisation: He normal (fan out) for convolutions, 1 and 0 for batch norms."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module


def _sample(side: int, batch: int) -> Tensors:
    return (torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)),)
