"""What a GPU gets done: a plain PyTorch loop, ours with one stage, ours with two stages that share the card.

    python bench/gpu.py                          ResNet-50 at 224 x 224 and BERT-base at 128 tokens, a table each
    python bench/gpu.py --models bert --rounds 9 --backend gloo
    python bench/gpu.py --device cpu --tiny      the same steps on small models, to see that they run

All ways train the same blocks in bf16 autocast (images channels-last) with the same fused optimiser on synthetic data
that lies on the card; one after the other, round by round, so that a ratio compares neighbours in time. Two stages
are two processes; what they exchange goes through pinned host memory. FLOPs are those of the products and
convolutions of one forward and backward (torch.utils.flop_counter); the peak is the card's dense bf16 rate.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.core.trace import Recorder
from pipeline.data.supply import InputSupply, TargetSupply
from pipeline.models import build_blocks, build_whole, make_model, tie
from pipeline.models.criterion import BertPretraining, Classification, Criterion
from pipeline.models.layered import LayeredModel
from pipeline.schedules.orders import SCHEDULES
from pipeline.schedules.program import Shape, program
from pipeline.stage.build import make_stage, tie_of
from pipeline.stage.executor import Executor, Hooks
from pipeline.stage.gpu_clock import cuda_clock
from pipeline.stage.stage import Stage, StageOptions
from pipeline.train.optim import OptimizerFactory, make_optimizer
from pipeline.transport import Who
from pipeline.transport.local import local_transports
from pipeline.transport.staged import StagedTransport

Tensors = tuple[Tensor, ...]
Batch = tuple[Tensors, Tensors]  # inputs, targets
Run = Callable[[int], None]  # batches -> trains on that many
TARGET = 0.98  # of the plain loop, for ours with one stage
MICROBATCHES = 4  # of a batch, for two stages
PLAIN, ONE = "plain PyTorch loop", "ours, one stage"
TWO = {"ours, two stages, 1f1b": "1f1b", "ours, two stages, pipedream": "pipedream"}

PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets; of several names that fit, the longest counts
    "A10": 125, "A10G": 70, "A100": 312, "A30": 165, "A40": 150, "A800": 312, "B200": 2250, "GH200": 989, "H100": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "H20": 148, "H200": 989, "H800": 989, "L4": 121, "L40": 181, "L40S": 362,
    "RTX 3090": 71, "RTX 4090": 165, "RTX A6000": 155,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the card of this name, None if the table has no such card."""
    known = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


# --- what is trained


@dataclass(frozen=True)
class Case:
    """A model to race: its loss in ours and in the plain loop, its batches, and how it is cut in two."""

    model: Callable[[], LayeredModel]
    criterion: Criterion
    loss: Callable[[Tensors, Tensors], Tensor]
    batch: Callable[[int], Batch]  # size -> on the CPU
    size: int
    counts: tuple[int, int]
    optimizer: OptimizerFactory
    unit: str
    batches: int = 10  # in a timing


def image_loss(outputs: Tensors, targets: Tensors) -> Tensor:
    return F.cross_entropy(outputs[0].float(), targets[0])


def bert_loss(outputs: Tensors, targets: Tensors) -> Tensor:
    (scores, sentence), (labels, follows) = outputs, targets
    masked = F.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), ignore_index=-1)
    return masked + F.cross_entropy(sentence.float(), follows)


def images(side: int, size: int) -> Batch:
    """(size, 3, side, side), channels last, and labels below 10."""
    pixels = torch.randn(size, 3, side, side).to(memory_format=torch.channels_last)
    return (pixels,), (torch.randint(10, (size,)),)


def tokens(vocab: int, length: int, size: int) -> Batch:
    """Token, segment and mask (size, length); 15 % of the tokens masked, and which sentences follow each other."""
    ids = torch.randint(1, vocab, (size, length))
    labels = torch.where(torch.rand(size, length) < 0.15, ids, -1)
    return (ids, torch.zeros_like(ids), torch.ones_like(ids)), (labels, torch.randint(2, (size,)))


TINY_BERT = json.dumps(
    {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
     "max_position_embeddings": 16}
)  # fmt: skip
sgd = make_optimizer("sgd", learning_rate=1e-3, weight_decay=1e-4)
adamw = make_optimizer("adamw", learning_rate=1e-5, weight_decay=0.01)
resnet50 = partial(make_model, "resnet50")
tiny_resnet = partial(make_model, "resnet18", num_classes=10, stem="cifar", image_size=16)
bert_base = partial(make_model, "bert-base")
tiny_bert = partial(make_model, "bert-base", config=TINY_BERT, seq_length=16)
CASES = {
    "resnet50": Case(
        resnet50, Classification(), image_loss, partial(images, 224), 256, (8, 10), sgd, "images/s"
    ),
    "bert": Case(
        bert_base, BertPretraining(), bert_loss, partial(tokens, 30522, 128), 128, (8, 6), adamw, "sequences/s"
    ),
}  # fmt: skip
TINY = {
    "resnet50": Case(tiny_resnet, Classification(), image_loss, partial(images, 16), 8, (5, 5), sgd, "images/s", 1),
    "bert": Case(tiny_bert, BertPretraining(), bert_loss, partial(tokens, 100, 16), 8, (3, 2), adamw, "sequences/s", 1),
}


