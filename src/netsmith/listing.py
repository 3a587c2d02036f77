"""What there is, name by name, in one line each: docstrings read from the source, so that nothing is loaded."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from netsmith.cost import COSTS
from netsmith.methods import METHODS
from netsmith.spaces import SPACES
from netsmith.tasks import TASKS


def listing(what: str) -> dict[str, str]:
    """Name -> one line, for "spaces", "methods", "devices", "tasks", "costs", "networks" or "recipes"."""
    if what == "tasks":
        return dict(TASKS)
    if what == "networks":
        from netsmith.spaces.networks import RESOLUTIONS

        return {name: f"trained at {pixels} px" for name, pixels in RESOLUTIONS.items()}
    if what == "recipes":
        from netsmith.train.recipes import RECIPES

        return {
            name: f"{one.model} at {one.resolution} px: {one.recipe.optimizer}, batches of {one.recipe.batch_size:,}, "
            f"{one.recipe.epochs} epochs"
            for name, one in RECIPES.items()
        }
    if what == "devices":
        from netsmith.cost.device import DEVICES

        return {name: _first_line(kind.__doc__) for name, kind in DEVICES.items()}
    places = {"spaces": SPACES, "methods": METHODS, "costs": COSTS}[what]
    return {name: _first_line(_docstring(name, *place.split(":"))) for name, place in places.items()}


def _docstring(name: str, module: str, member: str) -> str | None:
    """Of the file, where it is about nothing else, or of the function or class in it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    if module.endswith(f".{name}"):
        return ast.get_docstring(tree)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return next(
        (ast.get_docstring(node) for node in tree.body if isinstance(node, kinds) and node.name == member), None
    )


def _first_line(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())


def method_table() -> str:
    """The table of methods in the README, as Markdown."""
    lines = ["| method | idea | file |", "|---|---|---|"]
    for name, text in listing("methods").items():
        file = METHODS[name].split(":")[0].replace(".", "/") + ".py"
        lines.append(f"| `{name}` | {text} | [{Path(file).name}](src/{file}) |")
    return "\n".join(lines)
