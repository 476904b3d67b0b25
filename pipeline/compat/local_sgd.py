"""Local SGD for people with a loop of their own: a torch optimiser that averages the model every few steps.

    optimizer = get_distributed_optimizer("local_sgd", torch.optim.SGD(...), rank, world_size, None, {"local_steps": 3})

    step c                          1 2 3 4 5 6 7 8 9 ...     local_steps 3, initial_steps 4
    no initial steps                . . A . . A . . A         A   the mean of all models
    initially multiple_processes    A A A A . A . . A         C   a copy of the leader's, the lowest rank's
    initially single_process        . . . C . A . . A
    hierarchical, every 2nd for all . . n . . A . . n         n   the mean of those on one node

All models begin as a copy of the leader's. (Lin, Stich, Patel, Jaggi: Don't Use Large Mini-Batches, Use Local SGD,
arXiv:1808.07217.) On top of the mean: SlowMo (Wang, Tantia, Ballas, Rabbat, arXiv:1910.00643) or DiLoCo's Nesterov
(Douillard et al., arXiv:2311.08105).
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.compat.collectives import Team, connect, team_of
from pipeline.errors import UserError
from pipeline.stage.optimizer_state import is_momentum, reset
from pipeline.sync.local_sgd import Calendar
from pipeline.sync.outer import DiLoCo, OuterRule, SlowMo

OPT_OUT = "allow_data_parallelism"  # False in a param group: stepped here, never averaged or copied
INITIAL_STEP_METHODS = ("single_process", "multiple_processes")
MOMENTUM_POLICIES = ("keep", "average", "reset")
_SHARED_ARGUMENTS = frozenset(
    {"initial_steps", "initial_step_method", "init_step_method", "momentum", "buffers"}
    | {"slowmo_beta", "slowmo_alpha", "outer_learning_rate", "outer_momentum"}
)
ALGORITHMS: Mapping[str, frozenset[str]] = MappingProxyType(  # name -> what may be in arg_dict
    {
        "local_sgd": _SHARED_ARGUMENTS | {"local_steps"},
        "post_local_sgd": _SHARED_ARGUMENTS | {"local_steps"},
        "hierarchical_local_sgd": _SHARED_ARGUMENTS | {"local_sync_freq", "global_sync_freq", "node_size", "node_id"},
    }
)


def get_distributed_optimizer(
    alg: str,
    local_optimizer: torch.optim.Optimizer,
    rank: int,
    world_size: int,
    group: Sequence[int] | dist.ProcessGroup | None = None,
    arg_dict: Mapping[str, Any] | None = None,
) -> LocalSGD:
    """The local optimiser, wrapped: use it as it was used, and the models of the group stay together.

    Every process of the group calls this at the same place of its program, after its model is where it will be
    trained: the leader's parameters are copied to all before it returns. Where a param group says
    `allow_data_parallelism: False`, its parameters stay each process's own.

    Args:
        alg: "local_sgd" and "post_local_sgd", which are the same, or "hierarchical_local_sgd".
        local_optimizer: any torch optimiser; it stays available as `.local_optimizer`.
        rank: of this process.
        world_size: how many processes the group has.
        group: their ranks, a process group, or None for all processes.
        arg_dict: any of
            local_steps (4): steps between two averages.
            initial_steps (0): steps before that, counted in c as well.
            initial_step_method, or init_step_method ("single_process"): "multiple_processes" averages after each of
                them; "single_process" takes the leader's model after the last one, whatever the others did so far.
            momentum ("keep"): what becomes of the optimiser's state with the shape of a parameter when models are
                averaged: "keep", "average" (a copy takes the leader's), or "reset" to zero, its step counts too.
            buffers: tensors to average with the parameters, such as `model.buffers()`; integers are only copied.
            slowmo_beta (0.5), slowmo_alpha (1): either one switches SlowMo on.
            outer_learning_rate (0.7), outer_momentum (0.9): either one switches DiLoCo's outer step on.
            local_sync_freq (4), global_sync_freq (4): hierarchical only: steps between two averages, all but every
                global_sync_freq-th of them inside the node.
            node_size or node_id: who shares a node: neighbours in the order of ranks, or those who give the same
                number; by default those on one host.

    Raises:
        UserError: a ValueError; an unknown algorithm, a value out of range, or processes that do not agree.
        PeerLost: a process of the group did not come before the process group's own deadline.
    """
    if alg not in ALGORITHMS:
        raise UserError(f"unknown algorithm {alg!r}; choose from {', '.join(ALGORITHMS)}")
    if not isinstance(local_optimizer, torch.optim.Optimizer):
        raise UserError(f"local_optimizer is a {type(local_optimizer).__name__}; give a torch.optim.Optimizer")
    arguments = _known_arguments(alg, arg_dict or {})
    team = team_of(rank, world_size, group)
    return LocalSGD(local_optimizer, team, _calendar(alg, arguments), arguments)


class LocalSGD(torch.optim.Optimizer):
    """Steps a local optimiser and lets its parameters meet those of the team; made by `get_distributed_optimizer`.

    It is the local optimiser to whoever looks: param groups, state, defaults and hooks are the local one's own, so
    learning rate schedulers work bound to either. All processes step equally often; under a GradScaler a step that
    only one process skips is counted by all.

    `state_dict` is the local optimiser's with the counter and the settings beside it. Loading takes all but rank,
    world_size and group from it, so any process may load any other's.
    """

    _step_supports_amp_scaling = True  # a GradScaler calls `step` even where a gradient overflowed

    def __init__(
        self, local_optimizer: torch.optim.Optimizer, team: Team, calendar: Calendar, arguments: Mapping[str, Any]
    ) -> None:
        # No super().__init__(): it would make param groups and hooks of its own.
        self.local_optimizer = local_optimizer
        self.step_counter = 0
        self._team, self._calendar = team, calendar
        self._momentum = _choice(arguments, "momentum", MOMENTUM_POLICIES)
        self._buffers = tuple(arguments.get("buffers", ()))
        self._outer = _outer_rule(arguments)
        self._names: tuple[str, ...] = ()
        team.check_devices([*self._shared(), *self._buffers])
        facts = team.gather(self._facts(arguments), self._device())
        _check_agreement(team.ranks, facts)
        self._node = _node(team, [fact["node"] for fact in facts], arguments) if calendar.host_steps else team
        self._team.copy_from_leader([*self._shared(), *self._buffers], "the leader's first model")
        self._anchors: list[Tensor] = []  # x_prev and u of the outer step, taken at the first step
        self._velocities: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        if name == "local_optimizer":
            raise AttributeError(name)
        return getattr(self.local_optimizer, name)

    def __reduce__(self) -> str:
        raise TypeError("connections cannot be pickled or copied; save optimizer.state_dict()")

    @property
    def rank(self) -> int:
        return self._team.rank

    @property
    def world_size(self) -> int:
        return len(self._team.ranks)

    @property
    def group(self) -> list[int]:
        return list(self._team.ranks)

    @property
    def local_steps(self) -> int:
        """Steps between two averages of the whole group."""
        return self._calendar.local_steps

    @property
    def initial_steps(self) -> int:
        return self._calendar.initial_steps

    @property
    def initial_step_method(self) -> str:
        return INITIAL_STEP_METHODS[0 if self._calendar.single_process else 1]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the local optimiser, then what the calendar has for it; returns what the local step returns.

        Raises:
            PeerLost: a process of the group did not come to average.
        """
        if self._outer and not self._anchors:
            self._anchors = self._snapshot()
            self._velocities = [torch.zeros_like(anchor) for anchor in self._anchors]
        loss = self._local_step(closure)
        self.step_counter += 1
        meeting = self._calendar.after(self.step_counter)
        if meeting:
            self._meet(meeting)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.local_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Every process adds the group at the same step; the leader's parameters are copied."""
        before = len(self._shared())
        self.local_optimizer.add_param_group(param_group)
        new = self._shared()[before:]
        self._team.copy_from_leader(new, "the leader's added parameters")
        if self._anchors:
            self._anchors += [parameter.detach().clone() for parameter in new]
            self._velocities += [torch.zeros_like(parameter) for parameter in new]

    def state_dict(self) -> dict[str, Any]:
        """The local optimiser's, which a plain optimiser can load, and where local SGD is."""
        mine: dict[str, Any] = {
            "step_counter": self.step_counter,
            "local_steps": self.local_steps,
            "initial_steps": self.initial_steps,
            "initial_step_method": self.initial_step_method,
            "host_steps": self._calendar.host_steps,
            "rank": self.rank,
            "world_size": self.world_size,
            "group": self.group,
        }
        if self._anchors:
            mine["outer"] = {"anchors": self._anchors, "velocities": self._velocities}
        return {**self.local_optimizer.state_dict(), **mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also a plain optimiser's: then the counter stays. Opting out of averages is not loaded, it stays as it is."""
        opted = [group.get(OPT_OUT, True) for group in self.param_groups]
        self.local_optimizer.load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for group, allowed in zip(self.param_groups, opted, strict=True):
            group.pop(OPT_OUT, None)
            if not allowed:
                group[OPT_OUT] = False
        self.step_counter = state_dict.get("step_counter", self.step_counter)
        if "step_counter" in state_dict:
            self._calendar = Calendar(
                local_steps=state_dict["local_steps"],
                initial_steps=state_dict["initial_steps"],
                single_process=state_dict["initial_step_method"] == INITIAL_STEP_METHODS[0],
                host_steps=state_dict.get("host_steps"),
            )
        self._names = ()
        outer = state_dict.get("outer", {}) if self._outer else {}
        self._anchors, self._velocities = (
            [saved.to(p, copy=True) for saved, p in zip(outer[name], self._shared(), strict=True)] if outer else []
            for name in ("anchors", "velocities")
        )

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        """The local step, or none where a GradScaler (which sets the two attributes) found an overflow."""
        overflow, scale = (self.__dict__.get(name) for name in ("found_inf", "grad_scale"))
        if overflow is not None and overflow.item():
            return None
        if scale is not None:
            for parameter in _parameters(self.param_groups):
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        return self.local_optimizer.step() if closure is None else self.local_optimizer.step(closure)

    @torch.no_grad()
    def _meet(self, meeting: str) -> None:
        what = f"the models of step {self.step_counter}"
        tensors = [*self._shared(), *self._buffers]
        momenta = self._momenta() if self._momentum == "average" else []
        tensors += [lent for _, lent in momenta]
        if meeting == "adopt":
            self._team.copy_from_leader(tensors, what)
        else:
            (self._node if meeting == "host" else self._team).average(tensors, what)
        for own, lent in momenta:
            if own is not None:
                own.copy_(lent)
        if self._outer and meeting != "host":
            if self.step_counter > self.initial_steps:
                self._step_outer(self._outer)
            self._anchors = self._snapshot()
        if self._momentum == "reset":
            reset((parameter, self.local_optimizer.state.get(parameter, {})) for parameter in self._shared())

    def _step_outer(self, outer: OuterRule) -> None:
        rates = [float(group.get("lr", 1.0)) for group in self.param_groups for _ in _parameters([group], shared=True)]
        for n, parameter in enumerate(self._shared()):
            x, self._velocities[n] = outer(self._anchors[n], parameter, self._velocities[n], rates[n])
            parameter.copy_(x)

    def _momenta(self) -> list[tuple[Tensor | None, Tensor]]:
        """The state tensors of a parameter's shape with a copy of each, as many and of the same types everywhere.

        Where this process has none, as for a parameter that never had a gradient here, the copy is of a zero.
        """
        state = self.local_optimizer.state
        if not self._names:
            here = {
                name for p in self._shared() for name, value in state.get(p, {}).items() if is_momentum(name, value, p)
            }
            found = self._team.gather(sorted(here), self._device())
            self._names = tuple(sorted({name for names in found for name in names}))
        pairs = []
        for parameter, name in product(self._shared(), self._names):
            own = state.get(parameter, {}).get(name)
            own = own if is_momentum(name, own, parameter) else None
            lent = torch.zeros_like(parameter) if own is None else own.clone()
            pairs.append((own, lent.to(torch.promote_types(parameter.dtype, torch.float32))))
        return pairs

    def _shared(self) -> list[Tensor]:
        """The parameters that meet, in the order of the param groups."""
        return _parameters(self.param_groups, shared=True)

    def _snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._shared()]

    def _device(self) -> torch.device:
        return next(iter([*self._shared(), *self._buffers]), torch.empty(0)).device

    def _facts(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What all processes must have in common, and the name of this one's node."""
        kinds = [(tuple(t.shape), str(t.dtype), t.device.type) for t in (*self._shared(), *self._buffers)]
        return {
            "node": _named(arguments.get("node_id", socket.gethostname())),
            "settings": f"{self._calendar}, momentum={self._momentum}, outer={self._outer}",
            "node_size": _named(arguments.get("node_size")),
            "shared tensors": f"{len(kinds)} (check sum {zlib.crc32(repr(kinds).encode()):08x})",
        }


def _named(value: Any) -> Any:
    """Something that may be sent as JSON and compares like the value."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _node(team: Team, names: Sequence[Any], arguments: Mapping[str, Any]) -> Team:
    """Those of the team who share this process's node, `names` telling by default which that is."""
    size = arguments.get("node_size")
    if size is not None:
        _whole(arguments, "node_size", None, at_least=1)
        if "node_id" in arguments:
            raise UserError("both node_size and node_id are given; give one")
        if len(team.ranks) % size:
            raise UserError(f"node_size is {size}, which does not divide the group's {len(team.ranks)} processes")
        names = [place // size for place in range(len(team.ranks))]
    mine = names[team.ranks.index(team.rank)]
    ranks = tuple(rank for rank, name in zip(team.ranks, names, strict=True) if name == mine)
    return team if ranks == team.ranks else Team(team.rank, ranks, connect(ranks))


def _check_agreement(ranks: Sequence[int], facts: Sequence[Mapping[str, Any]]) -> None:
    """Processes with different calendars or parameters would wait for each other for ever."""
    for rank, fact in zip(ranks, facts, strict=True):
        for name in ("settings", "node_size", "shared tensors"):
            if fact[name] != facts[0][name]:
                raise UserError(
                    f"{name} of rank {rank}: {fact[name]}; of rank {ranks[0]}: {facts[0][name]}; give all the same"
                )


def _known_arguments(alg: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with the reference's other name for initial_step_method taken as that."""
    strange = sorted(set(given) - ALGORITHMS[alg])
    if strange:
        raise UserError(f"{alg} has no argument {strange[0]!r}; choose from {', '.join(sorted(ALGORITHMS[alg]))}")
    arguments = dict(given)
    if "init_step_method" in arguments:
        method = arguments.pop("init_step_method")
        if arguments.setdefault("initial_step_method", method) != method:
            raise UserError(
                f"init_step_method is {method!r} and initial_step_method {arguments['initial_step_method']!r}; give one"
            )
    return arguments


def _calendar(alg: str, arguments: Mapping[str, Any]) -> Calendar:
    method = _choice(arguments, "initial_step_method", INITIAL_STEP_METHODS)
    calendar = Calendar(
        local_steps=_whole(arguments, "local_steps", 4, at_least=1),
        initial_steps=_whole(arguments, "initial_steps", 0, at_least=0),
        single_process=method == "single_process",
    )
    if alg != "hierarchical_local_sgd":
        return calendar
    inside = _whole(arguments, "local_sync_freq", 4, at_least=1)
    across = _whole(arguments, "global_sync_freq", 4, at_least=1)
    return replace(calendar, local_steps=inside * across, host_steps=inside if across > 1 else None)


def _outer_rule(arguments: Mapping[str, Any]) -> OuterRule | None:
    slow, outer = ({name for name in arguments if name.startswith(prefix)} for prefix in ("slowmo_", "outer_"))
    if slow and outer:
        raise UserError(f"{min(slow)} means SlowMo and {min(outer)} means DiLoCo; give one of the two")
    if slow:
        beta = _real(arguments, "slowmo_beta", 0.5, below=1.0)
        return SlowMo(beta=beta, alpha=_real(arguments, "slowmo_alpha", 1.0))
    if outer:
        momentum = _real(arguments, "outer_momentum", 0.9, below=1.0)
        return DiLoCo(momentum=momentum, outer_learning_rate=_real(arguments, "outer_learning_rate", 0.7))
    return None


def _whole(arguments: Mapping[str, Any], name: str, default: Any, *, at_least: int) -> int:
    value = arguments.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UserError(f"{name} is {value!r}; give a whole number of at least {at_least}")
    return value


def _real(arguments: Mapping[str, Any], name: str, default: float, *, below: float = float("inf")) -> float:
    value = arguments.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < below:
        raise UserError(f"{name} is {value!r}; give a number of at least 0" + (" and below 1" if below == 1 else ""))
    return value


def _choice(arguments: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    """The first choice is the default."""
    value = arguments.get(name, choices[0])
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose from {', '.join(choices)}")
    return str(value)


def _parameters(groups: Sequence[Mapping[str, Any]], *, shared: bool = False) -> list[Tensor]:
    return [p for group in groups if not shared or group.get(OPT_OUT, True) for p in group["params"]]
