"""Authenticated messages over TCP: the one format that launcher, agents and training processes speak.

client                                server          both hold the secret key of the job
  <----------------------- nonce s ---
  --- nonce c, HMAC(key, "c" s c) --->                a stranger learns nothing and is dropped
  <------------- HMAC(key, "s" c s) ---
  <==== 4-byte length, JSON object, sealed ===>     (pipeline.cluster.seal) so that secrets may be sent
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

from pipeline.cluster.seal import Sealer

Message = dict[str, Any]

MAX_FRAME_BYTES = 64 << 20
NONCE_BYTES = 32
DIGEST_BYTES = 32
HANDSHAKE_S = 10.0  # for the whole of it, however slowly its bytes come
TURNED_AWAY_S = (0.1, 0.3, 0.9)  # a busy server ends connections that are not through; after so long they try again
LOST_S = 5  # a host that was switched off or cut off counts as lost after about this long
OUTAGE_S = 120  # the same for elastic jobs, which go on meanwhile: the cable may be plugged in again
PROBE_AFTER_S = 2  # of quiet the other host is asked, every second, whether it is still there
TCP_INFO_BYTES, LAST_ACK_RECEIVED = 104, 56  # of Linux's struct tcp_info, and where it has that, in milliseconds


class Channel:
    """One end of a connection; `send` may be called by several threads, `receive` by one.

    `sends`, `receives`: seal what goes either way. `lost_s`: an other end that is silent for so long counts as gone.
    """

    def __init__(self, sock: socket.socket, *, sends: Sealer, receives: Sealer, lost_s: int = LOST_S) -> None:
        self._sock, self._sends, self._receives = sock, sends, receives
        self._sending = threading.Lock()
        sock.settimeout(None)
        _keep_alive(sock, lost_s)

    def send(self, message: Message) -> None:
        """Sends one message; raises `OSError` when the connection is gone."""
        data = json.dumps(message).encode()
        with self._sending:
            sealed = self._sends.close(data)
            self._sock.sendall(struct.pack(">I", len(sealed)) + sealed)

    def receive(self) -> Message | None:
        """The next message; None when the other end went away, however it went, or somebody meddles."""
        try:
            (length,) = struct.unpack(">I", _read(self._sock, 4))
            if length > MAX_FRAME_BYTES:
                return None
            message = json.loads(self._receives.open(_read(self._sock, length)))
        except (OSError, EOFError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def finish(self) -> None:
        """Says that no more will be sent; what was sent still arrives."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection and wakes a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # it was not connected any more
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    @property
    def silent_s(self) -> float:
        """For how long nothing has come from the other host, not even its kernel's answers; 0 if that is not known."""
        if sys.platform != "linux":
            return 0.0
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:
            return 0.0  # closed
        (milliseconds,) = struct.unpack_from("=I", info, LAST_ACK_RECEIVED)
        return float(milliseconds) / 1000

    @property
    def own_address(self) -> str:
        """The address of this end: the one by which the other end can reach this host."""
        return plain_address(str(self._sock.getsockname()[0]))

    @property
    def peer_address(self) -> str:
        return plain_address(str(self._sock.getpeername()[0]))


def connect(address: str, key: bytes, *, timeout_s: float, lost_s: int = LOST_S) -> Channel:
    """Connects to "host:port" (or "[v6]:port") and proves both ends' knowledge of the key.

    `lost_s`: as of `Channel`.

    Raises:
        OSError: nobody listens there, or no answer in time.
        PermissionError: the other end does not hold the key.
    """
    for pause_s in TURNED_AWAY_S:
        try:
            return _connect(address, key, timeout_s=timeout_s, lost_s=lost_s)
        except (PermissionError, ConnectionResetError):
            time.sleep(pause_s)
    return _connect(address, key, timeout_s=timeout_s, lost_s=lost_s)


def _connect(address: str, key: bytes, *, timeout_s: float, lost_s: int) -> Channel:
    sock = socket.create_connection(split_address(address), timeout=timeout_s)
    try:
        nonces = prove(sock, key, address)
    except OSError:
        sock.close()
        raise
    return Channel(sock, sends=Sealer(key, b"c", nonces), receives=Sealer(key, b"s", nonces), lost_s=lost_s)


def prove(sock: socket.socket, key: bytes, address: str) -> bytes:
    """The client's half of the handshake on a connected socket, whose deadline counts; returns both ends' nonces.

    Raises:
        PermissionError: the other end, at `address`, does not hold the key.
        OSError: no answer in time.
    """
    try:
        theirs, ours = _read(sock, NONCE_BYTES), os.urandom(NONCE_BYTES)
        sock.sendall(ours + _digest(key, b"c" + theirs + ours))
        answer = _read(sock, DIGEST_BYTES)
    except EOFError as error:
        raise PermissionError(f"{address} refused the key of this job") from error
    if not hmac.compare_digest(answer, _digest(key, b"s" + ours + theirs)):
        raise PermissionError(f"{address} does not hold the key of this job")
    return theirs + ours


def accepted(sock: socket.socket, key: bytes, nonces: bytes, *, lost_s: int = LOST_S) -> Channel:
    """The server's end of a connection that `admit` has let in, with these nonces."""
    return Channel(sock, sends=Sealer(key, b"s", nonces), receives=Sealer(key, b"c", nonces), lost_s=lost_s)


def admit(sock: socket.socket, key: bytes) -> bytes | None:
    """Both ends' nonces if the other end of an accepted connection holds the key; a stranger's connection is closed."""
    deadline = time.monotonic() + HANDSHAKE_S
    sock.settimeout(HANDSHAKE_S)
    try:
        ours = os.urandom(NONCE_BYTES)
        sock.sendall(ours)
        answer = _read(sock, NONCE_BYTES + DIGEST_BYTES, deadline)
        theirs, digest = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if hmac.compare_digest(digest, _digest(key, b"c" + ours + theirs)):
            sock.sendall(_digest(key, b"s" + theirs + ours))
            return ours + theirs
    except (OSError, EOFError):
        pass  # a port scanner, or a client that gave up
    sock.close()
    return None


def listen(*, only_here: bool) -> socket.socket:
    """A listening socket on a free port: on the loopback, or on every address of this host (with IPv6 if it is on)."""
    if only_here:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError:
            pass  # IPv6 is compiled in but switched off
    return socket.create_server(("0.0.0.0", 0), backlog=1024)


def join_address(host: str, port: int) -> str:
    """ "10.0.0.1:80" or "[fd00::1]:80"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r}: expected host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def plain_address(address: str) -> str:
    """An IPv4 address seen through an IPv6 socket (::ffff:10.0.0.1) without its wrapping."""
    return address.removeprefix("::ffff:") if "." in address else address


def _digest(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _read(sock: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """So many bytes; a deadline counts for all of them together."""
    parts: list[bytes] = []
    while count > 0:
        if deadline is not None:
            sock.settimeout(max(1e-3, deadline - time.monotonic()))
        part = sock.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _keep_alive(sock: socket.socket, lost_s: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER_S),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", lost_s - PROBE_AFTER_S),
        ("TCP_USER_TIMEOUT", lost_s * 1000),
    ):
        if hasattr(socket, name):  # they are Linux's
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
