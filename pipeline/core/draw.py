"""Numbers that look random and depend on nothing but their arguments: the lowest floors draw their chance from here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def draw(*numbers: int) -> int:
    """A whole number of 63 bits that is a function of `numbers` (SplitMix64; Steele et al., OOPSLA 2014)."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & _MASK)) + _GAMMA) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several integers (the finaliser of splitmix64, Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + _GAMMA) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def shuffled(items: Iterable[T], *seed: int) -> list[T]:
    """The items in an order that depends on `seed` and on their number only (Fisher and Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = draw(*seed, last) % (last + 1)
        result[last], result[other] = result[other], result[last]
    return result
