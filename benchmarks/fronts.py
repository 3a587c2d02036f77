"""Accuracy at equal measured latency and equal search compute: who earns its place?

    python benchmarks/fronts.py --task cifar10 --budgets 80us,120us,180us --seeds 0,1,2    # hours; goes on after a kill
    python benchmarks/fronts.py --task fashion-mnist --images 2500 --seeds 0,1,2
    python benchmarks/fronts.py --retime                                                   # all of them once more
    python benchmarks/fronts.py --summary                                                  # the table of what is there

Every line of `results/fronts.jsonl` is one network: searched on `train` and `search`, trained by one recipe on both,
its exported file timed on one thread, and scored once on `test`. A method searches the whole front at once. `best_of`
gets the processor seconds that PruNet's search with the same seed took (for CIFAR-10: as many candidates as were
thought to fit). MobileNetV2 and V3 are scaled until their file is within 2 % of the limit. What has a line already is
not done again; give each process seeds of its own. A machine's speed wanders by some percent from hour to hour:
`--retime` builds every network of the lines again and times all of one budget in turn, in one process
(`latency_in_turn_ms`). What is left of unequal latencies then is taken out of the leads in the summary's last column:
accuracy rises with the logarithm of latency, and by how much is fitted within methods and seeds, over the budgets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import machine
from torch import nn

from netsmith.cost.counts import count_macs
from netsmith.cost.device import parse_device
from netsmith.cost.meter import measure
from netsmith.decisions import derive
from netsmith.effort import counted, effort
from netsmith.job import Job
from netsmith.methods import make_method
from netsmith.run import Run
from netsmith.search.promise import keep, with_shifts
from netsmith.ship.export import export
from netsmith.spaces import open_space
from netsmith.spaces.references import mobilenet_v2, mobilenet_v3
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "fronts.jsonl"
METHODS = ("prunet", "best_of", "random", "capacity", "fbnet", "mobilenet_v2", "mobilenet_v3")
SEARCHES = {
    "prunet": {"steps": {"epochs": 6, "warmup_epochs": 1}, "finals": {"noise": 0.5, "epochs": [1, 4]}},
    "fbnet": {"steps": {"epochs": 6, "warmup_epochs": 1}, "finals": {"epochs": [1, 4]}, "paths": "one"},
}
"""Shorter than the defaults. With `paths: all` a weight step of FBNet takes eleven times as long (2.3 to 6.5 s), and
the search twice as long as PruNet's."""
RANKING_EPOCHS = 2
"""Of `best_of`'s short trainings."""
MOBILENETS = {"mobilenet_v2": mobilenet_v2, "mobilenet_v3": mobilenet_v3}


class Quiet:
    def stage(self, name: str) -> None: ...
    def progress(self, name: str, done: int, total: int, note: str = "") -> None: ...
    def line(self, text: str) -> None:
        print(text, flush=True)


def method_options(name: str, key: dict, job: Job) -> dict:
    if name != "best_of":
        return SEARCHES.get(name, {})
    prunet = [r for r in load() if {n: r[n] for n in key} == key | {"method": "prunet"}]
    assert len(prunet) == len(job.budgets), "best_of gets the processor seconds of PruNet's rows with this seed: run it"
    return {"processor_seconds": sum(r["search_cpu_seconds"] for r in prunet), "epochs": RANKING_EPOCHS}


def searched(job: Job, name: str, key: dict) -> dict:
    """Values for every budget, and the processor seconds they took, those before a kill included."""
    options = method_options(name, key, job)
    problem = job.problem
    with counted(job.run, name):
        found = make_method(name, options).search(problem, job.run)
    spent = effort(job.run, name)
    assert spent is not None
    pairs = [[[path, list(row.items())] for path, row in values.items()] for values in found]
    return {"options": options, "seconds": spent["processor_seconds"], "values": pairs}


