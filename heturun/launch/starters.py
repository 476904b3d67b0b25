"""How agents come to their hosts: the commands of the three launchers, mpi, local and ssh.

mpi      one mpirun per MPI world, one agent per rank       local, ssh    one agent per host
The coordinator has an agent of its own, here or over ssh, and so have the processes of a pipeline that starts again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heturun.launch import deliver, hosts, mpi, ssh
from heturun.launch.agent import LOOPBACK, interface_address
from heturun.launch.cluster import Node
from heturun.launch.processes import Coordinator, Plan, Process, is_of_another_job
from pipeline.cluster import wire
from pipeline.errors import UserError

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# -I: neither the user's directory nor PYTHONPATH can put a json.py of its own under the agent
TIED = (
    "import ctypes, os, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
BOOT = "import sys; sys.path.insert(0, {!r}); from heturun.launch.{} import main; sys.exit(main())"
FAR_PARENT = Path("/tmp")  # on other hosts, for what a launcher's TMPDIR has here


@dataclass(frozen=True)
class Starter:
    """A program to run here, and the ranks whose agents it brings up. `key_on_stdin`: it must be told the job's key."""

    name: str
    argv: tuple[str, ...]
    ranks: tuple[int, ...]
    key_on_stdin: bool = False
    incarnation: int = 0


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
        far = [node.host for node in plan.all_nodes if not hosts.is_here(node.host, node.address)]
        if far:
            raise UserError(f"--launcher local: {far[0]} is another machine; use --launcher ssh, mpi or auto")
    return mpi.find_mpirun() if launcher == "auto" else None


def find_routes(plan: Plan, *, folder: Path, identity: Path | None) -> Routes:
    """Looks up every host of the job, and writes the ssh configuration if there is one to reach.

    Raises:
        UserError: a host has no address, or there is no way to it.
    """
    here = frozenset(node.host for node in plan.all_nodes if hosts.is_here(node.host, node.address))
    far = [node for node in plan.all_nodes if node.host not in here]
    if not far:
        return Routes(here, dict.fromkeys(here, LOOPBACK), None, None)
    config = folder / "ssh_config"
    ssh.write_config(config, far, identity=identity, lost_s=plan.lost_s)
    reached = {node.host: node.address or ssh.real_name(config, node) for node in far}
    towards = {host: _own_address(plan, here, name) for host, name in reached.items()}
    own = next(iter(towards.values()))
    subnet = hosts.subnet_holding(own, reached.values())
    return Routes(here, {**dict.fromkeys(here, own), **towards}, config, subnet)


