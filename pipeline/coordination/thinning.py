"""Values that have to fit into a message: long lists in them are thinned, all to the same length, until they do.

    {"curve": [100,000 points], "stretches": [700 pairs], "lost": [3]}   ──►   {"curve": [512 of them, the first and
    the last too], "stretches": [512 of them], "lost": [3]}

A law, not a list of names: whatever is put into a report later is thinned like the rest.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

SHORT = 16  # entries that every list keeps: rows and pairs are lists as well

_encode = json.JSONEncoder(separators=(",", ":")).encode


def fit(values: Any, limit_bytes: int, *, newest: Collection[str] = ()) -> Any:
    """JSON-able values whose text has at most `limit_bytes`; unchanged if they fit.

    Args:
        newest: keys of lists that keep their end instead of entries from all over.

    Raises:
        ValueError: even with short lists they do not fit.
    """
    length = min(_longest(values), limit_bytes)
    while (size := len(_encode(values))) > limit_bytes:
        if length <= SHORT:
            raise ValueError(f"{size} bytes without a list of more than {SHORT} entries; {limit_bytes} are taken")
        length = max(SHORT, length // 2)
        values = thinned(values, length, newest)
    return values


def thinned(values: Any, length: int, newest: Collection[str] = (), *, end: bool = False) -> Any:
    """The same values with at most `length` entries in every list: evenly chosen, the first and the last among them.

    >>> thinned({"curve": [0, 1, 2, 3, 4, 5, 6, 7, 8], "spans": [1, 2, 3, 4]}, 3, ["spans"])
    {'curve': [0, 4, 8], 'spans': [2, 3, 4]}
    """
    if isinstance(values, dict):
        return {key: thinned(value, length, newest, end=key in newest) for key, value in values.items()}
    if not isinstance(values, list | tuple):
        return values
    count = len(values)
    if count > length:
        last = max(1, length - 1)
        values = values[-length:] if end else [values[number * (count - 1) // last] for number in range(length)]
    return [thinned(value, length, newest) for value in values]


def _longest(values: Any) -> int:
    """The length of the longest list in these values."""
    if isinstance(values, dict):
        return max(map(_longest, values.values()), default=0)
    if isinstance(values, list | tuple):
        return max(len(values), max(map(_longest, values), default=0))
    return 0
