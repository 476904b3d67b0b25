"""What --emulate asks for: how long a stage waits instead of computing, and how many weights it has to share."""

from __future__ import annotations

import math
from typing import NamedTuple

from pipeline.errors import UserError


class Emulation(NamedTuple):
    """Of each stage: milliseconds of a micro-batch's forward and backward, and megabytes (10^6) of weights."""

    forward_ms: float
    backward_ms: float
    param_mb: float = 1.0


def parse_emulate(text: str) -> Emulation:
    """From 'FORWARD_MS,BACKWARD_MS' or 'FORWARD_MS,BACKWARD_MS,PARAMETERS_MB'; raises `UserError`.

    >>> parse_emulate("2,3")
    Emulation(forward_ms=2.0, backward_ms=3.0, param_mb=1.0)
    """
    try:
        forward_ms, backward_ms, *rest = (float(word) for word in text.split(","))
        emulation = Emulation(forward_ms, backward_ms, *rest)
    except (ValueError, TypeError):
        raise UserError(
            f"--emulate {text}: expected milliseconds of a forward and a backward, and megabytes of weights "
            "if not 1, as in 2,3 or 2,3,10"
        ) from None
    if not all(math.isfinite(number) for number in emulation) or min(emulation) < 0 or emulation.param_mb == 0:
        raise UserError(f"--emulate {text}: expected times of 0 or more and megabytes above 0, as in 2,3 or 2,3,10")
    return emulation
