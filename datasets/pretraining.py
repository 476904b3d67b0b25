"""BERT's pre-training samples out of tokenised articles: pairs of sentence runs, with words masked out.

    [CLS] a a a a [SEP] b b b [SEP]        half of the time b follows a, otherwise it comes from another article

(Devlin et al., BERT, 2018, section 3.1 and appendix A.1; parameters as in NVIDIA's create_pretraining_data.py.)
All randomness comes from the `random.Random` given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

Sentence = list[int]  # token ids
Article = list[Sentence]

MASK_SHARE, KEEP_SHARE = 0.8, 0.1  # of the chosen words; the rest become random words


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that are no words, and all others."""

    cls: int
    sep: int
    mask: int
    words: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long samples are and how much of them is masked."""

    sequence_length: int = 128
    max_predictions: int = 20
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1


@dataclass(frozen=True)
class Sample:
    """One row of a shard before padding; `masked_ids` are the words that stood at `positions`, in rising order."""

    ids: list[int]
    first_length: int  # tokens up to the first [SEP], it included: segment 0
    positions: list[int]
    masked_ids: list[int]
    not_next: bool


def samples_of(
    number: int, articles: Sequence[Article], *, recipe: Recipe, special: Special, random: Random
) -> Iterator[Sample]:
    """The samples of article `number`; their random second halves come from the other articles."""
    for first, second, not_next in pairs_of(number, articles, recipe=recipe, random=random):
        truncate(first, second, recipe.sequence_length - 3, random)
        ids = [special.cls, *first, special.sep, *second, special.sep]
        positions, masked_ids = mask(ids, recipe=recipe, special=special, random=random)
        yield Sample(ids, len(first) + 2, positions, masked_ids, not_next)


def pairs_of(
    number: int, articles: Sequence[Article], *, recipe: Recipe, random: Random
) -> Iterator[tuple[Sentence, Sentence, bool]]:
    """(first half, second half, second is not next); together about a sequence long, now and then much shorter."""
    article = articles[number]
    room = recipe.sequence_length - 3
    target = random.randint(2, room) if random.random() < recipe.short_seq_prob else room
    start = 0
    while start < len(article):
        stop = _run(article, start, target)
        cut = start + (random.randint(1, stop - start - 1) if stop - start > 1 else 1)
        first = _joined(article[start:cut])
        if cut == stop or random.random() < 0.5:
            yield first, _from_elsewhere(number, articles, target - len(first), random), True
            start = cut  # what was set aside for the second half is used later
        else:
            yield first, _joined(article[cut:stop]), False
            start = stop


def _run(article: Article, start: int, target: int) -> int:
    """The end of the shortest run of sentences from `start` with `target` tokens, or the end of the article."""
    tokens = 0
    for stop in range(start, len(article)):
        tokens += len(article[stop])
        if tokens >= target:
            return stop + 1
    return len(article)


def _from_elsewhere(number: int, articles: Sequence[Article], length: int, random: Random) -> Sentence:
    """About `length` tokens, one sentence at least, from a random place in another article."""
    other = random.randrange(len(articles) - 1)
    article = articles[other + (other >= number)]
    start = random.randrange(len(article))
    return _joined(article[start : _run(article, start, length)])


def _joined(sentences: Article) -> Sentence:
    return [token for sentence in sentences for token in sentence]


def truncate(first: Sentence, second: Sentence, room: int, random: Random) -> None:
    """Drops tokens at either end of the longer one, in place, until both fit into `room`."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if random.random() < 0.5 else -1)


def mask(ids: list[int], *, recipe: Recipe, special: Special, random: Random) -> tuple[list[int], list[int]]:
    """Masks words of `ids` in place; (positions in rising order, the words that stood there).

    Of the words chosen 80 % become [MASK], 10 % another word, 10 % stay.
    """
    candidates = [place for place, token in enumerate(ids) if token not in (special.cls, special.sep)]
    wanted = max(1, round(len(ids) * recipe.masked_lm_prob))
    positions = sorted(random.sample(candidates, min(recipe.max_predictions, wanted, len(candidates))))
    originals = [ids[place] for place in positions]
    for place in positions:
        draw = random.random()
        if draw < MASK_SHARE:
            ids[place] = special.mask
        elif draw >= MASK_SHARE + KEEP_SHARE:
            ids[place] = random.choice(special.words)
    return positions, originals
