"""The learning rate as a function of the step: nothing to store, nothing to resume."""

from __future__ import annotations

import math


def factor(schedule: str, step: int, total: int, warmup: int) -> float:
    """What the peak learning rate is multiplied with in step 0..total-1: up in a line over `warmup` steps, then down.

    >>> [round(factor("cosine", step, 6, 2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0
