"""Parameters that are not trained stay as they are; parameters of several dtypes keep theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_jobs import final
from tiny import join_world, tiny_settings, tiny_task
from torch import Tensor, nn

from pipeline.models.layered import Block, LayeredModel, build_whole, full_state
from pipeline.models.mlp import mlp
from pipeline.replicas.flat_state import StageVector
from pipeline.stage.build import make_stage
from pipeline.stage.stage import Stage, StageOptions
from pipeline.train.optim import make_optimizer
from pipeline.train.run import train
from pipeline.train.state import OptimizerState, States, UpdatesState, WeightsState

ROOT = Path(__file__).resolve().parent.parent
FROZEN, DOUBLE = (1, 5), 3  # blocks
MODEL = mlp(inputs=12, width=16, depth=8, num_classes=5, activation="tanh")


class Double(nn.Module):
    """A block that computes in float64, between neighbours that do not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = inner.linear.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.double())).float()


def changed(model: LayeredModel) -> LayeredModel:
    """The model with two frozen blocks and one in float64."""

    def build(index: int, block: Block) -> nn.Module:
        module = Double(block.build()) if index == DOUBLE else block.build()
        return module.requires_grad_(index not in FROZEN)

    blocks = tuple(
        dataclasses.replace(block, build=lambda i=index, b=block: build(i, b))  # type: ignore[misc]
        for index, block in enumerate(model.blocks)
    )
    return dataclasses.replace(model, blocks=blocks)


def is_frozen(name: str) -> bool:
    return any(name.removeprefix("model.").startswith(MODEL.blocks[index].prefix) for index in FROZEN)


def is_double(name: str) -> bool:
    return name.removeprefix("model.").startswith(MODEL.blocks[DOUBLE].prefix)


def whole(*, name: str = "sgd", seed: int = 0, options: StageOptions | None = None) -> Stage:
    rule = make_optimizer(name, learning_rate=0.1, weight_decay=0.1)
    return make_stage(changed(MODEL), (8,), 0, rule, seed=seed, criterion=None, options=options)


def values(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in WeightsState(stage).tensors().items()}


def step(stage: Stage, microbatch: int) -> None:
    generator = torch.Generator().manual_seed(microbatch)
    stage.forward(microbatch, (torch.randn(4, 12, generator=generator),))
    stage.forward(microbatch + 1, (torch.randn(4, 12, generator=generator),))
    for each in (microbatch, microbatch + 1):
        stage.backward(each, (torch.randn(4, 5, generator=generator),))
        stage.update(0.1)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_are_not_touched_and_a_float64_block_stays_one(name: str, decay: bool) -> None:
    stage = whole(name=name, options=StageOptions(decay_norm_and_bias=decay))
    before = values(stage)
    for microbatch in range(0, 6, 2):
        step(stage, microbatch)
    after = values(stage)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) == is_frozen(key), key
        assert after[key].dtype == (torch.float64 if is_double(key) else torch.float32)
    state = OptimizerState(stage).tensors()
    assert state and not any(is_frozen(key.removeprefix("optim.")) for key in state)
    moments = {key: t for key, t in state.items() if not key.endswith("step")}
    assert all((t.dtype == torch.float64) == is_double(key.removeprefix("optim.")) for key, t in moments.items())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_is_that_of_plain_torch(name: str) -> None:
    stage, chain = whole(name=name), build_whole(changed(MODEL), 0)
    rule = make_optimizer(name, learning_rate=0.1, weight_decay=0.1)
    plain = rule([p for p in chain.parameters() if p.requires_grad])
    for microbatch in range(3):
        x, g = (torch.randn(4, n, generator=torch.Generator().manual_seed(microbatch)) for n in (12, 5))
        stage.forward(microbatch, (x,))
        stage.backward(microbatch, (g,))
        stage.update(0.1)
        plain.zero_grad()
        y: Any = chain(x)
        y.backward(g)
        plain.step()
    for mine, theirs in zip(values(stage).values(), chain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_replicas_mix_leaves_frozen_parameters_out_and_keeps_float64() -> None:
    one, two = whole(), whole()
    step(one, 0)
    vector = StageVector(one)
    x = vector.read()
    assert x.dtype == torch.float64 and not any(is_frozen(name) for name in vector.parameters(x))
    StageVector(two).write(x)
    a, b = values(one), values(two)
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    StageVector(two).add(torch.ones_like(x))
    assert all(torch.allclose(values(two)[name], b[name] + (0 if is_frozen(name) else 1)) for name in b)
    again = vector.joined(vector.parameters(x))
    assert torch.equal(again, x[: vector.weights])


def test_a_stage_with_frozen_parameters_is_copied_whole() -> None:
    giver, taker = whole(name="adamw"), whole(name="adamw", seed=1)
    step(giver, 0)
    states = [States([WeightsState(s), OptimizerState(s), UpdatesState(s)]) for s in (giver, taker)]
    states[1].adopt(states[0].tensors(), states[0].values())
    for stage in giver, taker:
        step(stage, 2)
    one, two = (each.tensors() for each in states)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_stage_of_nothing_but_frozen_blocks_passes_on_what_it_gets() -> None:
    model = changed(MODEL)
    for position in (0, 1):
        counts = (1, 1, 6) if position else (2, 6)
        frozen = dataclasses.replace(model, blocks=(model.blocks[1], *model.blocks[1:])) if not position else model
        rule = make_optimizer("adamw", learning_rate=0.1)
        options = StageOptions(decay_norm_and_bias=False)
        if not position:
            counts = (1, 7)
        stage = make_stage(frozen, counts, position, rule, seed=0, criterion=None, options=options)
        (y,) = stage.forward(0, (torch.randn(4, 16),))
        gradients = stage.backward(0, (torch.ones_like(y),))
        stage.update(0.1)
        assert len(gradients) == position and all(bool(g.any()) for g in gradients)


def test_a_run_saves_resumes_and_exports_what_it_does_not_train(tmp_path: Path) -> None:
    task = dataclasses.replace(tiny_task(), model=changed(tiny_task().model))

    def run(folder: Path, **options: Any) -> None:
        settings = tiny_settings(folder, **options)
        train(settings, task, join_world(None, timeout_s=60, directory=ROOT))

    options: dict[str, Any] = {"keep": 99, "checkpoint_every": 3, "clip_grad_norm": 1.0}
    run(tmp_path / "whole", checkpoint=str(tmp_path / "one"), **options)
    begun = str(tmp_path / "one" / "step-00000003")
    target = str(tmp_path / "m.safetensors")
    run(tmp_path / "resumed", checkpoint=str(tmp_path / "two"), resume=begun, export=target, **options)
    one, two, exported = final(tmp_path / "one"), final(tmp_path / "two"), load_file(target)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    model = changed(tiny_task().model)
    initial = full_state(model, list(build_whole(model, 0).links))
    assert exported.keys() == initial.keys()
    for name, value in exported.items():
        assert torch.equal(initial[name], value) == is_frozen(name)
        assert value.dtype == (torch.float64 if is_double(name) else torch.float32)
