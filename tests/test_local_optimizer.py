"""A wrapped optimiser keeps the models of real Gloo processes together; every scenario below runs in all of them.

As a program it is one process of that world: `python tests/test_local_optimizer.py RANK FOLDER`.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, shared_data
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import pipeline
from pipeline.errors import PeerLost

WORLD = 4
LIMIT_S = 240  # for a world that should take ten seconds; the machine may be busy

Arguments = dict[str, Any]


def model_of(seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)


def backward(model: nn.Module, step: int, rank: int) -> Tensor:
    inputs, targets = batch_of(step, rank)
    loss: Tensor = ((model(inputs) - targets) ** 2).mean()
    loss.backward()
    return loss


def wrap(local: Optimizer, alg: str = "local_sgd", group: Any = None, size: int = WORLD, **arguments: Any) -> Any:
    return pipeline.get_distributed_optimizer(alg, local, dist.get_rank(), size, group, arguments)


def train(model: nn.Module, optimizer: Optimizer, steps: int, *, first: int = 1) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step, dist.get_rank())
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def everyones(x: Tensor) -> list[Tensor]:
    """The tensor of every rank."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


def agree(x: Tensor) -> bool:
    return all(torch.equal(x, other) for other in everyones(x))


def picture(model: nn.Module, optimizer: Optimizer, steps: int) -> str:
    """ "=" for a step after which all models are equal, "." for another."""
    drawn = ""
    for step in range(1, steps + 1):
        train(model, optimizer, 1, first=step)
        drawn += "=" if agree(flat(model)) else "."
    return drawn


# ------------------------------------------------------------------------------------ scenarios, in every process


def all_begin_with_the_leaders_model() -> None:
    rank = dist.get_rank()
    model = model_of(rank)
    norm = nn.BatchNorm1d(3).double()
    norm.num_batches_tracked += rank
    half = nn.Parameter(torch.full((3,), rank + 1.5, dtype=torch.bfloat16))
    turned = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)).t())
    wrap(SGD([*model.parameters(), half, turned], lr=0.1), buffers=norm.buffers())
    assert torch.equal(flat(model), flat(model_of(0)))
    assert half.tolist() == [1.5] * 3 and norm.num_batches_tracked == 0
    assert torch.equal(turned, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t())


def averaging_every_step_is_averaging_gradients() -> None:
    """x - lr g_i has the mean x - lr mean(g_i): with H = 1 plain SGD is all-reduce."""
    model, reference = model_of(dist.get_rank()), model_of(0)
    optimizer = wrap(SGD(model.parameters(), lr=0.1, weight_decay=0.01), local_steps=1)
    plain = SGD(reference.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(1, 8):
        train(model, optimizer, 1, first=step)
        plain.zero_grad()
        for rank in range(WORLD):
            (inputs, targets) = batch_of(step, rank)
            (((reference(inputs) - targets) ** 2).mean() / WORLD).backward()
        plain.step()
        torch.testing.assert_close(flat(model), flat(reference), rtol=1e-6, atol=1e-6)


def models_meet_when_the_picture_says_so() -> None:
    for expected, arguments in (
        ("..=..=..=", {"local_steps": 3}),
        ("...=...=.", {}),
        ("====.=..=", {"local_steps": 3, "initial_steps": 4, "initial_step_method": "multiple_processes"}),
        ("...=.=..=", {"local_steps": 3, "initial_steps": 4, "init_step_method": "single_process"}),
        ("...=.=..=", {"local_steps": 3, "initial_steps": 4}),
    ):
        model = model_of(dist.get_rank())
        optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9), "post_local_sgd", **arguments)
        assert picture(model, optimizer, 9) == expected, arguments


def the_average_is_the_mean_and_keeps_the_mean() -> None:
    model = model_of(dist.get_rank())
    optimizer = wrap(SGD(model.parameters(), lr=0.1), local_steps=2)
    alone = copy.deepcopy(model)
    train(alone, SGD(alone.parameters(), lr=0.1), 2)
    train(model, optimizer, 2)
    torch.testing.assert_close(flat(model), torch.stack(everyones(flat(alone))).mean(0), rtol=1e-6, atol=1e-6)


def after_a_single_process_phase_all_have_what_the_leader_did() -> None:
    model = model_of(dist.get_rank())
    optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9), initial_steps=5, local_steps=5)
    train(model, optimizer, 5)
    leader = model_of(0)
    plain = SGD(leader.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 6):
        plain.zero_grad()
        backward(leader, step, 0)
        plain.step()
    assert torch.equal(flat(model), flat(leader))


