"""Weights to start from: the logits are those of the model they came from, however the model is cut."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import run_here
from torch import Tensor
from torchvision.models import resnet18

from pipeline.errors import UserError
from pipeline.models import make_model
from pipeline.models.layered import LayeredModel
from pipeline.stage.build import make_stage
from pipeline.stage.stage import Stage
from pipeline.train.initial import open_source, take_initial
from pipeline.train.optim import make_optimizer

SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def stages_of(model: LayeredModel, counts: Sequence[int]) -> list[Stage]:
    optimizer = make_optimizer("sgd", learning_rate=0.1)
    return [make_stage(model, counts, stage, optimizer, seed=0, criterion=None) for stage in range(len(counts))]


def start(model: LayeredModel, counts: Sequence[int], path: Path, *, partial: bool = False) -> tuple[list[Stage], str]:
    """The stages of `model` with the weights of `path`, and what is said of them."""
    stages = stages_of(model, counts)
    lines = set()
    for stage in stages:
        live = stage.model_state() | stage.borrowed_state()
        lines.add(take_initial(live, model, open_source(path, model.config), partial=partial))
    (line,) = lines
    return stages, line


def logits(stages: Sequence[Stage], *inputs: Tensor) -> tuple[Tensor, ...]:
    for stage in stages:
        stage.train(False)
        inputs = stage.evaluate(inputs)
    return inputs


def torchvisions(classes: int = 10) -> torch.nn.Module:
    """A ResNet-18 of torchvision's whose statistics are not the initial ones."""
    torch.manual_seed(3)
    model = resnet18(num_classes=classes)
    model(torch.randn(8, 3, 64, 64))
    return model.eval()


def ours(classes: int = 10) -> LayeredModel:
    return make_model("resnet18", num_classes=classes, stem="imagenet", image_size=64)


def transformers_model(kind: str = "BertForPreTraining", **changes: Any) -> Any:
    import transformers

    torch.manual_seed(4)
    return getattr(transformers, kind)(transformers.BertConfig(**{**SHAPE, **changes})).eval()


def bert(**changes: Any) -> LayeredModel:
    tied = changes.pop("tied", True)
    return make_model("bert", config=json.dumps({**SHAPE, **changes}), seq_length=12, tied=tied)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, torch.randint(0, 2, (3, 12), generator=generator), mask


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "m.safetensors": lambda state, path: save_file(state, path),
    "m.pth": lambda state, path: torch.save(state, path),
    "wrapped.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "parallel.pt": lambda state, path: torch.save({f"module.{name}": t for name, t in state.items()}, path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("counts", [(10,), (3, 7), (2, 3, 3, 2)])
