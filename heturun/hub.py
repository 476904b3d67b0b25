"""The launcher's end of the control channel: starts agents' work, keeps the published values, passes events on.

One thread per connection, for a job has two per rank; every event goes to `deliver`, in the order in which it
arrived on its connection.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from heturun import wire
from heturun.outcome import Closed, Event, Exited, Failed, Lost, Output, Progress, Started


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

    def lookup(self, key: str, answer: Callable[[str], None]) -> None:
        """Calls `answer` with the value: now, or when it is published."""
        with self._lock:
            if key not in self._values:
                self._waiting.setdefault(key, []).append(answer)
                return
            value = self._values[key]
        answer(value)


class Hub:
    """Listens for the agents and the processes of one job.

    Args:
        key: the job's secret.
        only_here: listen on the loopback alone.
        start: the start message for an agent's ranks.
        deliver: is called with every event, by several threads.
    """

    def __init__(
        self,
        key: bytes,
        *,
        only_here: bool,
        start: Callable[[Sequence[int]], wire.Message],
        deliver: Callable[[Event], None],
    ) -> None:
        self._key, self._start, self._deliver = key, start, deliver
        self._board = Board()
        self._agents: set[wire.Channel] = set()
        self._order: str | None = None  # what agents that come late are told as well
        self._lock = threading.Lock()
        self._listener = wire.listen(only_here=only_here)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        """Begins to accept connections, in threads."""
        threading.Thread(target=self._accept, name="hub", daemon=True).start()

    def order(self, what: str) -> None:
        """Tells every agent, also one yet to come, to "stop" (SIGTERM, then SIGKILL) or to "kill" at once."""
        with self._lock:
            self._order = what
            agents = list(self._agents)
        for agent in agents:
            _send(agent, {"type": what})

    def has_agents(self) -> bool:
        """Whether any agent is still connected."""
        with self._lock:
            return bool(self._agents)

    def close(self) -> None:
        """Stops listening; agents that are still connected take it as an order to end everything."""
        self._listener.close()
        with self._lock:
            agents = list(self._agents)
        for agent in agents:
            agent.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        channel = wire.accept(sock, self._key)
        hello = channel.receive() if channel is not None else None
        if channel is None or hello is None:
            return
        if hello["type"] == "agent":
            self._serve_agent(channel, [int(rank) for rank in hello["ranks"]])
        else:
            self._serve_process(channel, int(hello["rank"]))
        channel.close()

    def _serve_agent(self, channel: wire.Channel, ranks: list[int]) -> None:
        with self._lock:
            self._agents.add(channel)
            order = self._order
        if order is None:
            _send(channel, self._start(ranks))
        why = "the agent that ran it went away: it was killed, or its host was cut off"
        while (message := channel.receive()) is not None:
            if message["type"] == "broken":
                why = str(message["message"])
            else:
                self._deliver(_event(message))
        with self._lock:
            self._agents.discard(channel)
        self._deliver(Lost(tuple(ranks), why))

    def _serve_process(self, channel: wire.Channel, rank: int) -> None:
        while (message := channel.receive()) is not None:
            kind = message["type"]
            if kind == "publish":
                self._board.publish(message["key"], message["value"])
            elif kind == "lookup":
                self._board.lookup(message["key"], _answerer(channel, int(message["number"])))
            elif kind == "progress":
                self._deliver(Progress(rank, int(message["done"]), int(message["total"]), str(message["text"])))
            elif kind == "failed":
                self._deliver(Failed(rank, str(message["message"]), bool(message["secondary"])))
                _send(channel, {"type": "noted", "number": message["number"]})


def _answerer(channel: wire.Channel, number: int) -> Callable[[str], None]:
    return lambda value: _send(channel, {"type": "value", "number": number, "value": value})


def _send(channel: wire.Channel, message: wire.Message) -> None:
    """Sends; a peer that is gone is noticed where its messages are received."""
    try:
        channel.send(message)
    except OSError:
        return


def _event(message: wire.Message) -> Event:
    kind, rank = message["type"], int(message["rank"])
    if kind == "started":
        return Started(rank)
    if kind == "output":
        return Output(rank, str(message["stream"]), [str(line) for line in message["lines"]])
    if kind == "exit":
        return Exited(rank, int(message["status"]), bool(message["killed"]))
    return Closed(rank)
