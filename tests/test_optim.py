"""Learning rates against their formulas, update rules against theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.errors import UserError
from pipeline.settings import Settings, default_settings
from pipeline.train.optim import (
    default_milestones,
    make_learning_rate,
    make_optimizer,
    optimizer_of,
    scaled,
)

PER_EPOCH = 10


def rates(count: int, **given: object) -> list[float]:
    """The first `count` rates of ten updates per epoch."""
    rate = make_learning_rate(Settings(**given), updates_per_epoch=PER_EPOCH)
    return [rate(update) for update in range(count)]


def test_resnet_warms_up_over_one_epoch_from_a_tenth_to_the_whole() -> None:
    assert rates(12, learning_rate=0.5) == pytest.approx([0.05 * n for n in range(1, 11)] + [0.5, 0.5])


@pytest.mark.parametrize(
    ("dataset", "factor", "every"),
    [("imagenet", 0.2, 30), ("cifar100", 0.1, 60), ("cifar10", 0.1, 60), ("digits", 0.1, 60)],
)
def test_the_reference_decays_at_the_end_of_an_epoch(dataset: str, factor: float, every: int) -> None:
    curve = rates(2000, dataset=dataset, epochs=200, learning_rate=0.1)
    for epoch in range(1, 200):
        finished = epoch - 1  # the index of the last finished epoch, which the reference decays by
        assert curve[epoch * PER_EPOCH] == curve[epoch * PER_EPOCH + 9] == 0.1 * factor ** (finished // every)
    first_decayed = next(n for n, rate in enumerate(curve) if n >= PER_EPOCH and rate < 0.1) // PER_EPOCH
    assert first_decayed == every + 1


def test_bert_warms_up_over_2000_updates_and_stays() -> None:
    rate = make_learning_rate(default_settings("bert"), updates_per_epoch=100)
    assert rate(0) == pytest.approx(1e-4 / 2000)
    assert rate(999) == pytest.approx(0.5e-4)
    assert rate(1999) == rate(2000) == rate(10**7) == pytest.approx(1e-4)


def test_step_multiplies_at_each_milestone() -> None:
    curve = rates(60, lr_schedule="step", lr_milestones=(2, 4), lr_factor=0.5, warmup_steps=0, learning_rate=1.0)
    assert curve == [1.0] * 20 + [0.5] * 20 + [0.25] * 20


def test_step_without_milestones_acts_at_one_half_and_three_quarters() -> None:
    assert [default_milestones(n) for n in (100, 2, 1)] == [(50, 75), (1,), (1,)]
    assert rates(40, lr_schedule="step", epochs=4, warmup_steps=0, learning_rate=1.0) == pytest.approx(
        [1.0] * 20 + [0.1] * 10 + [0.01] * 10
    )


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("constant", lambda t: 1.0),
        ("poly", lambda t: (1 - t) ** 2),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ],
)
def test_after_the_warm_up_the_curve_is_its_formula(name: str, formula) -> None:
    curve = rates(60, lr_schedule=name, epochs=5, warmup_steps=20, learning_rate=2.0)
    assert curve[:20] == pytest.approx([2.0 * (n + 1) / 20 for n in range(20)])
    expected = [2.0 * formula(min(1.0, (n - 20) / 30)) for n in range(20, 60)]
    assert curve[20:] == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    assert rates(20, lr_schedule="cosine", epochs=1, warmup_steps=40)[-1] == pytest.approx(0.1 * 20 / 40)


def test_a_rate_is_a_pure_function_so_a_resumed_or_shorter_run_follows_the_same_curve() -> None:
    for name in ("reference", "constant", "step", "poly", "cosine"):
        whole = make_learning_rate(Settings(lr_schedule=name), updates_per_epoch=PER_EPOCH)
        short = make_learning_rate(Settings(lr_schedule=name, max_steps=5), updates_per_epoch=PER_EPOCH)
        backwards = [whole(update) for update in reversed(range(900))]
        assert backwards[::-1] == [short(update) for update in range(900)]


def test_an_epoch_without_an_update_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"--batch-size 128 .* give a smaller batch"):
        make_learning_rate(Settings(), updates_per_epoch=0)


def run(factory, weights: Tensor, gradients: list[Tensor]) -> Tensor:
    """The weights after one update per gradient."""
    parameter = Parameter(weights.clone())
    optimizer = factory([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def example(size: int = 48) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator), [torch.randn(size, generator=generator) for _ in range(5)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(nesterov: bool) -> None:
    weights, gradients = example()
    w, v = weights.clone(), torch.zeros_like(weights)
    for gradient in gradients:
        g = gradient + 0.01 * w
        v = 0.9 * v + g
        w = w - 0.1 * (g + 0.9 * v if nesterov else v)
    factory = make_optimizer("sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    torch.testing.assert_close(run(factory, weights, gradients), w)


def test_adamw_is_its_formula() -> None:
    weights, gradients = example()
    w, m, v = weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)
    for n, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.1 * 0.01 * w
        w = w - 0.1 * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-7)
    factory = make_optimizer("adamw", learning_rate=0.1, weight_decay=0.01)
    torch.testing.assert_close(run(factory, weights, gradients), w)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_where_a_flat_is_cut_at_sixteens_does_not_change_a_bit(name: str) -> None:
    weights, gradients = example(size=16 * 40)
    plain = make_optimizer(name, learning_rate=0.1, weight_decay=0.01, fused=False)
    fused = make_optimizer(name, learning_rate=0.1, weight_decay=0.01)
    expected = run(fused, weights, gradients)
    torch.testing.assert_close(run(plain, weights, gradients), expected)
    for cut in (16, 208):
        parts = [
            run(fused, weights[part], [gradient[part] for gradient in gradients])
            for part in (slice(0, cut), slice(cut, None))
        ]
        assert torch.equal(torch.cat(parts), expected)


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown optimizer 'lamb'; choose from sgd, adamw"):
        make_optimizer("lamb", learning_rate=0.1)


def test_adamws_numbers_reach_the_rule() -> None:
    settings = Settings(optimizer="adamw", adam_betas=(0.8, 0.98), adam_eps=1e-6)
    (group,) = optimizer_of(settings)([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.98), 1e-6)


@pytest.mark.parametrize(("scale", "factor"), [("none", 1.0), ("linear", 12.0), ("sqrt", 12**0.5)])
def test_the_rate_is_scaled_by_the_batches_of_an_update_all_along_its_curve(scale: str, factor: float) -> None:
    settings = Settings(scale_lr=scale, accumulate=3, learning_rate=0.1, lr_schedule="cosine", epochs=4)
    plain = make_learning_rate(settings, updates_per_epoch=10)
    told = make_learning_rate(scaled(settings, pipelines=4), updates_per_epoch=10)
    assert [told(update) for update in range(40)] == pytest.approx([factor * plain(update) for update in range(40)])
    assert scaled(Settings(scale_lr=scale), pipelines=1).learning_rate == pytest.approx(0.1)