def groups_that_opt_out_stay_each_processs_own() -> None:
    rank = dist.get_rank()
    shared, own = model_of(rank), nn.Parameter(torch.full((2 + rank,), float(rank)))  # not even the same shape
    local = SGD([{"params": shared.parameters()}, {"params": [own], "allow_data_parallelism": False}], lr=0.1)
    optimizer = wrap(local, local_steps=1, momentum="average")
    for step in range(2):
        optimizer.zero_grad()
        own.sum().backward()
        backward(shared, step, rank)
        optimizer.step()
    assert agree(flat(shared))
    torch.testing.assert_close(own.detach(), torch.full((2 + rank,), rank - 0.2))
    saved = optimizer.state_dict()
    saved["param_groups"][1].pop("allow_data_parallelism")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["allow_data_parallelism"] is False
    assert "allow_data_parallelism" not in optimizer.param_groups[0]


def a_group_may_be_some_of_the_ranks() -> None:
    rank = dist.get_rank()
    members = [3, 1] if rank % 2 else [0, 2]
    for group in (members, dist.new_group([1, 3]) if rank % 2 else None):
        if rank % 2 == 0 and group is None:
            dist.new_group([1, 3])
            continue
        model = model_of(rank)
        optimizer = wrap(SGD(model.parameters(), lr=0.1), group=group, size=2, local_steps=2)
        assert torch.equal(flat(model), flat(model_of(min(members))))
        assert (optimizer.rank, optimizer.group, optimizer.world_size) == (rank, sorted(members), 2)
        train(model, optimizer, 2)
    weights = everyones(flat(model))
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    model = model_of(rank)
    train(model, wrap(SGD(model.parameters(), lr=0.1), group=[rank], size=1), 4)
    assert not agree(flat(model))


def a_hierarchy_averages_in_the_node_first() -> None:
    rank = dist.get_rank()
    for node in ({"node_size": 2}, {"node_id": rank // 2}):
        model = model_of(rank)
        local = SGD(model.parameters(), lr=0.1)
        optimizer = wrap(local, "hierarchical_local_sgd", local_sync_freq=2, global_sync_freq=2, **node)
        drawn = ""
        for step in range(1, 9):
            train(model, optimizer, 1, first=step)
            kinds = len({tuple(x.tolist()) for x in everyones(flat(model))})
            drawn += {WORLD: ".", 2: "n", 1: "A"}[kinds]
        assert drawn == ".n.A.n.A", node
    model = model_of(rank)
    optimizer = wrap(SGD(model.parameters(), lr=0.1), "hierarchical_local_sgd")  # one host: every average is of all
    assert picture(model, optimizer, 9) == "...=...=."


def momentum_is_kept_averaged_or_reset() -> None:
    rank = dist.get_rank()
    for make in (partial(SGD, lr=0.1, momentum=0.9), Adam, Adagrad):
        states = {}
        for policy in ("keep", "average", "reset"):
            model = model_of(rank)
            optimizer = wrap(make(model.parameters()), local_steps=2, momentum=policy)
            train(model, optimizer, 2)
            entry = optimizer.state[model.weight]
            names = [name for name, value in entry.items() if value.shape == model.weight.shape]
            states[policy] = torch.cat([entry[name].reshape(-1) for name in names])
            train(model, optimizer, 2, first=3)  # what is left of the state goes on
            assert agree(flat(model)), (make, policy)
        assert not agree(states["keep"])
        torch.testing.assert_close(states["average"], torch.stack(everyones(states["keep"])).mean(0))
        assert not states["reset"].any()


def a_copy_takes_the_leaders_momentum_if_momentum_is_averaged() -> None:
    model = model_of(dist.get_rank())
    optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9), initial_steps=2, momentum="average")
    train(model, optimizer, 2)
    assert agree(optimizer.state[model.weight]["momentum_buffer"])


def a_parameter_without_gradients_somewhere_upsets_nobody() -> None:
    """A state that a process does not have takes part as zero."""
    model = model_of(dist.get_rank())
    optimizer = wrap(Adam(model.parameters()), local_steps=1, momentum="average")
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, dist.get_rank())
        if dist.get_rank() != 2:
            model.bias.grad = None
        optimizer.step()
    assert agree(flat(model)) and agree(optimizer.state[model.weight]["exp_avg"])
    assert (model.bias in optimizer.state) == (dist.get_rank() == 2)


