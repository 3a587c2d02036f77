"""The learning rate as a function of the step: nothing to store, nothing to resume."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant", "exponential", "polynomial")


def factor(
    schedule: str,
    step: int,
    total: int,
    warmup: int,
    *,
    epoch: float = 1.0,
    decay: tuple[float, float] = (0.97, 2.4),
    end: float = 0.0,
) -> float:
    """What the peak learning rate is multiplied with in step 0..total-1: up in a line over ``warmup`` steps, then down.

    cosine, linear, constant: from 1 to 0, or 1. The other two are tensorflow/tpu's (`efficientnet/utils.py`), whose
    warm-up begins with 0. exponential: a staircase, times ``decay[0]`` every ``decay[1]`` epochs of ``epoch`` steps,
    counted from the first step. polynomial: (1 - u)^2 from 1 to ``end``, u the part of the decay that is done.

    >>> [round(factor("cosine", step, 6, 2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    >>> [round(factor("polynomial", step, 6, 2, end=0.1), 3) for step in range(6)]
    [0.0, 0.5, 0.676, 0.676, 0.424, 0.244]
    """
    if schedule in ("exponential", "polynomial"):
        if step < warmup:
            return step / warmup
        if schedule == "exponential":
            return decay[0] ** math.floor(step / (decay[1] * epoch))
        length = total - warmup + 1
        done = min(max(1, step - warmup), length) / length
        return (1 - end) * (1 - done) ** 2 + end
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0
