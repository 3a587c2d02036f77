"""Measured latencies of operators, kept per device; and the calibration that turns their sum into a network's latency.

A table entry is the time of one layer alone, keyed by what the layer prints and its input: `MBConv(...) @ 16x32x32`.
Entries are raw and kept for good in one SQLite file; the calibration belongs to a family of networks and is fitted
anew.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from netsmith.cost.device import Device, Shape
from netsmith.cost.meter import Reference, cache_folder, quick, reference
from netsmith.errors import UserError

if TYPE_CHECKING:
    from torch import nn

COLUMNS = "key, milliseconds, spread, iterations, moment, versions"

Items = Mapping[str, tuple[Callable[[], "nn.Module"], Shape]]
"""Key -> how to make the layer, and its input (channels, height, width)."""


class MissingEntry(UserError, KeyError):
    """A latency that was never measured; it is not zero."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Entry:
    """One measured layer."""

    milliseconds: float
    spread: float
    """Half the 95 % interval, relative."""
    iterations: int
    when: float
    """Seconds since 1970."""
    versions: dict[str, str]
    """Of the runtime, by name."""


def entry_key(module: object, input_shape: Shape) -> str:
    """`repr(module) @ CxHxW`."""
    return f"{module!r} @ {'x'.join(map(str, input_shape))}"


