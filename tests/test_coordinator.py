"""The coordinator and its clients over the real socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest
import zmq

from pipeline.cluster.failures import is_secondary
from pipeline.coordination.answers import Answer
from pipeline.coordination.client import Client
from pipeline.coordination.keys import curve_keys
from pipeline.coordination.messages import JobRules
from pipeline.coordination.questions import JobOver, Replaced, Welcome
from pipeline.coordination.server import FRAME_BYTES, Coordinator, spawn_coordinator
from pipeline.errors import CoordinatorLost, Fenced, PeerLate, PeerLost, TooFewReplicas, UserError

KEY = bytes(range(32))
SOON_S = 20.0  # far longer than anything here takes
NEVER_S = 1e6


@contextmanager
def coordinator(key: bytes = KEY) -> Iterator[Coordinator]:
    """One that serves in a thread of this process."""
    serving = Coordinator(key, "127.0.0.1")
    failures: list[BaseException] = []

    def run() -> None:
        try:
            serving.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield serving
    finally:
        serving.end()
        thread.join(SOON_S)
        serving.close()
    assert not failures, failures


class Job:
    """Clients of one job, closed at the end; `lost` and `joined` are what each was told."""

    def __init__(self, address: str, rules: JobRules) -> None:
        self.address, self.rules = address, rules
        self.clients: list[Client] = []
        self.lost: dict[int, SimpleQueue[tuple[int, int]]] = {}
        self.joined: dict[int, SimpleQueue[tuple[int, int]]] = {}

    def client(self, pipeline: int, stage: int = 0, **options: Any) -> Client:
        rank = pipeline * self.rules.stages + stage
        lost = self.lost[rank] = SimpleQueue()
        joined = self.joined[rank] = SimpleQueue()
        client = Client(
            self.address,
            options.pop("key", KEY),
            options.pop("rules", self.rules),
            stage=stage,
            pipeline=pipeline,
            mesh_address=f"host{pipeline}:{stage}",
            on_lost=lambda *news: lost.put(news),
            on_joined=lambda *news: joined.put(news),
            **options,
        )
        self.clients.append(client)
        return client

    def start(self) -> list[Client]:
        """All workers, after the start barrier; those of pipeline 0 first."""
        ranks = range(self.rules.stages * self.rules.pipelines)
        clients = [self.client(*divmod(rank, self.rules.stages)) for rank in ranks]
        hello(clients)
        return clients


def hello(clients: Sequence[Client]) -> list[Welcome]:
    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(Client.hello, clients))


@contextmanager
def job(address: str, **rules: Any) -> Iterator[Job]:
    known = {"stages": 1, "pipelines": 2, "policy": "all", "heartbeat_timeout_s": NEVER_S}
    working = Job(address, JobRules(**{**known, **rules}))
    try:
        yield working
    finally:
        for client in working.clients:
            client.close()


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result(SOON_S) for future in futures]


def until(what: Callable[[], bool]) -> None:
    """Waits for something that is about to happen."""
    deadline = time.monotonic() + SOON_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- one job


def test_two_workers_form_a_group() -> None:
    with coordinator() as server, job(server.address) as work:
        first, second = work.start()
        assert first.live == (0, 1) and first.peers == {0: "host0:0", 1: "host1:0"}
        one, two = results([first.ready(1), second.ready(1)])
        assert one == two and one.members == (0, 1) and one.reason


def test_a_whole_job_from_hello_to_bye() -> None:
    process, address = spawn_coordinator(KEY, "127.0.0.1")
    with job(address, stages=2, pipelines=2, even=True) as work:
        clients = work.start()
        for client in clients:
            client.begin(0, 0, 4)
        assert results([client.ticket(0, 0) for client in clients]) == [0, 0, 1, 1]
        assert results([client.ticket(0, 1) for client in clients]) == [2, 2, 3, 3]
        assert results([client.ticket(0, 2) for client in clients]) == [None] * 4
        clients[0].done(0)
        one, two = results([client.final(0) for client in clients[::2]])
        assert one == two and one.members == (0, 1)
        assert results(
            [client.gather("loss", client.pipeline / 2, "last", "rows to speaker") for client in clients]
        ) == [None, {1: 0, 3: 0.5}, None, None]
        assert [client.first("name", client.stage).result(SOON_S) for client in clients[1::-1]] == [1, 1]
        for client in clients:
            client.bye()
    assert process.wait(SOON_S) == 0


def test_other_rules_are_the_users_mistake() -> None:
    with coordinator() as server, job(server.address) as work:
        first, second = work.client(0), work.client(1, rules=JobRules(stages=1, pipelines=2, max_group=4))
        waiting = ThreadPoolExecutor(1).submit(first.hello)
        until(lambda: server._director.met)
        with pytest.raises(UserError, match="give every process the same flags"):
            second.hello()
        third = work.client(1)
        third.hello()
        assert waiting.result(SOON_S) == Welcome(0, False, -1, 0)


def test_a_call_that_makes_no_sense_is_an_error_of_the_caller() -> None:
    with coordinator() as server, job(server.address) as work:
        first, _ = work.start()
        first.ready(1)
        with pytest.raises(ValueError, match="already waits"):
            first.ready(2).result(SOON_S)
        with pytest.raises(ValueError, match="the coordinator takes"):
            first.gather("x", "y" * FRAME_BYTES, "all", "given")


def test_the_time_limit_names_who_is_missing() -> None:
    with coordinator() as server, job(server.address) as work:
        lone = work.client(0, timeout_s=0.1)
        with pytest.raises(PeerLate, match=r"waited 0.1 s \(hello\) for stage 0 of pipeline 1") as late:
            lone.hello()
        assert is_secondary(late.value)  # the one that did not come is the cause, not the one that waited
        assert isinstance(late.value, TimeoutError)


def test_many_clients_in_one_process() -> None:
    with coordinator() as server, job(server.address, stages=4, pipelines=8) as work:
        clients = work.start()
        groups = results([client.ready(1) for client in clients])
        assert {group.members for group in groups} == {tuple(range(8))}
        rows = results([client.gather("x", n, "all", "rows to first") for n, client in enumerate(clients)])
        assert rows == [dict(enumerate(range(32))), *[None] * 31]
        sums = results([client.gather("x", {"n": n}, "all", "sum") for n, client in enumerate(clients)])
        assert sums == [{"n": sum(range(32))}] * 32


# --- strangers


def knock(address: str, prepare: Callable[[zmq.Socket[bytes]], None], frames: Sequence[bytes]) -> bytes | None:
    """Sends a message as a stranger would; what comes back in half a second."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        prepare(sock)
        sock.connect(f"tcp://{address}")
        sock.send_multipart(frames)
        return sock.recv() if sock.poll(500) else None


