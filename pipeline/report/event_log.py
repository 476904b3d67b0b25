"""A worker's diary: one JSON line per event with the time of day, for looking back at what faults did to a job.

    HETURUN_DIARY=FOLDER heturun ...        FOLDER/p2.s0.i1.jsonl: stage 0 of pipeline 2, started again once
    {"event": "update", "time": 1754.25, "k": 40, "ticket": 113, "mixed": 37}

Lines reach the system one by one, so that a killed process leaves all it wrote. Without the variable nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

import torch
from torch import Tensor

VARIABLE = "HETURUN_DIARY"


class Diary:
    """Writes events down; `open` says whether anybody reads them, and so whether hashes are worth their time."""

    def __init__(self, path: Path | None) -> None:
        self.open = path is not None
        self._file = None if path is None else path.open("a", buffering=1, encoding="utf-8")

    @classmethod
    def of(cls, *, pipeline: int, stage: int, incarnation: int) -> Diary:
        """This worker's, in the folder that the environment names."""
        folder = os.environ.get(VARIABLE)
        if not folder:
            return cls(None)
        Path(folder).mkdir(parents=True, exist_ok=True)
        diary = cls(Path(folder) / f"p{pipeline}.s{stage}.i{incarnation}.jsonl")
        diary.note("start", pid=os.getpid())
        return diary

    def note(self, event: str, **values: Any) -> None:
        """Writes one line."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "time": time(), **values}) + "\n")

    def note_state(self, event: str, tensors: Mapping[str, Tensor], **values: Any) -> None:
        """Writes one line with the hash of these tensors, by which two replicas can be compared bit for bit."""
        if self.open:
            self.note(event, state=digest(tensors), **values)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
