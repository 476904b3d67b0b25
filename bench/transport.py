"""How fast tensors travel: our transports against the libraries under them, and the all-reduce of a model's gradients.

    python bench/transport.py                              everything, two processes
    python bench/transport.py --part messages --rounds 21  only messages, more rounds
    python bench/transport.py --part allreduce --network resnet152 --ranks 4

Messages go to and fro between two processes; a figure is half the time of a round trip. `raw` is mpi4py's Isend and
Irecv, or torch.distributed's isend and irecv, on buffers allocated once: one, which stays in the cache, or two in turn,
the least that returns a message while the next one comes. Ours checks the micro-batch, follows changes of shape and
returns a fresh tensor. All ways take turns round after round, so that a busy machine is unkind to all
alike; times are medians over the rounds, ratios the median of (raw / ours) within a round.

The all-reduce part follows MXNet's tools/bandwidth/measure.py: arrays with the shapes of a network's parameters, a
line per iteration, B = size * 2 (n - 1) / n / t per rank, and e the sum of |difference| over the sum of |value| to a
sum computed without communication. Iteration 0 warms up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.models import make_model
from pipeline.models.layered import build_blocks
from pipeline.replicas.gradients import GradientReducer
from pipeline.stage.weights import Weights
from pipeline.transport.mpi import MpiTransport
from pipeline.transport.protocol import Transport, Who
from pipeline.transport.torch_dist import TorchTransport

SIZES = (4, 4 << 10, 64 << 10, 1 << 20, 10_000_000, 100_000_000)  # bytes
ROUND_S = 0.004  # about how long one way runs in one round: short, so that other work spoils few rounds
Times = dict[str, list[float]]


class Barrier:
    """All processes meet; the one that waits sleeps, so that it does not slow the others down."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD.Dup()

    def __call__(self) -> None:
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(0.0002)

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self._comm.allgather(value))


# --- messages


@dataclass(frozen=True)
class Way:
    """A way to send a tensor and to receive the other's, both from the start of a round to its end.

    start is called before a round with the size, and gives (send, receive) of micro-batch number; settle after it.
    """

    start: Callable[[Tensor], tuple[Callable[[int], object], Callable[[int], object]]]
    settle: Callable[[], object]


def transport_way(transport: Transport, other: int) -> Way:
    """One of ours, as the executor calls it."""
    numbers = {"sent": 0, "received": 0}

    def start(tensor: Tensor) -> tuple[Callable[[int], object], Callable[[int], object]]:
        def send(_: int) -> None:
            transport.send(other, "A", numbers["sent"], (tensor,))
            numbers["sent"] += 1

        def receive(_: int) -> Tensor:
            (received,) = transport.recv(other, "A", numbers["received"])
            numbers["received"] += 1
            return received

        return send, receive

    return Way(start, transport.flush)


def raw_mpi_way(other: int, targets: int) -> Way:
    """mpi4py: Isend of memory that stays where it is, Irecv into `targets` pieces of memory in turn."""
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD.Dup()
    pending: list[Any] = []

    def start(tensor: Tensor) -> tuple[Callable[[int], object], Callable[[int], object]]:
        received = [torch.zeros_like(tensor) for _ in range(targets)]
        here, *there = (MPI.buffer.fromaddress(t.data_ptr(), t.nbytes) for t in (tensor, *received))

        def send(_: int) -> None:
            while pending:
                pending.pop().Wait()
            pending.append(communicator.Isend(here, other))

        def receive(number: int) -> Tensor:
            communicator.Irecv(there[number % targets], other).Wait()
            return received[number % targets]

        return send, receive

    return Way(start, lambda: [request.Wait() for request in pending] and pending.clear())


def raw_gloo_way(other: int, targets: int) -> Way:
    """torch.distributed: isend of a tensor that stays where it is, irecv into `targets` tensors in turn."""
    pending: list[Any] = []

    def start(tensor: Tensor) -> tuple[Callable[[int], object], Callable[[int], object]]:
        received = [torch.zeros_like(tensor) for _ in range(targets)]

        def send(_: int) -> None:
            while pending:
                pending.pop().wait()
            pending.append(dist.isend(tensor, other))

        def receive(number: int) -> Tensor:
            work = dist.irecv(received[number % targets], other)
            assert work is not None
            work.wait()
            return received[number % targets]

        return send, receive

    return Way(start, lambda: [work.wait() for work in pending] and pending.clear())


