"""Resuming: a run that was interrupted ends where the uninterrupted one does, and what may change may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_jobs import final, heturun
from tiny import losses, run_here

from pipeline.errors import UserError
from pipeline.settings import Settings, default_settings
from pipeline.train import checkpoint
from pipeline.train.resuming import NOTABLE, SAME, check_same, modern, table_as_markdown, what_must_stay

ROOT = Path(__file__).resolve().parent.parent

SYNCHRONISERS: dict[str, dict[str, Any]] = {
    "slowmo after initial steps": {"initial_steps": 4, "outer": "slowmo"},
    "diloco": {"outer": "diloco"},
}


@pytest.mark.parametrize("name", SYNCHRONISERS)
def test_local_sgd_goes_on_where_it_was_with_another_number_of_stages(tmp_path: Path, name: str) -> None:
    """Resumed at update 6 it repeats no warm start, averages at 9 with its momentum, and drops out other numbers."""
    options: dict[str, Any] = {"local_sgd": True, "local_steps": 3, "momentum": 0.0, **SYNCHRONISERS[name]}
    options |= {
        "task": {"train_size": 64, "dropout": 0.2},
        "epochs": 4,
        "checkpoint_every": 6,
        "keep": 99,
        "validate_every": 0,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    heturun(whole, "local_1x2", launcher="threads", checkpoint=str(whole / "ck"), **options)
    begun = str(whole / "ck" / "step-00000006")
    printed = heturun(
        resumed, "local_2x2", launcher="local", partition="4,4", checkpoint=str(resumed / "ck"), resume=begun, **options
    )
    assert "after 6 updates, with weights, the synchroniser's anchor" in printed and "left out" not in printed
    one, two = final(whole / "ck"), final(resumed / "ck")
    assert one.keys() == two.keys() and any(key.startswith("sync.") for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_with_another_optimizer_is_refused_in_one_line(tmp_path: Path) -> None:
    run_here(tmp_path, checkpoint=str(tmp_path / "ck"), max_steps=2)
    with pytest.raises(UserError, match=r"was written with --optimizer sgd, this run has adamw"):
        run_here(tmp_path, resume=str(tmp_path / "ck"), optimizer="adamw", max_steps=4)


def test_the_loss_scale_of_a_float16_run_stays_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "ck"), "keep": 9}
    run_here(tmp_path / "begun", amp="fp16", max_steps=3, **options)
    begun = str(tmp_path / "ck" / "step-00000003")
    for amp in ("bf16", "off"):
        capsys.readouterr()
        run_here(tmp_path / amp, amp=amp, max_steps=8, resume=begun)
        assert "left out: loss scale" in capsys.readouterr().out
        assert max(losses(tmp_path / amp)) < 3


def samples_of_epochs(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["samples"] for event in events if event["event"] == "train"]


def test_one_two_and_again_two_pipelines_share_a_run_and_every_sample_is_seen_once(tmp_path: Path) -> None:
    """44 samples: 16 by two pipelines with all-reduce, 8 by one alone, the rest by two that mix their weights."""
    kept = str(tmp_path / "ck")
    options: dict[str, Any] = {"checkpoint": kept, "keep": 99, "epochs": 2, "momentum": 0.0}
    alone: dict[str, Any] = {"pipeline": "dp", "microbatches": None, "lr_schedule": "constant", "learning_rate": 0.01}
    heturun(tmp_path / "one", "local_1x2", launcher="local", max_steps=1, **options)
    assert checkpoint.read_values(checkpoint.latest(kept))["position"] == {"epoch": 0, "samples": 16}
    run_here(tmp_path / "two", resume="", max_steps=2, **options, **alone)
    assert checkpoint.read_values(checkpoint.latest(kept))["position"] == {"epoch": 0, "samples": 24}
    local: dict[str, Any] = {"local_sgd": True, "local_steps": 2, "resume": ""}
    printed = heturun(tmp_path / "three", "local_1x2", launcher="threads", **local, **options)
    assert "after 2 updates" in printed
    assert samples_of_epochs(tmp_path / "three") == [44, 44]
    last = checkpoint.latest(kept)
    assert checkpoint.read_values(last)["position"] == {"epoch": 2, "samples": 0}
    assert checkpoint.read_values(last)["updates"] == 2 + 2 + 3, "of two pipelines: 20 and 44 samples"


def test_a_run_that_was_over_before_leaves_its_summary_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "ck"), "max_steps": 3}
    run_here(tmp_path, **options)
    before = (tmp_path / "out" / "summary.txt").read_text(), losses(tmp_path)
    capsys.readouterr()
    run_here(tmp_path, resume="", export=str(tmp_path / "m.safetensors"), **options)
    assert "over before, after 3 updates: nothing was trained" in capsys.readouterr().out
    assert ((tmp_path / "out" / "summary.txt").read_text(), losses(tmp_path)) == before
    assert (tmp_path / "m.safetensors").exists(), "what is asked for besides is done"


def test_the_table_of_what_may_change_stands_in_readme_and_names_options() -> None:
    assert table_as_markdown() in (ROOT / "README.md").read_text()
    fields = {field.name for field in dataclasses.fields(Settings)}
    changing = [name for names in NOTABLE for name in names]
    assert {*SAME, *changing} <= fields and not SAME.keys() & set(changing)


def test_an_option_given_with_its_default_is_as_if_it_were_not_given() -> None:
    bert = default_settings("bert")
    values = {"same": json.loads(json.dumps(what_must_stay(bert))), "samples": 44}
    given = dataclasses.replace(bert, bert_config='{"hidden_size": 768, "hidden_act": "gelu"}', microbatches=1)
    check_same(values, given, samples=44, folder="ck")
    with pytest.raises(UserError, match=r"with --bert-config bert-base's, this run has num_hidden_layers 2"):
        other = dataclasses.replace(bert, bert_config='{"num_hidden_layers": 2}')
        check_same(values, other, samples=44, folder="ck")


def test_every_option_may_change_but_those_of_the_table(tmp_path: Path) -> None:
    one = Settings()
    values = {"same": what_must_stay(one), "samples": 44}
    others: dict[str, Any] = {"epochs": 7, "pipeline": "gpipe", "microbatches": 8, "accumulate": 2, "amp": "bf16"}
    others |= {"learning_rate": 1.0, "momentum": 0.0, "lr_schedule": "poly", "preduce": True, "placement": "x"}
    check_same(values, dataclasses.replace(one, **others), samples=44, folder="ck")
    for name, other in {"batch_size": 4, "seed": 1, "dataset": "digits", "model": "resnet34"}.items():
        with pytest.raises(UserError, match=f"with --{name.replace('_', '-')} "):
            check_same(values, dataclasses.replace(one, **{name: other}), samples=44, folder="ck")


def test_a_checkpoint_of_the_first_form_is_understood() -> None:
    """It counted batches of its own pipelines, and kept a loss scale whatever the precision."""
    settings = dataclasses.replace(Settings(), batch_size=8, amp="fp16", pipeline="gpipe").to_values()
    old = {"settings": settings, "data": {"samples": 44, "pipelines": 2}, "batches": 4, "updates": 4}
    new = modern({**old, "skipped": 1, "scaler": [512.0, 7]})
    assert new["position"] == {"epoch": 1, "samples": 16} and new["samples"] == 44
    assert new["states"]["updates"] == {"made": 3, "skipped": 1}
    assert new["states"]["loss scale"] == {"scale": 512.0, "good_steps": 7}
    assert "loss scale" not in modern({**old, "settings": {**settings, "amp": "off"}, "scaler": [1.0, 0]})["states"]
