"""Copies of train_resnet.py go on working: what they import by an older name is the very same thing."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("older", "name", "home"),
    [
        ("pipeline.emulated_task", "make_emulated", "pipeline.train.emulated"),
        ("pipeline.job", "deadline", "pipeline.train.run"),
        ("pipeline.job", "say_on_rank_zero", "pipeline.train.run"),
        ("pipeline.job", "train", "pipeline.train.run"),
        ("pipeline.job", "use_threads", "pipeline.train.run"),
        ("pipeline.training", "AMP", "pipeline.train.plan"),
        ("pipeline.training", "EVEN", "pipeline.train.plan"),
        ("pipeline.training", "Pace", "pipeline.train.plan"),
        ("pipeline.training", "RunPlan", "pipeline.train.plan"),
        ("pipeline.training", "Split", "pipeline.train.plan"),
        ("pipeline.training", "Task", "pipeline.train.plan"),
        ("pipeline.training", "Trainer", "pipeline.train.trainer"),
        ("pipeline.training", "data_plan", "pipeline.train.plan"),
        ("pipeline.training", "plan_run", "pipeline.train.plan"),
        ("pipeline.world", "join_world", "pipeline.cluster.world"),
        ("pipeline.world", "report_failures", "pipeline.cluster.world"),
        ("pipeline.world", "World", "pipeline.cluster.world"),
    ],
)
def test_under_an_older_name_is_the_very_same_thing(older: str, name: str, home: str) -> None:
    assert getattr(import_module(older), name) is getattr(import_module(home), name)


def test_a_script_may_import_by_older_names_alone() -> None:
    from pipeline.training import Task, Trainer, plan_run

    assert Task.__module__ == plan_run.__module__ == "pipeline.train.plan"
    assert Trainer.__module__ == "pipeline.train.trainer"


def test_a_module_that_moved_whole_is_one_module() -> None:
    for older, home in (("job", "train.run"), ("world", "cluster.world"), ("emulated_task", "train.emulated")):
        assert import_module(f"pipeline.{older}") is import_module(f"pipeline.{home}")


def test_what_never_was_there_is_told() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pipeline\.attic"):
        import_module("pipeline.attic")
