"""Two hosts on one machine: network namespaces with hostnames w0 and w1, their own sshd and their own addresses.

    with two_hosts() as net:                         # or the pytest fixture `hosts` of test_two_hosts.py
        net.run_in("w0", ["hostname"]).wait()        # a subprocess.Popen, on that host
        net.processes_in("w1")                       # {pid: command line}, sshd itself left out

Names and addresses are random, so two test runs never meet. Everything is removed when the block ends and, by a small
watching process, also when the test process is killed; what a crashed machine left is removed after an hour.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFIX = "hrt"
NAMES = ("w0", "w1")
OLD_S = 3600.0
SSHD_CONFIG = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.{name}.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100:30:200
"""
SSH_CLIENT_CONFIG = "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"


def why_not() -> str | None:
    """Why two hosts cannot be made here, or None when they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for tool in ("ip", "sshd", "ssh", "ssh-keygen", "unshare"):
        if find(tool) is None:
            return f"no `{tool}` on this machine (apt-get install openssh-server iproute2)"
    name = f"{PREFIX}{random.getrandbits(24):06x}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


def find(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@dataclass
class TwoHosts:
    """The hosts w0 and w1; `key` is the ssh identity that both accept, `addresses` and `addresses6` where they live."""

    tag: str
    folder: Path
    addresses: dict[str, str]
    addresses6: dict[str, str]
    sshds: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def key(self) -> Path:
        return self.folder / "key"

    def namespace(self, host: str) -> str:
        return f"{PREFIX}{self.tag}{host}"

    def run_in(self, host: str, argv: list[str], **popen: Any) -> subprocess.Popen[Any]:
        """Starts `argv` on `host`; keywords go to Popen."""
        return subprocess.Popen(self.command(host, argv), **popen)

    def command(self, host: str, argv: list[str]) -> list[str]:
        named = f'hostname {host}; exec "$@"'
        return ["ip", "netns", "exec", self.namespace(host), "unshare", "-u", "sh", "-c", named, host, *argv]

    def processes_in(self, host: str) -> dict[int, str]:
        """The processes of `host` and their command lines; the ssh server is left out."""
        shown = subprocess.run(
            ["ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, timeout=20
        )
        lines = {int(pid): command_line(int(pid)) for pid in shown.stdout.split()}
        return {pid: line for pid, line in lines.items() if line and not line.startswith(("sshd", "/usr/sbin/sshd"))}

    def wait_until_empty(self, *, within_s: float) -> dict[str, dict[int, str]]:
        """Waits until no host has a process left; returns those that stayed, by host ({} is what a test wants)."""
        deadline = time.monotonic() + within_s
        while True:
            left = {host: found for host in NAMES if (found := self.processes_in(host))}
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.05)

    def limit(self, host: str, rate: str) -> None:
        """Slows what `host` sends down to `rate`, e.g. "100mbit"."""
        inside = ["ip", "netns", "exec", self.namespace(host), "tc", "qdisc", "replace", "dev", "e0", "root", "tbf"]
        shell(*inside, "rate", rate, "burst", "256kbit", "latency", "400ms")

    def unplug(self, host: str) -> None:
        shell("ip", "-n", self.namespace(host), "link", "set", "e0", "down")

    def plug(self, host: str) -> None:
        shell("ip", "-n", self.namespace(host), "link", "set", "e0", "up")
        shell("ip", "-n", self.namespace(host), "addr", "replace", f"{self.addresses6[host]}/64", "dev", "e0", "nodad")

    def switch_off(self, host: str) -> None:
        """For good, at once: nobody hears a last word of it."""
        self.unplug(host)
        remove_host(self.tag, host)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Makes w0 and w1; skips the running test, saying why, where that is not possible."""
    reason = why_not()
    if reason is not None:
        import pytest

        pytest.skip(reason)
    remove_leftovers()
    tag = f"{random.getrandbits(24):06x}"
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{tag}-"))
    watcher = subprocess.Popen(
        [sys.executable, __file__, tag, str(folder)], stdin=subprocess.PIPE, start_new_session=True, close_fds=True
    )
    assert watcher.stdin is not None
    os.set_inheritable(watcher.stdin.fileno(), False)
    net = TwoHosts(tag, folder, *random_addresses())
    try:
        build(net)
        yield net
    finally:
        clean(tag, folder)
        for sshd in net.sshds:
            sshd.wait(10)
        watcher.stdin.close()
        watcher.wait(30)


