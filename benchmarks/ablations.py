"""The ablations of two papers on large batches and cheaper EfficientNets, at the scale of minutes on a CPU.

    python benchmarks/ablations.py --seeds 0,1             # all of them; goes on after a kill
    python benchmarks/ablations.py --only optimizer        # one; the rates have to be there
    python benchmarks/ablations.py --summary               # the tables of what is there

Wongpanich et al. 2020 (arXiv:2011.00071): optimizer and batch, decay, warm-up, group size of batch norm. Masters et
al. 2021 (arXiv:2106.03640): norm, group convolutions, resolution. Every line of `results/ablations.jsonl` is one
training on `train` of Fashion-MNIST, scored on `search`; `test` is not touched. The network is EfficientNet-B0 without
its last two stages, width 0.25, depth 0.5, stride 1 in the stem, no dropout and no drop path. Batches of 64 to 1,024 of
4,000 images stand for the papers' 4k to 64k of 1.28 million; `thousands` takes 256 to 8,192 of 32,000, at 10 px.

The published rates are for 350 epochs of ImageNet. One multiplier for each optimizer is chosen at batch 64 on a seed of
its own, among three (`rate`); every other rate follows from it linearly with the batch. Where that broke down, at batch
1,024, it is chosen there once more (`rate at 1024`). Seconds are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import RESULTS, machine
from torch import nn

from netsmith.cost.counts import count_macs
from netsmith.cost.device import parse_device
from netsmith.cost.meter import measure
from netsmith.errors import UserError
from netsmith.ship.export import export
from netsmith.spaces.networks import B0, Style, build, scaled
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe
from netsmith.train.recipes import RECIPES
from netsmith.train.resolution import sweep, tune

FILE = RESULTS / "ablations.jsonl"
PUBLISHED = {
    "rmsprop": "efficientnet_rmsprop_4096",
    "lars": "efficientnet_lars_65536",
    "half": "graphcore_b0_half_resolution",
}
IMAGES, SEARCH = 4000, 2000
"""Of the training images: to learn from (at least; `thousands` has more), to be scored on."""
RATE_SEED = 100
SIZES = 16, 20, 24, 28, 32, 36
"""Pixels a side at which a trained network is tested."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One training."""

    recipe: str = "rmsprop"
    """One of `PUBLISHED`."""
    batch: int = 64
    epochs: int = 8
    images: int = IMAGES
    pixels: int = 14
    """A quarter of the work of the 28 that the images have."""
    rate: float | None = None
    """Multiplies the published learning rate; none: the best at batch `tuned_at`."""
    tuned_at: int = 64
    factor: float = 1.0
    """Multiplies it too."""
    changes: dict = field(default_factory=dict)
    """Of the scaled recipe."""
    style: dict = field(default_factory=dict)
    """Of the network."""
    watch: bool = False
    """Whether each epoch is scored."""
    sizes: tuple[int, ...] = ()
    """Resolutions at which the network is tested, before and after its last layer is tuned."""


LARS = {"recipe": "lars"}
LARGEST = {"batch": 1024, "tuned_at": 1024}
PARTS = {"epochs": 6, "images": 2000, "batch": 128}
FEW = {"epochs": 4, "images": 1000, "batch": 4, "factor": 4.0}
"""The rate at 4 images is that at 64 times sqrt(4 / 64): the linear rule leaves it too low to learn in 1,000 steps."""
FULL = {"epochs": 5, "pixels": 28}
STAGES = {**FULL, "recipe": "half", "sizes": SIZES}


def thousands(recipe: str, batch: int, **options) -> Variant:
    """Of 32,000 images. No average of the weights: over 20 steps it would be one of the start; and batch norm's running
    statistics look back over as many images whatever the batch."""
    changed = {"changes": {"ema": None}, "style": {"momentum": 1 - 0.9 ** (batch / 256)}}
    return Variant(recipe=recipe, batch=batch, epochs=5, images=32_000, pixels=10, **changed, **options)


