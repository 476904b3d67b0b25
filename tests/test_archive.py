"""What happens to a run's folder of checkpoints: whose it is, and what a failure to write into it means."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import ROOT, run_here, tiny_settings

from pipeline.cluster.world import join_world
from pipeline.core.durable import is_full, why_not_written
from pipeline.errors import UserError
from pipeline.train import checkpoint
from pipeline.train.archive import Archive, why_not_here
from pipeline.train.checkpoint_folder import Writer, checkpoints, run_of
from pipeline.train.folder_lock import this_process


def nobody_asks() -> None:
    pass


def archive(folder: Path, **settings: object) -> Archive:
    world = join_world(None, timeout_s=60, directory=ROOT)
    return Archive(tiny_settings(folder, checkpoint=str(folder / "ck"), **settings), world)


def save(one: Archive, step: int, *, size: int = 8, number: float = 1.0) -> Path | None:
    tensors = {"model.w": torch.full((size,), number)}
    return one.save(step, tensors=tensors, values={}, group=None, ask=nobody_asks)


def written(folder: Path, run: str) -> Path:
    """A checkpoint of a run."""
    return checkpoint.save(
        folder, 5, tensors={"model.w": torch.zeros(1)}, values={}, writer=lambda: Writer(f"job of {run}", run)
    )


def test_a_fresh_run_does_not_begin_among_the_checkpoints_of_another(tmp_path: Path) -> None:
    assert why_not_here(tmp_path / "none", None, run="") is None
    folder = written(tmp_path / "a", "one").parent
    text = why_not_here(folder, None, run="")
    assert text is not None and "give --resume to go on from there, or another folder" in text
    assert "--checkpoint" in text and "step-00000005" in text
    with pytest.raises(UserError, match="there are checkpoints of an earlier run in it"):
        run_here(tmp_path, checkpoint=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000005"]


def test_a_resumed_run_goes_on_where_it_was_or_in_a_folder_of_its_own(tmp_path: Path) -> None:
    mine, others = written(tmp_path / "a", "one"), written(tmp_path / "b", "another").parent
    for resumed in (mine.parent, mine):
        assert why_not_here(mine.parent, str(resumed), run="one") is None
        assert why_not_here(tmp_path / "none", str(resumed), run="one") is None
        text = why_not_here(others, str(resumed), run="one")
        assert text is not None and "of another run than that of --resume" in text
    written(tmp_path / "c", "one")
    assert why_not_here(tmp_path / "c", str(mine), run="one") is None, "it was resumed there before"


def test_a_resumed_job_goes_on_with_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    run_here(tmp_path, checkpoint=str(folder), max_steps=3, checkpoint_every=1, keep=2)
    run_here(tmp_path, checkpoint=str(folder), max_steps=5, checkpoint_every=1, keep=2, resume="")
    found = checkpoints(folder)
    assert [path.name for path in found] == ["step-00000004", "step-00000005"] and len(set(map(run_of, found))) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000004", "step-00000005"]


def test_a_second_job_is_told_at_its_start(tmp_path: Path) -> None:
    with archive(tmp_path).open(), pytest.raises(UserError, match="another job writes there"):
        run_here(tmp_path, checkpoint=str(tmp_path / "ck"))
    run_here(tmp_path, checkpoint=str(tmp_path / "ck"), max_steps=1)


def test_a_job_whose_folder_was_taken_over_publishes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stood still for so long that another job believed it dead."""
    import json

    one = archive(tmp_path)
    with one.open():
        assert save(one, 1) is not None
        other = this_process("another", "run", shared=False)
        (tmp_path / "ck" / ".lock").write_text(json.dumps(other._asdict()))
        assert save(one, 2) is None
    assert "WARNING: NO CHECKPOINT" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "ck")] == ["step-00000001"]
    assert (tmp_path / "ck" / ".lock").exists(), "that of the other job"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_named_with_its_free_bytes_and_tried_again(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = archive(small_disk)
    with one.open():
        assert save(one, 1, size=5_000) is not None
        with pytest.raises(UserError, match="but not what was to stay: checkpoint"):
            save(one, 2, size=70_000)
            one.complain()
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "WARNING: NO CHECKPOINT: checkpoint" in text and "step 2: stage 0" in text
        assert f"bytes are free on {small_disk} of host" in text and "280,000 are needed" in text
        assert "tried again at the next stop" in text
        names = sorted(path.name for path in (small_disk / "ck").iterdir())
        assert names == [".lock", "latest", "step-00000001"], "nothing half written"
        assert save(one, 3, size=5_000) is not None
        one.complain()


def test_a_disk_that_is_full_from_the_start_is_found_then(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 10))
    with pytest.raises(UserError, match=r"--checkpoint .*/ck: cannot be written \(the disk is full: 0 bytes are free"):
        run_here(small_disk.parent, checkpoint=str(small_disk / "ck"))
    assert not list(small_disk.glob("ck/.lock"))


def test_the_results_of_a_run_are_written_though_its_last_checkpoint_is_not(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(250 << 10))
    weights = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"everything else is written.*the disk is full: .* bytes are free on"):
        run_here(tmp_path, checkpoint=str(small_disk / "ck"), export=str(weights), max_steps=3, checkpoint_every=1)
    assert weights.exists() and (tmp_path / "out" / "summary.json").exists()
    assert capsys.readouterr().err.count("WARNING: NO CHECKPOINT") == 3
    with pytest.raises(UserError, match=r"^checkpoint .*step 1: .*the disk is full"):
        run_here(tmp_path, checkpoint=str(small_disk / "ck"), checkpoint_errors="stop", checkpoint_every=1)


def test_weights_that_are_not_finite_replace_no_good_ones(tmp_path: Path) -> None:
    one = archive(tmp_path)
    with one.open():
        good = save(one, 1)
        assert save(one, 2, number=float("nan")) is None and "not finite" in one.failure
        assert checkpoint.latest(tmp_path / "ck") == good
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"good ones")
    with pytest.raises(UserError, match=r"--export .*: model\..* has numbers that are not finite"):
        run_here(tmp_path, export=str(weights), learning_rate=1e30, warmup_epochs=0.0, max_steps=4)
    assert weights.read_bytes() == b"good ones" and (tmp_path / "out" / "summary.json").exists()
    assert not Path(f"{weights}.parts").exists()


@pytest.mark.parametrize(
    ("error", "free_bytes", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, True),  # of blocks or inodes: the system knows
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**9, True),
        (OSError(errno.EACCES, "Permission denied"), 0, False),
        (RuntimeError("unexpected pos 704 vs 598"), 99, True),  # torch hides what the system said
        (RuntimeError("unexpected pos 704 vs 598"), 100, False),
    ],
)
def test_when_a_disk_is_full(error: Exception, free_bytes: int, expected: bool) -> None:
    assert is_full(error, free_bytes=free_bytes, needed_bytes=100) == expected


def test_the_cause_of_an_error_says_whether_a_disk_is_full(tmp_path: Path) -> None:
    failed = RuntimeError("it failed")
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    text = why_not_written(failed, tmp_path / "not" / "there")
    assert text.startswith("the disk is full: ") and " bytes are free on " in text
    assert why_not_written(RuntimeError("other\nlines"), tmp_path) == "other"
