"""From options to a run: every name checked, everything left open decided, all of it written to `problem.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsmith.cost.budget import parse_budgets
from netsmith.cost.device import Device, TorchCuda, parse_device
from netsmith.errors import UserError, unknown
from netsmith.methods import METHODS, make_method, method_class
from netsmith.options import SearchOptions, checked
from netsmith.run import Run
from netsmith.spaces import SPACES, open_space, space_defaults
from netsmith.tasks import TASKS, open_task
from netsmith.train.recipe import Recipe

if TYPE_CHECKING:
    from netsmith.tasks.classification import Task

SMALL = 64
"""Pixels up to which the small spaces serve."""
PRUNET_LEAST = 128
"""Pixels from which the space `prunet` works; between the two, fbnet's does for every method."""


def prepare(options: SearchOptions, folder: str | Path | None = None, *, command: Sequence[str] = ()) -> Run:
    """A new run that asks what ``options`` ask, in ``folder`` (default: `options.out`, or the next free one in runs/).

    ``command``: what was typed, for the record.
    Raises: UserError for an unknown name, a malformed budget, missing data, or a folder that holds something else.
    """
    check(options)
    return Run.create(folder or options.out or next_folder(options), problem_of(options, command))


def check(options: SearchOptions) -> None:
    """What can be checked before anything is loaded. Raises: UserError."""
    parse_budgets(options.budget)
    if not options.budget:
        raise UserError("no budget was given; name one, such as --budget 'latency<=0.5x'")
    for kind, given, allowed in (
        *(("method", method, METHODS) for method in (options.method, *options.baselines)),
        *([("space", options.space, SPACES)] if options.space else []),
        *([("task", options.task, TASKS)] if not options.task.startswith("folder:") else []),
    ):
        if given not in allowed:
            raise unknown(kind, given, allowed)
    parse_device(options.device)
    if options.table and not options.table.is_file():
        raise UserError(f"the table {options.table} does not exist")
    for name, value in (("epochs", options.epochs), ("search_epochs", options.search_epochs)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; allowed: 1 or more")


def problem_of(options: SearchOptions, command: Sequence[str] = ()) -> dict[str, Any]:
    """The content of `problem.yaml`: the options with nothing left open, paths absolute. Opens the task's data."""
    import torch

    task_name = options.task
    if task_name.startswith("folder:"):  # a run can be continued from anywhere
        task_name = f"folder:{Path(task_name.removeprefix('folder:')).expanduser().absolute()}"
    task = open_task(task_name, options.data, resolution=options.resolution)
    space = options.space or default_space(options.method, task.resolution)
    shape = {"classes": task.classes, "channels": task.channels, "resolution": task.resolution}
    device = None if options.table else parse_device(options.device)
    space_options = {**shape, **offered_widths(space, device), **options.space_options}
    with torch.device("meta"):  # wrong options should not leave a folder behind
        open_space(space, **space_options)
    problem = {
        "task": task_name,
        "data": str(options.data.absolute()) if options.data else None,
        "resolution": options.resolution,
        "space": space,
        "space_options": space_options,
        "method": options.method,
        "method_options": method_options(options),
        "budget": list(options.budget),
        "device": options.device,
        "table": str(options.table.absolute()) if options.table else None,
        "table_part": options.table_part,
        "seed": options.seed,
        "baselines": list(options.baselines),
        "recipe": asdict(recipe(options, task)),
    }
    return {**problem, "command": list(command)} if command else problem


def offered_widths(space: str, device: Device | None) -> dict[str, int]:
    """The step between widths, where the space leaves it to the device: the device's own staircase, measured once.
    Empty where nothing can be measured (None), and for a GPU, on which one block shows no staircase."""
    if space_defaults(space).get("step", 0) is not None or device is None or isinstance(device, TorchCuda):
        return {}
    from netsmith.cost.latency import width_step
    from netsmith.cost.table import LatencyTable

    return {"step": width_step(device, LatencyTable())}


def default_space(method: str, resolution: int) -> str:
    """The space that suits the size of the images (pixels) and the method."""
    if resolution <= SMALL:
        return "fbnet_small" if method == "fbnet" else "prunet_small"
    return "fbnet" if method == "fbnet" or resolution < PRUNET_LEAST else "prunet"


def method_options(options: SearchOptions) -> dict[str, Any]:
    """The method's options, `search_epochs` among them. Raises: UserError where it has no such option."""
    given = dict(options.method_options)
    if options.search_epochs is not None:
        known = {field.name for field in fields(method_class(options.method))}
        if "steps" in known:  # a short search needs a short warm-up
            warmup = min(3, options.search_epochs // 4)
            given["steps"] = {"warmup_epochs": warmup, **given.get("steps", {}), "epochs": options.search_epochs}
        elif "epochs" in known:
            given["epochs"] = options.search_epochs
        else:
            raise UserError(f"search_epochs is {options.search_epochs}, but {options.method} trains nothing to search")
    make_method(options.method, given)
    return given


def recipe(options: SearchOptions, task: Task) -> Recipe:
    """The recipe for the task with what the options change."""
    given = options.recipe if options.epochs is None else {**options.recipe, "epochs": options.epochs}
    wanted = checked(Recipe, given, "recipe")
    return replace(Recipe.default(task), **{name: getattr(wanted, name) for name in given})


def next_folder(options: SearchOptions) -> Path:
    """runs/TASK-METHOD-NUMBER with the first number that is free."""
    task = Path(options.task.removeprefix("folder:")).name if options.task.startswith("folder:") else options.task
    number = 1
    while (folder := Path("runs", f"{task}-{options.method}-{number}")).exists():
        number += 1
    return folder
