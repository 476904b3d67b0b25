"""Resuming: a run that was interrupted ends where the uninterrupted one does, and what may change may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_jobs import final, heturun
from tiny import losses, run_here

from pipeline.errors import UserError

SYNCHRONISERS: dict[str, dict[str, Any]] = {
    "slowmo after initial steps": {"initial_steps": 4, "outer": "slowmo"},
    "diloco": {"outer": "diloco"},
}


@pytest.mark.parametrize("name", SYNCHRONISERS)
def test_local_sgd_goes_on_where_it_was_with_another_number_of_stages(tmp_path: Path, name: str) -> None:
    """Resumed at update 6 it repeats no warm start (4) and averages at 9 with the momentum of its outer steps."""
    options: dict[str, Any] = {"local_sgd": True, "local_steps": 3, "momentum": 0.0, **SYNCHRONISERS[name]}
    options |= {"task": {"train_size": 64}, "epochs": 4, "checkpoint_every": 6, "keep": 99, "validate_every": 0}
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
