"""heturun -c FILE.yml COMMAND...: starts COMMAND on every device of a layout, over the hosts of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from heturun.launch.cluster import Cluster
    from heturun.launch.processes import Plan

EPILOG = """examples:
  heturun -w 4 python3 train.py                        four processes on this machine
  heturun -c config/w0_w1.yml python3 train_resnet.py --placement pipe_2_4
  heturun -c config/w0_w1.yml --dry-run python3 train_resnet.py

COMMAND's --placement (else the device_list.py beside its script) says which host runs which stage of which pipeline;
without either, every host runs as many processes as it has workers."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="heturun",
        usage="heturun (-c FILE.yml | -w N) [options] COMMAND...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("-c", "--config", type=Path, metavar="FILE.yml", help="cluster file: its hosts and their workers")
    add("-w", "--workers", type=int, metavar="N", help="without -c: N workers on this machine")
    add(
        "-s",
        "--servers",
        type=int,
        metavar="N",
        help="with -w: N servers on this machine (one is used, as coordinator)",
    )
    add("-i", "--identity", "--identify", type=Path, metavar="KEYFILE", help="ssh key for the other hosts")
    add("--dry-run", action="store_true", help="print what would run where, and start nothing")
    add(
        "--launcher",
        choices=("auto", "mpi", "local", "ssh", "threads"),
        default="auto",
        help="mpi: mpirun, one MPI world per pipeline; local: plain processes here; ssh: also over ssh; "
        "threads: one process here for all workers; auto (default): mpi where an Open MPI is found, else local or ssh",
    )
    add("--min-replicas", type=int, metavar="N", help="elastic jobs: fewer than N pipelines are an error (default: 1)")
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="elastic jobs: start a lost pipeline again, N times each",
    )
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable, or pass it on; repeatable")
    add(
        "--timeout", type=float, metavar="S", help="seconds to wait for a peer, and for the start (default of that: 60)"
    )
    add("--log-dir", type=Path, metavar="DIR", help="keep one file of output per rank, too")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND...", help="what to run, with its own options")
    return made


def main(argv: Sequence[str] | None = None, *, coordinator: Sequence[str] | None = None) -> int:
    """Runs heturun; exit status 0, the first failing rank's, 2 for a wrong command line or file, or 128 + signal.

    `coordinator`: the command of the coordinator, if it is to be another one.
    """
    open_standard_files()
    options = parser().parse_args(argv)
    try:
        return _run(options, coordinator)
    except UserError as error:
        with contextlib.suppress(OSError):  # nobody can be told; the status tells
            print(f"heturun: {error}", file=sys.stderr)
        return 2


def open_standard_files() -> None:
    """Standard files that were closed lead nowhere, so that no socket gets their numbers, and with them our output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _run(options: argparse.Namespace, coordinator: Sequence[str] | None) -> int:
    _check(options)
    plan = _plan(options, [word for i, word in enumerate(options.command) if i or word != "--"], coordinator)
    if options.dry_run:
        from heturun.launch.dryrun import table

        print(table(plan))
        return 0
    from heturun.launch.job import run_job

    return run_job(
        plan,
        launcher=options.launcher,
        identity=options.identity,
        timeout_s=options.timeout,
        log_dir=options.log_dir,
        min_replicas=options.min_replicas,
        max_restarts=options.max_restarts,
    )


def _plan(options: argparse.Namespace, command: list[str], coordinator: Sequence[str] | None) -> Plan:
    from heturun.launch import hosts
    from heturun.launch import processes as plan

    cluster = _cluster(options)
    here = [node.host for node in cluster.nodes if hosts.is_meant(node.host, node.address)]
    directory = _working_directory()
    layout, notes = plan.layout_of(command, directory=Path(directory)), list[str]()
    if layout is not None:
        own_names = hosts.own_names()
        layout = plan.on_cluster(layout, cluster, own_names=own_names, here=here)
        instead = plan.layout_here(command, layout, cluster, gpus=hosts.num_gpus(os.environ))
        if instead is not None:
            notes.append(plan.here_note(instead, layout))
            layout = plan.on_cluster(instead, cluster, own_names=own_names, here=here)
    env = plan.common_environment(
        os.environ,
        cluster=cluster,
        given=_given_environment(options.env, os.environ),
        timeout_s=options.timeout,
        own_bin=os.path.dirname(sys.executable),
    )
    made = plan.plan_job(
        cluster,
        layout,
        command,
        directory=directory,
        env=env,
        launching_host=next(iter(here), hosts.LOCAL),
        coordinator=coordinator or plan.COORDINATOR,
    )
    made = replace(made, notes=(*notes, *made.notes))
    _check_pipelines(options, len(made.pipelines()))
    return _as_threads(made) if options.launcher == "threads" else made


def _as_threads(made: Plan) -> Plan:
    from heturun.launch import hosts
    from heturun.launch import processes as plan

    far = [node.host for node in made.nodes if not hosts.is_here(node.host, node.address)]
    if far:
        raise UserError(f"--launcher threads: {far[0]} is another machine; use -w N, or another launcher")
    return plan.as_threads(made)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted; cd to one that exists on every host") from None


def _cluster(options: argparse.Namespace) -> Cluster:
    from heturun.launch.cluster import load_cluster, this_machine

    if options.config is not None:
        return load_cluster(options.config)
    return this_machine(workers=options.workers, servers=options.servers or 0)


def _check(options: argparse.Namespace) -> None:
    """Raises `UserError` for options that contradict each other or make no sense."""
    if options.config is not None and (options.workers is not None or options.servers is not None):
        raise UserError("-w and -s stand for a cluster file; with -c, change `workers` and `servers` in that file")
    if options.config is None and options.workers is None:
        raise UserError("on which machines? give -c FILE.yml, or -w N for N workers on this one")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"-w {options.workers}: expected at least one worker; give e.g. -w 4")
    if options.servers is not None and options.servers < 0:
        raise UserError(f"-s {options.servers}: expected 0 or more servers")
    if options.timeout is not None and not 0 < options.timeout < float("inf"):
        raise UserError(f"--timeout {options.timeout:g}: expected seconds above 0")
    if options.identity is not None and not options.identity.is_file():
        raise UserError(f"-i {options.identity}: no such file; give the private key, e.g. ~/.ssh/id_ed25519")
    if options.command in ([], ["--"]):
        raise UserError("nothing to run; put the command after the options, e.g. python3 train_resnet.py")


def _check_pipelines(options: argparse.Namespace, pipelines: int) -> None:
    if options.min_replicas is not None and not 1 <= options.min_replicas <= pipelines:
        raise UserError(f"--min-replicas {options.min_replicas}: expected 1 to {pipelines}, the pipelines of this job")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts {options.max_restarts}: expected 0 or more")


def _given_environment(given: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `--env`, by name."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise UserError(f"--env {text}: {name!r} is no name of a variable; write NAME or NAME=VALUE")
        if not separator and name not in environ:
            raise UserError(f"--env {name}: it is not set here; write --env {name}=VALUE")
        found[name] = value if separator else environ[name]
    return found


if __name__ == "__main__":
    sys.exit(main())
