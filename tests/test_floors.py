"""The house keeps its floors: imports point down only, and the two lowest floors know no clock, no network, no chance.

    3   effects: processes, wires, files      transport, world, checkpoint, training ...
    2   one stage at work                     weights, stage, executor ...
    1   decisions about models and orders     schedules, simulate, partition, models ...
    0   plain values                          errors, actions, trace, placement, settings ...

A new module gets one line in FLOORS; what lies in a package has the package's floor unless it has a line of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PURE = 1  # floors up to this one may not touch the world
IMPURE = (
    "torch.distributed",
    "threading",
    "socket",
    "time",
    "os",
    "logging",
    "random",
    "subprocess",
    "multiprocessing",
)
TORCHLESS = 0  # floors up to this one must be importable without torch

FLOORS = {
    "pipeline": 0,
    "pipeline.actions": 0,
    "pipeline.arrivals": 0,
    "pipeline.calendar": 0,
    "pipeline.divergence": 0,
    "pipeline.draw": 0,
    "pipeline.emulation": 0,
    "pipeline.errors": 0,
    "pipeline.flows": 0,
    "pipeline.gathers": 0,
    "pipeline.groups": 0,
    "pipeline.hetero": 0,
    "pipeline.outside": 0,
    "pipeline.placement": 0,
    "pipeline.plain": 0,
    "pipeline.post": 0,
    "pipeline.roll": 0,
    "pipeline.settings": 0,
    "pipeline.shares": 0,
    "pipeline.topology": 0,
    "pipeline.trace": 0,
    "pipeline.units": 0,
    "pipeline.batchnorm": 1,
    "pipeline.costs": 1,
    "pipeline.director": 1,
    "pipeline.models": 1,
    "pipeline.partition": 1,
    "pipeline.schedules": 1,
    "pipeline.thinning": 1,
    "pipeline.simulate": 1,
    "pipeline.sync": 1,
    "pipeline.assemble": 2,
    "pipeline.executor": 2,
    "pipeline.models.emulated": 2,
    "pipeline.gpu_clock": 2,
    "pipeline.optimizer_state": 2,
    "pipeline.reduce": 2,
    "pipeline.seeding": 2,
    "pipeline.stage": 2,
    "pipeline.state": 2,
    "pipeline.straggler": 2,
    "pipeline.supply": 2,
    "pipeline.transport.pool": 2,
    "pipeline.transport.protocol": 2,
    "pipeline.waiting": 2,
    "pipeline.weights": 2,
    "pipeline.archive": 3,
    "pipeline.checkpoint": 3,
    "pipeline.checkpoint_folder": 3,
    "pipeline.description": 3,
    "pipeline.durable": 3,
    "pipeline.tensor_list": 3,
    "pipeline.cli": 3,
    "pipeline.diary": 3,
    "pipeline.emulated_task": 3,
    "pipeline.answers": 3,
    "pipeline.coordination": 3,
    "pipeline.coordinator": 3,
    "pipeline.curve": 3,
    "pipeline.failures": 3,
    "pipeline.folder_lock": 3,
    "pipeline.feed": 3,
    "pipeline.frames": 3,
    "pipeline.identity": 3,
    "pipeline.initial": 3,
    "pipeline.job": 3,
    "pipeline.journal": 3,
    "pipeline.json_exchange": 3,
    "pipeline.links": 3,
    "pipeline.mailbox": 3,
    "pipeline.local_optimizer": 3,
    "pipeline.meeting": 3,
    "pipeline.mesh": 3,
    "pipeline.metrics": 3,
    "pipeline.optim": 3,
    "pipeline.patience": 1,
    "pipeline.outputs": 3,
    "pipeline.progress": 3,
    "pipeline.report": 3,
    "pipeline.resuming": 3,
    "pipeline.rounds": 3,
    "pipeline.sealed_store": 3,
    "pipeline.team": 3,
    "pipeline.training": 3,
    "pipeline.transport": 3,
    "pipeline.consensus": 3,
    "pipeline.elastic": 3,
    "pipeline.elastic_world": 3,
    "pipeline.threads": 3,
    "pipeline.mixer": 3,
    "pipeline.segments": 0,
    "pipeline.tickets": 3,
    "pipeline.vector": 2,
    "pipeline.world": 3,
}


def floor_of(module: str) -> int | None:
    """The floor of a module, by its own line or that of a package around it (but not `pipeline` itself)."""
    if module in FLOORS:
        return FLOORS[module]
    package = module.rpartition(".")[0]
    return floor_of(package) if package not in ("", "pipeline") else None


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def complaint(floor: int, name: str) -> str | None:
    """What is wrong with importing `name` (a module, or a name in one) on `floor`."""
    if is_in(name, "pipeline"):
        target = floor_of(name)
        if target is None:
            return f"imports {name}, which has no floor; add it to FLOORS"
        return f"is on floor {floor} and imports {name} of floor {target}" if target > floor else None
    if floor <= TORCHLESS and is_in(name, "torch"):
        return f"is on floor {floor}, which does without torch, and imports {name}"
    impure = [module for module in IMPURE if is_in(name, module)]
    return f"is on floor {floor}, which is pure, and imports {name}" if floor <= PURE and impure else None


def complaints(root: Path) -> list[str]:
    """Every line that breaks a rule, as "file:line: text  # what is wrong"."""
    found = []
    for path in sorted((root / "pipeline").rglob("*.py")):
        where, text = path.relative_to(root), path.read_text()
        floor = floor_of(module_name(path, root))
        if floor is None:
            found.append(f"{where}: has no floor; add {module_name(path, root)!r} to FLOORS in tests/test_floors.py")
            continue
        for line, name in imports(ast.parse(text)):
            wrong = complaint(floor, name)
            if wrong is not None:
                found.append(f"{where}:{line}: {text.splitlines()[line - 1].strip()}  # {wrong}")
    return found


def test_imports_point_down_and_the_lowest_floors_are_pure() -> None:
    found = complaints(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("placement", "import torch", "floor 0, which does without torch"),
        ("schedules", "import torch\nfrom torch import distributed", "schedules.py:2: from torch import distributed"),
        (
            "schedules",
            "def now():\n    from time import time",
            "schedules.py:2: from time import time  # is on floor 1",
        ),
        ("settings", "from os.path import join", "which is pure, and imports os.path.join"),
        ("stage", "from pipeline.world import World", "is on floor 2 and imports pipeline.world.World of floor 3"),
        ("stage", "from pipeline import world", "is on floor 2 and imports pipeline.world of floor 3"),
        ("stage", "from pipeline import attic", "imports pipeline.attic, which has no floor"),
        ("attic", "", "pipeline/attic.py: has no floor; add 'pipeline.attic' to FLOORS"),
    ],
)
def test_a_broken_rule_is_reported_with_its_line(tmp_path: Path, module: str, text: str, expected: str) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / f"{module}.py").write_text(text)
    found = complaints(tmp_path)
    assert len(found) == 1 and expected in found[0], found


def test_imports_for_type_checkers_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    (tmp_path / "pipeline" / "trace.py").write_text(text)
    assert complaints(tmp_path) == []


LAUNCHER_MAY = (
    "pipeline.placement",
    "pipeline.errors",
    "pipeline.outside",
)  # of `pipeline`: they import no torch themselves


def test_the_launcher_starts_without_torch() -> None:
    """`heturun --help` is instant."""
    found = []
    for path in sorted((ROOT / "heturun").rglob("*.py")):
        for line, name in imports(ast.parse(path.read_text())):
            light = any(is_in(name, module) for module in LAUNCHER_MAY)
            if is_in(name, "torch") or (is_in(name, "pipeline") and not light):
                found.append(f"{path.relative_to(ROOT)}:{line}: imports {name}")
    assert not found, "\n" + "\n".join(found)
