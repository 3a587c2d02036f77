"""Time functions on a noisy machine so that the numbers repeat.

Everything that is timed goes round-robin, so a slow phase hits all alike. Between any two samples runs a small fixed
*reference kernel*; a sample counts only if the kernel was at its best on both sides of it. Sampling goes on until the
95 % interval of every value is narrow enough, or time is up. The clock of a CPU depends on what its other cores do:
values are scaled to the best the kernel is known to run on this machine, which a small file remembers from process to
process.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], float]
QUANTILE = 0.2


@dataclass(frozen=True)
class Measurement:
    """What one function takes with the machine at its best. Milliseconds per call."""

    median_ms: float
    """Median of the faster 40 % of the accepted samples (their 20th percentile). On a quiet machine it is within 1 %
    of the plain median; with other load it stays where it is, and the plain median does not (measured: 9 % apart,
    this 1.5 %)."""
    ci95: tuple[float, float]
    """95 % interval of that value, milliseconds; it covers the noise within one process, not the spread between
    processes."""
    minimum_ms: float
    """The fastest accepted sample."""
    iterations: int
    """Calls behind the value."""
    settled: bool
    """False: time ran out before the interval was narrow, or the machine was never at its best and the values were
    rescaled."""

    @property
    def spread(self) -> float:
        """Half the interval, relative to the value."""
        return (self.ci95[1] - self.ci95[0]) / 2 / self.median_ms if self.median_ms else 0.0


@dataclass
class Reference:
    """A fixed kernel of some 15 microseconds whose time tells whether the machine is at its best.

    `best` is the fastest it is known to run, in seconds; `memory` a file in which that outlives the process.
    """

    kernel: Callable[[], None]
    best: float = math.inf
    memory: Path | None = None
    lifetime: float = 30 * 24 * 3600.0
    """Seconds after which the file is forgotten, for machines change. Not shorter: values are scaled to this best, and
    minutes of 5 % lower clock were seen, so a new best shifts all that is measured later."""
    loose: float = 1.12
    """Processes differ by some per cent (where the buffers lie in memory): only a best this much slower than the
    known one is a slow phase."""
    _stamp: float = field(default=0.0, repr=False)

    def recall(self) -> None:
        """Take over the best of earlier processes, if the file is there, fresh, and of this CPU."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(self.memory.read_text()) if self.memory else {}
            if known.get("cpu") == cpu_name() and 0 <= time.time() - known["when"] < self.lifetime:
                self.best, self._stamp = min(self.best, float(known["seconds"])), known["when"]

    def remember(self, best: float) -> None:
        """Keep a best if it beats the known one (the file keeps its date otherwise, so that it can grow old)."""
        self.recall()  # another process may have found a better one meanwhile
        if best >= self.best:
            return
        self.best = best
        if self.memory:
            with suppress(OSError):  # a read-only home costs the memory, not the measurement
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                part = self.memory.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps({"cpu": cpu_name(), "seconds": best, "when": self._stamp or time.time()}))
                part.replace(self.memory)


def reference(remembered: bool = True) -> Reference:
    """Three products of 64x64 matrices: in the first-level cache, and too small for a BLAS to start threads."""
    pool = np.zeros(3 * 64 * 64 + 1024, np.float32)
    start = (
        -pool.ctypes.data % 4096 // 4
    )  # page-aligned: otherwise its time differs by some per cent from process to process
    a, b, out = (pool[start + i * 4096 : start + (i + 1) * 4096].reshape(64, 64) for i in range(3))
    a += np.random.default_rng(0).random((64, 64), np.float32)
    b += a.T

    def kernel() -> None:
        for _ in range(3):
            np.matmul(a, b, out=out)

    return Reference(kernel, memory=cache_folder() / "reference.json" if remembered else None)


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    minimum_seconds: float = 1.0,
    precision: float = 0.01,
    samples: int = 30,
    enough: float = math.inf,
    warmup_calls: int = 10,
    warmup_seconds: float = 0.2,
    sample_seconds: float = 2e-4,
    tolerance: float = 0.04,
    reference_kernel: Reference | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Measurement]:
    """Time every function; the name stays with it.

    `seconds` bounds the sampling of all functions together (warm-up comes on top, one round is always finished). It
    ends earlier, but not before `minimum_seconds`, once each function has `samples` accepted samples and the interval
    of each value is within +-`precision` of it, or it has `enough` samples. Whoever has what is asked sits out the next
    rounds, with `enough` finite. A function shorter than `sample_seconds` is called several times per
    sample. `tolerance`: how far above its best the reference kernel may be for a sample to count. Errors: what a
    function raises comes through.

    >>> measure({"a": session_a, "b": session_b})["a"].median_ms
    """
    if not functions:
        return {}
    ref = reference_kernel or reference()
    ref.recall()
    timed = list(functions.values())
    with _undisturbed():
        warm = [_warm(f, warmup_calls, warmup_seconds / len(timed), sample_seconds, clock) for f in timed]
        repeats = [count for count, _ in warm]
        # A sample that has to be longer averages as much by itself.
        wanted = [max(samples, enough * min(1.0, sample_seconds / fastest)) for _, fastest in warm]
        _warm(ref.kernel, warmup_calls, 0.01, 0.0, clock)
        times: list[list[tuple[float, float, float]]] = [[] for _ in timed]
        kernel: list[float] = []
        playing = range(len(timed))
        started, rounds, check = clock(), 0, samples
        while True:
            before = _mark(ref, clock)
            kernel.append(before)
            for i in playing:
                spent = _sample(timed[i], repeats[i], clock)
                after = _mark(ref, clock)
                times[i].append((spent, before, after))
                kernel.append(after)
                before = after
            rounds += 1
            elapsed = clock() - started
            if elapsed < seconds and (rounds < check or elapsed < minimum_seconds):
                continue
            results, best = _judge(times, np.array(kernel), repeats, samples, wanted, precision, tolerance, ref)
            if elapsed >= seconds or all(result.settled for result in results):
                break
            if enough < math.inf:  # who sat out may be back: the bar rises with the best that the kernel shows
                playing = [i for i, result in enumerate(results) if not result.settled]
            check = math.ceil(rounds * 1.2)  # judging sorts everything: do it rarely
    ref.remember(best)
    return dict(zip(functions, results, strict=True))


