"""Branches that fold: what folding saves, and whether it matters which branches are trained.

    python benchmarks/repnas.py latency                        # a minute; results/repnas_latency.json
    python benchmarks/repnas.py accuracy --seeds 0,1,2         # hours; results/repnas.jsonl, goes on after a kill
    python benchmarks/repnas.py summary                        # the table of what is there

`latency`: `repvgg_small` at 32 px under several masks, each as the file that ships and with its branches left as they
are (ONNX Runtime folds batch norms where it can), all timed in turn on one thread.

`accuracy`: every line is one network for the CIFAR-10 pack, trained by one recipe on `trainval` and scored once on
`test`. RepNAS (`searched`), random masks and the mask that computes most (`capacity`) have the same number of branches;
`all` and `plain` (the kxk alone) are the ends. Where the shape stays an identity is there in all of them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import RESULTS, machine, save
from torch import nn

from netsmith.architecture import sample
from netsmith.blocks.reparam import Branches
from netsmith.cost.budget import Budget
from netsmith.cost.counts import BranchCount, Macs
from netsmith.cost.device import OrtCpu
from netsmith.cost.meter import measure
from netsmith.cost.prices import tabulate
from netsmith.decisions import Architecture, decisions, derive
from netsmith.methods import make_method
from netsmith.run import Run
from netsmith.search.problem import Problem
from netsmith.search.promise import with_shifts
from netsmith.search.sampling import at_budget, capacity
from netsmith.ship.export import export, fold
from netsmith.spaces import open_space
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe

LINES = RESULTS / "repnas.jsonl"
SHAPE = (3, 32, 32)
MASKS = ("searched", "random-0", "random-1", "random-2", "capacity", "all", "plain")


def only(space: nn.Module, *kinds: str) -> Architecture:
    return {path: "on" if path.rpartition(".")[2] in kinds else "off" for path in decisions(space)}


class Unfolded(nn.Module):
    """A block as it trains, which no export folds."""

    def __init__(self, block: Branches) -> None:
        super().__init__()
        self.parts, self.act = nn.ModuleList(block._running()), block.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(functools.reduce(torch.add, [part(x) for part in self.parts]))


def unfolded(network: nn.Module) -> nn.Module:
    blocks = {id(block): Unfolded(block) for block in network.modules() if isinstance(block, Branches)}
    return copy.deepcopy(network, {**blocks})


def latency() -> None:
    started, device = machine(), OrtCpu()
    torch.manual_seed(0)
    space = open_space("repvgg_small", classes=10, channels=3, resolution=32)
    masks = {
        "plain": only(space, "kxk"),
        "kxk and 1x1_kxk": only(space, "kxk", "1x1_kxk"),
        "random": sample(space, torch.Generator().manual_seed(0)),
        "all": only(space, *{path.rpartition(".")[2] for path in decisions(space)}),
    }
    calls, counts, differences = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mask in masks.items():
            network = with_shifts(derive(space, mask)).eval()
            branched = unfolded(network)
            images = torch.randn(1, *SHAPE)
            with torch.no_grad():
                differences[name] = (fold(network)(images) - branched(images)).abs().max().item()
            counts[name] = BranchCount()(network, SHAPE)
            calls[f"{name} folded"] = device.load(export(network, SHAPE, Path(folder, "model.onnx")), SHAPE)
            calls[f"{name} branched"] = device.load(branched, SHAPE)
        timed = measure(calls, seconds=30.0)
    rows = [
        {
            "mask": name,
            "branches": counts[name],
            "max_abs_diff_in_pytorch": differences[name],
            **{f"{kind}_ms": timed[f"{name} {kind}"].median_ms for kind in ("folded", "branched")},
            **{f"{kind}_ci95": timed[f"{name} {kind}"].ci95 for kind in ("folded", "branched")},
            "ratio": timed[f"{name} branched"].median_ms / timed[f"{name} folded"].median_ms,
        }
        for name in masks
    ]
    for row in rows:
        print(
            f"{row['mask']:16} {row['branches']:3.0f} branches: folded {1e3 * row['folded_ms']:6.1f} µs, "
            f"branched {1e3 * row['branched_ms']:6.1f} µs, x{row['ratio']:.2f}"
        )
    print(save("repnas_latency", started, space="repvgg_small", resolution=32, device=device.fingerprint(), rows=rows))


def problem_of(options: argparse.Namespace, seed: int) -> Problem:
    """Under the budget on branches; MACs stand in for the latency, which no mask changes."""
    task = open_task("cifar10", limit=options.images)

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return open_space("repvgg_small", classes=task.classes, channels=3, resolution=32)

    recipe = dataclasses.replace(Recipe.default(task), epochs=options.epochs)
    problem = Problem(task, build, [], tabulate(build(), Macs(), SHAPE), recipe, seed)
    problem.budgets = [[Budget("branches", float(int(options.ratio * len(problem.outline.options))), "")]]
    return problem


def mask_of(name: str, problem: Problem, run: Run, options: argparse.Namespace) -> Architecture:
    kind, _, number = name.partition("-")
    (budgets,) = problem.budgets
    if kind == "searched":
        steps = {"epochs": options.search_epochs, "warmup_epochs": round(0.3 * options.search_epochs)}
        return problem.allocate(make_method("repnas", {"steps": steps}).search(problem, run)[0], budgets)
    if kind == "random":
        seed = 1000 * int(number) + problem.seed
        return at_budget(problem, budgets, torch.Generator().manual_seed(seed), least=1.0)
    if kind == "capacity":
        return problem.allocate(capacity(problem), budgets)
    return problem.reference if kind == "all" else only(problem.shapes, "kxk")


def accuracy(options: argparse.Namespace) -> None:
    for seed in map(int, options.seeds.split(",")):
        problem = problem_of(options, seed)
        for name in MASKS:
            asked = {k: getattr(options, k) for k in ("images", "epochs", "search_epochs", "ratio")}
            key = {"task": "cifar10", "seed": seed, "mask": name, **asked}
            if any(all(row[k] == value for k, value in key.items()) for row in lines()):
                continue
            folder = options.work / "-".join(map(str, key.values()))
            with Run.create(folder, key) as run:
                started = time.process_time()
                mask = mask_of(name, problem, run, options)
                searched = time.process_time() - started
                network = problem.network(mask)
                checkpoint = run.checkpoint("train.pt")
                train(network, problem.task, problem.recipe, split="trainval", seed=seed, checkpoint=checkpoint)
            row = key | {
                "branches": BranchCount()(network, SHAPE),
                "accuracy": evaluate(network, open_task("cifar10", limit=options.images), "test"),
                "search_cpu_seconds": round(searched, 1),
                "train_cpu_seconds": round(time.process_time() - started - searched, 1),
                "architecture": mask,
                "machine": machine(),
            }
            RESULTS.mkdir(exist_ok=True)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"seed {seed} {name}: {row['accuracy']:.4f} with {row['branches']:.0f} branches", flush=True)
    summary()


def lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def summary() -> None:
    """Mean accuracy and its spread over seeds; the random masks of a seed are averaged first."""
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for row in lines():
        setting = f"{row['images']} images, {row['epochs']} epochs"
        kind = row["mask"].partition("-")[0]
        groups.setdefault((setting, kind), {}).setdefault(row["seed"], []).append(row)
    print("| setting | mask | branches | seeds | accuracy % (sd) | train core-s |\n|---|---|---|---|---|---|")
    for (setting, kind), seeds in groups.items():
        means = [100 * statistics.mean(row["accuracy"] for row in rows) for rows in seeds.values()]
        spread = f"{statistics.stdev(means):.2f}" if len(means) > 1 else "-"
        rows = [row for found in seeds.values() for row in found]
        branches, seconds = (statistics.mean(row[k] for row in rows) for k in ("branches", "train_cpu_seconds"))
        found = f"{statistics.mean(means):.2f} ({spread})"
        print(f"| {setting} | {kind} | {branches:.0f} | {len(seeds)} | {found} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "accuracy", "summary"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=5000, help="of the training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--search-epochs", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.34, help="of the branches that are kept")
    parser.add_argument("--work", type=Path, default=Path("runs/repnas"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "latency":
        latency()
    elif options.what == "accuracy":
        accuracy(options)
    else:
        summary()


if __name__ == "__main__":
    main()
