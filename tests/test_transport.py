"""One contract for every transport, over threads, a real MPI world and a real Gloo world; what it says is in
transport_worker.py.

Not tested here, for want of a GPU for every rank: `NcclCarrier` (its streams and groups; that headers and tensors keep
step is tested with a carrier over Gloo in its place) and the pinned copies of `StagedTransport` (what it does to the
order of messages is).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transport_worker import HOSTS, OF_ONE_BACKEND, STAGES, TOGETHER, World, run_scenarios

from pipeline.errors import UserError
from pipeline.simulation.throttled import ThrottledTransport
from pipeline.transport import resolve_backend
from pipeline.transport.local import local_transports
from pipeline.transport.protocol import HOST_CHANNELS, Layout, Who, dense, describe, layout_of, undescribe
from pipeline.transport.staged import StagedTransport
from pipeline.transport.torch_dist import _Outbox

TESTS = Path(__file__).resolve().parent
LIMIT_S = 200  # for a world that should take ten; the machine may be busy


def run_world(backend: str, folder: Path, *names: str) -> tuple[int, str]:
    """Runs scenarios in processes of their own: (exit status of the world, what it printed)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if backend == "mpi":
        return _run_mpi(folder, names, environment)
    command = [sys.executable, str(TESTS / "transport_worker.py"), backend, str(folder), *names]
    workers = []
    for stage in range(STAGES):
        place = {"RANK": str(stage), "WORLD_SIZE": str(STAGES)}
        with open(folder / f"{stage}.log", "wb") as log:
            workers.append(subprocess.Popen(command, env=environment | place, stdout=log, stderr=log))
    statuses = _wait(workers)
    logs = "".join((folder / f"{stage}.log").read_text() for stage in range(STAGES))
    return max(map(abs, statuses)), logs


