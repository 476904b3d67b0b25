"""The house keeps its rooms: who may import whom, and which modules decide without touching the world.

    train_resnet.py   train_bert.py    compat                  heturun/
                └────────┬──────────────┘                         │
                       train ──────────┬─────────┐                │
                         │          replicas ─► report            │
                    simulation  stage    │       data             │
                         │       │  sync │  coordination ─► cluster
                       models ─ transport ─ schedules     placement
                                         core       errors

A new room gets one line in ROOMS, a new module none: it may import what its room may.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def names(text: str) -> list[str]:
    return text.split()


# room of `pipeline` -> the other rooms that it may import; `errors` everybody may
ROOMS: dict[str, str] = {
    "errors": "",
    "core": "",
    "placement": "core",
    "settings": "core placement simulation",
    "cluster": "core placement",
    "schedules": "core",
    "models": "core",
    "transport": "core",
    "coordination": "core cluster",
    "sync": "core",
    "data": "core models transport coordination",
    "stage": "core schedules models transport",
    "report": "core models data",
    "simulation": "core schedules models transport coordination sync data placement",
    "replicas": "core placement sync coordination cluster stage transport data report",
    "train": "*",
    "cli": "*",
    "compat": "*",
}
# Decisions: a function of values, whatever the time, the machine or the run. Packages stand for all that is in them.
PURE = names(
    """
    train.plan report.lines
    core.group coordination.messages coordination.questions coordination.job
    core.actions core.draw core.outside core.plain core.topology core.trace core.units errors settings schedules
    models.costs models.partition models.bert models.bert_config models.criterion models.layered models.mlp
    models.resnet models.smallest sync coordination.director coordination.gather coordination.groups
    coordination.membership coordination.patience coordination.replies coordination.thinning coordination.work_queue
    data.epochs data.plan simulation.emulation simulation.profile stage.batchnorm report.divergence
    stage.loss_scaling simulation.parse_profile
    """
)
WITHOUT_TORCH = names(
    """
    core errors placement settings cluster.control cluster.cores cluster.edition cluster.identity cluster.porch
    cluster.seal cluster.wire coordination simulation.emulation simulation.profile sync.dialogue report.divergence
    simulation.parse_profile
    """
)
WORLD = (
    "torch.distributed", "threading", "socket", "time", "os", "logging", "random", "subprocess", "multiprocessing",
    "asyncio", "zmq", "tempfile", "shutil",
)  # fmt: skip
TOUCHES = ("sys.path", "os.environ", "open()")  # what a pure module does not even write
HETURUN_MAY = ("cluster", "errors", "placement", "core")  # of `pipeline`: no torch
LONGEST_MODULE, LONGEST_FUNCTION = 500, 60  # lines


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of a module of `pipeline`; "" for the package itself.

    >>> room_of("pipeline.coordination.groups.waits"), room_of("pipeline.errors"), room_of("torch")
    ('coordination', 'errors', None)
    """
    parts = module.split(".")
    return None if parts[0] != "pipeline" else (parts[1] if len(parts) > 1 else "")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions, but not of those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node)


def touched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every use of the paths, the environment or a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in TOUCHES:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
            yield node.lineno, "open()"


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def listed(module: str, names: list[str]) -> bool:
    return any(is_in(module, f"pipeline.{name}") for name in names)


def complaint(module: str, name: str) -> str | None:
    """What is wrong with importing `name` (a module, or a name in one) in `module` of pipeline."""
    room, target = room_of(module), room_of(name)
    if is_in(name, "heturun"):
        return "pipeline does not know heturun"
    if target and target not in ROOMS:
        return f"{target} is no room; add it to ROOMS"
    if target and room and target not in (room, "errors") and ROOMS[room] != "*" and target not in ROOMS[room].split():
        return f"{room} may import {ROOMS[room] or 'no other room'}, and imports {target}"
    if listed(module, PURE) and any(is_in(name, impure) for impure in WORLD):
        return f"{module} is pure, and imports {name}"
    if listed(module, WITHOUT_TORCH) and is_in(name, "torch"):
        return f"{module} does without torch, and imports {name}"
    return None