def scaled_mobilenet(job: Job, build: Callable[..., nn.Module], limit: float) -> tuple[nn.Module, dict] | None:
    """Scaled as EfficientNet scales (depth 1.2^phi, width 1.1^phi, arXiv:1905.11946 section 3.3) until the measured
    file is within the limit, then widened until it just is. None where not even the narrowest and shallowest is."""
    task = job.task

    def share(depth: float, width: float) -> tuple[float, nn.Module]:
        network = build(
            width=width, depth=depth, classes=task.classes, channels=task.channels, resolution=task.resolution
        )
        file = export(with_shifts(network), task.input_shape, job.run.path / "untrained.onnx")
        assert job.time is not None
        return job.time(network, file) / limit, network

    phi = 0.0
    while (used := share(1.2**phi, 1.1**phi))[0] > 1 and phi > -10:
        phi -= 1
    depth, low, high = 1.2**phi, 1.1**phi if used[0] <= 1 else 0.05, 2.0
    best = used if used[0] <= 1 else share(depth, low)
    if best[0] > 1:
        return None
    for _ in range(9):
        if best[0] >= 0.98:
            break
        width = (low * high) ** 0.5
        used = share(depth, width)
        if used[0] <= 1:
            low, best = width, max(best, used, key=lambda found: found[0])
        else:
            high = width
    return best[1], {"depth": depth, "width": low, "search_cpu_seconds": 0.0}


def front(key: dict, budgets: list[str], epochs: int, images: int | None, work: Path) -> Iterator[dict]:
    """One row per budget that has none."""
    name = key["method"]
    task = open_task(key["task"], limit=images)
    recipe = dataclasses.replace(Recipe.default(task), epochs=epochs)
    space = "fbnet_small" if name == "fbnet" else "prunet_small"
    problem = {
        **key, "space": space, "device": "ort-cpu", "baselines": [], "images": images,
        "space_options": {"classes": task.classes, "channels": task.channels, "resolution": task.resolution},
        "budget": [f"latency<={','.join(budgets)}"], "recipe": dataclasses.asdict(recipe), "method_options": {},
    }  # fmt: skip
    folder = work / "-".join(map(str, key.values()))
    with Run.create(folder, problem) as run:
        job = Job(run, Quiet())
        job.task = task
        search = {} if name.startswith("mobilenet") else run.once("searched", lambda: searched(job, name, key))
        for number, budget in enumerate(budgets):
            limit = job.problem.budgets[number][0].limit
            row = key | {"budget": budget, "space": space}
            if row_of(load(), row) is not None:
                continue
            torch.manual_seed(key["seed"])
            if search:
                values = {path: dict(pairs) for path, pairs in search["values"][number]}
                budgets_here = job.problem.budgets[number]
                kept = keep(job.problem, run, budget, values, budgets_here, job.time, enough=0.97)
                network = job.problem.network(kept.architecture)
                details = {"search_cpu_seconds": round(search["seconds"] / len(budgets), 1), "rounds": kept.rounds}
                details |= {"options": search["options"], "architecture": kept.architecture}
            else:
                if (scaled := scaled_mobilenet(job, MOBILENETS[name], limit)) is None:
                    print(f"{name} has no network within {budget}", flush=True)
                    continue
                network, details = scaled
            yield row | trained(job, network, budget, epochs) | {"limit_ms": limit} | details | {"machine": machine()}


def trained(job: Job, network: nn.Module, budget: str, epochs: int) -> dict:
    task, seed = job.task, job.asked["seed"]
    torch.manual_seed(seed)
    started = time.process_time()
    train(network, task, job.recipe, split="trainval", seed=seed, checkpoint=job.run.checkpoint(f"{budget}.pt"))
    seconds = time.process_time() - started
    latency = job.time(network, export(network, task.input_shape, job.run.path / f"{budget}.onnx"))
    return {
        "accuracy": evaluate(network, task, "test"),
        "latency_ms": latency,
        "params": sum(p.numel() for p in network.parameters()),
        "macs": count_macs(network, task.input_shape),
        "epochs": epochs,
        "train_cpu_seconds": round(seconds, 1),
    }


def retime(work: Path) -> None:
    """Put `latency_in_turn_ms` into every line: all networks of a task and budget timed in one process, in turn."""
    rows, device = load(), parse_device("ort-cpu")
    for task_name, budget in sorted({(row["task"], row["budget"]) for row in rows}):
        task = open_task(task_name)
        group = [row for row in rows if (row["task"], row["budget"]) == (task_name, budget)]
        shape = {"classes": task.classes, "channels": task.channels, "resolution": task.resolution}
        calls = {}
        for number, row in enumerate(group):
            if row["method"] in MOBILENETS:
                network = MOBILENETS[row["method"]](width=row["width"], depth=row["depth"], **shape)
            else:
                network = derive(open_space(row["space"], **shape), row["architecture"])
            work.mkdir(parents=True, exist_ok=True)
            calls[str(number)] = device.load(
                export(with_shifts(network), task.input_shape, work / "untrained.onnx"), task.input_shape
            )
        for number, timed in measure(calls, seconds=2.0 * len(calls)).items():
            group[int(number)]["latency_in_turn_ms"] = timed.median_ms
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row_of(rows: list[dict], key: dict) -> dict | None:
    return next((r for r in rows if all(r[n] == key[n] for n in ("task", "images", "budget", "seed", "method"))), None)


