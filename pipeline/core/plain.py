"""Words and numbers in a form that everybody can read: lines for any terminal, numbers for any reader of JSON.

A terminal (or a pipe, a log) has an encoding, and what it cannot show must not end a job that is well:

    ┏━━━┳━━━┓                    +---+---+
    ┃ a ┃ é ┃   on ASCII becomes | a | \xe9 |
    └───┴───┘                    +---+---+

JSON has no word for infinity and for what is not a number; Python writes NaN all the same, which few others read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_LINES = dict.fromkeys(map(ord, "─━═╌╍"), "-") | dict.fromkeys(map(ord, "│┃║╎╏"), "|")
_BOXES = dict.fromkeys(range(0x2500, 0x2580), "+") | _LINES  # of the block of boxes of Unicode


def to_ascii(text: str) -> str:
    """The text in ASCII: boxes are drawn with - | +, any other letter becomes its number.

    >>> to_ascii("┃ é ┃")
    '| \\\\xe9 |'
    """
    return text.translate(_BOXES).encode("ascii", errors="backslashreplace").decode("ascii")


def write_line(line: str, stream: TextIO) -> None:
    """Writes a line at once; in ASCII where the stream's encoding cannot carry it."""
    try:
        stream.write(line + "\n")
    except UnicodeEncodeError:
        stream.write(to_ascii(line) + "\n")
    stream.flush()


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it as None, which JSON calls null; lists and dicts are copied."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(each) for each in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that any reader takes: what is not finite is null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)
