"""The launcher's end of the control channel: starts agents' work, keeps the published values, passes events on.

One thread per connection, for a job has two per rank; every event goes to `deliver`, in the order in which it
arrived on its connection.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from heturun.launch.outcome import (
    USERS_MISTAKE,
    Closed,
    Elastic,
    Event,
    Exited,
    Failed,
    Joined,
    Lost,
    Output,
    Progress,
    Published,
    Silent,
    Started,
    Wanted,
)
from pipeline.cluster import wire
from pipeline.cluster.edition import Editions, introduction
from pipeline.cluster.porch import Porch, raise_file_limit

SILENT_S = 5.0  # an agent's host that has not answered for so long is said to be silent
LOOK_EVERY_S = 0.5
WENT_AWAY = "the agent that ran it went away: it was killed, or its host was cut off"


class Board:
    """Values under keys, and who waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, str] = {}
        self._waiting: dict[str, list[Callable[[str], None]]] = {}

    def publish(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value
            waiting = self._waiting.pop(key, [])
        for answer in waiting:
            answer(value)

    def lookup(self, key: str, answer: Callable[[str], None]) -> bool:
        """Calls `answer` with the value: now, or when it is published; whether it was there."""
        with self._lock:
            if key not in self._values:
                self._waiting.setdefault(key, []).append(answer)
                return False
            value = self._values[key]
        answer(value)
        return True


class Mail:
    """Messages for processes, by rank; those for one that is not connected wait until it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: dict[int, wire.Channel] = {}
        self._waiting: dict[int, list[wire.Message]] = {}

    def connected(self, rank: int, channel: wire.Channel) -> None:
        """From now on `channel` leads to the process; of several connections the latest counts."""
        with self._lock:
            self._channels[rank] = channel
            for message in self._waiting.pop(rank, []):
                _send(channel, message)

    def send(self, rank: int, message: wire.Message) -> None:
        with self._lock:
            if rank in self._channels:
                _send(self._channels[rank], message)
            else:
                self._waiting.setdefault(rank, []).append(message)


class Served(NamedTuple):
    """Whom an agent serves."""

    ranks: tuple[int, ...]
    incarnation: int


class Hub:
    """Listens for the agents and the processes of one job.

    Args:
        key: the job's secret.
        only_here: listen on the loopback alone.
        lost_s: silence of a host that ends its connections; if it is long, silent agents are told of before.
        start: the start message for an agent's ranks in an incarnation.
        deliver: is called with every event, by several threads.
    """

    def __init__(
        self,
        key: bytes,
        *,
        only_here: bool,
        lost_s: int = wire.LOST_S,
        start: Callable[[Sequence[int], int], wire.Message],
        deliver: Callable[[Event], None],
    ) -> None:
        self._key, self._start, self._deliver, self._lost_s = key, start, deliver, lost_s
        self._board, self._mail = Board(), Mail()
        self._agents: dict[wire.Channel, Served] = {}
        self._silent: set[wire.Channel] = set()  # agents that were said to be
        self._closed = threading.Event()
        self._order: str | None = None  # what agents that come late are told as well
        self._given_up: set[tuple[int, int]] = set()  # ranks and incarnations that must not start any more
        self._lock = threading.Lock()
        self._editions = Editions(introduction())
        listener = wire.listen(only_here=only_here)
        self.port = int(listener.getsockname()[1])
        self._porch = Porch(listener)

    def serve(self) -> None:
        """Begins to accept connections, in threads; two per rank, beside those of strangers."""
        raise_file_limit()
        threading.Thread(target=self._accept, name="hub", daemon=True).start()
        if self._lost_s > SILENT_S:
            threading.Thread(target=self._watch, name="hub-watch", daemon=True).start()

    def order(self, what: str) -> None:
        """Tells every agent, also one yet to come, to "stop" (SIGTERM, then SIGKILL) or to "kill" at once."""
        with self._lock:
            self._order = what
            agents = list(self._agents)
        for agent in agents:
            _send(agent, {"type": what})

    def give_up(self, ranks: Collection[int], incarnation: int) -> None:
        """Tells the agents of these ranks, also those yet to come, to end them ("stop") and none of their others."""
        with self._lock:
            self._given_up.update((rank, incarnation) for rank in ranks)
            agents = [agent for agent, theirs in self._agents.items() if set(theirs.ranks) & set(ranks)]
        for agent in agents:
            _send(agent, {"type": "stop", "ranks": sorted(ranks)})

    def push(self, rank: int, message: wire.Message) -> None:
        """Sends a process a message that it did not ask for, as soon as it is connected."""
        self._mail.send(rank, message)

    def has_agents(self) -> bool:
        """Whether any agent is still connected."""
        with self._lock:
            return bool(self._agents)

    def close(self) -> None:
        """Stops listening; agents that are still connected take it as an order to end everything."""
        self._closed.set()
        self._porch.close()
        with self._lock:
            agents = list(self._agents)
        for agent in agents:
            agent.close()

    def _accept(self) -> None:
        for sock in self._porch.arrivals():
            try:
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            except RuntimeError:  # no more threads for now
                self._porch.shut_out(sock)

    def _watch(self) -> None:
        """Tells of agents whose hosts fall silent, and of those that speak again."""
        while not self._closed.wait(LOOK_EVERY_S):
            with self._lock:
                agents = dict(self._agents)
            now = {channel for channel in agents if channel.silent_s >= SILENT_S}
            changed = (now ^ self._silent) & set(agents)
            self._silent = now
            for channel in changed:
                ranks, incarnation = agents[channel]
                self._deliver(Silent(ranks, channel in now, incarnation))

    def _greet(self, sock: socket.socket) -> None:
        nonces = self._porch.admit(sock, self._key)
        if nonces is None:
            return
        channel = wire.accepted(sock, self._key, nonces, lost_s=self._lost_s)
        hello = channel.receive()
        if hello is None:
            return
        try:
            self._serve(channel, hello)
        except (KeyError, TypeError, ValueError) as error:  # the right key, but not our language
            print(
                f"heturun: hung up on {channel.peer_address}, whose messages make no sense: {error!r}", file=sys.stderr
            )
        channel.close()

    def _serve(self, channel: wire.Channel, hello: wire.Message) -> None:
        """To the end of the connection."""
        incarnation = int(hello.get("incarnation", 0))
        ranks = tuple(int(rank) for rank in (hello["ranks"] if hello["type"] == "agent" else [hello["rank"]]))
        with self._lock:
            complaint = self._editions.complaint(hello)
        if complaint is not None and incarnation == 0:
            self._deliver(Failed(ranks[0], complaint, secondary=False, status=USERS_MISTAKE))
            self._deliver(Lost(ranks, complaint))
            return
        if complaint is not None:
            self._deliver(Output(ranks[0], "stderr", [f"WARNING: {complaint}"]))
        if hello["type"] == "agent":
            self._serve_agent(channel, ranks, incarnation)
        else:
            self._serve_process(channel, ranks[0], incarnation)

    def _serve_agent(self, channel: wire.Channel, ranks: tuple[int, ...], incarnation: int) -> None:
        self._deliver(Joined(ranks, incarnation))  # before it can have anything to say
        with self._lock:
            self._agents[channel] = Served(ranks, incarnation)
            wanted = [rank for rank in ranks if (rank, incarnation) not in self._given_up]
            order = self._order if wanted else "stop"
        _send(channel, self._start(wanted, incarnation) if order is None else {"type": order})
        why = None
        try:
            while (message := channel.receive()) is not None:
                if message["type"] == "broken":
                    why = str(message["message"])
                else:
                    self._deliver(_event(message, incarnation))
                    if message["type"] == "output":
                        _send(channel, {"type": "took"})  # the agent sends no more than fits before it hears so
        finally:
            with self._lock:
                del self._agents[channel]
            self._deliver(Lost(ranks, why or WENT_AWAY, incarnation, explained=why is not None))

    def _serve_process(self, channel: wire.Channel, rank: int, incarnation: int) -> None:
        self._mail.connected(rank, channel)
        while (message := channel.receive()) is not None:
            kind = message["type"]
            if kind == "publish":
                self._board.publish(message["key"], message["value"])
                self._deliver(Published(rank, str(message["key"]), str(message["value"])))
            elif kind == "lookup":
                if not self._board.lookup(message["key"], _answerer(channel, int(message["number"]))):
                    self._deliver(Wanted(rank, str(message["key"])))
            elif kind == "elastic":
                self._deliver(Elastic(rank, int(message["min_replicas"])))
                _send(channel, {"type": "noted", "number": message["number"]})
            elif kind == "progress":
                self._deliver(Progress(rank, int(message["done"]), int(message["total"]), str(message["text"])))
                _send(channel, {"type": "noted", "number": message["number"]})
            elif kind == "failed":
                self._deliver(_failed(message, rank, incarnation))
                _send(channel, {"type": "noted", "number": message["number"]})


def _answerer(channel: wire.Channel, number: int) -> Callable[[str], None]:
    return lambda value: _send(channel, {"type": "value", "number": number, "value": value})


def _send(channel: wire.Channel, message: wire.Message) -> None:
    """Sends; a peer that is gone is noticed where its messages are received."""
    try:
        channel.send(message)
    except OSError:
        return


def _failed(message: wire.Message, rank: int, incarnation: int) -> Failed:
    status = message.get("status")
    known = None if status is None else int(status)
    return Failed(rank, str(message["message"]), bool(message["secondary"]), incarnation, known)


def _event(message: wire.Message, incarnation: int) -> Event:
    kind, rank = message["type"], int(message["rank"])
    if kind == "started":
        return Started(rank, incarnation)
    if kind == "output":
        return Output(rank, str(message["stream"]), [str(line) for line in message["lines"]])
    if kind == "exit":
        return Exited(rank, int(message["status"]), bool(message["killed"]), incarnation)
    if kind == "closed":
        return Closed(rank, incarnation)
    raise ValueError(f"there is no message {kind!r}")
