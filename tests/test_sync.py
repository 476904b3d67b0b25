from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isclose

import pytest
import torch
from dialogues import Grouping, Replicas, everyone, pairs, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.draw import draw
from pipeline.core.group import Group
from pipeline.errors import GroupBroken
from pipeline.settings import Settings
from pipeline.sync import Synchroniser, make_synchroniser
from pipeline.sync.adpsgd import AdPsgd, MatchedAdPsgd, passive_neighbours
from pipeline.sync.dialogue import Average, Join, average, broadcast, unless_broken
from pipeline.sync.local_sgd import Calendar, LocalSgd
from pipeline.sync.outer import DiLoCo, Outer, OuterRule, SlowMo
from pipeline.sync.preduce import PartialReduce

SIZE = 6
LEARNING_RATE = 0.1


def models(count: int, seed: int = 0) -> list[Tensor]:
    return [torch.randn(SIZE, generator=torch.Generator().manual_seed(draw(seed, p))) for p in range(count)]


def gradient(pipeline: int, x: Tensor, step: int) -> Tensor:
    """Of linear regression on this replica's batch of this step."""
    chance = torch.Generator().manual_seed(draw(pipeline, step))
    a, b = torch.randn(8, SIZE, generator=chance), torch.randn(8, generator=chance)
    return a.T @ (a @ x - b) / 8


def train(
    syncs: Sequence[Synchroniser],
    steps: int,
    *,
    begin: bool = False,
    rate: Callable[[int], float] = lambda step: LEARNING_RATE,
    groups: Grouping = everyone,
    hosts: Sequence[str] | None = None,
) -> Replicas:
    """Plain SGD with every replica's synchroniser, from the same weights."""
    replicas = Replicas(models(1) * len(syncs), groups=groups, hosts=hosts)
    for pipeline, sync in enumerate(syncs):
        if begin:
            sync.begin(replicas.models[pipeline])
    for step in range(1, steps + 1):
        go_on(replicas, syncs, step, rate(step))
    return replicas


def go_on(replicas: Replicas, syncs: Sequence[Synchroniser], step: int, rate: float = LEARNING_RATE) -> None:
    for pipeline, x in replicas.models.items():
        replicas.models[pipeline] = x - rate * gradient(pipeline, x, step)
    replicas.mix(lambda pipeline, x: syncs[pipeline].mix(x, step, learning_rate=rate))


def local_sgd(count: int, rule: OuterRule | None = None, **calendar: int | bool | None) -> list[LocalSgd]:
    return [LocalSgd(Calendar(**calendar), Outer(rule) if rule else None) for _ in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [everyone, pairs, ragged])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "sync",
    [
        PartialReduce(),
        MatchedAdPsgd(),
        AdPsgd(seed=7),
        LocalSgd(Calendar(local_steps=1)),
        LocalSgd(Calendar(local_steps=4, host_steps=2)),
        LocalSgd(Calendar(local_steps=3, initial_steps=2, single_process=False)),
    ],
    ids=["preduce", "matching", "adpsgd", "local", "hierarchical", "post-local"],
)
def test_mixing_preserves_the_mean_of_the_models(sync: Synchroniser, count: int, groups: Grouping) -> None:
    replicas = Replicas(models(count), groups=groups, hosts=["a", "b"] * count)
    before, apart = replicas.mean, replicas.disagreement
    for step in range(1, 13):
        replicas.mix(lambda pipeline, x, step=step: sync.mix(x, step))  # type: ignore[misc]
        torch.testing.assert_close(replicas.mean, before, rtol=0, atol=1e-6)
    assert replicas.disagreement < apart or count == 1


def test_local_sgd_with_one_local_step_is_all_reduce_of_gradients() -> None:
    replicas = train(local_sgd(3, local_steps=1), 12)
    x = models(1)[0]
    for step in range(1, 13):
        x = x - LEARNING_RATE * torch.stack([gradient(pipeline, x, step) for pipeline in range(3)]).mean(0)
    for model in replicas.models.values():
        torch.testing.assert_close(model, x, rtol=0, atol=1e-6)


def test_partial_reduce_with_groups_of_all_is_model_averaging() -> None:
    ours, theirs = train([PartialReduce()] * 4, 10), train(local_sgd(4, local_steps=1), 10)
    assert all(torch.equal(ours.models[pipeline], theirs.models[pipeline]) for pipeline in range(4))