def buffers_are_averaged_with_the_parameters() -> None:
    rank = dist.get_rank()
    model = nn.Sequential(model_of(rank), nn.BatchNorm1d(3), nn.Linear(3, 3))
    optimizer = wrap(SGD(model.parameters(), lr=0.1), local_steps=2, buffers=model.buffers())
    mean = model[1].running_mean
    train(model, optimizer, 1)
    assert not agree(mean)
    train(model, optimizer, 1, first=2)
    assert agree(mean) and agree(flat(model)) and model[1].num_batches_tracked == 2


def low_precision_is_averaged_in_high() -> None:
    rank = dist.get_rank()
    x = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = wrap(SGD([x], lr=1.0), local_steps=1)
    x.grad = torch.tensor([-40000.0, -1.0 - rank], dtype=torch.float16)
    optimizer.step()
    assert x.tolist() == [40000.0, 2.5]


def slowmo_steps_from_mean_to_mean() -> None:
    rank = dist.get_rank()
    model, mirror = model_of(rank), model_of(0)
    optimizer = wrap(SGD(model.parameters(), lr=0.05), local_steps=2, slowmo_beta=0.5, slowmo_alpha=0.8)
    x, u = flat(mirror), torch.zeros(18)
    for first in (1, 3, 5):
        nn.utils.vector_to_parameters(x.clone(), mirror.parameters())
        train(mirror, SGD(mirror.parameters(), lr=0.05), 2, first=first)
        mean = torch.stack(everyones(flat(mirror))).mean(0)
        u = 0.5 * u + (x - mean) / 0.05
        x = x - 0.8 * 0.05 * u
        train(model, optimizer, 2, first=first)
        torch.testing.assert_close(flat(model), x, rtol=1e-5, atol=1e-6)


def diloco_is_nesterov_on_the_averaged_delta() -> None:
    rank = dist.get_rank()
    model, mirror, outer = model_of(rank), model_of(0), model_of(0)
    optimizer = wrap(AdamW(model.parameters(), lr=0.01), local_steps=3, outer_learning_rate=0.7, outer_momentum=0.9)
    local = AdamW(mirror.parameters(), lr=0.01)
    nesterov = SGD(outer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for first in (1, 4, 7):
        mirror.load_state_dict(outer.state_dict())
        train(mirror, local, 3, first=first)
        mean = torch.stack(everyones(flat(mirror))).mean(0)
        delta = flat(outer) - mean
        outer.weight.grad, outer.bias.grad = delta[:15].view(3, 5).clone(), delta[15:].clone()
        nesterov.step()
        train(model, optimizer, 3, first=first)
        torch.testing.assert_close(flat(model), flat(outer), rtol=1e-5, atol=1e-6)


def an_outer_step_begins_at_the_weights_of_the_first_step() -> None:
    """Weights loaded after the optimiser was made are no progress of training."""
    model = model_of(0)
    optimizer = wrap(SGD(model.parameters(), lr=0.0), local_steps=1, outer_learning_rate=0.7)
    model.load_state_dict(model_of(5).state_dict())
    train(model, optimizer, 1)
    torch.testing.assert_close(flat(model), flat(model_of(5)))


def outer_settings() -> tuple[Arguments, ...]:
    return {}, {"slowmo_beta": 0.6}, {"outer_momentum": 0.5}, {"momentum": "average"}


def a_run_resumes_as_if_it_had_not_stopped() -> None:
    rank = dist.get_rank()
    for arguments in outer_settings():
        make = partial(SGD, lr=0.05, momentum=0.9)
        model = model_of(rank)
        optimizer = wrap(make(model.parameters()), local_steps=3, initial_steps=1, **arguments)
        train(model, optimizer, 5)
        kept = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), kept)
        train(model, optimizer, 5, first=6)

        again = model_of(rank + 10)
        resumed = wrap(make(again.parameters()), local_steps=3, initial_steps=1, **arguments)
        kept.seek(0)
        weights, state = torch.load(kept, weights_only=True)
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        assert resumed.step_counter == 5
        train(again, resumed, 5, first=6)
        assert torch.equal(flat(again), flat(model)), arguments