ABLATIONS: dict[str, dict[str, Variant]] = {
    "rate": {
        "rmsprop x1/3": Variant(rate=1 / 3),
        "rmsprop x1": Variant(rate=1.0),
        "rmsprop x3": Variant(rate=3.0),
        "lars x10": Variant(**LARS, rate=10.0),
        "lars x30": Variant(**LARS, rate=30.0),
        "lars x100": Variant(**LARS, rate=100.0),
    },
    "optimizer": {
        f"{name} {batch}": Variant(recipe=name, batch=batch)
        for batch in (64, 256, 1024)
        for name in ("rmsprop", "lars")
    },
    "norm": {
        norm: Variant(**FEW, style={"norm": norm, "momentum": 0.01})
        for norm in ("batch", "group", "layer", "group+proxy", "layer+proxy")
    },
    "group convolution": {
        "size 1, expansion 6": Variant(**FULL, watch=True),
        "size 4, expansion 5": Variant(**FULL, watch=True, style={"group_size": 4, "expansion": 5.0}),
        "size 16, expansion 4": Variant(**FULL, watch=True, style={"group_size": 16, "expansion": 4.0}),
    },
    "resolution": {
        "full": Variant(**STAGES, changes={"resolutions": ()}),
        "half": Variant(**STAGES),
        "progressive": Variant(**STAGES, changes={"resolutions": (12, 20, 28), "ramp": True, "tune_epochs": 0}),
    },
    "batch norm groups": {
        f"{group} of 16 replicas": Variant(
            **PARTS, changes={"accumulate": 16 // group}, style={"momentum": 1 - 0.9 ** (group / 16)}
        )
        for group in (1, 4, 16)
    },
    "rate at 1024": {
        "rmsprop x1/3": Variant(**LARGEST, rate=1 / 3),
        "rmsprop x1": Variant(**LARGEST, rate=1.0),
        "rmsprop x3": Variant(**LARGEST, rate=3.0),
        "lars x3": Variant(**LARGEST, **LARS, rate=3.0),
        "lars x10": Variant(**LARGEST, **LARS, rate=10.0),
        "lars x30": Variant(**LARGEST, **LARS, rate=30.0),
    },
    "optimizer, rates of 1024": {
        "rmsprop 1024": Variant(**LARGEST),
        "lars 1024": Variant(**LARGEST, **LARS),
        "rmsprop 1024, no average": Variant(**LARGEST, changes={"ema": None}),
        "lars 1024 x10, no average": Variant(**LARGEST, **LARS, rate=10.0, changes={"ema": None}),
    },
    "rate at 8192": {
        f"{name} x{rate:.3g}": thousands(name, 8192, rate=rate)
        for name, rates in (("rmsprop", (1 / 3, 1.0, 3.0)), ("lars", (1.0, 3.0, 10.0)))
        for rate in rates
    },
    "thousands": {
        f"{name} {batch}": thousands(name, batch, tuned_at=tuned_at)
        for batch, tuned_at in ((256, 64), (1024, 1024), (8192, 8192))
        for name in ("rmsprop", "lars")
    },
    "decay": {
        "polynomial": Variant(**LARS, batch=256),
        "exponential": Variant(**LARS, batch=256, changes={"schedule": "exponential"}),
    },
    "warm-up": {
        f"{percent} %": Variant(**LARGEST, **LARS, changes={"warmup_epochs": 8 * percent / 100})
        for percent in (0, 5, 15)
    },
}
"""A part of a batch is what the 8 images of each replica of a group are together. Batch norm's running statistics see
every part: their momentum is such that a step leaves as much of them as it does without parts."""
STEPS = {
    "size 1, 28 px": (28, {}),
    "size 4, 28 px": (28, {"group_size": 4, "expansion": 5.0}),
    "size 16, 28 px": (28, {"group_size": 16, "expansion": 4.0}),
    "size 1, 20 px": (20, {}),
    "size 1, 12 px": (12, {}),
    "size 1, layer+proxy, 28 px": (28, {"norm": "layer+proxy"}),
    "size 1, group, 28 px": (28, {"norm": "group"}),
}
"""Networks that are timed in turn: the exported file, and a training step of 64 images."""


@cache
def task_of(pixels: int, images: int) -> Task:
    most = max(IMAGES, images)
    limit = most + SEARCH
    task = open_task("fashion-mnist", resolution=pixels, limit=limit, search_fraction=SEARCH / limit)
    order = torch.randperm(most, generator=torch.Generator().manual_seed(0))
    task.splits["train"] = task.splits["train"].subset(order[:images].sort().values)
    return task.without_test()


def network_of(seed: int, style: dict) -> nn.Module:
    *body, _, _, head = scaled(B0, 0.25, 0.5).replace("s2", "s1", 1).split(" | ")
    torch.manual_seed(seed)
    # TensorFlow's momentum of 0.01 would leave most of the first guess in 32 steps.
    return build(
        " | ".join([*body, head]), 10, 1, Style(**{"dropout": 0.0, "drop_path": 0.0, "momentum": 0.1, **style})
    )


def recipe_of(variant: Variant) -> Recipe:
    recipe = RECIPES[PUBLISHED[variant.recipe]].scaled(
        variant.images, batch_size=variant.batch, epochs=variant.epochs, resolution=variant.pixels
    )
    rate = variant.rate or tuned("lars" if variant.recipe == "lars" else "rmsprop", variant.tuned_at)
    assert rate, "--only rate comes first: all others take their learning rates from it"
    return replace(recipe, **{"learning_rate": recipe.learning_rate * rate * variant.factor, **variant.changes})


def tuned(optimizer: str, batch: int = 64) -> float | None:
    """The multiplier with the best accuracy at that batch."""
    rows = [row for row in load() if row["seed"] == RATE_SEED]
    rows = [row for row in rows if (row["settings"]["recipe"], row["settings"]["batch"]) == (optimizer, batch)]
    return max(rows, key=lambda row: row["accuracy"])["settings"]["rate"] if rows else None


def trained(variant: Variant, seed: int) -> dict:
    task, recipe, network = task_of(variant.pixels, variant.images), recipe_of(variant), network_of(seed, variant.style)
    score = timed(lambda: evaluate(network, task, "search"))[1] if variant.watch else 0.0
    row: dict = {"diverged": None}
    try:
        watched = "search" if variant.watch else None
        history, seconds = timed(lambda: train(network, task, recipe, seed=seed, watch=watched))
        seconds -= score * recipe.epochs
        row |= {"accuracy": evaluate(network, task, "search"), "loss": history[-1]["loss"]}
        if variant.watch:
            row["accuracy_by_epoch"] = [epoch["accuracy"] for epoch in history]
        row |= {"cpu_seconds": round(seconds, 2), "images_per_cpu_second": variant.images * recipe.epochs / seconds}
    except UserError as error:
        row |= {"accuracy": 1 / task.classes, "loss": None, "diverged": str(error)}
        row |= {"cpu_seconds": None, "images_per_cpu_second": None}
    if variant.sizes:
        row["accuracy_at"] = dict(sweep(network, task, "search", variant.sizes))
    if variant.sizes and recipe.tune_epochs:
        row["tuning_cpu_seconds"] = round(timed(lambda: tune(network, task, recipe, seed=seed))[1], 2)
        row["tuned_accuracy_at"] = dict(sweep(network, task, "search", variant.sizes))
    row |= {"settings": asdict(variant), "resolved": asdict(recipe), "scored_on": len(task.split("search"))}
    row["params"] = sum(p.numel() for p in network.parameters())
    return row | {"macs": count_macs(network, task.input_shape), "machine": machine()}


def timed(function: Callable):
    """What it returns, and the processor seconds it took."""
    started = time.process_time()
    found = function()
    return found, time.process_time() - started


def in_turn() -> list[dict]:
    """A line for each of `STEPS`, all timed in turn."""
    device, files, passes = parse_device("ort-cpu"), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (pixels, style) in STEPS.items():
            network, shape = network_of(0, style), (1, pixels, pixels)
            files[name] = device.load(export(network, shape, Path(folder) / "untrained.onnx"), shape)
            passes[name] = step_of(network_of(0, style), pixels)
        latency = measure(files, seconds=2.0 * len(files))
        steps = measure(passes, seconds=4.0 * len(passes), warmup_calls=3)
    return [
        {
            "latency_ms": latency[name].median_ms,
            "latency_ci95": latency[name].ci95,
            "step_ms": steps[name].median_ms,
            "step_ci95": steps[name].ci95,
            "settled": latency[name].settled and steps[name].settled,
            "settings": {"pixels": pixels, "style": style},
            "macs": count_macs(network_of(0, style), (1, pixels, pixels)),
            "machine": machine("onnx"),
        }
        for name, (pixels, style) in STEPS.items()
    ]


def step_of(network: nn.Module, pixels: int, images: int = 64) -> Callable[[], None]:
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 1, pixels, pixels, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.arange(images) % 10

    def step() -> None:
        network.zero_grad()
        F.cross_entropy(network(batch), labels).backward()

    return step


def load() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def add(ablation: str, variant: str, seed: int, row: dict) -> None:
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps({"ablation": ablation, "variant": variant, "seed": seed, **row}) + "\n")
    shown = f"{row['accuracy']:.4f}, {row['cpu_seconds']} s" if "accuracy" in row else f"{row['step_ms']:.1f} ms a step"
    print(f"{ablation}: {variant}, seed {seed}: {shown}", flush=True)


