"""Live progress on stderr: a bar on a terminal, now and then a plain line elsewhere. stdout is left to the answer."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 10.0
"""Time between two plain lines of progress: a log should tell that something happens, not everything that happens."""


class Console:
    """What a person at the keyboard sees while a search runs. Use it with `with`, which cleans up the bar."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        self.spoke = self.started
        self.bar: Progress | None = _bar(self.stream) if self.stream.isatty() else None

    def stage(self, name: str) -> None:
        """A part of the work begins."""
        self.line(f"{self._elapsed()}  {name}")

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """So much of it is done; ``note`` is the newest number, such as "loss 0.52". Where several runs are under way,
        ``name`` begins with that of the run and a colon."""
        if self.bar is not None:
            lane = name.partition(":")[0]
            for task in [task for task in self.bar.tasks if task.description != name]:
                if lane == name or task.description.partition(":")[0] == lane:
                    self.bar.remove_task(task.id)  # one bar for what is under way now, of each run
            known = [task.id for task in self.bar.tasks if task.description == name]
            known = known or [self.bar.add_task(name, total=total, note=note)]
            self.bar.update(known[0], completed=done, total=total, note=note, visible=done < total)
        elif time.monotonic() - self.spoke >= QUIET_SECONDS:
            self.line(f"{self._elapsed()}  {name}: {done} of {total}" + (f", {note}" if note else ""))

    def line(self, text: str) -> None:
        """One line that stays."""
        self.spoke = time.monotonic()
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"

    def __enter__(self) -> Console:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar(stream: TextIO) -> Progress:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("      {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Terminal(file=stream), transient=True)
