"""Pipeline-parallel training on uneven machines: schedules, stages, transports and the loop that drives them.

Importing this package is cheap and imports no torch; take what you need from its rooms (DESIGN.md). For people with a
loop of their own, `pipeline.get_distributed_optimizer` is imported on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.compat.local_sgd import get_distributed_optimizer as get_distributed_optimizer

_ELSEWHERE = {"get_distributed_optimizer": "pipeline.compat.local_sgd"}
# What training scripts import by an older name: train_resnet.py has been copied.
_MOVED = {
    "pipeline.emulated_task": "pipeline.train.emulated",
    "pipeline.job": "pipeline.train.run",
    "pipeline.training": "pipeline.train.trainer",
    "pipeline.world": "pipeline.cluster.world",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


class _OlderNames(MetaPathFinder, Loader):
    """Under an older name the very same module is imported as under its own."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self._names else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self._names[module.__name__])


sys.meta_path.insert(0, _OlderNames(_MOVED))
