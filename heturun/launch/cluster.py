"""Cluster files: which hosts there are and how many processes each may run.

nodes:
  - host: w0            # a name or an address; `localhost` is this machine
    servers: 1          # optional, default 0
    workers: 8
    chief: true         # exactly one node
    address: 10.0.0.4   # optional: where the host is reached, when its name alone does not say
    interface: eth1     # optional: the network whose address the host tells to others
    user: alice         # optional, for ssh
    port: 2222          # optional, for ssh
    gpus: 8             # optional: how many GPUs it has, so that layouts can be checked
  - {host: w1, workers: 8}
env:                    # optional: for every process
  NCCL_DEBUG: WARN
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.outside import parse_yaml
from pipeline.errors import UserError

LOCAL = "localhost"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host of the cluster."""

    host: str
    servers: int = 0
    workers: int = 0
    chief: bool = False
    address: str | None = None
    interface: str | None = None
    user: str | None = None
    port: int | None = None
    gpus: int | None = None


@dataclass(frozen=True)
class Cluster:
    """The hosts in the order of the file, and variables for every process."""

    nodes: tuple[Node, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def chief(self) -> Node:
        return next(node for node in self.nodes if node.chief)

    @property
    def servers(self) -> int:
        return sum(node.servers for node in self.nodes)

    @property
    def workers(self) -> int:
        return sum(node.workers for node in self.nodes)

    def node(self, host: str) -> Node:
        return next(node for node in self.nodes if node.host == host)


def this_machine(*, workers: int, servers: int) -> Cluster:
    """What `-w` and `-s` stand for: this machine alone."""
    return Cluster((Node(host=LOCAL, workers=workers, servers=servers, chief=True),))


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster file.

    Raises:
        UserError: in one line: the file, the key, what is wrong and what to write.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one like config/local.yml, or give -w N instead") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give -c a text file like config/local.yml") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct it, config/local.yml is an example") from None
    try:
        return parse_cluster(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_cluster(values: object) -> Cluster:
    """The cluster that a file's content describes; raises `UserError` without the file's name."""
    if not isinstance(values, dict):
        raise UserError(f"expected `nodes:` with a list of hosts, found {_shown(values)}; see config/local.yml")
    _known(values, ("nodes", "env"), "top-level key")
    nodes = values.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise UserError(
            f"nodes: expected a list of hosts, found {_shown(nodes)}; add `- {{host: localhost, workers: 4}}`"
        )
    hosts = tuple(_node(entry, f"nodes[{i}]") for i, entry in enumerate(nodes))
    cluster = Cluster(hosts, _environment(values.get("env")))
    _check_hosts(cluster)
    return cluster


def _node(entry: object, where: str) -> Node:
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: expected a host with its keys, found {_shown(entry)}; write {{host: w0, workers: 8}}"
        )
    _known(entry, tuple(_CHECKS), f"{where}: key")
    if "host" not in entry:
        raise UserError(f"{where}.host: missing; add the host's name, e.g. host: localhost")
    return Node(**{key: _CHECKS[key](value, f"{where}.{key}") for key, value in entry.items()})


def _check_hosts(cluster: Cluster) -> None:
    names = [node.host for node in cluster.nodes]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"nodes[{i}].host: {name} stands here twice; write each host once, with all its workers")
    chiefs = [node.host for node in cluster.nodes if node.chief]
    if not chiefs:
        raise UserError(f"nodes: no host is chief; add `chief: true` to one of {', '.join(names)}")
    if len(chiefs) > 1:
        raise UserError(f"nodes: {len(chiefs)} chiefs ({', '.join(chiefs)}); leave `chief: true` at one of them")
    for i, node in enumerate(cluster.nodes):
        if not (node.workers or node.servers or node.chief):
            raise UserError(f"nodes[{i}].workers: {node.host} has zero; give it 1 or more, or leave the host out")
    if cluster.workers == 0:
        raise UserError("nodes: zero workers in all; add e.g. `workers: 4` to a host")


def _known(mapping: Mapping[object, object], keys: tuple[str, ...], what: str) -> None:
    for key in mapping:
        if key not in keys:
            raise UserError(f"{what} {key!r} is unknown; choose from {', '.join(keys)}")


def _environment(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"env: expected NAME: value lines, found {_shown(value)}; write e.g. NCCL_DEBUG: WARN under it")
    return {_variable(name): _value(name, content) for name, content in value.items()}


def _variable(name: object) -> str:
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise UserError(f"env: {name!r} is no name of a variable; use letters, digits and _")
    return name


def _value(name: object, content: object) -> str:
    if isinstance(content, bool) or not isinstance(content, str | int | float):
        raise UserError(f"env.{name}: expected text or a number, found {_shown(content)}; put it in quotes")
    return str(content)


def _name(value: object, key: str) -> str:
    """A host, user or interface: nothing that ssh or mpirun could take for an option or split in two."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{key}: expected text, found {_shown(value)}; put it in quotes")
    if re.fullmatch(r"[A-Za-z0-9_.:%@+-]+", value) is None or value.startswith("-"):
        raise UserError(f"{key}: {value!r} is no name or address; use letters, digits and . : _ - only")
    return value


def _number(smallest: int, largest: int) -> Callable[[object, str], int]:
    def check(value: object, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            raise UserError(
                f"{key}: expected a whole number from {smallest} to {largest}, found {_shown(value)}; correct it"
            )
        return value

    return check


def _truth(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{key}: expected true or false, found {_shown(value)}; correct it")
    return value


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "keys"
    return repr(value)


_CHECKS: dict[str, Callable[[object, str], Any]] = {
    "host": _name,
    "servers": _number(0, 1024),
    "workers": _number(0, 1024),
    "chief": _truth,
    "address": _name,
    "interface": _name,
    "user": _name,
    "port": _number(1, 65535),
    "gpus": _number(0, 1024),
}
