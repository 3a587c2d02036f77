"""How well a table of layers predicts whole networks that it has never seen, and what an entry costs.

    python benchmarks/latency_table.py                                  # five cases, some eight minutes
    python benchmarks/latency_table.py --cases fbnet@96 --no-beside     # one, on a machine left alone

For every case a fresh cache folder is filled with what the space needs, one thread; the calibration is fitted on 16
random networks, and others are predicted: 20 drawn uniformly, and 20 that lean to cheap or to dear options by chance
and so cover the range of budgets. Beside the calibrated table: the plain sum of its entries, and MACs with
scale and constant fitted on the same 16 networks. A training runs on the other core meanwhile (`--beside`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from machine import machine, save
from scipy.stats import kendalltau

from netsmith.architecture import outline
from netsmith.blocks.mobile import MBConv
from netsmith.cost.counts import Macs
from netsmith.cost.device import OrtCpu
from netsmith.cost.latency import calibrate, calibration_networks, leaning, profile_space
from netsmith.cost.prices import tabulate
from netsmith.cost.table import LatencyTable
from netsmith.spaces import open_space

CASES = "fbnet@96,fbnet@224,prunet@224,fbnet_small@32,prunet_small@32"
WAYS = ("raw", "macs", "calibrated")
ASKED = {"error_percent": 3.0, "kendall_tau": 0.9, "ms_per_entry": 20.0}
TRAINING = """
import torch
torch.set_num_threads(1)
layers = [[torch.nn.Conv2d(c, 32, 3, padding=1), torch.nn.ReLU()] for c in (3, 32, 32, 32)]
net = torch.nn.Sequential(*sum(layers, []))
images, optimizer = torch.randn(64, 3, 32, 32), torch.optim.SGD(net.parameters(), 1e-9)
while True:
    net(images).square().mean().backward()
    optimizer.step()
