"""One job at a time writes into a folder of checkpoints; who is gone holds nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.train.folder_lock import DEAD_S, SILENT_S, FolderLock, Owner, Verdict, judge, this_host, this_process

HERE = "w0 boot pid"
OWNER = Owner("theirs", "run", HERE, 4711, 1.0, "12:03:44", shared=True)


@pytest.mark.parametrize(
    ("owner", "alive", "age_s", "verdict"),
    [
        (OWNER._replace(job="mine"), True, 0.0, "ours"),
        (OWNER._replace(job="mine", host="w1"), False, 99.0, "ours"),  # the saver moves between hosts
        (OWNER, True, 0.0, "held"),
        (OWNER, True, 99.0, "held"),  # it stands still, and will go on
        (OWNER, False, DEAD_S - 1, "wait"),  # its job may go on, and touch it
        (OWNER, False, DEAD_S + 1, "free"),
        (OWNER._replace(shared=False), False, 0.0, "free"),  # its job has ended with it
        (OWNER._replace(host="w1"), False, SILENT_S - 1, "wait"),
        (OWNER._replace(host="w1", shared=False), False, SILENT_S + 1, "free"),
        (None, False, SILENT_S - 1, "wait"),
        (None, False, SILENT_S + 1, "free"),
    ],
)
def test_what_a_job_thinks_of_a_lock(owner: Owner | None, alive: bool, age_s: float, verdict: Verdict) -> None:
    assert judge(owner, job="mine", here=HERE, alive=alive, age_s=age_s) == verdict


Make = Callable[..., FolderLock]


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Make]:
    """Makes locks of jobs for one folder."""
    made: list[FolderLock] = []

    def make(job: str, sleep: Callable[[float], None] = time.sleep) -> FolderLock:
        made.append(
            FolderLock(tmp_path / "c", job, shared=True, touches=lambda: True, clock=time.monotonic, sleep=sleep)
        )
        return made[-1]

    yield make
    for one in made:
        one.stop()


def leave(lock: FolderLock, *, age_s: float, **changes: object) -> None:
    """A lock that a job called "gone" has left."""
    owner = this_process("gone", "old", shared=True)._replace(**changes)  # type: ignore[arg-type]
    lock.path.parent.mkdir()
    lock.path.write_text(json.dumps(owner._asdict()))
    then = time.time() - age_s
    os.utime(lock.path, (then, then))


def test_a_second_job_is_told_in_one_line_and_comes_in_when_the_first_has_ended(lock: Make, tmp_path: Path) -> None:
    first, second = lock("first"), lock("second")
    assert first.take("run of the first") == "run of the first"
    expected = rf"--checkpoint {tmp_path}/c: another job writes there \(process {os.getpid()} on .*, since ..:..:..\)"
    with pytest.raises(UserError, match=expected) as raised:
        second.take("another run")
    assert "give this one a folder of its own" in str(raised.value) and "\n" not in str(raised.value)
    second.release()
    assert first.take("whatever") == "run of the first", "one that is not its own is not given back"
    first.release()
    assert lock("third").take("third") == "third"
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_every_process_of_the_job_has_it(lock: Make) -> None:
    lock("job").take("run")
    assert lock("job").take("whatever") == "run"


def test_the_lock_of_a_process_that_has_ended_is_taken_over(lock: Make, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = lock("mine")
    leave(mine, age_s=DEAD_S + 1, pid=ended.pid)
    assert mine.take("run") == "run" and mine.take("") == "run"
    mine.path.unlink()
    mine.path.parent.rmdir()
    leave(mine, age_s=DEAD_S + 1, began=1.0)  # another process has its number now
    assert mine.take("run") == "run"


def test_the_lock_of_another_host_is_taken_over_when_nobody_touches_it(lock: Make) -> None:
    waits: list[float] = []

    def long_ago(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            moment[0] += SILENT_S

    moment = [0.0]
    mine = lock("mine", long_ago)
    mine._now = lambda: time.time() + moment[0]  # type: ignore[method-assign]
    leave(mine, age_s=1.0, host="elsewhere")
    assert mine.take("run") == "run" and len(waits) == 3


def test_the_lock_of_another_host_is_held_as_soon_as_it_is_touched(lock: Make) -> None:
    mine = lock("mine", lambda seconds: os.utime(mine.path))
    leave(mine, age_s=SILENT_S - 2, host="elsewhere")
    with pytest.raises(UserError, match=r"another job writes there \(process \d+ on elsewhere"):
        mine.take("run")


def test_the_holder_touches_it(lock: Make) -> None:
    mine = lock("mine")
    mine.take("run")
    os.utime(mine.path, (1.0, 1.0))
    deadline = time.monotonic() + 30
    while os.stat(mine.path).st_mtime < 2.0:
        assert time.monotonic() < deadline, "nobody touches it"
        time.sleep(0.01)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = FolderLock(
        tmp_path / "file" / "c", "j", shared=False, touches=lambda: False, clock=time.monotonic, sleep=time.sleep
    )
    with pytest.raises(UserError, match=r"--checkpoint .*/file/c: cannot be written: Not a directory"):
        one.take("run")
    one.release()


def test_a_host_is_named_first() -> None:
    assert OWNER.words == "process 4711 on w0, since 12:03:44" and " " in this_host()