def load() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(rows: list[dict]) -> str:
    """Per task and budget: mean accuracy with its spread over seeds, and the lead over best_of in its own noise."""
    titles = (
        "task",
        "images",
        "budget",
        "method",
        "seeds",
        "accuracy % (sd)",
        "lead over best_of (se)",
        "latency/limit",
        "search core-s",
        "lead at equal latency (se)",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for task, images, _, budget in sorted({(r["task"], r["images"], r["limit_ms"], r["budget"]) for r in rows}):
        front = [r for r in rows if (r["task"], r["images"]) == (task, images)]
        group = [r for r in front if r["budget"] == budget]
        rival = {r["seed"]: r for r in group if r["method"] == "best_of"}
        slope = points_per_log_latency(front)
        for name in METHODS:
            mine = {r["seed"]: r for r in group if r["method"] == name}
            if not mine:
                continue
            accuracy = [100 * r["accuracy"] for r in mine.values()]
            pairs = [(row, rival[seed]) for seed, row in mine.items() if seed in rival]
            leads = [100 * (row["accuracy"] - other["accuracy"]) for row, other in pairs]
            slower = [slope * math.log(latency(row) / latency(other)) for row, other in pairs]
            equal = _mean_se([lead - owed for lead, owed in zip(leads, slower, strict=True)])
            times = sorted(latency(r) / r["limit_ms"] for r in mine.values())
            used = "-".join(dict.fromkeys(f"{share:.2f}" for share in (times[0], times[-1])))
            spent = statistics.mean(r["search_cpu_seconds"] for r in mine.values())
            cells = task, images, budget, name, len(mine), f"{statistics.mean(accuracy):.2f} ({_spread(accuracy)})"
            lines.append(f"| {' | '.join(map(str, cells))} | {_mean_se(leads)} | {used} | {spent:.0f} | {equal} |")
    return "\n".join(lines)


def latency(row: dict) -> float:
    """Milliseconds, timed in turn where that was done."""
    return row.get("latency_in_turn_ms", row["latency_ms"])


def points_per_log_latency(rows: list[dict]) -> float:
    """Slope of accuracy (points) over the logarithm of latency, by least squares within each method and seed."""
    across = along = 0.0
    for key in {(r["method"], r["seed"]) for r in rows}:
        mine = [r for r in rows if (r["method"], r["seed"]) == key]
        logs, points = [math.log(latency(r)) for r in mine], [100 * r["accuracy"] for r in mine]
        center, level = statistics.mean(logs), statistics.mean(points)
        across += sum((x - center) * (y - level) for x, y in zip(logs, points, strict=True))
        along += sum((x - center) ** 2 for x in logs)
    return across / along if along else 0.0


def _mean_se(leads: list[float]) -> str:
    return f"{statistics.mean(leads):+.2f} ({_spread(leads, len(leads) ** 0.5)})" if leads else "-"


def _spread(values: list[float], over: float = 1.0) -> str:
    return f"{statistics.stdev(values) / over:.2f}" if len(values) > 1 else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--budgets", default="80us,120us,180us")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--images", type=int, help="of the training images; all without it")
    parser.add_argument("--work", type=Path, default=Path("runs/fronts"))
    parser.add_argument("--retime", action="store_true")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two processes on two cores do more than two threads
    if options.retime:
        retime(options.work)
    images = len(open_task(options.task, limit=options.images).split("trainval"))
    for seed in [] if options.summary or options.retime else map(int, options.seeds.split(",")):
        for name in options.methods.split(","):
            key = {"task": options.task, "images": images, "seed": seed, "method": name}
            for row in front(key, options.budgets.split(","), options.epochs, options.images, options.work):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['task']} {row['budget']} seed {seed} {name}: {row['accuracy']:.4f}", flush=True)
    print(summary(load()))


if __name__ == "__main__":
    main()
