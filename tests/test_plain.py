"""Lines for terminals that know no Unicode, and JSON that any reader takes."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest

from pipeline.core.plain import finite, to_ascii, to_json, write_line


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def shown(line: str, encoding: str) -> str:
    stream = terminal(encoding)
    write_line(line, stream)
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


def test_boxes_become_ascii_and_other_letters_their_numbers() -> None:
    assert to_ascii("┏━━┓\n┃ é│\n└──┘") == "+--+\n| \\xe9|\n+--+"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", "┃ é ┃\n"), ("ascii", "| \\xe9 |\n"), ("latin-1", "| \\xe9 |\n")]
)
def test_a_line_is_shown_on_every_terminal(encoding: str, expected: str) -> None:
    assert shown("┃ é ┃", encoding) == expected


def test_what_an_encoding_can_carry_is_left_alone() -> None:
    assert shown("é", "latin-1") == "é\n"


def test_json_has_null_for_what_is_not_finite_wherever_it_stands() -> None:
    values = {"curve": [(1, math.nan), (2, 0.5)], "ranks": [{"mixing": {"distance": math.inf}, "host": "a"}]}
    assert finite(values) == {"curve": [[1, None], [2, 0.5]], "ranks": [{"mixing": {"distance": None}, "host": "a"}]}

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(to_json(values, indent=1), parse_constant=refuse) == finite(values)
