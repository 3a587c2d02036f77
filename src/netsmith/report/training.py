"""The page of a training, or of several side by side: the gate, what each epoch did, the recipe, the network.

Several share the table, the curves and the recipe; the rest is each one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from netsmith.errors import UserError
from netsmith.options import checked
from netsmith.report import drawing, figures
from netsmith.report.folder import Folder, read
from netsmith.report.networks import Network, items, metric_name, pick
from netsmith.report.numbers import DASH, duration, number, quality, significant
from netsmith.report.page import Gallery, labels, render
from netsmith.report.table import Cell, Row, arrange, columns
from netsmith.run import load_yaml
from netsmith.train.recipe import Recipe, stage

CURVES = {
    "loss": "loss",
    "accuracy": "accuracy on search",
    "learning_rate": "learning rate at the end of the epoch",
    "resolution": "pixels a side of the training images",
    "seconds": "seconds an epoch",
}
"""What of an epoch is drawn, and what it is called."""
FEW = 12
"""Epochs up to which each has a tick: plotly would divide them."""


def is_training(folder: Path) -> bool:
    """Whether a folder is the run of a training, finished or not."""
    file = folder / "problem.yaml"
    return file.is_file() and "recipe_name" in _problem(file.read_text("utf-8", errors="replace"))


def write_trainings(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about finished trainings. UserError: one has no result that can be read."""
    folders = [read(path, label) for path, label in zip(runs, labels(runs), strict=True)]
    gallery = Gallery()
    layers = [items(folder.result, "layers") for folder in folders]
    kinds = list(dict.fromkeys(drawing.kind(layer) for own in layers for layer in own))
    drawn = [drawing.blocks(own, kinds) for own in layers]
    epochs = [epoch for folder in folders for epoch in _epochs(folder, alone=len(folders) == 1)]
    context = {
        "verdict": _verdict(folders),
        "rows": [_row(folder) for folder in folders],
        "curves": _curves(epochs, gallery),
        "tuned": any(_history(folder)[1] for folder in folders),
        "watched": any("accuracy" in epoch for epoch in epochs),
        "recipe": _recipe(folders),
        "sections": [
            {
                "folder": folder,
                "result": folder.result,
                "metric": metric_name(folder.result),
                "blocks": blocks,
                "kinds": list(dict.fromkeys((block.kind, block.colour) for block in blocks)),
                "skipped": _skipped(folder),
                "versions": _versions(folder),
            }
            for folder, blocks in zip(folders, drawn, strict=True)
        ],
        "title": f"{folders[0].label} · netsmith" if len(folders) == 1 else f"{len(folders)} trainings · netsmith",
    }
    return render("training.html.j2", context, gallery, out)


def _problem(text: str | None) -> dict[str, Any]:
    """What a problem.yaml says; nothing where it cannot be read."""
    try:
        problem = load_yaml(text or "")
    except yaml.YAMLError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _verdict(folders: list[Folder]) -> dict[str, Any]:
    """What the gate said, and how long it took to get there."""
    kept = [folder.kept for folder in folders]
    if len(folders) > 1:
        sentence = f"{kept.count(True)} of {len(folders)} trainings passed the gate."
        for said, value in (("Failed", False), ("No verdict", None)):
            named = [folder.label for folder in folders if folder.kept is value]
            sentence += f" {said}: {', '.join(named)}." if named else ""
        return {"kept": False if False in kept else None if None in kept else True, "sentences": [sentence]}
    (folder,) = folders
    said = str(pick(folder.result, "verdict") or "no verdict was recorded")
    said = said.removeprefix("kept: ").removeprefix("broken: ")
    name = pick(folder.result, "recipe")
    recipe = f"by the recipe {name}" if name else "by the task's own recipe"
    epochs, tuned = map(len, _history(folder))
    length = f"{epochs} epoch{'s' if epochs != 1 else ''}" + (f" and {tuned} of tuning" if tuned else "")
    seconds = [number(epoch.get("seconds")) for epoch in items(folder.result, "history")]
    spent = f", in {duration(sum(filter(None, seconds)))}" if any(seconds) else ""
    return {
        "kept": kept[0],
        "sentences": [
            f"{pick(folder.result, 'model')} on {pick(folder.result, 'task')}: {said}.",
            f"Trained {recipe} for {length}{spent}.",
        ],
    }


