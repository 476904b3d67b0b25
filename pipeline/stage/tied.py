r"""Parameters that two stages share: one owns them, the other borrows a copy that it never updates.

    owner      F0 B0 ------- + -- update --- F1       updates with the sum of both gradients
                            /             \
    borrower   F0 B0 gradient              F1         forwards with the version that the owner forwarded with
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tie:
    """A parameter that two stages share: who owns it, who borrows it, under which names."""

    owner: int
    borrower: int
    owner_name: str
    borrower_name: str


@dataclass
class Borrowed:
    """A parameter whose owner is another stage: the copy in use here, and its gradient since the last update."""

    name: str
    owner_name: str
    homes: list[tuple[nn.Module, str]]
    leaf: nn.Parameter
    gradient: Tensor | None = None

    def receive(self, value: Tensor) -> None:
        """Uses the owner's new version from the next forward on."""
        self.leaf = nn.Parameter(value)
        for module, name in self.homes:
            module._parameters[name] = self.leaf

    def take_gradient(self) -> Tensor:
        gradient, self.gradient = self.gradient, None
        return torch.zeros_like(self.leaf) if gradient is None else gradient


def borrow(modules: Iterable[tuple[str, nn.Module]], borrowed: dict[str, str]) -> list[Borrowed]:
    """The parameters of these modules (prefix, module) that another stage owns: full name here -> that of the owner."""
    loans: dict[str, Borrowed] = {}
    for prefix, module in modules:
        for path, child in module.named_modules():
            for local, parameter in child._parameters.items():
                name = f"{prefix}{path}.{local}" if path else f"{prefix}{local}"
                if name in borrowed and parameter is not None:
                    loans[name] = Borrowed(name, borrowed[name], [(child, local)], parameter)
    return list(loans.values())