def _wait(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit statuses; kills everybody else soon after the first failure, and at the deadline."""
    deadline = time.monotonic() + LIMIT_S
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if any(worker.poll() for worker in workers):
            deadline = min(deadline, time.monotonic() + 25)
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
    return [worker.wait() for worker in workers]


def _run_mpi(folder: Path, names: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str]:
    mpirun = Path(sys.executable).parent / "mpirun"
    found = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun beside this python or on PATH")
    pytest.importorskip("mpi4py")
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(STAGES)]
    worker = [sys.executable, "-m", "mpi4py", str(TESTS / "transport_worker.py"), "mpi", str(folder), *names]
    done = subprocess.run([found, *options, *worker], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stdout + done.stderr


def run_threads(backend: str) -> list[dict[str, str]]:
    """Runs all scenarios with stages as threads of this process."""
    barrier, shared = threading.Barrier(STAGES), {}
    results: list[dict[str, str]] = [{} for _ in range(STAGES)]

    def make(stage: int, *, timeout_s: float = 30.0, oversubscribed: bool = True) -> Any:
        if barrier.wait(LIMIT_S) == 0:
            shared["ends"] = local_transports(STAGES, pipeline=4, hosts=HOSTS, timeout_s=timeout_s)
        barrier.wait(LIMIT_S)
        end = shared["ends"][stage]
        barrier.wait(LIMIT_S)
        return end if backend == "local" else StagedTransport(end, torch.device("cpu"))

    def run(stage: int) -> None:
        world = World(stage, lambda **options: make(stage, **options), lambda: barrier.wait(LIMIT_S), time.thread_time)
        results[stage] = run_scenarios(world, TOGETHER)
        if len(results[stage]) < len(TOGETHER):
            barrier.abort()

    threads = [threading.Thread(target=run, args=(stage,)) for stage in range(STAGES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return results


def read_results(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """backend -> what every stage says of every scenario; each world is started once."""
    known: dict[str, list[dict[str, str]]] = {}

    def outcome(backend: str) -> list[dict[str, str]]:
        if backend not in known and backend in ("local", "staged"):
            known[backend] = run_threads(backend)
        elif backend not in known:
            folder = tmp_path_factory.mktemp(backend)
            status, printed = run_world(backend, folder, *TOGETHER, OF_ONE_BACKEND[backend])
            known[backend] = [read_results(folder / f"{stage}.json") for stage in range(STAGES)]
            assert status == 0 or any(set(results.values()) - {"passed"} for results in known[backend]), printed
        return known[backend]

    return outcome


@pytest.mark.parametrize("scenario", TOGETHER)
@pytest.mark.parametrize("backend", ["local", "staged", "mpi", "gloo"])
def test_contract(outcomes: Any, backend: str, scenario: str) -> None:
    results = outcomes(backend)
    failures = [
        f"{name}, stage {s}: {what}"
        for s, all_ in enumerate(results)
        for name, what in all_.items()
        if what != "passed"
    ]
    assert all(each.get(scenario) == "passed" for each in results), "\n".join(failures)


@pytest.mark.parametrize("backend", OF_ONE_BACKEND)
def test_contract_of_one_backend(outcomes: Any, backend: str) -> None:
    test_contract(outcomes, backend, OF_ONE_BACKEND[backend])


def test_a_killed_peer_is_missed_at_once_over_gloo(tmp_path: Path) -> None:
    run_world("gloo", tmp_path, "a_killed_peer_is_missed")
    assert json.loads((tmp_path / "0.json").read_text()) == {"a_killed_peer_is_missed": "passed"}


def test_a_killed_peer_ends_an_mpi_world(tmp_path: Path) -> None:
    start = time.monotonic()
    status, printed = run_world("mpi", tmp_path, "a_killed_peer_is_missed")
    assert status != 0, printed
    assert time.monotonic() - start < 40, "mpirun outlived its dead rank"


def test_importing_the_package_loads_no_mpi() -> None:
    code = "import sys, pipeline.transport; assert not [m for m in sys.modules if 'mpi4py' in m]"
    subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, check=True, timeout=LIMIT_S)


# --- layouts and messages


def test_layouts_survive_their_description() -> None:
    tensors = [
        torch.empty(()),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.empty(2, 3, 4, 5, dtype=torch.bool).to(memory_format=torch.channels_last),
    ]
    layouts = tuple(layout_of(tensor) for tensor in tensors)
    assert undescribe(describe(layouts)) == layouts
    assert undescribe(describe(())) == ()


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(ValueError, match=r"complex64 .* cannot be sent"):
        describe((Layout(torch.complex64, torch.Size([2]), (1,)),))


def test_dense_tensors_are_sent_as_they_lie() -> None:
    plain, last = torch.empty(2, 3, 4, 4), torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert dense(plain) is plain and dense(last) is last
    assert dense(plain[:, :2]).is_contiguous()
    assert dense(torch.zeros(()).expand(5)).stride() == (1,)


def test_a_message_without_hosts_still_names_the_stage() -> None:
    assert str(Who(1).lost(0, "A", 3, 5.0)) == "stage 1 of pipeline 0 waited 5 s for activation 3 from stage 0"


# --- which transport


@pytest.mark.parametrize(
    ("backend", "device", "mpi", "uses_nccl", "chosen"),
    [
        ("auto", "cpu", True, False, "mpi"),
        ("auto", "cpu", False, False, "gloo"),
        ("auto", "cuda", True, True, "nccl"),
        ("auto", "cuda", True, False, "mpi"),
        ("auto", "cuda", False, False, "gloo"),
        ("gloo", "cuda", True, True, "gloo"),
        ("mpi", "cpu", True, False, "mpi"),
        ("nccl", "cuda", False, True, "nccl"),
    ],
)
def test_auto_takes_the_fastest_that_works(backend: str, device: str, mpi: bool, uses_nccl: bool, chosen: str) -> None:
    assert resolve_backend(backend, fake_world(device, mpi=mpi, uses_nccl=uses_nccl)) == chosen


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("nccl", "cpu", "--backend nccl needs a GPU for every rank; .* choose mpi or gloo"),
        ("nccl", "cuda", "--backend nccl needs a GPU of its own for every rank; choose mpi or gloo"),
        ("mpi", "cpu", "--backend mpi needs an MPI world: .* or choose gloo"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_with_a_remedy(backend: str, device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_backend(backend, fake_world(device, mpi=False, uses_nccl=False))


def fake_world(device: str, *, mpi: bool, uses_nccl: bool) -> Any:
    return SimpleNamespace(device=torch.device(device), mpi=mpi, uses_nccl=uses_nccl)


# --- copies from a GPU, as far as the host sees them


class Done:
    """A copy's event that says when it is asked."""

    def __init__(self) -> None:
        self.copied = False

    def query(self) -> bool:
        return self.copied

    def synchronize(self) -> None:
        self.copied = True


class Slow(StagedTransport):
    """Whose copies are over when an event in `events` says so."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, torch.device("cpu"))
        self.events: list[Done] = []

    def _to_host(self, tensors: Any) -> Any:
        self.events.append(Done())
        return tensors, self.events[-1]


def test_staged_sends_leave_in_order_once_copied_and_at_the_latest_before_a_wait() -> None:
    here, there = local_transports(2, timeout_s=5.0)
    staged = Slow(here)
    for microbatch in range(3):
        staged.send(1, "A", microbatch, (torch.tensor([float(microbatch)]),))
    assert staged.bytes_sent == 0
    staged.events[1].copied = True
    staged.post(1, "G", 0)
    assert staged.bytes_sent == 0, "message 1 left before message 0"
    there.send(0, "G", 0, (torch.ones(2),))
    staged.recv(1, "G", 0)
    assert [float(there.recv(0, "A", microbatch)[0]) for microbatch in range(3)] == [0.0, 1.0, 2.0]


def test_a_pause_lets_finished_sends_go_also_through_a_wrapper() -> None:
    here, there = local_transports(2, timeout_s=5.0)
    staged = Slow(here)
    limited = ThrottledTransport(staged, stage=0, limits={(1, 0): 1e9})
    limited.send(1, "A", 0, (torch.ones(2),))
    limited.release()
    assert limited.bytes_sent == 0, "it is still being copied"
    staged.events[0].copied = True
    limited.release()
    assert torch.equal(there.recv(0, "A", 0)[0], torch.ones(2))


@pytest.mark.parametrize("channel", sorted(HOST_CHANNELS))
def test_numbers_for_hosts_need_no_device(channel: str) -> None:
    here, there = local_transports(2, timeout_s=5.0)
    staged = Slow(here)
    limits = {(0, 1): 1e9}
    limited = ThrottledTransport(
        staged, stage=0, limits=limits, device=torch.device("meta")
    )  # a device without numbers
    limited.send(1, channel, 0, (torch.ones(2),))
    assert not staged.events, "a copy from the device was made and waited for"
    (received,) = ThrottledTransport(there, stage=1, limits=limits).recv(0, channel, 0)
    assert torch.equal(received, torch.ones(2))
    assert _Outbox(1, channel, cast(Any, "NCCL")).carrier is None and _Outbox(1, "A", cast(Any, "NCCL")).carrier
