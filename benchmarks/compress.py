"""A trained network under a latency budget, by every way there is: who keeps most of its accuracy?

    python benchmarks/compress.py --seeds 0,1    # a night; goes on after a kill
    python benchmarks/compress.py --summary

Each network is trained here on CIFAR-10, then brought to a share of its own measured latency by netsmith's methods (a
chain of two among them), by
the same share of every group's channels (`uniform`), and by Torch-Pruning 1.6.1 (global, group importance, widths
rounded to 8; its ratio is bisected until the measured file keeps the budget). All see the training images as often:
what a method learns from before its network is chosen is taken off its fine-tuning. Fine-tuning is one recipe, with the
original as teacher. Every line of `results/compress.jsonl` is one network, scored once on `test`; where netsmith
refused, its last sentence.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from torch import nn

import netsmith
from netsmith.architecture import Architecture
from netsmith.compression import fine_tuning
from netsmith.cost.counts import Macs, Params
from netsmith.cost.device import OrtCpu, load_shipped
from netsmith.cost.meter import measure
from netsmith.decisions import derive
from netsmith.graph.channels import channels
from netsmith.graph.slim import proven
from netsmith.graph.slimmable import Slimmable
from netsmith.ship.export import export
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
LEARNING = {"lana": 3, "smcp": 6, "smcp+mixed_precision": 6, "uniform": 0, "torch_pruning": 0}
"""Epochs before a network is chosen; a chain's methods share the epochs after it."""
WAYS = tuple(LEARNING)
NEARLY = 0.97
"""The share of the limit from which a bisection is near enough."""


BROKEN = 3
"""What netsmith exits with where a budget is not kept; the network and its result are there."""


REFUSED = 2
"""What it exits with where no network can keep the budget."""


