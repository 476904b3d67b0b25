"""Reaching the other hosts over ssh: one private configuration file that both plain ssh and mpirun's ssh read.

The user's own ~/.ssh/config and /etc/ssh/ssh_config still count, for all that the cluster file and `-i` leave open.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from heturun.launch import hosts
from heturun.launch.cluster import Node
from pipeline.errors import UserError

ASK_S = 10.0
ALIVE_S = 10


def write_config(path: Path, nodes: Sequence[Node], *, identity: Path | None, lost_s: int = 0) -> None:
    """Writes the configuration for `nodes`; in ssh the first value found counts, so ours stand before the user's.

    `lost_s`: a silent host counts as gone after so long, but not before 30 s.
    """
    lines = [line for node in nodes for line in _host(node)]
    known = (
        f"{_quoted(path.parent / 'known_hosts')} ~/.ssh/known_hosts ~/.ssh/known_hosts2"  # new keys go to the first one
    )
    lines += [
        "Host *",
        f"  UserKnownHostsFile {known}",
        "  BatchMode yes",
        f"  ServerAliveInterval {ALIVE_S}",
        f"  ServerAliveCountMax {max(3, lost_s // ALIVE_S)}",
    ]
    if identity is not None:
        lines += [f"  IdentityFile {_quoted(identity.absolute())}", "  IdentitiesOnly yes"]
    lines += ["  Include ~/.ssh/config", "  Include /etc/ssh/ssh_config"]
    lines += ["Match all", "  StrictHostKeyChecking accept-new", "  ConnectTimeout 20"]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)


def alias(node: Node) -> str:
    """The name under which ssh and mpirun know another host.

    mpirun reads a colon as the start of a number of slots, and would start here what has a name of this machine.
    """
    name = node.host.replace(":", "-").replace("%", "-") if ":" in node.host else node.host
    return f"other-{name}" if node.address is not None and hosts.is_here(node.host) else name


def real_name(config: Path, node: Node) -> str:
    """The name or address that ssh itself would connect to.

    Raises:
        UserError: there is no ssh here, or it rejects the host or its configuration.
    """
    try:
        asked = subprocess.run(
            ["ssh", "-F", str(config), "-G", alias(node)], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"host {node.host} is another machine and there is no ssh here; install OpenSSH's client"
        ) from None
    found = [line.partition(" ")[2] for line in asked.stdout.splitlines() if line.startswith("hostname ")]
    if asked.returncode != 0 or not found:
        raise UserError(f"host {node.host}: ssh says: {' '.join(asked.stderr.split())}; correct ~/.ssh/config")
    return found[0]


def command(config: Path, node: Node, remote: str) -> list[str]:
    """Runs the shell line `remote` on the host."""
    return ["ssh", "-T", "-F", str(config), alias(node), remote]


def _quoted(path: Path) -> str:
    """A file's name as a word of the configuration, in which % begins a token."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def _host(node: Node) -> list[str]:
    settings = [
        ("HostName", node.address or (node.host if alias(node) != node.host else None)),
        ("User", node.user),
        ("Port", node.port),
    ]
    return [f"Host {alias(node)}", *(f"  {key} {value}" for key, value in settings if value is not None)]
