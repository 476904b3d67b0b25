"""Names and addresses: which host of a cluster file is this machine, and by which address others can reach it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import UserError

LOCAL = "localhost"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def own_names() -> frozenset[str]:
    """The names that mean this machine without asking the network: localhost, the hostname and its first part."""
    name = socket.gethostname()
    return frozenset({LOCAL, name, name.partition(".")[0]})


def is_here(host: str, address: str | None = None) -> bool:
    """Whether a host of the cluster file is this machine: by its address or, without one, by its name."""
    if address is None and host in own_names():
        return True
    found = resolve(address or host)
    return found is not None and (found.is_loopback or can_bind(found))


def is_meant(host: str, address: str | None = None) -> bool:
    """As `is_here`, but the network is asked only about hosts with an address: for looking without touching."""
    return is_here(host, address) if address is not None else host in own_names()


def resolve(host: str) -> Address | None:
    """The first address of a name that is not on the loopback, else a loopback one, else None."""
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return None
    found = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
    return next((address for address in found if not address.is_loopback), found[0] if found else None)


def can_bind(address: Address) -> bool:
    """Whether an address belongs to this machine."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`; nothing is sent.

    Raises:
        UserError: the name has no address, or there is no way there.
    """
    target = resolve(host)
    if target is None:
        raise UserError(f"host {host} has no address; correct its name or give it `address:` in the cluster file")
    family = socket.AF_INET6 if target.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(target), 9))
        except OSError as error:
            raise UserError(f"host {host} ({target}): {error.strerror}; check the network or its `address:`") from error
        return str(sock.getsockname()[0])


def num_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs a process here may use, as far as can be told without CUDA."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    here = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


def subnet_holding(own: str, others: Iterable[str]) -> str | None:
    """The subnet of this machine's address `own`, e.g. "10.0.0.0/24", if it holds all the others too."""
    import psutil

    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.address.partition("%")[0] == own and entry.netmask and ":" not in own:
                network = ipaddress.ip_network(f"{own}/{entry.netmask}", strict=False)
                found = [resolve(other) for other in others]
                return str(network) if all(address is not None and address in network for address in found) else None
    return None
