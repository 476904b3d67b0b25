"""From plain text to shards: articles, sentences, vocabulary, pairs, masks, files."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, shared_data
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import datasets
from datasets.prepare_wiki import Job, losses, main, prepare, special_tokens
from datasets.pretraining import Recipe, Special, mask, pairs_of, samples_of, truncate
from datasets.wiki import IGNORE
from datasets.wikitext import articles, sentences
from datasets.wordpiece import SPECIAL, read_vocabulary, tokenizer_for, train_vocabulary
from pipeline.errors import UserError

TEXT = "the cat dog bird river town was saw left and found small old red near under over many few great"
WORDS = TEXT.split()


def made_up_text(count: int, seed: int = 0) -> str:
    """Articles of a few sentences, apart by blank lines."""
    random = Random(seed)

    def sentence() -> str:
        return " ".join(random.choices(WORDS, k=random.randint(3, 12))).capitalize() + "."

    return "\n\n".join("\n".join(" ".join(sentence() for _ in range(6)) for _ in range(3)) for _ in range(count)) + "\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.txt"
    path.write_text(made_up_text(24), encoding="utf-8")
    return path


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "given_vocab.txt"
    path.write_text("\n".join([*SPECIAL, ".", *WORDS]) + "\n", encoding="utf-8")
    return path


JOB = Job(recipe=Recipe(sequence_length=48, max_predictions=7), shards=3, dup_factor=2, seed=9)
QUIET = Console(file=io.StringIO())


# ---- articles ----------------------------------------------------------------------------------------------------


def test_wikitext_articles_begin_at_first_level_headings_and_lose_all_headings() -> None:
    text = """
 = First =

 One . Two .
 = = Section = =
 Three , whose constant is c
 = 1 henry . More .

 = Second ( film ) =
 Four .
"""
    assert list(articles(io.StringIO(text))) == [
        ["One . Two .", "Three , whose constant is c", "= 1 henry . More ."],
        ["Four ."],
    ]


def test_a_formula_between_equals_signs_is_no_title() -> None:
    text = " = Filter =\n A fact . The inductance L\n = 1 henry and capacitance C =\n 1 farad .\n = Film =\n Text .\n"
    assert list(articles(io.StringIO(text))) == [["A fact . The inductance L", "1 farad ."], ["Text ."]]


def test_a_title_may_follow_a_list() -> None:
    text = " = Wrestler =\n Moves\n Backbreaker\n = Ironclad =\n Text .\n"
    assert list(articles(io.StringIO(text))) == [["Moves", "Backbreaker"], ["Text ."]]


def test_wikiextractor_articles_stand_between_tags_and_lose_the_repeated_title() -> None:
    text = """<doc id="1" url="" title="Anarchism">
Anarchism

Anarchism is a theory.

It has a history.
</doc>
<doc id="2" url="" title="Autism">
Autism

