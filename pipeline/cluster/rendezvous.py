"""How the processes of a job find each other: addresses, interfaces, and rank 0's key-value store.

    rank 0     binds a free port at its own address ──► says where, through heturun or MPI
    the others                                      ◄── connect to it

Under torchrun and srun the place is agreed beforehand. What goes through the store is sealed with the job's key
(`pipeline.cluster.sealed_store`): heturun's, HETURUN_KEY, or under mpirun one that rank 0 gives out through MPI.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from pipeline.cluster.identity import Identity, import_mpi
from pipeline.cluster.sealed_store import job_key, sealed
from pipeline.core.outside import parse_json
from pipeline.errors import Forged, PeerLost, UserError

STORE_KEY = "store"
_EXCHANGE_BYTES = 4096
_LOCAL_ADDRESS = "127.0.0.1"
_PAUSE_S = 1e-3


class Channel(Protocol):
    """What is needed of the launcher's control channel (`pipeline.cluster.control.Control`)."""

    def publish(self, key: str, value: str) -> None: ...
    def lookup(self, key: str, *, timeout_s: float) -> str: ...
    def progress(self, done: int, total: int, text: str) -> None: ...
    def failed(self, message: str, *, secondary: bool, status: int | None = None) -> None: ...
    def elastic(self, min_replicas: int) -> None: ...


class Networks(dict[str, tuple[str, ...]]):
    """Interface name -> its addresses as "192.168.1.7/24"; only those that are up, none of them link-local."""

    def owner(self, address: str) -> str | None:
        """The interface that has this address."""
        wanted = ipaddress.ip_address(address)
        for name, entries in self.items():
            if any(ipaddress.ip_interface(entry).ip == wanted for entry in entries):
                return name
        return None

    def reachable(self) -> tuple[str, ...]:
        """Addresses, with prefix, that other hosts may use; IPv4 first."""
        entries = [entry for entries in self.values() for entry in entries]
        outside = [entry for entry in entries if not ipaddress.ip_interface(entry).is_loopback]
        return tuple(sorted(outside, key=lambda entry: ipaddress.ip_interface(entry).version))


