"""BERT's pre-training samples in HDF5 shards, as NVIDIA's DeepLearningExamples write them (create_pretraining_data.py).

    input_ids              (rows, sequence) int32     words masked out are [MASK], another word, or themselves
    input_mask             (rows, sequence) int8      1 up to the last [SEP], 0 on the padding
    segment_ids            (rows, sequence) int8      1 on the second sentence
    masked_lm_positions    (rows, predictions) int32  padded with 0; position 0 is [CLS] and never masked
    masked_lm_ids          (rows, predictions) int32  the words that stood there, padded with 0
    next_sentence_labels   (rows,) int8               1: the second sentence comes from elsewhere

A row is read when it is asked for, and only the compressed chunks that hold it. In shards of prepare_wiki.py that is
one chunk per key; NVIDIA's own have chunks 8 columns wide and 1000 rows high, so that a row at random costs some
milliseconds until the chunks are cached: give them more loader workers.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.base import Options, Split, Splits, epoch_and_index, given_folder
from pipeline.data.loader import Key
from pipeline.errors import UserError

IGNORE = -1  # the label of a token that is not to be predicted
INPUT_KEYS = ("input_ids", "segment_ids", "input_mask")
PREDICTION_KEYS = ("masked_lm_positions", "masked_lm_ids")
KEYS = (*INPUT_KEYS, *PREDICTION_KEYS, "next_sentence_labels")
OPEN_FILES = 8  # per process
_CHUNK_CACHE = {"rdcc_nbytes": 32 << 20, "rdcc_nslots": 10_007}  # per key and file; holds a shard of 60000 rows


def load(options: Options) -> Splits:
    """The shards `*.hdf5` of a folder: those with `_test_` in their names for validation, all others to train on."""
    remedy = "give --data DIR with *.hdf5 shards in it, made by python -m datasets.prepare_wiki"
    folder = given_folder(options.data_dir, what="wiki", remedy=remedy)
    files = sorted(folder.glob("*.hdf5"), key=_natural)
    train = [file for file in files if "_test_" not in file.name]
    val = [file for file in files if "_test_" in file.name]
    if not train:
        raise UserError(f"wiki: no *.hdf5 shards to train on in {folder}; {remedy}")
    return Splits(_split(train, options), _split(val, options) if val and options.validation else None)


def _split(files: list[Path], options: Options) -> Split:
    shards = Shards(files, vocab_size=options.vocab_size)
    if options.sequence_length not in (None, shards.sequence_length):
        raise UserError(
            f"{files[0]}: sequences of {shards.sequence_length} tokens, the model has {options.sequence_length}; "
            f"give --sequence-length {shards.sequence_length}, or prepare shards of {options.sequence_length}"
        )
    return Split(
        inputs=WikiInputs(shards),
        targets=WikiTargets(shards),
        size=len(shards),
        vocab_size=options.vocab_size,
        sequence_length=shards.sequence_length,
    )


class Shards:
    """Rows of many HDF5 files under one running number; every process opens files of its own, as it needs them.

    Raises:
        UserError: a file that is no HDF5, lacks a key, has wrong shapes or types, or differs in sequence length.
    """

    def __init__(self, files: list[Path], *, vocab_size: int | None = None, open_files: int = OPEN_FILES) -> None:
        shapes = [_check(file) for file in files]
        self._files = files
        self._ends = np.cumsum([rows for rows, _ in shapes])
        self._open_files = open_files
        self._handles: OrderedDict[int, Mapping[str, Any]] = OrderedDict()
        self._process = os.getpid()
        self.vocab_size = vocab_size
        self.sequence_length = shapes[0][1]
        for file, (_, length) in zip(files, shapes, strict=True):
            if length != self.sequence_length:
                raise UserError(
                    f"{file}: sequences of {length} tokens, but {self.sequence_length} in {files[0]}; "
                    f"keep shards of different lengths in different folders"
                )
        if len(self) == 0:
            raise UserError(f"{files[0].parent}: the shards have no rows; prepare them again")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": OrderedDict()}

    def row(self, index: int, keys: tuple[str, ...]) -> tuple[str, list[NDArray[np.int64]]]:
        """Where sample `index` lies, for messages, and its arrays under `keys`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        place = f"{self._files[shard]}, row {row}"
        try:
            opened = self._opened(shard)
            return place, [np.asarray(opened[key][row], dtype=np.int64) for key in keys]
        except (OSError, KeyError) as error:
            raise UserError(f"{place}: {_why_unreadable(error)}") from error

    def _opened(self, shard: int) -> Mapping[str, Any]:
        if self._process != os.getpid():  # a forked loader worker must not share its parent's files
            self._handles, self._process = OrderedDict(), os.getpid()
        if shard not in self._handles:
            if len(self._handles) >= self._open_files:
                _, oldest = self._handles.popitem(last=False)
                oldest["input_ids"].file.close()
            file = open_shard(self._files[shard])
            self._handles[shard] = {key: file[key] for key in KEYS}
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def check_ids(self, ids: NDArray[np.int64], place: str) -> None:
        """Raises UserError where an id is outside the vocabulary."""
        if ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(
                f"{place}: token id {wrong} is outside the model's vocabulary of {self.vocab_size}; "
                f"give the model the vocabulary that the shards were made with"
            )