def to_and_fro(way: Way, tensor: Tensor, count: int, rank: int, barrier: Barrier) -> float:
    """Seconds per message of `count` round trips."""
    send, receive = way.start(tensor)
    barrier()
    begin = time.perf_counter()
    for number in range(count):
        if rank == 0:
            send(number)
            receive(number)
        else:
            receive(number)
            send(number)
    seconds = (time.perf_counter() - begin) / (2 * count)
    way.settle()
    return seconds


def race(ways: dict[str, Way], size: int, rounds: int, rank: int, barrier: Barrier) -> Times:
    """Seconds per message of every way in every round."""
    tensor = torch.randn(size // 4)
    counts = {}
    for name, way in ways.items():
        seconds = min(to_and_fro(way, tensor, 2, rank, barrier) for _ in range(5))
        counts[name] = barrier.largest(min(200, max(2, int(ROUND_S / 2 / seconds))))
    times: Times = {name: [] for name in ways}
    for _ in range(rounds if size > 1 << 20 else 5 * rounds):
        for name, way in ways.items():
            times[name].append(to_and_fro(way, tensor, counts[name], rank, barrier))
    return times


def show_messages(results: dict[int, Times]) -> None:
    """Two tables: the median of the rounds, and the best one, which other work on the machine has disturbed least."""
    print("\nMessages between two processes: half a round trip, median of the rounds; ratio = raw / ours")
    _show_table(results, statistics.median)
    print("\nThe same, best round of each way")
    _show_table(results, min)


def _show_table(results: dict[int, Times], choose: Callable[[list[float]], float]) -> None:
    """Microseconds, MB/s, and the ratios to raw of every way and size."""
    print(f"{'':17} {'raw, one buffer':^28} {'raw, two in turn':^28} {'ours':^19}")
    print(f"{'bytes':>10}  {'over':5} {' '.join([_columns('us', 'MB/s', 'ratio')] * 3)}"[:-8])
    for size, times in results.items():
        for over in ("mpi", "gloo"):
            ours = times[f"ours {over}"]
            cells = [_cells(size, times[f"{way} {over}"], ours, choose) for way in ("raw", "turn", "ours")]
            print(f"{size:10}  {over:5} {' '.join(cells)}"[:-8])


def _columns(us: str, rate: str, ratio: str) -> str:
    return f"{us:>9} {rate:>9} {ratio:>7} "


def _cells(size: int, seconds: list[float], ours: list[float], choose: Callable[[list[float]], float]) -> str:
    chosen = choose(seconds)
    if choose is min:
        ratio = chosen / min(ours)
    else:
        ratio = choose([a / b for a, b in zip(seconds, ours, strict=True)])
    return _columns(f"{chosen * 1e6:.1f}", f"{size / chosen / 1e6:.0f}", f"{ratio:.2f}")


# --- all-reduce


def gradients_of(weights: Weights, iteration: int, rank: int) -> list[Tensor]:
    """What `rank` contributes in an iteration; every rank can compute everybody's."""
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    return [torch.randn(slot.shape, generator=generator) for slot in weights.slots]


def relative_error(results: Sequence[Tensor], weights: Weights, iteration: int, ranks: int) -> float:
    """Sum of |difference| over sum of |value| between `results` and a sum computed right here."""
    contributions = [gradients_of(weights, iteration, rank) for rank in range(ranks)]
    exact = [sum(column[1:], column[0].double()) for column in zip(*contributions, strict=True)]
    wrong = sum(float((a - b).abs().sum()) for a, b in zip(results, exact, strict=True))
    return wrong / sum(float(b.abs().sum()) for b in exact)


def reduce_ours(reducer: GradientReducer, weights: Weights, gradients: list[Tensor]) -> list[Tensor]:
    """The bucketed mean that training uses; copies into the buckets are in the time."""
    weights.gradients = list(gradients)
    reducer.open()
    reducer.finish()
    return [gradient for gradient in weights.gradients if gradient is not None]


def reduce_each(gradients: list[Tensor]) -> None:
    """torch.distributed on one array after the other, all under way at once."""
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        assert work is not None
        work.wait()


def measure_allreduce(network: str, iterations: int, rank: int, ranks: int, barrier: Barrier) -> dict[str, Any]:
    """Seconds and errors of each iteration; prints MXNet's lines on rank 0."""
    model = make_model(network, num_classes=1000)
    blocks = build_blocks(model, 0, len(model.blocks), 0)
    weights = Weights([(block.prefix, module) for block, module in zip(model.blocks, blocks, strict=True)])
    reducer = GradientReducer(weights, dist.group.WORLD)
    size = 4 * sum(slot.size for slot in weights.slots)
    say = print if rank == 0 else lambda *words, **options: None
    say(f"\nAll-reduce over {ranks} processes, Gloo: ours in buckets, torch array by array, torch in one piece")
    say(f"num of arrays = {len(weights.slots)}, total size = {size / 1e6:.6g} MB", flush=True)
    flat = torch.empty(size // 4)
    times: Times = {"ours": [], "torch, array by array": [], "torch, in one piece": []}
    errors = []
    for iteration in range(iterations + 1):
        mine = gradients_of(weights, iteration, rank)
        seconds, results = _timed(barrier, lambda mine=mine: reduce_ours(reducer, weights, mine))
        error = relative_error([result * ranks for result in results], weights, iteration, ranks)
        rate = size * 2 * (ranks - 1) / ranks / seconds / 1e9
        say(f"iter {iteration}, {seconds:.6f} sec, {rate:.6f} GB/sec per rank, error {error:.3g}", flush=True)
        torch.cat([gradient.reshape(-1) for gradient in mine], out=flat)
        each, _ = _timed(barrier, lambda mine=mine: reduce_each(mine))
        whole, _ = _timed(barrier, lambda: dist.all_reduce(flat))
        if iteration > 0:
            errors.append(error)
            for name, value in zip(times, (seconds, each, whole), strict=True):
                times[name].append(value)
    return {"size": size, "ranks": ranks, "times": times, "errors": errors}


def _timed(barrier: Barrier, call: Callable[[], Any]) -> tuple[float, Any]:
    barrier()
    begin = time.perf_counter()
    result = call()
    barrier()
    return time.perf_counter() - begin, result


def show_allreduce(results: dict[str, Any]) -> None:
    """Medians over the iterations and ratios to the ways of torch."""
    ranks, times = results["ranks"], results["times"]
    print(f"{'':24} {'ms':>8} {'GB/s per rank':>14} {'its time / ours':>16}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(seconds, times["ours"], strict=True))
        rate = results["size"] * 2 * (ranks - 1) / ranks / median / 1e9
        print(f"{name:24} {median * 1e3:8.1f} {rate:14.2f} {ratio:16.2f}")


# --- processes


def worker(arguments: argparse.Namespace) -> None:
    """One of the processes, started by mpirun."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    dist.init_process_group("gloo", store=dist.FileStore(arguments.store, ranks), rank=rank, world_size=ranks)
    barrier = Barrier()
    results: dict[str, Any] = {}
    if arguments.part == "messages":
        other = 1 - rank
        ours = {
            "mpi": MpiTransport(MPI.COMM_WORLD, who=Who(rank)),
            "gloo": TorchTransport(dist.group.WORLD, who=Who(rank)),
        }
        ways = {
            "raw mpi": raw_mpi_way(other, 1),
            "turn mpi": raw_mpi_way(other, 2),
            "ours mpi": transport_way(ours["mpi"], other),
            "raw gloo": raw_gloo_way(other, 1),
            "turn gloo": raw_gloo_way(other, 2),
            "ours gloo": transport_way(ours["gloo"], other),
        }
        for size in arguments.sizes:
            results[str(size)] = race(ways, size, arguments.rounds, rank, barrier)
    else:
        results = measure_allreduce(arguments.network, arguments.iterations, rank, ranks, barrier)
    barrier()
    if rank == 0:
        Path(arguments.output).write_text(json.dumps(results))
    dist.destroy_process_group()


def launch(part: str, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts `ranks` processes under mpirun and returns what they measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    mpirun = Path(sys.executable).parent / "mpirun"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [
            str(mpirun) if mpirun.exists() else "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
            "-np", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--worker", "--part", part,
            "--store", str(Path(folder) / "store"), "--output", str(output), "--rounds", str(arguments.rounds),
            "--network", arguments.network, "--iterations", str(arguments.iterations),
            "--sizes", *map(str, arguments.sizes),
        ]  # fmt: skip
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("messages", "allreduce"), help="default: both")
    parser.add_argument("--rounds", type=int, default=11, help="of messages; 5 times as many up to 1 MB (default: 11)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="BYTES", help="multiples of 4")
    parser.add_argument("--network", default="resnet50", help="whose parameters are reduced (default: resnet50)")
    parser.add_argument("--iterations", type=int, default=5, help="of the all-reduce (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="of the all-reduce (default: 2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    if arguments.part != "allreduce":
        results = launch("messages", 2, arguments)
        show_messages({int(size): times for size, times in results.items()})
    if arguments.part != "messages":
        show_allreduce(launch("allreduce", arguments.ranks, arguments))


if __name__ == "__main__":
    main()