def another_ranks_file_changes_nobodys_rank() -> None:
    rank = dist.get_rank()
    model = model_of(rank)
    optimizer = wrap(SGD(model.parameters(), lr=0.05, momentum=0.9), local_steps=3)
    train(model, optimizer, 4)
    files: list[Any] = [None] * WORLD
    dist.all_gather_object(files, optimizer.state_dict())
    assert [file["rank"] for file in files] == [0, 1, 2, 3]

    again = model_of(rank)
    resumed = wrap(SGD(again.parameters(), lr=0.7, momentum=0.9))
    resumed.load_state_dict(files[0])
    assert (resumed.rank, resumed.world_size, resumed.group) == (rank, WORLD, [0, 1, 2, 3])
    assert (resumed.step_counter, resumed.local_steps, resumed.param_groups[0]["lr"]) == (4, 3, 0.05)
    assert picture(again, resumed, 6) == ".=..=."  # c = 5, 6, ...
    SGD(again.parameters(), lr=0.1).load_state_dict(files[0])  # a plain optimiser reads it, too
    resumed.load_state_dict(SGD(again.parameters(), lr=0.3).state_dict())  # and is read
    assert (resumed.step_counter, resumed.param_groups[0]["lr"]) == (10, 0.3)


def an_added_group_begins_as_the_leaders() -> None:
    rank = dist.get_rank()
    for arguments in outer_settings():
        model, late = model_of(rank), model_of(rank + 4)
        optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9), local_steps=2, **arguments)
        train(model, optimizer, 3)
        optimizer.add_param_group({"params": late.parameters(), "lr": 0.2})
        assert torch.equal(flat(late), flat(model_of(4)))
        both = nn.Sequential(model, nn.Linear(3, 5, bias=False).requires_grad_(False), late)
        train(both, optimizer, 1, first=4)
        assert agree(flat(model)) and agree(flat(late))