def quick(
    functions: Mapping[str, Callable[[], object]], *, samples: int = 12, **options: object
) -> dict[str, Measurement]:
    """`measure` for the many entries of a table: five accepted samples that agree within 2 %, or `samples` that do
    not. The time limit grows with the group.

    10 ms an entry of 30 us on a machine with as many jobs as cores; of larger ones ten times their own duration and
    more. (Twelve samples for all, whether they agree or not, took twice as long.)
    """
    defaults: dict[str, object] = {"samples": min(5, samples), "enough": samples, "precision": 0.02,
                                   "minimum_seconds": 0.0, "warmup_calls": 2, "warmup_seconds": 0.0,
                                   "seconds": 1.0 + 0.03 * len(functions)}  # fmt: skip
    return measure(functions, **(defaults | options))  # type: ignore[arg-type]


def _judge(
    times: list[list[tuple[float, float, float]]],
    kernel: NDArray[np.float64],
    repeats: list[int],
    samples: int,
    wanted: list[float],
    precision: float,
    tolerance: float,
    ref: Reference,
) -> tuple[list[Measurement], float]:
    """Per function its samples, each with the kernel's times before and after, seconds; all times of the kernel ->
    measurements, and the kernel's best here."""
    here = float(np.quantile(kernel, 0.02))  # not the minimum: one lucky run must not condemn all others
    best = min(here, ref.best)
    slow_phase = here > ref.loose * best
    floor, clocks = (best, 1.0) if slow_phase else (here, best / here)
    results = []
    for taken, count, enough in zip(times, repeats, wanted, strict=True):
        spent, before, after = np.array(taken).T
        values = np.sort(spent[np.maximum(before, after) <= floor * (1 + tolerance)]) * clocks
        accepted = len(values)
        if accepted < min(samples, 3):  # hardly ever at its best: say so, and give what the kernel's slowness leaves
            values = np.sort(spent * best / ((before + after) / 2))
        value = float(np.quantile(values, QUANTILE))
        low, high = quantile_interval(values, QUANTILE)
        settled = accepted >= enough or (accepted >= samples and (high - low) / 2 <= precision * value)
        results.append(
            Measurement(
                value * 1e3, (low * 1e3, high * 1e3), float(values[0]) * 1e3, len(values) * count, bool(settled)
            )
        )
    return results, here


def quantile_interval(values: NDArray[np.float64], q: float) -> tuple[float, float]:
    """95 % interval of a quantile from order statistics: ranks n q -+ 1.96 sqrt(n q (1-q)) of the *sorted* values; no
    distribution assumed."""
    n = len(values)
    half = 1.96 * math.sqrt(n * q * (1 - q))
    return float(values[max(0, math.floor(n * q - half))]), float(values[min(n - 1, math.ceil(n * q + half))])


def _sample(function: Callable[[], object], count: int, clock: Clock) -> float:
    """Seconds per call. First as many calls untimed: the value must not depend on what its neighbours in the round
    left in the caches."""
    for _ in range(count):
        function()
    start = clock()
    for _ in range(count):
        function()
    return (clock() - start) / count


def _mark(ref: Reference, clock: Clock) -> float:
    """Seconds of the reference kernel now: the better of two, after one untimed to refill the caches."""
    ref.kernel()
    start = clock()
    ref.kernel()
    middle = clock()
    ref.kernel()
    return min(middle - start, clock() - middle)


def _warm(
    function: Callable[[], object], calls: int, seconds: float, sample_seconds: float, clock: Clock
) -> tuple[int, float]:
    """Call until warm; how many calls make up one sample of `sample_seconds`, and the seconds of the fastest."""
    started, fastest, done = clock(), math.inf, 0
    while done < max(calls, 1) or clock() - started < seconds:
        start = clock()
        function()
        fastest = min(fastest, clock() - start)
        done += 1
    fastest = max(fastest, 1e-9)
    return max(1, min(1000, math.ceil(sample_seconds / fastest))), fastest


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile. (No pinning: on a shared machine it ties the thread to a core that others may
    use.)"""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def cpu_name() -> str:
    """The CPU as Linux names it, with family and model numbers (cloud machines shorten the name)."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    if "model name" not in facts:
        return f"{platform.processor() or platform.machine()} ({platform.system()})"
    return f"{facts['model name']} family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"


def cache_folder() -> Path:
    """Where what was measured is kept: $NETSMITH_CACHE, or the user's cache folder."""
    if os.environ.get("NETSMITH_CACHE"):
        return Path(os.environ["NETSMITH_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("netsmith"))
