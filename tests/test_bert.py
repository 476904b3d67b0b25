"""BERT as a list of blocks: the numbers, names and gradients of transformers' BertForPreTraining."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForPreTraining

from pipeline.errors import UserError
from pipeline.models import (
    LayeredModel,
    as_tuple,
    build_blocks,
    build_whole,
    full_state,
    load_full_state,
    make_model,
    named_parameters,
)
from pipeline.models.bert import TIES, reference_cut, transformers_config
from pipeline.models.bert_config import NAMED, BertShape, read_shape

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
TINY = json.dumps(SIZES)
NO_DROPOUT = json.dumps(SIZES | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0.0})


def tiny(config: str = TINY, **options) -> LayeredModel:
    return make_model("bert", config=config, seq_length=10, **options)


def transformers_model(config: str, *, tied: bool = True, attention: str = "sdpa") -> nn.Module:
    return BertForPreTraining(transformers_config(read_shape(config), tied=tied, attention=attention))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, of which the second has five tokens of padding."""
    ids, segments, mask = tiny().sample(2)
    mask[1, 5:] = 0
    return ids, segments, mask


def run_transformers(model: nn.Module, ids: Tensor, segments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    result = model(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    return result.prediction_logits, result.seq_relationship_logits


@pytest.mark.parametrize("tied", [True, False])
def test_gathered_weights_load_strictly_into_transformers_and_back(tied):
    model, reference = tiny(tied=tied), transformers_model(TINY, tied=tied)
    state = full_state(model, list(build_whole(model, 0).links))
    reference.load_state_dict(state, strict=True)
    loaded = reference.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    other = build_blocks(model, 0, 4, 1)
    load_full_state(model, other, loaded)
    assert all(torch.equal(full_state(model, other)[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chained_blocks_equal_transformers_in_eval_with_padding(attention):
    model, reference = tiny(attention=attention), transformers_model(TINY, attention=attention)
    whole = build_whole(model, 0)
    reference.load_state_dict(full_state(model, list(whole.links)))
    ours, theirs = whole.eval()(*batch()), run_transformers(reference.eval(), *batch())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_in_training_equal_those_of_transformers(tied):
    model, reference = tiny(NO_DROPOUT, tied=tied), transformers_model(NO_DROPOUT, tied=tied)
    whole = build_whole(model, 0)
    reference.load_state_dict(full_state(model, list(whole.links)))
    for outputs in (whole.train()(*batch()), run_transformers(reference.train(), *batch())):
        sum(output.square().sum() for output in outputs).backward()
    ours = {name: p.grad for name, p in named_parameters(model, list(whole.links))}
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    theirs = {name.replace("predictions.decoder.bias", "predictions.bias"): g for name, g in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_draws_the_same_numbers_as_transformers_from_the_default_generator():
    model, reference = tiny(attention="eager"), transformers_model(TINY, attention="eager")
    whole = build_whole(model, 0)
    reference.load_state_dict(full_state(model, list(whole.links)))
    torch.manual_seed(3)
    ours = whole.train()(*batch())
    torch.manual_seed(3)
    theirs = run_transformers(reference.train(), *batch())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_every_parameter_gets_a_gradient_and_they_are_as_many_as_transformers_has():
    model = tiny()
    whole = build_whole(model, 0)
    sum(output.sum() for output in whole(*batch())).backward()
    parameters = dict(named_parameters(model, list(whole.links)))
    assert all(p.grad is not None for p in parameters.values())
    reference = transformers_model(TINY)
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in reference.parameters())


def test_the_decoder_is_tied_to_the_word_embeddings_unless_untied():
    tied, untied = tiny(), tiny(tied=False)
    assert (dict(tied.ties), dict(untied.ties)) == (TIES, {})
    borrower = dict(named_parameters(tied, build_blocks(tied, 0, 4, 0)))["cls.predictions.decoder.weight"]
    owner = dict(named_parameters(tied, build_blocks(tied, 0, 1, 0)))["bert.embeddings.word_embeddings.weight"]
    assert borrower.shape == owner.shape


def test_a_byte_per_token_travels_beside_the_hidden_states():
    model = tiny()
    hidden, mask = build_blocks(model, 0, 1, 0)[0](*batch())
    assert (hidden.shape, mask.shape, mask.dtype) == ((2, 10, 16), (2, 10), torch.bool)
    assert as_tuple(build_blocks(model, 1, 2, 0)[0](hidden, mask))[1] is mask


def test_initialisation_follows_transformers():
    shape = json.dumps(SIZES | {"vocab_size": 400, "hidden_size": 64})
    model, reference = tiny(shape), transformers_model(shape).state_dict()
    state = full_state(model, build_blocks(model, 0, 4, 0))
    for name, tensor in reference.items():
        assert float(state[name].std()) == pytest.approx(float(tensor.std()), rel=0.2, abs=1e-6), name
        assert float(state[name].mean()) == pytest.approx(float(tensor.mean()), abs=5e-3), name
    assert not state["bert.embeddings.word_embeddings.weight"][0].any()  # the padding token


def test_reference_cuts_put_fewer_layers_beside_the_vocabulary():
    assert (reference_cut(12), reference_cut(24), reference_cut(4)) == ((2, 4, 4, 2), (4, 8, 8, 4), None)


def test_bert_base_and_large_have_the_published_number_of_parameters():
    for name, millions in [("bert-base", 110), ("bert-large", 336)]:
        model = make_model(name)
        with torch.device("meta"):
            modules = [block.build() for block in model.blocks]
        state = dict(named_parameters(model, modules))
        del state["cls.predictions.decoder.weight"]  # borrowed
        assert sum(p.numel() for p in state.values()) // 10**6 == millions
        assert model.reference_cut is not None


def test_a_config_is_read_from_a_file_with_the_keys_that_published_ones_have(tmp_path):
    path = tmp_path / "config.json"
    extra = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "position_embedding_type": "absolute"}
    path.write_text(json.dumps(SIZES | extra))
    assert read_shape(str(path)) == read_shape(TINY) == BertShape(**SIZES)
    assert read_shape("bert-large") == NAMED["bert-large"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('{"hiden_size": 3}', "unknown key 'hiden_size'; known are attention_probs"),
        ('{"hidden_size": "3"}', 'hidden_size is "3"; it must be of type int'),
        ('{"hidden_size": true}', "hidden_size is true; it must be of type int"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers is 0; it must be above 0"),
        ('{"hidden_size": 10, "num_attention_heads": 3}', "hidden_size 10 does not divide into 3 heads"),
        ('{"hidden_dropout_prob": 1.5}', "hidden_dropout_prob is 1.5; it must be 0 <= p < 1"),
        ('{"hidden_act": "reluu"}', "unknown hidden_act 'reluu'; choose from"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'; only 'bert' can be built"),
        ('{"vocab_size": 5, "pad_token_id": 5}', "pad_token_id 5 is outside a vocabulary of 5"),
        ('{"vocab_size"', "the inline BERT config is not JSON"),
        ("no-such-file.json", "cannot read BERT config 'no-such-file.json' (No such file"),
        ('{"max_position_embeddings": 64}', "has positions for 64 tokens, not 128; give shorter"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(spec, message):
    with pytest.raises(UserError) as caught:
        make_model("bert", config=spec, seq_length=128)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_number_will_do_where_a_float_is_asked_for():
    shape = read_shape('{"layer_norm_eps": 1, "hidden_dropout_prob": 0}')
    assert (repr(shape.layer_norm_eps), repr(shape.hidden_dropout_prob)) == ("1.0", "0.0")


def test_an_unknown_attention_is_refused():
    with pytest.raises(UserError, match="unknown attention 'flash'; choose from"):
        tiny(attention="flash")
