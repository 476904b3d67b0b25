"""Models as lists of blocks: the same numbers as torchvision's and transformers' own, however cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import (
    LayeredModel,
    as_tuple,
    build_blocks,
    build_whole,
    full_state,
    load_full_state,
    make_model,
    named_parameters,
    tie,
)
from pipeline.models.criterion import BertPretraining, Classification
from pipeline.models.mlp import mlp
from pipeline.models.smallest import least_samples


def gathered(model: LayeredModel, cut: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """The whole state dict, built stage by stage as separate processes would build it."""
    state, start = {}, 0
    for count in cut:
        state |= full_state(model, build_blocks(model, start, start + count, seed), start=start)
        start += count
    return state


def cifar_torchvision(name: str, num_classes: int) -> nn.Module:
    reference = getattr(torchvision.models, name)(num_classes=num_classes)
    reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    return reference


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- ResNet


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gathered_weights_load_strictly_into_torchvision_and_back(name):
    model, reference = make_model(name), getattr(torchvision.models, name)()
    reference.load_state_dict(gathered(model, (5, len(model.blocks) - 5), 0), strict=True)
    other = build_blocks(model, 0, len(model.blocks), 1)
    load_full_state(model, other, reference.state_dict())
    assert same(full_state(model, other), dict(reference.state_dict()))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_resnet_has_torchvisions_names_shapes_and_parameter_count(name):
    with torch.device("meta"):
        reference = getattr(torchvision.models, name)()
        model = make_model(name)
        modules = [block.build() for block in model.blocks]
    shapes = {key: tensor.shape for key, tensor in full_state(model, modules).items()}
    assert shapes == {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert sum(p.numel() for _, p in named_parameters(model, modules)) == sum(p.numel() for p in reference.parameters())


def test_chained_imagenet_blocks_equal_torchvision_exactly_in_eval():
    model, reference = make_model("resnet50"), torchvision.models.resnet50()
    whole = build_whole(model, 3).eval()
    reference.load_state_dict(full_state(model, list(whole.links)))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole(images), reference.eval()(images))


def test_chained_cifar_blocks_have_torchvisions_gradients_and_statistics_in_training():
    model, reference = (
        make_model("resnet18", num_classes=10, stem="cifar"),
        cifar_torchvision("resnet18", 10),
    )
    whole = build_whole(model, 3)
    reference.load_state_dict(full_state(model, list(whole.links)))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole(images).square().sum().backward()
    reference(images).square().sum().backward()
    gradients = {name: p.grad for name, p in named_parameters(model, list(whole.links))}
    assert same(gradients, {name: p.grad for name, p in reference.named_parameters()})
    assert same(full_state(model, list(whole.links)), dict(reference.state_dict()))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_no_resnet_block_writes_to_its_input(stem):
    model = make_model("resnet18", num_classes=4, stem=stem, image_size=32)
    tensors = model.sample(2)
    for module in build_blocks(model, 0, len(model.blocks), 0):
        inputs = tuple(tensor.detach() for tensor in tensors)
        versions, before = [t._version for t in inputs], copy.deepcopy(inputs)
        tensors = as_tuple(module(*inputs))
        assert [t._version for t in inputs] == versions
        assert all(map(torch.equal, inputs, before))


def test_zero_init_residual_makes_each_block_start_as_the_identity():
    model = make_model("resnet50", zero_init_residual=True)
    block = build_blocks(model, 2, 3, 0)[0].eval()  # layer1.1: same shape in and out
    x = torch.rand(1, 256, 4, 4)
    assert torch.equal(block(x), x)


def test_initialisation_follows_torchvisions_distribution():
    model = make_model("resnet18")
    state, reference = gathered(model, (10,), 0), torchvision.models.resnet18().state_dict()
    for name in ["conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight"]:
        assert float(state[name].std()) == pytest.approx(float(reference[name].std()), rel=0.05), name
    assert torch.equal(state["bn1.weight"], torch.ones(64))


# ---------------------------------------------------------------- cuts, seeds, ties


@pytest.mark.parametrize("cut", [(6,), (1, 5), (2, 2, 2), (1, 1, 1, 1, 1, 1)])
def test_initial_weights_do_not_depend_on_the_cut(cut):
    model = make_model("mlp", inputs=6, width=5, depth=6, num_classes=3)
    assert same(gathered(model, cut, 7), gathered(model, (3, 3), 7))


def test_another_seed_gives_other_weights_and_two_equal_blocks_differ():
    model = make_model("mlp", inputs=4, width=4, depth=3, num_classes=4)
    first, other = gathered(model, (3,), 0), gathered(model, (3,), 1)
    assert not torch.equal(first["layer0.linear.weight"], other["layer0.linear.weight"])
    assert not torch.equal(first["layer0.linear.weight"], first["layer1.linear.weight"])


def test_building_leaves_the_default_generator_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = make_model("mlp", inputs=4, width=4, depth=3, num_classes=4)
    build_blocks(model, 0, 3, 0)
    model.sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_is_tied_only_where_both_ends_are_present():
    model = make_model("mlp", inputs=4, width=4, depth=3, num_classes=4)
    model = LayeredModel("tied", model.blocks, 0, 0, model.sample, None, {"head.linear.weight": "layer0.linear.weight"})
    modules = build_blocks(model, 0, 3, 0)
    assert tie(model, modules[1:], start=1) == ()
    assert tie(model, modules) == ("head.linear.weight",)
    assert modules[2].linear.weight is modules[0].linear.weight
    assert "head.linear.weight" not in dict(named_parameters(model, modules))
    assert "head.linear.weight" in full_state(model, modules)


def test_an_unknown_model_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"unknown model 'resnet19'; choose from .*'resnet18'"):
        make_model("resnet19")


# ---------------------------------------------------------------- criterion


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_losses_of_uneven_microbatches_add_up_to_the_loss_of_the_batch(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (sum(sizes),), generator=generator)
    criterion = Classification(label_smoothing=0.1)
    counts = criterion.count((labels,))
    parts = zip(scores.split(sizes), labels.split(sizes), strict=True)
    total = sum(criterion((part,), (label,), counts)[0] for part, label in parts)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(scores, labels)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_one_microbatch_has_the_gradient_of_cross_entropys_mean_bit_for_bit():
    for batch in (1, 3, 7, 48, 100):
        scores = torch.randn(batch, 11, requires_grad=True)
        labels = torch.randint(0, 11, (batch,))
        criterion = Classification()
        (ours,) = torch.autograd.grad(criterion((scores,), (labels,), criterion.count((labels,)))[0], scores)
        (theirs,) = torch.autograd.grad(nn.CrossEntropyLoss()(scores, labels), scores)
        assert torch.equal(ours, theirs)


def test_accuracy_and_mean_loss_follow_from_the_sums():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 3])
    criterion = Classification(top_k=(1, 2))
    loss, sums = criterion((scores,), (labels,), criterion.count((labels,)))
    means = criterion.means({name: float(value) for name, value in sums.items()})
    assert means["acc"] == pytest.approx(1 / 3)
    assert means["acc2"] == pytest.approx(2 / 3)
    assert means["loss"] == pytest.approx(float(loss))
    assert sums["loss"].requires_grad is False


def bert_batch(batch: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, 6, 9, generator=generator)
    sentence = torch.randn(batch, 2, generator=generator)
    labels = torch.randint(0, 9, (batch, 6), generator=generator)
    labels[torch.rand(batch, 6, generator=generator) < 0.6] = -1
    return (scores, sentence), (labels, torch.randint(0, 2, (batch,), generator=generator))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_bert_losses_of_microbatches_add_up_though_their_masked_tokens_differ(sizes, seed):
    outputs, targets = bert_batch(sum(sizes), seed)
    criterion = BertPretraining()
    counts = criterion.count(targets)
    total, sums = (
        0.0,
        dict.fromkeys(["samples", "lm", "masked", "ns", "correct", "ns_correct"], 0.0),
    )
    splits = [tensor.split(sizes) for tensor in (*outputs, *targets)]
    for scores, sentence, labels, follows in zip(*splits, strict=True):
        loss, parts = criterion((scores, sentence), (labels, follows), counts)
        total += float(loss)
        sums = {name: sums[name] + float(parts[name]) for name in sums}
    whole, _ = criterion(outputs, targets, counts)
    assert total == pytest.approx(float(whole), rel=1e-5)
    assert criterion.means(sums)["loss"] == pytest.approx(float(whole), rel=1e-5)


def test_bert_loss_is_that_of_two_mean_cross_entropies_bit_for_bit_in_its_gradient():
    (scores, sentence), targets = bert_batch(5, 0)
    scores.requires_grad_(), sentence.requires_grad_()
    criterion = BertPretraining()
    loss, sums = criterion((scores, sentence), targets, criterion.count(targets))
    mean = nn.CrossEntropyLoss(ignore_index=-1)
    expected = mean(scores.view(-1, 9), targets[0].view(-1)) + mean(sentence, targets[1])
    ours = torch.autograd.grad(loss, (scores, sentence))
    theirs = torch.autograd.grad(expected, (scores, sentence))
    assert all(map(torch.equal, ours, theirs))
    assert float(sums["masked"]) == float((targets[0] != -1).sum())


def test_a_batch_without_masked_tokens_has_a_finite_loss():
    outputs, (labels, follows) = bert_batch(3, 0)
    targets = (torch.full_like(labels, -1), follows)
    criterion = BertPretraining()
    loss, _ = criterion(outputs, targets, criterion.count(targets))
    assert float(loss) == pytest.approx(float(nn.CrossEntropyLoss()(outputs[1], follows)), rel=1e-6)


def test_the_loss_is_float32_under_autocast():
    scores, labels = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3])
    criterion = Classification()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = criterion((scores,), (labels,), criterion.count((labels,)))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion((scores.float(),), (labels,), criterion.count((labels,)))[0])


@pytest.mark.parametrize(
    ("model", "least"),
    [
        (make_model("resnet18", num_classes=5, stem="cifar", image_size=8), 2),
        (make_model("resnet18", num_classes=5, stem="cifar", image_size=16), 1),
        (mlp(inputs=12, width=16, depth=2, num_classes=5, batchnorm=True), 2),
        (mlp(inputs=12, width=16, depth=2, num_classes=5), 1),
    ],
    ids=["1 x 1", "2 x 2", "normalised", "plain"],
)
def test_one_sample_will_do_where_a_batchnorm_sees_several_values_of_it(model: LayeredModel, least: int) -> None:
    before = torch.get_rng_state()
    assert least_samples(model) == least
    assert torch.equal(torch.get_rng_state(), before)
