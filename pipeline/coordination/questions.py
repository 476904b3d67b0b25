"""A question to the coordinator, and what its answer comes to: a value, or the error that its asker sees.

Call("ready", future) ◄── {"n": 7, "round": 41, ...}                  ──► future.result() = decode(...)
                      ◄── {"n": 7, "error": "too few", "text": "..."} ──► future raises TooFewReplicas
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.coordination.messages import Message
from pipeline.errors import CoordinatorLost, Fenced, PeerLate, TooFewReplicas, UserError


class JobOver(RuntimeError):
    """The other pipelines finished the job while this one was away: it has nothing left to do."""


class Replaced(RuntimeError):
    """A newer incarnation of this process has taken its place: it must end."""


class Welcome(NamedTuple):
    """Where to begin, or to go on: `late` says that the job already runs, so that weights must be copied first."""

    generation: int
    late: bool
    segment: int
    k: int


_ERRORS: Mapping[str, Callable[[str], Exception]] = {
    "fenced": Fenced,
    "too few": TooFewReplicas,
    "timeout": PeerLate,
    "refused": ValueError,
    "over": JobOver,
    "replaced": Replaced,
}


class Call(NamedTuple):
    """A question that waits for its answer."""

    kind: str
    generation: int  # with which it was asked
    payload: bytes
    future: Future[Any]
    decode: Callable[[Message], Any]

    def settle(self, answer: Message) -> None:
        """Resolves its future with what the answer means, an error included."""
        error, text = answer.get("error"), str(answer.get("text", ""))
        if error is None:
            try:
                value = self.decode(answer)
            except (LookupError, TypeError, ValueError):
                self.reject(CoordinatorLost(f"the coordinator answered {self.kind} with {answer!r:.80}"))
            else:
                with suppress(InvalidStateError):  # its asker cancelled it
                    self.future.set_result(value)
        elif error == "refused" and self.kind == "hello":
            self.reject(UserError(text))
        elif isinstance(error, str) and error in _ERRORS:
            self.reject(_ERRORS[error](text))
        else:
            self.reject(CoordinatorLost(f"the coordinator answered {self.kind} with {answer!r:.80}"))

    def reject(self, error: Exception) -> None:
        """Fails its future."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def gathered(answer: Message) -> Any:
    """What a gather comes to for this worker: the rows, if it is the one that gets them."""
    return dict(answer["rows"]) if "rows" in answer else answer["value"]
