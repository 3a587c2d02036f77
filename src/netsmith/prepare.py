"""From options to a run: every name checked, everything left open decided, all of it written to `problem.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsmith.cost.budget import parse_budgets
from netsmith.cost.device import Device, TorchCuda, parse_device
from netsmith.errors import UserError, unknown
from netsmith.methods import METHODS, check_searchable, make_method, method_class
from netsmith.options import RECORDED, SearchOptions, checked
from netsmith.run import Run
from netsmith.spaces import FROM_MODEL, SPACES, open_space, space_defaults
from netsmith.tasks import IN_FOLDERS, TASKS, open_task
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
    problem = problem_of(options, command)
    return Run.create(folder or options.out or next_folder(options.task, options.method), problem)


def open_run(folder: Path) -> Run:
    """The run in a folder, to go on with. Raises: UserError where it is none, or asks in another version's words."""
    run = Run.open(folder)
    asked = {key: value for key, value in run.problem.items() if key not in RECORDED}
    if "methods" in asked:
        run.close()
        raise UserError(f"{folder} is a comparison, not one run: go on with netsmith compare --resume {folder}")
    if "recipe_name" in asked:
        run.close()
        raise UserError(f"{folder} is a training, not a search: the command that began it goes on with it")
    given_once = {"out", "epochs", "search_epochs"}  # they have gone into the folder, the recipe and the method
    try:
        if lacking := [f.name for f in fields(SearchOptions) if f.name not in given_once and f.name not in asked]:
            raise UserError(f"it lacks {lacking[0]}")
        options = checked(SearchOptions, asked)
        checked(Recipe, options.recipe, "recipe")
        make_method(options.method, options.method_options)
    except UserError as error:
        run.close()
        raise UserError(f"{folder / 'problem.yaml'} is not of this version of netsmith: {error}") from None
    return run


def check(options: SearchOptions) -> None:
    """What can be checked before anything is loaded. Raises: UserError."""
    parse_budgets(options.budget)
    if not options.budget:
        raise UserError("no budget was given; name one, such as --budget 'latency<=0.5x'")
    for kind, given, allowed in (
        *(("method", method, METHODS) for method in (options.method, *options.baselines)),
        *([("space", options.space, SPACES)] if options.space not in (None, FROM_MODEL) else []),
        *([("task", options.task, TASKS)] if not options.task.startswith(IN_FOLDERS) else []),
    ):
        if given not in allowed:
            raise unknown(kind, given, allowed)
    parse_device(options.device)
    if options.data and options.task == "digits":
        raise UserError(f"--data {options.data} was given, but the digits come with scikit-learn")
    if options.table_part and not options.table:
        raise UserError(f"--table-part {options.table_part} was given without --table")
    if options.table and not options.table.is_file():
        raise UserError(f"the table {options.table} does not exist")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"seed is {options.seed}; allowed: 0 to {2**32 - 1}")
    trained = options.space == FROM_MODEL  # and may stay as it is
    given = options.recipe.get("epochs")
    for name, value, least in (
        ("epochs", options.epochs, 0 if trained else 1),
        ("recipe.epochs", given if isinstance(given, int) else None, 0 if trained else 1),
        ("search_epochs", options.search_epochs, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; allowed: {least} or more")


def problem_of(options: SearchOptions, command: Sequence[str] = ()) -> dict[str, Any]:
    """The content of `problem.yaml`: the options with nothing left open, paths absolute. Opens the task's data."""
    import torch

    from netsmith.cost.counts import BranchCount
    from netsmith.decisions import decisions

    task_name = absolute_task(options.task)
    task = open_task(task_name, options.data, resolution=options.resolution)
    data = options.data
    if not data and task_name != "digits" and not task_name.startswith(IN_FOLDERS):
        found = Path(task.source)  # who continues the run may stand elsewhere, with other files beside
        data = found if found.is_dir() else found.parent
    space = options.space or default_space(options.method, task.resolution)
    shape = {"classes": task.classes, "channels": task.channels, "resolution": task.resolution}
    device = None if options.table else parse_device(options.device)
    space_options = {**offered_widths(space, device), **options.space_options, **shape}
    with torch.device("meta"):  # wrong options should not leave a folder behind
        opened = open_space(space, **space_options)
    branches = BranchCount()(opened, task.input_shape)
    budgets = [budget for point in parse_budgets(options.budget) for budget in point]
    if not branches and any(b.metric == "branches" for b in budgets):
        raise UserError(f"a budget on branches was given, but the space {space!r} has none; repvgg_small and repvgg do")
    below = [b for b in budgets if b.relative and b.limit < 1 and b.metric != "branches"]
    if below and branches == len(decisions(opened)) > 0:
        raise UserError(
            f"{below[0]} cannot be kept: all networks of the space {space!r} fold to the same file; "
            "a budget on branches can, such as branches<=0.34x"
        )
    check_searchable(options.method, opened, space, method_options(options))
    for baseline in options.baselines:
        check_searchable(baseline, opened, space)
    problem = {
        "task": task_name,
        **({"images": task.fingerprint} if task.fingerprint else {}),
        "data": str(data.absolute()) if data else None,
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
    if space == FROM_MODEL or device is None or isinstance(device, TorchCuda):
        return {}
    if space_defaults(space).get("step", 0) is not None:
        return {}
    from netsmith.cost.latency import width_step
    from netsmith.cost.table import LatencyTable

    return {"step": width_step(device, LatencyTable())}


def default_space(method: str, resolution: int) -> str:
    """The space that suits the size of the images (pixels) and the method."""
    if method == "repnas":
        return "repvgg_small" if resolution <= SMALL else "repvgg"
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
    lengths = {name: given[name] for name in ("epochs", "batch_size") if name in given}
    return replace(Recipe.default(task, **lengths), **{name: getattr(wanted, name) for name in given})


def absolute_task(name: str) -> str:
    """The task's name, a folder in it absolute: a run can be continued from anywhere."""
    if not name.startswith(IN_FOLDERS):
        return name
    kind, _, place = name.partition(":")
    return f"{kind}:{Path(place).expanduser().absolute()}"


def next_folder(task: str, method: str = "") -> Path:
    """runs/TASK-METHOD-NUMBER (runs/compare-TASK-NUMBER without a method) with the first number that is free; the
    folder is made, so that it is nobody else's."""
    task = Path(task.partition(":")[2]).resolve().name if task.startswith(IN_FOLDERS) else task
    name = f"{task}-{method}" if method else f"compare-{task}"
    number = 1
    while True:
        folder = Path("runs", f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from error
