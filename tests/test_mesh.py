from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from queue import Queue
from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cluster.wire import admit, split_address
from pipeline.core.draw import shuffled
from pipeline.errors import GroupBroken, PeerLost
from pipeline.replicas.mesh import frames
from pipeline.replicas.mesh.allreduce import mean_of
from pipeline.replicas.mesh.frames import Header, Kind
from pipeline.replicas.mesh.mailbox import Key, Mailbox
from pipeline.replicas.mesh.mesh import Mesh

KEY = b"0123456789abcdef"
SOON_S = 5.0  # as good as at once on such a machine; on an idle one it is under 0.1 s
PATIENCE_S = 30.0  # of tests for what should take milliseconds, on a machine that is busy with other things
Results = dict[int, Any]


@contextlib.contextmanager
def meshes(count: int, *, timeout_s: float = PATIENCE_S, address: str = "127.0.0.1") -> Iterator[list[Mesh]]:
    """Replicas that know each other."""
    with contextlib.ExitStack() as stack:
        made = [Mesh(pipeline, KEY, timeout_s=timeout_s, address=address) for pipeline in range(count)]
        for mesh in made:
            stack.callback(mesh.close)
        introduce(made)
        yield made


def introduce(made: Sequence[Mesh], generations: Mapping[int, int] | None = None, without: Sequence[int] = ()) -> None:
    peers = {mesh.pipeline: mesh.address for mesh in made if mesh.pipeline not in without}
    known = dict.fromkeys(peers, 0) | dict(generations or {})
    for mesh in made:
        mesh.set_peers(peers, known, known.get(mesh.pipeline, 0))


def at_once(work: Mapping[int, Callable[[], Any]]) -> Results:
    """The results, or exceptions, of calls that run at the same time."""
    results: Results = {}

    def run(name: int, call: Callable[[], Any]) -> None:
        try:
            results[name] = call()
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert len(results) == len(work), f"only {sorted(results)} of {sorted(work)} came back"
    for result in results.values():
        if isinstance(result, Exception) and not isinstance(result, GroupBroken | PeerLost):
            raise result
    return results


def averages(made: Sequence[Mesh], xs: Mapping[int, Tensor], round: int, **options: Any) -> Results:
    members = sorted(xs)
    return at_once(
        {p: lambda p=p: made[p].average(xs[p], members, round, **options) for p in members}  # type: ignore[misc]
    )


