"""What keeps the replicas of a stage together, one algorithm per file; without any of them, all-reduce of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from pipeline.sync.adpsgd import AdPsgd, MatchedAdPsgd
from pipeline.sync.local_sgd import Calendar, LocalSgd
from pipeline.sync.outer import DiLoCo, Outer, OuterRule, SlowMo
from pipeline.sync.preduce import PartialReduce
from pipeline.sync.protocol import Synchroniser

__all__ = ["OUTER_RULES", "SYNCHRONISERS", "SyncSettings", "Synchroniser", "make_synchroniser"]


class SyncSettings(Protocol):
    """The part of `pipeline.settings.Settings` that is read here."""

    @property
    def synchroniser(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def overlap_sync(self) -> bool: ...
    @property
    def adpsgd_matching(self) -> str: ...
    @property
    def local_steps(self) -> int: ...
    @property
    def initial_steps(self) -> int: ...
    @property
    def initial_step_method(self) -> str: ...
    @property
    def host_steps(self) -> int | None: ...
    @property
    def outer(self) -> str: ...
    @property
    def outer_momentum(self) -> float | None: ...
    @property
    def outer_learning_rate(self) -> float | None: ...


def _preduce(settings: SyncSettings) -> Synchroniser:
    return PartialReduce(blocking=not settings.overlap_sync)


def _adpsgd(settings: SyncSettings) -> Synchroniser:
    return MatchedAdPsgd() if settings.adpsgd_matching == "sync" else AdPsgd(seed=settings.seed)


def _local_sgd(settings: SyncSettings) -> Synchroniser:
    calendar = Calendar(
        local_steps=settings.local_steps,
        initial_steps=settings.initial_steps,
        single_process=settings.initial_step_method == "single_process",
        host_steps=settings.host_steps,
    )
    rule = OUTER_RULES[settings.outer](settings.outer_momentum, settings.outer_learning_rate)
    return LocalSgd(calendar, None if rule is None else Outer(rule))


def _slowmo(momentum: float | None, rate: float | None) -> OuterRule:
    return SlowMo(beta=0.5 if momentum is None else momentum, alpha=1.0 if rate is None else rate)


def _diloco(momentum: float | None, rate: float | None) -> OuterRule:
    return DiLoCo(momentum=0.9 if momentum is None else momentum, outer_learning_rate=0.7 if rate is None else rate)


OUTER_RULES: Mapping[str, Callable[[float | None, float | None], OuterRule | None]] = MappingProxyType(
    {"none": lambda momentum, rate: None, "slowmo": _slowmo, "diloco": _diloco}
)
SYNCHRONISERS: Mapping[str, Callable[[SyncSettings], Synchroniser]] = MappingProxyType(
    {"preduce": _preduce, "adpsgd": _adpsgd, "local_sgd": _local_sgd}
)


def make_synchroniser(settings: SyncSettings) -> Synchroniser:
    """The synchroniser that the settings name, of one stage.

    Raises:
        ValueError: an unknown one; all-reduce is none of them, since it acts on gradients.
    """
    if settings.synchroniser not in SYNCHRONISERS:
        raise ValueError(f"unknown synchroniser {settings.synchroniser!r}; choose from {sorted(SYNCHRONISERS)}")
    return SYNCHRONISERS[settings.synchroniser](settings)
