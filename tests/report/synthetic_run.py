"""A run folder as a search leaves it, made of plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

OPTIONS = ["k3_e1", "k3_e3", "k3_e6", "k5_e3", "k5_e6", "skip"]
CHANNELS = [16, 24, 24, 24, 32, 32, 32, 64, 64, 64, 96, 96, 160, 160, 320]
STRIDED = {1, 4, 7, 12}
EPOCHS = 30


DEVICE = "ort-cpu:threads=2 | AMD EPYC 7B13 | onnxruntime 1.31.1"


def cost(latency: float, params: int, macs: int) -> dict[str, Any]:
    """A measured cost: interval of about one percent."""
    clock = {"predicted": latency * 0.985, "median": latency, "ci95": [latency * 0.993, latency * 1.011]}
    memory = {"peak_memory_bytes": 401_408, "file_bytes": 4 * params + 38_912}
    return {"params": params, "macs": macs, "latency_ms": clock, **memory}


def scored(accuracy: float) -> dict[str, Any]:
    return {"name": "accuracy", "test": accuracy, "test_exported": accuracy - 0.0002}


def layers(dice: random.Random, chosen: dict[str, str]) -> list[dict[str, Any]]:
    """The found network, layer by layer."""
    side, before = 48, 16
    listed = [("stem", f"ConvBN(3, {before}, kernel=3, stride=2)", [3, 96, 96], [before, side, side], 1_300_000, 432)]
    for index, after in enumerate(CHANNELS):
        path = f"blocks.{index}"
        stride = 2 if index in STRIDED else 1
        out = side // stride
        option = chosen[path]
        if option == "skip":
            text, macs, params = "Identity()", 0, 0
        else:
            kernel, factor = int(option[1]), int(option[-1])
            hidden = before * factor
            text = f"MBConv({before}, {after}, kernel={kernel}, hidden={hidden}, stride={stride})"
            params = before * hidden + hidden * kernel**2 + hidden * after
            macs = before * hidden * side**2 + (hidden * kernel**2 + hidden * after) * out**2
        listed.append((path, text, [before, side, side], [after, out, out], macs, params))
        side, before = out, after
    listed.append(
        ("head", f"ConvBN({before}, 640, kernel=1)", [before, side, side], [640, side, side], 1_800_000, 204_800)
    )
    listed.append(("classifier", "Linear(640, 10)", [640], [10], 6_400, 6_410))
    rows = []
    for name, text, shape, out, macs, params in listed:
        time = 0.02 + macs / 1.07e7
        measured = time * dice.uniform(0.88, 1.15)
        row = {"name": name, "text": text, "input": shape, "output": out, "macs": macs, "params": params}
        rows.append(row | {"predicted_ms": time, "measured_ms": measured})
    return rows


def result(seed: int = 0, kept: bool = True, method: str = "fbnet") -> dict[str, Any]:
    """What `result.json` holds."""
    dice = random.Random(seed)
    chosen = {f"blocks.{i}": dice.choice(OPTIONS[:5] if i in STRIDED else OPTIONS) for i in range(len(CHANNELS))}
    baselines = [
        {"name": "random", "metric": scored(dice.gauss(0.902, 0.006)), "seed": s}
        | {"cost": cost(dice.uniform(4.6, 5.0), dice.randint(600_000, 1_100_000), dice.randint(28_000_000, 40_000_000))}
        for s in range(5)
    ]
    baselines.append(
        {"name": "capacity", "metric": scored(0.9128), "cost": cost(4.94, 1_310_000, 41_200_000), "seed": 0}
    )
    latency = 4.83 if kept else 5.31
    budgets = [{"metric": "latency", "limit": 5.0, "unit": "ms", "measured": latency * 1.011, "kept": kept}]
    versions = {"netsmith": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "python": "3.11.7"}
    said = f"{latency:.2f} ms on two threads of an AMD EPYC, {'within' if kept else 'above'} the budget of 5 ms; "
    return {
        "method": method,
        "space": "fbnet",
        "task": "imagenette",
        "seed": seed,
        "metric": scored(0.9187 + 0.002 * seed),
        "budgets": budgets,
        "cost": cost(latency, 1_034_210, 37_400_000),
        "reference": {"metric": scored(0.9231), "cost": cost(9.42, 2_236_682, 94_600_000)},
        "parity_max_abs_diff": 3.1e-6,
        "seconds": {"profile": 312.4, "search": 5204.0, "train": 8110.5, "ship": 41.2},
        "baselines": baselines,
        "architecture": chosen,
        "layers": layers(dice, chosen),
        "device": {"name": "ort-cpu", "fingerprint": DEVICE, "versions": versions},
        "verdict": said + "accuracy 91.85 %, 0.44 points below the reference.",
        "kept": kept,
    }


def events(made: dict[str, Any], seed: int = 0) -> Iterator[dict[str, Any]]:
    """What `events.jsonl` holds: a search whose probabilities sharpen, brackets that close, trainings, a baseline."""
    method = made.get("method")
    dice = random.Random(seed + 100)
    target = 5.0
    chosen = (made.get("front") or [made])[0].get("architecture", {})
    pull = {path: {o: dice.gauss(0, 0.5) for o in OPTIONS} for path in chosen}
    bounds = {f"blocks.{i}.hidden": [16, 16 * dice.randint(8, 16)] for i in range(0, len(CHANNELS), 2)}
    gone: dict[str, set[str]] = {path: set() for path in pull}
    if method == "lana":
        yield from learnt(chosen, dice)
    for epoch in range(0 if method == "lana" else EPOCHS):
        heat = 0.2 + 4.0 * (epoch / EPOCHS) ** 1.5
        shares = {}
        for path, scores in pull.items():
            bonus = {o: v + (0.8 if o == chosen[path] else 0) for o, v in scores.items()}
            alive = {o: math.exp(heat * v) for o, v in bonus.items() if o not in gone[path]}
            shares[path] = {o: v / sum(alive.values()) for o, v in alive.items()}
            weakest = min(shares[path], key=lambda o: shares[path][o])
            if epoch > 8 and shares[path][weakest] < 0.02 and len(alive) > 2:
                gone[path].add(weakest)
                yield {"kind": "removed", "search": method, "path": path, "option": weakest, "epoch": epoch}
        for ends in bounds.values():
            if epoch > 4 and ends[1] - ends[0] >= 16 and dice.random() < 0.45:
                end = dice.randint(0, 1)
                ends[end] += 16 - 32 * end
        loss = 2.3 * math.exp(-epoch / 12) + 0.35
        yield {
            "kind": "search_epoch",
            "search": method,
            "epoch": epoch,
            "train_loss": loss + dice.gauss(0, 0.02),
            "search_loss": loss * 1.08 + 0.08 + dice.gauss(0, 0.03),
            "expected": {"latency": target + 4.2 * math.exp(-epoch / 7) + dice.gauss(0, 0.05)},
            "target": target,
            "probabilities": shares,
            "widths": {path: list(ends) for path, ends in bounds.items()},
            "alive": {path: list(s) for path, s in shares.items()},
        }
    taken = [(f"{method}-0", 1, 4.97, 5.34), (f"{method}-0", 2, 4.91, 5.08), (f"{method}-0", 3, 4.86, 4.83)]
    for name, number, predicted, measured in [*taken, ("capacity-0", 1, 4.92, 4.94)]:
        row = {"name": name, "round": number, "metric": "latency", "limit": 5.0, "predicted": predicted}
        yield {"kind": "promise_round", **row, "measured": measured, "kept": measured <= 5.0}
    for which, top in (("reference", 0.923), ("found-0", 0.919)):
        for epoch in range(60):
            rate = 0.5 * 0.4 * (1 + math.cos(math.pi * epoch / 60))
            accuracy = top - 0.6 * math.exp(-epoch / 9) + dice.gauss(0, 0.004)
            row = {"which": which, "epoch": epoch, "loss": 2.3 * math.exp(-epoch / 14) + 0.2 + dice.gauss(0, 0.02)}
            yield {"kind": "train_epoch", "accuracy": accuracy, "learning_rate": rate, **row}
        yield {"kind": "gate", "which": which, "kept": made.get("kept"), "sentence": f"the gate on {which}"}
    yield {"kind": "gate", "which": "capacity-0", "kept": True, "sentence": "the gate on capacity-0"}
    yield {"kind": "a_kind_of_tomorrow", "anything": [1, 2]}


def learnt(chosen: dict[str, str], dice: random.Random) -> Iterator[dict[str, Any]]:
    """What LANA logs: candidates that learn, the harm of each, and networks scored whole; one epoch is there twice."""
    for epoch, error in ((1, 0.9), (2, 0.7), (2, 0.6), (3, 0.5)):
        yield {"kind": "lana_epoch", "epoch": epoch, "error": error}
    harms = {path: {o: dice.uniform(-0.05, 0.9) for o in OPTIONS[: 2 + i % 5]} for i, path in enumerate(chosen)}
    harms["blocks.3"]["k3_e1"] = math.nan
    yield {"kind": "lana_scores", "rows": [[path, o, h] for path, row in harms.items() for o, h in row.items()]}
    networks = [{path: dice.choice(["original", "k3_e3"]) for path in chosen} for _ in range(20)]
    added = [sum(harms[path][o] for path, o in n.items() if o != "original") for n in networks]
    yield {"kind": "lana_networks", "harm": [0.3 + 0.8 * h for h in added], "networks": networks}


def write_run(folder: Path, made: dict[str, Any], seed: int = 0) -> Path:
    """Write a whole run folder."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(made))
    lines = [json.dumps({"time": 1.8e9 + i, **event}) for i, event in enumerate(events(made, seed))]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    command = ["netsmith", "search", "fbnet", "--task", "imagenette", "--budget", "latency<=5ms", "--seed", str(seed)]
    method = {"name": made.get("method"), "epochs": EPOCHS, "temperature": 5.0, "alpha": 0.2}
    problem = {"command": command, "method": method, "space": "fbnet", "task": "imagenette", "seed": seed}
    problem |= {"budgets": ["latency<=5ms"], "device": "cpu-2", "recipe": {"epochs": 60, "learning_rate": 0.4}}
    (folder / "problem.yaml").write_text(yaml.safe_dump(problem | {"netsmith": "0.1.0"}, sort_keys=False))
    return folder


