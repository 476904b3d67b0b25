"""The list of a checkpoint's tensors (`.metadata` of torch.distributed.checkpoint): who is where, read without risk.

    stage 0 ── its own list ──┐
    stage 1 ── its own list ──┼──► one list, which torch's own reader takes, too
    stage 2 ── its own list ──┘

torch writes it as a pickle, and a pickle can call anything. Here it is read by an unpickler that knows the few classes
such a list is made of, and what comes out is looked at before anybody uses it.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo)}


def _layout(name: str) -> torch.layout:
    return _LAYOUTS[name]


def _no_path(*parts: str) -> None:
    """Where the list was first written: of no use to anybody."""


_CLASSES = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_KNOWN: Mapping[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _CLASSES},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{("torch", name): found for name, found in vars(torch).items() if isinstance(found, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("pathlib", "PosixPath"): _no_path,
    ("pathlib._local", "PosixPath"): _no_path,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of tensors needs") from None


class ListReader(FileSystemReader):
    """torch's reader of tensors, with a list that was read here."""

    def __init__(self, folder: Path, tensors: Metadata) -> None:
        super().__init__(folder)
        self._tensors = tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._tensors


def read_list(path: Path) -> Metadata:
    """The list in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no list of tensors; nothing of it has run.
    """
    with open(path, "rb") as file:
        try:
            found = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise ValueError(f"it is no list of tensors: {' '.join(str(error).split())[:200]}") from None
    wrong = _wrong_with(found)
    if wrong is not None:
        raise ValueError(f"it is no list of tensors: {wrong}")
    found.storage_meta = StorageMeta()
    tensors: Metadata = found
    return tensors


def write_list(tensors: Metadata) -> bytes:
    """The bytes of a file that `read_list` and torch read."""
    return pickle.dumps(tensors)


def merge(lists: Mapping[int, Metadata]) -> Metadata:
    """One list of the tensors of all stages, by stage; a name that several have is taken from the first.

    Each was written for its stage alone, so that all speak of files of the same names: `file_of` tells them apart.
    """
    whole = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, storage_meta=StorageMeta())
    for stage, tensors in sorted(lists.items()):
        new = tensors.state_dict_metadata.keys() - whole.state_dict_metadata.keys()
        whole.state_dict_metadata |= {name: tensors.state_dict_metadata[name] for name in sorted(new)}
        whole.planner_data |= {name: path for name, path in (tensors.planner_data or {}).items() if name in new}
        whole.storage_data |= {
            index: dataclasses.replace(info, relative_path=file_of(stage, info.relative_path))
            for index, info in tensors.storage_data.items()
            if index.fqn in new
        }
        whole.version = tensors.version
    return whole


def file_of(stage: int, name: str) -> str:
    """What a file is called in the common folder that a stage has written alone.

    >>> file_of(2, "__0_3.distcp")
    '__2_3.distcp'
    """
    return f"__{stage}_{name.rpartition('_')[2]}"


def shapes(tensors: Metadata) -> dict[str, torch.Size]:
    """The name and shape of every tensor in a list."""
    stored = tensors.state_dict_metadata
    return {name: item.size for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def _wrong_with(found: Any) -> str | None:
    """What is not as it must be; everything that is used later is looked at here."""
    if not isinstance(found, Metadata):
        return f"it holds a {type(found).__name__}"
    stored, places = (getattr(found, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(stored, dict) or not isinstance(places, dict):
        return "it does not say which tensors there are, and where"
    if not isinstance(getattr(found, "planner_data", None), dict | None):
        return "the names of its tensors make no sense"
    for name, item in stored.items():
        if not isinstance(name, str) or not _is_item(item):
            return f"{name!r:.60} is not described as a tensor is"
    for index, info in places.items():
        if not _is_place(index, info):
            return f"a tensor lies at {info!r:.100}, which is no place in a file beside it"
    return None


def _is_item(item: Any) -> bool:
    if isinstance(item, BytesStorageMetadata):
        return True
    return (
        isinstance(item, TensorStorageMetadata)
        and isinstance(getattr(item, "size", None), torch.Size)
        and isinstance(getattr(item, "properties", None), metadata.TensorProperties)
        and isinstance(getattr(item.properties, "dtype", None), torch.dtype)
        and isinstance(getattr(item, "chunks", None), list)
        and all(_is_chunk(chunk) for chunk in item.chunks)
    )


def _is_chunk(chunk: Any) -> bool:
    return isinstance(chunk, metadata.ChunkStorageMetadata) and all(
        isinstance(getattr(chunk, name, None), torch.Size) for name in ("offsets", "sizes")
    )


def _is_place(index: Any, info: Any) -> bool:
    if not isinstance(index, metadata.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
        return False
    fqn, path = getattr(index, "fqn", None), getattr(info, "relative_path", None)
    numbers = getattr(info, "offset", None), getattr(info, "length", None)
    return (
        isinstance(fqn, str)
        and isinstance(path, str)
        and path == Path(path).name not in ("", "..")  # a file beside the list, not one elsewhere
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and not getattr(info, "transform_descriptors", None)
    )