class LatencyTable:
    """The SQLite file `latency.sqlite` in the cache folder, or any other; several processes may write at once.

    Every measurement is a row; the newest of a key counts.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "latency.sqlite"
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL,"
                " key TEXT NOT NULL, milliseconds REAL NOT NULL, spread REAL NOT NULL, iterations INTEGER NOT NULL,"
                " moment REAL NOT NULL, versions TEXT NOT NULL)"
            )
            database.execute("CREATE INDEX IF NOT EXISTS by_key ON entries (fingerprint, key)")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own each time (safe across forks and threads), committed at the end, rolled back on an
        error; another process at the file is waited for. UserError: the file is no such table, or cannot be written.

        SQLite's rollback journal, not its write-ahead log: turning the log on does not wait for others, and it does
        not work on network file systems."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"the latency table {self.path} cannot be used: {error}; delete it, or name another folder in "
                "NETSMITH_CACHE"
            ) from error

    def entries(self, fingerprint: str) -> dict[str, Entry]:
        """All that is known of a device, by key; the newest where a key was measured more than once."""
        query = f"SELECT {COLUMNS} FROM entries WHERE fingerprint = ? ORDER BY number"
        with self._open() as database:
            rows = database.execute(query, (fingerprint,)).fetchall()
        return {key: Entry(ms, spread, n, when, json.loads(text)) for key, ms, spread, n, when, text in rows}

    def get(self, fingerprint: str, keys: Iterable[str]) -> dict[str, float]:
        """Milliseconds by key. Errors: `MissingEntry` (a UserError and a KeyError) names the first key that was never
        measured."""
        known = self.entries(fingerprint)
        return {key: _found(known, key, fingerprint).milliseconds for key in keys}

    def missing(self, fingerprint: str, keys: Iterable[str]) -> list[str]:
        """The keys without an entry, each once."""
        known = self.entries(fingerprint)
        return [key for key in dict.fromkeys(keys) if key not in known]

    def put(self, fingerprint: str, entries: Mapping[str, Entry]) -> None:
        """Add rows, all or none."""
        rows = [
            (fingerprint, key, e.milliseconds, e.spread, e.iterations, e.when, json.dumps(e.versions))
            for key, e in entries.items()
        ]
        with self._open() as database:
            database.executemany(f"INSERT INTO entries (fingerprint, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def profile(
        self,
        device: Device,
        items: Items,
        progress: Callable[[int, int], None] | None = None,
        *,
        again: bool = False,
        group: int = 48,
        reference_kernel: Reference | None = None,
    ) -> float:
        """Measure what is missing (with `again` everything), `group` layers at a time in round-robin; return the
        milliseconds spent per entry measured (0 if none).

        Each group is committed when it is done, so the process may be killed at any moment and goes on where it was.
        `progress` gets (entries done, entries to do). Errors: what the device raises for a layer, with the layer's
        key.
        """
        fingerprint, versions = device.fingerprint(), device.versions()
        todo = list(items) if again else self.missing(fingerprint, items)
        kernel = reference_kernel or reference()
        started = time.perf_counter()
        for first in range(0, len(todo), group):
            loaded = {}
            for key in todo[first : first + group]:
                make, shape = items[key]
                try:
                    loaded[key] = device.load(make(), shape)
                except UserError as error:
                    raise UserError(f"cannot measure {key}: {error}") from error
            measured = quick(loaded, reference_kernel=kernel)
            now = time.time()
            self.put(
                fingerprint,
                {key: Entry(m.median_ms, m.spread, m.iterations, now, versions) for key, m in measured.items()},
            )
            if progress:
                progress(min(first + group, len(todo)), len(todo))
        return (time.perf_counter() - started) * 1e3 / len(todo) if todo else 0.0


def _found(known: Mapping[str, Entry], key: str, where: str) -> Entry:
    if key not in known:
        raise MissingEntry(f"no latency of {key} on {where}; profile the space on this device first")
    return known[key]


@dataclass(frozen=True)
class Calibration:
    """latency = constant + scale * (sum of entries) + per_layer * (layers) + per_weight * (weights), milliseconds.

    An entry is timed alone: it carries the cost of starting the runtime, which a network pays once (`per_layer` may be
    negative), and finds its weights in the innermost cache, which a network's layers do not (`per_weight`; without it
    the error on held-out networks at 32 px was 5.0 %, with it 2.3 %).

    >>> Calibration.fit([[1.0, 5, 2e5], [2.0, 9, 4e5]], measured=[0.8, 1.6]).predict([3.0, 12, 6e5])
    2.4
    """

    constant: float = 0.0
    scale: float = 1.0
    per_layer: float = 0.0
    per_weight: float = 0.0
    residuals: tuple[float, ...] = ()
    """Relative errors on the networks it was fitted on: predicted / measured - 1."""

    @classmethod
    def fit(
        cls, networks: Sequence[Sequence[float]], measured: Sequence[float], shortest: float | None = None
    ) -> Calibration:
        """Least squares of the *relative* error over whole networks; about fifteen are enough.

        networks: (sum of entries in milliseconds, number of layers, number of weights) of each; measured:
        milliseconds. No network: the identity. One or two different ones: the scale. Up to four: constant and scale. Up
        to seven: the weights too. ``shortest``: milliseconds of the shortest entry, and no layer saves more than that
        takes: among networks of nearly as many layers, one could be fitted by layers that cost less than none and a
        constant that pays for them. Errors: ValueError if lengths differ or a measured time is not positive.
        """
        if len(networks) != len(measured):
            raise ValueError(f"{len(networks)} networks and {len(measured)} measured times")
        if any(time_ms <= 0 for time_ms in measured):
            raise ValueError(f"measured times must be positive: {list(measured)}")
        if not measured:
            return cls()
        import numpy as np
        from scipy.optimize import nnls

        times = np.asarray(measured, float)
        columns = np.concatenate([np.ones((len(times), 1)), np.asarray(networks, float)], 1)
        different = len(set(map(tuple, networks)))  # branches that fold leave them all alike
        used = [[1], [0, 1], [0, 1, 3], [0, 1, 2, 3]][sum(different > most for most in (2, 4, 7))]
        least = shortest if 2 in used else None
        if least is not None:  # scale * (entries - shortest * layers), and no less than 0 a layer on top
            columns[:, 1] -= least * columns[:, 2]
        rows = columns[:, used] / times[:, None]
        size = np.linalg.norm(rows, axis=0)  # columns of one size: the solver's tolerances are absolute
        size[size == 0] = 1.0
        scaled = rows / size
        free = [i == 2 and least is None for i in used]  # per_layer may be negative
        weights, _ = nnls(np.concatenate([scaled, -scaled[:, free]], 1), np.ones(len(times)))
        solution = weights[: len(used)]
        if any(free):
            solution[used.index(2)] -= weights[-1]
        solution = solution / size
        constant, scale, per_layer, per_weight = (
            dict(zip(used, map(float, solution), strict=True)).get(i, 0.0) for i in range(4)
        )
        per_layer -= scale * (least or 0.0)
        return cls(constant, scale, per_layer, per_weight, tuple(map(float, rows @ solution - 1)))

    def predict(self, network: Sequence[float]) -> float:
        """Milliseconds of a network given as in `fit`."""
        raw, layers, weights = network
        return self.constant + self.scale * raw + self.per_layer * layers + self.per_weight * weights

    def errors(self) -> dict[str, float]:
        """Mean and largest absolute relative error on the networks it was fitted on (optimistic with few), and how
        many."""
        sizes = [abs(r) for r in self.residuals]
        return {
            "mean": sum(sizes) / len(sizes) if sizes else 0.0,
            "largest": max(sizes, default=0.0),
            "networks": float(len(sizes)),
        }


@dataclass(frozen=True)
class TableDevice:
    """A device known only by a table that others measured: it predicts, and runs nothing."""

    name: str
    table: Mapping[str, float]
    """Key -> milliseconds."""
    constant_ms: float = 0.0
    """What every network pays besides its entries (stem, head), where the table says so."""

    def versions(self) -> dict[str, str]:
        return {}

    def fingerprint(self) -> str:
        return f"table {self.name}"

    def load(self, model: nn.Module | Path, input_shape: Shape) -> Callable[[], object]:
        raise UserError(
            f"{self.name} is a table of latencies measured elsewhere: it can predict, but nothing runs on it"
        )

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Milliseconds by key. Errors: `MissingEntry` names the first key that is not in the table."""
        entries = {}
        for key in keys:
            if key not in self.table:
                raise MissingEntry(f"no latency of {key} in the table {self.name}")
            entries[key] = self.table[key]
        return entries
