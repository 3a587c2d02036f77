"""What a part of a run takes: processor seconds, wall seconds, peak memory; a killed process counts too.

Processor seconds are the fair measure of a search: they do not grow while the machine is busy with something else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from netsmith.run import Run, atomically


@contextmanager
def counted(run: Run, name: str) -> Iterator[None]:
    """Add what the block takes to the run's account ``name``: whenever it shows progress, and when it ends.

    What a killed process did after its last progress is not counted, and what is done twice therefore counts twice.
    """
    before = effort(run, name) or {"processor_seconds": 0.0, "seconds": 0.0, "peak_memory_bytes": 0}
    processor, started, shown = processor_seconds(), time.perf_counter(), run.progress

    def note() -> None:
        spent = {
            "processor_seconds": before["processor_seconds"] + processor_seconds() - processor,
            "seconds": before["seconds"] + time.perf_counter() - started,
            "peak_memory_bytes": max(before["peak_memory_bytes"], peak_memory_bytes()),
        }
        with atomically(run.checkpoint(f"effort-{name}.json")) as file:
            file.write_text(json.dumps(spent))

    def progress(what: str, done: int, total: int, newest: str) -> None:
        note()
        shown(what, done, total, newest)

    run.progress = progress
    try:
        yield
    finally:
        run.progress = shown
    note()


def effort(run: Run, name: str) -> dict[str, float] | None:
    """The account ``name`` of the run: processor_seconds (of all threads and helpers), seconds (on the wall) and
    peak_memory_bytes (the most that a process had resident, from its start on); None where nothing was counted."""
    file = run.checkpoint(f"effort-{name}.json")
    return json.loads(file.read_text()) if file.exists() else None


def processor_seconds() -> float:
    """Of this process, its threads, and the helpers that have ended."""
    return sum(os.times()[:4])


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident so far, PyTorch and all."""
    import resource

    if sys.platform == "linux":  # where ru_maxrss begins with what the process that started this one had
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