def test_synchronous_adpsgd_in_pairs_of_two_replicas_is_model_averaging() -> None:
    ours, theirs = train([MatchedAdPsgd()] * 2, 10, groups=pairs), train([PartialReduce()] * 2, 10)
    assert all(torch.equal(ours.models[pipeline], theirs.models[pipeline]) for pipeline in range(2))


@pytest.mark.parametrize(
    ("calendar", "picture"),
    [
        (Calendar(local_steps=4), "...A...A...A"),
        (Calendar(local_steps=4, initial_steps=3), "..LA...A...A"),
        (Calendar(local_steps=4, initial_steps=3, single_process=False), "AAAA...A...A"),
        (Calendar(local_steps=4, initial_steps=4), "...L...A...A"),
        (Calendar(local_steps=4, host_steps=2), ".h.A.h.A.h.A"),
        (Calendar(local_steps=4, host_steps=2, initial_steps=3), "..LA.h.A.h.A"),
        (Calendar(local_steps=1), "AAAAAAAAAAAA"),
    ],
)
def test_the_calendar_of_local_sgd(calendar: Calendar, picture: str) -> None:
    letters = {"": ".", "average": "A", "adopt": "L", "host": "h"}
    assert "".join(letters[calendar.after(step)] for step in range(1, 13)) == picture


@given(
    local=st.integers(1, 12), initial=st.integers(0, 12), single=st.booleans(), divisor=st.none() | st.integers(1, 12)
)
@settings(deadline=None, max_examples=100)
def test_mixing_every_so_often_misses_nothing(local: int, initial: int, single: bool, divisor: int | None) -> None:
    host = None if divisor is None or local % divisor else divisor
    calendar = Calendar(local_steps=local, initial_steps=initial, single_process=single, host_steps=host)
    assert all(step % calendar.every == 0 for step in range(1, 100) if calendar.after(step))


def test_single_process_trains_apart_and_then_everyone_adopts_the_first_pipelines_weights() -> None:
    syncs = local_sgd(3, local_steps=100, initial_steps=4)
    replicas = train(syncs, 3)
    assert not replicas.rounds and replicas.disagreement > 0
    alone = train(local_sgd(1, local_steps=100), 4)
    go_on(replicas, syncs, 4)
    assert all(torch.equal(model, alone.models[0]) for model in replicas.models.values())


def test_multiple_processes_average_at_each_initial_step() -> None:
    replicas = train(local_sgd(3, local_steps=100, initial_steps=4, single_process=False), 4)
    synchronous = train(local_sgd(3, local_steps=1), 4)
    assert all(torch.equal(replicas.models[p], synchronous.models[p]) for p in range(3))


def test_hierarchical_local_sgd_averages_inside_hosts_more_often_than_across() -> None:
    hosts = ["a", "a", "b", "b"]
    syncs = local_sgd(4, local_steps=4, host_steps=2)
    replicas = train(syncs, 2, hosts=hosts)
    x = replicas.models
    assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[3]) and not torch.equal(x[0], x[2])
    for step in (3, 4):
        go_on(replicas, syncs, step)
    assert replicas.equal
    assert replicas.rounds == [("host", (0, 1)), ("host", (2, 3)), ("", (0, 1, 2, 3))]


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("rule", [SlowMo(beta=0, alpha=1), DiLoCo(momentum=0, outer_learning_rate=1)])
def test_an_outer_optimiser_without_momentum_and_with_rate_one_is_local_sgd(rule: OuterRule, begin: bool) -> None:
    ours, plain = train(local_sgd(3, rule, local_steps=4), 17, begin=begin), train(local_sgd(3, local_steps=4), 17)
    for pipeline in range(3):
        torch.testing.assert_close(ours.models[pipeline], plain.models[pipeline], rtol=0, atol=1e-6)


def test_diloco_is_torch_sgd_with_nesterov_on_the_averaged_step() -> None:
    x = torch.nn.Parameter(models(1)[0])
    sgd = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    outer = Outer(DiLoCo(momentum=0.9, outer_learning_rate=0.7))
    outer.begin(x.detach())
    for mean in models(5, seed=1):
        x.grad = x.detach() - mean
        sgd.step()
        torch.testing.assert_close(outer.step(mean, LEARNING_RATE), x.detach())