def _history(folder: Folder) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The epochs of the training, and those of the tuning after it, which are numbered from 1 again."""
    epochs = items(folder.result, "history")
    again = next((i for i, epoch in enumerate(epochs) if i and epoch.get("epoch") == 1), len(epochs))
    return epochs[:again], epochs[again:]


def _row(folder: Folder) -> Row:
    """One training in the table: the costs of its file, and how fast it was made."""
    result = folder.result
    note = f"{pick(result, 'model')} on {pick(result, 'task')}, seed {pick(result, 'seed')}"
    network = Network("found", folder.label, result, None, metric_name(result), note)
    scored, *costs = arrange([network], columns([result]))[0].cells
    torch_said = f"{quality(network.metric, pick(result, 'metric', 'test'))} in PyTorch"
    speed, share, replicas = (number(pick(result, key)) for key in ("images_per_second", "data_share", "replicas"))
    processes = "" if replicas is None else f"by {replicas:.0f} process{'es' if replicas != 1 else ''}"
    made = [
        Cell("images/s", DASH if speed is None else significant(speed), detail=processes),
        Cell("waiting", DASH if share is None else f"{100 * share:.1f} %", detail="for images"),
        Cell("skipped", f"{len(_skipped(folder)):,}", detail="images"),
    ]
    return Row(network, [replace(scored, detail=torch_said), *costs, *made])


def _curves(epochs: list[dict[str, Any]], gallery: Gallery) -> list[dict[str, Any] | None]:
    last = max((epoch["epoch"] for epoch in epochs), default=0)
    hung = []
    for key, title in CURVES.items():
        if figure := figures.training(epochs, key, title):
            figure.layout["xaxis"] |= {"dtick": 1} if last <= FEW else {}
            if key == "resolution":
                for trace in figure.data:
                    trace["line"] |= {"shape": "hvh"}  # a size holds for its whole epoch
            if key in ("resolution", "seconds"):
                figure.layout["yaxis"] |= {"rangemode": "tozero"}
            hung.append(gallery.hang(figure))
    return hung


def _epochs(folder: Folder, *, alone: bool) -> list[dict[str, Any]]:
    """Its epochs in a row, tuning after training; each with the line it belongs to (one for each of several runs) and,
    where the recipe changes it, the size of its images."""
    problem = _problem(folder.problem)
    try:
        recipe = checked(Recipe, problem.get("recipe") or {}, "recipe")
    except UserError:  # another version's
        recipe = Recipe()
    trained, tuned = _history(folder)
    names = ("training", "tuning") if alone else (folder.label, folder.label)
    row = [epoch | {"which": names[0], "resolution": stage(recipe, i)[0]} for i, epoch in enumerate(trained)]
    full = problem.get("resolution") if recipe.resolutions else None
    row += [epoch | {"which": names[1], "resolution": full} for epoch in tuned]
    return [epoch | {"epoch": at} for at, epoch in enumerate(row, 1)]


def _recipe(folders: list[Folder]) -> dict[str, list[dict[str, Any]]]:
    """The options of the recipes: those that differ from the default somewhere, and the others."""
    usual = {name: _text(value) for name, value in asdict(Recipe()).items()}
    told = [pick(_problem(folder.problem), "recipe") for folder in folders]
    own = [{str(k): _text(v) for k, v in recipe.items()} if isinstance(recipe, dict) else {} for recipe in told]
    options = {"changed": [], "usual": []}
    for name in dict.fromkeys([*usual, *(name for recipe in own for name in recipe)]):
        default = usual.get(name, DASH)  # an option that this version no longer has
        values = [recipe.get(name, default) for recipe in own]
        kind = "usual" if {*values} <= {default} else "changed"
        options[kind].append({"name": name, "default": default, "values": values})
    return options


def _text(value: Any) -> str:
    """
    >>> _text(None), _text(False), _text([128, 224]), _text(1 / 3)
    ('none', 'false', '128, 224', '0.333333')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _skipped(folder: Folder) -> list[str]:
    """The images that could not be read."""
    skipped = pick(folder.result, "skipped")
    return list(map(str, skipped)) if isinstance(skipped, list) else []


def _versions(folder: Folder) -> str:
    """Of what trained it and of what timed the file."""
    told = [pick(folder.result, "versions"), pick(folder.result, "device", "versions")]
    known = {name: version for versions in told if isinstance(versions, dict) for name, version in versions.items()}
    return ", ".join(f"{name} {version}" for name, version in known.items())