@dataclass(frozen=True, eq=False)
class WikiInputs:
    """(input_ids, segment_ids, input_mask), each (sequence,) int64."""

    shards: Shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        place, arrays = self.shards.row(epoch_and_index(key)[1], INPUT_KEYS)
        self.shards.check_ids(arrays[0], place)
        for name, array in zip(INPUT_KEYS[1:], arrays[1:], strict=True):
            if array.min() < 0 or array.max() > 1:
                raise UserError(f"{place}: {name} holds values other than 0 and 1; prepare this shard again")
        return tuple(torch.from_numpy(array) for array in arrays)


@dataclass(frozen=True, eq=False)
class WikiTargets:
    """(labels (sequence,) int64, IGNORE where nothing is masked; next sentence label () int64)."""

    shards: Shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        keys = (*PREDICTION_KEYS, "next_sentence_labels")
        place, (positions, ids, not_next) = self.shards.row(epoch_and_index(key)[1], keys)
        length = self.shards.sequence_length
        if positions.min(initial=0) < 0 or positions.max(initial=0) >= length:
            raise UserError(f"{place}: masked position outside a sequence of {length}; prepare this shard again")
        if not_next not in (0, 1):
            raise UserError(f"{place}: next sentence label {not_next}, expected 0 or 1; prepare this shard again")
        given = positions > 0  # zeros are padding
        if given.any():
            self.shards.check_ids(ids[given], place)
        labels = np.full(length, IGNORE, dtype=np.int64)
        labels[positions[given]] = ids[given]
        return torch.from_numpy(labels), torch.tensor(int(not_next))


def open_shard(path: Path) -> h5py.File:
    """The file to read; a file system that knows no locks is read without one."""
    return h5py.File(path, "r", locking="best-effort", **_CHUNK_CACHE)


def _why_unreadable(error: Exception) -> str:
    """What h5py's error means: a file that is being written, one that may not be read, or one that is damaged."""
    if "unable to lock file" in str(error):
        return "another program is writing it (it is locked); wait until that has ended"
    number = error.errno if isinstance(error, OSError) else None
    if number is not None:  # the file system's, not HDF5's
        return f"cannot be read ({os.strerror(number)})"
    return f"not a readable HDF5 file ({error}); prepare or copy this shard again"


def _check(path: Path) -> tuple[int, int]:
    """(rows, sequence length) of one shard whose keys, types and shapes agree."""
    try:
        with open_shard(path) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise UserError(f"{path}: no key {missing[0]!r}; expected {', '.join(KEYS)}")
            shapes = {key: _shape(file[key], path, key) for key in KEYS}
    except OSError as error:
        raise UserError(f"{path}: {_why_unreadable(error)}") from error
    rows, length = shapes["input_ids"]
    predictions = shapes["masked_lm_positions"][1]
    expected: dict[str, tuple[int, ...]] = {"next_sentence_labels": (rows,)}
    expected |= dict.fromkeys(INPUT_KEYS, (rows, length)) | dict.fromkeys(PREDICTION_KEYS, (rows, predictions))
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise UserError(f"{path}: {key} has shape {shapes[key]}, expected {shape}; prepare this shard again")
    return rows, length


def _shape(stored: Any, path: Path, key: str) -> tuple[int, ...]:
    dimensions = 1 if key == "next_sentence_labels" else 2
    if not isinstance(stored, h5py.Dataset) or stored.dtype.kind not in "iu" or stored.ndim != dimensions:
        form = f"{stored.dtype} {stored.shape}" if isinstance(stored, h5py.Dataset) else "a group"
        raise UserError(f"{path}: {key} is {form}, expected integers in {dimensions} dimension(s)")
    return tuple(stored.shape)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts shard 2 before shard 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
