"""From a trained network to one that keeps a budget: the network becomes a space, and the pipeline of `search` does the
rest, with weights carried over and distillation from the original. The original is never written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from netsmith.cost.budget import parse_budgets, show
from netsmith.errors import UserError
from netsmith.job import CARRIED
from netsmith.methods import method_class
from netsmith.options import BudgetOptions, CompressOptions, SearchOptions
from netsmith.prepare import check, next_folder, problem_of
from netsmith.run import Run, atomically, load_yaml
from netsmith.ship.weights import ARCHITECTURE, architecture_of, fit, load, space_of, tensors
from netsmith.spaces import FROM_MODEL, open_space
from netsmith.spaces.from_model import source
from netsmith.spaces.networks import NETWORKS
from netsmith.spaces.outside import PREFIXES
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.recipe import Recipe

DRIFT = 1.1
"""How far the original's latency may be from what relative budgets were taken of, when it is measured in the end."""


class Original(NamedTuple):
    """The network that is to be compressed."""

    of: dict[str, Any]
    """`space`, `space_options` and `architecture`, from which it can be built."""
    weights: Mapping[str, Tensor]
    asked: dict[str, Any]
    """The task it has learnt, where its run says so: `task`, `data`, `resolution`."""


def prepare_compression(options: CompressOptions, *, command: Sequence[str] = (), beside: Sequence[str] = ()) -> Run:
    """A new run that asks what ``options`` ask, with the original's weights in its folder. ``beside``: names of what
    may lie there already.

    Raises: UserError for a network, weights or a task that is not there or do not fit together, and for what
    `prepare` refuses.
    """
    if options.model is None:
        raise UserError("no MODEL was given: the folder of a run, timm:NAME, or module:path.to:factory with --weights")
    original = original_of(options.model, options.weights, options)
    asked = original.asked
    if options.task is None and "task" not in asked:
        raise UserError(f"what has {options.model} learnt? --task names it")
    shared = {field.name: getattr(options, field.name) for field in fields(BudgetOptions) if field.name != "task"}
    if options.task is None:
        data = Path(asked["data"]) if asked["data"] else None
        shared |= {"data": options.data or data, "resolution": options.resolution or asked["resolution"]}
    task = options.task or asked["task"]
    opened = open_task(task, shared["data"], resolution=shared["resolution"])
    shared["recipe"] = {**fine_tuning(opened), **options.recipe}
    search = SearchOptions(
        **shared,
        task=task,
        space=FROM_MODEL,
        space_options={
            "of": original.of,
            "pool": options.pool or getattr(method_class(options.method), "pool", "small"),
        },
        method=options.method,
        seed=options.seed,
        baselines=options.baselines,
    )
    check(search)
    shape = {"classes": opened.classes, "channels": opened.channels, "resolution": opened.resolution}
    fit(source(original.of, **shape), original.weights, f"the weights do not fit {original.of['space']}")
    problem = problem_of(search, command)
    run = Run.create(options.out or next_folder(task, options.method), problem, beside=beside)
    if not (run.path / CARRIED).exists():
        _write(original.weights, run.path / CARRIED)
    return run


def original_of(model: str, weights: Path | None, options: CompressOptions) -> Original:
    """The network of that name or folder, with its weights.

    Raises: UserError where there is none, or no weights for it.
    """
    folder = Path(model)
    if model not in NETWORKS and not model.startswith(PREFIXES):
        if weights is not None:
            raise UserError(f"--weights {weights} was given, but the run {folder} has weights of its own")
        network = load(folder)
        space, given, file = space_of(folder)
        of = {"space": space, "space_options": given, "architecture": architecture_of(folder / ARCHITECTURE)}
        return Original(of, network.state_dict(), load_yaml(file.read_text("utf-8")))
    of = {"space": model, "space_options": {}, "architecture": {}}
    if weights is not None:
        if weights.suffix != ".safetensors":
            raise UserError(
                f"{weights} is no safetensors file; a pickle can run code, and is not opened. In Python: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
            )
        return Original(of, tensors(weights), {})
    if not model.startswith("timm:"):
        raise UserError(f"{model} has no trained weights: --weights names a safetensors file with them")
    if options.task is None:
        raise UserError(f"what is {model} to be compressed for? --task names it")
    return Original(of, _timm_weights(model, open_task(options.task, options.data, resolution=options.resolution)), {})


def _timm_weights(model: str, task: Task) -> Mapping[str, Tensor]:
    from timm.models import get_pretrained_cfg

    name = model.removeprefix("timm:")
    found = get_pretrained_cfg(name, allow_unregistered=True)
    if found is not None and found.num_classes != task.classes:
        raise UserError(
            f"{model} was trained to tell {found.num_classes} classes apart, and {task.name} has {task.classes}: "
            f"netsmith train --model {model} --task {task.name} makes a run that can be compressed"
        )
    shape = {"classes": task.classes, "channels": task.channels, "resolution": task.resolution}
    return open_space(model, **shape, pretrained=True).state_dict()


def fine_tuning(task: Task) -> dict[str, Any]:
    """Fields of the recipe by which a compressed network is trained on: shorter and gentler than from scratch, half of
    the loss from the original's answers (ours; LANA's own are not published)."""
    usual = Recipe.default(task)
    epochs = max(5, usual.epochs // 2)
    return {
        "epochs": epochs,
        "learning_rate": usual.learning_rate / 5,
        "distillation": 0.5,
        "temperature": 2.0,
        "label_smoothing": 0.0,
    }


def gained(result: Mapping[str, Any], asked: Sequence[str]) -> str:
    """Empty where every network takes less of what its budgets limit than the original does, and no more than the
    share that was ``asked`` for, else a sentence. The original is measured again in the end."""
    original = result["reference"]["cost"]
    for point, budgets in zip(result.get("front", [result]), parse_budgets(asked), strict=True):
        for budget in budgets:
            own, before = cost_of(point["cost"], budget.metric), cost_of(original, budget.metric)
            if own is None or before is None:
                continue
            unit = next(b["unit"] for b in point["budgets"] if b["metric"] == budget.metric)
            what = f"{budget.metric} is {show(own, unit)}, that of the original {show(before, unit)}"
            if own >= before:
                return f"nothing was gained: {what}"
            if budget.relative and own > DRIFT * budget.limit * before:
                return f"{budget} was asked, and {what}: the machine's speed has changed since that was first measured"
    return ""


def cost_of(cost: Mapping[str, Any], metric: str) -> float | None:
    """What a `result.json` has under the ``cost`` of a network, by the metric of a budget; None: not known."""
    names = {"latency": "latency_ms", **{n: f"{n}_bytes" for n in ("peak_memory", "ram", "flash", "file")}}
    found = cost.get(names.get(metric, metric))
    return found["median"] if isinstance(found, dict) else found


def _write(weights: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with atomically(file) as temporary:
        temporary.write_bytes(save(plain))
