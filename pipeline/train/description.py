"""What a checkpoint says of itself: checkpoint.json.

    {"format": 2, "run": "5f0c91", "job": "77a0b2", "number": 7, "step": 200, "values": {...},
     "files": {"__0_0.distcp": [size, CRC-32], ...},
     "sum": CRC-32 of all that, written without spaces in the order of the keys}

A run is a training from its fresh start through all the jobs that resume it; its checkpoints are numbered as they are
written. Format 1 had no run, job, number and sum.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.core.durable import FileSum
from pipeline.core.outside import parse_json

FORMAT = 2
HEAD_BYTES = 512
_HEAD = re.compile(
    rb'^\{\s*"format": 2,\s*"run": "([^"\\]*)",\s*"job": "([^"\\]*)",\s*"number": (\d+),\s*"step": (\d+),'
)


@dataclass(frozen=True)
class Description:
    """A checkpoint's step and values, the sums of its files, and the run and job that wrote it as their `number`th."""

    step: int
    values: dict[str, Any]
    files: dict[str, FileSum]
    run: str = ""
    job: str = ""
    number: int = 0


class Head(NamedTuple):
    """What stands before the values, which may be long."""

    run: str
    job: str
    number: int
    step: int


def head(text: bytes) -> Head:
    """The head of a checkpoint.json from its first `HEAD_BYTES`; of format 1 there is none, which is no run's."""
    match = _HEAD.search(text)
    if match is None:
        return Head("", "", 0, 0)
    return Head(match[1].decode(), match[2].decode(), int(match[3]), int(match[4]))


def to_text(described: Description) -> str:
    """The content of checkpoint.json.

    Raises:
        TypeError, ValueError: a value is no JSON.
    """
    fields = {
        "format": FORMAT,
        "run": described.run,
        "job": described.job,
        "number": described.number,
        "step": described.step,
        "values": described.values,
        "files": described.files,
    }
    written = json.loads(json.dumps(fields))  # as a reader will see it
    return json.dumps({**written, "sum": _sum(written)}, indent=1)


def from_text(text: str | bytes) -> Description:
    """What checkpoint.json says.

    Raises:
        ValueError: it is damaged, or of a format that is not known here; says which.
    """
    try:
        fields = parse_json(text)
    except ValueError:
        raise ValueError("is damaged") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise ValueError("is damaged")
    if fields["format"] > FORMAT:
        raise ValueError(f"is of format {fields['format']}, and this version knows those up to {FORMAT}")
    if fields["format"] > 1 and fields.pop("sum", None) != _sum(fields):
        raise ValueError("is damaged")
    step, values, files = (fields.get(name) for name in ("step", "values", "files"))
    run, job, number = fields.get("run", ""), fields.get("job", ""), fields.get("number", 0)
    if not (isinstance(step, int) and isinstance(values, dict) and isinstance(files, dict)):
        raise ValueError("is damaged")
    if not (isinstance(run, str) and isinstance(job, str) and isinstance(number, int)):
        raise ValueError("is damaged")
    return Description(step, values, {name: _file_sum(pair) for name, pair in files.items()}, run, job, number)


def _file_sum(pair: Any) -> FileSum:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise ValueError("is damaged")
    return FileSum(*pair)


def _sum(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, separators=(",", ":"), sort_keys=True).encode())
