"""Everything a training run is told, as one frozen value that is checked when it is built.

Defaults stand beside the names; they are train_resnet.py's, and `TASK_DEFAULTS` holds what differs for BERT.
Both keep the values of the SDPipe reference, such as ResNet's batch of 128 at rate 0.1 and BERT's 64 at 1e-4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from pipeline.core.units import bytes_per_second
from pipeline.errors import UserError
from pipeline.simulation.emulation import parse_emulate
from pipeline.simulation.parse_profile import parse_profile

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "task": ("resnet", "bert"),
        "pipeline": ("gpipe", "1f1b", "pipedream", "dp"),
        "amp": ("off", "bf16", "fp16"),
        "batchnorm": ("microbatch", "deferred"),
        "optimizer": ("sgd", "adamw"),
        "lr_schedule": ("reference", "constant", "step", "poly", "cosine"),
        "backend": ("auto", "mpi", "gloo", "nccl"),
        "adpsgd_matching": ("async", "sync"),
        "initial_step_method": ("single_process", "multiple_processes"),
        "sync_momentum": ("keep", "average", "reset"),
        "checkpoint_errors": ("warn", "stop"),
        "outer": ("none", "slowmo", "diloco"),
        "wait": ("adaptive", "reference"),
        "nan": ("stop", "warn", "off"),
        "scale_lr": ("none", "linear", "sqrt"),
    }
)

MODELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        "bert": ("bert-base", "bert-large"),
    }
)

TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "resnet": MappingProxyType({}),
        "bert": MappingProxyType(
            {
                "batch_size": 64,
                "learning_rate": 1e-4,
                "weight_decay": 0.01,
                "dataset": "wiki",
                "model": "bert-base",
                "optimizer": "adamw",
            }
        ),
    }
)

FLUSHED = ("gpipe", "1f1b")  # schedules that split a batch into micro-batches and update once
DEFAULT_MICROBATCHES = 4
BERT_WARMUP_STEPS = 2000
RESNET_WARMUP_EPOCHS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run's settings; a value outside its range raises `UserError` naming the option and what it expects.

    `None` means "not given": the property or the module that needs the value says what it becomes.
    """

    task: str = "resnet"
    name: str = ""

    # what is trained
    model: str = "resnet18"
    dataset: str = "cifar100"
    data: str | None = None
    image_size: int | None = None
    sequence_length: int = 128
    bert_config: str | None = None
    vocab: str | None = None
    untied: bool = False
    init: str | None = None
    init_partial: bool = False
    workers: int | None = None
    test_io: int = 0

    # how long, how much, from which random numbers
    epochs: int = 100
    batch_size: int = 128  # samples per pipeline and batch
    max_steps: int | None = None
    seed: int = 0
    validate_every: int = 1

    # where it runs and how it is cut
    placement: str | None = None
    partition: str | None = None
    profile: str | None = None
    bandwidth: float | None = None  # bytes per second
    backend: str = "auto"
    timeout: float | None = None  # seconds

    # the schedule and the arithmetic
    pipeline: str = "pipedream"
    microbatches: int | None = None
    accumulate: int = 1
    batchnorm: str = "microbatch"
    amp: str = "off"
    recompute: bool = False
    channels_last: bool = False
    compile: bool = False
    nan: str = "stop"

    # the optimiser and its learning rate
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    scale_lr: str = "none"
    momentum: float = 0.9
    nesterov: bool = False
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-7  # the reference's
    weight_decay: float = 5e-4
    no_decay_norm_bias: bool = False
    clip_grad_norm: float | None = None
    lr_schedule: str = "reference"
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    lr_milestones: tuple[int, ...] | None = None  # in epochs
    lr_factor: float | None = None

    # how the replicas are kept together; without any of the first three, by all-reduce of gradients
    preduce: bool = False
    adpsgd: bool = False
    local_sgd: bool = False
    adpsgd_matching: str = "async"
    local_steps: int = 4
    initial_steps: int = 0
    initial_step_method: str = "single_process"
    host_steps: int | None = None  # hierarchical local SGD: steps between averages inside a host
    outer: str = "none"
    outer_momentum: float | None = None
    outer_learning_rate: float | None = None
    sync_momentum: str = "keep"
    sync_buffers: bool = False
    overlap_sync: bool = False
    max_group: int = 8
    connect_within: int | None = None  # rounds; None = 10 per replica
    wait: str = "adaptive"
    consensus_every: int = 0  # updates

    # uneven machines, real ones and simulated
    heartbeat_timeout: float = 3.0  # seconds
    min_replicas: int = 1
    hetero: str | None = None
    emulate: str | None = None

    # what it leaves behind
    checkpoint: str | None = None
    checkpoint_every: int = 0  # updates; 0 = at the end of epochs only
    keep: int = 3
    checkpoint_errors: str = "warn"
    resume: str | None = None  # "" = from `checkpoint`
    export: str | None = None
    metrics: str | None = None
    runs: str = "runs"
    out: str = "out"
    disp_batches: int = 20
    trace_steps: int = 4

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        _check_schedule(self)
        _check_learning_rate(self)
        _check_replicas(self)
        _check_simulated(self)
        _check_files(self)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per batch: as given; else 4 for gpipe and 1f1b (fewer in a tiny batch), else 1."""
        if self.microbatches is not None:
            return self.microbatches
        return min(DEFAULT_MICROBATCHES, self.batch_size) if self.pipeline in FLUSHED else 1

    @property
    def synchroniser(self) -> str:
        """What keeps the replicas together: "allreduce", "preduce", "adpsgd" or "local_sgd"."""
        if self.adpsgd:
            return "adpsgd"  # with --preduce too, as in the reference
        return "preduce" if self.preduce else "local_sgd" if self.local_sgd else "allreduce"

    @property
    def elastic(self) -> bool:
        """Whether the job survives the loss of a pipeline: with every synchroniser but all-reduce."""
        return self.synchroniser != "allreduce"

    @property
    def resume_directory(self) -> str | None:
        """The folder to resume from, or None for a fresh start: a bare --resume means --checkpoint's."""
        return self.checkpoint if self.resume == "" else self.resume

    def warmup_updates(self, updates_per_epoch: int) -> int:
        """Updates of linear warm-up: as given, or the reference's (ResNet 1 epoch, BERT 2000 updates)."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return round(self.warmup_epochs * updates_per_epoch)
        return BERT_WARMUP_STEPS if self.task == "bert" else round(RESNET_WARMUP_EPOCHS * updates_per_epoch)

    def to_values(self) -> dict[str, Any]:
        """The settings as JSON-able values, for a checkpoint or a report."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def default_settings(task: str) -> Settings:
    """The settings of a task ("resnet" or "bert") whose command line is empty."""
    return Settings(**{"task": task, **TASK_DEFAULTS.get(task, {})})


