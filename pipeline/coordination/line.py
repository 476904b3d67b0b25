"""The line to the coordinator: a socket, its monitor, and how to make them anew.

connect ──► handshake ──► messages ──cut──► handshake: `reconnected`, what was asked is asked again
   │            └─ never: `strange`, the other end has another key
   └─ nobody listens: `broke` and `refused`
"""

from __future__ import annotations

import socket
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipeline.cluster.wire import split_address
from pipeline.coordination.messages import Message
from pipeline.core.outside import parse_json

PROBE_S = 0.5
STRANGERS_TRIES = 20  # connections that are cut before their handshake: about 2 s

_EVENTS = zmq.Event.DISCONNECTED | zmq.Event.CONNECT_RETRIED | zmq.Event.HANDSHAKE_SUCCEEDED
_EVENTS |= zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH


class Line:
    """The socket, its monitor, and how to make them anew; used by one thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes, server_key: bytes, keys: Any
    ) -> None:
        self._context, self._address, self._identity = context, address, identity
        self._server_key, self._keys = server_key, keys
        self.strange = False  # the other end does not share our key
        self._events = 0
        self._known = False  # there was a handshake once
        self._cut = 0  # connections that were cut before that
        self._again = False
        self._connect()

    def _connect(self) -> None:
        self._poller: zmq.Poller | None = None
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = self._identity
        self._socket.curve_serverkey = self._server_key
        self._socket.curve_publickey, self._socket.curve_secretkey = self._keys
        self._socket.linger = 0
        self._socket.sndhwm = 0
        self._socket.ipv6 = self._address.startswith("[")
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._socket.connect(f"tcp://{self._address}")
        self._greeted = False  # on this socket
        self._broke = False

    def renew(self) -> None:
        """Drops the connection and makes another."""
        self.close()
        self._connect()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def send(self, payload: bytes) -> None:
        self._socket.send(payload, zmq.NOBLOCK)

    def wait(self, fd: int, pause_s: float) -> bool:
        """Until a message, an event or a ring at `fd`; whether it rang."""
        if self._poller is None:
            self._poller = zmq.Poller()
            for one in (self._socket, self._monitor, fd):
                self._poller.register(one, zmq.POLLIN)
        ready = dict(self._poller.poll(int(pause_s * 1000) + 1))
        if self._monitor in ready:
            self._look()
        return fd in ready

    def receive(self) -> list[Message]:
        """All messages that have come."""
        messages = []
        while True:
            try:
                message = parse_json(self._socket.recv(zmq.NOBLOCK))
                messages.append(message if isinstance(message, dict) else {"type": "no object"})
            except ValueError as error:
                messages.append({"type": str(error)})  # which nobody knows: it is complained of
            except zmq.Again:
                return messages

    def reconnected(self) -> bool:
        """Whether the connection was made again since the last call."""
        again, self._again = self._again, False
        return again

    def broke(self) -> bool:
        """Whether the connection broke, or could not be made, since the last call."""
        broke, self._broke = self._broke, False
        return broke

    def refused(self) -> bool:
        """Whether nobody listens there any more."""
        try:
            socket.create_connection(split_address(self._address), timeout=PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # a cut cable looks like this
        return False

    def _look(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._again = self._again or self._greeted
                self._greeted = self._known = True
            elif event in (zmq.Event.DISCONNECTED, zmq.Event.CONNECT_RETRIED):
                self._broke = True
                self._cut += event == zmq.Event.DISCONNECTED
                self.strange = self.strange or (not self._known and self._cut > STRANGERS_TRIES)
            elif not self._known:
                self.strange = True