def random_addresses() -> tuple[dict[str, str], dict[str, str]]:
    """A subnet of 10.0.0.0/8 that this machine does not use yet, and a private IPv6 one."""
    used = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, timeout=20).stdout
    while True:
        a, b = random.randrange(64, 250), random.randrange(1, 250)
        if f" 10.{a}.{b}." not in used:
            break
    v6 = f"fd{random.getrandbits(8):02x}:{random.getrandbits(16):x}:{random.getrandbits(16):x}::"
    return (
        {host: f"10.{a}.{b}.{10 + i}" for i, host in enumerate(NAMES)},
        {host: f"{v6}1{i}" for i, host in enumerate(NAMES)},
    )


def build(net: TwoHosts) -> None:
    """Bridge, namespaces, cables, /etc/hosts, keys, and one sshd on each host."""
    bridge = f"{PREFIX}{net.tag}b"
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("key", "host_key"):
        shell("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(net.folder / name))
    shell("ip", "link", "add", bridge, "type", "bridge")
    shell("ip", "link", "set", bridge, "up")
    for i, host in enumerate(NAMES):
        space, cable = net.namespace(host), f"{PREFIX}{net.tag}{i}"
        shell("ip", "netns", "add", space)
        shell("ip", "link", "add", cable, "type", "veth", "peer", "name", "e0", "netns", space)
        shell("ip", "link", "set", cable, "master", bridge, "up")
        shell("ip", "-n", space, "addr", "add", f"{net.addresses[host]}/24", "dev", "e0")
        shell("ip", "-n", space, "addr", "add", f"{net.addresses6[host]}/64", "dev", "e0", "nodad")
        shell("ip", "-n", space, "link", "set", "e0", "up")
        shell("ip", "-n", space, "link", "set", "lo", "up")
        write_etc(net, host)
    for host in NAMES:
        start_sshd(net, host)


def write_etc(net: TwoHosts, host: str) -> None:
    """/etc/netns/NAME/* is mounted over /etc/* by `ip netns exec`. As on Debian, the own name is 127.0.1.1 too."""
    etc = Path("/etc/netns") / net.namespace(host)
    (etc / "ssh").mkdir(parents=True)
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {host}"]
    lines += [f"{net.addresses[name]} {name} {name}.example.org" for name in NAMES]
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    (etc / "ssh" / "ssh_config").write_text(SSH_CLIENT_CONFIG)


def start_sshd(net: TwoHosts, host: str) -> None:
    config, log = net.folder / f"sshd.{host}.conf", net.folder / f"sshd.{host}.log"
    config.write_text(SSHD_CONFIG.format(folder=net.folder, name=host))
    argv = [str(find("sshd")), "-D", "-e", "-f", str(config)]
    with log.open("wb") as out:
        net.sshds.append(net.run_in(host, argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
    deadline = time.monotonic() + 20
    while not (net.folder / f"sshd.{host}.pid").exists():
        if net.sshds[-1].poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"sshd of {host} did not start: {log.read_text()}")
        time.sleep(0.02)


def clean(tag: str, folder: Path | None) -> None:
    """Ends every process of both hosts and removes whatever `build` made; harmless when done twice."""
    for host in NAMES:
        remove_host(tag, host)
    for link in (f"{PREFIX}{tag}b", f"{PREFIX}{tag}0", f"{PREFIX}{tag}1"):
        subprocess.run(["ip", "link", "del", link], capture_output=True, timeout=20)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def remove_host(tag: str, host: str) -> None:
    """Ends every process of a host, and the host."""
    space = f"{PREFIX}{tag}{host}"
    deadline = time.monotonic() + 10
    while (pids := pids_in(space)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=20)
    shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def pids_in(space: str) -> list[int]:
    shown = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=20)
    return [int(pid) for pid in shown.stdout.split()]


def remove_leftovers() -> None:
    """Removes hosts that an earlier run left more than an hour ago."""
    spaces = Path("/run/netns").glob(f"{PREFIX}*w0") if Path("/run/netns").is_dir() else iter(())
    for space in list(spaces):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - space.stat().st_mtime > OLD_S:
                tag = space.name[len(PREFIX) : -2]
                folders = list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{tag}-*"))
                clean(tag, folders[0] if folders else None)


def command_line(pid: int) -> str:
    """The command line of a process; "" when it has just ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def shell(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def watch(tag: str, folder: Path) -> None:
    """Waits until the test process ends or is killed (its end of the pipe closes), then cleans up after it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean(tag, folder)


if __name__ == "__main__":
    watch(sys.argv[1], Path(sys.argv[2]))
