"""Memory of received tensors: never handed out while anybody refers to it, and handed out again afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.transport.pool import MOST_SLOTS, CountingSlot, LendingSlot, Ring, Slot, best_slot
from pipeline.transport.protocol import Layout, layout_of

LAYOUT = Layout(torch.float32, torch.Size([4, 8]), (8, 1))
KINDS = [CountingSlot, LendingSlot] if best_slot() is CountingSlot else [LendingSlot]
Make = Callable[[Layout], Slot]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Make:
    """Both kinds of slot keep the same promises."""
    return request.param


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_once_its_tensor_is_gone(kind: Make) -> None:
    ring = Ring(LAYOUT, make=kind)
    first = ring.take().fresh()
    where = place(first)
    assert place(ring.take().fresh()) != where
    del first
    assert {place(ring.take().fresh()) for _ in range(4)} >= {where}
    assert len(ring) == 2


def test_tensors_have_the_layout_of_the_ring(kind: Make) -> None:
    example = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    slot = Ring(layout_of(example), make=kind).take()
    assert layout_of(slot.fresh()) == layout_of(example)
    assert slot.flat.dtype == torch.uint8 and slot.flat.shape == (example.nbytes,)
    slot.flat.fill_(0)
    assert not slot.fresh().float().any()


def saved_by_autograd(tensor: Tensor) -> Any:
    weight = torch.ones(8, 3, requires_grad=True)
    return (tensor @ weight).sum()


def requires_grad(tensor: Tensor) -> Any:
    return tensor.requires_grad_().exp()


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1:2],
    "a detached copy": lambda tensor: tensor.detach(),
    "an iterator over rows": lambda tensor: tensor.unbind(),
    "another shape": lambda tensor: tensor.flatten(),
    "its array": lambda tensor: tensor.numpy(),
    "its storage": lambda tensor: tensor.untyped_storage(),
    "a graph that saved it": saved_by_autograd,
    "a graph through it": requires_grad,
    "a graph's leaf": lambda tensor: tensor.requires_grad_().view(-1) * 2,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_used_again_while_somebody_holds(kind: Make, holder: str) -> None:
    ring = Ring(LAYOUT, make=kind)
    slot = ring.take()
    where = place(slot.tensor)
    held = HOLDERS[holder](slot.fresh())
    assert not slot.idle
    assert all(place(ring.take().fresh()) != where for _ in range(3))
    del held
    gc.collect()
    assert slot.idle


def test_a_backward_lets_go_of_what_it_saved(kind: Make) -> None:
    slot = Ring(LAYOUT, make=kind).take()
    loss = saved_by_autograd(slot.fresh())
    assert not slot.idle
    loss.backward()
    assert slot.idle


def test_gradients_through_memory_used_again_are_right(kind: Make) -> None:
    """Three forwards before their backwards, over and over, as under 1F1B."""
    ring = Ring(LAYOUT, make=kind)
    weight = torch.randn(8, 8, requires_grad=True)
    alive: list[tuple[Tensor, Tensor]] = []
    for number in range(20):
        slot = ring.take()
        slot.tensor.fill_(float(number))
        inputs = slot.fresh().requires_grad_()
        alive.append((inputs, (inputs @ weight).square().sum()))
        if len(alive) == 3:
            inputs, loss = alive.pop(0)
            (gradient,) = torch.autograd.grad(loss, weight)
            expected = 2 * inputs.detach().t() @ (inputs.detach() @ weight.detach())
            assert torch.equal(inputs.detach(), torch.full((4, 8), float(number - 2)))
            torch.testing.assert_close(gradient, expected)
            del inputs, loss
    assert len(ring) <= 4


def test_a_ring_gives_up_its_oldest_slot_when_everything_is_kept(kind: Make) -> None:
    made: list[Slot] = []
    given_up: list[Slot] = []
    ring = Ring(LAYOUT, make=kind, prepare=made.append, discard=given_up.append)
    kept = [ring.take().fresh() for _ in range(MOST_SLOTS + 5)]
    assert len({place(tensor) for tensor in kept}) == MOST_SLOTS + 5
    assert len(ring) == MOST_SLOTS and given_up == made[:5]
    ring.clear()
    assert len(ring) == 0 and len(given_up) == len(made)


def test_a_tensor_without_elements_has_a_slot_too(kind: Make) -> None:
    slot = Ring(Layout(torch.int64, torch.Size([0, 3]), (3, 1)), make=kind).take()
    assert slot.fresh().shape == (0, 3) and slot.flat.shape == (0,)