def done_elsewhere(variant: Variant, seed: int) -> dict | None:
    """The same training, where another ablation has it."""

    def what(settings: dict, resolved: dict) -> dict:
        return resolved | {name: settings[name] for name in ("images", "pixels", "style", "watch", "sizes")}

    asked = json.loads(json.dumps(what(asdict(variant), asdict(recipe_of(variant)))))
    for row in load():
        if row["seed"] == seed and "resolved" in row and what(row["settings"], row["resolved"]) == asked:
            kept = {key: value for key, value in row.items() if key not in ("ablation", "variant", "seed")}
            return kept | {"same_as": [row["ablation"], row["variant"]]}
    return None


def run(names: list[str], seeds: list[int]) -> None:
    done = {(row["ablation"], row["variant"], row["seed"]) for row in load()}
    for ablation in names:
        if ablation == "time":
            if not any(name == "time" for name, _, _ in done):
                for name, row in zip(STEPS, in_turn(), strict=True):
                    add("time", name, 0, row)
            continue
        for seed in [RATE_SEED] if ablation.startswith("rate") else seeds:
            for name, variant in ABLATIONS[ablation].items():
                if (ablation, name, seed) not in done:
                    add(ablation, name, seed, done_elsewhere(variant, seed) or trained(variant, seed))