@dataclass(frozen=True)
class Starters:
    """What must be started here for a job: at first, for its coordinator, and for a pipeline that starts again.

    mpirun: None for plain processes. port: where the launcher listens. folder: a private directory.
    """

    plan: Plan
    routes: Routes
    mpirun: mpi.Mpirun | None
    port: int
    folder: Path

    def first(self) -> list[Starter]:
        """For all workers."""
        if self.mpirun is None:
            return [self._plain(node.host, self.plan.on(node.host), 0) for node in self.plan.nodes]
        return [self._mpirun(self.mpirun, world, 0) for world in self.plan.worlds()]

    def again(self, pipeline: Sequence[Process], incarnation: int) -> list[Starter]:
        """For the processes of one pipeline."""
        if self.mpirun is not None:
            return [self._mpirun(self.mpirun, pipeline, incarnation)]
        used = dict.fromkeys(process.host for process in pipeline)
        return [self._plain(host, [p for p in pipeline if p.host == host], incarnation) for host in used]

    def coordinator(self) -> Starter:
        return self._plain(self.plan.coordinator.host, [self.plan.coordinator], 0)

    def _agent(self, processes: Sequence[Process | Coordinator], incarnation: int) -> list[str]:
        """The command of the agent of these processes, all on one host."""
        address = wire.join_address(self.routes.launcher[processes[0].host], self.port)
        ranks = [process.rank for process in processes]
        command = agent_command(address, ranks, incarnation, lost_s=self.plan.lost_s)
        return [*command, "--folder", str(self.folder)] if processes[0].host in self.routes.here else command

    def _plain(self, host: str, processes: Sequence[Process | Coordinator], incarnation: int) -> Starter:
        ranks, agent = tuple(process.rank for process in processes), self._agent(processes, incarnation)
        if host in self.routes.here or self.routes.ssh_config is None:
            return Starter(f"agent on {host}", tuple(agent), ranks, incarnation=incarnation)
        remote = shlex.join(["exec", *agent, "--key-on-stdin"])
        argv = ssh.command(self.routes.ssh_config, self.plan.node(host), remote)
        return Starter(f"ssh to {host}", tuple(argv), ranks, key_on_stdin=True, incarnation=incarnation)

    def _mpirun(self, mpirun: mpi.Mpirun, world: Sequence[Process], incarnation: int) -> Starter:
        far_folder = str(FAR_PARENT / f"{self.folder.name}.{world[0].pipeline}.{incarnation}")
        far = dict.fromkeys(process.host for process in world if process.host not in self.routes.here)
        interfaces = _interfaces(self.plan, self.routes)
        argv = mpi.command(
            mpirun,
            world,
            host_name=self._name_for_mpirun,
            agent=lambda process: self._agent_of_mpirun(process, far_folder, incarnation),
            network=mpi.Network(
                self.routes.ssh_config, *interfaces, lost_s=self.plan.lost_s, far_folder=far_folder if far else None
            ),
            folder=self.folder,
        )
        if far:
            argv = self._delivering(world, list(far), far_folder) + argv
        name = "mpirun" if self.plan.placement is None else f"mpirun of pipeline {world[0].pipeline}"
        ranks = tuple(process.rank for process in world)
        return Starter(name, tuple(argv), ranks, key_on_stdin=bool(far), incarnation=incarnation)

    def _agent_of_mpirun(self, process: Process, far_folder: str, incarnation: int) -> list[str]:
        """Here the key is in mpirun's environment; elsewhere it was laid down beforehand."""
        agent = self._agent([process], incarnation)
        if process.host in self.routes.here:
            return agent
        return [*agent, "--folder", far_folder, "--key-file", deliver.key_file(far_folder, process.rank)]

    def _delivering(self, world: Sequence[Process], far: Sequence[str], far_folder: str) -> list[str]:
        """What becomes mpirun once the key is on these hosts."""
        argv = [sys.executable, "-I", "-c", BOOT.format(PACKAGE_PARENT, "deliver")]
        argv += ["--ssh-config", str(self.routes.ssh_config), "--folder", far_folder]
        for host in far:
            ranks = ",".join(str(process.rank) for process in world if process.host == host)
            argv += ["--to", f"{ssh.alias(self.plan.node(host))}={ranks}"]
        return [*argv, "--"]

    def _name_for_mpirun(self, host: str) -> str:
        return hosts.LOCAL if host in self.routes.here else ssh.alias(self.plan.node(host))


def agent_command(address: str, ranks: Sequence[int], incarnation: int, *, lost_s: int) -> list[str]:
    """Starts an agent, on any host that has this Python and heturun in the same places."""
    whose = ["--connect", address, "--ranks", ",".join(map(str, ranks)), "--incarnation", str(incarnation)]
    return [sys.executable, "-I", "-c", BOOT.format(PACKAGE_PARENT, "agent"), "--lost-after", str(lost_s), *whose]


def tied(argv: Sequence[str]) -> list[str]:
    """The same command, which the kernel ends when the launcher's main thread does; it keeps its process id.

    For what is started when the launcher has threads, beside which `preexec_fn` is not safe.
    """
    return [sys.executable, "-I", "-c", TIED, *argv]


def environment(environ: Mapping[str, str], key: str) -> dict[str, str]:
    """For starters: ours, without the traces of a job that heturun itself runs in."""
    clean = {name: value for name, value in environ.items() if not is_of_another_job(name)}
    return {**clean, "HETURUN_KEY": key}


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


StartMessage = Callable[[Sequence[int], int], wire.Message]


def start_message(plan: Plan, routes: Routes, extra: Mapping[str, str]) -> StartMessage:
    """What an agent is told to run, by its ranks, which are all on one host, and their incarnation.

    `extra`: variables of this launcher. The coordinator runs where this package lies, so that it is found.
    """

    def workers(ranks: Sequence[int], incarnation: int) -> wire.Message:
        again = {"HETURUN_INCARNATION": str(incarnation)}
        processes = [{"rank": r, "command": plan.command, "env": {**plan.processes[r].env, **again}} for r in ranks]
        node, alone = plan.node(plan.processes[ranks[0]].host), len(plan.nodes) == 1
        return start(node, alone, plan.directory, processes)

    def coordinator() -> wire.Message:
        own = plan.coordinator
        process = {"rank": own.rank, "command": own.command, "env": own.env}
        return start(plan.node(own.host), len(plan.all_nodes) == 1, PACKAGE_PARENT, [process])

    def start(node: Node, alone: bool, directory: str, processes: Sequence[wire.Message]) -> wire.Message:
        return {
            "type": "start",
            "directory": directory,
            "env": {**extra, **plan.env},
            "address": LOOPBACK if alone else node.address,
            "interface": None if alone else node.interface,
            "processes": processes,
        }

    def message(ranks: Sequence[int], incarnation: int) -> wire.Message:
        return coordinator() if plan.coordinator.rank in ranks else workers(ranks, incarnation)

    return message
