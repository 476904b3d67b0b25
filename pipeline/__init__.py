"""Pipeline-parallel training on uneven machines: schedules, stages, transports and the loop that drives them.

Importing this package is cheap and imports no torch; take what you need from its modules. For people with a loop of
their own, `pipeline.get_distributed_optimizer` is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.local_optimizer import get_distributed_optimizer as get_distributed_optimizer

_ELSEWHERE = {"get_distributed_optimizer": "pipeline.local_optimizer"}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)