def test_a_resnet_of_torchvisions_gives_its_logits_in_any_number_of_stages(
    tmp_path: Path, name: str, counts: tuple[int, ...]
) -> None:
    source = torchvisions()
    WRITERS[name](source.state_dict(), tmp_path / name)
    stages, line = start(ours(), counts, tmp_path / name)
    assert line == f"initial weights from {tmp_path / name}: {len(source.state_dict())} tensors"
    with torch.no_grad():
        torch.testing.assert_close(logits(stages, IMAGES)[0], source(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("counts", [(4,), (1, 3), (1, 2, 1)])
def test_a_bert_of_transformers_gives_its_logits_with_its_tied_weight(
    tmp_path: Path, shard: str, counts: tuple[int, ...]
) -> None:
    source = transformers_model()
    source.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    stages, line = start(bert(), counts, tmp_path)
    assert "; " not in line, line
    ids, segments, mask = tokens()
    with torch.no_grad():
        theirs = source(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    words, sentences = logits(stages, ids, segments, mask)
    torch.testing.assert_close(words, theirs.prediction_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sentences, theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5)


def test_names_of_early_berts_are_known(tmp_path: Path) -> None:
    state = transformers_model().state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(old, tmp_path / "old.bin")
    stages, line = start(bert(), (4,), tmp_path / "old.bin")
    assert "; " not in line, line
    norm = stages[0].model_state()["model.bert.embeddings.LayerNorm.weight"]
    assert torch.equal(norm, state["bert.embeddings.LayerNorm.weight"])


def test_a_head_of_another_size_is_left_out_only_when_asked_and_named(tmp_path: Path) -> None:
    source = torchvisions(classes=7)
    path = tmp_path / "m.pth"
    torch.save(source.state_dict(), path)
    with pytest.raises(UserError, match=r"of another size: fc.weight, fc.bias; --init-partial leaves heads out$"):
        start(ours(), (3, 7), path)
    stages, line = start(ours(), (3, 7), path, partial=True)
    assert line.endswith("120 tensors; of a fresh head: fc.weight, fc.bias")
    state, fresh = stages[1].model_state(), stages_of(ours(), (3, 7))[1].model_state()
    assert torch.equal(state["model.fc.weight"], fresh["model.fc.weight"])
    assert torch.equal(state["model.layer4.0.conv1.weight"], source.state_dict()["layer4.0.conv1.weight"])


def test_missing_and_superfluous_names_are_named_in_one_line(tmp_path: Path) -> None:
    state = torchvisions().state_dict()
    del state["layer1.0.conv1.weight"], state["fc.bias"]
    state["classifier.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(UserError) as failed:
        start(ours(), (10,), tmp_path / "m.pth")
    said = str(failed.value)
    assert "missing: layer1.0.conv1.weight, fc.bias; superfluous: classifier.weight" in said and "\n" not in said
    with pytest.raises(UserError, match=r"missing: layer1.0.conv1.weight$"):
        start(ours(), (10,), tmp_path / "m.pth", partial=True)


def test_a_bert_for_another_task_starts_with_what_it_has(tmp_path: Path) -> None:
    source = transformers_model("BertForMaskedLM")
    source.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing: .*bert.pooler.dense.weight"):
        start(bert(), (1, 3), tmp_path)
    stages, line = start(bert(), (1, 3), tmp_path, partial=True)
    assert "of a fresh head: bert.pooler.dense.weight" in line
    ids, segments, mask = tokens()
    with torch.no_grad():
        theirs = source(input_ids=ids, token_type_ids=segments, attention_mask=mask).logits
    torch.testing.assert_close(logits(stages, ids, segments, mask)[0], theirs, rtol=1e-5, atol=1e-5)


def test_a_folder_of_another_configuration_is_refused_though_its_names_and_sizes_fit(tmp_path: Path) -> None:
    transformers_model(num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its config.json has num_attention_heads 4, this model 2; .*--bert-config"):
        start(bert(), (4,), tmp_path)


def test_a_model_that_ties_cannot_start_from_one_that_does_not(tmp_path: Path) -> None:
    source = transformers_model(tie_word_embeddings=False)
    torch.save(source.state_dict(), tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"cls.predictions.decoder.weight and .* differ, .*give --untied"):
        start(bert(), (1, 3), tmp_path / "m.bin")
    stages, _ = start(bert(tied=False), (1, 3), tmp_path / "m.bin")
    ids, segments, mask = tokens()
    with torch.no_grad():
        theirs = source(input_ids=ids, token_type_ids=segments, attention_mask=mask).prediction_logits
    torch.testing.assert_close(logits(stages, ids, segments, mask)[0], theirs, rtol=1e-5, atol=1e-5)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["bomb.pth", "text.pth", "text.safetensors", "empty.pth", "nowhere.pth", "folder"])
def test_what_cannot_be_read_is_one_line_and_nothing_in_it_is_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"w": Bomb()}))
    for text in ("text.pth", "text.safetensors"):
        (tmp_path / text).write_text("this is no state dict\n")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^--init .*{name}: ") as failed:
        open_source(tmp_path / name)
    assert "\n" not in str(failed.value) and not (tmp_path / "exploded").exists()


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "m.safetensors"
    run_here(tmp_path / "one", export=str(first))
    run_here(tmp_path / "two", init=str(first), learning_rate=1e-9, max_steps=1)
    before, after = (
        [row["loss"] for row in rows if row["event"] == "validation"][-1]
        for rows in (
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        )
    )
    assert after == pytest.approx(before, rel=1e-5)
    assert f"initial weights from {first}: 16 tensors" in capsys.readouterr().out
