"""What comes from outside, in files or from processes that know the key, is never a traceback and ends nobody."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heturun.launch.cluster import load_cluster
from pipeline.coordination.client import Client
from pipeline.coordination.director import Director
from pipeline.coordination.messages import JobRules, Malformed
from pipeline.errors import CoordinatorLost, UserError
from pipeline.models.bert_config import read_shape
from pipeline.models.costs import _read
from pipeline.simulation.parse_profile import parse_profile

DEEP = "[" * 100_000


def hetero(path: Path) -> None:
    parse_profile(str(path), read=lambda file: Path(file).read_text())


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("cluster.yml", load_cluster),
        ("slow.yml", hetero),
        ("profile.json", _read),
        ("bert.json", lambda path: read_shape(str(path))),
    ],
)
@pytest.mark.parametrize(
    "text", [DEEP[:3000], DEEP, "{" * 3000, "!!int x", "\0", "- !!timestamp x", "", "[" + "9" * 5000]
)
def test_a_file_that_makes_no_sense_is_one_line(
    tmp_path: Path, name: str, read: Callable[[Path], Any], text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as told:
        read(tmp_path / name)
    assert "\n" not in str(told.value)


# --- the coordinator

RULES = JobRules(stages=2, pipelines=2).message()
HELLO = {
    "type": "hello", "n": 1, "stage": 0, "pipeline": 0, "incarnation": 0, "mesh": "", "timeout": 9.0, "rules": RULES,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"stages": 0}, {"stages": "2"}, {"stages": 10**12}, {"pipelines": -1}, {"pipelines": True}, {"policy": []},
        {"policy": "sometimes"}, {"wait": {}}, {"max_group": 1}, {"max_group": 2.5}, {"connect_within": 0},
        {"seed": None}, {"even": 1}, {"heartbeat_timeout_s": float("nan")}, {"heartbeat_timeout_s": float("inf")},
        {"heartbeat_timeout_s": "3"}, {"hosts": [["a"]]}, {"hosts": "ab"}, {"hosts": [[1, 2], [3, 4]]}, {"hosts": 7},
    ],
)  # fmt: skip
def test_odd_rules_in_the_first_hello_are_dropped_and_the_next_hello_counts(change: dict[str, Any]) -> None:
    director = Director(0.0)
    with pytest.raises(Malformed, match="rules"):
        director.handle(b"odd", {**HELLO, "rules": {**RULES, **change}}, 0.0)
    assert not director.met and director.next_wake is None
    director.handle(b"p0.s0.i0", HELLO, 0.0)
    assert director.met


ODD = (
    None,
    True,
    -1,
    0,
    1,
    2,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "all",
    "any",
    [],
    [["a"]],
    {},
    {"a": 1},
    RULES,
)
KINDS = (
    "hello", "ready", "ticket", "final", "gather", "first", "tell", "giver", "refreshed", "suspect", "bye", "ping", "?",
)  # fmt: skip
FIELDS: dict[str, Any] = {
    **HELLO, "g": 0, "a": 0, "segment": 0, "k": 0, "step": 1, "scope": "all", "key": "k", "fold": "any", "value": 1,
    "attempt": 0, "not_from": -1, "done": 0,
}  # fmt: skip


def strange(chance: random.Random) -> dict[str, Any]:
    """A message with a few fields that are missing, or hold something else."""
    message = {**FIELDS, "n": chance.randrange(2, 9), "type": chance.choice(KINDS)}
    for name in chance.sample(sorted(FIELDS), chance.randrange(4)):
        if chance.random() < 0.3:
            message.pop(name)
        else:
            message[name] = chance.choice(ODD)
    return message


@pytest.mark.parametrize("seed", range(10))
def test_no_message_ends_the_coordinator(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        director = Director(0.0)
        for place, (stage, pipeline) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            director.handle(b"abcd"[place : place + 1], {**HELLO, "stage": stage, "pipeline": pipeline}, 0.0)
        director.handle(b"a", {**FIELDS, "type": "begin", "n": 2, "first": 0, "stop": 9}, 0.0)
        for at in range(12):
            try:
                answers = director.handle(chance.choice([b"a", b"b", b"c", b"x"]), strange(chance), at / 10)
            except Malformed as error:
                assert "\n" not in str(error)
            else:
                json.dumps([answer for _, answer in answers])
            director.tick(at / 10)


# --- its clients


@pytest.mark.parametrize(
    "message",
    [
        {}, {"type": "unheard of"}, {"type": ["lost"]}, {"type": "lost"}, {"type": "lost", "pipeline": "1", "g": 1},
        {"type": "joined", "pipeline": 1, "g": 1}, {"type": "stop"}, {"n": [7]}, {"n": 99}, {"n": "1", "error": 3},
    ],
)  # fmt: skip
def test_a_worker_says_so_and_goes_on_when_it_does_not_understand(
    message: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client("127.0.0.1:1", b"k" * 32, JobRules(stages=1, pipelines=2), stage=0, pipeline=0)
    for _ in range(2):
        client._take(message)
    assert client.failure is None
    assert capsys.readouterr().err.count("\n") == (0 if "n" in message else 1)
    client.close()


@pytest.mark.parametrize("answer", [{}, {"ticket": 3}, {"more": 1}, {"error": "unheard of"}, {"error": ["fenced"]}])
def test_an_answer_that_is_none_is_told_to_who_asked(answer: dict[str, Any]) -> None:
    client = Client("127.0.0.1:1", b"k" * 32, JobRules(stages=1, pipelines=2), stage=0, pipeline=0)
    asked = client.ticket(0, 0)
    client._take({"n": 1, **answer})
    with pytest.raises(CoordinatorLost, match="answered ticket with"):
        asked.result(0)
    client.close()
