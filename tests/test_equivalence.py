"""Pipelined equals plain: every schedule against unsplit training, bit for bit where the arithmetic allows it."""

from __future__ import annotations

from pipes import (
    OPTIMIZERS,
    Job,
    Unsplit,
    assert_equal,
    cuts,
    run_threads,
    small_mlp,
)

import pytest
import torch
from torch import Tensor

from pipeline.models import make_model
from pipeline.models.criterion import BertPretraining
from pipeline.stage.stage import StageOptions
from pipeline.transport.local import local_transports

TINY_BERT = (
    '{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, '
    '"intermediate_size": 32, "max_position_embeddings": 12}'
)
STAGES = (1, 2, 3, 4)


def trained(job: Job) -> tuple[list[int], dict[str, Tensor]]:
    executors, state = run_threads(job, local_transports(len(job.counts), timeout_s=60))
    return [executor.stage.weights.versions for executor in executors], state


def mlp_job(stages: int, schedule: str, *, dropout: float = 0.3, batchnorm: bool = False, **options: object) -> Job:
    model = small_mlp(dropout=dropout, batchnorm=batchnorm)
    return Job(model=model, counts=cuts(len(model.blocks), stages), schedule=schedule, **options)  # type: ignore[arg-type]


def bert_batch(microbatch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Three sequences of 12 tokens, one of them shorter; as many masked tokens as chance has it."""
    generator = torch.Generator().manual_seed(microbatch)
    ids = torch.randint(50, (3, 12), generator=generator)
    segments = torch.randint(2, (3, 12), generator=generator)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    labels = torch.where(torch.rand(3, 12, generator=generator) < 0.3, ids, -1)
    return (ids, segments, mask), (labels, torch.randint(2, (3,), generator=generator))


def bert_job(stages: int, schedule: str, *, tied: bool = True, **options: object) -> Job:
    model = make_model("bert-base", config=TINY_BERT, seq_length=12, tied=tied)
    return Job(
        model=model,
        counts=cuts(len(model.blocks), stages),
        schedule=schedule,
        criterion=BertPretraining(),
        batch=bert_batch,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", STAGES)
def test_flushed_schedules_equal_unsplit_training(
    stages: int, schedule: str, microbatches: int, optimizer: str
) -> None:
    job = mlp_job(stages, schedule, microbatches=microbatches, optimizer=optimizer)
    versions, state = trained(job)
    assert_equal(state, Unsplit(job).train(), tolerance=0)
    assert versions == [1] * stages


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("stages", STAGES)
def test_pipedream_equals_a_deep_copy_of_the_model_per_microbatch(stages: int, batchnorm: bool, optimizer: str) -> None:
    job = mlp_job(stages, "pipedream", batches=9, optimizer=optimizer, batchnorm=batchnorm)
    versions, state = trained(job)
    assert_equal(state, Unsplit(job).train_with_delays(), tolerance=0)
    assert versions == [stages - stage for stage in range(stages)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream"])
def test_recomputation_changes_nothing(schedule: str) -> None:
    options = {"batches": 6, "microbatches": 1 if schedule == "pipedream" else 3, "batchnorm": True}
    _, plain = trained(mlp_job(3, schedule, **options))  # type: ignore[arg-type]
    _, again = trained(mlp_job(3, schedule, options=StageOptions(recompute=True), **options))  # type: ignore[arg-type]
    assert_equal(again, plain, tolerance=0)


@pytest.mark.parametrize("stages", STAGES)
def test_clipping_uses_the_norm_over_all_stages(stages: int) -> None:
    job = mlp_job(stages, "1f1b", microbatches=2, options=StageOptions(max_norm=0.05))
    _, state = trained(job)
    assert_equal(state, Unsplit(job).train(), tolerance=1e-6)
    free = mlp_job(stages, "1f1b", microbatches=2)
    assert not torch.equal(state["model.layer0.linear.weight"], trained(free)[1]["model.layer0.linear.weight"])


def test_accumulation_over_batches_is_one_bigger_batch() -> None:
    job = mlp_job(2, "1f1b", microbatches=2, accumulate=2, batches=5)
    _, state = trained(job)
    assert_equal(state, Unsplit(job).train(), tolerance=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream"])
@pytest.mark.parametrize("stages", STAGES)
def test_a_tied_bert_equals_the_unsplit_tied_one(stages: int, schedule: str, optimizer: str) -> None:
    flushed = schedule != "pipedream"
    job = bert_job(stages, schedule, microbatches=3 if flushed else 1, batches=3 if flushed else 7, optimizer=optimizer)
    _, state = trained(job)
    unsplit = Unsplit(job)
    assert_equal(state, unsplit.train() if flushed else unsplit.train_with_delays(), tolerance=1e-5)


def test_a_tied_weight_that_was_copied_or_averaged_is_shared_again() -> None:
    (owner, borrower), _ = run_threads(bert_job(2, "gpipe", microbatches=2), local_transports(2, timeout_s=60))
    assert owner.tie is not None
    (loan,) = borrower.stage.borrowed
    value = dict(owner.stage.model_state())[f"model.{owner.tie.owner_name}"]
    with torch.no_grad():
        value.add_(1)
    assert not torch.equal(loan.leaf, value)
    owner.share_tied_weight(0)
    borrower.share_tied_weight(0)
    assert torch.equal(loan.leaf, value)


def test_the_tied_parameter_counts_once_in_the_norm() -> None:
    job = bert_job(3, "1f1b", microbatches=2, options=StageOptions(max_norm=0.5))
    _, state = trained(job)
    assert_equal(state, Unsplit(job).train(), tolerance=1e-5)


def test_an_untied_bert_trains_its_own_decoder() -> None:
    job = bert_job(2, "gpipe", microbatches=2, tied=False)
    _, state = trained(job)
    assert_equal(state, Unsplit(job).train(), tolerance=1e-6)
    assert not torch.equal(
        state["model.cls.predictions.decoder.weight"], state["model.bert.embeddings.word_embeddings.weight"]
    )


def test_a_short_last_batch_changes_the_shape_of_what_is_sent() -> None:
    def batch(microbatch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(microbatch)
        size = 2 if microbatch % 3 == 2 else 6
        return (torch.randn(size, 12, generator=generator),), (torch.randint(5, (size,), generator=generator),)

    job = mlp_job(3, "pipedream", batches=9, batch=batch)
    _, state = trained(job)
    assert_equal(state, Unsplit(job).train_with_delays(), tolerance=0)


def test_deferred_batchnorm_has_the_running_statistics_of_the_whole_batch() -> None:
    model = make_model("resnet18", num_classes=5, stem="cifar")

    def batch(microbatch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(microbatch)
        return (torch.randn(4, 3, 8, 8, generator=generator),), (torch.randint(5, (4,), generator=generator),)

    options = StageOptions(deferred_batchnorm=True)
    counts = cuts(len(model.blocks), 2)
    job = Job(model=model, counts=counts, schedule="gpipe", microbatches=2, batches=1, batch=batch, options=options)
    _, state = trained(job)
    stem = Unsplit(Job(model=model, counts=counts, schedule="gpipe", batches=1, batch=batch)).modules[0]
    stem(torch.cat([batch(0)[0][0], batch(1)[0][0]]))
    torch.testing.assert_close(state["model.bn1.running_mean"], stem.bn1.running_mean)
    torch.testing.assert_close(state["model.bn1.running_var"], stem.bn1.running_var)
    assert state["model.bn1.num_batches_tracked"] == 1