def option(name: str) -> str:
    """The command line's name of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def parse_bandwidth(text: str) -> float:
    """Bytes per second from '12.3GB', '10Gbit', '500MB/s' or '1e9'; raises `UserError`."""
    try:
        return bytes_per_second(text)
    except ValueError:
        raise UserError(f"--bandwidth {text}: expected bytes per second, as in 1e9, 12.3GB or 10Gbit") from None


def parse_milestones(text: str) -> tuple[int, ...]:
    """Epochs from '30,60,90'; raises `UserError`."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--lr-milestones {text}: expected epochs divided by commas, as in 30,60,90") from None


def parse_betas(text: str) -> tuple[float, float]:
    """Two numbers from '0.9,0.999'; raises `UserError`."""
    try:
        first, second = (float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--adam-betas {text}: expected two numbers divided by a comma, as in 0.9,0.999") from None
    return first, second


_FROM_ONE = (
    "epochs",
    "batch_size",
    "max_steps",
    "image_size",
    "microbatches",
    "accumulate",
    "keep",
    "disp_batches",
    "local_steps",
    "host_steps",
    "connect_within",
    "min_replicas",
)
_FROM_ZERO = (
    "workers",
    "validate_every",
    "checkpoint_every",
    "momentum",
    "weight_decay",
    "warmup_epochs",
    "initial_steps",
    "consensus_every",
    "outer_momentum",
)
_AT_LEAST: Mapping[str, float] = MappingProxyType(
    {
        **dict.fromkeys((*_FROM_ONE, "trace_steps"), 1),
        **dict.fromkeys((*_FROM_ZERO, "warmup_steps", "seed"), 0),
        "sequence_length": 8,
        "max_group": 2,
    }
)
_ABOVE_ZERO = (
    "learning_rate",
    "adam_eps",
    "lr_factor",
    "clip_grad_norm",
    "timeout",
    "bandwidth",
    "heartbeat_timeout",
    "outer_learning_rate",
)


def _check_choices(settings: Settings) -> None:
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            raise UserError(f"{option(name)} {value}: choose from {', '.join(choices)}")
    if settings.model not in MODELS[settings.task]:
        raise UserError(f"--model {settings.model}: choose from {', '.join(MODELS[settings.task])}")
    if settings.test_io not in (0, 1):
        raise UserError(f"--test-io {settings.test_io}: give 0 (train) or 1 (only read, and print samples/s)")


def _check_ranges(settings: Settings) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UserError(f"{option(name)} {value}: expected {least:g} or more")
    for name in _ABOVE_ZERO:
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{option(name)} {value:g}: expected a number above 0")
    if settings.momentum >= 1:
        raise UserError(f"--momentum {settings.momentum:g}: expected a number from 0 to below 1")


def _check_schedule(settings: Settings) -> None:
    flushed = settings.pipeline in FLUSHED
    if not flushed and settings.num_microbatches > 1:
        raise UserError(
            f"--microbatches {settings.microbatches} with --pipeline {settings.pipeline}: it moves whole "
            "batches; choose gpipe or 1f1b, or a smaller --batch-size"
        )
    if settings.num_microbatches > settings.batch_size:
        raise UserError(
            f"--microbatches {settings.microbatches} from --batch-size {settings.batch_size}: "
            "a micro-batch needs a sample; give fewer micro-batches"
        )
    if settings.batchnorm == "deferred" and not flushed:
        raise UserError(
            f"--batchnorm deferred with --pipeline {settings.pipeline}: it gathers the statistics of "
            "a batch's micro-batches; choose gpipe or 1f1b"
        )


def _default(name: str) -> Any:
    return Settings.__dataclass_fields__[name].default


def _check_learning_rate(settings: Settings) -> None:
    if settings.nesterov and (settings.optimizer != "sgd" or settings.momentum == 0):
        raise UserError("--nesterov needs --optimizer sgd and a --momentum above 0")
    if not all(0 <= beta < 1 for beta in settings.adam_betas):
        text = ",".join(f"{beta:g}" for beta in settings.adam_betas)
        raise UserError(f"--adam-betas {text}: expected two numbers from 0 to below 1, as in 0.9,0.999")
    for name in ("adam_betas", "adam_eps"):
        if getattr(settings, name) != _default(name) and settings.optimizer != "adamw":
            raise UserError(f"{option(name)} needs --optimizer adamw")
    if settings.warmup_epochs is not None and settings.warmup_steps is not None:
        raise UserError("--warmup-epochs and --warmup-steps were both given; give one")
    for name in ("lr_milestones", "lr_factor"):
        if getattr(settings, name) is not None and settings.lr_schedule != "step":
            raise UserError(f"{option(name)} with --lr-schedule {settings.lr_schedule}: only step uses it")
    milestones = settings.lr_milestones
    if milestones is None:
        return
    if not milestones or milestones[0] < 1 or any(b <= a for a, b in pairwise(milestones)):
        text = ",".join(map(str, milestones))
        raise UserError(f"--lr-milestones {text}: expected increasing epochs from 1 on, as in 30,60,90")


_OF_SYNCHRONISERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adpsgd_matching": ("adpsgd",),
        "local_steps": ("local_sgd",),
        "initial_steps": ("local_sgd",),
        "initial_step_method": ("local_sgd",),
        "host_steps": ("local_sgd",),
        "outer": ("local_sgd",),
        "overlap_sync": ("preduce",),
        "max_group": ("preduce",),
        "connect_within": ("preduce",),
        "wait": ("preduce",),
        "sync_momentum": ("preduce", "adpsgd", "local_sgd"),
        "sync_buffers": ("preduce", "adpsgd", "local_sgd"),
        "consensus_every": ("preduce", "adpsgd", "local_sgd"),
        "min_replicas": ("preduce", "adpsgd", "local_sgd"),
    }
)