def test_slow_momentum_follows_the_learning_rate_of_the_local_steps() -> None:
    outer = Outer(SlowMo(beta=0.5, alpha=2.0))
    outer.begin(torch.tensor([8.0]))
    assert outer.step(torch.tensor([7.0]), 0.5) == 8 - 2 * 0.5 * (u := (8 - 7) / 0.5)
    assert outer.step(torch.tensor([5.0]), 0.25) == 6 - 2 * 0.25 * (0.5 * u + (6 - 5) / 0.25)


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    outer = Outer(SlowMo())
    outer.begin(torch.ones(2))
    assert torch.equal(outer.step(torch.ones(2), 0.0), torch.ones(2))


@pytest.mark.parametrize("rule", [SlowMo(), DiLoCo()])
def test_replicas_with_an_outer_optimiser_agree_and_learn(rule: OuterRule) -> None:
    replicas = train(local_sgd(3, rule, local_steps=4, initial_steps=4), 40, begin=True)
    assert replicas.equal

    def loss(x: Tensor) -> float:
        return sum(float(gradient(p, x, step).square().sum()) for p in range(3) for step in range(1, 41))

    assert loss(replicas.models[0]) < loss(models(1)[0])


@pytest.mark.parametrize("rule", [SlowMo(), DiLoCo()])
def test_a_joiner_with_the_state_of_another_replica_goes_on_as_that_one(rule: OuterRule) -> None:
    syncs = local_sgd(3, rule, local_steps=2)
    replicas = train(syncs, 6, begin=True)
    joiner = LocalSgd(Calendar(local_steps=2), Outer(rule))
    joiner.load_state({name: tensor.clone() for name, tensor in syncs[0].state().items()})
    syncs[2] = joiner
    replicas.models[2] = replicas.models[0]
    for step in range(7, 11):
        go_on(replicas, syncs, step)
    assert replicas.equal


def test_an_outer_optimiser_leaves_statistics_alone() -> None:
    outer = Outer(DiLoCo(momentum=0.9, outer_learning_rate=0.5))
    outer.begin(torch.tensor([4.0, 9.0]), weights=1)
    x = outer.step(torch.tensor([2.0, 7.0]), LEARNING_RATE)
    assert x[1] == 7 and x[0] != 2
    assert outer.state()["anchor"].numel() == 1


def test_an_outer_optimiser_that_has_not_begun_has_nothing_to_give() -> None:
    ours, theirs = Outer(SlowMo()), Outer(SlowMo())
    theirs.begin(torch.ones(2))
    theirs.load_state(ours.state())
    assert not theirs.state()
    assert torch.equal(theirs.step(torch.zeros(2), LEARNING_RATE), torch.zeros(2)), "the first mean is the anchor"


# AD-PSGD


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_swaps_contract_the_disagreement_for_odd_counts_too(count: int) -> None:
    replicas = Replicas(models(count))
    before, apart = replicas.mean, replicas.disagreement
    for step in range(1, 60):
        replicas.mix(lambda pipeline, x, step=step: AdPsgd(seed=1).mix(x, step))  # type: ignore[misc]
    torch.testing.assert_close(replicas.mean, before, rtol=0, atol=1e-5)
    assert replicas.disagreement < 1e-4 * apart
    assert not replicas.rounds, "nobody forms groups"


@given(st.sets(st.integers(0, 20), min_size=1, max_size=9))
@settings(deadline=None, max_examples=50)
def test_active_replicas_ask_passive_ones_and_those_ask_nobody(live: set[int]) -> None:
    asked = {pipeline: passive_neighbours(tuple(live), pipeline) for pipeline in live}
    passive = {peer for peers in asked.values() for peer in peers}
    assert all(bool(asked[p]) != (p in passive) for p in live if len(live) > 1)
    assert all(set(peers) == passive for peers in asked.values() if peers), "the graph is connected"


def test_who_is_not_alive_asks_nobody() -> None:
    assert passive_neighbours((0, 2), 1) == ()


def test_a_declined_swap_leaves_the_weights_alone() -> None:
    x = torch.ones(2)
    talk = AdPsgd().mix(x, 1)
    next(talk)
    talk.send((0, 0, (0, 1)))
    with pytest.raises(StopIteration) as end:
        talk.send(None)
    assert end.value.value is x


# what is lost


