"""BERT for pre-training (Devlin et al. 2018, arXiv:1810.04805) as a list of transformers' own modules.

    embeddings            (input_ids, segment_ids, input_mask) -> (hidden, mask)
    layer.0 .. layer.n    (hidden, mask) -> (hidden, mask)
    head                  (hidden, mask) -> (prediction scores, next-sentence scores)

    input_ids, segment_ids, input_mask (batch, seq) integers      hidden (batch, seq, width)
    mask (batch, seq) bool, True where a token may be looked at: one byte per token travels between stages

Names are transformers': the gathered weights load `strict=True` into BertForPreTraining, and back.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.models.bert import modeling_bert

from pipeline.errors import UserError
from pipeline.models.bert_config import BertShape
from pipeline.models.layered import Block, LayeredModel, Tensors, as_tuple

theirs: Any = modeling_bert  # typed in part only, and differently from version to version

TIES = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
ATTENTION = ("sdpa", "eager")
FREE = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "pad_token_id")  # of given weights


def bert(
    name: str, shape: BertShape, *, seq_length: int = 128, tied: bool = True, attention: str = "sdpa"
) -> LayeredModel:
    """BERT of this shape for sequences of at most seq_length tokens.

    tied: the decoder borrows the word embeddings, as in the paper and in BertForPreTraining's default.
    attention: "sdpa" (torch's fused kernels) or "eager" (plain matrix products).
    """
    if seq_length > shape.max_position_embeddings:
        raise UserError(
            f"{name} has positions for {shape.max_position_embeddings} tokens, not {seq_length}; "
            f"give shorter sequences or raise max_position_embeddings"
        )
    if shape.hidden_act not in ACT2FN:
        raise UserError(f"unknown hidden_act {shape.hidden_act!r}; choose from {sorted(ACT2FN)}")
    if attention not in ATTENTION:
        raise UserError(f"unknown attention {attention!r}; choose from {list(ATTENTION)}")
    config = transformers_config(shape, tied=tied, attention=attention)
    return LayeredModel(
        name,
        _blocks(config),
        stem=1,
        head=1,
        sample=partial(_sample, shape, seq_length),
        reference_cut=reference_cut(shape.num_hidden_layers),
        ties=TIES if tied else {},
        config={"model_type": "bert"} | {name: value for name, value in asdict(shape).items() if name not in FREE},
    )


def transformers_config(shape: BertShape, *, tied: bool = True, attention: str = "sdpa") -> Any:
    """The same shape as transformers' BertConfig, to build BertForPreTraining from."""
    options: dict[str, Any] = asdict(shape) | {"tie_word_embeddings": tied, "attn_implementation": attention}
    return BertConfig(**options)


def reference_cut(num_layers: int) -> tuple[int, ...] | None:
    """2/4/4/2 of 12 layers, and the like where they divide by six: the end stages also hold the vocabulary.

    >>> reference_cut(24)
    (4, 8, 8, 4)
    """
    sixth, rest = divmod(num_layers, 6)
    return None if rest or not sixth else (sixth, 2 * sixth, 2 * sixth, sixth)


def _blocks(config: Any) -> tuple[Block, ...]:
    layers = [
        Block(f"layer.{i}", f"bert.encoder.layer.{i}.", partial(_build, Layer, config))
        for i in range(config.num_hidden_layers)
    ]
    embeddings = Block("embeddings", "bert.embeddings.", partial(_build, Embeddings, config))
    return (embeddings, *layers, Block("head", "", partial(_build, Head, config)))


class Embeddings(theirs.BertEmbeddings):  # type: ignore[misc]
    """Word + position + segment embeddings, and the mask that the layers need."""

    def forward(self, input_ids: Tensor, segment_ids: Tensor, input_mask: Tensor) -> Tensors:
        hidden = super().forward(input_ids=input_ids, token_type_ids=segment_ids)
        return hidden, input_mask.bool()


class Layer(theirs.BertLayer):  # type: ignore[misc]
    """One transformer layer, which hands the mask on to the next."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spread = SPREAD[config._attn_implementation]

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensors:
        result = super().forward(hidden, attention_mask=self.spread(mask, hidden.dtype))
        return as_tuple(result)[0], mask  # a tuple in transformers 4, a tensor in 5


def _boolean_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seq) -> (batch, 1, 1, seq), the same for every head and query."""
    return mask[:, None, None, :]


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seq) -> (batch, 1, 1, seq): 0 where a token may be looked at, else the most negative number."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)[:, None, None, :]


SPREAD = {"sdpa": _boolean_mask, "eager": _additive_mask}


class Pooled(nn.Module):
    """Holds the pooler under the name it has in transformers, bert.pooler."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.pooler = theirs.BertPooler(config)


class Head(nn.Module):
    """Pooler, masked-token scores (batch, seq, vocab) and next-sentence scores (batch, 2)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = Pooled(config)
        self.cls = theirs.BertPreTrainingHeads(config)
        # One bias under transformers' two names for it; predictions.bias itself takes no part in its forward.
        self.cls.predictions.bias = self.cls.predictions.decoder.bias

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensors:
        scores, sentence = self.cls(hidden, self.bert.pooler(hidden))
        return scores, sentence


def _build(kind: type[nn.Module], config: Any) -> nn.Module:
    return initialise(kind(config), std=config.initializer_range)


def initialise(module: nn.Module, *, std: float) -> nn.Module:
    """BERT's initialisation: normal weights and embeddings (padding 0), zero biases, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if part.padding_idx is not None:
                nn.init.zeros_(part.weight[part.padding_idx])
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module


def _sample(shape: BertShape, seq_length: int, batch: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    size = (batch, seq_length)
    ids = torch.randint(0, shape.vocab_size, size, generator=generator)
    segments = torch.randint(0, shape.type_vocab_size, size, generator=generator)
    return ids, segments, torch.ones(size, dtype=torch.int64)
