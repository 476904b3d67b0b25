"""Matchings, the two sides of AD-PSGD's graph, and components."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.draw import draw, shuffled
from pipeline.core.topology import Components, matching, sides

replicas = st.sets(st.integers(0, 50), max_size=12)


@given(replicas, st.integers(), st.integers(0, 100))
def test_a_matching_is_perfect_and_known_to_all_without_messages(members: set[int], seed: int, step: int) -> None:
    partners = matching(members, seed, step)
    assert partners.keys() == members
    assert all(other is None or (partners[other] == one and other != one) for one, other in partners.items())
    assert list(partners.values()).count(None) == len(members) % 2
    assert partners == matching(sorted(members, reverse=True), seed, step)


def test_every_pair_is_matched_as_often() -> None:
    pairs = Counter((one, other) for step in range(3000) for one, other in matching(range(6), 7, step).items())
    assert len(pairs) == 30 and min(pairs.values()) > 500 and max(pairs.values()) < 700  # 600 each on average


@given(replicas)
def test_a_bipartite_graph_has_all_replicas_on_one_of_two_even_sides(members: set[int]) -> None:
    active, passive = sides(members)
    assert sorted((*active, *passive)) == sorted(members)
    assert len(active) - len(passive) == len(members) % 2


@given(
    st.lists(st.tuples(st.sampled_from(["meet", "add", "remove"]), st.sets(st.integers(0, 9), min_size=1)), max_size=40)
)
def test_components_are_those_of_the_graph_of_meetings(events: list[tuple[str, set[int]]]) -> None:
    components, parts = Components(range(5)), [{member} for member in range(5)]
    for name, some in events:
        present = set().union(*parts)
        if name == "meet" and some & present:
            members = some & present
            components.connect(sorted(members))
            touched = [part for part in parts if part & members]
            parts = [part for part in parts if not part & members] + [set().union(*touched)]
        elif name == "add" and min(some) not in present:
            components.add(min(some))
            parts.append({min(some)})
        elif name == "remove" and min(some) in present:
            components.remove(min(some))
            parts = [rest for part in parts if (rest := part - {min(some)})]
        assert components.count == len(parts)
        roots = [{components.find(member) for member in part} for part in parts]
        assert all(len(root) == 1 for root in roots) and len(set().union(*roots)) == len(parts)


def test_who_met_through_one_that_left_stays_connected() -> None:
    components = Components(range(3))
    components.connect([0, 1])
    components.connect([1, 2])
    components.remove(1)
    assert components.count == 1 and components.find(0) == components.find(2)


def test_draws_depend_on_every_number_and_on_nothing_else() -> None:
    draws = {draw(*numbers) for numbers in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,))}
    assert len(draws) == 8 and all(0 <= number < 2**63 for number in draws)
    assert draw(3, 4) == draw(3, 4)


def test_shuffled_items_stand_anywhere_as_often() -> None:
    places = Counter((item, place) for seed in range(4000) for place, item in enumerate(shuffled("abcd", seed)))
    assert len(places) == 16 and min(places.values()) > 880 and max(places.values()) < 1120
