"""What the modules of a stage hold, under the names of the unsplit model: parameters, and buffers beside them.

model.layer1.0.conv1.weight                  a parameter: the optimiser moves it (`weights.py`)
model.layer1.0.bn1.running_mean              a floating buffer: forwards move it, replicas average it
model.layer1.0.bn1.num_batches_tracked       another buffer: stands in checkpoints
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Modules = Sequence[tuple[str, nn.Module]]  # (prefix of its names, module)


def model_state(modules: Modules, aliases: frozenset[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers, but for those named in `aliases`; views of the live tensors."""
    return {
        f"model.{prefix}{name}": tensor
        for prefix, module in modules
        for name, tensor in module.state_dict().items()
        if prefix + name not in aliases
    }


def buffer_names(modules: Modules) -> set[str]:
    """Names of all buffers (running statistics), as in `model_state`."""
    return {f"model.{prefix}{name}" for prefix, module in modules for name, _ in module.named_buffers()}


def floating_buffers(modules: Modules) -> list[Tensor]:
    """Persistent ones, each once: live, past autograd."""
    parts = [part for _, module in modules for part in module.modules()]
    kept = [
        buffer.data
        for part in parts
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set and buffer.is_floating_point()
    ]
    return list({id(buffer): buffer for buffer in kept}.values())


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, without a graph."""
    return tensor.detach().to("cpu", copy=True)


class KeptBuffers:
    """Buffers of a stage (running statistics), kept and restored around a recomputation; one kernel per dtype."""

    def __init__(self, modules: Modules) -> None:
        live: dict[torch.dtype, list[Tensor]] = {}
        for _, module in modules:
            for buffer in module.buffers():
                live.setdefault(buffer.dtype, []).append(buffer.data)  # past autograd, which saved but never reads them
        self._pairs = [(tensors, [torch.empty_like(tensor) for tensor in tensors]) for tensors in live.values()]

    def keep(self) -> None:
        for live, kept in self._pairs:
            torch._foreach_copy_(kept, live)

    def restore(self) -> None:
        for live, kept in self._pairs:
            torch._foreach_copy_(live, kept)
