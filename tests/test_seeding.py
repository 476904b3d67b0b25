"""Whatever a block draws is its own: found by watching, repeated by recomputation, and in nobody's way."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pipes import Job, Unsplit, assert_equal, classification_batch, cuts, run_threads
from typing import Any

import pytest
import torch
from test_bert import NO_DROPOUT, tiny
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from pipeline.models import Block, LayeredModel, build_blocks, make_model
from pipeline.stage.seeding import GENERATOR_LOCK, WATCHED, Draws, generators_of
from pipeline.stage.stage import StageOptions
from pipeline.transport.local import local_transports

CPU = torch.device("cpu")
LARGE = 50.0


class Functional(nn.Module):
    """Dropout that no module tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(torch.tanh(self.linear(x)), 0.4, training=self.training)


class Deep(nn.Module):
    """A residual branch that is left out now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.depth = nn.Linear(12, 12), StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(torch.tanh(self.linear(x)))


class Skipped(nn.Module):
    """A layer that is skipped by a number of the host, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * float(not self.training or torch.rand([]) > 0.5)


class Late(nn.Module):
    """Drops from large inputs only, which come when the others have been found out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        dropping = self.training and bool(x.abs().max() > LARGE)
        return functional.dropout(torch.tanh(self.linear(x)), 0.4, training=dropping)


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "functional": Functional, "deep": Deep, "skipped": Skipped, "late": Late, "quiet": Quiet
}  # fmt: skip


def model_of(kind: str) -> LayeredModel:
    """A block of that kind and a quiet one, twice, and a head."""
    bodies = [KINDS[kind], Quiet, KINDS[kind], Quiet]
    blocks = [Block(f"b{n}", f"b{n}.", build) for n, build in enumerate(bodies)]
    blocks.append(Block("head", "head.", lambda: nn.Sequential(OrderedDict(linear=nn.Linear(12, 5)))))
    return LayeredModel(kind, tuple(blocks), 0, 1, lambda batch: classification_batch(0, size=batch)[0])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("kind", ["functional", "deep", "skipped"])
def test_recomputed_and_cut_models_draw_what_the_unsplit_one_draws(kind: str, schedule: str) -> None:
    model = model_of(kind)
    expected = None
    for stages, recompute in ((1, False), (1, True), (3, False), (3, True)):
        counts = cuts(len(model.blocks), stages)
        options = StageOptions(recompute=recompute)
        job = Job(model=model, counts=counts, schedule=schedule, microbatches=3, batches=3, options=options)
        _, state = run_threads(job, local_transports(stages, timeout_s=60))
        expected = expected or Unsplit(job).train()
        assert_equal(state, expected, tolerance=0)
    still = Job(model=model_of("quiet"), counts=(5,), schedule="gpipe", microbatches=3)
    assert not torch.equal(expected["model.head.linear.weight"], Unsplit(still).train()["model.head.linear.weight"])


def test_a_block_that_begins_to_draw_late_is_recomputed_with_the_same_numbers() -> None:
    def batch(microbatch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        (x,), targets = classification_batch(microbatch)
        return (x if microbatch < 2 * WATCHED else x.sign() * 2 * LARGE,), targets

    states = []
    for recompute in (False, True):
        job = Job(
            model=model_of("late"), counts=(5,), schedule="gpipe", microbatches=4, batches=3, batch=batch,
            options=StageOptions(recompute=recompute),
        )  # fmt: skip
        _, state = run_threads(job, local_transports(1))
        states.append(state)
        assert_equal(state, Unsplit(job).train(), tolerance=0)
    assert_equal(states[1], states[0], tolerance=0)


# --- which parts draw


def run(draws: Draws, part: int, function: Callable[..., Any], *arguments: Any, times: int = WATCHED) -> list[Any]:
    return [draws.call(part, number, function, *arguments) for number in range(times)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_draws_is_found_by_what_it_does(kind: str) -> None:
    draws = Draws(generators_of(CPU))
    run(draws, 3, KINDS[kind]().train(), torch.ones(2, 12))
    assert draws.drawing == (set() if kind in ("quiet", "late") else {3})


@pytest.mark.parametrize("dropout", [True, False])
def test_all_blocks_of_a_bert_but_the_head_draw_unless_dropout_is_off(dropout: bool) -> None:
    model = tiny() if dropout else tiny(NO_DROPOUT)
    draws, tensors = Draws(generators_of(CPU)), model.sample(2)
    for index, block in enumerate(build_blocks(model, 0, 4, 0)):
        tensors = run(draws, index, block.train(), *tensors)[-1]
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
    assert draws.drawing == ({0, 1, 2} if dropout else set())


def test_an_mlp_draws_where_it_drops() -> None:
    for dropout, drawing in ((0.1, {0, 1}), (0.0, set())):
        model = make_model("mlp", inputs=4, width=4, depth=3, num_classes=4, dropout=dropout)
        draws, x = Draws(generators_of(CPU)), torch.ones(2, 4)
        for index, block in enumerate(build_blocks(model, 0, 3, 0)):
            x = run(draws, index, block.train(), x)[-1]
        assert draws.drawing == drawing


class Philox:
    """A GPU's generator as the host sees it: a seed and how much was drawn."""

    def __init__(self) -> None:
        self.seed = self.offset = 0

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def get_state(self) -> Tensor:
        return torch.tensor([self.seed, self.offset])

    def draw(self) -> tuple[int, int]:
        self.offset += 4
        return self.seed, self.offset


def test_on_a_gpu_both_generators_are_seeded_and_watched() -> None:
    host, device = Philox(), Philox()
    draws = Draws((host, device))
    assert run(draws, 0, host.draw) == [(0, 4), (1, 4)]
    assert run(draws, 1, device.draw) == [(0, 4), (1, 4)]
    assert run(draws, 2, lambda: (host.seed, device.seed)) == [(0, 0), (1, 1)]
    assert draws.drawing == {0, 1}


def test_only_who_draws_has_the_generators_for_itself() -> None:
    draws = Draws(generators_of(CPU))
    assert run(draws, 0, GENERATOR_LOCK.locked, times=WATCHED + 2) == [True] * WATCHED + [False] * 2
    noisy = run(draws, 1, lambda: (torch.rand(1), GENERATOR_LOCK.locked()), times=WATCHED + 2)
    assert all(locked for _, locked in noisy)
    assert len({float(number) for number, _ in noisy}) == WATCHED + 2
    with GENERATOR_LOCK:  # somebody draws: who does not is not held up, and does not disturb it
        before = torch.get_rng_state()
        assert draws.call(0, 99, lambda: "done") == "done"
        assert torch.equal(torch.get_rng_state(), before)


def test_quiet_stages_that_are_threads_compute_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=20)
    met = []

    def stage() -> None:
        draws = Draws(generators_of(CPU))
        run(draws, 0, lambda: None)
        met.append(draws.call(0, 5, meeting.wait))

    threads = [threading.Thread(target=stage) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(met) == [0, 1]
