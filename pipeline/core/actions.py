"""The vocabulary of a pipeline: what one worker does to one micro-batch, and its text form.

A program is a sequence of actions. `F3 SA3 RG0 B0 SG0 U0` reads: forward of micro-batch 3, send its activations,
receive the gradient of micro-batch 0, backward, send the gradient on, update the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple


class Op(str, Enum):
    """What is done; the value is the letter in the text form."""

    LOAD = "L"  # take the micro-batch from the data feed: inputs on the first stage, targets on the last
    FORWARD = "F"
    BACKWARD = "B"
    SEND_ACTIVATION = "SA"
    RECV_ACTIVATION = "RA"
    SEND_GRADIENT = "SG"
    RECV_GRADIENT = "RG"
    OPEN_REDUCE = "RO"  # from here on, a bucket of gradients leaves for the replicas as soon as it is final
    REDUCE = "R"  # wait for the mean of the gradients over the replicas of this stage
    NORM = "N"  # agree with the other stages of this pipeline on the norm of the whole gradient
    UPDATE = "U"
    JOIN = "J"  # ask for a group of replicas to mix weights with, so that the answer is there after the update
    WAIT = "W"  # wait for that group
    MIX = "X"  # mix the newest weights with the group's
    SEND_TIED_GRADIENT = "ST"  # of a parameter that another stage owns
    RECV_TIED_GRADIENT = "RT"
    SEND_TIED_WEIGHT = "SW"  # of a parameter that another stage borrows
    RECV_TIED_WEIGHT = "RW"

    def __hash__(self) -> int:  # the enum's own hash is a Python-level call in the hot loop
        return str.__hash__(self)


class Action(NamedTuple):
    """One step of a program; `str(Action(Op.FORWARD, 3)) == "F3"`."""

    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.microbatch}"


Handlers = dict[Op, Callable[[int], object]]  # what to do with a micro-batch, by kind of action


_ACTION = re.compile(r"([A-Z]+)(\d+)")


def parse(text: str) -> list[Action]:
    """The actions written in `text`, separated by blanks.

    >>> parse("F0 SA0")
    [Action(op=<Op.FORWARD: 'F'>, microbatch=0), Action(op=<Op.SEND_ACTIVATION: 'SA'>, microbatch=0)]

    Raises:
        ValueError: a word that is no action.
    """
    actions = []
    for word in text.split():
        match = _ACTION.fullmatch(word)
        if match is None or match[1] not in Op._value2member_map_:
            raise ValueError(f"{word!r} is not an action; write a letter of {[op.value for op in Op]} and a number")
        actions.append(Action(Op(match[1]), int(match[2])))
    return actions


def render(actions: Iterable[Action]) -> str:
    """The text form of `actions`: the inverse of `parse`."""
    return " ".join(map(str, actions))
