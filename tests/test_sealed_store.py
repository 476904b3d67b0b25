"""The store where processes meet: what was not written with the job's key is refused, and runs nothing."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_json_exchange import Bomb
from test_world import finish, ranks_as_torchrun, start
from torch.distributed import PrefixStore, TCPStore

from pipeline.cluster.failures import report_failures
from pipeline.cluster.rendezvous import Networks, listening_address, read_value
from pipeline.cluster.sealed_store import job_key, seal, sealed, unseal
from pipeline.errors import Forged, UserError

KEY = b"k" * 32


def test_a_seal_holds_for_one_value_under_one_name_with_one_key() -> None:
    written = seal(KEY, "joined/1", b"\x00value")
    assert unseal(KEY, "joined/1", written) == b"\x00value"
    for key, name, value in [
        (b"K" * 32, "joined/1", written), (KEY, "joined/2", written), (KEY, "joined/1", written + b"!"),
        (KEY, "joined/1", b"\x00value"), (KEY, "joined/1", b""), (KEY, "joined/1\x00", written[:-6] + b"value"),
    ]:  # fmt: skip
        with pytest.raises(Forged, match="not sealed with this job's key"):
            unseal(key, name, value)


@pytest.mark.parametrize("text", ["x", "0" * 31, "00" * 15])
def test_a_key_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="HETURUN_KEY is no key of at least 32 hexadecimal digits; give every process"):
        job_key({"HETURUN_KEY": text})
    assert job_key({}) is None and job_key({"HETURUN_KEY": "00" * 16}) == b"\0" * 16


@pytest.fixture
def open_one() -> Any:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def test_a_sealed_store_does_what_torchs_does(open_one: Any) -> None:
    top = sealed(open_one, KEY)
    store = PrefixStore("torch", top)
    store.set("a", "text")
    assert store.get("a") == b"text" and store.multi_get(["a"]) == [b"text"] and b"text" in open_one.get("torch/a")
    swapped = [store.compare_set("c", *each) for each in (("", "one"), ("one", "two"), ("one", "three"))]
    assert swapped == [b"one", b"two", b"two"] and store.get("c") == b"two"
    assert [store.add("n", amount) for amount in (3, 0, -1)] == [3, 3, 2]
    assert store.check(["a", "n"]) and not store.check(["a", "b"])
    before = store.num_keys()
    assert store.delete_key("a") and not store.delete_key("b") and store.num_keys() == before - 1
    store.wait(["c"], timedelta(seconds=5))
    again = store.clone()
    again.set("d", "4")
    assert store.get("d") == b"4"


def test_its_waits_have_the_deadline_that_was_set_last(open_one: Any) -> None:
    top = sealed(open_one, KEY)
    store = PrefixStore("torch", top)
    store.set_timeout(timedelta(milliseconds=50))
    for wait in (lambda: store.get("none"), lambda: store.wait(["none"])):
        with pytest.raises(RuntimeError, match="timeout after 50ms"):
            wait()
    with pytest.raises(RuntimeError, match="timeout after 60ms"):
        store.wait(["none"], timedelta(milliseconds=60))


@pytest.mark.parametrize("key", [KEY, None])
def test_a_crafted_pickle_in_the_store_is_one_line_and_runs_nothing(
    tmp_path: Path, open_one: Any, capsys: pytest.CaptureFixture[str], key: bytes | None
) -> None:
    store = sealed(open_one, key)
    open_one.set("joined/1", pickle.dumps(Bomb(tmp_path / "ran")).decode("latin-1"))
    with pytest.raises(SystemExit) as ended, report_failures():
        read_value(store, "joined/1")
    assert ended.value.code == 1 and list(tmp_path.iterdir()) == []
    line = capsys.readouterr().err
    assert line.startswith("error: ") and "'joined/1'" in line and line.count("\n") == 1


JOIN = """
    import os
    from pathlib import Path
    from pipeline.cluster.world import join_world, report_failures
    with report_failures():
        join_world("local_1x2", timeout_s=30, directory=Path(os.environ["ROOT"])).connect()
"""


def test_a_stranger_cannot_join_a_job_and_finds_it_on_its_interface_only(tmp_path: Path) -> None:
    zero, one = ranks_as_torchrun(2, HETURUN_KEY=KEY.hex())
    job, port = start(tmp_path, JOIN, **zero), int(one["MASTER_PORT"])
    stranger = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60), wait_for_workers=False)
    stranger.wait(["heturun/0/joined/0"])
    places = {c.laddr for c in psutil.Process(job.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert places == {("127.0.0.1", port)}
    stranger.set("heturun/0/joined/1", '["here", false, false, [0]]')
    status, errors = finish(job)
    assert (status, errors) == (
        1, "error: 27 bytes in the store under 'heturun/0/joined/1' are not sealed with this job's key: refused\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("agreed", "one_host", "expected"),
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("10.9.0.1", True, "10.9.0.1"),
        ("10.9.0.1", False, "10.9.0.1"),  # the one of several interfaces that the others will use
        ("127.0.1.1", False, "192.168.7.1"),  # as a host of stock Debian knows itself
        ("10.96.0.7", False, "192.168.7.1"),  # of a service in between
    ],
)
def test_rank_zero_listens_where_the_others_look_for_it(agreed: str, one_host: bool, expected: str) -> None:
    here = Networks({"lo": ("127.0.0.1/8",), "eth1": ("10.9.0.1/24",), "eth0": ("192.168.7.1/24",)})
    own = "127.0.0.1" if one_host else "192.168.7.1"
    assert listening_address(agreed, own, here, one_host=one_host) == expected
