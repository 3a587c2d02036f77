"""Accuracy at equal measured latency and equal search compute: who earns its place?

    python benchmarks/fronts.py --task cifar10 --budgets 80us,160us,320us --seeds 0,1,2    # hours; goes on after a kill
    python benchmarks/fronts.py --summary                                                  # the table of what is there

Every line of `results/fronts.jsonl` is one network: searched on `train` and `search`, trained by one recipe on both,
its exported file timed on one thread, and scored once on `test`. `best_of` gets as many candidates as PruNet's search
of the same budget and seed took processor seconds. MobileNetV2 and V3 are scaled until their file is within 2 % of the
limit. What has a line already is not done again; give each process seeds of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import nn

from netsmith.cost.counts import count_macs
from netsmith.cost.meter import measure
from netsmith.methods import make_method
from netsmith.pipeline import Job
from netsmith.run import Run
from netsmith.search.promise import keep
from netsmith.search.race import race
from netsmith.search.sampling import at_budget
from netsmith.ship.export import export
from netsmith.spaces.references import mobilenet_v2, mobilenet_v3
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "fronts.jsonl"
METHODS = ("prunet", "best_of", "random", "capacity", "fbnet", "mobilenet_v2", "mobilenet_v3")
RANKING_EPOCHS = 2
"""Of every short training, whoever asks for it."""


class Quiet:
    def stage(self, name: str) -> None: ...
    def progress(self, name: str, done: int, total: int, note: str = "") -> None: ...
    def line(self, text: str) -> None:
        print(text, flush=True)


def method_options(name: str, front: list[dict], key: dict, job: Job) -> dict:
    if name == "prunet":
        return {"race_epochs": (1, RANKING_EPOCHS), "steps": {"epochs": 8, "warmup_epochs": 2}}
    if name == "fbnet":
        return {"race_epochs": (1, RANKING_EPOCHS), "steps": {"epochs": 8, "warmup_epochs": 2}}
    if name == "best_of":
        (rival,) = [r for r in front if {name: r[name] for name in key} == key | {"method": "prunet"}]
        per_candidate = seconds_per_candidate(job)
        return {"candidates": max(3, round(rival["search_cpu_seconds"] / per_candidate)), "epochs": RANKING_EPOCHS}
    return {}


def seconds_per_candidate(job: Job) -> float:
    """Processor seconds of one short training at this budget."""
    started = time.process_time()
    generator = torch.Generator().manual_seed(1)
    entrant = at_budget(job.problem, job.problem.budgets[0], generator)
    race(job.problem, job.run, "calibrate", [entrant], epochs=(RANKING_EPOCHS,))
    return time.process_time() - started


def searched(job: Job, name: str, options: dict, seed: int) -> tuple[nn.Module, dict]:
    started = time.process_time()
    (values,) = make_method(name, options).search(job.problem, job.run)
    seconds = time.process_time() - started
    kept = keep(job.problem, job.run, name, values, job.problem.budgets[0], job.time_file)
    details = {"architecture": kept.architecture, "rounds": kept.rounds, "search_cpu_seconds": round(seconds, 1)}
    return job.problem.network(kept.architecture), details | {"options": options}


def scaled_mobilenet(job: Job, build: Callable[..., nn.Module]) -> tuple[nn.Module, dict]:
    """The width multiplier at which the file just keeps the budget, by bisection over measured files."""
    limit, task = job.problem.budgets[0][0].limit, job.task
    low, high, best = 0.05, 2.0, None
    for _ in range(9):
        width = (low * high) ** 0.5
        network = build(width=width, classes=task.classes, channels=task.channels, resolution=task.resolution)
        used = job.device.load(network, task.input_shape)
        share = measure({"x": used}, seconds=3.0)["x"].median_ms / limit
        if share <= 1:
            low, best = width, network
        else:
            high = width
        if 0.98 <= share <= 1:
            break
    assert best is not None
    return best, {"width": low, "search_cpu_seconds": 0.0}


def one(task_name: str, budget: str, seed: int, name: str, epochs: int, work: Path) -> dict:
    task = open_task(task_name)
    recipe = dataclasses.replace(Recipe.default(task), epochs=epochs)
    space = "fbnet_small" if name == "fbnet" else "prunet_small"
    problem = {
        "method": name, "space": space, "task": task_name, "seed": seed, "device": "ort-cpu", "baselines": [],
        "space_options": {"classes": task.classes, "channels": task.channels, "resolution": task.resolution},
        "budget": [f"latency<={budget}"], "recipe": dataclasses.asdict(recipe), "method_options": {},
    }  # fmt: skip
    key = {"task": task_name, "budget": budget, "seed": seed, "method": name}
    with Run.create(work / "-".join(map(str, key.values())), problem) as run:
        job = Job(run, Quiet())
        torch.manual_seed(seed)
        if name.startswith("mobilenet"):
            network, details = scaled_mobilenet(job, mobilenet_v2 if name == "mobilenet_v2" else mobilenet_v3)
        else:
            network, details = searched(job, name, method_options(name, load(), key, job), seed)
        torch.manual_seed(seed)
        started = time.process_time()
        train(network, task, recipe, split="trainval", seed=seed, checkpoint=run.checkpoint("final.pt"))
        trained = time.process_time() - started
        file = export(network, task.input_shape, run.path / "model.onnx")
        latency = measure({"x": job.device.load(file, task.input_shape)})["x"]
        return key | {
            "space": space,
            "accuracy": evaluate(network, task, "test"),
            "latency_ms": latency.median_ms,
            "ci95": latency.ci95,
            "limit_ms": job.problem.budgets[0][0].limit,
            "params": sum(p.numel() for p in network.parameters()),
            "macs": count_macs(network, task.input_shape),
            "epochs": epochs,
            "train_cpu_seconds": round(trained, 1),
            **details,
            "machine": machine(),
        }


def load() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(rows: list[dict]) -> str:
    """Per task and budget: mean accuracy with its spread over seeds, and the lead over best_of in its own noise."""
    titles = (
        "task",
        "budget",
        "method",
        "seeds",
        "accuracy % (sd)",
        "lead over best_of (se)",
        "latency/limit",
        "search core-s",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for task, budget in sorted({(r["task"], r["budget"]) for r in rows}):
        group = [r for r in rows if (r["task"], r["budget"]) == (task, budget)]
        rival = {r["seed"]: 100 * r["accuracy"] for r in group if r["method"] == "best_of"}
        for name in METHODS:
            mine = {r["seed"]: r for r in group if r["method"] == name}
            if not mine:
                continue
            accuracy = [100 * r["accuracy"] for r in mine.values()]
            leads = [100 * mine[seed]["accuracy"] - rival[seed] for seed in mine if seed in rival]
            lead = f"{statistics.mean(leads):+.2f} ({_sd(leads) / len(leads) ** 0.5:.2f})" if leads else ""
            used = statistics.median(r["latency_ms"] / r["limit_ms"] for r in mine.values())
            spent = statistics.mean(r["search_cpu_seconds"] for r in mine.values())
            cells = task, budget, name, len(mine), f"{statistics.mean(accuracy):.2f} ({_sd(accuracy):.2f})", lead
            lines.append(f"| {' | '.join(map(str, cells))} | {used:.3f} | {spent:.0f} |")
    return "\n".join(lines)


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--budgets", default="80us,160us,320us")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--work", type=Path, default=Path("runs/fronts"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two processes on two cores do more than two threads
    for seed in map(int, options.seeds.split(",")):
        for budget in options.budgets.split(","):
            for name in options.methods.split(","):
                done = {(r["task"], r["budget"], r["seed"], r["method"]) for r in load()}
                if options.summary or (options.task, budget, seed, name) in done:
                    continue
                row = one(options.task, budget, seed, name, options.epochs, options.work)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{options.task} {budget} seed {seed} {name}: {row['accuracy']:.4f}", flush=True)
    print(summary(load()))


if __name__ == "__main__":
    main()
