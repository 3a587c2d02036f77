"""Checkpoints of the published schedules [efficientnet-supercomputer.md, section 2]."""

from itertools import pairwise

import pytest

from netsmith.train.schedules import SCHEDULES, factor

IMAGES = 1_281_167


@pytest.mark.parametrize(
    ("batch", "peak", "epochs", "total", "warmup", "step", "rate"),
    [(65_536, 20.736, 43, 6_842, 840, 3_841, 5.26072), (32_768, 15.104, 50, 13_684, 1_954, 7_819, 3.85164)],
)
def test_polynomial_checkpoints(batch, peak, epochs, total, warmup, step, rate):
    assert int(epochs * IMAGES / batch) == warmup
    assert int(350 * IMAGES / batch) == total
    end = 0.1 / peak
    assert peak * factor("polynomial", step, total, warmup, end=end) == pytest.approx(rate, abs=5e-6)
    assert peak * factor("polynomial", total, total, warmup, end=end) == pytest.approx(0.1, abs=1e-5)
    assert factor("polynomial", 0, total, warmup, end=end) == 0
    before, at = (factor("polynomial", t, total, warmup, end=end) for t in (warmup - 1, warmup))
    assert abs(at - before) < 3 / warmup


def test_the_exponential_staircase_counts_from_the_first_step():
    epoch = IMAGES / 4096
    warmup = int(5 * epoch)
    for number in (3, 10, 100):
        step = int(2.4 * epoch * number) + 1
        assert factor("exponential", step, 10**6, warmup, epoch=epoch) == pytest.approx(0.97**number)
        assert factor("exponential", step - 2, 10**6, warmup, epoch=epoch) == pytest.approx(0.97 ** (number - 1))
    assert factor("exponential", warmup // 2, 10**6, warmup, epoch=epoch) == pytest.approx(0.5, abs=1 / warmup)


def test_a_relative_end_never_rises():
    rates = [factor("polynomial", t, 100, 10, end=0.005) for t in range(10, 100)]
    assert all(a >= b for a, b in pairwise(rates))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_stay_within_0_and_1(schedule):
    assert all(0 <= factor(schedule, t, 50, 5, epoch=10) <= 1 for t in range(50))
    first = (1 - 1 / 51) ** 2 if schedule == "polynomial" else 1.0  # which has done a step of 51 by then
    assert factor(schedule, 0, 50, 0, epoch=10) == pytest.approx(first)
