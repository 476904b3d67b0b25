"""Who has state: the one list that saving, resuming, giving to a joiner and taking from a giver all go by.

    name           tensors                         values          whose
    weights        model.<parameter or buffer>                     shared
    optimizer      optim.<parameter>.<key>                         of this replica
    updates                                        made, skipped   of this replica
    loss scale                                     scale ...       shared, and of float16 only
    mixing                                         step            of this replica
    synchroniser   sync.<parameter>.<key>                          shared

Tensors are named by parameter, so that any other number of stages finds its part. What is shared is equal on all
replicas at a stop; of the rest a checkpoint has the saver's, and all replicas go on from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.replicas.flat_state import StageVector
from pipeline.stage.loss_scaling import LossScaler
from pipeline.stage.optimizer_state import room_for, state_keys
from pipeline.stage.stage import Stage
from pipeline.sync.protocol import Synchroniser

Shapes = Mapping[str, torch.Size]
FAMILIES = {"model": "weights", "optim": "the optimizer's", "sync": "the synchroniser's"}


class Stateful(Protocol):
    """One who has state.

    Attributes:
        name: under which its values are kept, and by which people are told of it.
        shared: equal on all replicas at a stop; else each has its own.
        kinds: of tensors (`kind_of` a name) that it hopes for, or its name where that is values.
    """

    @property
    def name(self) -> str: ...
    @property
    def shared(self) -> bool: ...
    @property
    def kinds(self) -> frozenset[str]: ...

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; views of the live ones."""

    def values(self) -> dict[str, Any]:
        """The rest, as JSON."""

    def takes(self, kind: str) -> bool:
        """Whether it goes on from tensors of this kind."""

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        """Where to put those of these tensors that it takes, and those that it cannot be without."""

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on from what now stands in its room, and from these values; {} and {}: from nothing."""


class Told(NamedTuple):
    """What became of the states that were given, in words."""

    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    begun_anew: tuple[str, ...]

    def __str__(self) -> str:
        """
        >>> str(Told(("weights",), ("loss scale",), ()))
        'with weights; left out: loss scale'
        """
        rest = {"left out": self.left_out, "begun anew": self.begun_anew}
        parts = [
            f"with {', '.join(self.taken)}",
            *(f"{what}: {', '.join(names)}" for what, names in rest.items() if names),
        ]
        return "; ".join(parts)


class States:
    """The list: everybody who has state, in the order in which it is loaded."""

    def __init__(self, members: Sequence[Stateful]) -> None:
        self.members = tuple(members)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for member in self.members for name, tensor in member.tensors().items()}

    def values(self) -> dict[str, dict[str, Any]]:
        found = ((member.name, member.values()) for member in self.members)
        return {name: values for name, values in found if values}

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        return {name: memory for member in self.members for name, memory in member.room(shapes).items()}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on from a `room` that was filled, and from the values beside it."""
        for member in self.members:
            own = {name: tensor for name, tensor in tensors.items() if member.takes(kind_of(name))}
            member.load(own, values.get(member.name, {}))

    @torch.no_grad()
    def adopt(self, tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> None:
        """Becomes whoever gave this, bit for bit; micro-batches in flight keep the weights that they have.

        Raises:
            ValueError: the state of another stage or model.
        """
        room = self.room({name: tensor.shape for name, tensor in tensors.items()})
        missing = sorted(room.keys() - tensors.keys())
        if missing:
            raise ValueError(f"the state of another stage was given: it has no {missing[0]}")
        for name, memory in room.items():
            memory.copy_(tensors[name])
        self.load(room, values)

    def told(self, names: Iterable[str], values: Iterable[str]) -> Told:
        """Which of the given states (names of tensors, and of those who have values) are used here."""
        kinds, wanted = {kind_of(name) for name in names}, {kind for member in self.members for kind in member.kinds}
        taken = {kind for kind in kinds if self._takes(kind)} | (wanted & set(values))
        unknown = set(values) - {member.name for member in self.members}
        return Told(*(_in_words(part) for part in (taken, (kinds | unknown) - taken, wanted - taken)))

    def _takes(self, kind: str) -> bool:
        return any(member.takes(kind) for member in self.members)


def _in_words(kinds: Iterable[str]) -> tuple[str, ...]:
    found = ((kind.partition("."), kind) for kind in sorted(kinds))
    return tuple(
        f"{FAMILIES.get(family, family)} {key}" if key else FAMILIES.get(kind, kind) for (family, _, key), kind in found
    )


def kind_of(name: str) -> str:
    """What a tensor is, whosever it is: "model", or "optim" or "sync" with its key.

    >>> kind_of("model.conv1.weight"), kind_of("optim.conv1.weight.exp_avg")
    ('model', 'optim.exp_avg')
    """
    family = name.partition(".")[0]
    return family if family == "model" else f"{family}.{name.rpartition('.')[2]}"


class WeightsState:
    """Parameters and persistent buffers, frozen ones too, under the unsplit model's names."""

    name, shared, kinds = "weights", True, frozenset({"model"})

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def tensors(self) -> dict[str, Tensor]:
        return self._stage.model_state()

    def values(self) -> dict[str, Any]:
        return {}

    def takes(self, kind: str) -> bool:
        return kind in self.kinds

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        """The live tensors themselves, past autograd, which saved running statistics but never reads them.

        Borrowed parameters are among them where their owner's is given.
        """
        self._stage.make_writable()
        borrowed = {name: tensor for name, tensor in self._stage.borrowed_state().items() if name in shapes}
        return {name: tensor.data for name, tensor in (self._stage.model_state() | borrowed).items()}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        return None  # they have been written to


class OptimizerState:
    """What the optimiser remembers per parameter, common to all versions of its weights."""

    name, shared = "optimizer", False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._keys = state_keys(stage.optimizer)
        self.kinds = frozenset(f"optim.{key}" for key in self._keys or ())

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"optim.{slot.name}.{key}": value
            for slot, state in zip(self._stage.weights.slots, self._stage.optimizer_states, strict=True)
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def values(self) -> dict[str, Any]:
        return {}

    def takes(self, kind: str) -> bool:
        return kind in self.kinds or (self._keys is None and kind.startswith("optim."))

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        parameters = {slot.name: index for index, slot in enumerate(self._stage.weights.slots)}
        memory = {}
        for name, shape in shapes.items():
            parameter, _, key = name.removeprefix("optim.").rpartition(".")
            if self.takes(kind_of(name)) and parameter in parameters:
                leaf, group = self._stage.leaf_and_group(parameters[parameter])
                memory[name] = room_for(key, shape, leaf, group)
        return memory

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        states = {}
        for slot, state in zip(self._stage.weights.slots, self._stage.optimizer_states, strict=True):
            state.clear()
            states[slot.name] = state
        for name, tensor in tensors.items():
            parameter, _, key = name.removeprefix("optim.").rpartition(".")
            states[parameter][key] = tensor


class _Numbers:
    """The part of those who have numbers and no tensors, and can do without them."""

    kinds: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def takes(self, kind: str) -> bool:
        return False

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        return {}


class UpdatesState(_Numbers):
    """How many updates the stage has made, and how many more it skipped after an overflow."""

    name, shared = "updates", False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def values(self) -> dict[str, Any]:
        return {"made": self._stage.updates, "skipped": self._stage.skipped_updates}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._stage.updates, self._stage.skipped_updates = values.get("made", 0), values.get("skipped", 0)


class LossScaleState(_Numbers):
    """The dynamic loss scale; only a stage that computes in float16 has one to speak of."""

    name, shared, kinds = "loss scale", True, frozenset({"loss scale"})

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler

    def values(self) -> dict[str, Any]:
        return {"scale": self._scaler.scale, "good_steps": self._scaler.good_steps}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if values:
            self._scaler.scale, self._scaler.good_steps = values["scale"], values["good_steps"]


class Steps(Protocol):
    """A mixer: its step counts the updates of its replica, and tells the synchroniser when to do what."""

    step: int


class MixingState(_Numbers):
    """How far a mixer is; corrections under way are drained before anybody saves.

    Where nothing is known, as after a run without one, it has come as far as its stage: the initial steps of local SGD
    are the first ones of the whole run.
    """

    name, shared = "mixing", False

    def __init__(self, mixer: Steps, stage: Stage) -> None:
        self._mixer, self._stage = mixer, stage

    def values(self) -> dict[str, Any]:
        return {"step": self._mixer.step}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self._mixer.step = values.get("step", self._stage.updates + self._stage.skipped_updates)


class SynchroniserState:
    """What a synchroniser remembers: vectors like the weights, cut into parameters and put together again."""

    name, shared = "synchroniser", True

    def __init__(self, sync: Synchroniser, vector: StageVector) -> None:
        self._sync, self._vector = sync, vector
        self.kinds = frozenset(f"sync.{key}" for key in sync.remembers)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"sync.{name}.{key}": part
            for key, flat in self._sync.state().items()
            for name, part in self._vector.parameters(flat).items()
        }

    def values(self) -> dict[str, Any]:
        return {}

    def takes(self, kind: str) -> bool:
        return kind in self.kinds

    def room(self, shapes: Shapes) -> dict[str, Tensor]:
        """Parts of new vectors; of a vector that is given at all, every parameter's part is wanted."""
        given = {kind_of(name) for name in shapes}
        keys = sorted(key for key in self._sync.remembers if f"sync.{key}" in given)
        return {
            f"sync.{name}.{key}": part
            for key in keys
            for name, part in self._vector.parameters(self._vector.empty()).items()
        }

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        by_key: dict[str, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            name, _, key = full.removeprefix("sync.").rpartition(".")
            by_key.setdefault(key, {})[name] = tensor
        self._sync.load_state({key: self._vector.joined(parts) for key, parts in by_key.items()})
