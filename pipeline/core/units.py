"""Rates as people write them: 12.3GB, 10Gbit, 500MB/s, 1e9."""

from __future__ import annotations

_UNITS = {
    "": 1.0,
    "B": 1.0,
    **{f"{prefix}B": 1000.0**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}BIT": 1000.0**power / 8 for power, prefix in enumerate("KMGT", 1)},
}


def bytes_per_second(text: str) -> float:
    """Bytes per second.

    >>> bytes_per_second("100Mbit")
    12500000.0

    Raises:
        ValueError: no number, or no unit that is known.
    """
    word = text.strip().upper().removesuffix("/S")
    number = word.rstrip("BITKMG") if not word.endswith("TB") else word[:-2]
    try:
        return float(number) * _UNITS[word[len(number) :].strip()]
    except KeyError:
        raise ValueError(f"{text!r} is no rate") from None
