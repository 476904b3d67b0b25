"""The fewest samples that a model can be trained with at once: one, or two where a BatchNorm sees one value of each.

(1, 64, 7, 7)   49 values per channel: one image will do        (1, 512, 1, 1)   1 value: no variance
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.layered import LayeredModel, build_whole


def least_samples(model: LayeredModel) -> int:
    """Found by a forward of one sample without numbers; 2 where that cannot be tried and there is a BatchNorm."""
    with torch.device("meta"):
        whole = build_whole(model, 0)
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in whole.modules()):
        return 1
    try:
        with torch.no_grad():
            whole.to("meta").train()(*(tensor.to("meta") for tensor in model.sample(1)))
    except (ValueError, NotImplementedError, RuntimeError):  # too few values, or a block that needs numbers
        return 2
    return 1
