"""What every transport has to do, as scenarios that all stages of a world run together.

Each scenario is a function of a `World`; it raises where the transport breaks its word. The threads of
test_transport.py call `run_scenarios`, and so does every process of a real MPI or Gloo world, started as

    mpirun -np 3 python -m mpi4py transport_worker.py mpi FOLDER [NAME ...]
    RANK=0 WORLD_SIZE=3 python transport_worker.py gloo FOLDER [NAME ...]

Stage s leaves FOLDER/s.json: scenario -> "passed", or the error.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAGES = 3
HOSTS = ("w0", "w1", "w2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class World:
    """One stage's view: how it gets a transport joined to the others', waits for them, and tells the time it used."""

    stage: int
    make: Callable[..., Any]  # (timeout_s=, oversubscribed=) -> transport; all stages together
    barrier: Callable[[], object]
    cpu_time: Callable[[], float]


# --- tensors


def tensor_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(8).to(dtype)


def any_tensor(rng: random.Random) -> Tensor:
    shape = [rng.choice([0, 1, 3, 7, 33]) for _ in range(rng.randint(0, 4))]
    tensor = tensor_of(rng.randrange(1 << 30), *shape, dtype=rng.choice(DTYPES))
    if len(shape) == 4 and rng.random() < 0.5:
        return tensor.to(memory_format=torch.channels_last)
    if len(shape) == 2 and rng.random() < 0.3:
        return tensor.t()
    return tensor


def any_message(seed: int) -> Tensors:
    rng = random.Random(seed)
    return tuple(any_tensor(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 3])))


def check_same(sent: Tensors, received: Tensors) -> None:
    assert isinstance(received, tuple)
    assert len(sent) == len(received), f"{len(sent)} tensors were sent, {len(received)} received"
    for here, there in zip(sent, received, strict=True):
        assert (here.dtype, here.shape) == (there.dtype, there.shape), f"{here.dtype} {here.shape} became {there.dtype}"
        assert torch.equal(here, there), "the values changed"
        if here.is_contiguous() or (here.dim() == 4 and here.is_contiguous(memory_format=torch.channels_last)):
            assert here.stride() == there.stride(), f"strides {here.stride()} became {there.stride()}"
        assert not there.requires_grad


@contextmanager
def lost(pattern: str) -> Any:
    """The body has to raise a PeerLost with this text."""
    from pipeline.errors import PeerLost

    try:
        yield
    except PeerLost as error:
        assert re.search(pattern, str(error)), f"the message is {error}"
    else:
        raise AssertionError("no PeerLost was raised")


# --- scenarios


def random_messages_arrive_as_they_were(world: World) -> None:
    transport = world.make()
    rng = random.Random(5)
    for microbatch in range(300):
        source, to = rng.sample(range(STAGES), 2)
        channel, message = rng.choice("AAAGGTWN"), any_message(rng.randrange(12))
        early = rng.random() < 0.5
        if world.stage == source:
            transport.send(to, channel, microbatch, message)
        if world.stage == to:
            if early:
                transport.post(source, channel, microbatch)
                transport.post(source, channel, microbatch)
            check_same(message, transport.recv(source, channel, microbatch))
    transport.flush()
    transport.close()


def a_short_last_batch_and_back(world: World) -> None:
    transport, s = world.make(), world.stage
    for microbatch, size in enumerate([8, 8, 8, 3, 8, 8, 1, 1, 8]):
        activations = (tensor_of(microbatch, size, 16, 9, 9), tensor_of(microbatch, size, dtype=torch.int64))
        gradients = (tensor_of(-microbatch, size, 16, 9, 9),)
        if s > 0:
            check_same(activations, transport.recv(s - 1, "A", microbatch))
        if s < STAGES - 1:
            transport.send(s + 1, "A", microbatch, activations)
            check_same(gradients, transport.recv(s + 1, "G", microbatch))
        if s > 0:
            transport.send(s - 1, "G", microbatch, gradients)
    transport.flush()
    transport.close()


def large_messages_pass_each_other(world: World) -> None:
    """50 MB in both directions at once, as in the steady state of 1F1B: no end may wait for the other's receive."""
    transport = world.make()
    if world.stage < 2:
        there = 1 - world.stage
        mine, theirs = (torch.full((12_500_000,), float(stage)) for stage in (world.stage, there))
        for microbatch in range(3):
            transport.post(there, "AG"[there], microbatch)
            transport.send(there, "AG"[world.stage], microbatch, (mine,))
            check_same((theirs,), transport.recv(there, "AG"[there], microbatch))
    transport.flush()
    transport.close()


