"""What workers and the coordinator say to each other: JSON objects, their fields, and the rules that a job agreed on.

{"type": "hello", "n": 1, "stage": 0, ..., "rules": {...}}  ──► field_of(message, "rules", dict) ──► JobRules
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from pipeline.coordination.groups.policy import Rules

Message = dict[str, Any]

MOST_WORKERS = 1 << 20  # of a job

T = TypeVar("T")


class Malformed(ValueError):
    """A message that nobody of ours would send: it is dropped."""


@dataclass(frozen=True, kw_only=True)
class JobRules:
    """What a job agreed on beforehand; the same from every worker.

    `policy`, `max_group`, `connect_within`, `wait` and `seed` are `groups.policy.Rules`'; `even` is `Shares`';
    `hosts` is hosts[stage][pipeline], for groups inside a host.
    """

    stages: int
    pipelines: int
    policy: str = "partial"
    max_group: int = 8
    connect_within: int | None = None
    wait: str = "adaptive"
    seed: int = 0
    even: bool = False
    min_replicas: int = 1
    heartbeat_timeout_s: float = 3.0
    hosts: tuple[tuple[str, ...], ...] | None = None

    @property
    def groups(self) -> Rules:
        """The scheduler's part; a synchroniser that forms no groups ("none") still has final averages."""
        return Rules(
            policy="partial" if self.policy == "none" else self.policy,  # type: ignore[arg-type]
            max_group=self.max_group,
            connect_within=self.connect_within,
            wait=self.wait,  # type: ignore[arg-type]
            seed=self.seed,
        )

    def message(self) -> Message:
        """As it travels in JSON."""
        hosts = None if self.hosts is None else [list(stage) for stage in self.hosts]
        return {**asdict(self), "hosts": hosts}

    @classmethod
    def from_message(cls, message: Message) -> JobRules:
        """The inverse; raises `Malformed`."""
        missing = [item.name for item in fields(cls) if item.name not in message]
        if missing:
            raise Malformed(f"rules without {', '.join(missing)}")
        known = {item.name: message[item.name] for item in fields(cls)}
        wrong = [name for name, valid in _VALID.items() if not valid(known[name])]
        if wrong:
            raise Malformed(f"rules with {', '.join(f'{name} = {known[name]!r:.40}' for name in wrong)}")
        stages, pipelines, hosts = known["stages"], known["pipelines"], known["hosts"]
        if stages * pipelines > MOST_WORKERS:
            raise Malformed(f"rules of {stages} x {pipelines} workers")
        if hosts is not None and (len(hosts) != stages or any(len(row) != pipelines for row in hosts)):
            raise Malformed("rules with hosts of another shape")
        rules = cls(**{**known, "hosts": None if hosts is None else tuple(map(tuple, hosts))})
        try:
            rules.groups  # noqa: B018
        except ValueError as error:
            raise Malformed(f"rules with a wrong field: {error}") from None
        return rules


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(name, str) for name in row) for row in value
    )


_VALID: Mapping[str, Callable[[Any], bool]] = {
    "stages": _counts,
    "pipelines": _counts,
    "policy": lambda value: isinstance(value, str),
    "max_group": _counts,
    "connect_within": lambda value: value is None or _counts(value),
    "wait": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
    "even": lambda value: type(value) is bool,
    "min_replicas": lambda value: type(value) is int,
    "heartbeat_timeout_s": lambda value: type(value) in (int, float) and 0 < value < float("inf"),
    "hosts": lambda value: value is None or _is_table(value),
}


def field_of(message: Message, name: str, kind: type[T]) -> T:
    """A field of a message; raises `Malformed` when it is missing or of another type."""
    value = message.get(name)
    if type(value) is not kind:
        raise Malformed(f"{message.get('type')!s:.40} with {name} = {value!r:.60}")
    return value
