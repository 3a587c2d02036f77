"""Time to accuracy in DAWNBench's form: seconds and money until a stated accuracy is reached for the first time.

    python benchmarks/time_to_accuracy.py                              # Fashion-MNIST, 10,000 images, one thread
    python benchmarks/time_to_accuracy.py --model efficientnet_b0 --recipe efficientnet_rmsprop_4096 --device cuda

Train on `train`, score `search` after every epoch with the averaged weights. The schedule is fixed beforehand and runs
to its end; what counts is the first epoch at or above the accuracy, as in DAWNBench. Only then is `test` scored, once.
Seconds are those of training; with scoring they are given beside that. Cost is hours of training times the price.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from torch import nn

from netsmith.spaces import open_space
from netsmith.spaces.networks import NETWORKS, Style, build
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe
from netsmith.train.recipes import RECIPES, published

SMALL = "small"
ROWS = "stem k3 16 s1 x1 relu | fused k3 32 s2 x2 relu e1 | fused k3 64 s2 x2 relu e1 | head 128 relu"
"""Ours, for a CPU: five 3x3 convolutions, 79,418 weights for grey images of ten classes."""
PRICE = 3.0
DAWNBENCH = (
    {"hardware": "1/4 TPUv2 pod", "epochs": 41, "first_epoch": 40, "hours": 1.1087, "top5": 0.9303, "cost": None},
    {"hardware": "1/16 TPUv2 pod", "epochs": 35, "first_epoch": 32, "hours": 1.9731, "top5": 0.9303, "cost": None},
    {"hardware": "1 Cloud TPU", "epochs": 35, "first_epoch": 33, "hours": 7.4748, "top5": 0.9304, "cost": 49.30},
)
"""AmoebaNet-D N6 F256, ImageNet to 93 % top-5 (stanford-futuredata/dawn-bench-entries). Cost at $6.595 an hour."""


def one(asked: argparse.Namespace, task: Task, recipe: Recipe, seed: int) -> dict[str, Any]:
    """A whole training of one seed, and its test."""
    torch.manual_seed(seed)
    network = made(asked.model, task)
    started, busy = time.perf_counter(), time.process_time()
    passed: list[float] = []

    def ended(epoch: dict[str, float]) -> None:
        passed.append(time.perf_counter() - started)
        print(
            f"  seed {seed}, epoch {epoch['epoch']:.0f} of {recipe.epochs}: loss {epoch['loss']:.3f}, "
            f"{100 * epoch['accuracy']:.2f} % on search, {epoch['seconds']:.1f} s",
            flush=True,
        )

    history = train(
        network, task, recipe, seed=seed, watch="search", on_epoch=ended, device=asked.device, loaders=asked.loaders,
        compiled=asked.compile,
    )  # fmt: skip
    busy = time.process_time() - busy
    images, seconds = len(task.split("train")), [epoch["seconds"] for epoch in history]
    first = next((n for n, epoch in enumerate(history, 1) if epoch["accuracy"] >= asked.accuracy), None)
    return {
        "seed": seed,
        "first_epoch": first,
        "seconds": sum(seconds[:first]) if first else None,
        "seconds_with_scoring": passed[first - 1] if first else None,
        "cost": sum(seconds[:first]) / 3600 * asked.price if first else None,
        "images_per_second": images * len(history) / sum(seconds),
        "data_share": sum(epoch["data_share"] * epoch["seconds"] for epoch in history) / sum(seconds),
        "accuracy_then": history[first - 1]["accuracy"] if first else None,
        "accuracy_search": history[-1]["accuracy"],
        "accuracy_test": evaluate(network, task, "test", device=asked.device, loaders=asked.loaders),
        "seconds_in_all": sum(seconds),
        "processor_seconds_in_all": busy,
        "history": history,
    }


def made(model: str, task: Task) -> nn.Module:
    if model == SMALL:
        return build(ROWS, task.classes, task.channels, Style(drop_path=0.0, momentum=0.1))
    more = {"stem_stride": 1} if task.resolution <= 64 and model.startswith("efficientnet_b") else {}
    return open_space(model, classes=task.classes, channels=task.channels, resolution=task.resolution, **more)


def recipe_of(asked: argparse.Namespace, task: Task) -> Recipe:
    if asked.recipe == "default":
        return Recipe.default(task, asked.epochs, asked.batch)
    return published(asked.recipe).scaled(
        len(task.splits["train"]), batch_size=asked.batch, epochs=asked.epochs, resolution=task.resolution
    )


def table(rows: list[dict[str, Any]], asked: argparse.Namespace, hardware: str) -> str:
    lines = [
        f"| model | hardware | seed | epochs | first epoch >= {100 * asked.accuracy:g} % | seconds | with scoring "
        f"| images/s | dollars at {asked.price:g} an hour | then, on search | last, on search | test |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        reached = row["first_epoch"] is not None
        cells = [asked.model, hardware, f"{row['seed']}", f"{len(row['history'])}"]
        cells += [f"{row['first_epoch']}", f"{row['seconds']:.0f}"] if reached else ["not reached", "-"]
        cells += [f"{row['seconds_with_scoring']:.0f}" if reached else "-", f"{row['images_per_second']:.0f}"]
        cells += [f"{row['cost']:.3f}", f"{100 * row['accuracy_then']:.2f} %"] if reached else ["-", "-"]
        cells += [f"{100 * row['accuracy_search']:.2f} %", f"{100 * row['accuracy_test']:.2f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published_rows() -> str:
    lines = [
        "\nDAWNBench's AmoebaNet-D N6 F256, ImageNet to 93 % top-5: another task, another network, another machine.",
        "Shown for the form; the numbers are not comparable.\n",
        "| hardware | epochs | first epoch >= 93 % | hours | top-5 | dollars |",
        "|---" * 6 + "|",
    ]
    for row in DAWNBENCH:
        cost = f"{row['cost']:.2f}" if row["cost"] else "-"
        cells = [row["hardware"], row["epochs"], row["first_epoch"], row["hours"], f"{100 * row['top5']:.2f} %", cost]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="fashion-mnist")
    parser.add_argument("--data", type=Path, help="the folder of the data")
    parser.add_argument("--images", type=int, default=10_000, help="training images, the search split included")
    parser.add_argument("--model", default=SMALL, choices=[SMALL, *NETWORKS], metavar="NAME", help="or small, ours")
    parser.add_argument("--recipe", default="default", choices=["default", *RECIPES], metavar="NAME")
    parser.add_argument("--accuracy", type=float, default=0.88, help="to be reached on search, 0 to 1")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars an hour")
    parser.add_argument("--epochs", type=int, default=18, help="of the schedule")
    parser.add_argument("--batch", type=int, help="the recipe's own if left out")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--loaders", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", default="time_to_accuracy", help="of the file of results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    started = machine()
    task = open_task(asked.task, asked.data, limit=asked.images)
    recipe = recipe_of(asked, task)
    threads = f"{asked.threads} thread" + "s" * (asked.threads > 1)
    hardware = torch.cuda.get_device_name() if asked.device == "cuda" else f"{threads} of {started['cpu']}"
    print(
        f"{asked.model}, {sum(p.numel() for p in made(asked.model, task).parameters()):,} weights, on {task.name}: "
        f"{len(task.split('train')):,} images, {len(task.split('search')):,} to score; batches of {recipe.batch_size}"
    )
    rows = [one(asked, task, recipe, int(seed)) for seed in asked.seeds.split(",")]
    setting = {
        key: getattr(asked, key)
        for key in ("task", "images", "model", "recipe", "accuracy", "price", "epochs", "threads", "device", "loaders")
    }
    save(
        asked.name, started, setting=setting, hardware=hardware, batch_size=recipe.batch_size, seeds=rows,
        dawnbench={"model": "AmoebaNet-D N6 F256", "target": "ImageNet, 93 % top-5", "rows": DAWNBENCH},
    )  # fmt: skip
    print(table(rows, asked, hardware))
    if times := [row["seconds"] for row in rows if row["seconds"]]:
        print(f"\n{len(times)} of {len(rows)} seeds reached it; seconds: median {statistics.median(times):.0f}, "
              f"{min(times):.0f} to {max(times):.0f}")  # fmt: skip
    print(published_rows())


if __name__ == "__main__":
    main()
