"""How agents come to their hosts: the commands of the three launchers, mpi, local and ssh.

mpi      one mpirun per MPI world, one agent per rank       local, ssh    one agent per host
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heturun import hosts, mpi, ssh, wire
from heturun.agent import LOOPBACK, interface_address
from heturun.cluster import Node
from heturun.plan import Plan, Process, is_of_another_job
from pipeline.errors import UserError

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)
# -I: neither the user's directory nor PYTHONPATH can put a json.py of its own under the agent
BOOT = "import sys; sys.path.insert(0, {!r}); from heturun.agent import main; sys.exit(main())"


@dataclass(frozen=True)
class Starter:
    """A program to run here, and the ranks whose agents it brings up. `key_on_stdin`: it must be told the job's key."""

    name: str
    argv: tuple[str, ...]
    ranks: tuple[int, ...]
    key_on_stdin: bool = False


@dataclass(frozen=True)
class Routes:
    """Which hosts are this machine, and the launcher's address as each host must call it."""

    here: frozenset[str]
    launcher: Mapping[str, str]  # host -> address without port
    ssh_config: Path | None  # None when every host is this machine
    subnet: str | None

    @property
    def only_here(self) -> bool:
        return self.ssh_config is None


def choose(launcher: str, plan: Plan) -> mpi.Mpirun | None:
    """The mpirun to use, or None for plain processes, as `--launcher` says.

    Raises:
        UserError: mpi without an Open MPI, or local with other hosts in the cluster.
    """
    if launcher == "mpi":
        return mpi.require_mpirun()
    if launcher == "local":
        far = [node.host for node in plan.nodes if not hosts.is_here(node.host, node.address)]
        if far:
            raise UserError(f"--launcher local: {far[0]} is another machine; use --launcher ssh, mpi or auto")
    return mpi.find_mpirun() if launcher == "auto" else None


def find_routes(plan: Plan, *, folder: Path, identity: Path | None) -> Routes:
    """Looks up every host of the job, and writes the ssh configuration if there is one to reach.

    Raises:
        UserError: a host has no address, or there is no way to it.
    """
    here = frozenset(node.host for node in plan.nodes if hosts.is_here(node.host, node.address))
    far = [node for node in plan.nodes if node.host not in here]
    if not far:
        return Routes(here, dict.fromkeys(here, LOOPBACK), None, None)
    config = folder / "ssh_config"
    ssh.write_config(config, far, identity=identity)
    reached = {node.host: node.address or ssh.real_name(config, node) for node in far}
    towards = {host: _own_address(plan, here, name) for host, name in reached.items()}
    own = next(iter(towards.values()))
    subnet = hosts.subnet_holding(own, reached.values())
    return Routes(here, {**dict.fromkeys(here, own), **towards}, config, subnet)


def starters(plan: Plan, routes: Routes, mpirun: mpi.Mpirun | None, *, port: int, folder: Path) -> list[Starter]:
    """Everything that must be started here, for a launcher that listens on `port`."""
    if mpirun is None:
        return [_plain(plan, node, routes, port) for node in plan.nodes]

    def agent(process: Process) -> list[str]:
        return agent_command(wire.join_address(routes.launcher[process.host], port), [process.rank])

    def name(host: str) -> str:
        return hosts.LOCAL if host in routes.here else ssh.alias(plan.cluster.node(host))

    network = mpi.Network(routes.ssh_config, *_interfaces(plan, routes))
    return [
        Starter(
            _mpirun_name(plan, number),
            tuple(mpi.command(mpirun, world, host_name=name, agent=agent, network=network, folder=folder)),
            tuple(process.rank for process in world),
        )
        for number, world in enumerate(plan.worlds())
    ]


def agent_command(address: str, ranks: Sequence[int]) -> list[str]:
    """Starts an agent, on any host that has this Python and heturun in the same places."""
    return [sys.executable, "-I", "-c", BOOT.format(PACKAGE_PARENT), "--connect", address, "--ranks", _listed(ranks)]


def environment(environ: Mapping[str, str], key: str) -> dict[str, str]:
    """For starters: ours, without the traces of a job that heturun itself runs in."""
    clean = {name: value for name, value in environ.items() if not is_of_another_job(name)}
    return {**clean, "HETURUN_KEY": key}


def _plain(plan: Plan, node: Node, routes: Routes, port: int) -> Starter:
    ranks = tuple(process.rank for process in plan.on(node.host))
    agent = agent_command(wire.join_address(routes.launcher[node.host], port), ranks)
    if node.host in routes.here or routes.ssh_config is None:
        return Starter(f"agent on {node.host}", tuple(agent), ranks)
    remote = shlex.join(["exec", *agent, "--key-on-stdin"])
    return Starter(f"ssh to {node.host}", tuple(ssh.command(routes.ssh_config, node, remote)), ranks, key_on_stdin=True)


def _own_address(plan: Plan, here: frozenset[str], name: str) -> str:
    """This machine's address for `name`: of the interface that the cluster file gives it, else of the way."""
    own = next((node for node in plan.nodes if node.host in here), None)
    if own is not None and own.interface is not None:
        try:
            return interface_address(own.interface)
        except ValueError as error:
            raise UserError(str(error)) from error
    return hosts.address_towards(name)


def _interfaces(plan: Plan, routes: Routes) -> tuple[str | None, str | None]:
    """For MPI's messages and for mpirun's own: the configured interfaces, else the subnet that all hosts share."""
    names = {node.interface for node in plan.nodes if node.interface is not None}
    if names and all(node.interface is not None for node in plan.nodes):
        return ",".join(sorted(names)), ",".join(sorted(names))
    return routes.subnet, None


def _mpirun_name(plan: Plan, number: int) -> str:
    return "mpirun" if plan.placement is None else f"mpirun of pipeline {number}"


def _listed(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks))


StartMessage = Callable[[Sequence[int]], wire.Message]


def start_message(plan: Plan, routes: Routes, extra: Mapping[str, str]) -> StartMessage:
    """What an agent is told to run, by its ranks, which are all on one host. `extra`: variables of this launcher."""

    def message(ranks: Sequence[int]) -> wire.Message:
        node = plan.cluster.node(plan.processes[ranks[0]].host)
        alone = len(plan.nodes) == 1
        processes = [{"rank": r, "command": plan.command, "env": dict(plan.processes[r].env)} for r in ranks]
        return {
            "type": "start",
            "directory": plan.directory,
            "env": {**extra, **plan.env},
            "address": LOOPBACK if alone else node.address,
            "interface": None if alone else node.interface,
            "processes": processes,
        }

    return message


def bin_directory() -> str:
    """Where the Python that runs heturun lies."""
    return os.path.dirname(sys.executable)
