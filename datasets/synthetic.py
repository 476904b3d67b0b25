"""Made-up images and made-up token sequences, each computed from its number when it is asked for.

Both can be learnt, so that a falling loss means something. An image is noise over the coarse pattern of its
class. A token sequence counts upwards in two runs; the second is "next" when it takes up where the first ended:

    [CLS] 7 8 9 10 11 [SEP] 12 13 14 15 [SEP]   next, label 0        (with a seventh of the tokens masked)
    [CLS] 7 8 9 10 11 [SEP] 40 41 42 43 [SEP]   not next, label 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.base import Labels, Options, Split, Splits, epoch_and_index, generator_for
from pipeline.data.loader import Key
from pipeline.errors import UserError

IGNORE = -1  # the label of a token that is not to be predicted, as in datasets/wiki.py
PAD, UNK, CLS, SEP, MASK, FIRST_WORD = range(6)
_TRAIN, _VAL = 0, 1


def load_images(options: Options) -> Splits:
    """(3, image_size, image_size) images, 32 unless asked otherwise, of 10 classes; 10000, and 1000 for val."""
    samples = options.samples or 10_000
    val = _images(options, _VAL, max(1, samples // 10)) if options.validation else None
    return Splits(_images(options, _TRAIN, samples), val)


def load_tokens(options: Options) -> Splits:
    """Masked token sequences of 128 out of a vocabulary of 30522; 10000, and 1000 for val."""
    samples = options.samples or 10_000
    val = _tokens(options, _VAL, max(1, samples // 10)) if options.validation else None
    return Splits(_tokens(options, _TRAIN, samples), val)


def _images(options: Options, part: int, size: int) -> Split:
    classes = options.num_classes or 10
    labels = torch.randint(classes, (size,), generator=generator_for(options.seed, part))
    images = NoisyPatterns(labels, options.image_size or 32, options.seed, part)
    return Split(inputs=images, targets=Labels(labels), size=size, num_classes=classes)


@dataclass(frozen=True, eq=False)
class NoisyPatterns:
    """Image i is the enlarged 4x4 pattern of class labels[i] plus as much noise: about mean 0, variance 1."""

    labels: Tensor  # (size,)
    image_size: int
    seed: int
    part: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        _, index = epoch_and_index(key)
        label = int(self.labels[index])
        pattern = torch.randn(3, 4, 4, generator=generator_for(self.seed, label))
        at = torch.arange(self.image_size) * 4 // self.image_size
        noise = generator_for(self.seed, 1 + self.part, index)
        image = torch.randn(3, self.image_size, self.image_size, generator=noise)
        return (image.add_(pattern[:, at][:, :, at]).mul_(0.5**0.5),)


def _tokens(options: Options, part: int, size: int) -> Split:
    sequences = CountingSequences(size, options.sequence_length or 128, options.vocab_size or 30522, options.seed, part)
    return Split(
        inputs=TokenInputs(sequences),
        targets=TokenTargets(sequences),
        size=size,
        vocab_size=sequences.vocab_size,
        sequence_length=sequences.length,
    )


@dataclass(frozen=True)
class CountingSequences:
    """Sequence i before masking, and where it is masked."""

    size: int
    length: int
    vocab_size: int
    seed: int
    part: int

    def __post_init__(self) -> None:
        if self.length < 8 or self.vocab_size < FIRST_WORD + 8:
            raise UserError(
                f"made-up sequences of {self.length} tokens out of {self.vocab_size}; "
                f"give 8 or more tokens out of a vocabulary of {FIRST_WORD + 8} or more"
            )

    def draw(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        """(tokens (length,), masked (length,) bool, position of the first [SEP], next sentence label)."""
        generator = generator_for(self.seed, 1 + self.part, index)
        words, middle = self.vocab_size - FIRST_WORD, self.length // 2
        first, jump = torch.randint(words, (2,), generator=generator).tolist()
        not_next = int(torch.randint(2, (), generator=generator))
        counted = first + torch.arange(self.length)
        counted[middle + 1 :] += jump * not_next - 1
        tokens = counted % words + FIRST_WORD
        tokens[0], tokens[middle], tokens[-1] = CLS, SEP, SEP
        masked = (torch.rand(self.length, generator=generator) < 0.15) & (tokens >= FIRST_WORD)
        masked[1] |= not masked.any()
        return tokens, masked, middle, not_next


@dataclass(frozen=True)
class TokenInputs:
    """(input_ids, segment_ids, input_mask), each (length,) int64."""

    sequences: CountingSequences

    def __len__(self) -> int:
        return self.sequences.size

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        tokens, masked, middle, _ = self.sequences.draw(epoch_and_index(key)[1])
        segments = (torch.arange(len(tokens)) > middle).long()
        return tokens.masked_fill(masked, MASK), segments, torch.ones_like(tokens)


@dataclass(frozen=True)
class TokenTargets:
    """(labels (length,) int64 with -1 where nothing is masked, next sentence label () int64)."""

    sequences: CountingSequences

    def __len__(self) -> int:
        return self.sequences.size

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        tokens, masked, _, not_next = self.sequences.draw(epoch_and_index(key)[1])
        return tokens.masked_fill(~masked, IGNORE), torch.tensor(not_next)
