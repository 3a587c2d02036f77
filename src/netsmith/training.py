"""Train a network of the literature by a named recipe, export it, and judge the file.

Alone, or as one of the replicas that torchrun started: the first holds the run, the others train along. The same
command goes on where it was stopped, which is how a killed replica comes back.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netsmith.cost.device import parse_device
from netsmith.cost.meter import cpu_name
from netsmith.errors import UserError, unknown
from netsmith.job import Say, threads_for
from netsmith.options import TrainingOptions, checked
from netsmith.prepare import absolute_task
from netsmith.run import Run
from netsmith.ship.export import export
from netsmith.ship.gate import gate
from netsmith.ship.weights import load, save
from netsmith.spaces import open_space
from netsmith.spaces.networks import NETWORKS, RESOLUTIONS
from netsmith.spaces.outside import PREFIXES, usual_resolution
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task, steps
from netsmith.tasks.folder import FolderImages
from netsmith.tasks.shards import ShardImages
from netsmith.train.loop import train
from netsmith.train.recipe import Recipe
from netsmith.train.recipes import published
from netsmith.train.replicas import Replica, joined
from netsmith.train.resolution import tune

LEAST_STEPS = 20
"""An epoch has, where the batch size is left open: with fewer there is nothing to learn from a gradient."""
TINY = 64
"""Pixels up to which a network that can do without the stride of its stem does."""
SHORT = 2000
"""Steps below which batch norm's running statistics follow ten times faster than EfficientNet's (TensorFlow's 0.99):
after a few hundred steps those would still be the ones of the start."""
FOR_TINY = {
    "efficientnet_b": ("stem_stride", 1),
    "amoebanet": ("small", True),
    "convnext": ("patch", 1),
    "ran_i": ("patch", 1),
    "ran_e": ("stem_stride", 1),
}
"""Family -> the option that does this."""


def train_network(options: TrainingOptions, say: Say, *, command: Sequence[str] = ()) -> dict | None:
    """Train, export and judge; the content of `result.json`, which the first replica writes and the others lack.

    Raises: UserError for an unknown name, an option out of range, missing data, or what `train` raises.
    """
    check_training(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but PyTorch sees no GPU here")
    with joined(device) as replica, ExitStack() as stack:
        here: list[tuple[Run, Task]] = []  # of the first replica

        def opened() -> dict[str, Any]:
            task = open_task(absolute_task(options.task), options.data, resolution=_resolution(options))
            run = stack.enter_context(_open(options, problem_of(options, task, device, command)))
            here.append((run, task))
            say.line(f"{run.path}: {run.problem['space']} on {task.name}, {_in_words(run.problem['recipe'])}")
            source = task.splits[run.problem["split"]].source
            if isinstance(source, ShardImages) and source.skipped:
                say.line(f"left out: {len(source.skipped)} shards that cannot be read, such as {source.skipped[0]}")
            done = run.has("trained")
            seeds = {name: run.seed(name) for name in ("network", "train", "tune")}
            return {"problem": run.problem, "path": str(run.path.absolute()), "done": done, "seeds": seeds}

        asked = replica.tell(opened)
        if asked["done"] and not replica.first:
            return None
        with threads_for(asked["problem"]["resolution"]):
            run, task = here[0] if here else (None, task_of(asked["problem"]))
            return _Training(asked, options, device, replica, run, task, say).result()


@dataclass
class _Training:
    """A training as one replica has it; the ``run`` is the first one's."""

    asked: dict[str, Any]
    options: TrainingOptions
    device: str
    replica: Replica
    run: Run | None
    task: Task
    say: Say

    def __post_init__(self) -> None:
        self.recipe = checked(Recipe, self.asked["problem"]["recipe"], "recipe")

    def result(self) -> dict | None:
        network = built(self.asked["problem"], self.asked["seeds"]["network"])
        if self.run is None:
            self._train(network)
            return None
        run = self.run
        told = run.once("trained", lambda: self._trained_once(network))
        network = load(run.path)
        result = run.once("ship", lambda: {**judged(run, network, self.task), **told})
        run.write_json("result.json", result)
        return {**result, "run": str(run.path)}

    def _trained_once(self, network: nn.Module) -> dict:
        assert self.run is not None
        started = time.perf_counter()
        history = self._train(network)
        save(self.run.path, network, {})
        images = len(self.task.split(self.asked["problem"]["split"]))
        seconds = sum(epoch["seconds"] for epoch in history)
        return {
            "model": self.asked["problem"]["space"],
            "task": self.task.name,
            "recipe": self.asked["problem"]["recipe_name"],
            "seed": self.asked["problem"]["seed"],
            "replicas": self.replica.count,
            "trained_on": torch.cuda.get_device_name() if self.device == "cuda" else cpu_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "history": history,
            "images_per_second": images * len(history) / seconds,
            "data_share": sum(epoch["seconds"] * epoch["data_share"] for epoch in history) / seconds,
            "skipped": sorted(self.task.skipped),
            "seconds": {"train": time.perf_counter() - started},
        }

    def _train(self, network: nn.Module) -> list[dict[str, float]]:
        split, folder = self.asked["problem"]["split"], Path(self.asked["path"]) / "checkpoints"
        shared: dict[str, Any] = {
            "split": split,
            "replica": self.replica,
            "device": self.device,
            "watch": "search" if split == "train" else None,
            "loaders": _loaders(self.options, self.task, split, self.device),
            "save_every": self.options.save_every,
            "compiled": self.options.compile,
        }
        seeds = self.asked["seeds"]
        history = train(
            network, self.task, self.recipe, seed=seeds["train"], checkpoint=folder / "train.pt",
            on_epoch=self._noted("train", self.recipe.epochs), **shared,
        )  # fmt: skip
        if self.recipe.tune_epochs:
            history += tune(
                network, self.task, self.recipe, seed=seeds["tune"], checkpoint=folder / "tune.pt",
                on_epoch=self._noted("tune", self.recipe.tune_epochs), **shared,
            )  # fmt: skip
        return history

    def _noted(self, name: str, epochs: int):
        run = self.run
        if run is None:
            return None

        def noted(epoch: dict[str, float]) -> None:
            run.event("train_epoch", which=name, **epoch)
            score = f", {100 * epoch['accuracy']:.2f} % on search" if "accuracy" in epoch else ""
            self.say.progress(name, int(epoch["epoch"]), epochs, f"loss {epoch['loss']:.3f}{score}")

        return noted


def check_training(options: TrainingOptions) -> None:
    """What can be checked before data are opened. Raises: UserError."""
    if options.model is None:
        raise UserError("neither a RUN nor a --model was given (netsmith list networks)")
    if options.model not in NETWORKS and not options.model.startswith(PREFIXES):
        raise unknown("network", options.model, NETWORKS)
    if options.recipe is not None:
        published(options.recipe)
    if not 0 <= options.seed < 2**32:
        raise UserError(f"seed is {options.seed}; allowed: 0 to {2**32 - 1}")
    for name, least in (("batch_size", 1), ("epochs", 1), ("save_every", 1), ("loaders", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; allowed: {least} or more")


def problem_of(options: TrainingOptions, task: Task, device: str, command: Sequence[str]) -> dict[str, Any]:
    """The content of `problem.yaml`, nothing left open. Raises: UserError for options that do not fit."""
    assert options.model is not None
    model_options = dict(options.model_options)
    if task.resolution <= TINY:
        for family, (option, value) in FOR_TINY.items():
            if options.model.startswith(family):
                model_options.setdefault(option, value)
    shape = {"classes": task.classes, "channels": task.channels, "resolution": task.resolution}
    split = "train" if options.watch else "trainval"
    images = len(task.splits[split])
    recipe = make_recipe(options, task, device, images)
    taken = recipe.epochs * steps(images, recipe.batch_size)
    if taken < SHORT and options.model.startswith(("efficientnet", "ran_e")):
        model_options.setdefault("momentum", 0.1)
    with torch.device("meta"):
        open_space(options.model, **model_options, **shape)
    data = options.data
    if not data and task.name in ("cifar10", "cifar100", "fashion-mnist"):
        found = Path(task.source)
        data = found if found.is_dir() else found.parent
    return {
        "task": task.name,
        **({"images": task.fingerprint} if task.fingerprint else {}),
        "data": str(data.absolute()) if data else None,
        "resolution": task.resolution,
        "space": options.model,
        "space_options": {**model_options, **shape},
        "recipe_name": options.recipe,
        "recipe": asdict(recipe),
        "split": split,
        "seed": options.seed,
        "command": list(command),
    }


def make_recipe(options: TrainingOptions, task: Task, device: str, images: int) -> Recipe:
    """The recipe of that name for these images, or the task's own; with what was asked for otherwise."""
    if options.recipe is None:
        recipe = Recipe.default(task, options.epochs, options.batch_size)
    else:
        one = published(options.recipe)
        size = options.batch_size
        if size is None:
            size = min(one.recipe.batch_size, 1 << max(0, (images // LEAST_STEPS).bit_length() - 1))
        recipe = one.scaled(images, batch_size=size, epochs=options.epochs, resolution=task.resolution)
    precision = options.precision or ("bf16" if device == "cuda" else "fp32")
    own = {"accumulate": options.accumulate, "norm_replicas": options.norm_replicas, "precision": precision}
    recipe = replace(recipe, **own)
    recipe = checked(Recipe, {**asdict(recipe), **options.recipe_options}, "recipe_options")
    if not recipe.epochs:
        raise UserError("recipe_options.epochs is 0; allowed: 1 or more")
    return recipe


def task_of(problem: dict[str, Any]) -> Task:
    """The task of a `problem.yaml`, opened."""
    data = problem["data"]
    return open_task(problem["task"], Path(data) if data else None, resolution=problem["resolution"])


def built(problem: dict[str, Any], seed: int) -> nn.Module:
    """The untrained network of a training, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_space(problem["space"], **problem["space_options"])


def judged(run: Run, network: nn.Module, task: Task) -> dict:
    """What the gate says of the exported file, on one thread of this CPU; it has no budget to keep."""
    file = export(network, task.input_shape, run.path / "model.onnx", architecture={}, task=task.without_test())
    device = parse_device("ort-cpu")
    timed = {"name": device.name, "fingerprint": device.fingerprint(), "versions": device.versions()}
    return {**gate(network, file, task, device, [], with_layers=False).to_json(), "device": timed}


def ship_trained(folder: Path, say: Say) -> dict:
    """Export and judge the network of a finished training again."""
    with Run.open(folder) as run:
        run.read_json("result.json")
        return judged(run, load(folder), task_of(run.problem))


def answer(result: dict) -> list[str]:
    """What there is to say about a finished training."""
    cost, latency = result["cost"], result["cost"]["latency_ms"]
    lines = [
        f"{result['model']} on {result['task']}: {result['verdict'].removeprefix('kept: ')}",
        f"{latency['median']:.4g} ms a picture on one thread of this CPU, {cost['params']:,.0f} parameters, "
        f"{cost['macs'] / 1e6:,.1f} million MACs",
        f"trained at {result['images_per_second']:,.0f} images/s by {result['replicas']} process"
        f"{'es' if result['replicas'] > 1 else ''}; {100 * result['data_share']:.0f} % of the time waiting for images",
    ]
    if result["skipped"]:
        lines.append(f"{len(result['skipped'])} images could not be read, such as {result['skipped'][0]}")
    return [*lines, f"{result['run']}: weights.safetensors, model.onnx, result.json"]


def _open(options: TrainingOptions, problem: dict[str, Any]) -> Run:
    """The run in `options.out`; without it the first in runs/ that has the same problem and no result, or a new one."""
    if options.out is not None:
        return Run.create(options.out, problem)
    task = Path(problem["task"].partition(":")[2]).name or problem["task"]
    number = 1
    while True:
        folder = Path("runs", f"{task}-{problem['space'].rpartition(':')[2]}-{number}")
        if not folder.exists():
            return Run.create(folder, problem)
        if not (folder / "result.json").exists():
            try:
                return Run.create(folder, problem)
            except UserError:  # of another problem, or in use
                pass
        number += 1


def _resolution(options: TrainingOptions) -> int | None:
    if options.resolution is None and ":" in options.task:
        assert options.model is not None
        return RESOLUTIONS.get(options.model) or usual_resolution(options.model)
    return options.resolution


def _loaders(options: TrainingOptions, task: Task, split: str, device: str) -> int:
    if options.loaders is not None:
        return options.loaders
    source = task.splits[split].source
    in_memory = isinstance(source, torch.Tensor) or (isinstance(source, FolderImages) and source.kept is not None)
    if in_memory or device == "cpu":  # which has nothing left for others
        return 0
    return min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _in_words(recipe: dict[str, Any]) -> str:
    return f"{recipe['epochs']} epochs of {recipe['optimizer']}, batches of {recipe['batch_size']:,}"
