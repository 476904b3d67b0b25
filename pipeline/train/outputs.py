"""Where results go: tried before the first step by whoever will write there, and where weights go if it fails later.

    --out, --profile          rank 0
    --runs, --metrics         the last stage of pipeline 0, which speaks
    --checkpoint, --export    the stages of pipeline 0, which saves

A place that cannot be written is the user's mistake, and is told while nothing is lost.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.core.durable import why_not_written
from pipeline.errors import UserError
from pipeline.settings import Settings, option


class Output(NamedTuple):
    """A place of results: the setting that names it, and whether it is a folder, a file, or a file put there whole."""

    name: str
    path: Path
    kind: str  # "folder", "file", "whole file"


def outputs_of(settings: Settings, *, pipeline: int, stage: int, stages: int) -> list[Output]:
    """What this rank will write once training has begun."""
    if pipeline != 0:
        return []
    kinds = {"checkpoint": "folder", "export": "whole file"}
    if stage == stages - 1:
        kinds |= {"runs": "folder", "metrics": "file"}
    if stage == 0:
        kinds |= {"out": "folder"}
    given = {name: getattr(settings, name) for name in kinds}
    return [Output(name, Path(path), kinds[name]) for name, path in given.items() if path is not None]


def try_outputs(outputs: Iterable[Output], *, rank: int, host: str) -> None:
    """Writes a trial of each, which is taken away again; folders that are made stay.

    Raises:
        UserError: one of them cannot be written.
    """
    for name, path, kind in outputs:
        try:
            if kind == "folder":
                _try_folder(path)
            else:
                _try_file(path, whole=kind == "whole file")
        except OSError as error:
            why = why_not_written(error, path.parent)
            raise UserError(
                f"{option(name)} {path}: cannot be written ({why}), as rank {rank} on {host} found; "
                "give a place that can be"
            ) from None


def _try_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    path.mkdir(parents=True, exist_ok=True)
    trial = path / f".trial-{secrets.token_hex(8)}"
    trial.write_bytes(b"trial")
    trial.unlink()


def _try_file(path: Path, *, whole: bool) -> None:
    """A file put there whole takes the place of what is there; any other is written where it is."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if whole or not path.exists():
        _try_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def rescue_weights(
    state: Mapping[str, Tensor],
    ties: Mapping[str, str],
    *,
    stage: int,
    stages: int,
    host: str,
    folder: Path | None = None,
) -> str:
    """Writes a stage's part of the weights into a fresh temporary folder, as safetensors; says where, or why not.

    Args:
        state: 'model.NAME' -> tensor. ties: a borrower's name -> its owner's; whoever holds the owner writes both.
        folder: where to make it, if not in the system's place for temporary files.
    """
    from safetensors.torch import save_file

    named = {name.removeprefix("model."): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    named |= {borrower: named[owner] for borrower, owner in ties.items() if owner in named}
    if not all(bool(tensor.isfinite().all()) for tensor in named.values() if tensor.is_floating_point()):
        return f"the weights of stage {stage} are not finite, and were not put anywhere else"
    own = {name: tensor.clone() for name, tensor in named.items()}  # safetensors refuses shared memory
    part = "model.safetensors" if stages == 1 else f"model-stage-{stage}-of-{stages}.safetensors"
    try:
        path = Path(tempfile.mkdtemp(prefix="heturun-weights-", dir=folder)) / part
        save_file(own, path, metadata={"format": "pt"})
    except Exception as error:  # safetensors has an error of its own; training is over, and this was the last resort
        return f"nor could the weights of stage {stage} be put anywhere else on {host} ({error})"
    return f"the weights of stage {stage} are in {path} on {host}"
