"""Two stages on two processes, side by side in one run: one process, two independent ones, torch's pipelining, ours.

    python bench/pipeline.py                    all models, a table each
    python bench/pipeline.py --models mlp empty --rounds 9
    python bench/pipeline.py --memory           peak memory of each way, every way in processes of its own

Every way runs the same model on the same micro-batches with one thread per rank, round after round in turn, so that a
busy machine is unkind to all alike. A figure is the median over the rounds of the ratio to the single process of the
same round. The flushed ways update once per batch of 8 micro-batches; pipedream and its ceiling update at every one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.models import make_model
from pipeline.models.layered import LayeredModel, build_blocks
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, program
from pipeline.stage.build import bounds, make_stage
from pipeline.stage.executor import Executor, Hooks
from pipeline.transport import Who

MICROBATCHES = 8
STAGES = 2
TINY_BERT = json.dumps(
    {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
     "intermediate_size": 1024, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
     "attention_probs_dropout_prob": 0.0}
)  # fmt: skip
sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, fused=True)


@dataclass(frozen=True)
class Case:
    """A model to race: how it is built and cut in two, one micro-batch of inputs, how many batches a timing takes."""

    model: Callable[[], LayeredModel]
    counts: tuple[int, int]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batches: int


def _normal(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(*shape, generator=torch.Generator().manual_seed(n)),)


def _tokens(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(256, (4, 64), generator=generator)
    return ids, torch.zeros_like(ids), torch.ones_like(ids)


CASES: dict[str, Case] = {
    "mlp": Case(
        partial(make_model, "mlp", inputs=512, width=512, depth=8, num_classes=512), (4, 4), _normal(64, 512), 12
    ),
    "resnet18": Case(partial(make_model, "resnet18", num_classes=10, stem="cifar"), (6, 4), _normal(4, 3, 32, 32), 2),
    "bert4": Case(partial(make_model, "bert-base", config=TINY_BERT, seq_length=64, tied=False), (3, 3), _tokens, 3),
    "empty": Case(
        partial(make_model, "mlp", inputs=64, width=64, depth=8, num_classes=64), (4, 4), _normal(8, 64), 150
    ),
}


class MeanSquare:
    """The loss of every way: the mean square of the first output over the batch, so that targets do not matter."""

    def count(self, targets: Any) -> tuple[Tensor, ...]:
        return ()

    def __call__(self, outputs: tuple[Tensor, ...], targets: Any, counts: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs[0].square().mean() / MICROBATCHES, {}

    def means(self, sums: Any) -> dict[str, float]:
        return {}


class Part(nn.Module):
    """Some blocks of a model as one plain module, for the ways that are not ours."""

    def __init__(self, model: LayeredModel, start: int, stop: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(build_blocks(model, start, stop, 0))

    def forward(self, *tensors: Tensor) -> Any:
        result: Any = tensors
        for block in self.blocks:
            result = block(*(result if isinstance(result, tuple) else (result,)))
        return result


Run = Callable[[int], None]  # batches -> trains on that many


def single(case: Case, *, per_microbatch: bool) -> Run:
    """The whole model in this process, gradients accumulated over a batch; or an update at every micro-batch."""
    model = case.model()
    part = Part(model, 0, len(model.blocks))
    optimizer = sgd(part.parameters())
    data = [case.inputs(n) for n in range(MICROBATCHES)]

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def run(batches: int) -> None:
        for _ in range(batches):
            for inputs in data:
                output = part(*inputs)
                output = output[0] if isinstance(output, tuple) else output
                (output.square().mean() / MICROBATCHES).backward()
                if per_microbatch:
                    update()
            if not per_microbatch:
                update()

    return run


def torch_way(case: Case, name: str, rank: int) -> Run:
    """torch.distributed.pipelining on Gloo, its transport for CPUs."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    model = case.model()
    start, stop = bounds(case.counts, rank)
    part = Part(model, start, stop)
    stage = PipelineStage(part, rank, STAGES, torch.device("cpu"))

    def loss(output: Any, target: Tensor) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        return output.square().mean() / MICROBATCHES  # type: ignore[no-any-return]

    kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[name]
    schedule = kind(stage, n_microbatches=MICROBATCHES, loss_fn=loss, scale_grads=False)
    optimizer = sgd(part.parameters())
    data = [case.inputs(n) for n in range(MICROBATCHES)]
    whole = tuple(torch.cat(columns) for columns in zip(*data, strict=True))
    target = torch.zeros(len(whole[0]))

    def run(batches: int) -> None:
        for _ in range(batches):
            if rank == 0:
                schedule.step(*whole)
            else:
                schedule.step(target=target)
            optimizer.step()
            optimizer.zero_grad()

    return run


def our_way(case: Case, name: str, rank: int, transport: Any) -> tuple[Run, Executor]:
    """This project's executor over one of its transports."""
    schedule = SCHEDULES[name]
    microbatches = MICROBATCHES if schedule.flushes else 1
    shape = Shape(stages=STAGES, microbatches=microbatches)
    stage = make_stage(
        case.model(), case.counts, rank, sgd,
        seed=0, criterion=MeanSquare(), window=schedule.window(rank, STAGES, microbatches),
    )  # fmt: skip
    data = [case.inputs(n) for n in range(MICROBATCHES)]
    hooks = Hooks(
        inputs=lambda m: data[m % MICROBATCHES], targets=lambda m: ((), ()), learning_rate=lambda update: 1e-4
    )
    executor = Executor(stage, transport, position=rank, stages=STAGES, hooks=hooks)
    position = 0

    def run(batches: int) -> None:
        nonlocal position
        feed = range(position, position + batches * MICROBATCHES)
        executor.run(program(schedule, shape, rank, feed))
        transport.flush()
        position += batches * MICROBATCHES

    return run, executor