def networks() -> Networks:
    """This host's, from the kernel."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[str]] = {name: [] for name in psutil.net_if_addrs() if name in up}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                if not address.is_link_local:
                    found[name].append(f"{address}/{_prefix(entry.netmask, address.max_prefixlen)}")
    return Networks({name: tuple(entries) for name, entries in found.items() if entries})


def _prefix(netmask: str | None, longest: int) -> int:
    if not netmask:
        return longest
    return bin(int(ipaddress.ip_address(netmask))).count("1")


def choose_address(environment: Mapping[str, str], here: Networks, *, one_host: bool, towards: str | None) -> str:
    """The address of this host that its peers are told.

    Args:
        here: this host's interfaces.
        one_host: the whole job is here, so that the loopback does.
        towards: an address of rank 0, to choose the interface on the way to it.

    Raises:
        UserError: HETURUN_INTERFACE does not exist, HETURUN_ADDRESS is not known, or there is no network.
    """
    given, interface = environment.get("HETURUN_ADDRESS"), environment.get("HETURUN_INTERFACE")
    if given:
        return _resolve(given, here)
    if interface:
        return _address_of_interface(interface, here)
    if one_host:
        return _LOCAL_ADDRESS
    routed = _route(towards) if towards else None
    if routed:
        return routed
    outside = here.reachable()
    if not outside:
        raise UserError("a job of several hosts needs a network, and no interface but the loopback is up")
    return _bare(outside[0])


def _resolve(given: str, here: Networks) -> str:
    """An address as it is; of a name the first address that is not the loopback's, as 127.0.1.1 of stock Debian is."""
    try:
        return str(ipaddress.ip_address(given))
    except ValueError:
        pass  # a name
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(given, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise UserError(f"address {given}: {error}; give a number such as 10.0.0.1 in the cluster file") from error
    outside = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    return next(iter(outside), None) or next(map(_bare, here.reachable()), _LOCAL_ADDRESS)


def _address_of_interface(name: str, here: Networks) -> str:
    if name not in here:
        raise UserError(f"interface {name} is not up on this host, which has {', '.join(here)}; correct `interface`")
    return _bare(here[name][0])


def _route(towards: str) -> str | None:
    """This host's address on the way to another; None if that is the loopback or there is no way."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # of a datagram socket: sends nothing
            found = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found


def _bare(entry: str) -> str:
    return entry.partition("/")[0]


def common_address(everyone: Sequence[Sequence[str]]) -> str:
    """Rank 0's address in a network that all ranks are in, of each rank's "address/prefix"; else its first.

    >>> common_address([["10.9.0.1/24", "192.168.7.1/24"], ["172.17.0.1/16", "192.168.7.2/24"]])
    '192.168.7.1'
    """
    for entry in everyone[0]:
        network = ipaddress.ip_interface(entry).network
        if all(any(ipaddress.ip_interface(other).network == network for other in rank) for rank in everyone):
            return _bare(entry)
    if not everyone[0]:
        raise UserError("a job of several hosts needs a network, and rank 0's host has only the loopback")
    return _bare(everyone[0][0])


def set_interface(environment: MutableMapping[str, str], address: str, here: Networks) -> None:
    """Tells Gloo and NCCL to use the interface that owns `address`, unless the user has chosen one.

    Raises:
        UserError: no interface of this host has the address.
    """
    interface = environment.get("HETURUN_INTERFACE") or here.owner(address)
    if interface is None:
        have = ", ".join(f"{name} {_bare(entry)}" for name, entries in here.items() for entry in entries)
        raise UserError(f"address {address} is not of this host, which has {have}; correct `address` or `interface`")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.setdefault(name, interface)


class Meeting(NamedTuple):
    """Where processes have met. Keep it while the store is used: C++ does not keep Python's objects.

    `address` is this process's own; `key` is the job's, or None where nobody gave one, so that the store is open.
    """

    store: Store
    address: str
    key: bytes | None


def open_store(me: Identity, control: Channel | None, *, timeout_s: float, rank_zero: str) -> Meeting:
    """The store that rank 0 holds, connected; sets the interface variables.

    Raises:
        PeerLost: rank 0 (described by `rank_zero`) did not appear in time.
        UserError: the addresses, ports or the key cannot be used.
    """
    here, key = networks(), job_key(os.environ)
    if me.meeting is not None:
        towards = me.meeting[0] if me.rank else None
        address = choose_address(os.environ, here, one_host=me.one_host, towards=towards)
        set_interface(os.environ, address, here)
        store = _agreed_store(me, me.meeting, address, here, timeout_s=timeout_s, rank_zero=rank_zero)
    elif control is not None:
        address = choose_address(os.environ, here, one_host=me.one_host, towards=None)
        set_interface(os.environ, address, here)
        store = _published_store(control, STORE_KEY, address, serves=me.rank == 0, timeout_s=timeout_s, who=rank_zero)
    else:
        store, address, key = _mpi_store(me, here, key, timeout_s=timeout_s, rank_zero=rank_zero)
    return Meeting(sealed(store, key), address, key)


def read_value(store: Store, name: str) -> Any:
    """The JSON value under a name that is there.

    Raises:
        Forged: what is there is no JSON, or not sealed with the job's key.
    """
    try:
        return parse_json(store.get(name))
    except ValueError as error:
        raise Forged(f"no process of this job wrote what the store has under {name!r}: {error}") from None


def _agreed_store(
    me: Identity, place: tuple[str, int], address: str, here: Networks, *, timeout_s: float, rank_zero: str
) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT: rank 0's, or torchrun's own."""
    if me.rank or me.hosted:
        return _connect(place, timeout_s=timeout_s, rank_zero=rank_zero)
    host = listening_address(place[0], address, here, one_host=me.one_host)
    return _serve(host, timeout_s, port=place[1])[0]


def listening_address(agreed: str, address: str, here: Networks, *, one_host: bool) -> str:
    """Where rank 0 listens: at the one of its addresses that MASTER_ADDR means to the others, and at no other.

    Args:
        agreed: MASTER_ADDR, which a host's own name service may take for its loopback (127.0.1.1 on stock Debian), or
            which is not of this host, where something in between passes connections on.
        address: this process's own; taken where the agreed one does not tell.
    """
    found: list[str] = []
    with suppress(OSError):  # not even known here: the others may know better
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(agreed, None, type=socket.SOCK_STREAM)]
    loopback = {each: ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found}
    mine = [each for each in found if loopback[each] or here.owner(each) is not None]
    for each in mine:
        if loopback[each] == one_host:
            return each
    return mine[0] if one_host and mine else address


