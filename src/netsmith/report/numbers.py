"""How the report writes numbers: three digits that matter and the unit a reader would choose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import Any

DASH = "–"
"""Stands where a number was not recorded."""

SHARES = ("accuracy", "top1", "top-1", "top5", "top-5", "map", "iou")
"""Metrics that are shares of one; shown in percent."""

_TIMES = ((1e3, "s"), (1.0, "ms"), (1e-3, "µs"), (1e-6, "ns"))
_COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def scale(value: float, unit: str) -> tuple[float, str]:
    """What to multiply numbers up to this one with, and the unit that gives.

    >>> scale(50_000, ""), scale(256_000, "B")
    ((0.001, 'k'), (0.001, 'kB'))
    """
    step, name = _step(value, _steps(unit))
    return 1 / step, name


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None: a run may have recorded null, NaN or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return float(value)


def significant(value: float, digits: int = 3) -> str:
    """The value in plain notation with that many significant digits; whole digits are never dropped.

    >>> significant(4.8312), significant(0.04831), significant(48312)
    ('4.83', '0.0483', '48312')
    """
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def _steps(unit: str) -> tuple[tuple[float, str], ...]:
    if unit == "ms":
        return _TIMES
    return _BYTES if unit.lower() in ("b", "byte", "bytes") else _COUNTS


def _step(value: float, steps: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit in which the value, once rounded to three digits, is at least 1."""
    rounded = float(f"{abs(value):.3g}")
    return next((step for step in steps if rounded >= step[0]), steps[-1] if value else (1.0, dict(steps)[1.0]))


def _scaled(value: Any, steps: tuple[tuple[float, str], ...]) -> str:
    exact = number(value)
    if exact is None:
        return DASH
    scale, unit = _step(exact, steps)
    if exact == 0 or (scale == 1 and steps is not _TIMES):  # there is no half parameter
        return f"{exact:.0f} {unit}".strip()
    return f"{significant(float(f'{exact:.3g}') / scale)} {unit}"


def milliseconds(value: Any) -> str:
    """
    >>> milliseconds(4.8312), milliseconds(0.0583), milliseconds(None)
    ('4.83 ms', '58.3 µs', '–')
    """
    return _scaled(value, _TIMES)


def count(value: Any) -> str:
    """
    >>> count(1_234_567), count(999_999), count(512)
    ('1.23 M', '1.00 M', '512')
    """
    return _scaled(value, _COUNTS)


def size(value: Any) -> str:
    """Bytes, in steps of 1000.

    >>> size(256_000), size(4_712_345)
    ('256 kB', '4.71 MB')
    """
    return _scaled(value, _BYTES)


def interval(low: Any, high: Any) -> str:
    """A latency interval in milliseconds, with as many digits as it takes to tell its ends apart.

    >>> interval(4.79, 4.88), interval(4.8301, 4.8309)
    ('4.79–4.88 ms', '4.830–4.831 ms')
    """
    bottom, top = number(low), number(high)
    if bottom is None or top is None:
        return ""
    scale, unit = _step(top, _TIMES)
    for digits in range(3, 7):
        ends = significant(bottom / scale, digits), significant(top / scale, digits)
        if ends[0] != ends[1]:
            break
    return f"{ends[0]}–{ends[1]} {unit}"


def duration(seconds: Any) -> str:
    """
    >>> duration(12.3), duration(192), duration(7260)
    ('12 s', '3 min 12 s', '2 h 1 min')
    """
    exact = number(seconds)
    if exact is None:
        return DASH
    if exact < 10:
        return f"{exact:.1f} s"
    minutes, rest = divmod(round(exact), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def is_share(name: str) -> bool:
    """Whether a metric of that name is a share of one."""
    return any(word in name.lower() for word in SHARES)


def quality(name: str, value: Any) -> str:
    """A metric's value: shares in percent, anything else (PSNR in dB, ...) with four digits.

    >>> quality("accuracy", 0.9722), quality("psnr", 33.1234)
    ('97.22 %', '33.12')
    """
    exact = number(value)
    if exact is None:
        return DASH
    return f"{100 * exact:.2f} %" if is_share(name) else significant(exact, 4)


def limit(value: Any, unit: str) -> str:
    """A limit as a person would write it.

    >>> limit(5.0, "ms"), limit(256_000, "bytes"), limit(2.5, "ms")
    ('5 ms', '256 kB', '2.5 ms')
    """
    return re.sub(r"\.0+(?= |$)|(\.\d*?[1-9])0+(?= |$)", r"\1", quantity(value, unit))


def quantity(value: Any, unit: str) -> str:
    """A budget's number in its unit ("ms", "bytes", "MACs", ...)."""
    steps = _steps(unit)
    text = _scaled(value, steps)
    return text if steps is not _COUNTS or text == DASH or unit in ("", "params", "parameters") else f"{text} {unit}"


def short(paths: Sequence[str]) -> list[str]:
    """Names without the leading and trailing parts that all of them share.

    >>> short(["body.r8.stage1_0.ir_k5.hidden", "body.r8.stage2_0.ir_k3.hidden"])
    ['stage1_0.ir_k5', 'stage2_0.ir_k3']
    """
    parts = [str(path).split(".") for path in paths]
    most = min(map(len, parts), default=1) - 1
    ahead = next((i for i in range(most) if len({p[i] for p in parts}) > 1), most) if len(parts) > 1 else 0
    most -= ahead
    behind = next((i for i in range(most) if len({p[-1 - i] for p in parts}) > 1), most) if len(parts) > 1 else 0
    return [".".join(p[ahead : len(p) - behind]) for p in parts]
