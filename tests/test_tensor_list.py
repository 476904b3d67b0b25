"""The list of a checkpoint's tensors: many become one that torch reads, and a crafted one runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from pipeline.errors import UserError
from pipeline.train import checkpoint, tensor_list


class Runs:
    """A pickle of this calls `function` when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


def listed(**changes: Any) -> metadata.Metadata:
    """A list of one tensor of eight numbers; changes are to its place."""
    size = torch.Size([8])
    chunk = metadata.ChunkStorageMetadata(torch.Size([0]), size)
    item = metadata.TensorStorageMetadata(metadata.TensorProperties(torch.float32), size, [chunk])
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 100, **changes}
    places = {metadata.MetadataIndex("model.w", [0]): filesystem._StorageInfo(**place)}
    return metadata.Metadata({"model.w": item}, {"model.w": ("model.w",)}, places)


def refusal(path: Path, found: Any) -> str:
    path.write_bytes(found if isinstance(found, bytes) else pickle.dumps(found))
    with pytest.raises(ValueError, match="it is no list of tensors") as raised:
        tensor_list.read_list(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


CRAFTED: dict[str, Callable[[str], Any]] = {
    "the system": lambda command: Runs(os.system, command),
    "in a value": lambda command: metadata.Metadata({"model.w": Runs(os.system, command)}),  # type: ignore[dict-item]
    "eval": lambda command: Runs(eval, f"__import__('os').system({command!r})"),
    "a method of a known class": lambda command: b"\x80\x04\x8c\x07pathlib\x8c\x10PosixPath.unlink\x93.",
    "an import": lambda command: b"csubprocess\nPopen\n.",
    "a module of torch": lambda command: Runs(torch.load, command),
}


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=list(CRAFTED))
def test_a_crafted_list_runs_nothing_and_is_one_line(tmp_path: Path, crafted: Callable[[str], Any]) -> None:
    assert "which no list of tensors needs" in refusal(tmp_path / "list", crafted(f"touch {tmp_path}/ran"))
    assert not (tmp_path / "ran").exists()


def test_a_list_that_is_none_is_refused_whatever_it_is(tmp_path: Path) -> None:
    whole = pickle.dumps(listed())
    for found in (b"", b"\x80", whole[:-20], whole[:60] + whole[70:], [], 7, None, b"\x80\x04" + b"(" * 100_000):
        refusal(tmp_path / "list", found)
    strange = listed()
    strange.state_dict_metadata[7] = strange.state_dict_metadata["model.w"]  # type: ignore[index]
    assert "7 is not described" in refusal(tmp_path / "list", strange)
    assert "it holds a Size" in refusal(tmp_path / "list", torch.Size([1]))
    assert "which tensors there are" in refusal(tmp_path / "list", metadata.Metadata(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("elsewhere", ["/etc/passwd", "../step-00000001/__0_0.distcp", "..", "", 7])
def test_a_list_names_no_file_but_those_beside_it(tmp_path: Path, elsewhere: Any) -> None:
    assert "which is no place in a file beside it" in refusal(tmp_path / "list", listed(relative_path=elsewhere))
    assert "which is no place" in refusal(tmp_path / "list", listed(transform_descriptors=["zlib"]))


def test_one_list_of_many_says_where_everything_is(tmp_path: Path) -> None:
    whole = tensor_list.merge({1: listed(offset=7), 0: listed(offset=5)})
    (tmp_path / "list").write_bytes(tensor_list.write_list(whole))
    found = tensor_list.read_list(tmp_path / "list")
    assert tensor_list.shapes(found) == {"model.w": (8,)}
    [(index, info)] = found.storage_data.items()
    assert (index.fqn, info.relative_path, info.offset) == ("model.w", "__0_0.distcp", 5), "the first stage's counts"


def save_two(directory: Path) -> Path:
    tensors = {"model.w": torch.full((8,), 3.0), "model.half": torch.arange(4).to(torch.bfloat16)}
    return checkpoint.save(directory, 3, tensors=tensors, values={"update": 3})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_itself_reads_a_checkpoint(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = save_two(tmp_path / "c")
    loaded = {"model.w": torch.zeros(8), "model.half": torch.zeros(4, dtype=torch.bfloat16)}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    assert loaded["model.w"].tolist() == [3.0] * 8 and loaded["model.half"].tolist() == [0, 1, 2, 3]
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert whole.keys() == loaded.keys() and torch.equal(whole["model.w"], loaded["model.w"])


def write_format_1(folder: Path) -> None:
    """A checkpoint as torch writes it, and as it was described before checkpoints had a sum of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model.w": torch.full((8,), 2.0)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    describe(folder, {"format": 1, "step": 2, "values": {"update": 2}})


def describe(folder: Path, described: dict[str, Any]) -> None:
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checkpoint.json"}
    files = {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}
    (folder / "checkpoint.json").write_text(json.dumps({**described, "files": files}))


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    write_format_1(folder)
    loaded = {"model.w": torch.zeros(8)}
    checkpoint.load(checkpoint.latest(tmp_path), loaded)
    assert loaded["model.w"].tolist() == [2.0] * 8 and checkpoint.read_values(folder) == {"update": 2, "step": 2}


def test_a_crafted_checkpoint_whose_sums_are_right_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    write_format_1(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(os.system, f"touch {tmp_path}/ran")))
    describe(folder, {"format": 1, "step": 2, "values": {}})
    for read in (checkpoint.read_shapes, lambda path: checkpoint.load(path, {"model.w": torch.zeros(8)})):
        with pytest.raises(
            UserError, match=r"step-00000002: \.metadata is refused: it is no list of tensors: it names"
        ):
            read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_crafted_tensor_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    write_format_1(folder)
    torch.save(Runs(os.system, f"touch {tmp_path}/ran"), tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(listed(length=len(content))))
    describe(folder, {"format": 1, "step": 2, "values": {}})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(folder, {"model.w": torch.zeros(8)})
    assert not (tmp_path / "ran").exists()


def test_a_damaged_sum_names_the_file_that_holds_it(tmp_path: Path) -> None:
    folder = save_two(tmp_path)
    path = folder / "checkpoint.json"
    described = json.loads(path.read_text())
    described["files"]["__0_0.distcp"][1] ^= 1
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"checkpoint\.json is damaged; there is no other one beside it"):
        checkpoint.load(folder, {"model.w": torch.zeros(8)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"format": 3}', "checkpoint.json is of format 3, and this version knows those up to 2"),
        ("[" * 100_000, "checkpoint.json is damaged"),
        ("[]", "checkpoint.json is damaged"),
        ('{"format": 1, "step": 2, "values": {}, "files": []}', "checkpoint.json is damaged"),
        ('{"format": 1, "step": 2, "values": {}, "files": {".metadata": [1]}}', "checkpoint.json is damaged"),
        ('{"format": 1, "step": "2", "values": {}, "files": {}}', "checkpoint.json is damaged"),
    ],
)
def test_a_description_that_makes_no_sense_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(UserError) as raised:
        checkpoint.read_values(folder)
    assert expected in str(raised.value) and "\n" not in str(raised.value)
