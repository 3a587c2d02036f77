"""The learning rate as a function of the step: nothing to store, nothing to resume."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

SCHEDULES = ("cosine", "linear", "constant", "exponential", "polynomial", "step")


def factor(
    schedule: str,
    step: int,
    total: int,
    warmup: int,
    *,
    epoch: float = 1.0,
    rate: float = 0.97,
    every: float = 2.4,
    at: Sequence[float] = (),
    end: float = 0.0,
) -> float:
    """What the peak learning rate is multiplied with in step 0..total-1: up in a line over ``warmup`` steps, then down.

    cosine, linear, constant: from 1 to 0, or 1. The others are tensorflow/tpu's (`efficientnet/utils.py`,
    `resnet/resnet_main.py`), whose warm-up begins with 0. exponential: a staircase, times ``rate`` every ``every``
    epochs of ``epoch`` steps, counted from the first step; step: times ``rate`` at the epochs ``at``. polynomial:
    (1 - u)^2 from 1 to ``end``, u the part of the decay that is done.

    >>> [round(factor("cosine", step, 6, 2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    >>> [round(factor("polynomial", step, 6, 2, end=0.1), 3) for step in range(6)]
    [0.0, 0.5, 0.676, 0.676, 0.424, 0.244]
    >>> [round(factor("step", step, 6, 2, rate=0.1, at=(3, 5)), 3) for step in range(6)]
    [0.0, 0.5, 1.0, 0.1, 0.1, 0.01]
    """
    if schedule in ("exponential", "polynomial", "step"):
        if step < warmup:
            return step / warmup
        if schedule == "exponential":
            return rate ** math.floor(step / (every * epoch))
        if schedule == "step":
            return rate ** bisect_right(at, step / epoch)
        length = total - warmup + 1
        done = min(max(1, step - warmup), length) / length
        return (1 - end) * (1 - done) ** 2 + end
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0
