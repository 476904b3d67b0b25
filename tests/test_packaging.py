"""What is installed: the same for pip and conda users, and nothing that shadows another package."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def same(requirement: str) -> str:
    """A requirement without the spaces that mean nothing."""
    return re.sub(r"\s*([<>=~!;,]+)\s*", r"\1", requirement.strip())


def test_conda_users_get_the_same_dependencies_as_pip_users() -> None:
    described = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in described["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in described["dependencies"] if isinstance(entry, dict)]
    wanted = project()["project"]
    assert sorted(map(same, pip)) == sorted(
        map(same, [*wanted["dependencies"], *wanted["optional-dependencies"]["dev"]])
    )
    assert same(conda[0]) == same("python" + wanted["requires-python"]) and "pip" in conda


def test_only_heturun_and_pipeline_are_installed() -> None:
    include = project()["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in packages} == {"heturun", "pipeline"}
    folders = {path.parent for top in ("heturun", "pipeline") for path in (ROOT / top).rglob("*.py")}
    assert {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} == set(packages)


def test_the_command_that_is_installed_is_heturun() -> None:
    assert list(project()["project"]["scripts"]) == ["heturun"]


DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "zmq": "pyzmq"}  # of modules with another name
BROUGHT = {"numpy": "torchvision", "PIL": "torchvision"}  # modules of a dependency's own dependency


def foreign_imports(pattern: str) -> Iterator[tuple[str, str]]:
    """(file, top-level module) of every import of somebody else's code."""
    own = {path.name for path in ROOT.iterdir() if path.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
    for path in ROOT.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names} - own - set(sys.stdlib_module_names)
            yield from ((str(path.relative_to(ROOT)), top) for top in tops)


@pytest.mark.parametrize("pattern", ["heturun/**/*.py", "pipeline/**/*.py", "datasets/**/*.py"])
def test_every_import_is_declared(pattern: str) -> None:
    declared = {re.split(r"[^\w.-]", same(entry))[0].lower() for entry in project()["project"]["dependencies"]}
    wanted = [(file, BROUGHT.get(name, DISTRIBUTIONS.get(name, name))) for file, name in foreign_imports(pattern)]
    assert wanted, f"no imports in {pattern}: has it moved?"
    assert [pair for pair in wanted if pair[1] not in declared] == []
