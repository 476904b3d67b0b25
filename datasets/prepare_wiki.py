"""Turns plain Wikipedia text into HDF5 shards for BERT: `python datasets/prepare_wiki.py --input FILES --output DIR`.

    text -> articles -> one part of them per shard -> sentences -> WordPiece ids -> pairs, masked -> shard

Shards have the names, keys, types and compression of NVIDIA's create_pretraining_data.py. A shard depends on the text,
the options and the seed, and not on the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

if not __package__:  # run as a file: the folder above stands in for the file's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import h5py
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from datasets.pretraining import Article, Recipe, Sample, Special, samples_of
from datasets.wikitext import articles, sentences
from datasets.wordpiece import COVERAGE, SPECIAL, read_vocabulary, tokenizer_for, train_vocabulary
from pipeline.errors import UserError

WARN_ABOVE = 0.01  # share of the text
PIECES = 4  # of a sequence, at least, into which --long-sentences split cuts: both halves of a pair shall fit
ROWS_PER_CHUNK = 32  # a chunk of a few kilobytes: a row can be read alone without unpacking much else


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the shards shall be like; `test_shards` of them are held out under other names."""

    recipe: Recipe
    shards: int = 16
    test_shards: int = 0
    dup_factor: int = 5
    seed: int = 12345
    lowercase: bool = True
    long_sentences: str = "cut"

    def __post_init__(self) -> None:
        least = {"shards": (self.shards, 1), "test-shards": (self.test_shards, 0), "dup-factor": (self.dup_factor, 1)}
        least |= {"seq-length": (self.recipe.sequence_length, 8), "max-predictions": (self.recipe.max_predictions, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise UserError(f"--{name} is {value}; give {smallest} or more")
        for name, share in (
            ("masked-lm-prob", self.recipe.masked_lm_prob),
            ("short-seq-prob", self.recipe.short_seq_prob),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"--{name} is {share}; give a share from 0 to 1")

    def file_names(self) -> list[str]:
        """NVIDIA's names; those with `_test_` are validated on."""
        train = [f"wikicorpus_en_training_{number}.hdf5" for number in range(self.shards)]
        return train + [f"wikicorpus_en_test_{number}.hdf5" for number in range(self.test_shards)]


class Written(NamedTuple):
    """One shard: its rows, the tokens of its text, those among them that are [UNK], and those that were cut off."""

    rows: int
    tokens: int
    unknown: int
    cut: int


ShardCall = tuple[Path, Path, int, Job, dict[str, int]]


def prepare(
    inputs: Sequence[Path],
    output: Path,
    job: Job,
    *,
    vocab: Path | None = None,
    train_vocab: int | None = None,
    character_coverage: float = COVERAGE,
    processes: int = 1,
    console: Console | None = None,
) -> list[Written]:
    """Writes the shards and vocab.txt into `output`; what was written into each.

    Raises:
        UserError: unreadable text, too few articles, an unusable vocabulary, or options that cannot be.
    """
    if (vocab is None) == (train_vocab is None):
        raise UserError("no vocabulary, or two; give either --vocab FILE or --train-vocab SIZE")
    if processes < 1:
        raise UserError(f"--processes is {processes}; give 1 or more")
    if not 0 < character_coverage <= 1:
        raise UserError(f"--character-coverage is {character_coverage}; give a share above 0, up to 1")
    known = None if vocab is None else read_vocabulary(vocab)
    _check_output(output, job)
    with tempfile.TemporaryDirectory(dir=output, prefix=".parts_") as temporary, _progress(console) as progress:
        parts = [Path(temporary) / f"{name}.txt" for name in job.file_names()]
        _divide(inputs, parts, progress)
        vocabulary = known or _train(
            parts[: job.shards],
            train_vocab or 0,
            lowercase=job.lowercase,
            coverage=character_coverage,
            progress=progress,
        )
        _write_vocabulary(vocabulary, output / "vocab.txt")
        return _write_shards(parts, output, job, vocabulary, processes, progress)


def _check_output(output: Path, job: Job) -> None:
    """Makes the folder; refuses one with shards that this run would leave standing among its own."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {output} ({error.strerror}); give another one") from error
    others = sorted({path.name for path in output.glob("*.hdf5")} - set(job.file_names()))
    if others:
        raise UserError(f"--output: {output / others[0]} is of another run; delete its shards or give another folder")


def _progress(console: Console | None) -> Progress:
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console or Console(stderr=True))


def _divide(inputs: Sequence[Path], parts: Sequence[Path], progress: Progress) -> None:
    """Deals out the articles of all inputs in turn: a paragraph a line, a blank line after each article."""
    task = progress.add_task("reading articles", total=sum(_size(path) for path in inputs))
    read = (article for path in inputs for article in articles(_lines(path, progress, task)))
    count = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(part.open("w", encoding="utf-8")) for part in parts]
        for article, file in zip(read, itertools.cycle(files), strict=False):
            file.write("\n".join(article) + "\n\n")
            count += 1
    if count < 2 * len(parts):
        fewer = f", or --shards {count // 2} or fewer" if count > 1 and len(parts) > 1 else ""
        raise UserError(
            f"{count} article{'s' * (count != 1)} cannot fill {len(parts)} shard{'s' * (len(parts) != 1)}, which "
            f"need{'s' * (len(parts) == 1)} 2 each; give more text (a blank line stands between two articles){fewer}"
        )


def _size(path: Path) -> int:
    if not path.is_file():
        raise UserError(f"--input: no file {path}; give plain text files, one article after another")
    return path.stat().st_size


def _lines(path: Path, progress: Progress, task: TaskID) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            progress.advance(task, len(line))
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file first") from error


def _train(parts: Sequence[Path], size: int, *, lowercase: bool, coverage: float, progress: Progress) -> dict[str, int]:
    task = progress.add_task("training a vocabulary", total=1)
    lines = itertools.chain.from_iterable(_sentences(part) for part in parts)
    tokens = train_vocabulary(lines, size, lowercase=lowercase, character_coverage=coverage)
    progress.advance(task)
    return {token: number for number, token in enumerate(tokens)}


def _sentences(part: Path) -> Iterator[str]:
    with part.open(encoding="utf-8") as file:
        for line in file:
            yield from sentences(line)


def _write_vocabulary(vocabulary: dict[str, int], path: Path) -> None:
    path.write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")


def _write_shards(
    parts: Sequence[Path], output: Path, job: Job, vocabulary: dict[str, int], processes: int, progress: Progress
) -> list[Written]:
    """One part per call, in that many processes; what was written, in the order of `parts`."""
    task = progress.add_task("writing shards", total=len(parts))
    calls = [
        (part, output / name, number, job, vocabulary)
        for number, (part, name) in enumerate(zip(parts, job.file_names(), strict=True))
    ]
    done: dict[int, Written] = {}
    for number, written in _here(calls) if processes == 1 else _in_processes(calls, processes):
        done[number] = written
        progress.advance(task)
    return [done[number] for number in range(len(parts))]


def _here(calls: Sequence[ShardCall]) -> Iterator[tuple[int, Written]]:
    for number, call in enumerate(calls):
        yield number, write_shard(*call)


def _in_processes(calls: Sequence[ShardCall], processes: int) -> Iterator[tuple[int, Written]]:
    """(number of the call, what it wrote) as they finish; the first failure ends it."""
    context = multiprocessing.get_context("spawn")  # tokenizers' threads do not survive a fork
    with ProcessPoolExecutor(processes, context, initializer=_die_on_interrupt) as pool:
        numbers = {pool.submit(write_shard, *call): number for number, call in enumerate(calls)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool as error:
            raise UserError("a process writing a shard was killed, out of memory?; give fewer --processes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_on_interrupt() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent alone speaks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_shard(part: Path, target: Path, number: int, job: Job, vocabulary: dict[str, int]) -> Written:
    """Writes one shard from the articles in `part`."""
    room = job.recipe.sequence_length - 3
    whole = _tokenise(part, vocabulary, job.lowercase)
    if len(whole) < 2:
        raise UserError(f"{target.name}: {len(whole)} articles with words in them, 2 are needed; give fewer --shards")
    tokenised = whole if job.long_sentences == "cut" else [_in_pieces(article, room // PIECES) for article in whole]
    samples = [
        sample
        for repeat in range(job.dup_factor)
        for article in range(len(tokenised))
        for sample in samples_of(
            article,
            tokenised,
            recipe=job.recipe,
            special=special_tokens(vocabulary),
            random=Random(f"{job.seed} {number} {repeat} {article}"),
        )
    ]
    Random(f"{job.seed} {number}").shuffle(samples)
    _write_hdf5(samples, target, job.recipe)
    lines = [sentence for article in tokenised for sentence in article]
    return Written(
        rows=len(samples),
        tokens=sum(len(sentence) for sentence in lines),
        unknown=sum(sentence.count(vocabulary["[UNK]"]) for sentence in lines),
        cut=sum(max(0, len(sentence) - room) for sentence in lines),
    )


def _in_pieces(article: Article, longest: int) -> Article:
    """The same tokens, no run of them longer than that."""
    return [
        sentence[start : start + longest] for sentence in article for start in range(0, len(sentence), max(1, longest))
    ]


def special_tokens(vocabulary: dict[str, int]) -> Special:
    """The ids that stand for no word, and those that do."""
    special = {vocabulary[token] for token in SPECIAL}
    words = [number for token, number in vocabulary.items() if number not in special and not _unused(token)]
    return Special(vocabulary["[CLS]"], vocabulary["[SEP]"], vocabulary["[MASK]"], words)


def _unused(token: str) -> bool:
    return token.startswith("[unused")


def _tokenise(part: Path, vocabulary: dict[str, int], lowercase: bool) -> list[Article]:
    tokenizer = tokenizer_for(vocabulary, lowercase=lowercase)
    result: list[Article] = []
    with part.open(encoding="utf-8") as file:
        for article in articles(file):
            lines = [sentence for paragraph in article for sentence in sentences(paragraph)]
            ids = [encoded.ids for encoded in tokenizer.encode_batch(lines, add_special_tokens=False)]
            result.append([sentence for sentence in ids if sentence])
    return [article for article in result if article]


def _write_hdf5(samples: Sequence[Sample], target: Path, recipe: Recipe) -> None:
    """In one step: a reader sees the whole shard or none.

    HDF5 makes the file in memory, since it crashes when the disk fills up while it writes one.
    """
    arrays = to_arrays(samples, recipe)
    with h5py.File(target.name, "w", driver="core", backing_store=False) as file:
        for key, array in arrays.items():
            chunks = (min(ROWS_PER_CHUNK, len(array)), *array.shape[1:])
            file.create_dataset(key, data=array, compression="gzip", chunks=chunks)
        file.flush()
        image = file.id.get_file_image()
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(image)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def to_arrays(samples: Sequence[Sample], recipe: Recipe) -> dict[str, NDArray[np.signedinteger[Any]]]:
    """The six arrays of datasets/wiki.py, padded with zeros."""
    rows, length, predictions = len(samples), recipe.sequence_length, recipe.max_predictions
    arrays: dict[str, NDArray[np.signedinteger[Any]]] = {
        "input_ids": np.zeros((rows, length), np.int32),
        "input_mask": np.zeros((rows, length), np.int8),
        "segment_ids": np.zeros((rows, length), np.int8),
        "masked_lm_positions": np.zeros((rows, predictions), np.int32),
        "masked_lm_ids": np.zeros((rows, predictions), np.int32),
        "next_sentence_labels": np.array([sample.not_next for sample in samples], np.int8),
    }
    for row, sample in enumerate(samples):
        arrays["input_ids"][row, : len(sample.ids)] = sample.ids
        arrays["input_mask"][row, : len(sample.ids)] = 1
        arrays["segment_ids"][row, sample.first_length : len(sample.ids)] = 1
        arrays["masked_lm_positions"][row, : len(sample.positions)] = sample.positions
        arrays["masked_lm_ids"][row, : len(sample.masked_ids)] = sample.masked_ids
    return arrays


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="prepare_wiki.py", description="Plain Wikipedia text to HDF5 shards for BERT.")
    made.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="plain text, UTF-8")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="where shards and vocab.txt go")
    made.add_argument("--vocab", type=Path, metavar="FILE", help="WordPiece vocabulary, one token a line")
    made.add_argument("--train-vocab", type=int, metavar="SIZE", help="train a vocabulary on the text instead")
    made.add_argument(
        "--character-coverage",
        type=float,
        default=COVERAGE,
        metavar="P",
        help=f"share of the text whose characters a trained vocabulary keeps (default: {COVERAGE})",
    )
    made.add_argument(
        "--long-sentences",
        choices=("cut", "split"),
        default=Job.long_sentences,
        help="what becomes of sentences longer than a sequence: cut off as by NVIDIA, or in pieces (default: cut)",
    )
    made.add_argument("--cased", action="store_true", help="keep capitals and accents (default: lower case)")
    made.add_argument("--seq-length", type=int, default=Recipe.sequence_length, metavar="N")
    made.add_argument("--max-predictions", type=int, default=Recipe.max_predictions, metavar="N")
    made.add_argument("--masked-lm-prob", type=float, default=Recipe.masked_lm_prob, metavar="P")
    made.add_argument("--short-seq-prob", type=float, default=Recipe.short_seq_prob, metavar="P")
    made.add_argument("--dup-factor", type=int, default=Job.dup_factor, metavar="N", help="masks per article")
    made.add_argument("--shards", type=int, default=Job.shards, metavar="N", help="files to train on")
    made.add_argument("--test-shards", type=int, default=0, metavar="N", help="more files, to validate on")
    made.add_argument("--seed", type=int, default=Job.seed, metavar="N")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        recipe = Recipe(
            sequence_length=given.seq_length,
            max_predictions=given.max_predictions,
            masked_lm_prob=given.masked_lm_prob,
            short_seq_prob=given.short_seq_prob,
        )
        same = {field.name: getattr(given, field.name) for field in fields(Job) if field.name in vars(given)}
        job = Job(recipe=recipe, lowercase=not given.cased, **same)
        written = prepare(
            given.input,
            given.output,
            job,
            vocab=given.vocab,
            train_vocab=given.train_vocab,
            character_coverage=given.character_coverage,
            processes=given.processes,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {_what_failed(error, given.output)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{sum(shard.rows for shard in written)} samples in {len(written)} shards in {given.output}")
    for line in losses(written, trained=given.train_vocab is not None):
        print(line, file=sys.stderr)
    return 0


def _what_failed(error: OSError, output: Path) -> str:
    if error.errno != errno.ENOSPC:
        return str(error)
    free = shutil.disk_usage(output).free if output.exists() else 0
    return f"--output {output}: the disk is full ({free / 1e6:.1f} MB free); make room, or give another folder"


def losses(written: Sequence[Written], *, trained: bool) -> list[str]:
    """What the text lost on its way, in lines of which those above 1 % are warnings."""
    tokens = max(1, sum(shard.tokens for shard in written))
    unknown, cut = sum(shard.unknown for shard in written) / tokens, sum(shard.cut for shard in written) / tokens
    lines = [f"{unknown:.2%} of the tokens are [UNK], {cut:.2%} of the text stands in no sequence, cut off"]
    if unknown > WARN_ABOVE:
        remedy = "a larger --train-vocab or --character-coverage" if trained else "a vocabulary made for this text"
        lines.append(f"warning: {unknown:.1%} of the tokens are [UNK], which nothing can be learnt from; give {remedy}")
    if cut > WARN_ABOVE:
        lines.append(
            f"warning: {cut:.1%} of the text was cut off, as its sentences are longer than a sequence; "
            "give --long-sentences split, or a larger --seq-length"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
