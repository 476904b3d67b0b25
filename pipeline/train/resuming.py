"""What a resumed run takes from its checkpoint before it is built: how far the other came, and whether it may go on.

    checkpoint.json     settings, what must stay, samples of the data set    compared with this run's
                        position: epoch, samples of it                       the rest of that epoch is cut anew
                        updates                                              counted on; the rate follows the epoch

`SAME` and `NOTABLE` are the table of README: what must stay, and what follows from some of the changes. Options that
stand in neither may change, and act from there on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.data.epochs import Position
from pipeline.data.plan import Plan
from pipeline.errors import UserError
from pipeline.models.bert_config import read_shape
from pipeline.settings import Settings, default_settings, option

SAME: Mapping[str, str] = MappingProxyType(  # field of Settings -> what would mean something else
    {
        "task": "its weights",
        "model": "its weights",
        "bert_config": "its weights",
        "untied": "its weights",
        "optimizer": "what it has learnt of the gradients",
        "dataset": "its position in the data",
        "sequence_length": "its position in the data",
        "batch_size": "its position in the data",
        "seed": "its position in the data",
    }
)
NOTABLE: Mapping[tuple[str, ...], str] = MappingProxyType(  # fields -> what follows from a change
    {
        (
            "placement",
            "partition",
        ): "any number of stages finds its weights by name, any number of pipelines its samples: the rest of a begun "
        "epoch is cut anew from where it was left",
        ("epochs", "max_steps"): "the rate follows the new curve at the same part of the run; an epoch's number counts",
        ("pipeline", "microbatches", "accumulate"): "the next batch is cut and updated in the new way",
        (
            "learning_rate",
            "lr_schedule",
            "momentum",
            "weight_decay",
        ): "they and all else of the optimiser act from there on; without momentum, the old one is left out",
        ("amp",): "a loss scale belongs to fp16: it is left out elsewhere, and begun anew where there was none",
        (
            "preduce",
            "adpsgd",
            "local_sgd",
            "outer",
        ): "a synchroniser goes on with what it knows of the old one's state; --initial-steps are the run's first",
        ("data", "image_size", "vocab"): "as long as there are as many samples as before",
    }
)


@dataclass(frozen=True)
class Begun:
    """How far the run has come that is gone on with: its checkpoint, position, and updates."""

    folder: str
    position: Position
    updates: int

    def to_values(self) -> dict[str, Any]:
        return {"folder": self.folder, "position": list(self.position), "updates": self.updates}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Begun:
        return cls(values["folder"], Position(*values["position"]), values["updates"])


def find_begun(directory: str, settings: Settings, *, samples: int) -> Begun:
    """The newest checkpoint in `directory`, if this run may go on from it.

    Raises:
        UserError: no checkpoint, or one of another model, optimiser or data.
    """
    from pipeline.train import checkpoint  # a quarter of all that is imported: only where it is used

    folder = checkpoint.latest(directory)
    values = modern(checkpoint.read_values(folder))
    check_same(values, settings, samples=samples, folder=str(folder))
    return Begun(str(folder), Position(**values["position"]), values["updates"])


def what_must_stay(settings: Settings) -> dict[str, Any]:
    """The values of `SAME`, an option that was given like one that was left to its default."""
    values = {name: getattr(settings, name) for name in SAME}
    if settings.task == "bert":
        values["bert_config"] = dataclasses.asdict(read_shape(settings.bert_config or settings.model))
    return values


def check_same(values: Mapping[str, Any], settings: Settings, *, samples: int, folder: str) -> None:
    """Whether a run with these settings, over so many samples, may go on from a checkpoint with these values."""
    was, now = values["same"], what_must_stay(settings)
    for name, meaning in SAME.items():
        if name in was and was[name] != now[name]:
            raise UserError(
                f"{folder} was written with {option(name)} {_shown(was[name])}, this run has {_shown(now[name])}, so "
                f"that {meaning} would mean something else; give the same, or start afresh"
            )
    if values["samples"] != samples:
        raise UserError(
            f"{folder} was written over {values['samples']} training samples, this run has {samples}; "
            "give the same data, or start afresh"
        )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        shape = default_shape()
        return ", ".join(f"{name} {each}" for name, each in value.items() if each != shape.get(name)) or "bert-base's"
    return str(value)


def default_shape() -> dict[str, Any]:
    """bert-base's, beside which others are shown."""
    return dataclasses.asdict(read_shape(default_settings("bert").model))


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's values as they are written today; the first form counted batches and knew no list of states."""
    if "position" in values:
        return dict(values)
    settings, data = values["settings"], values["data"]
    fields = {field.name for field in dataclasses.fields(Settings)}
    was = Settings(**{name: _back(value) for name, value in settings.items() if name in fields})
    plan = Plan(
        size=data["samples"],
        batch_size=was.batch_size,
        pipelines=data["pipelines"],
        microbatches=was.num_microbatches,
    )
    skipped = values.get("skipped", 0)
    states = {"updates": {"made": values["updates"] - skipped, "skipped": skipped}}
    if was.amp == "fp16" and "scaler" in values:
        states["loss scale"] = dict(zip(("scale", "good_steps"), values["scaler"], strict=True))
    return {
        "states": states,
        **values,
        "position": plan.position(values["batches"])._asdict(),
        "samples": data["samples"],
        "same": {name: settings[name] for name in SAME if name != "bert_config"},
    }


def _back(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def table_as_markdown() -> str:
    """The table of README."""
    rows = ["| at a resume | |", "|---|---|"]
    kept: dict[str, list[str]] = {}
    for name, meaning in SAME.items():
        if name != "task":
            kept.setdefault(meaning, []).append(f"`{option(name)}`")
    rows += [
        f"| {', '.join(names)} | must stay: {meaning} would mean something else |" for meaning, names in kept.items()
    ]
    rows += [
        f"| {', '.join(f'`{option(n)}`' for n in names)} | may change: {what} |" for names, what in NOTABLE.items()
    ]
    return "\n".join(rows)
