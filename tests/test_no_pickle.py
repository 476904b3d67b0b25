"""Nothing that comes over a network is unpickled: what would do so does not occur in the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVES = (
    "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "send_object_list",
    "recv_object_list",
)  # fmt: skip
LOADERS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
ELSEWHERE = {
    "pipeline/train/checkpoint.py",
    "pipeline/train/tensor_list.py",
}  # read files, through an unpickler of their own


def complaints(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names += [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: {name}" for name in names if name in (*LOADERS, *COLLECTIVES))
        elif isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if safe.get("weights_only") != "True" and not ast.unparse(node.func).startswith("n"):
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if safe.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: load with allow_pickle"


@pytest.mark.parametrize("package", ["pipeline", "heturun"])
def test_nothing_is_unpickled(package: str) -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / package).rglob("*.py")}
    found = {name: list(complaints(path.read_text())) for name, path in files.items() if name not in ELSEWHERE}
    assert not {name: each for name, each in found.items() if each}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "dist.gather_object(1)",
        "from torch.distributed import all_gather_object",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_what_unpickles_is_found(text: str) -> None:
    assert list(complaints(text))


def test_what_does_not_is_let_through() -> None:
    assert not list(complaints("torch.load(f, weights_only=True)\nnp.load(f)\njson.loads(x)\ndist.all_gather(a, b)"))
