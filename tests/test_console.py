"""What happens to a job's output when nobody reads it, slowly or ever: the job goes on, and nothing waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from heturun_jobs import HETURUN, clean_environment, job, program

from heturun.launch.console import PLAIN_EVERY_S, Plain
from heturun.launch.outbox import MOST_BYTES, UNDER_WAY_BYTES, Outbox
from heturun.launch.outcome import Progress
from heturun.launch.printer import Backlog, Printer
from pipeline.cluster.wire import Message

SOON_S = 20.0


def test_of_lines_that_wait_the_oldest_give_way_and_a_line_says_how_many() -> None:
    backlog = Backlog(most=8)
    for line in (b"one", b"two", b"three"):
        backlog.put(line)
    (said, *rest) = backlog.take(99)
    assert said.startswith(b"heturun: 1 line was dropped here")
    assert rest == [b"two", b"three"]
    backlog.put(b"four")
    assert backlog.take(99) == [b"four"]


class Reader:
    """Somebody who takes lines only when allowed to."""

    def __init__(self) -> None:
        self.reads, self.begun, self.lines = threading.Event(), threading.Event(), list[bytes]()

    def write(self, lines: object) -> None:
        self.begun.set()
        assert self.reads.wait(SOON_S)
        assert isinstance(lines, list)
        self.lines += lines


def test_a_printer_holds_nobody_up_and_prints_on_when_it_is_read_again() -> None:
    reader, errors = Reader(), list[OSError]()
    printer = Printer(reader.write, failed=errors.append)
    line = "x" * 1000
    printer.put("first")
    assert reader.begun.wait(SOON_S)
    for i in range(10_000):  # 10 MB
        printer.put(f"{line}{i}")
    printer.finish(idle_s=0.0, give_up=lambda: False)
    assert reader.lines == []
    reader.reads.set()
    printer.put("last")
    printer.finish(idle_s=SOON_S, give_up=lambda: False)
    assert (reader.lines[0], reader.lines[-1], errors) == (b"first", b"last", [])
    assert b"lines were dropped here" in reader.lines[1]
    numbers = [int(text.removeprefix(line.encode())) for text in reader.lines[2:-1]]
    assert numbers == list(range(10_000 - len(numbers), 10_000)) and len(numbers) > 3000


def test_a_printer_that_fails_says_so_once_and_takes_no_more() -> None:
    errors: list[OSError] = []

    def full(lines: object) -> None:
        raise OSError(28, "No space left on device")

    printer = Printer(full, failed=errors.append)
    printer.put("lost")
    printer.finish(idle_s=SOON_S, give_up=lambda: False)
    printer.put("lost too")
    assert [error.errno for error in errors] == [28] and printer.ended


def test_progress_lines_get_rarer_and_never_repeat() -> None:
    plain, said = Plain(0.0, PLAIN_EVERY_S), list[str]()
    for second in range(24 * 3600):
        plain, line = plain.after(Progress(0, second // 60, 1440, "epoch 3"), float(second))
        said += [] if line is None else [line]
    assert said[0] == "epoch 3 0/1440"
    assert len(set(said)) == len(said) and 20 < len(said) < 100
    assert plain.after(Progress(0, 1439, 1440, "epoch 3"), 1e9)[1] is None or said[-1] != "epoch 3 1439/1440"


def output(rank: int, text: str) -> Message:
    return {"type": "output", "rank": rank, "stream": "stdout", "lines": [text]}


def test_an_agent_waits_for_no_launcher_that_stands_still_and_drops_no_news() -> None:
    sent: list[Message] = []
    outbox, gone = Outbox(sent.append), threading.Event()
    outbox.start()
    outbox.put({"type": "started", "rank": 0})
    outbox.put(output(0, "x" * UNDER_WAY_BYTES))
    time_before = time.monotonic()
    for i in range(50):
        outbox.put(output(0, f"{i}" + "x" * (MOST_BYTES // 10)))  # one is under way, and not confirmed
    assert time.monotonic() - time_before < SOON_S
    outbox.put({"type": "exit", "rank": 0})
    outbox.put({"type": "closed", "rank": 0})
    ended = threading.Thread(target=outbox.finish, args=(gone,))
    ended.start()
    while ended.is_alive():
        outbox.took()
        ended.join(0.01)
    kinds = [message["type"] for message in sent]
    assert (kinds[0], kinds[-2:]) == ("started", ["exit", "closed"])
    lines = [message["lines"][0] for message in sent if message["type"] == "output"]
    dropped = [int(line.split()[1]) for line in lines if "dropped here" in line]
    kept = [int(line.partition("x")[0]) for line in lines[1:] if "dropped here" not in line]
    assert kept == list(range(50 - len(kept), 50)) and sum(dropped) == 50 - len(kept) > 30


@pytest.mark.parametrize("how", ["full", "closed"])
def test_a_stdout_that_cannot_be_written_ends_the_printing_and_not_the_job(how: str, tmp_path: Path) -> None:
    code = "print('out', rank); print('err', rank, file=sys.stderr)"
    with open("/dev/full" if how == "full" else os.devnull, "w") as stdout:
        done = subprocess.run(
            [*HETURUN, "-w", "2", "--launcher", "local", "--log-dir", str(tmp_path), *program(code)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
            env=clean_environment(),
            preexec_fn=partial(os.close, 1) if how == "closed" else None,
        )
    assert done.returncode == 0, done.stderr
    said = "heturun: stdout cannot be written (No space left on device); the job goes on without it"
    expected = [f"[localhost/0/{rank}] err {rank}" for rank in range(2)]
    assert sorted(done.stderr.splitlines()) == [*expected, *([said] if how == "full" else [])]
    logs = sorted(line for path in tmp_path.iterdir() for line in path.read_text().splitlines())
    assert logs == ["err 0", "err 1", "out 0", "out 1"]


def test_a_pipe_that_nobody_reads_for_long_slows_nothing_and_is_written_on_afterwards(tmp_path: Path) -> None:
    through, logs = tmp_path / "through", tmp_path / "logs"
    code = (
        "for i in range(120_000): print('x' * 100, i)\n"
        f"sys.stdout.flush(); open({str(through)!r}, 'w').close()\n"
        "print('the end', flush=True)"
    )
    with job("-w", "1", "--launcher", "local", "--log-dir", str(logs), code=code) as running:
        wait_until(through.exists)  # the worker has written 13 MB, and nobody has read a byte
        assert running.finish(within_s=60) == 0
    assert running.lines[-1] == "[localhost/0/0] the end"
    assert any("lines were dropped here: nobody read them in time" in line for line in running.lines)
    assert len((logs / "rank0-localhost-stage0-pipeline0.log").read_text().splitlines()) == 120_001


def test_a_launcher_that_was_stopped_reads_what_its_agents_said_before_it_judges(tmp_path: Path) -> None:
    ready, go = tmp_path / "ready", tmp_path / "go"
    code = (
        f"open({str(ready)!r} + str(rank), 'w').close()\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.02)\n"
        "print('done', rank)"
    )
    with job("-w", "3", "--launcher", "local", code=code) as running:
        wait_until(lambda: all(Path(f"{ready}{rank}").exists() for rank in range(3)))
        os.kill(running.process.pid, signal.SIGSTOP)  # Ctrl-Z
        try:
            go.touch()
            assert running.left_but(running.process.pid) == []  # workers and agents end meanwhile
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        assert running.finish(within_s=20) == 0, running.lines
    assert sorted(running.lines) == [f"[localhost/0/{rank}] done {rank}" for rank in range(3)]


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