def with_keys(server: bytes, client: bytes) -> Callable[[zmq.Socket[bytes]], None]:
    def prepare(sock: zmq.Socket[bytes]) -> None:
        sock.identity = b"stranger"
        sock.curve_serverkey = curve_keys(server, "server").public
        sock.curve_publickey, sock.curve_secretkey = curve_keys(client, "client")

    return prepare


PING = [b'{"type":"ping","g":0}']


def test_without_the_key_nobody_gets_anything(capfd: pytest.CaptureFixture[str]) -> None:
    other = b"x" * 32
    with coordinator() as server:
        assert knock(server.address, with_keys(KEY, KEY), PING) is not None
        assert knock(server.address, with_keys(other, other), PING) is None  # no handshake
        assert knock(server.address, with_keys(KEY, other), PING) is None  # it knows the server's key, but is nobody
        assert knock(server.address, lambda sock: None, PING) is None  # no CURVE at all
        assert knock(server.address, with_keys(KEY, KEY), PING) is not None
    assert capfd.readouterr().err.count("turned somebody away") == 1


def test_a_client_with_another_key_learns_that() -> None:
    with coordinator() as server, job(server.address) as work:
        stranger = work.client(0, key=b"x" * 32)
        with pytest.raises(CoordinatorLost, match="does not know this job's key"):
            stranger.hello()


def test_what_is_malformed_is_dropped_and_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with coordinator() as server, job(server.address) as work:
        first, second = work.start()
        for frames in (
            [b"{"],
            [b"{"],
            [b"\xff\xfe"],
            [b"[" * 100_000],
            [b"17"],
            [b"{}", b"{}", b"{}"],
            [b'"' + b"x" * FRAME_BYTES + b'"'],
            [json.dumps({"type": "hello", "n": 1}).encode()],
            [b""],
        ):
            knock_without_waiting(server.address, frames)
        assert knock(server.address, with_keys(KEY, KEY), [b"y" * 3 * FRAME_BYTES]) is None  # its connection is cut
        assert results([first.ready(1), second.ready(1)])[0].members == (0, 1)
    said = capfd.readouterr().err
    assert said.count("dropped a message: not JSON\n") == 1
    for complaint in (
        "not a JSON object",
        "more than one frame",
        f"longer than {FRAME_BYTES} bytes",
        "hello with stage",
    ):
        assert complaint in said, said


