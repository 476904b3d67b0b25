"""Brings the job's key to the other hosts of an MPI world, over ssh, and becomes mpirun, which would send it in clear.

    launcher ── key on stdin ──► deliver ══ ssh, one per host ══► sh: a private directory there, with a file per rank
                                    └── exec ──► mpirun ... agent --key-file FILE     who reads it and removes it
    mpirun ends, however it does ──► ssh ends with it ──► sh removes the directory, Open MPI's files in it too

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from typing import NamedTuple

from heturun.launch.agent import die_with_parent

SHELL = (
    'umask 077; mkdir "$0" || exit; echo $$ > "$0/watcher"; read -r key; '
    'for rank; do printf "%s\\n" "$key" > "$0/key.$rank"; done; echo ready; read -r end; rm -rf "$0"'
)
READY = b"ready"


class Target(NamedTuple):
    """A host as ssh calls it, and the ranks that get a key there."""

    host: str
    ranks: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "w1=2,3"."""
        host, _, ranks = text.rpartition("=")
        return cls(host, tuple(ranks.split(",")))


def key_file(folder: str, rank: int) -> str:
    """Where the agent of a rank finds the key."""
    return f"{folder}/key.{rank}"


def remote_line(folder: str, ranks: tuple[str, ...]) -> str:
    """What the other host's shell runs, whichever it is."""
    return shlex.join(["exec", "/bin/sh", "-c", SHELL, folder, *ranks])


def deliver(key: str, ssh: list[str], folder: str, targets: list[Target]) -> list[int]:
    """Lays the key down everywhere; the descriptors returned keep the directories there.

    Raises:
        SystemExit: it cannot be done on some host; ssh's words are on stderr, and its status is the exit status.
    """
    started = [_start(key, [*ssh, target.host, remote_line(folder, target.ranks)]) for target in targets]
    for target, process in zip(targets, started, strict=True):
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline().strip() != READY:
            words = process.stderr.read().decode(errors="replace").strip()
            status = process.wait()
            print(f"{target.host}: {words or 'ssh ended without a word'}", file=sys.stderr)
            raise SystemExit(status or 1)
    return [process.stdin.fileno() for process in started if process.stdin is not None]


def _start(key: str, argv: list[str]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=die_with_parent)
    assert process.stdin is not None
    try:
        process.stdin.write(f"{key}\n".encode())
        process.stdin.flush()
    except BrokenPipeError:
        process.stdin = None  # its words tell
    return process


def main(argv: list[str] | None = None) -> int:
    """Delivers and becomes the command."""
    parser = argparse.ArgumentParser(prog="python -m heturun.launch.deliver", description=__doc__)
    parser.add_argument("--ssh-config", required=True)
    parser.add_argument("--folder", required=True, help="directory to make on every target")
    parser.add_argument("--to", action="append", required=True, type=Target.parse, help="e.g. w1=2,3")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    key = sys.stdin.readline().strip()
    nothing = os.open(os.devnull, os.O_RDONLY)
    kept = deliver(key, ["ssh", "-T", "-F", options.ssh_config], options.folder, options.to)
    os.dup2(nothing, sys.stdin.fileno())
    for descriptor in kept:
        os.set_inheritable(descriptor, True)
    os.execvp(options.command[0], options.command)


if __name__ == "__main__":
    sys.exit(main())