Autism is a condition.
</doc>
"""
    expected = [["Anarchism is a theory.", "It has a history."], ["Autism is a condition."]]
    assert list(articles(io.StringIO(text))) == expected


def test_other_articles_stand_apart_by_blank_lines() -> None:
    text = "\n\nOne is here.\nIt goes on.\n\n\n== Heading ==\nTwo.\n"
    assert list(articles(io.StringIO(text))) == [["One is here.", "It goes on."], ["Two."]]
    assert list(articles(io.StringIO(""))) == []


def test_the_articles_of_a_real_file() -> None:
    with (shared_data("wiki") / "wiki.test.raw").open(encoding="utf-8") as file:
        found = list(articles(file))
    assert len(found) == 60  # of WikiText-2's test split
    assert found[0][0].startswith("Robert Boulter is an English film , television and theatre actor .")
    assert not any(line.startswith("= ") and line.endswith(" =") for article in found for line in article)


# ---- sentences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected",
    [
        ["He left.", "She came."],
        ["Dr. No met J. F. Kennedy in the U.S. in 1962.", "He left!", "Did she?"],
        ['He said "Go."', '"No," said she.'],
        ["It cost 3.5 million.", "In 2004 it fell."],
        ["See e.g. Smith et al. 2004 for more."],
        ["He was born c. 1200.", "Ålesund is a town.", "Élan is not."],
        ["The site example.com is up.", "Yes."],
        ["What ?!", "Indeed ."],
        ["他走了。", "她来了！", "“真的吗？”", "是。"],
        ["그는 갔다.", "그녀는 왔다.", "정말?", "그렇다."],
        ["वह गया।", "वह आई।"],
        ["ذهب.", "هل جاءت؟", "نعم."],
        ["all is in small letters here.", "it goes on, e.g. like this!", "and ends."],
        ["iPhones sell. and this is no new one.", "This is."],
    ],
)
def test_a_paragraph_is_cut_where_sentences_end(expected: list[str]) -> None:
    assert sentences(" ".join(expected)) == expected


def test_wikitexts_marks_inside_words_are_undone() -> None:
    assert sentences("A low @-@ pass costs 3 @.@ 5 or 4 @,@ 000 .") == ["A low-pass costs 3.5 or 4,000 ."]


@given(st.text(alphabet="aB .!?\"'(1Ä", max_size=60))
def test_sentences_joined_give_the_paragraph_back(paragraph: str) -> None:
    assert " ".join(sentences(paragraph)) == " ".join(paragraph.split())


# ---- vocabulary --------------------------------------------------------------------------------------------------


def test_a_trained_vocabulary_has_the_special_tokens_first_the_size_asked_for_and_no_unknown_words() -> None:
    lines = made_up_text(30).splitlines()
    tokens = train_vocabulary(lines, 80, lowercase=True)
    assert tuple(tokens[:5]) == SPECIAL and len(tokens) == len(set(tokens)) == 80
    tokenizer = tokenizer_for({token: number for number, token in enumerate(tokens)}, lowercase=True)
    for line in lines:
        encoded = tokenizer.encode(line, add_special_tokens=False)
        assert 1 not in encoded.ids
        assert "".join(encoded.tokens).replace("##", "") == line.lower().replace(" ", "")


TRAIN = """
import hashlib, sys
from datasets.wordpiece import train_vocabulary
tokens = train_vocabulary(sys.stdin, 150, lowercase=False)
print(hashlib.sha256(" ".join(tokens).encode()).hexdigest())
"""


def test_the_same_text_gives_the_same_vocabulary_in_every_process() -> None:
    endings = ("", "ing", "ly", "er", "est", "\u00e9", "q")
    words = " ".join(word + ending for word in made_up_text(9).split() for ending in endings)
    run = [sys.executable, "-c", TRAIN]
    printed = {
        subprocess.run(run, input=words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout
        for _ in range(2)
    }
    assert len(printed) == 1 and len(printed.pop()) == 65


def test_a_vocabulary_too_small_for_the_alphabet_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a vocabulary of 20 does not hold the alphabet; give --train-vocab \d+ or more"
    ):
        train_vocabulary(made_up_text(2).splitlines(), 20, lowercase=True)
    with pytest.raises(UserError, match="no words to train a vocabulary on"):
        train_vocabulary([" ", ""], 1000, lowercase=True)


def test_a_large_alphabet_is_kept_as_far_as_the_text_needs_it_and_the_vocabulary_holds_it() -> None:
    characters = [chr(0x4E00 + number) for number in range(3000)]
    text = [" ".join(characters)]
    assert set(characters) <= set(train_vocabulary(text, 8000, lowercase=True, character_coverage=1.0))
    half = train_vocabulary(text, 8000, lowercase=True, character_coverage=0.5)
    assert sum(token in characters for token in half) == 1500
    small = train_vocabulary(text, 4000, lowercase=True)  # half of it for the alphabet
    assert 1999 <= sum(token in characters for token in small) <= 2001


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_line_of_a_vocabulary_ends_at_a_line_feed_only(ending: str, tmp_path: Path) -> None:
    tokens = [*SPECIAL, "\u2028", "\u0085", "\x0b", "\x1c", "a"]
    (tmp_path / "v.txt").write_bytes("".join(token + ending for token in tokens).encode())
    assert read_vocabulary(tmp_path / "v.txt") == {token: number for number, token in enumerate(tokens)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"no \[MASK\] in it"),
        ("\n".join([*SPECIAL, "a", "b", "a"]), "'a' stands there twice"),
        (b"\xff\xfe", "not a readable vocabulary"),
        (None, "not a readable vocabulary"),
    ],
)
def test_an_unusable_vocabulary_is_named(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{path}: {message}"):
        read_vocabulary(path)


# ---- pairs and masks ---------------------------------------------------------------------------------------------

CLS, SEP, MASK = 2, 3, 4
SPECIAL_IDS = Special(CLS, SEP, MASK, range(5, 10_000))


def numbered_articles(count: int, random: Random) -> list[list[list[int]]]:
    """Article a holds the tokens 1000 (a + 1), 1000 (a + 1) + 1, ... in sentences of random length."""
    made = []
    for article in range(count):
        numbers = itertools.count(1000 * (article + 1))
        made.append([[next(numbers) for _ in range(random.randint(1, 20))] for _ in range(random.randint(1, 15))])
    return made


@given(st.integers(0, 10_000), st.integers(8, 64))
def test_halves_follow_each_other_or_come_from_another_article(seed: int, length: int) -> None:
    random = Random(seed)
    corpus = numbered_articles(4, random)
    for first, second, not_next in pairs_of(1, corpus, recipe=Recipe(sequence_length=length), random=random):
        assert first and second
        assert first == list(range(first[0], first[0] + len(first))) and first[0] // 1000 == 2
        if not_next:
            assert {token // 1000 for token in second} <= {1, 3, 4}
        else:
            assert second[0] == first[-1] + 1


@given(st.integers(0, 10_000))
def test_the_first_halves_and_following_halves_cover_the_article_once_in_order(seed: int) -> None:
    random = Random(seed)
    corpus = numbered_articles(3, random)
    used = []
    for first, second, not_next in pairs_of(0, corpus, recipe=Recipe(sequence_length=32), random=random):
        used += first + ([] if not_next else second)
    assert used == [token for sentence in corpus[0] for token in sentence]


def test_about_half_of_the_pairs_are_not_next() -> None:
    random = Random(0)
    corpus = [[[1000 * (a + 1) + i] * 5 for i in range(2000)] for a in range(2)]
    drawn = [not_next for _, _, not_next in pairs_of(0, corpus, recipe=Recipe(), random=random)]
    assert len(drawn) >= 100 and 0.4 < np.mean(drawn) < 0.6


@given(st.integers(0, 10_000), st.integers(8, 40), st.integers(1, 9))
def test_a_sample_fits_its_row_and_restores_the_words(seed: int, length: int, predictions: int) -> None:
    random = Random(seed)
    corpus = numbered_articles(3, random)
    recipe = Recipe(sequence_length=length, max_predictions=predictions)
    for sample in samples_of(0, corpus, recipe=recipe, special=SPECIAL_IDS, random=random):
        assert len(sample.ids) <= length
        assert sample.ids[0] == CLS and sample.ids[sample.first_length - 1] == SEP == sample.ids[-1]
        assert 1 <= len(sample.positions) == len(sample.masked_ids) <= predictions
        assert sample.positions == sorted(set(sample.positions)) and sample.positions[0] > 0
        whole = list(sample.ids)
        for place, token in zip(sample.positions, sample.masked_ids, strict=True):
            whole[place] = token
        assert MASK not in whole and whole.count(SEP) == 2 and whole.count(CLS) == 1


@given(st.integers(1, 50), st.integers(1, 50), st.integers(2, 60), st.integers(0, 99))
def test_truncation_takes_from_the_longer_half_and_leaves_both(a: int, b: int, room: int, seed: int) -> None:
    first, second = list(range(a)), list(range(100, 100 + b))
    truncate(first, second, room, Random(seed))
    assert len(first) + len(second) == min(a + b, room) and first and second
    assert first == list(range(first[0], first[-1] + 1)) and second == list(range(second[0], second[-1] + 1))
    if a + b > room:
        assert abs(len(first) - len(second)) <= 1 or len(first) == a or len(second) == b


def test_fifteen_percent_are_chosen_of_which_80_are_masked_10_replaced_10_kept() -> None:
    random = Random(1)
    masked = replaced = kept = total = 0
    for _ in range(400):
        words = [CLS, *(random.randint(5, 9999) for _ in range(98)), SEP]
        ids = list(words)
        positions, originals = mask(ids, recipe=Recipe(max_predictions=99), special=SPECIAL_IDS, random=random)
        assert len(positions) == 15 and originals == [words[place] for place in positions]
        assert all(ids[i] == words[i] for i in set(range(100)) - set(positions))
        masked += sum(ids[place] == MASK for place in positions)
        kept += sum(ids[place] == words[place] for place in positions)
        replaced += sum(ids[place] not in (MASK, words[place]) for place in positions)
        total += len(positions)
    shares = np.array([masked, replaced, kept]) / total
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.02


def test_random_words_are_never_special_tokens(vocab: Path) -> None:
    special = special_tokens(read_vocabulary(vocab) | {"[unused3]": 900})
    assert sorted(special.words) == list(range(5, 6 + len(WORDS)))


# ---- files -------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shards_have_nvidias_names_keys_types_and_compression(text: Path, vocab: Path, tmp_path: Path) -> None:
    rows = [shard.rows for shard in prepare([text], tmp_path / "out", JOB, vocab=vocab, console=QUIET)]
    assert sorted(digests(tmp_path / "out")) == ["vocab.txt", *(f"wikicorpus_en_training_{i}.hdf5" for i in range(3))]
    for number, count in enumerate(rows):
        with h5py.File(tmp_path / "out" / f"wikicorpus_en_training_{number}.hdf5") as file:
            stored = {key: (value.dtype.str, value.shape, value.compression) for key, value in file.items()}
        assert stored == {
            "input_ids": ("<i4", (count, 48), "gzip"),
            "input_mask": ("|i1", (count, 48), "gzip"),
            "segment_ids": ("|i1", (count, 48), "gzip"),
            "masked_lm_positions": ("<i4", (count, 7), "gzip"),
            "masked_lm_ids": ("<i4", (count, 7), "gzip"),
            "next_sentence_labels": ("|i1", (count,), "gzip"),
        }


def test_prepared_shards_can_be_loaded_and_restore_the_text(text: Path, vocab: Path, tmp_path: Path) -> None:
    job = Job(recipe=JOB.recipe, shards=2, test_shards=1)
    rows = [shard.rows for shard in prepare([text], tmp_path / "out", job, vocab=vocab, console=QUIET)]
    splits = datasets.load(
        "wiki", kind="tokens", data_dir=tmp_path / "out", vocab_size=6 + len(WORDS), sequence_length=48
    )
    assert splits.val is not None and [splits.train.size, splits.val.size] == [sum(rows[:2]), rows[2]]
    tokens = (tmp_path / "out" / "vocab.txt").read_text().splitlines()
    plain = " ".join(text.read_text().lower().replace(".", " .").split())
    for index in range(0, splits.train.size, 7):
        ids, segments, used = splits.train.inputs[index]
        labels, _ = splits.train.targets[index]
        whole = torch.where(labels != IGNORE, labels, ids)
        first = whole[(segments == 0) & (used == 1)][1:-1]
        second = whole[segments == 1][:-1]
        for half in (first, second):
            assert " ".join(tokens[token] for token in half.tolist()) in plain
        assert int(used.sum()) == len(first) + len(second) + 3


def test_the_shards_do_not_depend_on_the_number_of_processes(text: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        prepare([text], tmp_path / f"{processes}", JOB, train_vocab=80, processes=processes, console=QUIET)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_another_seed_gives_other_shards_from_the_same_vocabulary(text: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        job = Job(recipe=JOB.recipe, shards=2, seed=seed)
        prepare([text], tmp_path / f"{seed}", job, train_vocab=80, console=QUIET)
    first, second = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert [name for name in first if first[name] == second[name]] == ["vocab.txt"]


def test_nothing_but_shards_and_vocabulary_is_left_behind(text: Path, vocab: Path, tmp_path: Path) -> None:
    prepare([text], tmp_path / "out", JOB, vocab=vocab, console=QUIET)
    prepare([text], tmp_path / "out", JOB, vocab=vocab, console=QUIET)  # over its own shards
    assert all(name == "vocab.txt" or name.startswith("wikicorpus_en_") for name in digests(tmp_path / "out"))


def test_shards_of_a_larger_run_are_not_left_among_the_new_ones(text: Path, vocab: Path, tmp_path: Path) -> None:
    prepare([text], tmp_path / "out", JOB, vocab=vocab, console=QUIET)
    with pytest.raises(UserError, match=r"wikicorpus_en_training_2\.hdf5 is of another run"):
        prepare([text], tmp_path / "out", Job(recipe=JOB.recipe, shards=2), vocab=vocab, console=QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "13"], r"24 articles cannot fill 13 shards, .* give more text \(.*\), or --shards 12 or fewer"),
        (["--shards", "0"], "--shards is 0; give 1 or more"),
        (["--seq-length", "4"], "--seq-length is 4; give 8 or more"),
        (["--max-predictions", "0"], "--max-predictions is 0"),
        (["--dup-factor", "0"], "--dup-factor is 0"),
        (["--masked-lm-prob", "1.5"], "--masked-lm-prob is 1.5; give a share from 0 to 1"),
        (["--processes", "0"], "--processes is 0"),
        (["--train-vocab", "100"], "no vocabulary, or two"),
        (["--vocab", "nowhere.txt"], "nowhere.txt: not a readable vocabulary"),
        (["--input", "nowhere.txt"], "--input: no file nowhere.txt"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    text: Path,
    vocab: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given_arguments = ["--input", str(text), "--output", str(tmp_path / "out"), "--vocab", str(vocab)]
    assert main([*given_arguments, "--processes", "1", *arguments]) == 2
    assert re.fullmatch(f"error: {message}.*", capsys.readouterr().err.splitlines()[-1])


def test_text_without_blank_lines_is_told_how_articles_are_told_apart(vocab: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The cat.\nThe dog.\n")
    with pytest.raises(
        UserError, match=r"^1 article cannot fill 1 shard, .*a blank line stands between two articles\)$"
    ):
        prepare([tmp_path / "one.txt"], tmp_path / "out", Job(recipe=JOB.recipe, shards=1), vocab=vocab, console=QUIET)


def test_what_the_text_loses_on_its_way_is_counted_and_told(vocab: Path, tmp_path: Path) -> None:
    """Of ten words in a sentence one is unknown; sentences of 110 tokens do not fit into a sequence of 48."""
    long = " ".join([*WORDS[:9], "zebra"] * 11)
    (tmp_path / "text.txt").write_text("\n\n".join([long] * 4))
    job = Job(recipe=JOB.recipe, shards=1, dup_factor=1)
    for way, cut in (("cut", (110 - 45) / 110), ("split", 0.0)):
        job = replace(job, long_sentences=way)
        (written,) = prepare([tmp_path / "text.txt"], tmp_path / way, job, vocab=vocab, console=QUIET)
        assert written.unknown / written.tokens == pytest.approx(0.1)
        assert written.cut / written.tokens == pytest.approx(cut)
        lines = losses([written], trained=False)
        assert lines[0] == f"10.00% of the tokens are [UNK], {cut:.2%} of the text stands in no sequence, cut off"
        assert ["--long-sentences split" in line for line in lines[1:]] == [False, True][: len(lines) - 1]
        assert "a vocabulary made for this text" in lines[1]


def test_a_full_disk_is_one_line_with_the_room_that_is_left(
    text: Path, vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    arguments = ["--input", str(text), "--output", str(tmp_path / "out"), "--vocab", str(vocab), "--processes", "1"]
    arguments += ["--shards", "2"]
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: --output {tmp_path}/out: the disk is full \([\d.]+ MB free\); make room.*", last)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vocab.txt"]


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    run = [sys.executable, str(ROOT / "datasets" / "prepare_wiki.py"), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and "--train-vocab SIZE" in shown.stdout, shown.stderr


def test_text_that_is_not_utf8_is_named_with_its_line(vocab: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Good.\n\nBad: é.\n".encode("latin1"))
    with pytest.raises(UserError, match=f"{path}, line 3: not UTF-8"):
        prepare([path], tmp_path / "out", JOB, vocab=vocab, console=QUIET)
    assert not list((tmp_path / "out").iterdir())


def test_an_error_in_a_process_is_its_own_line(vocab: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["The cat."] * 2 + ["\u200d"] * 2))  # nothing is left of the last two articles
    job = Job(recipe=JOB.recipe, shards=2)
    with pytest.raises(
        UserError, match=r"wikicorpus_en_training_\d\.hdf5: 1 articles with words in them, 2 are needed"
    ):
        prepare([path], tmp_path / "out", job, vocab=vocab, processes=2, console=QUIET)


def test_real_text_through_the_command_line(tmp_path: Path) -> None:
    source = shared_data("wiki") / "wiki.test.raw"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:400]
    (tmp_path / "part.raw").write_text("".join(lines), encoding="utf-8")
    arguments = ["--input", str(tmp_path / "part.raw"), "--output", str(tmp_path / "out"), "--train-vocab", "2000"]
    run = subprocess.run(
        [sys.executable, "-m", "datasets.prepare_wiki", *arguments, "--shards", "2", "--processes", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert "writing shards" in run.stderr and "in 2 shards in" in run.stdout
    train = datasets.load("wiki", kind="tokens", data_dir=tmp_path / "out", vocab_size=2000).train
    masked = np.mean([int((train.targets[i][0] != IGNORE).sum()) for i in range(train.size)])
    length = np.mean([int(train.inputs[i][2].sum()) for i in range(train.size)])
    not_next = np.mean([int(train.targets[i][1]) for i in range(train.size)])
    assert 0.13 < masked / length < 0.16 and 0.35 < not_next < 0.75
