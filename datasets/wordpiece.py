"""WordPiece vocabularies: read one, train one, and cut sentences into ids with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000  # characters that are kept in any case, the most frequent ones, as in BERT's own vocabulary
COVERAGE = 0.9995  # of the text, by the characters that are kept; more of them than ALPHABET where it needs them
_WORDS_PER_LINE = 1000


def read_tokens(path: Path) -> list[str]:
    """The lines of a vocab.txt. A line ends at a line feed only: U+2028, U+0085 and their like can be tokens.

    Raises:
        UserError: no such file, or no text.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable vocabulary ({error}); give a vocab.txt, one token a line") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_vocabulary(path: Path) -> dict[str, int]:
    """The ids of a vocab.txt, one token a line.

    Raises:
        UserError: no such file, no text, a token missing that is needed, or one that stands there twice.
    """
    tokens = read_tokens(path)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in SPECIAL if token not in vocabulary]
    if missing:
        raise UserError(f"{path}: no {missing[0]} in it; a BERT vocabulary has {', '.join(SPECIAL)}")
    if len(vocabulary) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"{path}: {twice!r} stands there twice; every token needs one line of its own")
    return vocabulary


def tokenizer_for(vocabulary: dict[str, int], *, lowercase: bool) -> Tokenizer:
    """BERT's tokenizer: normalise, cut at white space and punctuation, longest pieces first."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def train_vocabulary(
    lines: Iterable[str], size: int, *, lowercase: bool, character_coverage: float = COVERAGE
) -> list[str]:
    """The tokens of a vocabulary of at most `size`, in the order of their ids; the same lines give the same one.

    The trainer numbers continuations (##a) in the random order of a hash map, and breaks ties by number. Given in a
    fixed order beforehand, they are not numbered again. It drops rare characters in random order, too: it is
    not given any.

    Raises:
        UserError: `size` does not hold the special tokens and the alphabet.
    """
    words = _count_words(lines, lowercase=lowercase)
    alphabet = _frequent_characters(words, coverage=character_coverage, room=size // 2)
    kept = {word: count for word, count in words.items() if alphabet.issuperset(word)}
    continuations = sorted({f"##{character}" for word in kept for character in word[1:]})
    least = len(SPECIAL) + len(continuations) + len({word[0] for word in kept})
    if size < least:
        raise UserError(f"a vocabulary of {size} does not hold the alphabet; give --train-vocab {least} or more")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *continuations], limit_alphabet=len(alphabet), show_progress=False
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_repeated(kept), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _count_words(lines: Iterable[str], *, lowercase: bool) -> Counter[str]:
    normalise = normalizers.BertNormalizer(lowercase=lowercase).normalize_str
    cut = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words: Counter[str] = Counter()
    for line in lines:
        words.update(word for word, _ in cut(normalise(line)))
    if not words:
        raise UserError("no words to train a vocabulary on; give text with --input")
    return words


def _frequent_characters(words: Counter[str], *, coverage: float, room: int) -> set[str]:
    """The most frequent characters: ALPHABET of them, then more up to that coverage, if their tokens fit in `room`."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    forms = Counter({*((word[0], "first") for word in words), *((c, "later") for word in words for c in word[1:])})
    kept: set[str] = set()
    covered, tokens = 0, 0
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        tokens += forms[character, "first"] + forms[character, "later"]
        if len(kept) >= ALPHABET and (covered >= coverage * counts.total() or tokens > room):
            break
        kept.add(character)
        covered += counts[character]
    return kept


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Every word as often as it was counted, in lines of bounded length."""
    for word, count in words.items():
        for done in range(0, count, _WORDS_PER_LINE):
            yield " ".join([word] * min(_WORDS_PER_LINE, count - done))
