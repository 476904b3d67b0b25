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
# What training scripts import by an older name, and where it is now: train_resnet.py has been copied.
_MOVED = {
    "pipeline.emulated_task": ("pipeline.train.emulated",),
    "pipeline.job": ("pipeline.train.run",),
    "pipeline.training": ("pipeline.train.trainer", "pipeline.train.plan"),
    "pipeline.world": ("pipeline.cluster.world",),
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


class _OlderNames(MetaPathFinder, Loader):
    """Under an older name the very same things are imported as under their own: a module, or what several define."""

    def __init__(self, homes: Mapping[str, Sequence[str]]) -> None:
        self._homes = homes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self._homes else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [import_module(home) for home in self._homes[module.__name__]]
        if len(homes) == 1:
            sys.modules[module.__name__] = homes[0]
            return
        for home in homes:
            vars(module).update({name: value for name, value in vars(home).items() if not name.startswith("__")})


sys.meta_path.insert(0, _OlderNames(_MOVED))
