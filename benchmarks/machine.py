"""Where and with what a result was measured."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from netsmith.cost.meter import cpu_name


def machine() -> dict:
    """CPU, cores, load, versions, commit and date of this moment."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root)
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "scipy", "netsmith")},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
