"""Random numbers that depend on what is computed, not on where: one seed per micro-batch and block.

Dropout of micro-batch 5 in block 3 is then the same in one process, in four stages, and when it is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_MASK = (1 << 64) - 1
GENERATOR_LOCK = Lock()  # torch's generators belong to the process; stages may be threads of one


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several integers (the finaliser of splitmix64, Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Kernels of `device` draw the numbers that follow from `seed`, undisturbed by other threads."""
    with GENERATOR_LOCK:
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield
