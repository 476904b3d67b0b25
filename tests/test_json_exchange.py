"""Values over a process group are JSON: what is none is a clear error, and what was crafted runs nothing."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.failures import report_failures
from pipeline.cluster.json_exchange import MAX_BYTES, broadcast_value, gather_values, gather_values_at
from pipeline.cluster.json_exchange import _decoded as decoded
from pipeline.core.outside import parse_json, parse_yaml
from pipeline.errors import Forged, UserError

ROOT = Path(__file__).resolve().parent.parent

THREE = """
    import json, sys
    from pathlib import Path
    import torch.distributed as dist
    from pipeline.errors import UserError
    from pipeline.cluster.json_exchange import broadcast_value, gather_values, gather_values_at
    rank, said = int(sys.argv[1]), {}
    dist.init_process_group("gloo", store=dist.FileStore("store", 3), rank=rank, world_size=3)
    everyone, pair = dist.group.WORLD, dist.new_group([1, 2])
    def told(act):
        try:
            return act()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    said["gathered"] = gather_values({"rank": rank, "long": "x" * 1000 * rank}, everyone)
    said["at one"] = gather_values_at([rank], everyone, receiver=1)
    said["from two"] = broadcast_value(("of", rank), everyone, source=2)
    mistake = UserError("profile bad.json: damaged; delete it")
    said["mistake"] = told(lambda: broadcast_value(mistake if rank == 0 else None, everyone, source=0))
    said["mistake of one"] = told(lambda: gather_values_at(mistake if rank == 1 else rank, everyone, receiver=0))
    said["no JSON"] = told(lambda: gather_values({"a": [1, Path("x")]} if rank == 2 else {}, everyone))
    if rank:
        said["pair"] = gather_values(rank, pair), broadcast_value(rank, pair, source=1)
        said["pair at one"] = gather_values_at(rank, pair, receiver=0)
    said["after all"] = gather_values(rank, everyone)
    Path(f"said-{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()
"""


def test_three_processes_gather_broadcast_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(THREE))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    jobs = [subprocess.Popen([sys.executable, "job.py", str(r)], cwd=tmp_path, env=environment) for r in range(3)]
    try:
        assert [job.wait(timeout=60) for job in jobs] == [0, 0, 0]
    finally:
        for job in jobs:
            job.kill()
    everyone = [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in range(3)]
    for rank, said in enumerate(everyone):
        assert [each["rank"] for each in said["gathered"]] == [0, 1, 2]
        assert said["gathered"][2]["long"] == "x" * 2000
        assert said["at one"] == ([[0], [1], [2]] if rank == 1 else None)
        assert said["from two"] == ["of", 2]
        assert said["mistake"] == said["mistake of one"] == "UserError: profile bad.json: damaged; delete it"
        assert said["no JSON"] == "TypeError: rank 2 of the group: the value['a'][1] is a PosixPath, which is no JSON"
        assert said["after all"] == [0, 1, 2]
    assert [said["pair"] for said in everyone[1:]] == [[[1, 2], 2]] * 2
    assert [said["pair at one"] for said in everyone[1:]] == [[1, 2], None]


def test_a_process_alone_gets_what_others_would() -> None:
    value = {"a": [1, 2.5, None, True], "b": (0.1 + 0.2, -math.inf)}
    expected = {"a": [1, 2.5, None, True], "b": [0.1 + 0.2, -math.inf]}
    assert gather_values(value, None) == gather_values_at(value, None, receiver=0) == [expected]
    assert broadcast_value(value, None, source=0) == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({1: "a number as a key would come back as text"}, "the value has the key 1, which is no text"),
        ([{"a": {2, 3}}], r"the value\[0\]\['a'\] is a set, which is no JSON"),
        (ValueError("not a mistake of the user's"), "the value is a ValueError, which is no JSON"),
        ("x" * MAX_BYTES, f"a value of {MAX_BYTES + 12} bytes is longer than {MAX_BYTES}"),
    ],
)
def test_what_is_no_json_is_told_with_its_place(value: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=f"rank 0 of the group: {complaint}"):
        gather_values(value, None)


def test_a_value_that_holds_itself_is_told() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="rank 0 of the group"):
        gather_values(value, None)


def test_a_mistake_is_raised_as_it_was_given() -> None:
    with pytest.raises(UserError, match=r"^--x 3: expected 4$"):
        broadcast_value(UserError("--x 3: expected 4"), None, source=0)


class Bomb:
    """Its pickle makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_crafted_pickle_is_refused_in_one_line_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, report_failures():
        decoded(pickle.dumps(Bomb(tmp_path / "ran")), 2)
    assert ended.value.code == 1 and list(tmp_path.iterdir()) == []
    line = capsys.readouterr().err
    assert line.startswith("error: rank 2 of the group sent ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{}", b"[]", b'["value"]', b'["else", 1]', b"9" * 5000, b"\xff\0", b""]
)
def test_odd_texts_are_forged(text: bytes) -> None:
    with pytest.raises(Forged, match="rank 1 of the group sent"):
        decoded(text, 1)


# --- text from outside


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", b"\xff", '{"a": ' * 10_000, "9" * 5000])
def test_bad_json_is_one_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^not JSON: [^\n]*$"):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "- " * 3000,
        "a: [",
        "!!int x",
        "!!bool x",
        "!!timestamp x",
        "2024-13-45",
        "? [a]\n: b",
        "\0",
        "!!python/object:os.system x",
    ],
)
def test_bad_yaml_is_one_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not YAML[^\n]*$"):
        parse_yaml(text)