"""


def case(name: str, resolution: int, calibration: int, unseen: int, seconds: float, again: bool) -> dict:
    with torch.device("meta"):
        space = open_space(name, resolution=resolution)
    shape, device = (3, resolution, resolution), OrtCpu(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NETSMITH_CACHE"] = folder
        table = LatencyTable()
        device.load(MBConv(8, 8, hidden=8), (8, 8, 8))  # imports
        started, busy = time.perf_counter(), time.process_time()
        latency = profile_space(space, shape, device, table)
        spent, busy = time.perf_counter() - started, time.process_time() - busy
        entries = table.entries(device.fingerprint())
        known = calibration_networks(space, 0, calibration, latency.raw)
        generator, lines = torch.Generator().manual_seed(2), outline(space)
        others = calibration_networks(space, 1, unseen)
        others += [leaning(lines, latency.raw, generator) for _ in range(unseen)]
        times = calibrate(space, shape, device, latency, known + others, seconds=seconds)
        second = calibrate(space, shape, device, latency, others, seconds=seconds) if again else None
    latency = latency.calibrated(known, times[:calibration])
    measured = times[calibration:]
    macs = tabulate(space, Macs(), shape)
    counts = [macs.of(network) for network in known + others]
    constant, scale = relative_line(counts[:calibration], times[:calibration])
    ways = {
        "raw": [latency.raw.of(network) for network in others],
        "calibrated": [latency.prices.of(network) for network in others],
        "macs": [constant + scale * count for count in counts[calibration:]],
    }
    fitted = latency.calibration
    sets = {"uniform": slice(0, unseen), "leaning": slice(unseen, 2 * unseen)}
    return {
        "space": name,
        "resolution": resolution,
        "entries": len(entries),
        "ms_per_entry": 1e3 * spent / len(entries),
        "cpu_ms_per_entry": 1e3 * busy / len(entries),
        "load": round(os.getloadavg()[0], 1),
        "entry_spread_percent": 100 * float(np.mean([entry.spread for entry in entries.values()])),
        "range_ms": {name: [min(measured[part]), max(measured[part])] for name, part in sets.items()},
        "calibration": {k: getattr(fitted, k) for k in ("constant", "scale", "per_layer", "per_weight")},
        "calibration_error_percent": 100 * fitted.errors()["mean"],
        "repeat": None if second is None else {set_: error(measured[p], second[p]) for set_, p in sets.items()},
        **{
            name: {way: error(predicted[part], measured[part]) for way, predicted in ways.items()}
            for name, part in sets.items()
        },
        "measured_ms": measured,
        "predicted_ms": ways["calibrated"],
    }


def relative_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """constant, scale: the least squares of the relative error of `constant + scale * x`."""
    rows = np.stack([np.ones(len(x)), np.array(x)], 1) / np.array(y)[:, None]
    constant, scale = np.linalg.lstsq(rows, np.ones(len(y)))[0]
    return float(constant), float(scale)


def error(predicted: list[float], measured: list[float]) -> dict[str, float]:
    ratios = np.array(predicted) / np.array(measured)
    return {
        "error_percent": 100 * float(np.abs(ratios - 1).mean()),
        "largest_percent": 100 * float(np.abs(ratios - 1).max()),
        "kendall_tau": float(kendalltau(predicted, measured).statistic),
    }


@contextlib.contextmanager
def beside(wanted: bool) -> Iterator[None]:
    """Something else to do for the other core."""
    other = subprocess.Popen([sys.executable, "-c", TRAINING]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def lines_of(row: dict) -> str:
    return "\n".join(line(row, name) for name in ("uniform", "leaning"))


def line(row: dict, name: str) -> str:
    low, high = row["range_ms"][name]
    cells = [f"{row['space']} {row['resolution']} px", name, f"{low:.2f}-{high:.2f}"]
    cells += [f"{row[name][way]['error_percent']:.1f} / {row[name][way]['kendall_tau']:.3f}" for way in WAYS]
    cells += [f"{row['entries']}", f"{row['ms_per_entry']:.1f} ({row['cpu_ms_per_entry']:.1f})", f"{row['load']:.1f}"]
    repeat = row["repeat"] and row["repeat"][name]
    cells.append(f"{repeat['error_percent']:.1f} / {repeat['kendall_tau']:.3f}" if repeat else "-")
    calibrated = row[name]["calibrated"]
    holds = {
        "error": calibrated["error_percent"] <= ASKED["error_percent"],
        "tau": calibrated["kendall_tau"] >= ASKED["kendall_tau"],
        "ms per entry": row["ms_per_entry"] <= ASKED["ms_per_entry"],
    }
    cells.append(", ".join(what for what, held in holds.items() if not held) or "nothing")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="SPACE@PIXELS,...")
    parser.add_argument("--calibration", type=int, default=16, help="networks to calibrate on")
    parser.add_argument("--unseen", type=int, default=20, help="networks of each kind to predict")
    parser.add_argument("--seconds", type=float, default=40.0, help="for timing the networks of a case")
    parser.add_argument("--beside", action=argparse.BooleanOptionalAction, default=True, help="train on the other core")
    parser.add_argument("--again", action="store_true", help="time the unseen networks twice: what is noise")
    parser.add_argument("--name", default="latency_table", help="of the file of results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = machine()
    ways = " | ".join(f"{way} %/tau" for way in WAYS)
    print(f"| space | networks | ms | {ways} | entries | ms per entry (CPU) | load | repeat %/tau | missed |")
    print("|---" * 11 + "|", flush=True)
    rows = []
    with beside(asked.beside):
        for text in asked.cases.split(","):
            name, pixels = text.split("@")
            rows.append(case(name, int(pixels), asked.calibration, asked.unseen, asked.seconds, asked.again))
            print(lines_of(rows[-1]), flush=True)
    save(asked.name, started, asked=ASKED, beside=asked.beside, threads=1, cases=rows)


if __name__ == "__main__":
    main()