def knock_without_waiting(address: str, frames: Sequence[bytes]) -> None:
    """The ping that follows is answered when the message before it has been dropped."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        with_keys(KEY, KEY)(sock)
        sock.connect(f"tcp://{address}")
        sock.send_multipart(frames)
        sock.send_multipart(PING)
        assert sock.poll(SOON_S * 1000)


# --- no way to the coordinator


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:x", "a b:4711", ""])
def test_an_address_that_cannot_be_is_found_at_once(address: str) -> None:
    with job(address) as work:
        client = work.client(0)
        with pytest.raises(CoordinatorLost, match=r"no connection to the coordinator at .* can be made"):
            client.hello()
        with pytest.raises(CoordinatorLost):
            client.ready(1).result()


NO_FILES_LEFT = """
import os, resource, sys
from pipeline.coordination.answers import Answer
from pipeline.coordination.client import Client
from pipeline.coordination.messages import JobRules
from pipeline.errors import CoordinatorLost
client = Client(sys.argv[1], bytes(32), JobRules(stages=1, pipelines=1), stage=0, pipeline=0)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(0)
except OSError:
    pass
try:
    client.hello()
except CoordinatorLost as error:
    print(error)
client.close()
"""


def test_without_file_descriptors_hello_ends_and_says_so() -> None:
    command = [sys.executable, "-c", NO_FILES_LEFT, "127.0.0.1:4711"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON_S)
    assert "no connection to the coordinator at 127.0.0.1:4711 can be made: Too many open files" in done.stdout, done


def test_a_wait_ends_even_if_the_thread_never_answers() -> None:
    stuck: Answer[int] = Answer(0.05, "the coordinator's answer (ready)")
    for wait in (stuck.result, stuck.exception):
        with pytest.raises(PeerLost, match=r"waited 0.05 s for the coordinator's answer \(ready\)"):
            wait()
    stuck.set_exception(PeerLate("waited 300 s for stage 1"))
    with pytest.raises(PeerLate, match="for stage 1"):
        stuck.result()


# --- losses


def test_the_silent_are_lost_and_the_others_go_on() -> None:
    with coordinator() as server, job(server.address, pipelines=3, heartbeat_timeout_s=2.0) as work:
        clients = work.start()
        waiting = [clients[0].ready(1), clients[2].ready(1)]
        clients[1].close()  # without a word
        assert [group.members for group in results(waiting)] == [(0, 2), (0, 2)]
        assert work.lost[0].get(timeout=SOON_S) == (1, 1) == work.lost[2].get(timeout=SOON_S)
        assert clients[0].live == (0, 2) and clients[0].generations[1] == 1 and 1 not in clients[0].peers


def test_the_launchers_notice_is_a_loss() -> None:
    with coordinator() as server, job(server.address, pipelines=2) as work:
        first, _ = work.start()
        waiting = first.ready(1)
        server.lost(1, "killed by signal 9")
        assert waiting.result(SOON_S).members == (0,)


def freeze(client: Client) -> Callable[[], None]:
    """Stops a client's thread in the middle of a callback, as SIGSTOP would stop its process; returns what goes on."""
    go_on = threading.Event()
    frozen = threading.Event()

    def hold(_: Future[Any]) -> None:
        frozen.set()
        assert go_on.wait(SOON_S)

    client.first("anything", 0).add_done_callback(hold)
    assert frozen.wait(SOON_S)
    return go_on.set


def test_the_frozen_are_fenced_and_come_back() -> None:
    with coordinator() as server, job(server.address, stages=2, pipelines=2, heartbeat_timeout_s=2.0) as work:
        clients = work.start()
        for client in clients:
            client.begin(0, 0, 100)
        assert results([client.ticket(0, 0) for client in clients[:2]]) == [0, 0]
        assert results([client.ticket(0, 0) for client in clients[2:]]) == [1, 1]
        waiting = clients[2].ready(1)
        go_on = freeze(clients[3])
        with pytest.raises(Fenced, match="stage 1 was silent"):
            waiting.result(SOON_S)
        assert clients[2].fenced and work.lost[2].get(timeout=SOON_S) == (1, 1)
        assert clients[2].ready(1).result(SOON_S).reason == "pipeline 1 is not whole"
        assert [group.members for group in results([client.ready(1) for client in clients[:2]])] == [(0,), (0,)]
        late = clients[3].ready(1)  # it does not know yet
        go_on()
        with pytest.raises(Fenced):
            late.result(SOON_S)
        assert results([client.ticket(0, 0) for client in clients[2:]]) == [1, 1]
        assert results([client.giver() for client in clients[2:]]) == [(0, "host0:0"), (0, "host0:1")]
        welcomes = results([client.refreshed() for client in clients[2:]])
        assert welcomes == [Welcome(1, False, 0, 1)] * 2 and not clients[2].fenced
        assert work.joined[0].get(timeout=SOON_S) == (1, 1) and clients[0].peers[1] == "host1:0"
        assert clients[2].live == clients[0].live == (0, 1)
        assert [group.members for group in results([clients[1].ready(2), clients[3].ready(2)])] == [(0, 1), (0, 1)]


