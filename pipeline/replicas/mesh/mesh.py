"""Replicas of one stage talk directly: they average, broadcast, swap, and hand their state to those who join.

    average --- parts ---->  reader thread -> mailbox -> average     one connection per direction and purpose,
    swap    -- question -->  reader thread of the peer               made when first used
            <--- answer ---

Every incoming connection has a thread, so that whoever sends is always listened to. A connection that ends without a
goodbye, a lost pipeline or a deadline ends every wait for it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from pipeline.cluster.porch import Porch
from pipeline.cluster.wire import join_address
from pipeline.errors import GroupBroken, PeerLost
from pipeline.replicas.mesh import frames
from pipeline.replicas.mesh.allreduce import Round, shaped_like
from pipeline.replicas.mesh.connections import Caller, Link, end_all
from pipeline.replicas.mesh.frames import Header, Kind
from pipeline.replicas.mesh.mailbox import Key, Mailbox
from pipeline.transport.pool import Memory
from pipeline.transport.protocol import DTYPES

CONNECTED = 16  # connections made before they are needed

Payload = frames.View | bytes | list[frames.View | bytes]
Swapper = Callable[[Tensor], "Tensor | None"]
StateProvider = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


class Mesh:
    """One replica's connections to the others of its stage; every method may be called by any thread.

    Args:
        pipeline: who this is.
        key: the job's secret; whoever does not hold it is turned away.
        address: of the interface to listen on; the others reach this replica there.
        timeout_s: the deadline of everything.
        on_broken: called, on a thread, with a pipeline whose connection broke.

    Averages of one replica follow each other with ascending rounds.
    """

    def __init__(
        self,
        pipeline: int,
        key: bytes,
        *,
        address: str = "127.0.0.1",
        timeout_s: float,
        on_broken: Callable[[int], object] = lambda pipeline: None,
    ) -> None:
        self.pipeline, self.on_broken = pipeline, on_broken
        self.bytes_sent = 0
        self._key, self._timeout_s = frames.mesh_key(key), timeout_s
        self._mailbox, self.memory = Mailbox(pipeline), Memory()
        self._lock = threading.Lock()
        self._peers: dict[int, str] = {}
        self._links: dict[tuple[int, str], Link] = {}
        self._callers: dict[socket.socket, Caller] = {}
        self._swapper: Swapper | None = None
        self._provide: StateProvider | None = None
        self._closed = False
        listener = frames.listen(address)
        self.address = join_address(address, listener.getsockname()[1])
        self._porch = Porch(listener)
        self._threads = [threading.Thread(target=self._accept, name="mesh", daemon=True)]
        self._threads[0].start()

    # who is there

    def set_peers(self, peers: Mapping[int, str], generations: Mapping[int, int], own_generation: int) -> None:
        """Replaces who lives, where they listen, and the generations below which nothing counts any more."""
        renewed = own_generation != self._mailbox.generation
        self._mailbox.update(tuple(peers), generations, own_generation)
        with self._lock:
            self._peers = dict(peers)
            stale = [
                name
                for name, link in self._links.items()
                if not link.once
                and (renewed or peers.get(name[0]) != link.address or generations.get(name[0], 0) > link.generation)
            ]
            links = [self._links.pop(name) for name in stale]
            callers = [c for c in self._callers.values() if c.generation < generations.get(c.sender, 0)]
        end_all(links, callers)

    def lost(self, pipeline: int, generation: int | None = None) -> None:
        """Ends every wait for this pipeline (its own: every wait at all), until `set_peers` names it again.

        Args:
            generation: its new generation, if known; then the order of this call and `set_peers` does not matter.
        """
        self._mailbox.lose(pipeline, before=generation)
        with self._lock:
            links = [self._links.pop(name) for name in [n for n in self._links if n[0] == pipeline]]
            callers = [
                c
                for c in self._callers.values()
                if c.sender == pipeline and (generation is None or c.generation < generation)
            ]
        end_all(links, callers)

    def connect(self) -> None:
        """Makes the connections on which parts will go to the others, those to many others when they are first used."""
        with self._lock:
            peers = [peer for peer in self._peers if peer != self.pipeline]
        for peer in peers[:CONNECTED]:
            with contextlib.suppress(GroupBroken, OSError), self._link(peer, "parts").use():
                pass  # whoever cannot be reached will be found out when it is needed

    # averages

    def average(
        self,
        x: Tensor,
        members: Sequence[int],
        round: int,
        *,
        part: int = 0,
        generations: Mapping[int, int] | None = None,
    ) -> Tensor:
        """The mean of the members' x, in new memory, equal bit for bit on all of them.

        It is added up in the order of `members`, in float32 at least, divided, and rounded to x's dtype once.

        Args:
            x: (n,) of a floating dtype, on any device; not written.
            round: a number that no other group of the stage has.
            part: tells several tensors apart that are averaged in one round.
            generations: the members' when the group was formed; it is broken if one was lost since.

        Raises:
            GroupBroken: a member was lost.
            PeerLost: a member did not answer before the deadline.
        """
        if tuple(members) == (self.pipeline,):
            return x.clone()
        host = _on_host(x)
        with self._round(round, members, generations) as talk:
            mean = talk.mean(host, part)
        return mean.to(x.device)

    def broadcast_from(
        self,
        x: Tensor,
        members: Sequence[int],
        round: int,
        root: int,
        *,
        part: int = 0,
        generations: Mapping[int, int] | None = None,
    ) -> Tensor:
        """The root's x, in new memory. Arguments and errors as in `average`; the root outlives lost receivers."""
        if root == self.pipeline:
            host = _on_host(x)
            with self._round(round, members, None) as talk:
                talk.send_to_others(host, 2 * part)
            return x.clone()
        with self._round(round, members, generations) as talk:
            (theirs,) = talk.collect([root], 2 * part, x)
        return theirs.to(x.device)

    @contextlib.contextmanager
    def _round(self, number: int, members: Sequence[int], generations: Mapping[int, int] | None) -> Iterator[Round]:
        """A round under way; the other members hear of it when it breaks here."""
        known = {member: self._mailbox.generation_of(member) for member in members}
        known[self.pipeline] = self._mailbox.generation
        expected = {member: (generations or known).get(member, known[member]) for member in members}
        talk = Round(self, self._mailbox, number, expected, monotonic() + self._timeout_s)
        with self._mailbox.round(number):
            try:
                yield talk
            except GroupBroken as broken:
                talk.give_up(broken.pipeline)
                raise

    # pairs

    def swap(self, peer: int, x: Tensor) -> Tensor | None:
        """Gives x to `peer` and returns its own, in new memory; None when it does not swap now.

        Raises:
            GroupBroken: the peer was lost; it may have taken x.
            PeerLost: it did not answer before the deadline, or could not.
        """
        header = Header(Kind.SWAP, self.pipeline, self._mailbox.generation, part=DTYPES.index(x.dtype))
        with self._ask(peer, "swap", header, frames.view_of(_on_host(x))) as (sock, answer):
            memory = self.memory.take(answer.nbytes)
            frames.receive_into(sock, frames.view_of(memory))
        if answer.kind == Kind.REFUSED:
            _refused(peer, bytes(frames.view_of(memory)))
            return None
        return shaped_like(memory, x, f"pipeline {peer} swapped").to(x.device)

    def on_swap(self, answer: Swapper) -> None:
        """Lets `answer` be called, on threads, with the x of whoever swaps; it returns ours, or None to decline."""
        self._swapper = answer

    # state for those who join

    def serve_state(self, provide: StateProvider) -> None:
        """Lets `provide` be called, on a thread, when a replica joins: tensors that nobody writes, and JSON values."""
        self._provide = provide

    def pull_state(self, pipeline: int, address: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the replica of `pipeline` at `address` provides, bit for bit, on the CPU.

        Raises:
            GroupBroken: it was lost meanwhile.
            PeerLost: it did not answer before the deadline, or had nothing to give.
        """
        with self._lock:
            if self._closed:
                raise GroupBroken(self.pipeline)
            old = self._links.pop((pipeline, "state"), None)
            self._links[pipeline, "state"] = link = self._new_link(pipeline, address, once=True)
        end_all([old] if old else [], [])
        try:
            header = Header(Kind.STATE, self.pipeline, self._mailbox.generation)
            with self._ask(pipeline, "state", header, b"", link) as (sock, answer):
                data = bytearray(answer.nbytes)
                frames.receive_into(sock, memoryview(data))
        finally:
            self._drop(pipeline, "state", link)
        if answer.kind == Kind.REFUSED:
            _refused(pipeline, bytes(data) or b"it has nothing to give yet")
        return frames.unpack_state(data)

    @contextlib.contextmanager
    def _ask(
        self, peer: int, purpose: str, header: Header, payload: frames.View | bytes, link: Link | None = None
    ) -> Iterator[tuple[socket.socket, Header]]:
        """Sends a question; its answer is to be read inside, while nobody else asks on this connection."""
        if link is None:
            link = self._link(peer, purpose)
        own = self._mailbox.generation
        try:
            with link.use() as sock:
                self._count(frames.send_frame(sock, header, payload))
                yield sock, frames.receive_header(sock)
        except TimeoutError as error:
            self._drop(peer, purpose, link)
            raise PeerLost(f"pipeline {self.pipeline} waited {self._timeout_s:g} s for pipeline {peer}") from error
        except (OSError, EOFError) as error:
            self._drop(peer, purpose, link)
            self._mailbox.cut(peer, link.generation, own)
            raise GroupBroken(peer) from error
        except Exception:  # the answer was not read to its end, and the next one begins behind it
            self._drop(peer, purpose, link)
            raise

    # outgoing connections

    def send(self, peer: int, header: Header, payload: frames.View | bytes = b"") -> None:
        """Sends one frame of a round; a connection that is gone shows itself in the waiting for its owner.

        Raises:
            PeerLost: the peer took nothing before the deadline.
        """
        own = self._mailbox.generation
        try:
            link = self._link(peer, "parts")
        except GroupBroken:
            return
        try:
            with link.use() as sock:
                self._count(frames.send_frame(sock, header, payload))
        except TimeoutError as error:
            self._drop(peer, "parts", link)
            raise PeerLost(
                f"pipeline {self.pipeline} waited {self._timeout_s:g} s for pipeline {peer} to take its part "
                f"of round {header.round}"
            ) from error
        except OSError:
            self._drop(peer, "parts", link)
            self._mailbox.cut(peer, link.generation, own)

    def is_cut(self, peer: int) -> bool:
        """Whether the connection on which parts go to this peer is gone."""
        with self._lock:
            link = self._links.get((peer, "parts"))
        return link is not None and link.is_cut

    def _link(self, peer: int, purpose: str) -> Link:
        with self._lock:  # so that whoever is lost from now on finds this link, and ends it
            if self._closed or self._mailbox.is_gone(peer) or peer not in self._peers:
                raise GroupBroken(peer)
            if (peer, purpose) not in self._links:
                self._links[peer, purpose] = self._new_link(peer, self._peers[peer])
            return self._links[peer, purpose]

    def _new_link(self, peer: int, address: str, *, once: bool = False) -> Link:
        return Link(address, self._key, self._timeout_s, self._mailbox.generation_of(peer), once)

    def _drop(self, peer: int, purpose: str, link: Link) -> None:
        with self._lock:
            if self._links.get((peer, purpose)) is link:
                del self._links[peer, purpose]
        link.end()

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_sent += nbytes

    # incoming connections

    def _accept(self) -> None:
        for sock in self._porch.arrivals():
            thread = threading.Thread(target=self._serve, args=(sock,), name="mesh-reader", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads can be had
                sock.close()
                self._mailbox.fail(error)
                continue
            with self._lock:
                self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    def _serve(self, sock: socket.socket) -> None:
        """Reads one connection to its end; an error that nobody foresaw is raised by whoever waits for what it read."""
        try:
            self._read(sock)
        except Exception as error:
            self._mailbox.fail(error)

    def _read(self, sock: socket.socket) -> None:
        """The first frame says whose the connection is."""
        caller = Caller(sock, own=self._mailbox.generation)
        with self._lock:
            if self._closed:
                self._porch.shut_out(sock)
                return
            self._callers[sock] = caller
        try:
            if self._porch.admit(sock, self._key) is not None:
                frames.set_deadline(sock, self._timeout_s, receiving=False)  # the next frame may be long in coming
                while (header := frames.receive_header(sock)).kind != Kind.BYE:
                    caller.heard(header)
                    self._take(sock, header)
                caller.in_order = True
        except (OSError, EOFError):
            pass  # told below
        finally:
            with self._lock:
                del self._callers[sock]
            sock.close()
        self._gone(caller)

    def _gone(self, caller: Caller) -> None:
        if caller.sender < 0 or caller.kind == Kind.STATE:
            return
        counted = self._mailbox.cut(caller.sender, caller.generation, caller.own)
        if counted and not caller.in_order and not self._closed:
            self.on_broken(caller.sender)

    def _take(self, sock: socket.socket, header: Header) -> None:
        if header.kind == Kind.PART:
            key = Key(header.sender, header.round, header.part)
            memory = self._mailbox.posted(key, header.nbytes)
            if memory is None:
                memory = self.memory.take(header.nbytes)
            frames.receive_into(sock, frames.view_of(memory))
            self._mailbox.put(key, memory, header.generation)
        elif header.kind == Kind.GAVE_UP:
            self._mailbox.put_gave_up(header.sender, header.round, header.part)
        elif header.kind == Kind.SWAP:
            memory = self.memory.take(header.nbytes)
            frames.receive_into(sock, frames.view_of(memory))
            self._reply(sock, header, lambda: self._swapped(header, memory))
        elif header.kind == Kind.STATE:
            self._reply(sock, header, self._provided)
        else:
            raise ConnectionError(f"a frame of kind {header.kind}, which is no beginning")

    def _swapped(self, header: Header, memory: Tensor) -> frames.View | bytes | None:
        if self._swapper is None or header.generation < self._mailbox.generation_of(header.sender):
            return None
        mine = self._swapper(memory.view(DTYPES[header.part]))
        return None if mine is None else frames.view_of(_on_host(mine))

    def _provided(self) -> list[frames.View | bytes] | None:
        return None if self._provide is None else frames.pack_state(*self._provide())

    def _reply(self, sock: socket.socket, header: Header, answer: Callable[[], Payload | None]) -> None:
        """Whatever goes wrong here is told to whoever waits for the answer."""
        try:
            payload = answer()
            kind = Kind.REFUSED if payload is None else Kind.ANSWER
        except Exception as error:
            payload, kind = f"{type(error).__name__}: {error}".encode(), Kind.REFUSED
        pieces = payload if isinstance(payload, list) else [payload or b""]
        self._count(frames.send_frame(sock, Header(kind, self.pipeline, self._mailbox.generation), *pieces))

    def close(self) -> None:
        """Ends every connection in good order, and every wait."""
        with self._lock:
            self._closed = True
            links, callers, threads = list(self._links.values()), list(self._callers.values()), list(self._threads)
            self._links.clear()
        self._mailbox.close()
        self._porch.close()
        end_all(links, callers)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1)


def _refused(peer: int, why: bytes) -> None:
    if why:
        raise PeerLost(f"pipeline {peer} refused: {why.decode(errors='replace')}")


def _on_host(x: Tensor) -> Tensor:
    """x as a contiguous (n,) tensor in host memory, through pinned memory when it comes from a GPU.

    Raises:
        ValueError: it is not flat.
    """
    if x.dim() != 1:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} cannot be averaged: give it flat, (n,)")
    if x.device.type == "cpu":
        return x.detach().contiguous()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach())
