"""A network for a microcontroller: 75 kB of RAM, 75 kB of flash, 30 M MACs (µNAS' budgets for CIFAR-10, error 18 %).

    python benchmarks/mcu.py --seeds 0,1     # hours; goes on after a kill
    python benchmarks/mcu.py --summary

MobileNetV2 with 0.35 of its channels is trained here on CIFAR-10 at 32 px, then brought within the three budgets by MCU
pruning (both back-ends), by SMCP, and by the same share of every group's channels (`uniform`, bisected). All see the
training images as often, and fine-tuning is one recipe with the original as teacher. Every line of `results/mcu.jsonl`
is one network, scored once on `test`; RAM and flash are counted for int8 with operators in their best order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from compress import netsmith_run, uniform
from machine import machine
from torch import nn

import netsmith
from netsmith.compression import fine_tuning
from netsmith.cost.counts import Flash, Macs
from netsmith.cost.memory import PeakMemory, Ram
from netsmith.spaces.references import mobilenet_v2
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "mcu.jsonl"
LIMITS = {"ram": 75e3, "flash": 75e3, "macs": 30e6}
WAYS = {
    "mcu_pruning": ["--method", "mcu_pruning"],
    "mcu_pruning dsa": ["--method", "mcu_pruning"],
    "smcp": ["--method", "smcp"],
    "uniform": [],
}
COSTS = {"ram": Ram(), "flash": Flash(), "macs": Macs()}


def network(classes: int, channels: int, resolution: int) -> nn.Module:
    return mobilenet_v2(0.35, classes, channels, resolution)


def run(*words: str) -> None:
    if said := netsmith_run(*words):
        raise SystemExit(said)


def original(seed: int, epochs: int, work: Path) -> Path:
    folder = work / f"original-{seed}"
    if not (folder / "result.json").exists():
        words = ["--model", "module:mcu:network", "--task", "cifar10", "--epochs", str(epochs), "--seed", str(seed)]
        run("train", *words, "--out", str(folder))
    return folder


def compressed(way: str, folder: Path, learning: int, epochs: int, seed: int, work: Path) -> nn.Module:
    out = work / f"{way.replace(' ', '-')}-{seed}"
    if not (out / "result.json").exists():
        options = work / "dsa.yaml"
        options.write_text("method_options: {loss: dsa}\n")
        words = [*WAYS[way], "--search-epochs", str(learning), "--epochs", str(epochs), "--seed", str(seed)]
        words += [word for name, limit in LIMITS.items() for word in ("--budget", f"{name}<={limit:.0f}{unit(name)}")]
        words += ["--baselines", *(["--config", str(options)] if "dsa" in way else [])]
        again = ["--resume", str(out)]
        run("compress", *(again if out.exists() else [str(folder), *words, "--out", str(out)]))
    return netsmith.load(out)


def unit(name: str) -> str:
    return "" if name == "macs" else "B"


def narrowed(folder: Path, epochs: int, seed: int, work: Path) -> nn.Module:
    """The widest that keeps all limits, of networks with one share of all channels."""
    task, whole = open_task("cifar10"), netsmith.load(folder).eval()
    narrower, low, high = uniform(whole, task), 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        kept = all(cost(narrower(middle), task.input_shape) <= LIMITS[name] for name, cost in COSTS.items())
        low, high = (middle, high) if kept else (low, middle)
    found = narrower(low)
    recipe = replace(Recipe.default(task), **{**fine_tuning(task), "epochs": epochs})
    train(found, task, recipe, split="trainval", seed=seed, teacher=whole, checkpoint=work / f"uniform-{seed}.pt")
    return found


def load() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(rows: list[dict]) -> str:
    lines = [
        "| way | seeds | accuracy % (sd) | of the original, points | RAM kB | with sums in place | flash kB | MACs |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for way in ("original", *WAYS):
        mine = [row for row in rows if row["way"] == way]
        if mine:
            accuracy = [row["accuracy"] for row in mine]
            spread = f"{statistics.stdev(accuracy):.2f}" if len(mine) > 1 else "-"
            lost = statistics.fmean(row["accuracy"] - row["original_accuracy"] for row in mine)
            kilobytes = (
                ", ".join(f"{row[name] / 1e3:.1f}" for row in mine) for name in ("ram", "ram_in_place", "flash")
            )
            macs = ", ".join(f"{row['macs'] / 1e6:.1f} M" for row in mine)
            cells = [
                way,
                str(len(mine)),
                f"{statistics.fmean(accuracy):.2f} ({spread})",
                f"{lost:+.2f}",
                *kilobytes,
                macs,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--original-epochs", type=int, default=12)
    parser.add_argument("--learning", type=int, default=6, help="epochs before a network is chosen")
    parser.add_argument("--epochs", type=int, default=6, help="epochs after it")
    parser.add_argument("--work", type=Path, default=Path("runs/mcu-benchmark"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    task, given = open_task("cifar10"), (options.learning, options.epochs)
    seeds = [] if options.summary else [int(seed) for seed in options.seeds.split(",")]
    for seed, way in ((seed, way) for seed in seeds for way in ("original", *options.ways.split(","))):
        if any((row["way"], row["seed"]) == (way, seed) for row in load()):
            continue
        started, facts = time.process_time(), machine("timm")
        folder = original(seed, options.original_epochs, options.work)
        if way == "original":
            found = netsmith.load(folder)
        elif way == "uniform":
            found = narrowed(folder, sum(given), seed, options.work)
        else:
            found = compressed(way, folder, *given, seed, options.work)
        row = {"way": way, "seed": seed, "accuracy": 100 * evaluate(found, task, "test")}
        row |= {name: cost(found, task.input_shape) for name, cost in COSTS.items()}
        row["ram_in_place"] = PeakMemory(1, reorder=True, sums_in_place=True)(found, task.input_shape)
        row["original_accuracy"] = 100 * json.loads((folder / "result.json").read_text())["metric"]["test"]
        row |= {"learning": options.learning, "epochs": options.epochs, "original_epochs": options.original_epochs}
        row |= {"seconds": time.process_time() - started, "machine": facts}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{way} seed {seed}: {row['accuracy']:.2f} %", flush=True)
    print(summary(load()))


if __name__ == "__main__":
    main()
