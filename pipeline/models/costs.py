"""What each block of a model costs: measured on a device, and kept in a file for the next run.

images --> stem --> layer1.0 --> ... --> head      every block runs on the real output of the one before it,
           F B      F B                  F B       a few times; the medians of its two halves are its cost
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.outside import parse_json
from pipeline.errors import UserError
from pipeline.models.layered import LayeredModel, Tensors, as_tuple, build_blocks


@dataclass(frozen=True)
class BlockCost:
    """One block, measured: seconds per micro-batch, and bytes of what it returns and of its parameters."""

    name: str
    forward_s: float
    backward_s: float
    output_bytes: int
    parameter_bytes: int


@dataclass(frozen=True)
class Conditions:
    """What a profile was measured on; it says nothing about any other."""

    model: str
    batch: int
    inputs: str  # of the first block, without the batch, e.g. "3x32x32"
    device: str
    precision: str


@dataclass(frozen=True)
class Profile:
    """The cost of every block of a model, in order, and under which conditions."""

    conditions: Conditions
    costs: tuple[BlockCost, ...]


def conditions_of(
    model: LayeredModel, *, batch: int, device: torch.device | str, autocast: torch.dtype | None = None
) -> Conditions:
    """The conditions of a measurement with these arguments."""
    inputs = " ".join("x".join(map(str, tensor.shape[1:])) for tensor in model.sample(1))
    precision = str(autocast or torch.float32).removeprefix("torch.")
    return Conditions(model.name, batch, inputs, device_name(device), precision)


def device_name(device: torch.device | str) -> str:
    """The name under which a profile of this device is kept: the card's, or "cpu"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def profile_blocks(
    model: LayeredModel,
    *,
    batch: int,
    device: torch.device | str,
    clock: Callable[[], float],
    repeats: int = 5,
    warmup: int = 2,
    autocast: torch.dtype | None = None,
    loss: Callable[[Tensors], Tensor] | None = None,
) -> list[BlockCost]:
    """Median seconds of each block's forward and backward in training, on a chain of real outputs.

    clock: returns seconds, e.g. time.perf_counter; the device is idle whenever it is read.
    loss: of the last block's outputs; its time is the last block's. Blocks are built, measured and freed one by
    one, and the random generators are left as they were found.
    """
    if batch < 1 or repeats < 1:
        raise ValueError(f"a profile needs a batch and repeats of at least 1; got {batch} and {repeats}")
    device, costs = torch.device(device), []
    with _random_state_kept(device):
        tensors = tuple(tensor.to(device) for tensor in model.sample(batch))
        for index, block in enumerate(model.blocks):
            module = build_blocks(model, index, index + 1, 0)[0].to(device).train()
            finish = loss if index == len(model.blocks) - 1 else None
            once = partial(_once, module, tensors, _idle_clock(clock, device), autocast, finish)
            tensors, forward_s, backward_s = _median_of(once, repeats=repeats, warmup=warmup)
            costs.append(BlockCost(block.name, forward_s, backward_s, _bytes(tensors), _bytes(module.parameters())))
    return costs


Timed = tuple[Tensors, float, float]  # outputs, seconds forward, seconds backward


def _median_of(once: Callable[[], Timed], *, repeats: int, warmup: int) -> Timed:
    """The last outputs, and the median times of the runs after the warm-up."""
    times = []
    for _ in range(warmup + repeats):
        outputs, *seconds = once()
        times.append(seconds)
    forward_s, backward_s = (median(part) for part in zip(*times[warmup:], strict=True))
    return outputs, forward_s, backward_s


def _once(
    module: nn.Module,
    tensors: Tensors,
    clock: Callable[[], float],
    autocast: torch.dtype | None,
    loss: Callable[[Tensors], Tensor] | None,
) -> Timed:
    """One forward and one backward, from gradients of ones."""
    inputs = _cut_off(tensors)
    start = clock()
    with torch.autocast(inputs[0].device.type, dtype=autocast, enabled=autocast is not None):
        outputs = as_tuple(module(*inputs))
        ends = outputs if loss is None else (loss(outputs),)
    forward_s = clock() - start
    ends = tuple(tensor for tensor in ends if tensor.requires_grad)
    gradients = tuple(torch.ones_like(tensor) for tensor in ends)
    start = clock()
    if ends:
        torch.autograd.backward(ends, gradients)
    backward_s = clock() - start
    module.zero_grad(set_to_none=True)
    return _cut_off(outputs), forward_s, backward_s


def _cut_off(tensors: Tensors) -> Tensors:
    """The same tensors as leaves of a new graph, which take a gradient if they did before: images and masks do not."""
    return tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)


def _idle_clock(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """The clock, read once the device has done all it was given."""
    if device.type != "cuda":
        return clock

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def save_profile(path: Path, profile: Profile) -> None:
    """Write the profile as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write profile {path}: {error.strerror}; give a file in a folder that exists"
        ) from error


def load_profile(
    path: Path,
    model: LayeredModel,
    *,
    batch: int,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> Profile:
    """Read a profile back; UserError unless it was measured on this model, micro-batch, device and precision."""
    profile = _read(path)
    expected = conditions_of(model, batch=batch, device=device, autocast=autocast)
    for field in fields(Conditions):
        measured, wanted = getattr(profile.conditions, field.name), getattr(expected, field.name)
        if measured != wanted:
            raise _mismatch(path, f"{field.name} {measured}, not {wanted}")
    measured_blocks = tuple((cost.name, cost.parameter_bytes) for cost in profile.costs)
    if measured_blocks != _blocks_and_sizes(model):
        raise _mismatch(path, f"other blocks than {model.name} has here")
    return profile


def _mismatch(path: Path, what: str) -> UserError:
    return UserError(f"profile {path} was measured with {what}; delete it to measure again, or name another file")


def _blocks_and_sizes(model: LayeredModel) -> tuple[tuple[str, int], ...]:
    with torch.device("meta"):  # shapes only
        return tuple((block.name, _bytes(block.build().parameters())) for block in model.blocks)


def _read(path: Path) -> Profile:
    try:
        raw = parse_json(path.read_bytes())
        conditions = Conditions(**{field.name: raw["conditions"][field.name] for field in fields(Conditions)})
        return Profile(conditions, tuple(_read_cost(cost) for cost in raw["costs"]))
    except OSError as error:
        raise UserError(f"cannot read profile {path}: {error.strerror}; measure one by naming a new file") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a profile ({error!r}); delete it to measure again") from error


def _read_cost(raw: Any) -> BlockCost:
    return BlockCost(
        str(raw["name"]),
        float(raw["forward_s"]),
        float(raw["backward_s"]),
        int(raw["output_bytes"]),
        int(raw["parameter_bytes"]),
    )
