"""Folders of checkpoints: whose is what is half written, which is the newest, and which the oldest of the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import Fenced, UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint_folder import Writer, checkpoints, find_latest, is_left_behind, next_number, run_of
from pipeline.train.description import HEAD_BYTES, Head, head

MINE = Writer("5f", run="aa", pipeline=0, generation=1, generations={0: 1, 1: 3})


def save(directory: Path, step: int, writer: Writer, *, keep: int = 3, **more: object) -> Path:
    tensors = {"model.w": torch.full((8,), float(step))}
    return checkpoint.save(directory, step, tensors=tensors, keep=keep, writer=lambda: writer, **{"values": {}, **more})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("mark", "gone"),
    [
        ("", True),  # of the first format, which held no lock
        ("77.p1.g0.", True),  # of another job, which holds the lock no more
        ("5f.p0.g0.", True),  # of this pipeline's earlier life
        ("5f.p0.g1.", False),
        ("5f.p1.g2.", True),  # of an earlier life of another pipeline
        ("5f.p1.g3.", False),  # it may be writing
        ("5f.p2.g0.", False),
    ],
)
def test_what_is_half_written_goes_when_its_writer_is_gone(mark: str, gone: bool) -> None:
    for name in (f".step-00000009.tmp-{mark}9a01", f".latest.tmp-{mark}9a01", f".step-00000009-2.tmp-{mark}9a01"):
        assert is_left_behind(name, MINE) == gone
    assert is_left_behind(".lock.tmp-9a01", MINE), "the file that tells the time"
    assert not is_left_behind("step-00000009", MINE) and not is_left_behind(".lock", MINE)


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    """Pipeline 1 saves while 0, which stood still in the middle of a save, still has its folder."""
    other = Writer("5f", run="aa", pipeline=1, generation=3, generations={0: 1})

    def meanwhile() -> None:
        assert save(tmp_path, 8, other).name == "step-00000008"

    assert save(tmp_path, 8, MINE, ask=meanwhile).name == "step-00000008-2"
    assert names(tmp_path) == ["latest", "step-00000008", "step-00000008-2"]


def test_a_fenced_writer_publishes_nothing_and_says_that_it_is_fenced(tmp_path: Path) -> None:
    """Others have declared it lost, and have removed what it had written: that is no failure of a disk."""
    other = Writer("5f", run="aa", pipeline=1, generation=3, generations={0: 2})

    def fenced() -> None:
        save(tmp_path, 9, other)
        raise Fenced("pipeline 0 was declared lost")

    for _ in range(2):
        with pytest.raises(Fenced, match="was declared lost"):
            save(tmp_path, 8, MINE, ask=fenced)
    assert names(tmp_path) == ["latest", "step-00000009", "step-00000009-2"]


def test_who_comes_late_does_not_point_back(tmp_path: Path) -> None:
    """Without a coordinator nobody can be asked: the last checkpoint of one that stood still is kept beside a newer."""
    save(tmp_path, 9, Writer("5f", run="aa", pipeline=1))
    save(tmp_path, 8, MINE)
    assert find_latest(tmp_path) == tmp_path / "step-00000009"
    save(tmp_path, 7, Writer("66", run="aa"))
    assert find_latest(tmp_path) == tmp_path / "step-00000007", "a job that resumed from an older one goes back"


def test_rotation_forgets_what_the_same_run_wrote_first(tmp_path: Path) -> None:
    """A run of 12 steps among the checkpoints of one of 30 steps keeps its own last ones, and touches no other."""
    for step in (10, 20, 30):
        save(tmp_path, step, Writer("5e", run="old"))
    for step in (3, 6, 9, 12):
        save(tmp_path, step, MINE, keep=2)
    assert names(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (9, 10, 12, 20, 30))]
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == tmp_path / "step-00000012", "the one that was written last"
    assert [run_of(path) for path in checkpoints(tmp_path)] == ["old"] * 3 + ["aa"] * 2


def test_a_run_that_goes_back_keeps_what_it_writes_from_there(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1, 2):
        save(tmp_path, step, MINE, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000001-2", "step-00000002-2"]
    assert next_number(tmp_path) == 6


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    good = save(tmp_path, 1, MINE, finite=["model.w", "model.of_another_stage"])
    for bad in (float("nan"), float("inf")):
        tensors = {"model.w": torch.tensor([1.0, bad]), "model.n": torch.tensor(3)}
        with pytest.raises(UserError, match=r"step 2: model\.w has numbers that are not finite"):
            checkpoint.save(tmp_path, 2, tensors=tensors, values={}, writer=lambda: MINE, finite=tensors.keys())
        checkpoint.save(tmp_path / "elsewhere", 2, tensors=tensors, values={}, writer=lambda: MINE, finite=["model.n"])
    assert find_latest(tmp_path) == good and names(tmp_path) == ["elsewhere", "latest", "step-00000001"]


def test_a_head_is_read_without_the_values(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, MINE, values={"curve": list(range(100_000))})
    text = (folder / "checkpoint.json").read_bytes()
    assert head(text[:HEAD_BYTES]) == head(text) == Head("aa", "5f", 1, 7)
    assert head(b'{"format": 1, "step": 7}') == head(b"") == Head("", "", 0, 0)
