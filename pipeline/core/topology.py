"""Who may average with whom: matchings, the two sides of AD-PSGD's graph, and what groups have connected so far.

matching of 5, one step         bipartite graph of 5          components after (0 1) (1 4) (2 3)

  3-0   4-1   2                 active   0   2   4              0-1-4     2-3
                                         |\\ /|\\ /|
                                passive    1   3
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.core.draw import shuffled


def matching(replicas: Iterable[int], *seed: int) -> dict[int, int | None]:
    """Every replica's partner in a perfect matching drawn from `seed`; None for the odd one out."""
    order = shuffled(sorted(replicas), *seed)
    partners: dict[int, int | None] = {}
    for one, other in zip(order[::2], order[1::2], strict=False):
        partners[one], partners[other] = other, one
    if len(order) % 2:
        partners[order[-1]] = None
    return partners


def sides(replicas: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The active and the passive side of AD-PSGD's bipartite graph (Lian et al., ICML 2018), by turns.

    Only active replicas start an average, only passive ones answer, so that no two wait for each other. The active
    side has one more when the number is odd; a replica alone is active and has no neighbour.
    """
    order = sorted(replicas)
    return tuple(order[::2]), tuple(order[1::2])


class Components:
    """Which replicas have met, directly or through others: union-find that replicas may leave and enter.

    Those who met through a replica stay connected when it leaves: what it knew has reached both.
    """

    def __init__(self, members: Iterable[int]) -> None:
        self._nodes = {member: node for node, member in enumerate(members)}
        self._parents = list(range(len(self._nodes)))
        self._sizes = [1] * len(self._nodes)  # of a root: its members that have not left
        self.count = len(self._nodes)

    def find(self, member: int) -> int:
        """The component of a member: equal for two members exactly if they are connected."""
        parents, node = self._parents, self._nodes[member]
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def connect(self, members: Sequence[int]) -> None:
        """These members have met."""
        root = self.find(members[0])
        for member in members[1:]:
            other = self.find(member)
            if other != root:
                if self._sizes[other] > self._sizes[root]:
                    root, other = other, root
                self._parents[other] = root
                self._sizes[root] += self._sizes[other]
                self.count -= 1

    def add(self, member: int) -> None:
        """A member that has met nobody yet."""
        self._nodes[member] = len(self._parents)
        self._parents.append(len(self._parents))
        self._sizes.append(1)
        self.count += 1

    def remove(self, member: int) -> None:
        root = self.find(member)
        del self._nodes[member]
        self._sizes[root] -= 1
        self.count -= self._sizes[root] == 0