def netsmith_run(*words: str) -> str:
    """What it said where it refused."""
    done = subprocess.run([sys.executable, "-m", "netsmith", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = done.stderr.decode().strip().rpartition("\n")[2]
    if done.returncode not in (0, BROKEN, REFUSED):
        raise SystemExit(f"netsmith {' '.join(words)} ended with {done.returncode}: {said}")
    return said if done.returncode == REFUSED else ""


def original(name: str, seed: int, epochs: int, work: Path) -> Path:
    folder = work / f"{name.replace(':', '-')}-{seed}"
    if not (folder / "result.json").exists():
        words = ["--model", name, "--task", "cifar10", "--epochs", str(epochs), "--seed", str(seed)]
        netsmith_run("train", *words, "--out", str(folder))
    return folder


def milliseconds(networks: dict[str, nn.Module], task: Task, work: Path) -> dict[str, float]:
    """Of the exported files, timed in turn on one thread."""
    files = {name: export(network, task.input_shape, work / f"{name}.onnx") for name, network in networks.items()}
    device = OrtCpu()
    loaded = {name: load_shipped(device, networks[name], file, task.input_shape) for name, file in files.items()}
    return {name: found.median_ms for name, found in measure(loaded, seconds=6.0).items()}


def compressed(way: str, folder: Path, share: float, epochs: int, seed: int, work: Path) -> dict:
    """By a method of netsmith, as a user would."""
    out = work / f"{folder.name}-{way}-{share}"
    if not (out / "result.json").exists():
        before, methods = LEARNING[way], way.count("+") + 1
        budget = ["--budget", f"latency<={share}x", "--epochs", str((epochs - before) // methods)]
        words = [
            "compress",
            str(folder),
            "--method",
            way.replace("+", ","),
            *budget,
            "--seed",
            str(seed),
            "--baselines",
        ]
        learning = ["--search-epochs", str(before)] if methods == 1 else []  # of a chain: SMCP's own are given below
        if methods > 1:
            options = work / "chain.yaml"
            options.write_text(json.dumps({"method_options": {"smcp": {"epochs": before}}}))
            learning = ["--config", str(options)]
        again = ["compress", "--resume", str(out)]
        refused = netsmith_run(*(again if out.exists() else [*words, *learning, "--out", str(out)]))
        if refused:
            return {"refused": refused}
    result = json.loads((out / "result.json").read_text())
    reference, cost = result["reference"]["cost"], result["cost"]
    return {
        "accuracy": 100 * result["metric"]["test"],
        "latency_ms": cost["latency_ms"]["median"],
        "original_ms": reference["latency_ms"]["median"],
        "limit_ms": result["budgets"][0]["limit"],
        "params": cost["params"],
        "macs": cost["macs"],
        "kept": result["kept"],
    }


def bisected(
    narrower: Callable[[float], nn.Module], network: nn.Module, share: float, task: Task, work: Path
) -> tuple[nn.Module, dict]:
    """The widest network whose measured file keeps the budget."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        middle = (low + high) / 2
        candidate = narrower(middle)
        found = milliseconds({"original": network, "candidate": candidate}, task, work)
        used = found["candidate"] / (share * found["original"])
        if used <= 1:
            low, best = middle, (candidate, found)
            if used >= NEARLY:
                break
        else:
            high = middle
    assert best, "not even the narrowest network keeps the budget"
    times = {"latency_ms": best[1]["candidate"], "original_ms": best[1]["original"]}
    return best[0], {**times, "limit_ms": share * best[1]["original"]}


def uniform(network: nn.Module, task: Task) -> Callable[[float], nn.Module]:
    """The same share of every group's channels, those with the largest weights."""
    space = Slimmable(network, proven(network, channels(network, task.input_shape), task.input_shape), step=4, most=64)
    space.rank()

    def narrower(width: float) -> nn.Module:
        near: Architecture = {
            path: min(space.width(path).options, key=lambda n, size=group.size: abs(n - width * size))
            for path, group in space.groups.items()
        }
        return derive(space, near).eval()

    return narrower


def torch_pruning(network: nn.Module, task: Task) -> Callable[[float], nn.Module]:
    import torch_pruning as tp

    def narrower(width: float) -> nn.Module:
        smaller = copy.deepcopy(network)
        pruner = tp.pruner.MetaPruner(
            smaller,
            torch.zeros(1, *task.input_shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - width,
            global_pruning=True,
            round_to=8,
            ignored_layers=[
                m for m in smaller.modules() if isinstance(m, nn.Linear) and m.out_features == task.classes
            ],
        )
        pruner.step()
        return smaller.eval()

    return narrower


def pruned(way: str, folder: Path, share: float, epochs: int, seed: int, work: Path) -> dict:
    task, network = open_task("cifar10"), netsmith.load(folder).eval()
    narrower = (uniform if way == "uniform" else torch_pruning)(network, task)
    found, times = bisected(narrower, network, share, task, work)
    recipe = replace(Recipe.default(task), **{**fine_tuning(task), "epochs": epochs})
    checkpoint = work / f"{folder.name}-{way}-{share}.pt"
    train(found, task, recipe, split="trainval", seed=seed, teacher=network, checkpoint=checkpoint)
    counts = {"params": Params()(found, task.input_shape), "macs": Macs()(found, task.input_shape)}
    return {"accuracy": 100 * evaluate(found, task, "test"), **times, **counts}


def load() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def summary(rows: list[dict]) -> str:
    lines = ["| network | budget | way | seeds | accuracy % (sd) | of the original, points | latency / limit | MACs |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for network, share in sorted({(row["network"], row["share"]) for row in rows}, key=lambda key: (key[0], -key[1])):
        for way in WAYS:
            mine = [r for r in rows if (r["network"], r["share"], r["way"]) == (network, share, way)]
            refused = [row for row in mine if "refused" in row]
            mine = [row for row in mine if "refused" not in row]
            if refused:
                seeds = ", ".join(str(row["seed"]) for row in refused)
                lines.append(f"| {network} | {share}x | {way} | refused: {seeds} | - | - | - | - |")
            if mine:
                accuracy = [row["accuracy"] for row in mine]
                spread = f"{statistics.stdev(accuracy):.2f}" if len(mine) > 1 else "-"
                lost = statistics.fmean(row["accuracy"] - row["original_accuracy"] for row in mine)
                used = ", ".join(f"{row['latency_ms'] / row['limit_ms']:.2f}" for row in mine)
                macs = statistics.fmean(row["macs"] for row in mine) / 1e6
                lines.append(
                    f"| {network} | {share}x | {way} | {len(mine)} | {statistics.fmean(accuracy):.2f} ({spread}) "
                    f"| {lost:+.2f} | {used} | {macs:.1f} M |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="timm:resnet10t,timm:mobilenetv3_small_050")
    parser.add_argument("--shares", default="0.7,0.5,0.35")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--original-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12, help="of all that a compressed network learns")
    parser.add_argument("--work", type=Path, default=Path("runs/compress-benchmark"))
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    asked = [] if options.summary else [
        {"network": name, "seed": int(seed), "share": float(share), "way": way}
        for seed in options.seeds.split(",")
        for name in options.networks.split(",")
        for share in options.shares.split(",")
        for way in options.ways.split(",")
    ]  # fmt: skip
    for key in asked:
        if any({n: row[n] for n in key} == key for row in load()):
            continue
        started, facts = time.perf_counter(), machine("timm", "torch-pruning")
        folder = original(key["network"], key["seed"], options.original_epochs, options.work)
        accuracy = 100 * json.loads((folder / "result.json").read_text())["metric"]["test"]
        by = pruned if key["way"] in ("uniform", "torch_pruning") else compressed
        found = by(key["way"], folder, key["share"], options.epochs, key["seed"], options.work)
        row = {**key, **found, "original_accuracy": accuracy, "epochs": options.epochs}
        row |= {"original_epochs": options.original_epochs, "seconds": time.perf_counter() - started, "machine": facts}
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = found.get("refused") or f"{found['accuracy']:.2f} % at {1000 * found['latency_ms']:.0f} us"
        print(f"{key}: {said}", flush=True)
    print(summary(load()))


if __name__ == "__main__":
    main()
