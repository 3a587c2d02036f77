"""Imports only go down: the floors are read from docs/architecture.md, the imports from the source."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "netsmith"
FILES = sorted(SOURCE.rglob("*.py"))


def floors() -> dict[str, int]:
    """Package or module directly under netsmith -> its floor, 0 at the top."""
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    found: dict[str, int] = {}
    for floor, line in enumerate(line for line in drawing.splitlines() if line.strip()):
        if names := re.findall(r"(\w+)/", line):  # what follows a package on its line are its files
            found.update(dict.fromkeys(names, floor))
        else:
            found.update(dict.fromkeys(re.findall(r"(\w+)\.py", line), floor))
    return found


def module_of(file: Path) -> str:
    return ".".join(("netsmith", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imports(file: Path, *, when_loaded: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module of netsmith); ``when_loaded`` leaves out imports inside functions and for type checkers."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            )
            if not (when_loaded and lazy):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in full]
        for name in names:
            if name.split(".")[0] == "netsmith":
                yield node.lineno, name


def test_imports_only_go_down():
    order, wrong = floors(), []
    for file in FILES:
        here = (*module_of(file).split("."), "")[1]
        for line, name in imports(file):
            there = (*name.split("."), "")[1]
            where = f"{file.relative_to(ROOT)}:{line}"
            if here and not there:
                wrong.append(f"{where}: imports the top package")
            elif missing := [part for part in (here, there) if part and part not in order]:
                wrong.append(f"{where}: {missing[0]!r} has no floor in docs/architecture.md")
            elif here and order[there] < order[here]:
                wrong.append(f"{where}: {here} imports {there}, which is above it")
            elif here == there == "methods" and "." in name and module_of(file) != "netsmith.methods":
                wrong.append(f"{where}: a method imports a method")
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    graph = {module_of(file): {name for _, name in imports(file, when_loaded=True)} for file in FILES}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_every_floor_of_the_house_is_known():
    top = {file.stem if file.parent == SOURCE else file.relative_to(SOURCE).parts[0] for file in FILES} - {"__init__"}
    assert not top - set(floors())


def test_the_reader_of_imports_sees_everything(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import netsmith.errors, torch\nfrom netsmith.cost import counts\nfrom netsmith.gates import draw\n"
        "def f():\n    from netsmith import run\n"
    )
    assert list(imports(file)) == [
        (1, "netsmith.errors"),
        (2, "netsmith.cost.counts"),
        (3, "netsmith.gates"),
        (5, "netsmith.run"),
    ]
    assert len(list(imports(file, when_loaded=True))) == 3


def test_lists_are_cheap_to_import():
    light = [name for name in ("netsmith", "netsmith.errors", "netsmith.spaces", "netsmith.tasks") if name in MODULES]
    heavy = ["torch", "torchvision", "timm", "scipy", "optuna"]
    code = f"import sys, {', '.join(light)}; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr
