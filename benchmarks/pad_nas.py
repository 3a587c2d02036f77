"""Does a supernet rank better, and is the space better, after every pruning (PAD-NAS, arXiv:2005.07564, 5.5 to 5.7)?

    python benchmarks/pad_nas.py --images 5000 --seeds 0,1,2     # goes on after a kill
    python benchmarks/pad_nas.py --summary

On NAS-Bench-201, where every network's accuracy after a training of its own is published: the problem is that of
`nasbench201.py`, and its PAD-NAS searches are used where they are there. Every line of `results/pad_nas.jsonl` is one
stage of one search: what the cells that are left are worth (exact, over all of them), and how the supernet's accuracies
with inherited weights agree with the published ones (Kendall's tau), over cells of the space as it is then (`own`) and
over cells that are in the space of every stage (`common`): a smaller space holds better and more equal cells, which are
harder to rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import islice
from pathlib import Path

import torch
from machine import RESULTS, machine
from nasbench201 import METHODS, problem_of, published, searched
from scipy.stats import kendalltau

from netsmith.architecture import enumerate_architectures, sample
from netsmith.decisions import Architecture, derive
from netsmith.methods.pad_nas import SinglePath
from netsmith.run import read_events
from netsmith.search.problem import Problem
from netsmith.spaces.nasbench201 import index_of
from netsmith.train.batchnorm import recalibrate
from netsmith.train.checkpoint import load_state
from netsmith.train.loop import evaluate

LINES = RESULTS / "pad_nas.jsonl"


def worth(cell: Architecture) -> float:
    """Published accuracy on CIFAR-10, percent."""
    return float(published()[index_of(cell)]["cifar10_test_e200"])


def stages(problem: Problem, run: Path) -> list[SinglePath]:
    """The supernets of a finished search, each as its stage left it."""
    found = []
    for number in range(1, len(list((run / "checkpoints").glob("pad_nas-stage*.pt"))) + 1):
        searcher = SinglePath(problem, [{}])
        dropped = [event for event in read_events(run) if event["kind"] == "removed"]
        searcher.drop(event for event in dropped if int(event["search"].removeprefix("pad_nas-stage")) < number)
        searcher.restore(load_state(run / "checkpoints" / f"pad_nas-stage{number}.pt")["searcher"])
        found.append(searcher)
    return found


def inherited(searcher: SinglePath, cells: list[Architecture], images: list[torch.Tensor]) -> list[float]:
    """Accuracies on `search`, percent, with the supernet's weights."""
    found = []
    for cell in cells:
        network = derive(searcher.supernet, cell)
        recalibrate(network, images)
        found.append(100 * evaluate(network, searcher.problem.task, "search"))
    return found


def rows_of(seed: int, options: argparse.Namespace) -> list[dict]:
    run = options.work / f"pad_nas-{seed}"
    searched({"method": "pad_nas", "seed": seed}, options.epochs, options.images, options.work)
    problem = problem_of(seed, options.images)
    batches = problem.task.batches("train", problem.recipe.batch_size, train=True, seed=seed, epoch=0)
    images = [images for images, _ in islice(batches, 8)]
    supernets = stages(problem, run)
    generator = torch.Generator().manual_seed(seed)
    common = distinct(supernets[-1], options.cells, generator)
    rows = []
    for number, searcher in enumerate(supernets, start=1):
        left = [worth(cell) for cell in enumerate_architectures(searcher.space)]
        own = distinct(searcher, options.cells, generator)
        row = {"seed": seed, "stage": number, "cells": len(left), "published_mean": statistics.fmean(left)}
        row |= {"published_sd": statistics.pstdev(left), "options": METHODS["pad_nas"][1], "images": options.images}
        for name, cells in (("own", own), ("common", common)):
            scores, truth = inherited(searcher, cells, images), [worth(cell) for cell in cells]
            row[f"{name}_tau"] = kendalltau(scores, truth).statistic
            row[f"{name}_inherited"] = statistics.fmean(scores)
            row[f"{name}_cells"] = len(cells)
        rows.append(row | {"machine": machine()})
    return rows


def distinct(searcher: SinglePath, count: int, generator: torch.Generator) -> list[Architecture]:
    drawn = (sample(searcher.space, generator) for _ in range(20 * count))
    return list(islice({index_of(cell): cell for cell in drawn}.values(), count))


def lines() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def summary(rows: list[dict]) -> str:
    titles = "stage", "seeds", "cells left", "published % of all of them", "tau, own", "tau, common"
    found = [f"| {' | '.join([*titles, 'inherited % of the common'])} |", "|---" * 7 + "|"]
    for stage in sorted({row["stage"] for row in rows}):
        mine = [row for row in rows if row["stage"] == stage]

        def each(name: str, places: int, mine: list[dict] = mine) -> str:
            return ", ".join(f"{row[name]:.{places}f}" for row in mine)

        cells = str(stage), str(len(mine)), each("cells", 0), each("published_mean", 2)
        found.append(
            f"| {' | '.join([*cells, each('own_tau', 2), each('common_tau', 2), each('common_inherited', 1)])} |"
        )
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=5000, help="of the training images")
    parser.add_argument("--cells", type=int, default=100, help="that are ranked")
    parser.add_argument("--epochs", type=int, default=15, help="of nasbench201.py, which PAD-NAS' own replace")
    parser.add_argument("--work", type=Path, default=Path("runs/nasbench201"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if options.summary else map(int, options.seeds.split(",")):
        if any(row["seed"] == seed for row in lines()):
            continue
        for row in rows_of(seed, options):
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(summary(lines()))


if __name__ == "__main__":
    main()
