"""Deferred statistics are those of the whole batch: for every kind of BatchNorm, and also far away from zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.stage.batchnorm import DeferredBatchNorm, defer_batch_norm
from pipeline.stage.stage import BlockModule, Stage, StageOptions

SHAPES = {
    "rows": (nn.BatchNorm1d, (12, 3)),
    "sequences": (nn.BatchNorm1d, (12, 3, 5)),
    "images": (nn.BatchNorm2d, (12, 3, 5, 4)),
    "volumes": (nn.BatchNorm3d, (12, 3, 5, 2, 3)),
}


def batch_of(shape: tuple[int, ...], *, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (values + mean).to(dtype)


def deferred(norm: nn.Module, batches: list[Tensor], parts: int = 4) -> DeferredBatchNorm:
    module = defer_batch_norm(norm)
    assert isinstance(module, DeferredBatchNorm)
    for batch in batches:
        for part in batch.tensor_split(parts):
            module(part)
        module.commit()
    return module


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", SHAPES)
def test_statistics_are_those_of_the_whole_batch(kind: str, momentum: float | None) -> None:
    make, shape = SHAPES[kind]
    plain = make(3, momentum=momentum)
    batches = [batch_of(shape), batch_of(shape, mean=2.0)]
    for batch in batches:
        plain(batch)
    ours = deferred(make(3, momentum=momentum), batches)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.state_dict().keys() == plain.state_dict().keys()
    whole = batches[0][:3]
    torch.testing.assert_close(ours.eval()(whole), plain.eval()(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_does_not_cost_the_variance_its_digits(dtype: torch.dtype) -> None:
    batch = batch_of((64, 3, 8, 8), mean=1000.0, dtype=dtype)
    ours = deferred(nn.BatchNorm2d(3, momentum=1.0, dtype=dtype), [batch], parts=16)
    expected = batch.double().var((0, 2, 3))
    assert ours.running_var is not None and ours.running_var.dtype is dtype
    torch.testing.assert_close(ours.running_var.double(), expected, rtol=1e-3, atol=0)


def test_half_precision_is_added_up_in_single() -> None:
    batch = batch_of((64, 3, 8, 8), mean=10.0).half()
    ours = deferred(nn.BatchNorm2d(3, momentum=1.0), [batch], parts=16)
    assert ours.running_var is not None
    torch.testing.assert_close(ours.running_var.double(), batch.double().var((0, 2, 3)), rtol=1e-3, atol=0)


def test_nothing_moves_without_a_forward_and_evaluation_is_not_counted() -> None:
    module = deferred(nn.BatchNorm1d(3), [])
    module.commit()
    module.eval()(batch_of((4, 3), mean=5.0))
    module.commit()
    assert module.running_mean is not None and not module.running_mean.any()
    assert module.num_batches_tracked == 0


def test_a_norm_without_statistics_stays_what_it_is() -> None:
    plain = nn.BatchNorm1d(3, track_running_stats=False)
    assert defer_batch_norm(plain) is plain


def test_a_norm_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(3)
    chain = defer_batch_norm(nn.Sequential(norm, nn.Linear(3, 3), norm, nn.Sequential(norm)))
    assert isinstance(chain, nn.Sequential) and isinstance(chain[3], nn.Sequential)
    assert isinstance(chain[0], DeferredBatchNorm) and chain[0] is chain[2] is chain[3][0]


class Odd(nn.BatchNorm2d):
    """A norm with arithmetic of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


@pytest.mark.parametrize(
    "norm",
    [nn.SyncBatchNorm(3), Odd(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3, track_running_stats=True)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_that_cannot_be_deferred_is_refused_in_one_line(norm: Any) -> None:
    with pytest.raises(
        UserError, match=f"--batchnorm deferred .* {type(norm).__name__}; give .* microbatch"
    ) as refusal:
        defer_batch_norm(nn.Sequential(nn.Linear(3, 3), norm))
    assert "\n" not in str(refusal.value)


def test_replicas_share_running_statistics_and_not_those_of_half_a_batch() -> None:
    block = BlockModule(0, "norm.", nn.BatchNorm1d(3))
    make = partial(torch.optim.SGD, lr=0.1)
    stage = Stage([block], make, device=torch.device("cpu"), options=StageOptions(deferred_batchnorm=True))
    assert [tuple(buffer.shape) for buffer in stage.floating_buffers()] == [(3,), (3,)]
