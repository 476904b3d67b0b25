"""A model is a list of blocks, so that a pipeline can cut it anywhere between two of them.

    stem | body body body ... | head          blocks; each maps a tuple of tensors to the next tuple
    '----- stage 0 -----' '-- stage 1 --'     a stage is a run of neighbouring blocks

A block's full state-dict names are its prefix + its local names. Together they are the names of the unsplit
model, so weights move to and from torchvision and transformers with `strict=True`, however the model was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Block:
    """One indivisible piece of a model: `build()` gives a module, forward(*tensors) -> Tensor or tuple."""

    name: str
    prefix: str
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class LayeredModel:
    """A named list of blocks, of which `stem` at the front and `head` at the back surround the body.

    reference_cut: counts of body blocks for four stages, as the reference system cuts this model, or None.
    ties: full name of a borrowed parameter -> full name of its owner. The borrower is built with a parameter
        of its own of the same shape; whoever holds both ends replaces it (`tie`), or keeps the two equal.
    sample: batch size -> inputs of the first block, on the CPU, the same at every call.
    config: what a config.json of transformers says of the same model.
    """

    name: str
    blocks: tuple[Block, ...]
    stem: int
    head: int
    sample: Callable[[int], Tensors]
    reference_cut: tuple[int, ...] | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stem < 0 or self.head < 0 or self.num_body <= 0:
            raise ValueError(
                f"{self.name}: no body in {len(self.blocks)} blocks of {self.stem} stem and {self.head} head"
            )
        if self.reference_cut is not None and sum(self.reference_cut) != self.num_body:
            raise ValueError(f"{self.name}: cut {self.reference_cut} does not add up to {self.num_body} blocks")

    @property
    def num_body(self) -> int:
        """Blocks that are neither stem nor head."""
        return len(self.blocks) - self.stem - self.head


class Chain(nn.Module):
    """Neighbouring blocks as one module; it returns what the last one returns."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.links = nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> Tensor | Tensors:
        result: Tensor | Tensors = tensors
        for link in self.links:
            result = link(*as_tuple(result))
        return result


def as_tuple(tensors: Tensor | Tensors) -> Tensors:
    """What a block returned, always as a tuple."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def block_seed(seed: int, index: int) -> int:
    """The seed of block `index`, in [0, 2**63): a hash, so that neighbouring blocks share nothing."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def build_blocks(model: LayeredModel, start: int, stop: int, seed: int) -> list[nn.Module]:
    """Blocks start..stop-1 on the CPU, each built from its own seed, so that no weight depends on the cut.

    The default generator is left as it was found.
    """
    if not 0 <= start < stop <= len(model.blocks):
        raise ValueError(f"{model.name} has blocks 0..{len(model.blocks) - 1}; asked for {start}..{stop - 1}")
    before = torch.get_rng_state()
    try:
        return [_build_seeded(model.blocks[index], block_seed(seed, index)) for index in range(start, stop)]
    finally:
        torch.set_rng_state(before)


def _build_seeded(block: Block, seed: int) -> nn.Module:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    return block.build()


def build_whole(model: LayeredModel, seed: int) -> Chain:
    """The unsplit model, its ties made: the reference that every pipeline has to equal."""
    modules = build_blocks(model, 0, len(model.blocks), seed)
    tie(model, modules)
    return Chain(modules)


def named_parameters(
    model: LayeredModel, modules: Sequence[nn.Module], *, start: int = 0
) -> Iterator[tuple[str, nn.Parameter]]:
    """(full name, parameter) of blocks start, start+1, ...; a parameter shared between names comes once."""
    seen: set[nn.Parameter] = set()
    for block, module in zip(model.blocks[start:], modules, strict=False):
        for local, parameter in module.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield block.prefix + local, parameter


def full_state(model: LayeredModel, modules: Sequence[nn.Module], *, start: int = 0) -> dict[str, Tensor]:
    """The state dict of blocks start, start+1, ... under the unsplit model's names."""
    state: dict[str, Tensor] = {}
    for block, module in zip(model.blocks[start:], modules, strict=False):
        state.update({block.prefix + local: tensor for local, tensor in module.state_dict().items()})
    return state


def load_full_state(
    model: LayeredModel, modules: Sequence[nn.Module], state: Mapping[str, Tensor], *, start: int = 0
) -> None:
    """Copy the unsplit model's state dict into these blocks; names of other blocks are left alone.

    Raises RuntimeError, as load_state_dict does, where a name is missing or a shape differs.
    """
    for block, module in zip(model.blocks[start:], modules, strict=False):
        module.load_state_dict({local: state[block.prefix + local] for local in _present(block, module, state)})


def _present(block: Block, module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    return [local for local in module.state_dict() if block.prefix + local in state]


def locate(
    model: LayeredModel, modules: Sequence[nn.Module], name: str, *, start: int = 0
) -> tuple[nn.Module, str] | None:
    """The submodule holding the parameter of this full name, and its attribute there; None if elsewhere."""
    for block, module in zip(model.blocks[start:], modules, strict=False):
        if name.startswith(block.prefix):
            path, _, attribute = name[len(block.prefix) :].rpartition(".")
            holder = dict(module.named_modules()).get(path)
            if holder is not None and attribute in holder._parameters:
                return holder, attribute
    return None


def tie(model: LayeredModel, modules: Sequence[nn.Module], *, start: int = 0) -> tuple[str, ...]:
    """Replace each borrowed parameter by its owner where both are here; returns the borrowers replaced."""
    done = []
    for borrower, owner in model.ties.items():
        here = locate(model, modules, borrower, start=start)
        there = locate(model, modules, owner, start=start)
        if here is not None and there is not None:
            setattr(here[0], here[1], getattr(there[0], there[1]))
            done.append(borrower)
    return tuple(done)
