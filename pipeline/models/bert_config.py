"""The shape of a BERT: bert-base, bert-large, or a JSON config in transformers' form, checked key by key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.core.outside import parse_json
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BertShape:
    """What transformers' BertConfig calls by the same names; the defaults are bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise UserError(f"BERT config: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"BERT config: {name} is {getattr(self, name)}; it must be 0 <= p < 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"BERT config: hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads; change hidden_size or num_attention_heads"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(
                f"BERT config: pad_token_id {self.pad_token_id} is outside a vocabulary of {self.vocab_size}"
            )


POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
)
NAMED = {
    "bert-base": BertShape(),
    "bert-large": BertShape(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
# Keys of published config.json files that change nothing here ...
IGNORED = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "classifier_dropout",
    "directionality",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# ... and those that must have the one value that is built.
FIXED: dict[str, Any] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def read_shape(spec: str) -> BertShape:
    """bert-base, bert-large, a path of a JSON file, or JSON itself; UserError in one line for anything else.

    >>> read_shape('{"num_hidden_layers": 4}').num_hidden_layers
    4
    """
    if spec in NAMED:
        return NAMED[spec]
    inline = spec.lstrip().startswith("{")
    where = "the inline BERT config" if inline else spec
    try:
        config = parse_json(spec if inline else Path(spec).read_bytes())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read BERT config {spec!r} ({reason}); give {_CHOICES}") from error
    except ValueError as error:
        raise UserError(f"{where} is {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} holds a {type(config).__name__}, not a JSON object of keys and values")
    return _shape_of(config, where)


KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, type(None)),
}
CONVERT: dict[str, Callable[[Any], Any]] = {"float": float}
_CHOICES = f"{', '.join(NAMED)}, the path of a JSON file, or JSON in braces"


def _shape_of(config: Mapping[str, Any], where: str) -> BertShape:
    kinds = {field.name: str(field.type) for field in fields(BertShape)}
    unknown = sorted(set(config) - set(kinds) - IGNORED - set(FIXED))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(kinds))}")
    for key, value in FIXED.items():
        if key in config and config[key] != value:
            raise UserError(f"{where}: {key} is {config[key]!r}; only {value!r} can be built")
    return BertShape(**{key: _checked(key, config[key], kind, where) for key, kind in kinds.items() if key in config})


def _checked(key: str, value: Any, kind: str, where: str) -> Any:
    """The value, if it is of this kind; whole numbers pass as floats, but true and false never as numbers."""
    if isinstance(value, bool) or not isinstance(value, KINDS[kind]):
        raise UserError(f"{where}: {key} is {json.dumps(value)}; it must be of type {kind}")
    return CONVERT.get(kind, _as_given)(value)


def _as_given(value: Any) -> Any:
    return value