def resident(case: Case, device: torch.device) -> list[Batch]:
    """Two batches on the card."""
    torch.manual_seed(0)
    pairs = [case.batch(case.size) for _ in range(2)]
    return [(tuple(t.to(device) for t in inputs), tuple(t.to(device) for t in targets)) for inputs, targets in pairs]


def training_flops(model: LayeredModel) -> int:
    """Of a forward and a backward of one sample; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build_whole(model, 0).to("meta")
    with FlopCounterMode(display=False) as counter:
        outputs = network(*(tensor.to("meta") for tensor in model.sample(1)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return counter.get_total_flops()


# --- the ways


def plain_way(case: Case, device: torch.device, *, compiled: bool) -> Run:
    """A loop as anybody would write it."""
    model = case.model()
    modules = build_blocks(model, 0, len(model.blocks), 0)
    tie(model, modules)
    modules = [module.to(device, memory_format=torch.channels_last) for module in modules]  # type: ignore[call-overload]
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    optimizer = case.optimizer(list(parameters))
    blocks = [torch.compile(module, dynamic=False) if compiled else module for module in modules]
    data = resident(case, device)

    def forward(tensors: Any) -> Tensors:
        for block in blocks:
            tensors = block(*tensors)
            tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        return tensors  # type: ignore[no-any-return]

    def run(batches: int) -> None:
        for number in range(batches):
            inputs, targets = data[number % len(data)]
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = case.loss(forward(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def our_way(
    case: Case, device: torch.device, schedule: str, *, stage: int, stages: int, transport: Any, compiled: bool
) -> Run:
    """The training loop's stage, executor, supplies and clock."""
    model, plan = case.model(), SCHEDULES[schedule]
    counts = case.counts if stages > 1 else (len(model.blocks),)
    parts = MICROBATCHES if plan.flushes and stages > 1 else 1
    lent = tie_of(model, counts)
    shape = Shape(stages=stages, microbatches=parts, tie=(lent.owner, lent.borrower) if lent else None)
    here = make_stage(
        model, counts, stage, case.optimizer, seed=0, criterion=case.criterion, device=device,
        window=plan.window(stage, stages, parts),
        options=StageOptions(amp=torch.bfloat16, channels_last=True, compile=compiled),
    )  # fmt: skip
    hooks = Hooks(learning_rate=lambda update: 1e-5)
    supply(hooks, case, resident(case, device), device, parts)
    executor = timed_executor(here, transport, hooks, device, position=stage, stages=stages, tie=lent)
    done = 0

    def run(batches: int) -> None:
        nonlocal done
        executor.run(program(plan, shape, stage, range(done, done + batches * parts)))
        transport.flush()
        done += batches * parts

    return run


def supply(hooks: Hooks, case: Case, data: Sequence[Batch], device: torch.device, parts: int) -> None:
    """Feeds the batches on the card, in `parts` micro-batches each, for ever."""

    def feed(column: int) -> Iterator[tuple[int, Tensors]]:
        cut = [list(zip(*(tensor.chunk(parts) for tensor in pair[column]), strict=True)) for pair in data]
        for number in count():
            batch, part = divmod(number, parts)
            yield number, cut[batch % len(cut)][part]

    hooks.inputs = InputSupply(feed(0))
    hooks.targets = TargetSupply(feed(1), case.criterion, ends_update=lambda m: m % parts == parts - 1, device=device)


def timed_executor(
    stage: Stage, transport: Any, hooks: Hooks, device: torch.device, *, position: int, **options: Any
) -> Executor:
    """An executor that measures itself and collects metrics as in training."""
    recorder = Recorder(pipeline=0, stage=position, steps=4)
    clock = None
    if device.type == "cuda":
        clock = cuda_clock(device, record=recorder.record, end_step=recorder.end_step)
    else:
        hooks.record = recorder.record
    end_step = recorder.end_step if clock is None else clock.end_step
    hooks.updated = lambda microbatch: (stage.take_sums(), end_step())
    return Executor(stage, transport, position=position, hooks=hooks, clock=clock, **options)


