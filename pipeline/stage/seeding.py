"""Random numbers that depend on what is computed, not on where: one seed per micro-batch and block.

Dropout of micro-batch 5 in block 3 is then the same in one process, in four stages, and when it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WATCHED = 2  # forwards of a part, before it is believed to draw nothing
GENERATOR_LOCK = Lock()  # torch's generators belong to the process; stages may be threads of one


class Generator(Protocol):
    """The part of a `torch.Generator` that is needed here."""

    def manual_seed(self, seed: int, /) -> object: ...
    def get_state(self) -> Tensor: ...


def generators_of(device: torch.device) -> tuple[Generator, ...]:
    """Where blocks on `device` may draw from: its own generator, and the host's (layers are skipped by its numbers)."""
    if device.type == "cuda":
        return torch.default_generator, torch.cuda.default_generators[device.index or 0]
    return (torch.default_generator,)


class Draws:
    """Calls the parts of a model so that what each draws follows from a seed, in a forward and in its repetition.

    A part that draws has the generators for itself (they belong to the process) for as long as it runs. Which parts do
    is seen by watching the generators while they run for the first times: a module's type does not tell, since any
    forward may call `F.dropout` or `torch.rand`. Whoever has not drawn is seeded all the same, in case it begins to,
    but holds up nobody: stages that are threads of one process compute side by side.
    """

    def __init__(self, generators: Sequence[Generator]) -> None:
        self._generators = tuple(generators)
        self._quiet: dict[int, int] = {}  # part -> how often it was watched and drew nothing
        self._drawing: set[int] = set()

    @property
    def drawing(self) -> frozenset[int]:
        """The parts that were seen to draw."""
        return frozenset(self._drawing)

    def call(self, part: int, seed: int, function: Callable[..., T], *arguments: Any) -> T:
        """What `function(*arguments)` returns, where part `part` draws the numbers that follow from `seed`."""
        if self._quiet.get(part, 0) >= WATCHED:
            if GENERATOR_LOCK.acquire(blocking=False):  # else some other part draws from them now
                self._sow(seed)
                GENERATOR_LOCK.release()
            return function(*arguments)
        with GENERATOR_LOCK:
            self._sow(seed)
            if part in self._drawing:
                return function(*arguments)
            before = self._states()
            result = function(*arguments)
            self._note(part, drew=not all(map(torch.equal, before, self._states())))
        return result

    def _sow(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(seed)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _note(self, part: int, *, drew: bool) -> None:
        if drew:
            self._drawing.add(part)
        else:
            self._quiet[part] = self._quiet.get(part, 0) + 1