def sends_do_not_wait_for_the_receiver(world: World) -> None:
    """Everything is sent before the receiver makes its first call."""
    transport = world.make()
    messages = [(tensor_of(n, 1 << 18),) for n in range(20)] + [(tensor_of(n, 3),) for n in range(500)]
    if world.stage == 0:
        for microbatch, message in enumerate(messages):
            transport.send(1, "A", microbatch, message)
    world.barrier()
    if world.stage == 1:
        for microbatch, message in enumerate(messages):
            check_same(message, transport.recv(0, "A", microbatch))
    transport.flush()
    world.barrier()
    assert transport.bytes_sent == (sum(m[0].nbytes for m in messages) if world.stage == 0 else 0)
    transport.close()


def a_sent_tensor_may_be_let_go_at_once(world: World) -> None:
    transport = world.make()
    if world.stage == 0:
        for microbatch in range(50):
            transport.send(1, "A", microbatch, (torch.full((50_000,), float(microbatch)),))
            torch.full((50_000,), -1.0)  # would be written where the sent one lay
    if world.stage == 1:
        for microbatch in range(50):
            assert float(transport.recv(0, "A", microbatch)[0].min()) == microbatch
    transport.flush()
    transport.close()


def tensors_of_a_graph_can_be_sent(world: World) -> None:
    transport = world.make()
    inputs = tensor_of(1, 4, 300).requires_grad_()
    for microbatch, output in enumerate(
        [inputs * 2, (inputs * 2)[:, :1], inputs.exp().t(), inputs.sum().expand(70, 70)]
    ):
        if world.stage == 0:
            transport.send(1, "A", microbatch, (output,))
        if world.stage == 1:
            check_same((output,), transport.recv(0, "A", microbatch))
    transport.flush()
    transport.close()


def received_tensors_never_share_memory(world: World) -> None:
    transport = world.make()
    sizes = [1, 1, 5, 5, 50_000, 50_000, 300_000, 300_000] * 4
    if world.stage == 0:
        for microbatch, size in enumerate(sizes):
            transport.send(
                1, "A", microbatch, (torch.full((size,), float(microbatch)), torch.full((2,), -float(microbatch)))
            )
    if world.stage == 1:
        kept = [transport.recv(0, "A", microbatch) for microbatch in range(len(sizes))]
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for message in kept for t in message)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
        for microbatch, (first, second) in enumerate(kept):
            first += 1  # is its owner's to write to
            assert bool((first == microbatch + 1).all()) and bool((second == -microbatch).all())
    transport.flush()
    transport.close()


def another_microbatch_than_expected_is_an_error(world: World) -> None:
    transport = world.make()
    for channel, word, wrong in (("A", "activation", 20006), ("G", "gradient", 20004)):
        for microbatch in (20000, wrong):
            if world.stage == 0:
                transport.send(1, channel, microbatch, (tensor_of(0, 3),))
        if world.stage == 1:
            transport.recv(0, channel, 20000)
            with lost(f"^stage 1 of pipeline 4 expected {word} 20005 from stage 0( \\(w0\\))?, got {wrong}$"):
                transport.recv(0, channel, 20005)
    world.barrier()
    transport.close()


def waiting_ends_at_the_deadline_and_names_the_peer(world: World, *, oversubscribed: bool = True) -> None:
    """... and burns no core meanwhile."""
    transport = world.make(timeout_s=1.5, oversubscribed=oversubscribed)
    source = (world.stage + 1) % STAGES
    transport.send((world.stage - 1) % STAGES, "G", 6, (tensor_of(1, 3),))
    transport.recv(source, "G", 6)
    world.barrier()
    clock, cpu = time.perf_counter(), world.cpu_time()
    with lost(
        f"^stage {world.stage} of pipeline 4 waited 1.5 s for gradient 7 from stage {source} \\({HOSTS[source]}\\)"
    ):
        transport.recv(source, "G", 7)
    waited, burnt = time.perf_counter() - clock, world.cpu_time() - cpu
    assert 1.4 <= waited < 10, f"the deadline of 1.5 s came after {waited:.2f} s"
    assert burnt / waited < 0.25, f"waiting {waited:.2f} s took {burnt:.2f} s of CPU"
    world.barrier()
    transport.close()


def waiting_with_cores_to_spare_spins_only_at_first(world: World) -> None:
    waiting_ends_at_the_deadline_and_names_the_peer(world, oversubscribed=False)


def a_killed_peer_is_missed(world: World) -> None:
    """Stage 1 dies between two messages; run alone, since it ends the world."""
    transport = world.make(timeout_s=60.0)
    if world.stage == 1:
        transport.send(0, "A", 0, (tensor_of(1, 3),))
        transport.flush()
    if world.stage == 0:
        transport.recv(1, "A", 0)
    world.barrier()
    if world.stage == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if world.stage == 0:
        start = time.perf_counter()
        with lost("^stage 0 of pipeline 4 waited .* s for activation 1 from stage 1 \\(w1\\)"):
            transport.recv(1, "A", 1)
        assert time.perf_counter() - start < 20