# --- the two racing processes


class Barrier:
    """Both processes meet; the one that waits sleeps, so that it does not slow the other down."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD.Dup()

    def __call__(self) -> None:
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(0.0005)


def prepare(case: Case, ways: Sequence[str], rank: int) -> dict[str, Run]:
    """One function per way; those that use one process do nothing on the other."""
    idle: Run = lambda batches: None  # noqa: E731
    makers: dict[str, Callable[[], Run]] = {
        "single": lambda: single(case, per_microbatch=False) if rank == 0 else idle,
        "single, update per microbatch": lambda: single(case, per_microbatch=True) if rank == 0 else idle,
        "two independent": lambda: single(case, per_microbatch=False),
        "two independent, update per microbatch": lambda: single(case, per_microbatch=True),
        "torch 1F1B": lambda: torch_way(case, "1f1b", rank),
        "torch GPipe": lambda: torch_way(case, "gpipe", rank),
    }
    for name in ("gpipe", "1f1b", "pipedream"):
        for backend in ("mpi", "gloo"):
            makers[f"ours {name} ({backend})"] = partial(_ours, case, name, rank, backend)
    return {way: makers[way]() for way in (ways or makers)}


_TRANSPORTS: dict[str, Any] = {}


def _ours(case: Case, name: str, rank: int, backend: str) -> Run:
    if backend not in _TRANSPORTS:
        _TRANSPORTS[backend] = _transport(backend, rank)
    return our_way(case, name, rank, _TRANSPORTS[backend])[0]


def _transport(backend: str, rank: int) -> Any:
    if backend == "gloo":
        from pipeline.transport.torch_dist import TorchTransport

        return TorchTransport(dist.group.WORLD, who=Who(rank))
    from mpi4py import MPI

    from pipeline.transport.mpi import MpiTransport

    return MpiTransport(MPI.COMM_WORLD, who=Who(rank))


def race(case: Case, ways: Sequence[str], rounds: int, rank: int) -> dict[str, list[float]]:
    """Seconds per micro-batch of every way in every round, measured from meeting to meeting."""
    barrier = Barrier()
    runs = prepare(case, ways, rank)
    for run in runs.values():
        barrier()
        run(2)
        barrier()
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            barrier()
            start = time.perf_counter()
            run(case.batches)
            barrier()
            times[way].append((time.perf_counter() - start) / (case.batches * MICROBATCHES))
    return times


def worker(arguments: argparse.Namespace) -> None:
    """One of the two processes, started by mpirun."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    rank = MPI.COMM_WORLD.rank
    store = dist.FileStore(arguments.store, STAGES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=STAGES)
    results: dict[str, Any] = {}
    for name in arguments.models:
        results[name] = race(CASES[name], arguments.ways, arguments.rounds, rank)
    results["peak"] = MPI.COMM_WORLD.allgather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if rank == 0:
        Path(arguments.output).write_text(json.dumps(results))
    dist.destroy_process_group()


def launch(models: Sequence[str], ways: Sequence[str], rounds: int) -> dict[str, Any]:
    """Starts the two processes under mpirun and returns what they measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    mpirun = Path(sys.executable).parent / "mpirun"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [
            str(mpirun) if mpirun.exists() else "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
            "-np", str(STAGES), sys.executable, "-m", "mpi4py", __file__, "--worker",
            "--store", str(Path(folder) / "store"), "--output", str(output),
            "--rounds", str(rounds), "--models", *models,
        ]  # fmt: skip
        if ways:
            command += ["--ways", *ways]
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())  # type: ignore[no-any-return]


def show(name: str, times: dict[str, list[float]]) -> None:
    """A table: milliseconds per micro-batch, speed-up over the single process, share of the ceiling, ratio to torch."""

    def ratio(base: str, way: str) -> float:
        return statistics.median(a / b for a, b in zip(times[base], times[way], strict=True))

    print(f"\n{name}: median of {len(times['single'])} rounds, {MICROBATCHES} micro-batches a batch")
    print(f"{'way':40} {'ms/mb':>8} {'speed-up':>9} {'of ceiling':>11} {'x torch 1F1B':>13}")
    for way, seconds in times.items():
        each = "update per" in way or "pipedream" in way
        base = "single, update per microbatch" if each else "single"
        ceiling = "two independent, update per microbatch" if each else "two independent"
        pairs = 2 if way.startswith("two") else 1
        print(
            f"{way:40} {statistics.median(seconds) * 1e3:8.3f} {pairs * ratio(base, way):9.2f} "
            f"{pairs * ratio(ceiling, way) / 2:11.2f} {pairs * ratio('torch 1F1B', way):13.2f}"
        )


def show_memory(models: Sequence[str]) -> None:
    """Peak resident memory per process and way, each way in a fresh pair of processes."""
    for name in models:
        print(f"\n{name}: peak memory of the two processes, MB")
        for way in ("torch 1F1B", "torch GPipe", "ours 1f1b (mpi)", "ours gpipe (mpi)", "ours 1f1b (gloo)",
                    "ours gpipe (gloo)", "ours pipedream (mpi)"):  # fmt: skip
            peak = launch([name], [way], 1)["peak"]
            print(f"{way:40} {peak[0] / 1e6:8.1f} {peak[1] / 1e6:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
    elif arguments.memory:
        show_memory(arguments.models)
    else:
        for name in arguments.models:
            show(name, launch([name], arguments.ways, arguments.rounds)[name])


if __name__ == "__main__":
    main()
