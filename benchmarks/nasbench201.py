"""Searches on NAS-Bench-201 (arXiv:2001.00326) whose results others have trained: how good is the cell that was found?

    python benchmarks/nasbench201.py --methods darts,proxylessnas,best_of --seeds 0,1,2     # goes on after a kill
    python benchmarks/nasbench201.py --summary

Each method searches the cell on CIFAR-10 images, in a narrow network (one cell a stage, 8 channels; the benchmark's
has five and 16), without a budget. The published accuracy of the cell and its rank among
all 15,625 are read when the search has ended, never before. A supernet search gives two rows: `argmax`, the most
probable operation of every edge, as the papers end, and `raced`, as netsmith ends: networks drawn around the result,
trained briefly, the best of them. `best_of` gets the processor seconds that the DARTS search with the same seed took:
run that first. Results: `results/nasbench201.jsonl`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import time
from bisect import bisect_left
from functools import cache
from pathlib import Path

import torch
from machine import machine
from torch import nn

from netsmith.cost.counts import Macs
from netsmith.cost.prices import tabulate
from netsmith.methods import make_method
from netsmith.run import Run, read_events
from netsmith.search.problem import Problem
from netsmith.spaces.nasbench201 import index_of, nasbench201, to_string
from netsmith.tasks import open_task
from netsmith.train.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "nasbench201.jsonl"
SETS = ("cifar10", "cifar100", "imagenet16")
METHODS = {
    "fbnet": ("fbnet", {}),
    "proxylessnas": ("proxylessnas", {}),
    "darts": ("darts", {}),
    "darts second order": ("darts", {"order": "second"}),
    "rarts": ("rarts", {}),
    "pad_nas": ("pad_nas", {"steps": {"epochs": 60}}),  # of one path each
    "capacity": ("capacity", {}),
    "best_of": ("best_of", {}),
}
"""Row -> method and options."""
ABLATIONS = {
    "proxylessnas reinforce": ("proxylessnas", {"gradient": "reinforce"}),
    "proxylessnas beta_1 0.9": ("proxylessnas", {"steps": {"architecture_momentum": 0.9}}),
    "darts no decay": ("darts", {"steps": {"architecture_decay": 0.0}}),
    "darts 45 epochs": ("darts", {"steps": {"epochs": 45}}),
    "rarts coupling 0": ("rarts", {"coupling": 0.0}),
    "rarts coupling 10": ("rarts", {"coupling": 10.0}),
    "rarts jacobi": ("rarts", {"order": "jacobi"}),
}
"""What the sheets call worth repeating. Asked for by name."""


@cache
def published() -> list[dict]:
    file = Path(os.environ.get("NETSMITH_DATA", "../shared/data")) / "nas" / "nasbench201_accuracy.csv.gz"
    with gzip.open(file, "rt") as text:
        return list(csv.DictReader(text))


@cache
def ranked(name: str) -> list[float]:
    return sorted(float(row[f"{name}_test_e200"]) for row in published())


def problem_of(seed: int, images: int | None) -> Problem:
    """The cell in a narrow network, without a budget."""
    task = open_task("cifar10", limit=images)

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nasbench201(task.classes, task.channels, task.resolution, cells=1, width=8, affine=False)

    with torch.device("meta"):
        macs = tabulate(build(), Macs(), task.input_shape)  # in place of a latency, which nothing limits
    return Problem(task, build, [[]], macs, Recipe.default(task), seed)


def searched(key: dict, epochs: int, images: int | None, work: Path) -> list[dict]:
    """The rows of one search."""
    method, options = {**METHODS, **ABLATIONS}[key["method"]]
    problem = problem_of(key["seed"], images)
    with Run.create(work / f"{key['method'].replace(' ', '-')}-{key['seed']}", key) as run:
        if method == "best_of":
            options = {"processor_seconds": seconds_of_darts(key["seed"]), "epochs": 2}
        elif method != "capacity":
            steps = {"epochs": epochs, "warmup_epochs": max(1, epochs // 5), **options.get("steps", {})}
            options = {**options, "steps": steps}
        started = time.process_time()
        values = run.once("searched", lambda: _search(method, options, problem, run))
        found = {"raced": problem.allocate(values, problem.budgets[0])}
        ended = [event for event in read_events(run.path) if event["kind"] == "search_epoch"]
        if ended and method != "pad_nas":  # which ends with the best that it scored
            odds = ended[-1]["probabilities"]
            found["argmax"] = {path: max(row, key=row.get) for path, row in odds.items()}
        seconds = run.once("seconds", lambda: time.process_time() - started)
    rows = []
    for derivation, cell in found.items():
        index = index_of(cell)
        row = key | {"derivation": derivation, "index": index, "cell": to_string(cell), "options": options}
        row |= {"skips": list(cell.values()).count("skip"), "images": len(problem.task.split("trainval"))}
        row |= {"search_cpu_seconds": round(seconds, 1), "machine": machine()}
        for name in SETS:
            accuracy = float(published()[index][f"{name}_test_e200"])
            row[name] = accuracy
            row[f"{name}_percentile"] = 100 * bisect_left(ranked(name), accuracy) / len(published())
        rows.append(row)
    return rows


def _search(method: str, options: dict, problem: Problem, run: Run) -> dict:
    (values,) = make_method(method, options).search(problem, run)
    return values


def seconds_of_darts(seed: int) -> float:
    darts = [row for row in load() if (row["method"], row["seed"]) == ("darts", seed)]
    assert darts, "best_of gets the processor seconds of DARTS with the same seed: run it first"
    return darts[0]["search_cpu_seconds"]


def load() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(rows: list[dict]) -> str:
    titles = ["method", "cell", "seeds", "CIFAR-10 % (sd)", "CIFAR-100 %", "ImageNet16-120 %", "better than % of cells"]
    titles += ["skips of 6", "search core-s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in (*METHODS, *ABLATIONS):
        for derivation in ("argmax", "raced"):
            mine = [row for row in rows if (row["method"], row["derivation"]) == (name, derivation)]
            if mine:
                accuracy = [statistics.fmean(row[each] for row in mine) for each in SETS]
                spread = f"{statistics.stdev(row['cifar10'] for row in mine):.2f}" if len(mine) > 1 else "-"
                better = ", ".join(f"{row['cifar10_percentile']:.1f}" for row in mine)
                skips = ", ".join(str(row["skips"]) for row in mine)
                spent = statistics.fmean(row["search_cpu_seconds"] for row in mine)
                lines.append(
                    f"| {name} | {derivation} | {len(mine)} | {accuracy[0]:.2f} ({spread}) | {accuracy[1]:.2f} | "
                    f"{accuracy[2]:.2f} | {better} | {skips} | {spent:.0f} |"
                )
    means = [statistics.fmean(ranked(each)) for each in SETS]
    lines.append(
        f"| a random cell | - | all | {means[0]:.2f} ({statistics.stdev(ranked('cifar10')):.2f}) | {means[1]:.2f} | "
        f"{means[2]:.2f} | 50 | - | 0 |"
    )
    best = " | ".join(f"{ranked(each)[-1]:.2f}" for each in SETS)
    lines.append(f"| the best cell | - | - | {best} | 100 | - | - |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, help="of the training images; all without it")
    parser.add_argument("--work", type=Path, default=Path("runs/nasbench201"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if options.summary else map(int, options.seeds.split(",")):
        for name in options.methods.split(","):
            key = {"method": name, "seed": seed}
            if any({n: row[n] for n in key} == key for row in load()):
                continue
            for row in searched(key, options.epochs, options.images, options.work):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name} seed {seed} {row['derivation']}: {row['cell']} {row['cifar10']:.2f} %", flush=True)
    print(summary(load()))


if __name__ == "__main__":
    main()
