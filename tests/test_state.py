"""The one list of who has state: what is taken, what is left out, and that whoever takes it goes on as the giver."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.models.mlp import mlp
from pipeline.replicas.flat_state import StageVector
from pipeline.stage.build import make_stage
from pipeline.stage.loss_scaling import LossScaler
from pipeline.stage.optimizer_state import reset, room_for
from pipeline.stage.stage import Stage, StageOptions
from pipeline.sync import Synchroniser
from pipeline.sync.local_sgd import Calendar, LocalSgd
from pipeline.sync.outer import DiLoCo, Outer, OuterRule, SlowMo
from pipeline.train.optim import make_optimizer
from pipeline.train.state import (
    LossScaleState,
    MixingState,
    OptimizerState,
    Stateful,
    States,
    SynchroniserState,
    UpdatesState,
    WeightsState,
)

MODEL = mlp(inputs=6, width=5, depth=4, num_classes=3, activation="tanh", batchnorm=True)


def stage_of(counts: Sequence[int] = (4,), position: int = 0, *, name: str = "adamw", seed: int = 0) -> Stage:
    optimizer = make_optimizer(name, learning_rate=0.1)
    return make_stage(MODEL, counts, position, optimizer, seed=seed, criterion=None, options=StageOptions())


def states_of(stage: Stage, *more: Stateful) -> States:
    return States([WeightsState(stage), OptimizerState(stage), UpdatesState(stage), *more])


def copies(states: States) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in states.tensors().items()}


def batch(microbatch: int, numbers: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(4, numbers, generator=torch.Generator().manual_seed(microbatch)),)


def start(stage: Stage, microbatch: int) -> None:
    (y,) = stage.forward(microbatch, batch(microbatch))
    assert y.shape == (4, 3)


def finish(stage: Stage, microbatch: int) -> None:
    stage.backward(microbatch, batch(microbatch + 1000, 3))
    stage.update(0.1)


def train(stage: Stage, first: int, last: int) -> None:
    """As pipedream does: the next micro-batch is forwarded before the update, so there are two versions of weights."""
    for microbatch in range(first, last):
        start(stage, microbatch + 1)
        finish(stage, microbatch)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_whoever_takes_a_stages_state_goes_on_as_that_stage_with_two_versions_of_weights(name: str) -> None:
    giver, taker = stage_of(name=name), stage_of(name=name, seed=1)
    for stage, batches in (giver, 5), (taker, 2):
        start(stage, 0)
        train(stage, 0, batches)
    finish(giver, 5)
    taker_in_flight = 2  # holds the taker's old weights while it takes the giver's
    states_of(taker).adopt(copies(states_of(giver)), states_of(giver).values())
    taker.backward(taker_in_flight, batch(0, 3))
    taker.weights.forget_gradients()
    for stage in giver, taker:
        start(stage, 6)
        train(stage, 6, 10)
        assert stage.weights.versions >= 2 and stage.updates == 10
    one, two = copies(states_of(giver)), copies(states_of(taker))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if "running" not in key)
    assert {kind.dtype for key, kind in two.items() if key.endswith(".step")} <= {torch.float32}


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_a_step_count_lies_where_torchs_own_load_state_dict_puts_it(fused: bool, device: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta", dtype=torch.float64))
    step = room_for("step", torch.Size([]), parameter, {"fused": fused})
    assert (step.dtype, step.device.type) == (torch.float32, device)
    moment = room_for("exp_avg", torch.Size([3]), parameter, {"fused": fused})
    assert (moment.dtype, moment.device.type) == (torch.float64, "meta")


def test_the_versions_of_a_parameter_share_the_one_state_that_was_loaded() -> None:
    giver, taker = stage_of(), stage_of()
    start(giver, 0)
    train(giver, 0, 3)
    finish(giver, 3)
    states_of(taker).adopt(copies(states_of(giver)), states_of(giver).values())
    start(taker, 4)
    train(taker, 4, 6)
    for leaves in (taker.weights.newest.leaves,):
        for leaf, state in zip(leaves, taker.optimizer_states, strict=True):
            assert taker.optimizer.state[leaf] is state and float(state["step"]) == 6


def test_momentum_that_is_reset_is_young_again() -> None:
    fresh, used = stage_of(), stage_of()
    start(used, 0)
    train(used, 0, 3)
    finish(used, 3)
    used.reset_momentum()
    start(fresh, 4)
    states_of(used).members[0].room({})  # the same weights:
    for mine, theirs in zip(used.weights.newest.leaves, fresh.weights.newest.leaves, strict=True):
        mine.data.copy_(theirs.data)
    start(used, 4)
    for stage in used, fresh:
        finish(stage, 4)
    for mine, theirs in zip(used.weights.newest.leaves, fresh.weights.newest.leaves, strict=True):
        assert torch.equal(mine, theirs), "the first step after a reset is a first step"


def test_a_parameter_of_shape_nothing_has_a_momentum_and_a_step_count() -> None:
    state = {"step": torch.tensor(5.0), "exp_avg": torch.tensor(2.0), "exp_avg_sq": torch.tensor(3.0)}
    reset([(torch.tensor(1.0), state)])
    assert [float(value) for value in state.values()] == [0.0, 0.0, 0.0]


def mixing(stage: Stage, rule: OuterRule) -> tuple[Synchroniser, list[Stateful]]:
    vector = StageVector(stage)
    sync = LocalSgd(Calendar(local_steps=2), Outer(rule))
    return sync, [SynchroniserState(sync, vector)]


def test_an_outer_optimiser_is_kept_by_parameter_and_read_by_any_number_of_stages() -> None:
    given: dict[str, Tensor] = {}
    for position in range(2):
        stage = stage_of((1, 3), position)
        sync, members = mixing(stage, SlowMo())
        flat = StageVector(stage).read()
        sync.begin(flat)
        sync.load_state({"anchor": flat + 1, "slowmo_momentum": flat * 2})
        given |= copies(states_of(stage, *members))
    whole = stage_of()
    sync, members = mixing(whole, SlowMo())
    states_of(whole, *members).adopt(given, {})
    named = StageVector(whole).parameters
    for name, value in named(StageVector(whole).read()).items():
        assert torch.equal(given[f"sync.{name}.anchor"], value + 1)
        assert torch.equal(named(sync.state()["anchor"])[name], value + 1)
        assert torch.equal(named(sync.state()["slowmo_momentum"])[name], value * 2)


def test_the_momentum_of_one_outer_rule_means_nothing_to_another() -> None:
    stage = stage_of()
    sync, members = mixing(stage, SlowMo())
    sync.begin(StageVector(stage).read())
    states = states_of(stage, *members)
    other = stage_of()
    diloco, others = mixing(other, DiLoCo())
    theirs = states_of(other, *others)
    told = theirs.told(list(states.tensors()), [])
    assert "the synchroniser's anchor" in told.taken and "the synchroniser's slowmo_momentum" in told.left_out
    assert "the synchroniser's diloco_momentum" in told.begun_anew
    theirs.adopt(copies(states), {})
    assert not diloco.state()["diloco_momentum"].any() and diloco.state()["anchor"].any()


def test_a_loss_scale_is_taken_by_float16_only_and_that_is_said() -> None:
    stage, scaler = stage_of(name="sgd"), LossScaler(scale=4.0)
    values = {"loss scale": {"scale": 512.0, "good_steps": 7}, "updates": {"made": 3, "skipped": 1}}
    plain, half = states_of(stage), states_of(stage, LossScaleState(scaler))
    plain.load({}, values)
    assert scaler.scale == 4.0 and (stage.updates, stage.skipped_updates) == (3, 1)
    assert str(plain.told(["model.a"], values)) == (
        "with weights; left out: loss scale; begun anew: the optimizer's momentum_buffer"
    )
    half.load({}, values)
    assert (scaler.scale, scaler.good_steps) == (512.0, 7)
    assert half.told(["model.a"], values).taken == ("loss scale", "weights")
    assert half.told(["model.a"], {}).begun_anew == ("loss scale", "the optimizer's momentum_buffer")


def test_a_mixer_counts_from_the_beginning_of_the_run_also_where_the_run_had_none() -> None:
    class Mixer:
        step = 0

    stage, mixer = stage_of(), Mixer()
    states = states_of(stage, MixingState(mixer, stage))
    states.load({}, {"updates": {"made": 6, "skipped": 0}})
    assert mixer.step == 6
    states.load({}, {"updates": {"made": 6, "skipped": 0}, "mixing": {"step": 9}})
    assert mixer.step == 9


def test_the_state_of_another_stage_is_refused() -> None:
    first, second = (states_of(stage_of((2, 2), position)) for position in range(2))
    with pytest.raises(ValueError, match="the state of another stage was given: it has no model"):
        first.adopt(copies(second), {})