def test_processes_that_are_started_again_take_their_place() -> None:
    with coordinator() as server, job(server.address, pipelines=2) as work:
        first, old = work.start()
        for client in (first, old):
            client.begin(0, 0, 100)
            client.first("begun", True).result(SOON_S)
        new = work.client(1, incarnation=1)
        assert new.hello() == Welcome(1, True, 0, 0)
        assert new.giver().result(SOON_S) == (0, "host0:0")
        assert new.refreshed().result(SOON_S) == Welcome(1, False, 0, 0)
        assert [group.members for group in results([first.ready(1), new.ready(1)])] == [(0, 1), (0, 1)]
        with pytest.raises(Replaced):
            old.ready(1).result(SOON_S)


def test_who_comes_back_after_the_end_is_told_so() -> None:
    with coordinator() as server, job(server.address, pipelines=2) as work:
        first, second = work.start()
        first.suspect(1)
        assert work.lost[1].get(timeout=SOON_S) == (1, 1)
        first.bye()
        with pytest.raises(JobOver):
            second.giver().result(SOON_S)


def test_too_few_replicas_end_the_job() -> None:
    with coordinator() as server, job(server.address, pipelines=2, min_replicas=2) as work:
        first, _ = work.start()
        waiting = first.ready(1)
        server.lost(1, "killed by signal 9")
        with pytest.raises(TooFewReplicas, match=r"1 of 2 pipelines is left, and --min-replicas is 2: .*signal 9"):
            waiting.result(SOON_S)
        with pytest.raises(TooFewReplicas):
            first.ready(2).result(SOON_S)


# --- the coordinator's own end


def test_a_killed_coordinator_fails_everything_at_once() -> None:
    process, address = spawn_coordinator(KEY, "127.0.0.1")
    with job(address, heartbeat_timeout_s=60.0) as work:
        first, _ = work.start()
        waiting = first.ready(1)
        process.kill()
        begin = time.monotonic()
        with pytest.raises(CoordinatorLost, match="has ended"):
            waiting.result(SOON_S)
        assert time.monotonic() - begin < 5.0  # it takes milliseconds, heartbeats would take 60 s
        with pytest.raises(CoordinatorLost):
            first.ready(2).result(SOON_S)
        first.bye()
    assert process.wait(SOON_S) == -signal.SIGKILL


def test_a_frozen_coordinator_is_borne_for_a_while() -> None:
    process, address = spawn_coordinator(KEY, "127.0.0.1")
    try:
        with job(address, heartbeat_timeout_s=0.4) as work:
            clients = [work.client(pipeline, patience_s=NEVER_S) for pipeline in (0, 1)]
            hello(clients)
            waiting = clients[0].ready(1)
            os.kill(process.pid, signal.SIGSTOP)
            other = clients[1].ready(1)
            with pytest.raises(TimeoutError):
                other.result(1.0)  # meanwhile the clients have made new connections
            os.kill(process.pid, signal.SIGCONT)
            assert [group.members for group in results([waiting, other])] == [(0, 1), (0, 1)]
            assert clients[0].live == (0, 1)
    finally:
        process.kill()
        process.wait()


def test_a_silent_coordinator_is_lost() -> None:
    process, address = spawn_coordinator(KEY, "127.0.0.1")
    try:
        with job(address, heartbeat_timeout_s=0.4) as work:
            clients = [work.client(pipeline, patience_s=1.0) for pipeline in (0, 1)]
            hello(clients)
            waiting = clients[0].ready(1)
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(CoordinatorLost, match="silent for"):
                waiting.result(SOON_S)
    finally:
        process.kill()
        process.wait()


def test_an_error_in_a_callback_reaches_who_waits() -> None:
    def fail(pipeline: int, generation: int) -> None:
        raise RuntimeError("no such peer")

    with coordinator() as server, job(server.address, pipelines=2) as work:
        clients = [work.client(0), work.client(1)]
        hello(clients)
        clients[0]._on_lost = fail
        waiting = clients[0].ready(1)
        server.lost(1, "killed")
        with pytest.raises(CoordinatorLost, match="no such peer"):
            waiting.result(SOON_S)


def test_the_coordinator_ends_when_nobody_ever_came() -> None:
    process, _ = spawn_coordinator(KEY, "127.0.0.1")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(SOON_S) == 0


def test_sigterm_ends_it_with_status_0() -> None:
    process, _ = spawn_coordinator(KEY, "127.0.0.1")
    process.terminate()
    assert process.wait(SOON_S) == 0


def test_sigterm_while_workers_need_it_is_a_failure() -> None:
    process, address = spawn_coordinator(KEY, "127.0.0.1")
    with job(address, pipelines=1) as work:
        work.start()
        process.terminate()
        assert process.wait(SOON_S) == 128 + signal.SIGTERM


def test_it_imports_no_torch() -> None:
    code = "import sys, pipeline.coordination.server, pipeline.coordination.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