def a_scaler_that_skips_one_processs_step_holds_nobody_up() -> None:
    """torch's GradScaler would not call `step` at all, and the others would wait for this process for ever."""
    rank = dist.get_rank()
    model, plain = model_of(rank), model_of(0)
    optimizer = wrap(SGD(model.parameters(), lr=0.1), local_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in (1, 2):
        optimizer.zero_grad()
        inputs, targets = batch_of(step, rank)
        loss = ((model(inputs) - targets) ** 2).mean()
        scaler.scale(loss * (math.inf if (rank, step) == (1, 2) else 1)).backward()
        if rank == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.step_counter == 2 and agree(flat(model)) and bool(flat(model).isfinite().all())
    steps = 1 if rank == 1 else 2
    train(plain, SGD(plain.parameters(), lr=0.1), steps)
    torch.testing.assert_close(flat(model), torch.stack(everyones(flat(plain))).mean(0), rtol=1e-5, atol=1e-6)


def processes_that_do_not_agree_are_told_at_once() -> None:
    rank = dist.get_rank()
    model = model_of(0)
    with pytest.raises(ValueError, match=r"settings of rank 3: .*local_steps=9.*; of rank 0: .*local_steps=4"):
        wrap(SGD(model.parameters(), lr=0.1), local_steps=9 if rank == 3 else 4)
    wrap(SGD(model.parameters(), lr=0.1), **({"local_steps": 4} if rank else {}))  # a default that is given is the same
    with pytest.raises(ValueError, match="shared tensors of rank 2"):
        wrap(SGD(nn.Linear(5 + (rank == 2), 3).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="node_size is 3, which does not divide the group's 4 processes"):
        wrap(SGD(model.parameters(), lr=0.1), "hierarchical_local_sgd", node_size=3)


def a_wrong_place_in_the_world_is_an_error() -> None:
    rank = dist.get_rank()
    local = SGD(model_of(0).parameters(), lr=0.1)
    make = partial(pipeline.get_distributed_optimizer, "local_sgd", local)
    with pytest.raises(ValueError, match="world_size is 3, but the group has 4 processes"):
        make(rank, 3, None, {})
    with pytest.raises(ValueError, match="rank is 7, but"):
        make(7, WORLD, None, {})
    with pytest.raises(ValueError, match="without this process"):
        make(rank, 1, [(rank + 1) % WORLD], {})
    with pytest.raises(ValueError, match=r"group is \[0, 9\]; give different ranks from 0 to 3"):
        make(rank, 2, [0, 9], {})
    meta = SGD([nn.Parameter(torch.empty(2, device="meta"))], lr=0.1)
    with pytest.raises(ValueError, match="parameters on meta, but the process group only has"):
        wrap(meta)


def a_process_that_does_not_come_is_named_by_the_others() -> None:
    """The last scenario: it breaks the connections."""
    rank = dist.get_rank()
    group = dist.new_group(list(range(WORLD)), timeout=timedelta(seconds=60))
    model = model_of(rank)
    optimizer = wrap(SGD(model.parameters(), lr=0.1), group=group, local_steps=1)
    if rank != 1:
        with pytest.raises(PeerLost, match=rf"rank {rank} waited for the models of step 1 of ranks \[0, 1, 2, 3\]"):
            train(model, optimizer, 1)


SCENARIOS: tuple[Callable[[], None], ...] = (
    all_begin_with_the_leaders_model,
    averaging_every_step_is_averaging_gradients,
    models_meet_when_the_picture_says_so,
    the_average_is_the_mean_and_keeps_the_mean,
    after_a_single_process_phase_all_have_what_the_leader_did,
    groups_that_opt_out_stay_each_processs_own,
    a_group_may_be_some_of_the_ranks,
    a_hierarchy_averages_in_the_node_first,
    momentum_is_kept_averaged_or_reset,
    a_copy_takes_the_leaders_momentum_if_momentum_is_averaged,
    a_parameter_without_gradients_somewhere_upsets_nobody,
    buffers_are_averaged_with_the_parameters,
    low_precision_is_averaged_in_high,
    slowmo_steps_from_mean_to_mean,
    diloco_is_nesterov_on_the_averaged_delta,
    an_outer_step_begins_at_the_weights_of_the_first_step,
    a_run_resumes_as_if_it_had_not_stopped,
    another_ranks_file_changes_nobodys_rank,
    an_added_group_begins_as_the_leaders,
    a_scaler_that_skips_one_processs_step_holds_nobody_up,
    processes_that_do_not_agree_are_told_at_once,
    a_wrong_place_in_the_world_is_an_error,
    a_process_that_does_not_come_is_named_by_the_others,
)


def main() -> None:
    """All scenarios up to the first that fails here; its peers fail at their deadline."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    results: dict[str, str] = {}
    for scenario in SCENARIOS:
        try:
            scenario()
            results[scenario.__name__] = "passed"
        except BaseException:
            results[scenario.__name__] = f"rank {rank}: {traceback.format_exc()}"
            break
    (folder / f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # the last scenario left connections that nobody can close in order


# ------------------------------------------------------------------------------------------------ the tests proper


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What every process says of every scenario."""
    folder = tmp_path_factory.mktemp("world")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stdout=log, stderr=log)
        for rank in range(WORLD)
        for log in [open(folder / f"{rank}.log", "wb")]  # noqa: SIM115
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        for worker in workers:
            worker.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the results that are missing say so
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    logs = "".join((folder / f"{rank}.log").read_text() for rank in range(WORLD))
    return [json.loads(file.read_text()) if file.exists() else {"": f"no results: {logs}"} for file in files]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_a_world_of_processes(scenario: Callable[[], None], outcomes: list[dict[str, str]]) -> None:
    said = [results.get(scenario.__name__, f"not reached: {list(results.values())[-1]}") for results in outcomes]
    assert said == ["passed"] * WORLD, "\n".join(said)


def alone(local: Optimizer, alg: str = "local_sgd", **arguments: Any) -> Any:
    """Wrapped in a process without connections."""
    return pipeline.get_distributed_optimizer(alg, local, 0, 1, None, arguments)


def sgd(**options: Any) -> SGD:
    return SGD(model_of(0).parameters(), **{"lr": 0.1, **options})


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pipeline; assert 'torch' not in sys.modules; pipeline.get_distributed_optimizer"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018


def test_the_arguments_are_those_of_the_reference() -> None:
    names = list(inspect.signature(pipeline.get_distributed_optimizer).parameters)
    assert names == ["alg", "local_optimizer", "rank", "world_size", "group", "arg_dict"]
    optimizer = alone(sgd(), initial_steps=7)
    assert (optimizer.local_steps, optimizer.initial_steps) == (4, 7)
    assert optimizer.initial_step_method == "single_process"


@pytest.mark.parametrize(
    ("alg", "arguments", "message"),
    [
        ("sgd", {}, "unknown algorithm 'sgd'; choose from local_sgd, post_local_sgd, hierarchical_local_sgd"),
        ("local_sgd", {"local_step": 4}, "local_sgd has no argument 'local_step'; choose from .*local_steps"),
        ("local_sgd", {"node_size": 4}, "has no argument 'node_size'"),
        ("local_sgd", {"local_steps": 0}, "local_steps is 0; give a whole number of at least 1"),
        ("local_sgd", {"local_steps": True}, "local_steps is True; give a whole number"),
        ("local_sgd", {"initial_steps": 0.5}, "initial_steps is 0.5; give a whole number of at least 0"),
        ("local_sgd", {"init_step_method": "one"}, "is 'one'; choose from single_process, multiple_processes"),
        ("local_sgd", {"init_step_method": "single_process", "initial_step_method": "multiple_processes"}, "give one"),
        ("local_sgd", {"momentum": "drop"}, "momentum is 'drop'; choose from keep, average, reset"),
        ("local_sgd", {"slowmo_beta": 1.0}, "slowmo_beta is 1.0; give a number of at least 0 and below 1"),
        ("local_sgd", {"outer_learning_rate": -1}, "outer_learning_rate is -1; give a number of at least 0"),
        ("local_sgd", {"slowmo_beta": 0.5, "outer_momentum": 0.5}, "give one of the two"),
        ("hierarchical_local_sgd", {"global_sync_freq": 0}, "global_sync_freq is 0"),
        ("hierarchical_local_sgd", {"node_size": 1, "node_id": 0}, "both node_size and node_id"),
    ],
)
def test_a_mistake_is_named_with_the_choices(alg: str, arguments: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alone(sgd(), alg, **arguments)


def test_a_world_needs_connections_and_an_optimizer() -> None:
    with pytest.raises(ValueError, match="call init_process_group first"):
        pipeline.get_distributed_optimizer("local_sgd", sgd(), 0, 2, None, {})
    with pytest.raises(ValueError, match="local_optimizer is a list"):
        pipeline.get_distributed_optimizer("local_sgd", [], 0, 1, None, {})  # type: ignore[arg-type]


def test_it_is_the_local_optimizer_to_whoever_looks() -> None:
    local = sgd(momentum=0.9)
    optimizer = alone(local)
    called: list[Optimizer] = []
    optimizer.register_step_post_hook(lambda stepped, *_: called.append(stepped))
    assert isinstance(optimizer, Optimizer) and optimizer.local_optimizer is local
    assert optimizer.param_groups is local.param_groups and optimizer.state is local.state
    loss = optimizer.step(lambda: torch.tensor(2.5))
    assert loss == 2.5 and called == [local] and optimizer.step_counter == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is local.param_groups
    optimizer.zero_grad(set_to_none=True)
    assert repr(optimizer).startswith("LocalSGD (")
    for act in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"save optimizer.state_dict\(\)"):
            act(optimizer)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bound_to", ["the wrapper", "the local optimizer"])
def test_learning_rate_schedulers_work_bound_to_either(bound_to: str) -> None:
    optimizer = alone(sgd(momentum=0.9))
    bound = optimizer if bound_to == "the wrapper" else optimizer.local_optimizer
    scheduler = StepLR(bound, 2)
    rates = []
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001])
    OneCycleLR(bound, max_lr=1.0, total_steps=10)  # reads `defaults`, too


