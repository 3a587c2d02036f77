"""What a search is asked for, and the strict reader of YAML files that ask for it. Importing it loads no torch.

    task: fashion-mnist
    budget: [latency<=0.3x, params<=500k]
    method: fbnet
    method_options: {finals: {samples: 10}, steps: {epochs: 20}}
    recipe: {learning_rate: 5e-2}

A file holds the fields of `SearchOptions`; a `problem.yaml` of a run is such a file too, so a run can be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from netsmith.errors import UserError

Options = TypeVar("Options")

Later = tyro.conf.arg(help_behavior_hint="")
"""Decided later: there is no default to show."""

RECORDED = ("format", "command", "images")
"""Keys of a `problem.yaml` that ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What a network has to keep, on which device, and how it is trained."""

    task: str | None = None
    """What to learn."""
    data: Annotated[Path | None, Later] = None
    """Folder with the files of the task (default: $NETSMITH_DATA, ./data or ../shared/data)."""
    resolution: Annotated[int | None, Later] = None
    """Pixels a side of the images that the network sees (default: the task's own; 128 for folders)."""
    budget: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, Later] = ("latency<=0.5x",)
    """What the file must keep, in quotes: 'latency<=5ms', 'params<=1M', or 'latency<=0.5x' (the default), relative to
    the largest network of the space, or to the one that is compressed. 'latency<=0.3x,0.5x' asks for a front. May be
    repeated, to hold at once."""
    device: str = "ort-cpu"
    """What latency is measured on: `netsmith list devices`; options as in ort-cpu:threads=2."""
    table: Annotated[Path | None, Later] = None
    """Search for a device that is not here: a table of its latencies, measured by others."""
    table_part: Annotated[str | None, Later] = None
    """Which table of a file that holds several, such as gpu."""
    out: Annotated[Path | None, Later] = None
    """Folder of the run (default: runs/TASK-METHOD-NUMBER, runs/compare-TASK-NUMBER)."""
    epochs: Annotated[int | None, Later] = None
    """Passes of the final training (default: by the number and size of the images); 0, in compress alone: none."""
    search_epochs: Annotated[int | None, Later] = None
    """Passes of the training inside the search (default: the method's)."""
    method_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's dataclass; in a file only."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Fields of `Recipe`, how networks are trained; in a file only."""