def pair_transport(backend: str, rank: int, device: torch.device) -> StagedTransport:
    """Between the two processes, through pinned host memory."""
    if backend == "gloo":
        from pipeline.transport.torch_dist import TorchTransport

        return StagedTransport(TorchTransport(dist.group.WORLD, who=Who(rank)), device)
    from mpi4py import MPI

    from pipeline.transport.mpi import MpiTransport

    return StagedTransport(MpiTransport(MPI.COMM_WORLD, who=Who(rank)), device)


# --- the two processes


def prepare(case: Case, device: torch.device, rank: int, backend: str, *, compiled: bool) -> dict[str, Run]:
    """A function per way; the second process only has something to do where there are two stages."""
    runs: dict[str, Run] = dict.fromkeys((PLAIN, ONE), lambda batches: None)
    if rank == 0:
        alone = local_transports(1)[0]
        runs[PLAIN] = plain_way(case, device, compiled=compiled)
        runs[ONE] = our_way(case, device, "1f1b", stage=0, stages=1, transport=alone, compiled=compiled)
    both = pair_transport(backend, rank, device)
    for way, schedule in TWO.items():
        runs[way] = our_way(case, device, schedule, stage=rank, stages=2, transport=both, compiled=compiled)
    return runs


def race(case: Case, runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per batch of every way in every round, measured from meeting to meeting with the card idle."""

    def meet() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()

    times: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds + 1):  # the first one is to warm up
        for way, run in runs.items():
            meet()
            start = time.perf_counter()
            run(case.batches)
            meet()
            if number > 0:
                times[way].append((time.perf_counter() - start) / case.batches)
    return times


def worker(arguments: argparse.Namespace) -> None:
    """One of the two processes, started by mpirun."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    dist.init_process_group("gloo", store=dist.FileStore(arguments.store, 2), rank=rank, world_size=2)
    (name,) = arguments.models
    case = (TINY if arguments.tiny else CASES)[name]
    runs = prepare(case, device, rank, arguments.backend, compiled=arguments.compile)
    times = race(case, runs, arguments.rounds, device)
    if rank == 0:
        Path(arguments.output).write_text(json.dumps(times))
    dist.destroy_process_group()


def launch(name: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Starts the two processes under mpirun and returns what they measured."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    mpirun = Path(sys.executable).parent / "mpirun"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [
            str(mpirun) if mpirun.exists() else "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
            "-np", "2", sys.executable, "-m", "mpi4py", __file__, "--worker", "--store", str(Path(folder) / "store"),
            "--output", str(output), "--models", name, "--rounds", str(arguments.rounds),
            "--device", arguments.device, "--backend", arguments.backend,
        ]  # fmt: skip
        command += [flag for flag in ("--tiny", "--compile") if getattr(arguments, flag[2:])]
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text())  # type: ignore[no-any-return]


def show(name: str, case: Case, times: dict[str, list[float]], peak: float | None) -> None:
    """A table: milliseconds per batch, throughput, TFLOP/s, share of the peak and of the plain loop's speed."""
    flops = training_flops(case.model()) * case.size
    print(
        f"\n{name}: batch {case.size}, {flops / 1e9 / case.size:.2f} GFLOP a sample, "
        f"medians of {len(times[PLAIN])} rounds"
    )
    print(f"{'way':30} {'ms/batch':>9} {case.unit:>12} {'TFLOP/s':>8} {'of peak':>8} {'of plain':>9}")
    for way, seconds in times.items():
        batch_s = statistics.median(seconds)
        share = f"{flops / batch_s / peak:8.1%}" if peak else f"{'?':>8}"
        print(
            f"{way:30} {batch_s * 1e3:9.2f} {case.size / batch_s:12.1f} {flops / batch_s / 1e12:8.2f} {share} "
            f"{of_plain(times, way):9.3f}"
        )
    print(f"{ONE}: {of_plain(times, ONE):.3f} of the {PLAIN}; to reach: {TARGET}")


def of_plain(times: dict[str, list[float]], way: str) -> float:
    """The speed of a way over that of the plain loop in the same round, median."""
    return statistics.median(plain / ours for plain, ours in zip(times[PLAIN], times[way], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--backend", choices=("mpi", "gloo"), default="mpi", help="between two stages (default: mpi)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block, in every way")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models: says that it runs, not how fast")
    for hidden in ("--store", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here, so nothing was measured (--device cpu --tiny shows that it runs)")
        return
    if arguments.worker:
        worker(arguments)
        return
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    peak = peak_flops(card) if arguments.device == "cuda" else None
    print(
        f"{card}: {f'{peak / 1e12:.0f} TFLOP/s in dense bf16' if peak else 'no peak known'}; torch {torch.__version__}"
    )
    for name in arguments.models:
        case = (TINY if arguments.tiny else CASES)[name]
        show(name, case, launch(name, arguments), peak)


if __name__ == "__main__":
    main()