def summary(rows: list[dict]) -> str:
    """Accuracy of every seed, their mean, and what it took."""
    lines = []
    for ablation, variants in ABLATIONS.items():
        titles = "variant", "accuracy % of each seed", "mean", "train loss", "CPU s", "images/CPU-s", "params", "MMAC"
        lines += ["", f"### {ablation}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for name in variants:
            mine = [row for row in rows if (row["ablation"], row["variant"]) == (ablation, name)]
            if mine:
                cells = [name, *_accuracies([row["accuracy"] for row in mine])]
                cells += [
                    _mean(mine, "loss", 2),
                    _mean(mine, "cpu_seconds", 1),
                    _mean(mine, "images_per_cpu_second", 0),
                ]
                cells += [f"{mine[0]['params']:,}", f"{mine[0]['macs'] / 1e6:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
                lines += [f"| {' | '.join(_more(mine, *key))} | | | |" for key in _sized(mine)]
    if timings := [row for row in rows if row["ablation"] == "time"]:
        titles = "timed in turn", "MMAC", "step of 64 images, ms", "exported file, us", "settled"
        lines += ["", "### time", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in timings:
            cells = (
                row["variant"],
                f"{row['macs'] / 1e6:.2f}",
                f"{row['step_ms']:.1f}",
                f"{1e3 * row['latency_ms']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} | {'yes' if row['settled'] else 'no'} |")
    typical = [row["accuracy"] for row in rows if row.get("seed") in (0, 1) and "accuracy" in row] or [0.8]
    p = statistics.median(typical)
    lines += ["", f"{SEARCH:,} images are scored: standard error {100 * math.sqrt(p * (1 - p) / SEARCH):.2f} points at"]
    lines[-1] += f" {100 * p:.0f} %. Rates: {_rates()}."
    return "\n".join(lines).strip()


def _rates() -> str:
    kinds = [(name, batch) for batch in (64, 1024) for name in ("rmsprop", "lars")]
    return ", ".join(f"{name} x{rate:.3g} at {batch}" for name, batch in kinds if (rate := tuned(name, batch)))


def _sized(rows: list[dict]) -> list[tuple[str, str]]:
    kinds = [kind for kind in ("accuracy_at", "tuned_accuracy_at") if kind in rows[0]]
    return [(kind, size) for kind in kinds for size in rows[0][kind]]


def _more(rows: list[dict], kind: str, size: str) -> list[str]:
    accuracies = _accuracies([row[kind][size] for row in rows])
    seconds = "tuning_cpu_seconds" if kind.startswith("tuned") else "cpu_seconds"
    name = f"... {'last layer tuned, ' if kind.startswith('tuned') else ''}at {size} px"
    return [name, *accuracies, "", f"+{_mean(rows, seconds, 1)}" if kind.startswith("tuned") else ""]


def _accuracies(values: list[float]) -> tuple[str, str]:
    return ", ".join(f"{100 * value:.1f}" for value in values), f"{100 * statistics.fmean(values):.1f}"


def _mean(rows: list[dict], name: str, digits: int) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{statistics.fmean(values):,.{digits}f}" if values else "diverged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*ABLATIONS, "time"])
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.summary:
        for slow_to_import in ("timm.optim.rmsprop_tf", "torchvision.transforms.v2"):  # not within what is timed
            importlib.import_module(slow_to_import)
        run([options.only] if options.only else [*ABLATIONS, "time"], list(map(int, options.seeds.split(","))))
    print(summary(load()))


if __name__ == "__main__":
    main()