@pytest.mark.parametrize(
    "sync",
    [
        PartialReduce(),
        MatchedAdPsgd(),
        AdPsgd(),
        LocalSgd(Calendar(local_steps=1)),
        LocalSgd(Calendar(initial_steps=1)),
    ],
    ids=["preduce", "matching", "adpsgd", "local", "adopt"],
)
def test_a_lost_member_leaves_the_others_with_their_own_weights(sync: Synchroniser) -> None:
    ours = models(3)
    replicas = Replicas(ours, lost=[0, 1, 2])
    replicas.mix(lambda pipeline, x: sync.mix(x, 1))
    assert all(replicas.models[pipeline] is ours[pipeline] for pipeline in range(3))


def test_a_broken_group_takes_no_outer_step() -> None:
    syncs = local_sgd(2, DiLoCo(), local_steps=1)
    replicas = train(syncs, 1, begin=True)
    anchor = syncs[0].state()["anchor"].clone()
    replicas.lost = [1]
    go_on(replicas, syncs, 2)
    assert torch.equal(syncs[0].state()["anchor"], anchor)


# the verbs


def test_a_group_of_one_asks_for_nothing() -> None:
    x = torch.ones(1)
    for dialogue in (average(Group(1, (3,)), x), broadcast(Group(1, (3,)), 3, x)):
        with pytest.raises(StopIteration) as end:
            next(dialogue)
        assert end.value.value is x


def test_partial_reduce_asks_for_a_group_and_then_for_its_mean() -> None:
    x, group = torch.ones(1), Group(41, (0, 2), "timeout")
    talk = PartialReduce().mix(x, 5)
    assert next(talk) == Join(5)
    assert talk.send(group) == Average(group, x)


def test_other_errors_than_a_lost_member_pass_through() -> None:
    talk = unless_broken(average(Group(1, (0, 1)), torch.ones(1)), torch.zeros(1))
    next(talk)
    with pytest.raises(KeyError):
        talk.throw(KeyError("bug"))
    with pytest.raises(GroupBroken):
        talk = average(Group(1, (0, 1)), torch.ones(1))
        next(talk)
        talk.throw(GroupBroken(1))


# from settings


@pytest.mark.parametrize(
    ("options", "kind", "policy", "even", "blocking", "every"),
    [
        ({"preduce": True}, PartialReduce, "partial", False, True, 1),
        ({"preduce": True, "overlap_sync": True}, PartialReduce, "partial", False, False, 1),
        ({"adpsgd": True}, AdPsgd, "none", False, False, 1),
        ({"adpsgd": True, "preduce": True}, AdPsgd, "none", False, False, 1),
        ({"adpsgd": True, "adpsgd_matching": "sync"}, MatchedAdPsgd, "matching", True, True, 1),
        ({"local_sgd": True}, LocalSgd, "all", True, True, 4),
        ({"local_sgd": True, "local_steps": 6, "host_steps": 3}, LocalSgd, "all", True, True, 3),
        ({"local_sgd": True, "initial_steps": 6}, LocalSgd, "all", True, True, 2),
    ],
)
def test_settings_choose_the_synchroniser(
    options: dict[str, bool], kind: type, policy: str, even: bool, blocking: bool, every: int
) -> None:
    sync = make_synchroniser(Settings(**options))  # type: ignore[arg-type]
    assert isinstance(sync, kind)
    assert (sync.policy, sync.even, sync.blocking, sync.every) == (policy, even, blocking, every)


def test_settings_choose_the_outer_optimiser() -> None:
    for name, momentum, rate in (("slowmo", 0.5, 1.0), ("diloco", 0.9, 0.7)):
        sync = make_synchroniser(Settings(local_sgd=True, local_steps=1, outer=name))
        sync.begin(torch.zeros(1))
        given = make_synchroniser(
            Settings(local_sgd=True, local_steps=1, outer=name, outer_momentum=momentum, outer_learning_rate=rate)
        )
        given.begin(torch.zeros(1))
        for step in (1, 2):
            ours, theirs = (finish(s, torch.ones(1), step) for s in (sync, given))
            assert isclose(float(ours), float(theirs))
    assert not make_synchroniser(Settings(local_sgd=True)).state()


def finish(sync: Synchroniser, x: Tensor, step: int) -> Tensor:
    """The end of a dialogue of a replica that is alone."""
    talk = sync.mix(x, step)
    next(talk)
    with pytest.raises(StopIteration) as end:
        talk.send(Group(step, (0,), "alone"))
    result: Tensor = end.value.value
    return result


def test_all_reduce_is_none_of_the_synchronisers() -> None:
    with pytest.raises(ValueError, match="unknown synchroniser 'allreduce'; choose from"):
        make_synchroniser(Settings())
