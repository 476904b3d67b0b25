"""Frames between replicas: a fixed header, then raw bytes, over authenticated TCP.

    | kind | sender pipeline | its generation | round | part | bytes that follow | bytes ...

Sockets block in the kernel with the kernel's deadlines, so that a frame costs one or two system calls, without the GIL.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.cluster.wire import prove, split_address
from pipeline.core.outside import parse_json
from pipeline.transport.protocol import DTYPES

SOCKET_BYTES = 4 << 20  # a buffer that takes a whole small model, so that its sender need not wait for its receiver
MAX_BYTES = 1 << 40  # that may follow a header
MOST_PIECES = 512  # of one system call; Linux takes 1024
ALIGNED = 64  # bytes, where a tensor of a state begins
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

View = memoryview


class Kind(IntEnum):
    """What a frame says; of those below the line, each gets one answer on its own connection."""

    PART = 0  # one member's part of a round
    GAVE_UP = 1  # this member cannot finish the round, since pipeline `part` was lost
    BYE = 2  # the connection ends in good order
    # ----
    SWAP = 3
    STATE = 4
    ANSWER = 5
    REFUSED = 6  # the bytes say why


class Header(NamedTuple):
    kind: int
    sender: int
    generation: int
    round: int = 0
    part: int = 0
    nbytes: int = 0


_HEADER = struct.Struct("!BIIqIQ")
_KINDS = frozenset(Kind)
_LENGTH = struct.Struct("!Q")


def send_frame(sock: socket.socket, header: Header, *payload: View | bytes) -> int:
    """Sends one frame, whose payload may lie in pieces, and returns its bytes, header included.

    Raises:
        TimeoutError: the other end took nothing before the socket's deadline.
        OSError: the connection is gone.
    """
    head = _HEADER.pack(*header._replace(nbytes=sum(map(len, payload))))
    pieces: list[View] = [View(head), *(View(piece) for piece in payload)]
    total, first = sum(map(len, pieces)), 0
    with _deadlines_are_timeouts():
        while first < len(pieces):
            sent = sock.sendmsg(pieces[first : first + MOST_PIECES])
            while first < len(pieces) and sent >= len(pieces[first]):
                sent -= len(pieces[first])
                first += 1
            if sent:
                pieces[first] = pieces[first][sent:]
    return total


def receive_header(sock: socket.socket) -> Header:
    """The next frame's header.

    Raises:
        EOFError: the other end closed the connection.
        OSError: it is gone, the deadline passed, or what came is no header.
    """
    head = bytearray(_HEADER.size)
    receive_into(sock, View(head))
    header = Header(*_HEADER.unpack(head))
    if header.kind not in _KINDS or header.nbytes > MAX_BYTES:
        raise ConnectionError(
            f"a frame of kind {header.kind} and {header.nbytes} bytes: the other end speaks otherwise"
        )
    return header


def receive_into(sock: socket.socket, view: View) -> None:
    """Fills `view`; raises as `receive_header` does."""
    with _deadlines_are_timeouts():
        while len(view):
            count = sock.recv_into(view, 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError
            view = view[count:]


@contextlib.contextmanager
def _deadlines_are_timeouts() -> Iterator[None]:
    """The kernel reports its deadline as EAGAIN."""
    try:
        yield
    except BlockingIOError as error:
        raise TimeoutError("no progress before the deadline") from error


def mesh_key(key: bytes) -> bytes:
    """The job's key as it is used here: who may speak to the launcher does not thereby speak to replicas."""
    return hmac.digest(key, b"mesh", "sha256")


def dial(address: str, key: bytes, *, timeout_s: float, keep: Callable[[socket.socket], object]) -> socket.socket:
    """Connects and proves the key; `keep` gets the socket before anything can block, so that others may end it.

    Raises:
        OSError: nobody listens there, it does not hold the key, or no answer in time.
    """
    host, port = split_address(address)
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        keep(sock)
        tune(sock)
        sock.settimeout(timeout_s)
        sock.connect(where)
        prove(sock, key, address)
        set_deadline(sock, timeout_s)
    except OSError:
        sock.close()
        raise
    return sock


def listen(host: str) -> socket.socket:
    """Listens on a free port of the interface with address `host`, and on no other."""
    family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune(sock)  # accepted connections inherit it, the size of buffers in time for the window to scale
        sock.bind(where)
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock


def tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if SOCKET_BYTES:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)


def set_deadline(sock: socket.socket, timeout_s: float, *, receiving: bool = True) -> None:
    """From now on calls block in the kernel, each for this long at most."""
    sock.settimeout(None)
    seconds = int(timeout_s)
    value = struct.pack("ll", seconds, max(1, int((timeout_s - seconds) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
    if receiving:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def say_bye(sock: socket.socket) -> None:
    """Says that the end of this connection is in good order, if that costs no waiting; nobody may be sending."""
    with contextlib.suppress(OSError):
        sock.send(_HEADER.pack(*Header(Kind.BYE, 0, 0)), socket.MSG_DONTWAIT)


def hang_up(sock: socket.socket) -> None:
    """Ends a connection whoever uses it: blocked calls return."""
    with contextlib.suppress(OSError):  # it was not connected any more
        sock.shutdown(socket.SHUT_RDWR)


def is_cut(sock: socket.socket) -> bool:
    """Whether the other end of a connection on which it never sends has gone away."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def view_of(tensor: Tensor) -> View:
    """The bytes of a contiguous (n,) tensor in host memory."""
    return tensor.detach().view(torch.uint8).numpy().data


def pack_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> list[View | bytes]:
    """Tensors and JSON values as the pieces of one payload, which are the tensors' own memory.

    | length of the head | head: JSON, padded | tensor, padded | tensor, padded ...
    """
    flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in tensors.items()}
    body: list[View | bytes] = []
    places, at = {}, 0
    for name, tensor in flat.items():
        places[name] = [str(tensor.dtype).removeprefix("torch."), list(tensors[name].shape), at]
        padding = -tensor.nbytes % ALIGNED
        body += [view_of(tensor), bytes(padding)] if tensor.nbytes else []
        at += tensor.nbytes + padding
    head = json.dumps({"tensors": places, "values": values}).encode()
    head += b" " * (-(len(head) + _LENGTH.size) % ALIGNED)
    return [_LENGTH.pack(len(head)), head, *body]


def unpack_state(data: bytearray) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack_state`; the tensors lie in `data`.

    Raises:
        ValueError: these bytes are not what `pack_state` returns.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        begin = _LENGTH.size + length
        head = parse_json(data[_LENGTH.size : begin])
        places = head["tensors"].items()
        found = {name: _tensor_in(data, dtype, shape, begin + at) for name, (dtype, shape, at) in places}
        values: dict[str, Any] = head["values"]
    except (struct.error, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{len(data)} bytes are not the state of a replica: {error}") from None
    return found, values


def _tensor_in(data: bytearray, dtype: str, shape: list[int], at: int) -> Tensor:
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=DTYPES_BY_NAME[dtype])
    return torch.frombuffer(data, dtype=DTYPES_BY_NAME[dtype], count=count, offset=at).view(shape)
