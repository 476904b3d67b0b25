"""One stage of a model: its micro-batches in flight, its weight versions and its optimiser. It knows no neighbours.

forward(5, inputs)   -> outputs       remembers the graph, and the weights it ran with
backward(5, grads)   -> input grads   through those weights; gradients add up in `weights.gradients`
update(lr)                            applies them to the newest weights
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.draw import mix
from pipeline.models.criterion import Criterion
from pipeline.stage.batchnorm import DeferredBatchNorm, defer_batch_norm
from pipeline.stage.loss_scaling import LossScaler
from pipeline.stage.optimizer_state import momenta, reset
from pipeline.stage.seeding import Draws, generators_of
from pipeline.stage.state import KeptBuffers, buffer_names, copied, floating_buffers, model_state
from pipeline.stage.tied import borrow
from pipeline.stage.weights import Version, Weights

Tensors = tuple[Tensor, ...]
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
MOST_VARIANTS = 128  # of a compiled block class: blocks of different shapes, times training or not, times batch sizes


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """How a stage computes.

    amp: autocast dtype, or None for full precision; with float16 the loss is scaled by loss_scale at first, and by
    twice as much after every loss_scale_growth updates without an overflow. recompute: keep only the inputs of
    micro-batches in flight and run their forward again before the backward. deferred_batchnorm: running statistics of
    whole batches. decay_norm_and_bias: whether weight decay touches one-dimensional parameters. max_norm: clip the
    gradient's norm.
    """

    seed: int = 0
    pipeline: int = 0
    amp: torch.dtype | None = None
    loss_scale: float = 65536.0
    loss_scale_growth: int = 2000
    recompute: bool = False
    channels_last: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    deferred_batchnorm: bool = False
    decay_norm_and_bias: bool = True
    max_norm: float | None = None


@dataclass(frozen=True)
class BlockModule:
    """A built block: its number in the whole model, and the prefix of its parameters' names."""

    index: int
    prefix: str
    module: nn.Module


@dataclass(slots=True)
class _InFlight:
    """A micro-batch between forward and backward."""

    inputs: Tensors
    outputs: Tensors  # with their graph; empty while they wait to be recomputed
    version: Version
    targets: Tensors = ()
    counts: Any = None