def predicted(data: Any) -> Any:
    """The same result from a table, on which nothing runs: no latency is measured."""
    if isinstance(data, list):
        return [predicted(item) for item in data]
    if not isinstance(data, dict):
        return data
    data = {key: predicted(value) for key, value in data.items()}
    if data.get("metric") == "latency":
        data["measured"] = None
    if "latency_ms" in data:
        data["latency_ms"] |= {"median": None, "ci95": None}
    if "measured_ms" in data:
        data["measured_ms"] = None
    return data


def front(seed: int = 0) -> dict[str, Any]:
    """What `result.json` holds when three budgets were asked."""
    shared = {"method", "space", "task", "seed", "reference", "baselines", "device", "seconds"}
    whole = result(seed)
    members = []
    for limit, accuracy in ((3.0, 0.894), (5.0, 0.9187), (7.0, 0.9214)):
        one = {key: value for key, value in result(seed + int(limit)).items() if key not in shared}
        budget = {"metric": "latency", "limit": limit, "unit": "ms", "measured": limit * 0.98, "kept": True}
        one |= {"metric": scored(accuracy), "cost": cost(limit * 0.97, int(2e5 * limit), int(7.5e6 * limit))}
        members.append(one | {"budgets": [budget], "verdict": f"{limit * 0.97:.2f} ms, within {limit:g} ms."})
    return {key: value for key, value in whole.items() if key in shared} | {"front": members}