def _check_replicas(settings: Settings) -> None:
    """Options of a synchroniser that was not chosen would silently do nothing."""
    if settings.local_sgd and (settings.preduce or settings.adpsgd):
        raise UserError(f"--local-sgd and {'--adpsgd' if settings.adpsgd else '--preduce'} were both given; give one")
    for name, owners in _OF_SYNCHRONISERS.items():
        if getattr(settings, name) != _default(name) and settings.synchroniser not in owners:
            raise UserError(f"{option(name)} needs {' or '.join(option(owner) for owner in owners)}")
    if settings.sync_momentum != "keep" and settings.adpsgd and settings.adpsgd_matching == "async":
        raise UserError("--sync-momentum with --adpsgd: averaging happens at any time; add --adpsgd-matching sync")
    if settings.outer == "none":
        for name in ("outer_momentum", "outer_learning_rate"):
            if getattr(settings, name) is not None:
                raise UserError(f"{option(name)} needs --outer slowmo or --outer diloco")
    if settings.host_steps is not None and settings.local_steps % settings.host_steps:
        raise UserError(
            f"--host-steps {settings.host_steps} with --local-steps {settings.local_steps}: "
            "averages across hosts come after a whole number of averages inside them; give a divisor"
        )
    if settings.elastic and settings.amp == "fp16":
        raise UserError(
            f"--amp fp16 with {option(settings.synchroniser)}: replicas would scale their losses differently; use bf16"
        )


def _check_simulated(settings: Settings) -> None:
    """What simulations are asked for is written correctly; files are read where training begins."""
    if settings.hetero is not None:
        parse_profile(settings.hetero)
    if settings.emulate is not None:
        parse_emulate(settings.emulate)
        if settings.compile:
            raise UserError("--compile with --emulate: waiting cannot be compiled; give one")


def _check_files(settings: Settings) -> None:
    if settings.init_partial and settings.init is None:
        raise UserError("--init-partial needs --init FILE: what should the training start from?")
    if settings.checkpoint_every and settings.checkpoint is None:
        raise UserError("--checkpoint-every needs --checkpoint DIR: where should the checkpoints go?")
    if settings.resume == "" and settings.checkpoint is None:
        raise UserError("--resume without a folder resumes from --checkpoint DIR, which was not given")
