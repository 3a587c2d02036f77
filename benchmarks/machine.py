"""Where and with what a result was measured; and how results are kept."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from netsmith.cost.meter import cpu_name

PACKAGES = ("torch", "onnxruntime", "numpy", "scipy", "netsmith")
RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict:
    """CPU, cores, load, versions (of further ``packages`` too, where installed), commit (with a plus
    where `src` differs from it) and date of this moment."""
    changed = _git("status", "--porcelain", "-uno", "--", "../src")
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, started: dict, **results: object) -> Path:
    """Write `results/NAME.json`: the machine as it was at the start, its load now, the command, the results."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    facts = {**started, "load_at_end": round(os.getloadavg()[0], 1), "command": " ".join(["python", *words])}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": facts, **results}, indent=1) + "\n")
    return file


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
