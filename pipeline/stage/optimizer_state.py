"""What torch's optimisers remember about a parameter: momenta of its shape, and how many steps they have made.

state[parameter]    momentum_buffer                  SGD, where it has momentum
                    exp_avg, exp_avg_sq, step        AdamW; the step count corrects the bias of the young moments
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

STEP = "step"
State = dict[str, Any]


def is_momentum(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a value of a parameter's state is a momentum or moment; a step count is none, whatever its shape."""
    return key != STEP and isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()


def momenta(state: State, parameter: Tensor) -> list[Tensor]:
    """Those of one parameter, in the order of their names."""
    return [state[key] for key in sorted(state) if is_momentum(key, state[key], parameter)]


@torch.no_grad()
def reset(states: Iterable[tuple[Tensor, State]]) -> None:
    """Momentum policy "reset": (parameter, its state) as if no step had been made; moments of zero are young again."""
    for parameter, state in states:
        for tensor in momenta(state, parameter):
            tensor.zero_()
        if isinstance(state.get(STEP), Tensor):
            state[STEP].zero_()
        elif STEP in state:
            state[STEP] = 0


def state_keys(optimizer: torch.optim.Optimizer) -> frozenset[str] | None:
    """The names of the tensors that this optimiser keeps per parameter; None where nobody knows."""
    if isinstance(optimizer, torch.optim.SGD):
        return frozenset({"momentum_buffer"} if optimizer.defaults["momentum"] else ())
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return frozenset(
            {STEP, "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if optimizer.defaults["amsgrad"] else set())
        )
    return None


def room_for(key: str, shape: torch.Size, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Memory for a value of a parameter's state, where torch's own `load_state_dict` would put it.

    A step count is float32 and lies beside its parameter where a fused or capturable rule reads it, on the CPU
    elsewhere; all else has the parameter's dtype and device, and what has its shape also its memory format.
    """
    if key == STEP:
        there = bool(group.get("fused") or group.get("capturable"))
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device if there else "cpu")
    if shape == parameter.shape:
        return torch.zeros_like(parameter.detach())
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
