"""Cuts: the balanced one is the best there is, the given one is checked, and a profile is kept with its conditions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, count
from time import perf_counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import Block, LayeredModel, make_model
from pipeline.models.costs import Profile, conditions_of, load_profile, profile_blocks, save_profile
from pipeline.models.criterion import Classification
from pipeline.models.partition import (
    BlockCost,
    balance,
    cut_points,
    cut_table,
    imbalance,
    needs_profile,
    stage_costs,
    stage_ranges,
)


def cost(forward_s: float, output_bytes: int = 0, name: str = "b") -> BlockCost:
    return BlockCost(name, forward_s, 2 * forward_s, output_bytes, 0)


def stage_times(costs: list[BlockCost], counts: tuple[int, ...], bandwidth: float) -> list[float]:
    """The definition, written out: computing, plus activation and gradient at either end."""
    times = []
    for start, stop in stage_ranges(counts):
        time = sum(c.forward_s + c.backward_s for c in costs[start:stop])
        if start > 0:
            time += 2 * costs[start - 1].output_bytes / bandwidth
        if stop < len(costs):
            time += 2 * costs[stop - 1].output_bytes / bandwidth
        times.append(time)
    return times


def every_cut(num_blocks: int, num_stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, num_blocks), num_stages - 1)
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, num_blocks), strict=True)) for cut in cuts]


# ---------------------------------------------------------------- balance


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1000)), min_size=1, max_size=9),
    st.integers(1, 9),
    st.sampled_from([10.0, 1e3, float("inf")]),
)
def test_no_cut_has_a_faster_slowest_stage_than_the_balanced_one(blocks, num_stages, bandwidth):
    costs = [cost(forward, size) for forward, size in blocks]
    num_stages = min(num_stages, len(costs))
    ours = balance(costs, num_stages, bandwidth_bytes_per_s=bandwidth)
    assert (len(ours), sum(ours), min(ours) >= 1) == (num_stages, len(costs), True)
    best = min(max(stage_times(costs, cut, bandwidth)) for cut in every_cut(len(costs), num_stages))
    assert max(stage_times(costs, ours, bandwidth)) == pytest.approx(best)


def test_among_equally_fast_cuts_the_most_even_is_taken():
    slow_head = [cost(1.0)] * 6 + [cost(50.0)]
    assert balance(slow_head, 3) == (3, 3, 1)


def test_a_slow_link_moves_the_cut_to_where_little_crosses():
    costs = [cost(1.0, 10**6), cost(1.0, 10**6), cost(1.0, 8), cost(1.0, 8)]
    assert balance(costs, 2) == (2, 2)
    assert balance(costs, 2, bandwidth_bytes_per_s=1e5) == (3, 1)


def test_too_few_blocks_are_refused_with_the_remedy():
    with pytest.raises(
        UserError, match=r"^8 blocks cannot fill 9 stages; use a layout of at most 8 stages or a deeper"
    ):
        balance([cost(1.0)] * 8, 9)


def test_no_bandwidth_is_refused():
    with pytest.raises(UserError, match="bandwidth of 0 bytes/s moves nothing"):
        balance([cost(1.0)] * 2, 2, bandwidth_bytes_per_s=0)


# ---------------------------------------------------------------- cut points


RESNET50 = make_model("resnet50")
MLP = make_model("mlp", inputs=4, width=4, depth=8, num_classes=4)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("resnet18", (3, 2, 2, 3)),
        ("resnet34", (5, 4, 4, 5)),
        ("resnet50", (5, 4, 4, 5)),
        ("resnet101", (9, 9, 8, 9)),
        ("resnet152", (13, 13, 13, 13)),
        ("bert-base", (3, 4, 4, 3)),
        ("bert-large", (5, 8, 8, 5)),
    ],
)
def test_four_rows_are_cut_as_the_reference_does_with_stem_and_head_at_the_ends(name, cut):
    assert cut_points(make_model(name), None, (1, 1, 1, 1)) == cut


@pytest.mark.parametrize(
    ("rows", "cut"), [((1, 1, 1, 1), (5, 4, 4, 5)), ((2, 2), (9, 9)), ((1, 3), (5, 13)), ((4,), (18,))]
)
def test_the_reference_cut_follows_the_rows_that_were_merged(rows, cut):
    assert cut_points(RESNET50, None, rows) == cut


@pytest.mark.parametrize(
    ("spec", "rows", "cut"),
    [
        ("2,4,4,6", (1, 1, 1, 1), (3, 4, 4, 7)),  # the body, per row
        ("3,4,4,7", (1, 1, 1, 1), (3, 4, 4, 7)),  # all blocks, per row
        ("2,4,4,6", (1, 2, 1), (3, 8, 7)),  # the body, per row, of which two were merged
        ("2,8,6", (1, 2, 1), (3, 8, 7)),  # the body, per stage
        ("3,8,7", (1, 2, 1), (3, 8, 7)),  # all blocks, per stage
        ("0,6,10,0", (1, 1, 1, 1), (1, 6, 10, 1)),  # stem alone, head alone
        (" 10, 6 ", (1, 1), (11, 7)),
    ],
)
def test_counts_may_be_per_row_or_per_stage_and_over_the_body_or_all_blocks(spec, rows, cut):
    assert cut_points(RESNET50, spec, rows) == cut


@pytest.mark.parametrize(
    ("spec", "rows", "message"),
    [
        ("4,4,4,5", (1, 1, 1, 1), "--partition 4,4,4,5 adds up to 17; resnet50 has 16 blocks to divide, or 18 with"),
        ("8,8", (1, 2, 1), "--partition 8,8 has 2 counts; this layout needs 4 (one per row) or 3 (one per stage)"),
        ("8,8", (1, 1, 1), "--partition 8,8 has 2 counts; this layout needs 3 (one per row)"),
        ("8,0,8", (1, 1, 1), "--partition 8,0,8 leaves stage 1 without a block"),
        ("8,-1,9", (1, 1, 1), "--partition 8,-1,9: expected counts such as 4,4,4,4"),
        ("half", (1, 1), "--partition half: expected counts such as 4,4,4,4, or balanced or reference"),
        ("reference", (1, 1), "the reference has no cut of resnet50 for 2 rows; give --partition balanced"),
        (None, (1,) * 19, "18 blocks cannot fill 19 stages"),
    ],
)
def test_a_wrong_cut_is_refused_in_one_line_with_the_valid_sums(spec, rows, message):
    with pytest.raises(UserError) as caught:
        cut_points(RESNET50, spec, rows, None)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_other_layouts_are_balanced_by_cost_and_only_those_need_a_profile():
    costs = [cost(1.0)] * 4 + [cost(2.0)] * 4
    assert cut_points(MLP, None, (1, 1), costs) == (5, 3)
    wanted = {
        (None, (1, 1, 1, 1)): False,
        ("balanced", (1, 1, 1, 1)): True,
        (None, (1, 1)): True,
        ("8,8", (1, 1)): False,
        (None, (2,)): False,
        ("balanced", (2,)): False,
    }
    assert {key: needs_profile(RESNET50, *key) for key in wanted} == wanted


def test_balanced_can_be_asked_for_where_the_reference_has_a_cut():
    costs = [cost(10.0)] + [cost(1.0)] * 17
    assert cut_points(RESNET50, "balanced", (1, 1, 1, 1), costs)[0] == 1


def test_a_balanced_cut_without_costs_is_the_callers_mistake():
    with pytest.raises(ValueError, match="mlp has 8 blocks; a balanced cut needs the cost of each"):
        cut_points(MLP, None, (1, 1), [cost(1.0)] * 7)


# ---------------------------------------------------------------- measuring


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class _Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, clock: FakeClock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        clock.now += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.now += 10 * ctx.seconds
        return gradient, None, None


class Slow(nn.Module):
    """Takes the given seconds of a fake clock, one after the other; ten times as many in the backward."""

    def __init__(self, clock: FakeClock, seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, count()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seconds = self.seconds[next(self.calls) % len(self.seconds)]
        return _Tick.apply(x * self.weight, self.clock, seconds), mask


def slow_model(clock: FakeClock, *seconds: list[float]) -> LayeredModel:
    blocks = tuple(Block(f"b{i}", f"b{i}.", partial(Slow, clock, s)) for i, s in enumerate(seconds))
    return LayeredModel("slow", blocks, 0, 0, lambda batch: (torch.zeros(batch, 3), torch.ones(batch).bool()))


def test_a_profile_has_the_median_after_the_warm_up_and_the_bytes_that_cross():
    clock = FakeClock()
    model = slow_model(clock, [90.0, 1.0, 2.0, 60.0], [5.0])
    first, second = profile_blocks(model, batch=4, device="cpu", clock=clock, repeats=3, warmup=1)
    assert (first.name, first.forward_s, first.backward_s) == ("b0", 2.0, 20.0)
    assert (second.forward_s, second.backward_s) == (5.0, 50.0)
    assert (first.output_bytes, first.parameter_bytes) == (4 * 3 * 4 + 4, 3 * 4)


def test_the_loss_counts_with_the_last_block():
    clock = FakeClock()

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        return _Tick.apply(outputs[0].sum(), clock, 100.0)

    costs = profile_blocks(slow_model(clock, [1.0], [1.0]), batch=2, device="cpu", clock=clock, loss=loss)
    assert [(c.forward_s, c.backward_s) for c in costs] == [(1.0, 10.0), (101.0, 1010.0)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"num_classes": 4, "stem": "cifar", "image_size": 16}),
        ("bert", {"config": '{"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20}'}),
        ("mlp", {"inputs": 4, "width": 4, "depth": 3, "num_classes": 4, "dropout": 0.5}),
    ],
)
def test_every_kind_of_model_can_be_profiled_and_no_random_state_moves(name, options):
    model = make_model(name, **options)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    costs = profile_blocks(
        model, batch=2, device="cpu", clock=perf_counter, repeats=1, warmup=0, autocast=torch.bfloat16
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [c.name for c in costs] == [b.name for b in model.blocks]
    assert all(c.forward_s > 0 and c.backward_s > 0 and c.output_bytes > 0 for c in costs)


def test_a_criterion_serves_as_the_profiles_loss():
    criterion, labels = Classification(), (torch.tensor([0, 1]),)
    costs = profile_blocks(
        MLP,
        batch=2,
        device="cpu",
        clock=perf_counter,
        repeats=1,
        loss=lambda outputs: criterion(outputs, labels, criterion.count(labels))[0],
    )
    assert len(costs) == 8


# ---------------------------------------------------------------- telling and keeping


def test_the_table_shows_blocks_stages_transfers_and_imbalance():
    costs = [
        BlockCost("stem", 0.001, 0.002, 1000, 2048),
        BlockCost("layer1.0", 0.002, 0.004, 4, 0),
        BlockCost("head", 0.001, 0.001, 4, 3 << 20),
    ]
    text = cut_table(costs, (1, 2), bandwidth_bytes_per_s=1e6)
    assert text.splitlines() == [
        "block     parameters  output  forward  backward  stage",
        "stem           2 KiB  1000 B  1.00 ms   2.00 ms      0",
        "layer1.0         0 B     4 B  2.00 ms   4.00 ms      1",
        "head           3 MiB     4 B  1.00 ms   1.00 ms      1",
        "",
        "stage                blocks  compute  transfer     total",
        "0: stem .. stem           1  3.00 ms   2.00 ms   5.00 ms",
        "1: layer1.0 .. head       2  8.00 ms   2.00 ms  10.00 ms",
        "imbalance (slowest stage / mean): 1.33",
    ]


def test_imbalance_of_equal_stages_is_one():
    assert imbalance(stage_costs([cost(1.0)] * 4, (2, 2))) == 1.0


def small(**options) -> LayeredModel:
    return make_model("mlp", **{"inputs": 4, "width": 4, "depth": 3, "num_classes": 4} | options)


def saved(path) -> Profile:
    costs = profile_blocks(small(), batch=2, device="cpu", clock=perf_counter, repeats=1)
    profile = Profile(conditions_of(small(), batch=2, device="cpu"), tuple(costs))
    save_profile(path, profile)
    return profile


def test_a_saved_profile_comes_back_equal(tmp_path):
    path = tmp_path / "profile.json"
    profile = saved(path)
    assert load_profile(path, small(), batch=2, device="cpu") == profile
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small(), {"batch": 8}, "was measured with batch 2, not 8; delete it to measure again"),
        (small(), {"autocast": torch.bfloat16}, "was measured with precision float32, not bfloat16; delete"),
        (replace(small(), name="other"), {}, "was measured with model mlp, not other; delete"),
        (small(inputs=5), {}, "was measured with inputs 4, not 5; delete"),
        (small(width=5), {}, "was measured with other blocks than mlp has here; delete"),
        (small(depth=4), {}, "was measured with other blocks than mlp has here; delete"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_the_remedy(tmp_path, model, options, message):
    path = tmp_path / "profile.json"
    saved(path)
    with pytest.raises(UserError) as caught:
        load_profile(path, model, **{"batch": 2, "device": "cpu"} | options)
    assert message in str(caught.value)


def test_a_profile_of_another_device_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    saved(path)
    raw = json.loads(path.read_text())
    raw["conditions"]["device"] = "some card"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="was measured with device some card, not cpu"):
        load_profile(path, small(), batch=2, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"conditions": {}}', '{"conditions": 3, "costs": []}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"profile\.json is not a profile .*; delete it to measure again"):
        load_profile(path, small(), batch=2, device="cpu")


def test_a_missing_profile_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read profile .*none\.json: No such file"):
        load_profile(tmp_path / "none.json", small(), batch=2, device="cpu")
    with pytest.raises(UserError, match=r"cannot write profile .*give a file in a folder that exists"):
        save_profile(tmp_path / "no" / "p.json", Profile(conditions_of(small(), batch=2, device="cpu"), ()))
