"""What a synchroniser is: how often replicas mix, with whom, and the dialogue by which they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from pipeline.sync.dialogue import Dialogue


class Synchroniser(Protocol):
    """Keeps the replicas of one stage together.

    Attributes (read when the program is built):
        policy: how the coordinator forms its groups: "partial", "all", "matching", or "none" when it never joins any.
        even: every pipeline does the same number of batches; else fast ones do more.
        blocking: the next update waits for the mixing.
        every: updates between two calls of `mix`.
        remembers: the names of what `state` may give; each is a vector like the weights.
    """

    @property
    def policy(self) -> str: ...
    @property
    def even(self) -> bool: ...
    @property
    def blocking(self) -> bool: ...
    @property
    def every(self) -> int: ...
    @property
    def remembers(self) -> frozenset[str]: ...

    def begin(self, x: Tensor, weights: int | None = None) -> None:
        """Hears of the x that all replicas start from; only outer optimisers listen, and else start at the first mean.

        The first `weights` entries are weights (None: all); the rest is optimiser state and statistics, which are
        only ever averaged.
        """

    def mix(self, x: Tensor, step: int, *, learning_rate: float = 1.0) -> Dialogue[Tensor]:
        """The weights to go on with after update `step`.

        Args:
            x: (n,), not written; its content counts from the first answer on.
            step: from 1.
            learning_rate: that of the updates since the last mean; only SlowMo asks for it.

        Returns:
            New memory, or x itself when nothing happened (no group, nobody else in it, or a member was lost).
        """

    def state(self) -> dict[str, Tensor]:
        """What a joining replica or a resumed run needs besides the weights; live tensors, not copies."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, of another replica or an earlier run; what is absent has not begun."""


class Stateless:
    """The part of a `Synchroniser` that remembers nothing."""

    @property
    def remembers(self) -> frozenset[str]:
        return frozenset()

    def begin(self, x: Tensor, weights: int | None = None) -> None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        return None