def complaints(root: Path) -> list[str]:
    """Every line that breaks a rule, as "file:line: text  # what is wrong"."""
    found = []
    for path in sorted((root / "pipeline").rglob("*.py")):
        where, text, module = path.relative_to(root), path.read_text(), module_name(path, root)
        room = room_of(module)
        if room and room not in ROOMS:
            found.append(f"{where}: {room} is no room; add it to ROOMS in tests/test_floors.py")
            continue
        tree, lines = ast.parse(text), text.splitlines()
        wrong = [(line, complaint(module, name)) for line, name in imports(tree)]
        if listed(module, PURE):
            wrong += [(line, f"{module} is pure, and touches {what}") for line, what in touched(tree)]
        found += [f"{where}:{line}: {lines[line - 1].strip()}  # {why}" for line, why in wrong if why]
    return found


def test_rooms_import_what_they_may_and_decisions_are_pure() -> None:
    found = complaints(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_lists_name_what_there_is() -> None:
    """A module that was moved or renamed does not slip out of its rule."""
    for name in (*ROOMS, *PURE, *WITHOUT_TORCH):
        place = ROOT / "pipeline" / Path(*name.split("."))
        assert place.is_dir() or place.with_suffix(".py").is_file(), f"pipeline.{name} is not there"


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("placement", "import torch", "placement.py:1: import torch  # pipeline.placement does without torch"),
        ("schedules/passes", "import torch\nfrom torch import distributed", "passes.py:2: from torch import distrib"),
        (
            "schedules/passes",
            "def now():\n    from time import time",
            "passes.py:2: from time import time  # pipeline.schedules.passes is pure, and imports time.time",
        ),
        ("settings", "from os.path import join", "is pure, and imports os.path.join"),
        ("core/draw", "text = open('x')", "is pure, and touches open"),
        ("stage/stage", "from pipeline.cluster.world import World", "stage may import core schedules models"),
        ("stage/stage", "from pipeline.attic import x", "attic is no room"),
        ("core/units", "from heturun.launch import ssh", "pipeline does not know heturun"),
        ("attic", "", "pipeline/attic.py: attic is no room; add it to ROOMS"),
    ],
)
def test_a_broken_rule_is_reported_with_its_line(tmp_path: Path, module: str, text: str, expected: str) -> None:
    path = tmp_path / "pipeline" / f"{module}.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = complaints(tmp_path)
    assert len(found) == 1 and expected in found[0], found


def test_imports_for_type_checkers_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "core").mkdir(parents=True)
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    (tmp_path / "pipeline" / "core" / "trace.py").write_text(text)
    assert complaints(tmp_path) == []


def test_the_launcher_starts_without_torch() -> None:
    """`heturun --help` is instant."""
    found = []
    for path in sorted((ROOT / "heturun").rglob("*.py")):
        for line, name in imports(ast.parse(path.read_text())):
            if is_in(name, "torch") or (room_of(name) and room_of(name) not in HETURUN_MAY):
                found.append(f"{path.relative_to(ROOT)}:{line}: imports {name}")
    assert not found, "\n" + "\n".join(found)


def sizes(root: Path) -> Iterator[tuple[str, int, int]]:
    """(what, its lines, how many it may have), of every module and function."""
    for package in ("pipeline", "heturun"):
        for path in sorted((root / package).rglob("*.py")):
            text, where = path.read_text(), path.relative_to(root)
            yield str(where), len(text.splitlines()), LONGEST_MODULE
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    yield f"{where}:{node.lineno} {node.name}", lines, LONGEST_FUNCTION


def test_modules_and_functions_are_short() -> None:
    long = [f"{what} has {lines} lines, {most} at most" for what, lines, most in sizes(ROOT) if lines > most]
    assert not long, "\n" + "\n".join(long)