def test_slowmo_stands_still_while_the_rate_is_zero() -> None:
    """A warm-up that begins at zero divides nothing by it."""
    optimizer = alone(sgd(lr=0.0), local_steps=1, slowmo_beta=0.7)
    before = [parameter.clone() for parameter in optimizer.param_groups[0]["params"]]
    optimizer.step()
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))


def test_the_example_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    images = shared_data("cifar10")
    for split, kind in itertools.product(("train", "test"), ("cat", "ship")):
        (tmp_path / split / kind).mkdir(parents=True)
        for image in sorted((images / split / kind).iterdir())[:9]:
            (tmp_path / split / kind / image.name).symlink_to(image)
    command = [sys.executable, ROOT / "examples" / "cifar.py", tmp_path, "--nprocs", "2", "--epochs", "2"]
    options = ["--batch-size", "4", "-p", "2", "--initial-steps", "3", "--checkpoint", tmp_path / "kept"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Epoch \[1\]\[  [024]/5\]|Epoch \[1\]  test accuracy", done.stdout), done.stdout
    saved = [torch.load(tmp_path / "kept" / f"checkpoint.{rank}.pt", weights_only=True) for rank in range(2)]
    assert [(file["optimizer"]["rank"], file["optimizer"]["step_counter"]) for file in saved] == [(0, 10), (1, 10)]


if __name__ == "__main__":
    main()