def random_models(members: Sequence[int], size: int, dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    return {p: torch.randn(size, generator=torch.Generator().manual_seed(p)).to(dtype) for p in members}


# averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1001, 100_003])
def test_all_members_get_the_same_mean_bit_for_bit(dtype: torch.dtype, size: int) -> None:
    with meshes(5) as made:
        for round, members in enumerate([(0, 1), (1, 2, 4), (0, 1, 2, 3, 4)]):
            xs = random_models(members, size, dtype)
            kept = {p: x.clone() for p, x in xs.items()}
            means = averages(made, xs, round)
            assert all(torch.equal(means[p], means[members[0]]) for p in members)
            assert all(means[p].dtype == dtype and means[p] is not xs[p] for p in members)
            assert all(torch.equal(xs[p], kept[p]) for p in members), "x is not written"
            exact = torch.stack([x.double() for x in xs.values()]).mean(0)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(means[members[0]].double(), exact, rtol=2 * eps, atol=2 * eps)


def test_small_floats_are_added_up_in_float32() -> None:
    parts = [torch.tensor([value], dtype=torch.float16) for value in (2048.0, 1.0, 1.0, 2.0)]
    assert mean_of(parts, torch.empty_like(parts[0])) == 513


def test_a_member_alone_gets_a_copy() -> None:
    with meshes(1) as (mesh,):
        x = torch.ones(3)
        mean = mesh.average(x, (0,), 0)
        assert torch.equal(mean, x) and mean.data_ptr() != x.data_ptr()


def test_what_is_not_flat_is_refused() -> None:
    with meshes(2) as made, pytest.raises(ValueError, match=r"shape \(2, 2\) cannot be averaged: give it flat"):
        made[0].average(torch.ones(2, 2), (0, 1), 0)


def test_many_rounds_of_random_groups_never_mix_anything_up() -> None:
    with meshes(5) as made:
        rounds = []
        for step in range(40):
            order = shuffled(range(5), step)
            cut = 1 + step % 4
            rounds += [tuple(sorted(group)) for group in (order[:cut], order[cut:])]

        def live(pipeline: int) -> list[float]:
            return [
                float(made[pipeline].average(torch.full((20_000,), float(10**pipeline)), members, round)[-1])
                for round, members in enumerate(rounds)
                if pipeline in members
            ]

        got = at_once({p: lambda p=p: live(p) for p in range(5)})  # type: ignore[misc]
        for p in range(5):
            means = [sum(10.0**q for q in members) / len(members) for members in rounds if p in members]
            assert got[p] == pytest.approx(means)


def test_several_tensors_are_averaged_in_one_round() -> None:
    with meshes(3) as made:

        def both(p: int) -> tuple[Tensor, Tensor]:
            weights = made[p].average(torch.full((50_000,), float(p)), (0, 1, 2), 0)
            return weights, made[p].average(torch.full((7,), 10.0 * p), (0, 1, 2), 0, part=1)

        for weights, momentum in at_once({p: lambda p=p: both(p) for p in range(3)}).values():  # type: ignore[misc]
            assert weights.unique() == 1 and momentum.unique() == 10


def test_everyone_gets_the_root_s_weights() -> None:
    with meshes(3) as made:
        xs = random_models(range(3), 5000)
        got = at_once(
            {p: lambda p=p: made[p].broadcast_from(xs[p], (0, 1, 2), 0, 1) for p in range(3)}  # type: ignore[misc]
        )
        assert all(torch.equal(x, xs[1]) for x in got.values())


def test_a_model_of_another_size_is_an_error_with_both_sizes() -> None:
    with (
        meshes(2) as made,
        pytest.raises(ValueError, match=r"pipeline [01] sent in round 0 .* bytes, expected .*: the replicas' models"),
    ):
        at_once(
            {
                0: lambda: made[0].average(torch.ones(2), (0, 1), 0),
                1: lambda: made[1].average(torch.ones(3), (0, 1), 0),
            }
        )


def test_an_error_in_a_reader_thread_is_raised_where_its_replica_waits_and_cuts_its_peers_off() -> None:
    def out_of_memory(sock: socket.socket, header: Header) -> None:
        raise MemoryError(f"{header.nbytes} bytes")

    with meshes(3, timeout_s=10 * PATIENCE_S) as made:
        made[1]._take = out_of_memory  # type: ignore[method-assign]
        began = monotonic()
        with pytest.raises(RuntimeError, match=r"pipeline 1 could not read what others sent: MemoryError"):
            made_of_three = {p: torch.ones(100_000) for p in range(3)}  # in chunks: 0 and 2 wait for what 1 adds up
            averages(made, made_of_three, 0)
        assert monotonic() - began < PATIENCE_S


def test_an_answer_that_cannot_be_taken_leaves_no_rest_to_be_read_as_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(nbytes: int) -> Tensor:
        raise MemoryError(f"{nbytes} bytes")

    with meshes(2) as made:
        made[1].on_swap(lambda theirs: torch.full((4,), 2.0))
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(made[0].memory, "take", out_of_memory)
            made[0].swap(1, torch.ones(4))
        theirs = made[0].swap(1, torch.ones(4))
        assert theirs is not None and torch.equal(theirs, torch.full((4,), 2.0))


@pytest.mark.parametrize(
    "header", [Header(99, 0, 0), Header(Kind.PART, 0, 0, nbytes=1 << 63), Header(Kind.ANSWER, 0, 0)]
)
def test_a_frame_that_makes_no_sense_ends_its_connection_and_nothing_else(header: Header) -> None:
    with meshes(2) as made:
        host, _, port = made[1].address.rpartition(":")
        sock = frames.dial(f"{host}:{port}", frames.mesh_key(KEY), timeout_s=PATIENCE_S, keep=lambda sock: None)
        sock.sendall(frames._HEADER.pack(*header))
        assert sock.recv(1) == b""
        sock.close()
        introduce(made, {0: 1})  # whoever spoke so is suspected, and comes back
        assert averages(made, random_models((0, 1), 3), 5)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\x08" + b"\0" * 7 + b"not JSON", (9).to_bytes(8, "little") + b"{" * 100]
)
def test_a_state_that_is_none_is_one_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes are not the state of a replica"):
        frames.unpack_state(data)


def test_bytes_are_counted() -> None:
    with meshes(2) as made:
        averages(made, random_models((0, 1), 1000), 0)
        assert all(4000 < mesh.bytes_sent < 4100 for mesh in made)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("IPv6 is switched off")
    with meshes(2, address="::1") as made:
        assert made[0].address.startswith("[::1]:")
        assert averages(made, {0: torch.zeros(1), 1: torch.ones(1)}, 0)[0] == 0.5


# who is lost, late or a stranger


def test_a_lost_member_breaks_the_average_that_waits_for_it() -> None:
    with meshes(2) as made:
        got = at_once({0: lambda: made[0].average(torch.ones(4), (0, 1), 0), 9: lambda: made[0].lost(1, 1)})
        assert isinstance(got[0], GroupBroken) and got[0].pipeline == 1


def test_whoever_gives_up_tells_the_others() -> None:
    with meshes(4) as made:
        calls: dict[int, Callable[[], Any]] = {
            p: lambda p=p: made[p].average(torch.ones(50_000), (0, 1, 2, 3), 0)  # type: ignore[misc]
            for p in (0, 1, 2)
        }
        got = at_once({**calls, 9: lambda: made[0].lost(3, 1)})
        assert all(isinstance(got[p], GroupBroken) and got[p].pipeline == 3 for p in (0, 1, 2))


def test_a_group_formed_before_a_member_was_lost_is_broken_even_if_it_is_back() -> None:
    with meshes(2) as made:
        formed = {0: 0, 1: 0}
        made[0].lost(1, 1)
        introduce(made, {1: 1})
        with pytest.raises(GroupBroken):
            made[0].average(torch.ones(1), (0, 1), 5, generations=formed)


def test_the_own_pipeline_s_loss_ends_every_wait() -> None:
    with meshes(2) as made:
        got = at_once({0: lambda: made[0].average(torch.ones(4), (0, 1), 0), 9: lambda: made[0].lost(0, 1)})
        assert isinstance(got[0], GroupBroken) and got[0].pipeline == 0


@pytest.mark.parametrize("news_first", [True, False])
def test_who_was_lost_takes_part_again_once_it_is_named_again(news_first: bool) -> None:
    with meshes(3) as made:
        averages(made, random_models((0, 1, 2), 4), 0)
        for mesh in made[:2]:
            steps = [lambda m=mesh: m.lost(2, 1), lambda: introduce(made[:2], {2: 1})]
            for step in steps if news_first else reversed(steps):
                step()
            with pytest.raises(GroupBroken):
                mesh.average(torch.ones(1), (mesh.pipeline, 2), 1)
        made[2].lost(2, 1)
        introduce(made, {2: 1})
        xs = random_models((0, 1, 2), 4)
        means = averages(made, xs, 2)
        assert all(torch.equal(means[p], mean_of(list(xs.values()), torch.empty_like(xs[0]))) for p in range(3))


def test_a_restarted_pipeline_takes_part_at_its_new_address() -> None:
    with meshes(2) as made:
        averages(made, random_models((0, 1), 4), 0)
        made[1].close()
        made[0].lost(1, 1)
        made[1] = Mesh(1, KEY, timeout_s=PATIENCE_S)
        with contextlib.closing(made[1]):
            introduce(made, {1: 1})
            assert averages(made, {0: torch.zeros(1), 1: torch.ones(1)}, 1)[0] == 0.5


def test_the_deadline_names_who_was_waited_for() -> None:
    with (
        meshes(3, timeout_s=0.2) as made,
        pytest.raises(PeerLost, match=r"pipeline 0 waited 0\.2 s for the weights of pipeline 1, pipeline 2 in round 7"),
    ):
        made[0].average(torch.ones(1), (0, 1, 2), 7)


def test_who_has_left_in_good_order_breaks_groups_but_is_not_reported() -> None:
    with meshes(2) as made:
        broken: list[int] = []
        made[0].on_broken = broken.append
        averages(made, random_models((0, 1), 4), 0)
        made[1].close()
        with pytest.raises(GroupBroken):
            made[0].average(torch.ones(1), (0, 1), 1)
        assert not broken


@contextlib.contextmanager
def frozen_peer() -> Iterator[str]:
    """Somebody with the key who reads nothing after the handshake; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def welcome() -> None:
            sock, _ = server.accept()
            stack.callback(sock.close)
            admit(sock, frames.mesh_key(KEY))

        threading.Thread(target=welcome, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_frozen_receiver_blocks_nobody_for_longer_than_it_lives() -> None:
    with meshes(1) as (mesh,), frozen_peer() as address:
        mesh.set_peers({0: mesh.address, 1: address}, {}, 0)
        got = at_once(
            {
                0: lambda: mesh.average(torch.ones(20_000_000), (0, 1), 0),
                9: lambda: wait_until_sending(mesh) or mesh.lost(1, 1),
            }
        )
        assert isinstance(got[0], GroupBroken) and got[0].pipeline == 1


def test_a_loss_at_any_moment_of_connecting_and_sending_ends_the_average() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system connects; nobody ever answers
        for moment in range(40):
            with meshes(1) as (mesh,):
                mesh.set_peers({0: mesh.address, 1: f"127.0.0.1:{silent.getsockname()[1]}"}, {}, 0)
                pause = threading.Event()
                got = at_once(
                    {
                        0: lambda m=mesh: m.average(torch.ones(10), (0, 1), 0),  # type: ignore[misc]
                        9: lambda m=mesh, p=pause, n=moment: p.wait(n * 2e-5) or m.lost(1, 1),  # type: ignore[misc]
                    }
                )
                assert isinstance(got[0], GroupBroken)


def wait_until_sending(mesh: Mesh) -> None:
    deadline = monotonic() + PATIENCE_S
    while not any(link.in_use for link in mesh._links.values()):
        assert monotonic() < deadline
        threading.Event().wait(0.001)


def test_sends_have_the_deadline() -> None:
    with meshes(1, timeout_s=0.2) as (mesh,), frozen_peer() as address:
        mesh.set_peers({0: mesh.address, 1: address}, {}, 0)
        with pytest.raises(PeerLost, match=r"waited 0\.2 s for pipeline 1 to take its part of round 3"):
            mesh.average(torch.ones(20_000_000), (0, 1), 3)


def test_strangers_get_nothing_and_disturb_nobody() -> None:
    with meshes(2) as made:
        for mesh in made:
            with pytest.raises(PermissionError):
                frames.dial(mesh.address, b"another key", timeout_s=PATIENCE_S, keep=lambda sock: None)
            with socket.create_connection(split_address(mesh.address)) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
        assert averages(made, {0: torch.zeros(1), 1: torch.ones(1)}, 0)[0] == 0.5


def test_the_job_s_key_is_not_the_mesh_s() -> None:
    with meshes(1) as (mesh,), pytest.raises(PermissionError):
        frames.dial(mesh.address, KEY, timeout_s=PATIENCE_S, keep=lambda sock: None)


# the mailbox


def box(generations: Mapping[int, int]) -> Mailbox:
    mailbox = Mailbox(0)
    mailbox.update((0, *generations), generations, 0)
    return mailbox


def came(mailbox: Mailbox, key: Key) -> bool:
    """Whether a part is there; it is taken out."""
    try:
        mailbox.collect(
            [key], {0: 0, key.sender: mailbox.generation_of(key.sender)}, deadline=0.0, probe=lambda p: False
        )
    except PeerLost:
        return False
    return True


def test_parts_of_older_generations_are_dropped_and_of_newer_ones_kept() -> None:
    mailbox = box({1: 2})
    for generation, expected in ((1, False), (2, True), (3, True)):
        mailbox.put(Key(1, 0, 0), torch.ones(1), generation)
        assert came(mailbox, Key(1, 0, 0)) == expected


def test_rounds_that_were_given_up_are_forgotten() -> None:
    mailbox = box({1: 0})
    for round in range(100):
        with mailbox.round(round):
            mailbox.put(Key(1, round, 0), torch.ones(1), 0)
            mailbox.put_gave_up(1, round, 1)
            mailbox.post(Key(1, round, 1), torch.ones(1))
        mailbox.put(Key(1, round - 1, 0), torch.ones(1), 0)
    assert len(mailbox._parts) == len(mailbox._gave_up) == len(mailbox._posted) == 1


def test_an_older_round_under_way_is_not_forgotten() -> None:
    mailbox = box({1: 0})
    with mailbox.round(3):
        mailbox.put(Key(1, 3, 0), torch.ones(1), 0)
        with mailbox.round(4):
            assert came(mailbox, Key(1, 3, 0))


def test_what_came_from_somebody_now_gone_still_counts() -> None:
    mailbox = box({1: 0})
    mailbox.put(Key(1, 0, 0), torch.ones(1), 0)
    mailbox.cut(1, 0, 0)
    assert came(mailbox, Key(1, 0, 0))


def test_a_cut_of_an_older_connection_does_not_count() -> None:
    mailbox = box({1: 1})
    assert not mailbox.cut(1, 0, 0) and not mailbox.is_gone(1)
    assert mailbox.cut(1, 1, 0) and mailbox.is_gone(1)
    mailbox.update((0, 1), {1: 1}, 1)
    assert not mailbox.is_gone(1), "it was we who were away"
    assert not mailbox.cut(1, 1, 0) and not mailbox.is_gone(1), "and that connection was made before"
    mailbox.lose(1)
    assert not mailbox.cut(1, 1, 1), "it was declared lost already"


# pairs and state


def test_two_replicas_swap() -> None:
    with meshes(2) as made:
        made[1].on_swap(lambda theirs: theirs + 1)
        for size in (1, 100_000):
            theirs = made[0].swap(1, torch.full((size,), 5.0))
            assert theirs is not None and theirs.shape == (size,) and theirs.unique() == 6


def test_swaps_of_many_threads_in_both_directions() -> None:
    with meshes(3) as made:
        for mesh in made:
            mesh.on_swap(lambda theirs: theirs * 2)

        def swaps(me: int, peer: int) -> bool:
            return all(made[me].swap(peer, torch.full((300_000,), float(n))).unique() == 2 * n for n in range(5))  # type: ignore[union-attr]

        pairs = [(me, peer) for me in range(3) for peer in range(3) if me != peer]
        got = at_once({at: lambda pair=pair: swaps(*pair) for at, pair in enumerate(pairs)})  # type: ignore[misc]
        assert all(got.values())


def test_a_swap_may_be_declined() -> None:
    with meshes(2) as made:
        assert made[0].swap(1, torch.ones(1)) is None, "nobody there swaps"
        made[1].on_swap(lambda theirs: None)
        assert made[0].swap(1, torch.ones(1)) is None


def test_the_other_side_s_mistake_in_a_swap_is_told() -> None:
    with meshes(2) as made:
        made[1].on_swap(lambda theirs: theirs + torch.ones(5))
        with pytest.raises(PeerLost, match=r"pipeline 1 refused: RuntimeError: The size of tensor"):
            made[0].swap(1, torch.ones(2))


def test_a_lost_peer_breaks_the_swap_that_waits_for_it() -> None:
    with meshes(2) as made:
        asked, over = threading.Event(), threading.Event()

        def never(theirs: Tensor) -> Tensor:
            asked.set()
            over.wait(PATIENCE_S)
            return theirs

        made[1].on_swap(never)
        got = at_once(
            {0: lambda: made[0].swap(1, torch.ones(1)), 9: lambda: asked.wait(PATIENCE_S) and made[0].lost(1, 1)}
        )
        over.set()
        assert isinstance(got[0], GroupBroken)
        with pytest.raises(GroupBroken):
            made[0].swap(1, torch.ones(1))


def test_a_joiner_gets_the_state_bit_for_bit() -> None:
    state = {
        "weights": torch.randn(1000),
        "half": torch.randn(3, 5).bfloat16(),
        "steps": torch.tensor(7),
        "none": torch.empty(0),
        "view": torch.arange(10)[::2],
    }
    values = {"k": 41, "order": [1, 2], "nan": None, "text": "é"}
    with meshes(2) as made:
        made[0].serve_state(lambda: (state, values))
        tensors, got = made[1].pull_state(0, made[0].address)
        assert got == values and tensors.keys() == state.keys()
        assert all(torch.equal(tensors[n], state[n]) and tensors[n].dtype == state[n].dtype for n in state)


def test_a_state_on_its_way_exists_once_on_either_end() -> None:
    weights = torch.randn(1000)
    pieces = frames.pack_state({"bias": torch.ones(3), "weights": weights}, {"k": 1})
    body = next(piece for piece in pieces if len(piece) == weights.nbytes)
    weights[0] = 7
    assert torch.frombuffer(body, dtype=torch.float32)[0] == 7, "what is sent is the tensor itself"
    data = bytearray(b"".join(pieces))
    tensors, values = frames.unpack_state(data)
    assert values == {"k": 1} and torch.equal(tensors["weights"], weights)
    data[-weights.nbytes - (-weights.nbytes % frames.ALIGNED) :] = bytes(len(data))[: weights.nbytes + 32]
    assert not tensors["weights"].any(), "what was received is the tensor itself"


def test_a_joiner_needs_no_introduction() -> None:
    with meshes(1) as (giver,), contextlib.closing(Mesh(1, KEY, timeout_s=PATIENCE_S)) as joiner:
        giver.serve_state(lambda: ({}, {"k": 1}))
        assert joiner.pull_state(0, giver.address) == ({}, {"k": 1})


def test_a_giver_without_state_says_so() -> None:
    with meshes(2) as made:
        with pytest.raises(PeerLost, match="pipeline 0 refused: it has nothing to give yet"):
            made[1].pull_state(0, made[0].address)
        made[0].serve_state(lambda: {}["gone"])  # type: ignore[arg-type, return-value]
        with pytest.raises(PeerLost, match="pipeline 0 refused: KeyError: 'gone'"):
            made[1].pull_state(0, made[0].address)


def test_a_giver_that_is_gone_is_named() -> None:
    with meshes(2) as made:
        made[0].close()
        with pytest.raises(GroupBroken, match="pipeline 0"):
            made[1].pull_state(0, made[0].address)


# processes


@contextlib.contextmanager
def averaging_process(made: Sequence[Mesh], size: int) -> Iterator[subprocess.Popen[str]]:
    """Pipeline len(made) in a process, averaging with all of `made` without end."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    members = list(range(len(made) + 1))
    with subprocess.Popen(
        [sys.executable, str(here / "mesh_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            job = {"pipeline": len(made), "members": members, "size": size, "key": KEY.hex()}
            print(json.dumps(job), file=process.stdin, flush=True)
            peers = {mesh.pipeline: mesh.address for mesh in made} | {len(made): process.stdout.readline().strip()}
            for mesh in made:
                mesh.set_peers(peers, dict.fromkeys(peers, 0), 0)
            print(json.dumps(peers), file=process.stdin, flush=True)
            yield process
        finally:
            process.kill()


def average_until_broken(mesh: Mesh, members: Sequence[int], size: int) -> tuple[int, float]:
    """Which pipeline broke the group, and when."""
    try:
        for round in count():
            mesh.average(torch.ones(size), members, round)
    except GroupBroken as broken:
        return broken.pipeline, monotonic()
    raise AssertionError


@pytest.mark.parametrize("others", [1, 2])
def test_survivors_hear_of_a_killed_member_at_once(others: int) -> None:
    size = 500_000
    with meshes(others, timeout_s=60) as made, averaging_process(made, size) as process:
        reported: Queue[int] = Queue()
        for mesh in made:
            mesh.on_broken = reported.put

        def kill() -> float:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            return monotonic()

        members = range(others + 1)
        calls = {p: lambda p=p: average_until_broken(made[p], members, size) for p in range(others)}  # type: ignore[misc]
        got = at_once({**calls, 9: kill})
        for p in range(others):
            who, when = got[p]
            assert who == others and when - got[9] < SOON_S
        assert reported.get(timeout=PATIENCE_S) == others


def test_survivors_of_a_frozen_member_go_on_when_it_is_declared_lost() -> None:
    size = 500_000
    with meshes(2, timeout_s=60) as made, averaging_process(made, size) as process:

        def freeze() -> float:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            for mesh in made:
                mesh.lost(2, 1)
            return monotonic()

        calls = {p: lambda p=p: average_until_broken(made[p], (0, 1, 2), size) for p in (0, 1)}  # type: ignore[misc]
        got = at_once({**calls, 9: freeze})
        for p in (0, 1):
            who, when = got[p]
            assert who == 2 and when - got[9] < SOON_S
        introduce(made)
        assert averages(made, {0: torch.zeros(1), 1: torch.ones(1)}, 1 << 40)[0] == 0.5