@dataclass
class _Sums:
    """Metrics added up on the device, read only when somebody asks."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: dict[str, Tensor]) -> None:
        for key, value in sums.items():
            self.values[key] = self.values[key] + value if key in self.values else value

    def take(self) -> dict[str, Tensor]:
        result, self.values = self.values, {}
        return result


class Stage:
    """A run of neighbouring blocks with their weights and optimiser.

    Args:
        blocks: in order, already on their device.
        optimizer: makes a torch optimiser of one or two parameter groups; None for a stage that only evaluates.
        criterion: of the last stage, None elsewhere.
        first: the first stage needs no gradient of its inputs.
        borrowed: full name here -> full name of the owner, for parameters another stage owns.
        aliases: names that are other names of tied parameters; never part of `state()`.
    """

    def __init__(
        self,
        blocks: Sequence[BlockModule],
        optimizer: OptimizerFactory,
        *,
        device: torch.device,
        criterion: Criterion | None = None,
        first: bool = True,
        window: int = 1,
        borrowed: dict[str, str] | None = None,
        aliases: frozenset[str] = frozenset(),
        options: StageOptions | None = None,
    ) -> None:
        self.options = options or StageOptions()
        self.device, self.criterion, self.first = device, criterion, first
        self.blocks = [_prepared(block, self.options) for block in blocks]
        self.modules = [(block.prefix, block.module) for block in self.blocks]
        self.borrowed = borrow(self.modules, borrowed or {})
        self._aliases = aliases | frozenset(borrowed or {})
        self.weights = Weights(self.modules, exclude=frozenset(borrowed or {}))
        self._groups = _decay_groups(self.weights, self.options.decay_norm_and_bias)
        leaves = self.weights.newest.leaves
        _spare_dynamo()
        self.optimizer = optimizer([group | {"params": [leaves[i] for i in group["slots"]]} for group in self._groups])
        self._apply_gradients = partial(inspect.unwrap(type(self.optimizer).step), self.optimizer)
        self.optimizer_states: list[dict[str, Any]] = [{} for _ in leaves]  # one per slot, common to all versions
        self._leaves_of: dict[int, list[list[nn.Parameter]]] = {}
        self._adopt(self.weights.newest)
        self._recompute = self.options.recompute and window > 1
        self._in_flight: dict[int, _InFlight] = {}
        self._sums = _Sums()
        scale = self.options.loss_scale if self.options.amp is torch.float16 else 1.0
        self.scaler = LossScaler(scale=scale, growth_interval=self.options.loss_scale_growth)
        self._deferred = _deferred(self.modules)
        self._statistics = KeptBuffers(self.modules) if self._recompute else None
        self._still = RLock()  # held while running statistics are written, and while somebody copies them
        self.name_of: Callable[[int], int] = lambda microbatch: microbatch  # by which random numbers are drawn
        self.updates = 0
        self.skipped_updates = 0
        self._steps = self._compiled()
        self._draws = Draws(generators_of(device))

    def _compiled(self) -> list[tuple[int, Callable[..., Any]]]:
        """The blocks as callables, each with its number."""
        wrap = _compiler(self.options.compile_backend) if self.options.compile else (lambda module: module)
        return [(block.index, wrap(block.module)) for block in self.blocks]

    # --- training

    def forward(self, microbatch: int, inputs: Tensors, targets: Tensors = (), counts: Any = None) -> Tensors:
        """Outputs for the next stage, detached; on the last stage the loss, (1,) tensor of shape ().

        Floating inputs of all stages but the first get gradients.
        """
        inputs = tuple(self._placed(tensor) for tensor in inputs)
        if not self.first:
            inputs = tuple(_leaf(tensor) for tensor in inputs)
        entry = _InFlight(inputs, (), self.weights.hold(), targets, counts)
        self._in_flight[microbatch] = entry
        if self._recompute:
            with torch.no_grad():
                return self._compute(microbatch, entry)
        entry.outputs = self._compute(microbatch, entry)
        return tuple(output.detach() for output in entry.outputs)

    def backward(self, microbatch: int, gradients: Tensors = ()) -> Tensors:
        """Gradients of the floating inputs, given those of the floating outputs (none on the last stage)."""
        entry = self._in_flight.pop(microbatch)
        if self._recompute:
            self._forward_again(microbatch, entry)
        outputs, given = self._roots(entry, gradients)
        self.weights.lend_gradients(entry.version)
        for loan in self.borrowed:
            loan.leaf.grad = loan.gradient
        if outputs:  # else all that leads to them is frozen
            torch.autograd.backward(outputs, given)
        for loan in self.borrowed:
            loan.gradient, loan.leaf.grad = loan.leaf.grad, None
        self.weights.collect_gradients(entry.version)
        self.weights.release(entry.version)
        if self.first:
            return ()
        return tuple(_gradient_of(tensor) for tensor in entry.inputs if tensor.requires_grad)

    def _roots(self, entry: _InFlight, gradients: Tensors) -> tuple[list[Tensor], list[Tensor | None]]:
        if self.criterion is not None:
            scale = self.scaler.scale
            if not entry.outputs[0].requires_grad:
                return [], []
            return [entry.outputs[0] if scale == 1.0 else entry.outputs[0] * scale], [None]
        floating = [tensor for tensor in entry.outputs if tensor.is_floating_point()]
        pairs = [(out, grad) for out, grad in zip(floating, gradients, strict=True) if out.requires_grad]
        return [out for out, _ in pairs], [grad for _, grad in pairs]

    def _forward_again(self, microbatch: int, entry: _InFlight) -> None:
        """Recomputes with the weights and random numbers of the first time; statistics are not counted twice."""
        assert self._statistics is not None
        with self._still:
            self._statistics.keep()
            sums, self._sums = self._sums, _Sums()
            with self.weights.installed(entry.version):
                entry.outputs = self._compute(microbatch, entry)
            self._sums = sums
            self._statistics.restore()

    def _compute(self, microbatch: int, entry: _InFlight) -> Tensors:
        name = self.name_of(microbatch)
        with self._still, self._autocast():
            outputs = self._chain(entry.inputs, name)
            if self.criterion is None:
                return outputs
            after = self.blocks[-1].index + 1
            loss, sums = self._call(after, name, self.criterion, outputs, entry.targets, entry.counts)
        self._sums.add(sums)
        return (loss,)

    def _chain(self, tensors: Tensors, microbatch: int | None) -> Tensors:
        result: Any = tensors
        for index, module in self._steps:
            result = module(*result) if microbatch is None else self._call(index, microbatch, module, *result)
            if not isinstance(result, tuple):
                result = (result,)
        return result  # type: ignore[no-any-return]

    def _call(self, part: int, microbatch: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Block `part`, or the criterion after the last one, with random numbers of its own for this micro-batch."""
        seed = mix(self.options.seed, self.options.pipeline, microbatch, part)
        return self._draws.call(part, seed, function, *arguments)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.options.amp)

    def _placed(self, tensor: Tensor) -> Tensor:
        if self.first and self.options.channels_last and tensor.dim() == 4:
            return tensor.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return tensor.to(self.device, non_blocking=True)

    @property
    def in_flight(self) -> list[int]:
        """Micro-batches between their forward and their backward."""
        return list(self._in_flight)

    # --- updates

    def gradient_squares(self) -> Tensor:
        """Sum of squares of the accumulated gradient of each parameter this stage owns, unscaled: (slots,) float64.

        Each is a matter of its parameter alone, so that it has the same digits wherever the model is cut.
        """
        gradients = self.weights.gradients
        squares = torch.zeros(len(gradients), dtype=torch.float64, device=self.device)
        present = [slot for slot, gradient in enumerate(gradients) if gradient is not None]
        if present:
            norms = torch._foreach_norm([g for g in gradients if g is not None], 2, dtype=torch.float64)
            squares[present] = (torch.stack(norms) / self.scaler.scale).square()
        return squares

    def apply_norm(self, squared: float) -> bool:
        """Unscales and clips by the norm of the whole gradient; False if the update must be skipped (overflow)."""
        finite = squared == squared and squared != float("inf")
        factor = 1.0 / self.scaler.scale
        if finite and self.options.max_norm is not None:
            factor *= min(1.0, self.options.max_norm / (squared**0.5 + 1e-6))
        if self.options.amp is torch.float16:
            self.scaler.update(finite)
        if not finite and self.options.amp is torch.float16:
            self.weights.forget_gradients()
            self.skipped_updates += 1
            self._commit()
            return False
        if factor != 1.0:
            torch._foreach_mul_([gradient for gradient in self.weights.gradients if gradient is not None], factor)
        return True

    def update(self, learning_rate: float) -> None:
        """One step of the optimiser on the newest weights; forgets the gradients."""
        weights = self.weights
        self.make_writable()
        leaves = weights.newest.leaves
        for leaf, gradient in zip(leaves, weights.gradients, strict=True):
            leaf.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.no_grad():
            self._apply_gradients()
        for leaf in leaves:
            leaf.grad = None
        weights.forget_gradients()
        self._commit()
        self.updates += 1

    def _commit(self) -> None:
        with self._still:
            for norm in self._deferred:
                norm.commit()

    def _follow_newest(self) -> None:
        """Points the optimiser at the leaves of the newest version; its state is common to all versions."""
        version = self.weights.newest
        groups = self._leaves_of.get(id(version)) or self._adopt(version)
        for group, leaves in zip(self.optimizer.param_groups, groups, strict=True):
            group["params"] = leaves

    def _adopt(self, version: Version) -> list[list[nn.Parameter]]:
        """Gives the leaves of a version that is new to the optimiser the one state there is per parameter."""
        for leaf, state in zip(version.leaves, self.optimizer_states, strict=True):
            self.optimizer.state[leaf] = state
        groups = [[version.leaves[index] for index in group["slots"]] for group in self._groups]
        self._leaves_of[id(version)] = groups
        return groups

    # --- mixing with replicas

    def make_writable(self) -> None:
        """Makes sure that the newest weights may be written to; micro-batches in flight keep theirs."""
        if self.weights.make_writable():
            self._follow_newest()

    def optimizer_tensors(self) -> list[Tensor]:
        """The optimiser's state that is shaped like its parameter (momentum, moments), in the order of parameters."""
        return [tensor for leaf, state in self._parameter_states() for tensor in momenta(state, leaf)]

    def reset_momentum(self) -> None:
        """Makes the optimiser forget what it has learnt of the gradients."""
        reset(self._parameter_states())

    def _parameter_states(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return list(zip(self.weights.newest.leaves, self.optimizer_states, strict=True))

    def leaf_and_group(self, slot: int) -> tuple[nn.Parameter, dict[str, Any]]:
        """The newest leaf of a parameter, and the optimiser's group that it is in."""
        groups = zip(self._groups, self.optimizer.param_groups, strict=True)
        return self.weights.newest.leaves[slot], next(group for slots, group in groups if slot in slots["slots"])

    def floating_buffers(self) -> list[Tensor]:
        """Running means and variances, live, past autograd: it saved them with micro-batches but never reads them.

        What a stage forgets at its end (deferred statistics that are not complete) is not among them.
        """
        return floating_buffers(self.modules)

    # --- evaluation and state

    @torch.no_grad()
    def evaluate(self, inputs: Tensors, targets: Tensors = ()) -> Tensors:
        """Forward with the newest weights and running statistics; the last stage adds to its sums."""
        with self._autocast():
            outputs = self._chain(tuple(self._placed(tensor) for tensor in inputs), None)
            if self.criterion is None:
                return outputs
            _, sums = self.criterion(outputs, targets, self.criterion.count(targets))
        self._sums.add(sums)
        return ()

    def train(self, training: bool) -> None:
        for _, module in self.modules:
            module.train(training)

    def add_gradient(self, slot: int, gradient: Tensor) -> None:
        """Adds the gradient that a borrower of parameter `slot` computed."""
        self.weights.add_gradient(slot, gradient)

    def value_of(self, name: str) -> Tensor:
        """The newest value of a parameter that this stage owns, by its full name."""
        return (self.weights.named() | self.weights.frozen)[name].detach()

    def take_sums(self) -> dict[str, Tensor]:
        """The criterion's sums since the last call, still on the device; {} where there is no criterion."""
        return self._sums.take()

    def restore_sums(self, sums: dict[str, Tensor]) -> None:
        """Goes on from sums taken earlier (an evaluation came in between)."""
        self._sums.values = sums

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under 'model.' and the unsplit model's names; views of the live tensors."""
        return model_state(self.modules, self._aliases)

    def snapshot(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, on the CPU, of these tensors of a state, for another thread that keeps updates away meanwhile.

        Running statistics are those between two forwards, which wait for no more than this small part of the copy.
        """
        statistics = buffer_names(self.modules) & live.keys()
        with self._still:
            copies = {name: copied(live[name]) for name in statistics}
        return {name: copies[name] if name in copies else copied(tensor) for name, tensor in live.items()}

    def borrowed_state(self) -> dict[str, Tensor]:
        """Where to put a borrowed parameter when weights are loaded: 'model.' + its owner's name."""
        return {f"model.{loan.owner_name}": loan.leaf.detach() for loan in self.borrowed}


def _prepared(block: BlockModule, options: StageOptions) -> BlockModule:
    module = defer_batch_norm(block.module) if options.deferred_batchnorm else block.module
    if options.channels_last:
        module = module.to(memory_format=torch.channels_last)
    return BlockModule(block.index, block.prefix, module)


def _spare_dynamo() -> None:
    """Optimisers import torch's compiler to be left alone by it, which takes seconds; nobody compiles them here.

    The mark is the one that torch itself leaves on a function that its compiler leaves alone; the same decorators
    around `step` are not called at all.
    """
    add = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    add.__dict__.setdefault("__dynamo_disable", add)


def _deferred(modules: Sequence[tuple[str, nn.Module]]) -> list[DeferredBatchNorm]:
    return [part for _, module in modules for part in module.modules() if isinstance(part, DeferredBatchNorm)]


def _compiler(backend: str) -> Callable[[nn.Module], Callable[..., Any]]:
    """torch.compile for blocks. Each shape gets code of its own: blocks of one class would make each other dynamic.

    Such blocks share one limit of variants, beyond which they would silently not be compiled, so it is raised.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
    return partial(torch.compile, dynamic=False, backend=backend)


def _decay_groups(weights: Weights, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Slot numbers per parameter group; the second group has no weight decay."""
    if decay_norm_and_bias:
        return [{"slots": list(range(len(weights.slots)))}]
    flat = [index for index, slot in enumerate(weights.slots) if len(slot.shape) <= 1]
    rest = [index for index, slot in enumerate(weights.slots) if len(slot.shape) > 1]
    groups: list[dict[str, Any]] = [{"slots": rest}, {"slots": flat, "weight_decay": 0.0}]
    return [group for group in groups if group["slots"]] or groups[:1]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _gradient_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