def headers_and_carried_tensors_keep_step(world: World) -> None:
    """The tensors travel by other means than the headers, as with NCCL."""
    carried = replace(world, make=lambda: world.make(carried=True))
    random_messages_arrive_as_they_were(carried)
    a_short_last_batch_and_back(carried)
    another_microbatch_than_expected_is_an_error(carried)


def tensors_may_travel_in_pieces(world: World) -> None:
    """As those beyond 1 GiB do over MPI."""
    cut = replace(world, make=lambda: world.make(piece_bytes=100))
    random_messages_arrive_as_they_were(cut)
    a_short_last_batch_and_back(cut)
    received_tensors_never_share_memory(cut)
    another_microbatch_than_expected_is_an_error(cut)


ALONE = ("a_killed_peer_is_missed",)
SCENARIOS: dict[str, Callable[[World], object]] = {
    scenario.__name__: scenario
    for scenario in (
        random_messages_arrive_as_they_were,
        a_short_last_batch_and_back,
        large_messages_pass_each_other,
        sends_do_not_wait_for_the_receiver,
        a_sent_tensor_may_be_let_go_at_once,
        tensors_of_a_graph_can_be_sent,
        received_tensors_never_share_memory,
        another_microbatch_than_expected_is_an_error,
        waiting_ends_at_the_deadline_and_names_the_peer,
        waiting_with_cores_to_spare_spins_only_at_first,
        headers_and_carried_tensors_keep_step,
        tensors_may_travel_in_pieces,
        a_killed_peer_is_missed,
    )
}
OF_ONE_BACKEND = {"gloo": "headers_and_carried_tensors_keep_step", "mpi": "tensors_may_travel_in_pieces"}
TOGETHER = tuple(name for name in SCENARIOS if name not in (*ALONE, *OF_ONE_BACKEND.values()))


def run_scenarios(world: World, names: tuple[str, ...]) -> dict[str, str]:
    """Runs scenarios in turn until one fails; name -> "passed" or the error."""
    results: dict[str, str] = {}
    for name in names:
        try:
            world.barrier()
            SCENARIOS[name](world)
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
            break
    return results


# --- real worlds


def mpi_world() -> World:
    from mpi4py import MPI

    from pipeline.transport.mpi import MpiTransport
    from pipeline.transport.protocol import Who

    world = MPI.COMM_WORLD

    def make(*, timeout_s: float = 30.0, oversubscribed: bool = True, piece_bytes: int = 1 << 30) -> Any:
        return MpiTransport(
            world,
            who=Who(world.rank, 4, HOSTS),
            timeout_s=timeout_s,
            oversubscribed=oversubscribed,
            piece_bytes=piece_bytes,
        )

    return World(world.rank, make, world.Barrier, time.process_time)


class GlooCarrier:
    """Stands in for NcclCarrier: every tensor as a message of its own, whatever its layout, under another tag."""

    def __init__(self, group: Any) -> None:
        self._group, self._sent = group, []

    def send(self, tensor: Tensor, to: int) -> None:
        if tensor.nbytes:
            flat = torch.as_strided(tensor, (tensor.numel(),), (1,)).detach().view(torch.uint8)
            self._sent.append((self._group.send([flat], to, 99), flat))

    def recv(self, layout: Any, source: int) -> Tensor:
        tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)
        if tensor.nbytes:
            flat = torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)
            self._group.recv([flat], source, 99).wait()
        return tensor

    def flush(self) -> None:
        for work, _ in self._sent:
            work.wait()


def gloo_world(folder: Path) -> World:
    import torch.distributed as dist

    from pipeline.transport.protocol import Who
    from pipeline.transport.torch_dist import TorchTransport

    stage, stages = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), stages)
    dist.init_process_group("gloo", store=store, rank=stage, world_size=stages)
    rounds = iter(range(1 << 30))

    def make(*, timeout_s: float = 30.0, oversubscribed: bool = True, carried: bool = False) -> Any:
        group = dist.new_group(list(range(stages)))
        carrier: Any = GlooCarrier(group) if carried else None
        return TorchTransport(group, who=Who(stage, 4, HOSTS), timeout_s=timeout_s, carrier=carrier)

    def barrier() -> None:
        """Over the store, since a scenario may have broken connections."""
        turn = next(rounds)
        store.set(f"barrier/{turn}/{stage}", "here")
        store.wait([f"barrier/{turn}/{each}" for each in range(stages)])

    return World(stage, make, barrier, time.process_time)


def main(backend: str, folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    world = mpi_world() if backend == "mpi" else gloo_world(folder)
    results = run_scenarios(world, names or TOGETHER)
    (folder / f"{world.stage}.json").write_text(json.dumps(results))
    if set(results.values()) != {"passed"}:
        raise SystemExit(f"stage {world.stage}: {results}")  # under `-m mpi4py` this ends the whole world


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
