"""Weights to start from (--init): a file or a folder that torchvision, transformers or an export wrote, cut to stages.

    FILE.safetensors      FILE.pth, .pt, .bin: a torch state dict, read without running anything in it
    FOLDER/               as save_pretrained writes it: config.json, and model.safetensors, in one piece or several

Names are those of the unsplit model, so every stage picks its own, however the model is cut. A tied weight may stand
under either of its names, or under both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.layered import LayeredModel

OLD_NAMES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}  # of early BERTs
DERIVED = (".position_ids", ".token_type_ids")  # buffers of some versions that follow from the configuration
OPTIONAL = (".num_batches_tracked",)  # that early versions of torch did not have
WRAPPERS = ("state_dict", "model", "model_state_dict")  # what training scripts put a state dict under
SHOWN = 4  # names in a line


@dataclass(frozen=True)
class Source:
    """Tensors by name, each read when it is asked for; `shapes` are known beforehand."""

    where: str
    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]


class Match(NamedTuple):
    """What becomes of the model's names: where in the source each comes from, and which names have no counterpart."""

    found: dict[str, str]  # the model's name -> the source's
    missing: list[str]
    other_size: list[str]
    superfluous: list[str]  # of the source


# --- reading


def open_source(path: str | Path, config: Mapping[str, Any] | None = None) -> Source:
    """The tensors of a file or folder; `config` is what a folder's config.json must not contradict.

    Raises:
        UserError: it cannot be read, holds no tensors, or is of another configuration.
    """
    path = Path(path)
    try:
        source = _open_folder(path, config or {}) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise UserError(f"--init {path}: cannot be read ({error.strerror or error})") from None
    if not source.shapes:
        raise UserError(f"--init {path}: there are no tensors in it; give a state dict or safetensors")
    return source


def _open_folder(path: Path, config: Mapping[str, Any]) -> Source:
    _check_config(path, config)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _named(str(path), _open_file(path / name))
        index = path / f"{name}.index.json"
        if index.is_file():
            return _named(str(path), _open_parts(path, index))
    raise UserError(
        f"--init {path}: no model.safetensors in it, nor an index of several; did save_pretrained write it?"
    )


def _named(where: str, source: Source) -> Source:
    return Source(where, source.shapes, source.read)


def _open_parts(path: Path, index: Path) -> Source:
    files = set(_json(index).get("weight_map", {}).values())
    parts = [_open_file(path / str(name)) for name in sorted(files)]
    home = {name: part for part in parts for name in part.shapes}
    shapes = {name: part.shapes[name] for name, part in home.items()}
    return Source(str(path), shapes, lambda name: home[name].read(name))


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"--init {path}: no config.json in it; give a folder that save_pretrained wrote, or a file")
    theirs = _json(path / "config.json")
    for name, value in config.items():
        if name in theirs and theirs[name] != value:
            raise UserError(
                f"--init {path}: its config.json has {name} {theirs[name]}, this model {value}; "
                "choose the --model, or give the --bert-config, that it was made with"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--init {path}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"--init {path}: holds no JSON object")
    return values


def _open_file(path: Path) -> Source:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_state_dict(path)


def _open_safetensors(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):
        pass  # an OSError that says why
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"--init {path}: is no safetensors file, or damaged ({error})") from None
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Source(str(path), shapes, file.get_tensor)


def _open_state_dict(path: Path) -> Source:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are anything raise anything in there
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--init {path}: is no state dict that can be read without running code ({why[:160]}); save "
            "model.state_dict(), or safetensors"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):  # DataParallel's
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Source(str(path), {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)


# --- matching


class Names(NamedTuple):
    """What is in the unsplit model's state dict: the shape of each tensor, its block, and pairs of names of one."""

    shapes: dict[str, torch.Size]
    blocks: dict[str, int]
    same: list[tuple[str, str]]


def names_of(model: LayeredModel) -> Names:
    """The names of a model, tied ones among the pairs; no memory is taken, and nothing is drawn."""
    names = Names({}, {}, list(model.ties.items()))
    for index, block in enumerate(model.blocks):
        with torch.device("meta"):
            module = block.build()
        first: dict[int, str] = {}
        for local, tensor in module.state_dict(keep_vars=True).items():
            name = block.prefix + local
            names.shapes[name], names.blocks[name] = tensor.shape, index
            if first.setdefault(id(tensor), name) != name:
                names.same.append((first[id(tensor)], name))
    return names


def match(
    wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size], *, same: Iterable[tuple[str, str]]
) -> Match:
    """Finds a counterpart for each wanted name; `same` are pairs of names of one tensor, of which either will do."""
    present = {_new_name(name): name for name in given}
    found = {name: present[name] for name in wanted if name in present}
    for one, other in [pair for a, b in same for pair in ((a, b), (b, a))]:
        if one in wanted and one not in found and other in found:
            found[one] = found[other]
    missing = [name for name in wanted if name not in found and not name.endswith(OPTIONAL)]
    other_size = [name for name, theirs in found.items() if wanted[name] != given[theirs]]
    known = set(wanted)
    superfluous = [theirs for name, theirs in present.items() if name not in known and not name.endswith(DERIVED)]
    return Match({n: t for n, t in found.items() if n not in other_size}, missing, other_size, superfluous)


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def judge(matched: Match, model: LayeredModel, blocks: Mapping[str, int], *, where: str, partial: bool) -> str:
    """A line about what is taken and what is left out.

    Raises:
        UserError: something does not fit; with `partial` only what is not of the head.
    """
    first_of_head = len(model.blocks) - model.head
    unfit = [*matched.missing, *matched.other_size]
    body = [name for name in unfit if blocks[name] < first_of_head]
    complaints = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", [name for name in matched.missing if not partial or name in body]),
            ("of another size", [name for name in matched.other_size if not partial or name in body]),
            ("superfluous", [] if partial else matched.superfluous),
        )
        if names
    ]
    if complaints:
        remedy = "" if partial or body else "; --init-partial leaves heads out"
        raise UserError(f"--init {where} does not fit {model.name}: {'; '.join(complaints)}{remedy}")
    line = f"initial weights from {where}: {len(set(matched.found.values()))} tensors"
    left = [("of a fresh head", unfit), ("not used", matched.superfluous)]
    return "; ".join([line, *(f"{what}: {_listed(names)}" for what, names in left if names)])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# --- taking


def take_initial(live: Mapping[str, Tensor], model: LayeredModel, source: Source, *, partial: bool) -> str:
    """Copies into a stage's `live` tensors ('model.NAME') what the source has for them; a line about it.

    Args:
        partial: whether a head may be left as it is.

    Raises:
        UserError: the source does not fit the model; the same on every stage.
    """
    names = names_of(model)
    matched = match(names.shapes, source.shapes, same=names.same)
    line = judge(matched, model, names.blocks, where=source.where, partial=partial)
    _check_ties(matched, model, source)
    with torch.no_grad():
        for full, tensor in live.items():
            theirs = matched.found.get(full.removeprefix("model."))
            if theirs is not None:
                tensor.copy_(source.read(theirs))
    return line


def _check_ties(matched: Match, model: LayeredModel, source: Source) -> None:
    """A model that shares a weight cannot start from one that does not."""
    for borrower, owner in model.ties.items():
        one, other = matched.found.get(borrower), matched.found.get(owner)
        if (
            one is not None
            and other is not None
            and one != other
            and not torch.equal(source.read(one), source.read(other))
        ):
            raise UserError(
                f"--init {source.where}: {one} and {other} differ, but {model.name} uses one for both; give --untied"
            )