def _published_store(control: Channel, name: str, address: str, *, serves: bool, timeout_s: float, who: str) -> Store:
    """A store of which the one who serves it (`who`, in words) says through the launcher where it is."""
    try:
        if serves:
            store, place = _serve(address, timeout_s)
            control.publish(name, json.dumps(place))
            return store
        host, port = json.loads(control.lookup(name, timeout_s=timeout_s))
    except ConnectionError as error:
        raise PeerLost(f"the launcher went away: {error}") from error
    except TimeoutError as error:
        raise PeerLost(f"waited {timeout_s:g} s for {who} to say where it listens") from error
    return _connect((host, port), timeout_s=timeout_s, rank_zero=who)


def pipeline_store(
    control: Channel, address: str, here: Networks, *, name: str, serves: bool, timeout_s: float
) -> Store:
    """A store of one pipeline, held by its first stage; sets the interface variables. Keep it while it is used.

    Raises:
        PeerLost: the first stage did not say in time where it is.
    """
    set_interface(os.environ, address, here)
    store = _published_store(
        control,
        f"{STORE_KEY} of {name}",
        address,
        serves=serves,
        timeout_s=timeout_s,
        who=f"the first stage of {name}",
    )
    return sealed(store, job_key(os.environ))


def _mpi_store(
    me: Identity, here: Networks, key: bytes | None, *, timeout_s: float, rank_zero: str
) -> tuple[Store, str, bytes]:
    """Rank 0's store, this process's address, and the job's key: rank 0 makes one where HETURUN_KEY gives none."""
    address = _LOCAL_ADDRESS
    if not me.one_host:
        everyone = exchange(list(here.reachable()), timeout_s=timeout_s)
        address = common_address(everyone)
        if me.rank:
            address = choose_address(os.environ, here, one_host=False, towards=address)
    set_interface(os.environ, address, here)
    store, told = None, None
    if me.rank == 0:
        store, place = _serve(address, timeout_s)
        told = [*place, None if key else secrets.token_hex(32)]
    host, port, made = exchange(told, timeout_s=timeout_s)[0]
    if store is None:
        store = _connect((host, port), timeout_s=timeout_s, rank_zero=rank_zero)
    return store, address, bytes.fromhex(made) if made else _same_key(key)


def _same_key(key: bytes | None) -> bytes:
    if key is None:
        raise UserError("HETURUN_KEY is set on rank 0 only; give it to every process, as with mpirun -x HETURUN_KEY")
    return key


def _serve(address: str, timeout_s: float, *, port: int = 0) -> tuple[Store, tuple[str, int]]:
    """A store at that address only, at a free port or the given one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier job has just left it
        listener.bind((address, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use on this host; set MASTER_PORT to a free one") from error
        raise UserError(f"cannot listen at {address}: {error}; correct `address` in the cluster file") from error
    port = listener.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, (address, port)


def _connect(place: tuple[str, int], *, timeout_s: float, rank_zero: str) -> Store:
    timeout = timedelta(seconds=timeout_s)
    try:
        return TCPStore(place[0], place[1], is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise PeerLost(f"waited {timeout_s:g} s for {rank_zero} at {place[0]}, port {place[1]}") from error


def exchange(value: Any, *, timeout_s: float) -> list[Any]:
    """Every MPI rank's JSON-able value, in the order of ranks; raises `PeerLost` if one does not come in time."""
    mpi = import_mpi()
    world = mpi.COMM_WORLD
    text = json.dumps(value).encode()
    if len(text) > _EXCHANGE_BYTES:
        raise ValueError(f"a value of {len(text)} bytes does not fit in {_EXCHANGE_BYTES}")
    mine, everyone = bytearray(text.ljust(_EXCHANGE_BYTES)), bytearray(_EXCHANGE_BYTES * world.Get_size())
    request = world.Iallgather([mine, mpi.BYTE], [everyone, mpi.BYTE])
    deadline = time.monotonic() + timeout_s
    while not request.Test():
        if time.monotonic() >= deadline:
            raise PeerLost(f"waited {timeout_s:g} s for the other MPI ranks to start")
        time.sleep(_PAUSE_S)
    pieces = range(0, len(everyone), _EXCHANGE_BYTES)
    return [parse_json(everyone[at : at + _EXCHANGE_BYTES]) for at in pieces]
