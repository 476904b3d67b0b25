"""Token data sets: shards as NVIDIA writes them, read a row at a time, and what is said about damaged ones."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import datasets
from datasets.synthetic import CLS, FIRST_WORD, MASK, SEP
from datasets.wiki import IGNORE, KEYS, Shards, WikiInputs
from pipeline.data.loader import MicrobatchFeed
from pipeline.data.plan import Plan, ValidationPlan
from pipeline.errors import UserError

LENGTH, PREDICTIONS, VOCABULARY = 16, 4, 100
TYPES = {"input_ids": "i4", "input_mask": "i1", "segment_ids": "i1", "next_sentence_labels": "i1"}


def shard_arrays(rows: int, first: int = 0) -> dict[str, np.ndarray]:
    """Row r begins with the id 10 + first + r; r % 5 of its words are masked, the rest of the positions is zero."""
    numbers = np.arange(first, first + rows)
    used = numbers[:, None] % 5 > np.arange(PREDICTIONS)
    return {
        "input_ids": (10 + numbers[:, None] + np.arange(LENGTH)) % VOCABULARY,
        "input_mask": np.ones((rows, LENGTH)),
        "segment_ids": np.tile(np.arange(LENGTH) > 7, (rows, 1)),
        "masked_lm_positions": used * (2 + np.arange(PREDICTIONS)),
        "masked_lm_ids": used * (50 + np.arange(PREDICTIONS)),
        "next_sentence_labels": numbers % 2,
    }


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """As create_pretraining_data.py does: int32 and int8, gzip, chunks of h5py's choice."""
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, dtype=TYPES.get(key, "i4"), compression="gzip")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven shards of 3 rows, so that shard 10 comes after shard 9."""
    for number in range(11):
        write_shard(tmp_path / f"wikicorpus_en_training_{number}.hdf5", shard_arrays(3, 3 * number))
    return tmp_path


def load(folder: Path, **options: Any) -> datasets.Splits:
    return datasets.load("wiki", kind="tokens", data_dir=folder, **options)


def test_rows_come_in_the_order_of_shard_numbers(folder: Path) -> None:
    train = load(folder, vocab_size=VOCABULARY).train
    assert train.size == 33 and train.sequence_length == LENGTH
    assert [int(train.inputs[0, i][0][0]) for i in range(33)] == [10 + i for i in range(33)]


def test_inputs_are_ids_segments_and_mask(folder: Path) -> None:
    ids, segments, mask = load(folder).train.inputs[4]
    assert ids.dtype == segments.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [14 + i for i in range(LENGTH)]
    assert segments.tolist() == [0] * 8 + [1] * 8
    assert mask.tolist() == [1] * LENGTH


def test_only_masked_positions_are_labelled_and_padding_does_not_label_the_first_token(folder: Path) -> None:
    train = load(folder).train
    for index in range(10):
        labels, not_next = train.targets[index]
        masked = index % 5
        expected = [IGNORE] * 2 + [50 + i for i in range(masked)] + [IGNORE] * (LENGTH - 2 - masked)
        assert labels.tolist() == expected
        assert not_next.shape == () and int(not_next) == index % 2


def test_targets_are_read_without_the_inputs(folder: Path) -> None:
    train = load(folder).train
    for path in folder.glob("*.hdf5"):
        with h5py.File(path, "a") as file:
            file["input_ids"][:] = -5
    assert train.targets[3][0].shape == (LENGTH,)
    with pytest.raises(UserError, match="token id -5"):
        train.inputs[3]


def test_shards_named_test_are_validated_on(folder: Path) -> None:
    assert load(folder).val is None
    write_shard(folder / "wikicorpus_en_test_0.hdf5", shard_arrays(5))
    splits = load(folder)
    assert splits.val is not None and (splits.train.size, splits.val.size) == (33, 5)
    assert load(folder, validation=False).val is None


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_read_every_row_once_an_epoch(workers: int, folder: Path) -> None:
    train = load(folder, vocab_size=VOCABULARY).train
    train.inputs[0]  # the parent has a file open when the workers are forked
    plan = Plan(size=33, batch_size=3)
    seen = [
        int(row[0])
        for _, (ids, *_) in MicrobatchFeed(train.inputs, plan, stop_microbatch=22, workers=workers)
        for row in ids
    ]
    assert sorted(seen[:33]) == sorted(seen[33:]) == [10 + i for i in range(33)]
    assert seen[:33] != seen[33:]


def test_few_files_stay_open_and_the_ones_used_last(folder: Path) -> None:
    shards = Shards(sorted(folder.glob("*.hdf5")), open_files=3)
    inputs = WikiInputs(shards)
    assert not shards._handles  # opened when first read, not when built
    for index in (0, 3, 6, 9, 3, 12):
        inputs[index]
    assert list(shards._handles) == [3, 1, 4]
    assert all(opened["input_ids"].id.valid for opened in shards._handles.values())
    assert not pickle.loads(pickle.dumps(shards))._handles


def test_reading_one_row_of_a_large_shard_reads_a_small_part_of_it(tmp_path: Path) -> None:
    rows = 60_000
    arrays = {key: np.repeat(array, rows, axis=0) for key, array in shard_arrays(1).items()}
    random = np.random.default_rng(0)
    arrays["input_ids"] = random.integers(0, VOCABULARY, (rows, LENGTH))
    path = write_shard(tmp_path / "wiki_0.hdf5", arrays)
    with h5py.File(path, "r") as file:
        stored = file["input_ids"]
        touched = sum(1 for place in stored.iter_chunks() if place[0].start <= 777 < place[0].stop)
        assert touched < 0.1 * sum(1 for _ in stored.iter_chunks())
    shards = Shards([path])
    _, (row,) = shards.row(777, ("input_ids",))
    assert row.tolist() == arrays["input_ids"][777].tolist()


# ---- damage ------------------------------------------------------------------------------------------------------


def refused(message: str, folder: Path, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_one_without_shards_are_named(tmp_path: Path) -> None:
    refused(f"wiki: no folder {tmp_path}/x; .*prepare_wiki", tmp_path / "x")
    refused(rf"wiki: no \*.hdf5 shards to train on in {tmp_path}; .*prepare_wiki", tmp_path)
    with pytest.raises(UserError, match="wiki: no folder given"):
        datasets.load("wiki", kind="tokens")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named_with_its_file(key: str, folder: Path) -> None:
    bad = folder / "wikicorpus_en_training_7.hdf5"
    write_shard(bad, {name: array for name, array in shard_arrays(3).items() if name != key})
    refused(f"{bad}: no key '{key}'; expected input_ids, ", folder)


DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "mask of another width": (lambda a: a.update(input_mask=np.ones((3, 15))), r"input_mask has shape \(3, 15\)"),
    "fewer labels": (lambda a: a.update(next_sentence_labels=np.ones(2)), r"next_sentence_labels has shape \(2,\)"),
    "fewer words": (lambda a: a.update(masked_lm_ids=np.ones((3, 3))), r"masked_lm_ids has shape \(3, 3\)"),
    "flat ids": (lambda a: a.update(input_ids=np.ones(3)), r"input_ids is int32 \(3,\), expected integers in 2"),
    "longer": (lambda a: a.update({k: np.ones((3, 20)) for k in KEYS[:3]}), "sequences of 20 tokens, but 16 in"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_shapes_are_named_with_their_file(damage: str, folder: Path) -> None:
    bad = folder / "wikicorpus_en_training_7.hdf5"
    arrays = shard_arrays(3)
    change, message = DAMAGE[damage]
    change(arrays)
    write_shard(bad, arrays)
    refused(f"{bad}: {message}", folder)


def test_numbers_with_a_point_are_refused(folder: Path) -> None:
    bad = folder / "wikicorpus_en_training_7.hdf5"
    with h5py.File(bad, "w") as file:
        for key, array in shard_arrays(3).items():
            file.create_dataset(key, data=array.astype("f4"))
    refused(f"{bad}: input_ids is float32", folder)


@pytest.mark.parametrize("content", [b"", b"no hdf5", None])
def test_a_file_that_is_no_hdf5_is_named(content: bytes | None, folder: Path) -> None:
    bad = folder / "wikicorpus_en_training_7.hdf5"
    bad.write_bytes(bad.read_bytes()[:700] if content is None else content)
    refused(f"{bad}: not a readable HDF5 file", folder)


def test_a_shard_that_somebody_writes_and_one_that_is_gone_are_not_called_damaged(folder: Path) -> None:
    shard = folder / "wikicorpus_en_training_0.hdf5"
    train = load(folder).train
    with shard.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        refused(f"{shard}: another program is writing it .it is locked.; wait until that has ended", folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"training_0\.hdf5, row 0: cannot be read \(No such file or directory\)"):
        train.inputs[0]


def test_a_single_shard_without_rows_is_passed_over(folder: Path) -> None:
    write_shard(folder / "wikicorpus_en_training_3.hdf5", shard_arrays(0))
    train = load(folder).train
    assert train.size == 30 and int(train.inputs[9][0][0]) == 10 + 12


def test_shards_without_any_row_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"wiki_{number}.hdf5", shard_arrays(0))
    refused(f"{tmp_path}: the shards have no rows", tmp_path)


def change_row(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "a") as file:
        file[key][1] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_ids", VOCABULARY, "token id 100 is outside the model's vocabulary of 100"),
        ("input_ids", -1, "token id -1 is outside"),
        ("segment_ids", 2, "segment_ids holds values other than 0 and 1"),
        ("input_mask", -1, "input_mask holds values other than 0 and 1"),
        ("masked_lm_ids", VOCABULARY, "token id 100 is outside"),
        ("masked_lm_positions", LENGTH, "masked position outside a sequence of 16"),
        ("masked_lm_positions", -1, "masked position outside a sequence of 16"),
        ("next_sentence_labels", 7, "next sentence label 7, expected 0 or 1"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_values_out_of_range_are_named_with_file_and_row(
    key: str, value: int, message: str, workers: int, folder: Path
) -> None:
    bad = folder / "wikicorpus_en_training_2.hdf5"
    change_row(bad, key, value)
    train = load(folder, vocab_size=VOCABULARY).train
    for half, reads in ((train.inputs, key in KEYS[:3]), (train.targets, key not in KEYS[:3])):
        feed = MicrobatchFeed(half, ValidationPlan(size=33, batch_size=4), workers=workers)
        if not reads:
            assert len(list(feed)) == 9
            feed.close()
            continue
        with pytest.raises(UserError) as caught:
            list(feed)
        assert str(caught.value).startswith(f"{bad}, row 1: {message}")
        assert "\n" not in str(caught.value)


def test_the_sequence_length_of_the_model_must_be_that_of_the_shards(folder: Path) -> None:
    assert load(folder, sequence_length=LENGTH).train.size == 33
    refused("sequences of 16 tokens, the model has 128; give --sequence-length 16", folder, sequence_length=128)


# ---- synthetic ---------------------------------------------------------------------------------------------------


def test_synthetic_sequences_follow_their_rule_and_labels_restore_them() -> None:
    splits = datasets.load("synthetic", kind="tokens", samples=50, vocab_size=60, sequence_length=20, seed=3)
    assert splits.val is not None and splits.val.size == 5
    labels_seen = set()
    for index in range(50):
        ids, segments, mask = splits.train.inputs[1, index]
        labels, not_next = splits.train.targets[7, index]
        masked = labels != IGNORE
        assert masked.any() and torch.equal(masked, ids == MASK) and bool(mask.all())
        whole = torch.where(masked, labels, ids)
        assert whole[0] == CLS and whole[10] == whole[19] == SEP
        assert segments.tolist() == [0] * 11 + [1] * 9
        words = whole - FIRST_WORD
        assert torch.equal(words[1:10].diff() % 55, torch.ones(8, dtype=torch.int64))
        assert torch.equal(words[11:19].diff() % 55, torch.ones(7, dtype=torch.int64))
        if not_next == 0:
            assert (words[11] - words[9]) % 55 == 1
        labels_seen.add(int(not_next))
    assert labels_seen == {0, 1}


def test_synthetic_training_and_validation_sequences_differ() -> None:
    splits = datasets.load("synthetic", kind="tokens", samples=20)
    assert splits.val is not None
    assert not torch.equal(splits.train.inputs[0][0], splits.val.inputs[0][0])
    assert splits.train.inputs[0][0].shape == (128,)


def test_a_vocabulary_too_small_for_sequences_is_refused() -> None:
    with pytest.raises(UserError, match="made-up sequences of 128 tokens out of 5"):
        datasets.load("synthetic", kind="tokens", vocab_size=5)
