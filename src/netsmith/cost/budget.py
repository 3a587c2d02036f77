"""What is asked for: "latency<=5ms", "params<=1M", "latency<=0.5x" (of the reference network), several at once.

A list of limits of one metric, "latency<=0.3x,0.5x,0.8x", asks for a front: one network per limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from netsmith.errors import UserError, unknown

TOLERANCE = 1e-9
"""Of a limit: what rounding in a sum of prices may exceed it by."""

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_TIMES = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}  # micro sign and Greek mu look the same
_SIZES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_SAME = ("us", "μs", "K", "KB")  # other spellings, understood but not written

# metric -> (its unit, what may be written behind the number and what that is worth in the unit, an example)
_METRICS: dict[str, tuple[str, dict[str, float], str]] = {
    "latency": ("ms", _TIMES, "latency<=5ms"),
    "params": ("", _COUNTS, "params<=1M"),
    "macs": ("", _COUNTS, "macs<=30M"),
    "peak_memory": ("B", _SIZES, "peak_memory<=256kB"),
    "ram": ("B", _SIZES, "ram<=256kB"),
    "flash": ("B", _SIZES, "flash<=256kB"),
    "file": ("B", _SIZES, "file<=1MB"),
    "branches": ("", _COUNTS, "branches<=44"),
    "bitops": ("", _COUNTS, "bitops<=20G"),
}
_PREFIXES = {
    "ms": ("ms", {"s": 1e3, "ms": 1.0, "µs": 1e-3, "ns": 1e-6}),
    "B": ("B", {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}),
}
_ALIASES = {"size": "file"}


@dataclass(frozen=True)
class Budget:
    """At most `limit` of a metric, in the unit of its cost ("ms", "B" for bytes, "" for counts) or, if relative, in
    shares of the reference network's. `str()` gives text that `parse` reads back to the same budget."""

    metric: str
    limit: float
    unit: str
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """One budget; UserError where the text is malformed or asks for several."""
        budgets = _parse(text)
        if len(budgets) > 1:
            raise UserError(f"budget {text!r} asks for {len(budgets)} networks where one is meant")
        return budgets[0]

    def absolute(self, reference: float) -> float:
        """The limit in the metric's unit, where the reference network's value is `reference` (same unit)."""
        return self.limit * reference if self.relative else self.limit

    def __str__(self) -> str:
        if self.relative:
            return f"{self.metric}<={_digits(self.limit)}x"
        suffix, scaled = _scaled(self.limit, self.unit)
        return f"{self.metric}<={scaled}{suffix}"


def within(cost: float, limit: float) -> bool:
    """Whether a cost keeps a limit, but for rounding."""
    return cost <= limit * (1 + TOLERANCE)


def parse_budgets(texts: Sequence[str]) -> list[list[Budget]]:
    """One list of simultaneous budgets per network asked for.

    Limits of one metric separated by commas make a front; lists of two metrics go side by side, so they need
    one length.

    >>> [[str(budget) for budget in point] for point in parse_budgets(["latency<=1ms,2ms", "params<=1M"])]
    [['latency<=1ms', 'params<=1M'], ['latency<=2ms', 'params<=1M']]

    UserError: malformed text, a metric named twice, lists of different lengths.
    """
    parsed = [_parse(text) for text in texts]
    for metric, same in groupby(sorted(budgets[0].metric for budgets in parsed)):
        if len(list(same)) > 1:
            raise UserError(f"budget {metric} is given more than once; a front is written {metric}<=A,B,C")
    fronts = {len(budgets): text for text, budgets in zip(texts, parsed, strict=True) if len(budgets) > 1}
    if len(fronts) > 1:
        given = " and ".join(f"{text!r} asks for {count}" for count, text in fronts.items())
        raise UserError(f"budgets of one front need lists of one length: {given} networks")
    points = next(iter(fronts), 1)
    return [[budgets[point if len(budgets) > 1 else 0] for budgets in parsed] for point in range(points)]


def show(value: float, unit: str) -> str:
    """A value with three digits and the prefix that fits: 0.0812 "ms" is "81.2 µs", 1234567 "" is "1.23M"."""
    base, steps = _PREFIXES.get(unit, ("", {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}))
    space = " " if base else ""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}{space}{base}"
    # 0.9995: what would round up to a thousand takes the next prefix, so 999.9 kB reads 1.00 MB.
    suffix = next((suffix for suffix, worth in steps.items() if abs(value) >= 0.9995 * worth), [*steps][-1])
    scaled = value / steps[suffix]
    size = abs(scaled)
    whole = suffix in ("", "B") and scaled == round(scaled)  # counts and bytes below a thousand
    digits = 0 if whole or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{scaled:.{digits}f}{space}{suffix}"


def _parse(text: str) -> list[Budget]:
    """The budgets in one text: one, or several where limits are separated by commas."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|==|=|<|>|≤)\s*(.*?)\s*", text)
    if not match:
        raise UserError(f"budget {text!r} is no metric<=limit, such as latency<=5ms or params<=1M")
    name, operator, limits = match.groups()
    metric = _ALIASES.get(name, name)
    if metric not in _METRICS:
        raise unknown("budget metric", name, [*_METRICS, *_ALIASES])
    example = _METRICS[metric][2]
    if operator != "<=":
        raise UserError(f"budget {text!r}: only <= can be asked for, such as {example}")
    budgets = [_limit(text, metric, limit.strip()) for limit in limits.split(",")]
    if len(set(budgets)) < len(budgets):
        raise UserError(f"budget {text!r} names one limit twice")
    return budgets


def _limit(text: str, metric: str, limit: str) -> Budget:
    unit, suffixes, example = _METRICS[metric]
    match = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)(?:inity)?)\s*(\D*)", limit)
    if not match:
        raise UserError(f"budget {text!r}: {limit!r} is no number with a unit, such as {example}")
    number, suffix = float(match[1]), match[2]
    value = number * suffixes.get(suffix, 1.0)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"budget {text!r}: the limit {match[1]} is not above zero and finite, as in {example}")
    relative = suffix == "x"
    if not relative and suffix not in suffixes:
        allowed = ", ".join(name for name in [*suffixes, "x"] if name and name not in _SAME)
        wrong = f"takes no unit {suffix!r}" if suffix else "needs a unit"
        raise UserError(f"budget {text!r}: {metric} {wrong} (allowed: {allowed}), such as {example}")
    return Budget(metric, value, unit, relative)


def _scaled(value: float, unit: str) -> tuple[str, str]:
    """The suffix, and the number before it, that read back to `value` exactly, in the fewest characters."""
    suffixes = next(table for own, table, _ in _METRICS.values() if own == unit)
    texts = []
    for suffix, worth in suffixes.items():
        number = _digits(value / worth)
        if suffix not in _SAME and float(number) * worth == value:
            texts.append((suffix, number))
    whole = min(len(number) for _, number in texts)
    return next((suffix, number) for suffix, number in texts if len(number) == whole)


def _digits(number: float) -> str:
    """The shortest decimal that reads back to the number, without a trailing ".0"."""
    return repr(float(number)).removesuffix(".0")