@dataclass(frozen=True, kw_only=True)
class ProblemOptions(BudgetOptions):
    """What is to be solved, whichever way."""

    task: str = "digits"
    """What to learn: `netsmith list tasks`, or folder:DIR for your own images."""
    space: Annotated[str | None, Later] = None
    """Where to search: `netsmith list spaces` (default: by image size and method)."""
    space_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the space's function, but for classes, channels and resolution, which the task decides; in a file
    only."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ProblemOptions):
    """Search a network that keeps a budget, train it, export it, and measure the exported file."""

    method: str = "prunet"
    """How to search: `netsmith list methods`."""
    seed: int = 0
    """Of everything random: the same seed, the same network."""
    baselines: tuple[str, ...] = ("random", "capacity")
    """Methods to compare with, at the same budget and with the same training; no names: none."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions(BudgetOptions):
    """Make a trained network keep a budget; relative ones are relative to that network, as measured here."""

    model: Annotated[str | None, Later] = None
    """What to compress: the folder of a run, timm:NAME, module:path.to:factory, or of `netsmith list networks`."""
    weights: Annotated[Path | None, Later] = None
    """A safetensors file with its weights, where it is no run (default for timm:NAME: timm's own)."""
    task: Annotated[str | None, Later] = None
    """What it has learnt: `netsmith list tasks`, or folder:DIR (default: the run's)."""
    method: str = "lana"
    """How: `netsmith list methods`."""
    pool: Annotated[Literal["identity", "small", "full", "channels", "bits"] | None, Later] = None
    """What is open: identity (layers may be left out, which needs no training), small (four cheap operations may stand
    in their place as well), full (some seventy), channels (layers may become narrower) or bits (layers may compute in
    int8). Default: what the method is made for."""
    seed: int = 0
    """Of everything random."""
    baselines: tuple[str, ...] = ("random",)
    """Methods to compare with, at the same budget and with the same fine-tuning; no names: none."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ProblemOptions):
    """Several methods on one problem, beside the baselines; `method_options` holds those of each, by its name."""

    methods: str = "prunet"
    """What to compare, such as prunet,fbnet: `netsmith list methods`; random, capacity and best_of always run too."""
    seeds: int = 3
    """How often each method runs, with seeds 0, 1, ...; five make an interval that says something."""
    spaces: dict[str, str] = field(default_factory=dict)
    """Method -> the space that it searches instead; by itself for methods that cannot search the one of the others. In
    a file only."""
    jobs: Annotated[int | None, Later] = None
    """Runs at a time (default: one for each core where a single thread trains, as on images up to 16 px, else one)."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """A network of the literature, and how to train it."""

    model: Annotated[str | None, Later] = None
    """What to train: `netsmith list networks`, timm:NAME, or module:path.to:factory, a function of yours."""
    recipe: Annotated[str | None, Later] = None
    """How, by name: `netsmith list recipes` (default: what suits the task)."""
    task: str = "digits"
    """What to learn: `netsmith list tasks`, folder:DIR or shards:DIR."""
    data: Annotated[Path | None, Later] = None
    """Folder with the files of the task (default: $NETSMITH_DATA, ./data or ../shared/data)."""
    resolution: Annotated[int | None, Later] = None
    """Pixels a side of the images of the test (default: the task's own; for folders and shards the network's)."""
    batch_size: Annotated[int | None, Later] = None
    """Images a step, over all replicas (default: the recipe's, less where it leaves under 20 steps an epoch)."""
    epochs: Annotated[int | None, Later] = None
    """Passes over the training images (default: the recipe's)."""
    accumulate: int = 1
    """Parts in which each replica's share of a batch goes through the network, to save memory."""
    norm_replicas: Annotated[int | None, Later] = None
    """Replicas whose images batch norm joins (default: enough for 128 images; all where there are at most 8)."""
    watch: bool = False
    """Train without a fifth of the images and score these after each epoch."""
    precision: Annotated[Literal["fp32", "bf16"] | None, Later] = None
    """Of the convolutions (default: bf16 on a GPU, else fp32)."""
    device: Annotated[Literal["cpu", "cuda"] | None, Later] = None
    """What to train on (default: a GPU, if there is one). The file is timed on the CPU."""
    compile: bool = False
    """Train through torch.compile."""
    loaders: Annotated[int | None, Later] = None
    """Processes of each replica that read images ahead (default: 0 where images lie in memory, else up to 8)."""
    save_every: int = 1000
    """Steps between two checkpoints; there is one after each epoch too."""
    seed: int = 0
    """Of everything random."""
    out: Annotated[Path | None, Later] = None
    """Folder of the run (default: runs/TASK-MODEL-NUMBER; the same command goes on with one that was stopped)."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network's function, such as {norm: group}; in a file only."""
    recipe_options: dict[str, Any] = field(default_factory=dict)
    """Fields of `Recipe` that replace the recipe's; in a file only."""


def read_config(file: Path) -> SearchOptions:
    """What a YAML file asks a search for. Raises: UserError, as `read_options`."""
    return read_options(file, SearchOptions)


def read_options(file: Path, kind: type[Options]) -> Options:
    """The options in a YAML file. Raises: UserError for a file that is missing, no YAML, or asks for the unknown."""
    import yaml

    from netsmith.run import load_yaml

    try:
        data = load_yaml(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f": see line {where.line + 1}" + (f" ({what})" if what else "") if where else ""
        raise UserError(f"{file} is no YAML that can be read{line}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{file} holds a {type(data).__name__}; options are a mapping, such as 'task: digits'")
    try:
        return checked(kind, {key: value for key, value in data.items() if key not in RECORDED})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def checked(kind: type[Options], data: dict[str, Any], path: str = "") -> Options:
    """A dataclass from plain data, strictly: no unknown keys, no "3" for 3. ``path`` stands before the keys in errors.

    Raises: UserError such as "method_options.populaton: unknown; did you mean population?".
    """
    from pydantic import TypeAdapter, ValidationError

    for key in _unknown(kind, data, path):
        raise UserError(key)
    try:
        # JSON, because strict Python mode takes no dict for a dataclass and no list for a tuple.
        text = json.dumps(_filled(kind, data), default=str)
    except ValueError:  # YAML can say `a: &here {x: *here}`
        raise UserError(f"{path or 'a mapping'} holds itself") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        where = ".".join([path, *map(str, error["loc"])]).lstrip(".")
        should = (
            error["msg"].removeprefix("Input ").replace("a valid array", "a list").replace("an object", "a mapping")
        )
        raise UserError(f"{where}: {error['input']!r} was given; it {should}") from None


def _filled(kind: Any, data: dict[str, Any]) -> dict[str, Any]:
    """A dataclass inside that is given in part keeps the rest of what it is by default *here*, in this dataclass."""
    filled = dict(data)
    for each in fields(kind):
        default = each.default_factory() if callable(each.default_factory) else each.default
        if is_dataclass(default) and not isinstance(default, type) and isinstance(given := data.get(each.name), dict):
            filled[each.name] = {**asdict(default), **_filled(type(default), given)}
    return filled


def _unknown(kind: Any, data: Any, path: str) -> Iterator[str]:
    """A sentence for every key that the dataclass, or one inside it, does not have."""
    if not isinstance(data, dict):
        return
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in fields(kind)}
    for key, value in data.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known) or 'nothing'}"
            yield f"{where}: unknown; {hint}"
        elif is_dataclass(known[key]):
            yield from _unknown(known[key], value, where)
