"""Does the promise loop keep its promises? Twenty budgets between the smallest and the largest network of a space.

    python benchmarks/promise.py                          # some five minutes
    python benchmarks/promise.py --values random          # the knapsack fills budgets with arbitrary choices

The latency table of `prunet_small` at 32 px is filled and calibrated as a search does it. For every budget the loop
allocates the most valuable network, exports it untrained and measures the file until it keeps the budget. Every file is
then measured once more by a fresh process, which knows nothing but the file. Values: `capacity`, or drawn at random
for every budget.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine, save

from netsmith.architecture import extreme
from netsmith.cost.budget import Budget
from netsmith.cost.device import OrtCpu
from netsmith.cost.latency import calibrate, calibration_networks, profile_space
from netsmith.cost.meter import measure
from netsmith.cost.prices import Options
from netsmith.cost.table import LatencyTable
from netsmith.errors import PromiseBroken
from netsmith.run import Run
from netsmith.search.problem import Problem
from netsmith.search.promise import export_untrained, keep
from netsmith.search.sampling import capacity
from netsmith.spaces import open_space
from netsmith.train.recipe import Recipe

ASKED = {"kept_in_a_fresh_process": 20, "median_landing_percent": [95, 100], "rounds": 3}
SHAPE = (3, 32, 32)


class Images:
    """All that the loop asks of a task."""

    input_shape = SHAPE
    class_names, mean, std = tuple("0123456789"), (0.5,) * 3, (0.25,) * 3

    def without_test(self) -> Images:
        return self


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_space("prunet_small", classes=10, channels=3, resolution=32)


def time_file(path: Path) -> float:
    """As the pipeline times a file."""
    return measure({"file": OrtCpu().load(path, SHAPE)})["file"].median_ms


def fresh(path: Path) -> float:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--time", str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def problem_with_prices(seconds: float) -> tuple[Problem, dict]:
    with torch.device("meta"):
        space = open_space("prunet_small", classes=10, channels=3, resolution=32)
    device, table = OrtCpu(), LatencyTable()
    started = time.perf_counter()
    latency = profile_space(space, SHAPE, device, table)
    networks = calibration_networks(space, 0, raw=latency.raw)
    latency = latency.calibrated(networks, calibrate(space, SHAPE, device, latency, networks, seconds=seconds))
    error = 100 * latency.calibration.errors()["mean"]
    facts = {"seconds": time.perf_counter() - started, "error_on_calibration_percent": error}
    return Problem(Images(), build, [], latency.prices, Recipe()), facts  # pyright: ignore[reportArgumentType]


def random_values(problem: Problem, seed: int) -> Options:
    draw = random.Random(seed)
    return {path: {option: draw.random() for option in row} for path, row in capacity(problem).items()}


def one(problem: Problem, run: Run, number: int, limit: float, values: Options, again: int) -> dict:
    rounds: list[dict] = []

    def noted(_: object, path: Path) -> float:
        rounds.append({"ms": time_file(path)})
        return rounds[-1]["ms"]

    started = time.perf_counter()
    budgets = [Budget("latency", limit, "ms")]
    try:
        kept = keep(problem, run, f"budget-{number}", values, budgets, noted)
    except PromiseBroken as broken:
        return {"limit_ms": limit, "kept": False, "sentence": str(broken), "rounds": len(rounds), "seen": rounds}
    seconds = time.perf_counter() - started
    _, file = export_untrained(problem, kept.architecture, run.path / f"{number}.onnx")
    times = [fresh(file) for _ in range(again)]
    return {
        "limit_ms": limit,
        "kept": True,
        "rounds": kept.rounds,
        "first_kept": rounds[0]["ms"] <= limit,
        "seen": [r["ms"] / limit for r in rounds],
        "landing": kept.measured["latency"] / limit,
        "prediction_error": kept.predicted["latency"] / kept.measured["latency"] - 1,
        "fresh": [t / limit for t in times],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--values", choices=("capacity", "random"), default="capacity")
    parser.add_argument("--again", type=int, default=1, help="fresh processes per file")
    parser.add_argument("--calibrating", type=float, default=12.0, help="seconds on whole networks")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.time:
        print(json.dumps(time_file(asked.time)))
        return
    started = machine()
    folder = Path(tempfile.mkdtemp())
    os.environ["NETSMITH_CACHE"] = str(folder / "cache")  # the fresh processes inherit it
    try:
        problem, facts = problem_with_prices(asked.calibrating)
        prices = problem.latency
        rules = problem.outline.rules
        ends = [extreme(prices.options, problem.parents, rules, largest=largest) for largest in (False, True)]
        measured = [time_file(export_untrained(problem, end, folder / "end.onnx")[1]) for end in ends]
        print(f"table {facts['seconds']:.0f} s; networks from {measured[0]:.3f} to {measured[1]:.3f} ms")
        print("| limit ms | kept | at once | rounds | all times, of the limit | lands at | in a fresh process |")
        print("|---|---|---|---|---|---|---|", flush=True)
        rows = []
        with Run.create(folder / "run", {"version": 1}) as run:
            for i in range(asked.budgets):
                # Above the smallest by a little, for a budget it exceeds by noise is nobody's promise.
                share = (i + 0.5) / asked.budgets
                limit = measured[0] * (measured[1] / measured[0]) ** share
                values = capacity(problem) if asked.values == "capacity" else random_values(problem, i)
                row = one(problem, run, i, limit, values, asked.again)
                rows.append(row)
                seen = " ".join(f"{s:.3f}" for s in row.get("seen", []) if isinstance(s, float))
                again = " ".join(f"{t:.3f}" for t in row.get("fresh", []))
                print(f"| {limit:.3f} | {row['kept']} | {row.get('first_kept')} | {row['rounds']} | {seen} | "
                      f"{row.get('landing', float('nan')):.3f} | {again} |", flush=True)  # fmt: skip
    finally:
        shutil.rmtree(folder)
    good = [row for row in rows if row["kept"]]
    summary = {
        "budgets": len(rows),
        "kept": len(good),
        "kept_at_first_export": sum(row["first_kept"] for row in good),
        "kept_in_a_fresh_process": sum(row["fresh"][0] <= 1 for row in good),
        "fresh_within_1_percent": sum(row["fresh"][0] <= 1.01 for row in good),
        "median_landing_percent": 100 * statistics.median(row["landing"] for row in good),
        "median_fresh_landing_percent": 100 * statistics.median(row["fresh"][0] for row in good),
        "fresh_over_measured_sd_percent": 100 * statistics.stdev(row["fresh"][0] / row["landing"] for row in good),
        "most_rounds": max(row["rounds"] for row in rows),
        "mean_rounds": statistics.mean(row["rounds"] for row in rows),
        "mean_prediction_error_percent": 100 * statistics.mean(abs(row["prediction_error"]) for row in good),
    }
    print(json.dumps(summary, indent=1))
    name = "promise" if asked.values == "capacity" else f"promise_{asked.values}"
    save(name, started, asked=ASKED, table=facts, ends_ms=measured, summary=summary, rows=rows)


if __name__ == "__main__":
    main()
