import gc
import json
import math
import time
from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest

from netsmith.cost.meter import Reference, measure, quantile_interval, quick, reference


class World:
    """A clock that only moves when something runs; `slow(time)`: how much longer things take at that moment."""

    def __init__(self, slow: Callable[[float], float] = lambda time: 1.0, noise: float = 0.0) -> None:
        self.time, self.slow, self.noise = 100.0, slow, noise
        self.random = np.random.default_rng(0)
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.time

    def work(self, name: str, seconds: float, first: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            extra = first if name not in self.calls else 0.0
            self.calls.append(name)
            self.time += seconds * self.slow(self.time) * (1 + self.noise * self.random.exponential()) + extra

        return run

    def reference(self) -> Reference:
        return Reference(self.work("reference", 20e-6))


@pytest.mark.parametrize("seconds", [3e-6, 150e-6, 4e-3])
def test_a_known_duration_is_found(seconds: float):
    world = World(noise=0.01)
    functions = {"f": world.work("f", seconds, first=5.0)}
    result = measure(functions, clock=world.clock, reference_kernel=world.reference())["f"]
    assert result.median_ms == pytest.approx(seconds * 1e3, rel=0.02)
    assert result.ci95[0] <= result.median_ms <= result.ci95[1]
    assert result.minimum_ms <= result.median_ms
    assert result.settled
    assert result.iterations >= 30


def test_slow_first_call_has_no_effect():
    world = World()
    functions = {"f": world.work("f", 1e-3, first=1.0)}
    result = measure(functions, clock=world.clock, reference_kernel=world.reference())["f"]
    assert result.ci95 == pytest.approx((1.0, 1.0))


def test_goes_round_robin_with_the_reference_between():
    world = World()
    names = ["a", "b", "c"]
    quick(
        {n: world.work(n, 1e-3) for n in names}, clock=world.clock, reference_kernel=world.reference(), warmup_calls=1
    )
    sampled = world.calls[world.calls.index("reference") :]
    order = [name for name, _ in groupby(sampled)]
    one_round = ["reference", "a", "reference", "b", "reference", "c"]
    assert order[:18] == one_round * 3


def test_a_slow_phase_is_rejected():
    world = World(slow=lambda time: 1.4 if time % 3 < 1.8 else 1.0, noise=0.01)
    functions = {"a": world.work("a", 1e-3), "b": world.work("b", 2e-3)}
    found = measure(functions, clock=world.clock, reference_kernel=world.reference(), minimum_seconds=3.5)
    assert found["a"].median_ms == pytest.approx(1.0, rel=0.02)
    assert found["b"].median_ms == pytest.approx(2.0, rel=0.02)
    assert all(m.settled for m in found.values())


def test_a_slow_phase_longer_than_the_measurement_is_rescaled_and_said():
    world = World(slow=lambda time: 1.4, noise=0.01)
    ref = world.reference()
    ref.best = 20e-6  # known from before
    started = world.time
    result = measure({"f": world.work("f", 1e-3)}, clock=world.clock, reference_kernel=ref, seconds=2.0)["f"]
    assert not result.settled
    assert result.median_ms == pytest.approx(1.0, rel=0.03)
    assert world.time - started < 3.0
    assert ref.best == 20e-6


def test_a_lower_clock_frequency_is_scaled_away():
    world = World(slow=lambda time: 1.05)
    ref = world.reference()
    ref.best = 20e-6
    result = measure({"f": world.work("f", 1e-3)}, clock=world.clock, reference_kernel=ref)["f"]
    assert result.settled
    assert result.median_ms == pytest.approx(1.0, rel=1e-6)


def test_time_limit_ends_a_noisy_measurement():
    world = World(noise=1.0)
    functions = {"f": world.work("f", 1e-3)}
    started = world.time
    result = measure(functions, clock=world.clock, reference_kernel=world.reference(), seconds=0.5, precision=1e-6)["f"]
    assert not result.settled
    assert world.time - started < 1.5


def test_errors_come_through_and_garbage_collection_comes_back():
    def broken() -> None:
        assert not gc.isenabled()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure({"f": broken}, reference_kernel=reference(remembered=False))
    assert gc.isenabled()
    assert measure({}) == {}


def test_quantile_interval_covers_the_true_quantile():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        values = np.sort(random.exponential(size=101))
        low, high = quantile_interval(values, 0.2)
        assert low <= np.quantile(values, 0.2) <= high
        hits += low <= -math.log(0.8) <= high
    assert 0.92 <= hits / 400 <= 0.99
    assert quantile_interval(np.array([1.0]), 0.2) == (1.0, 1.0)


def test_the_best_outlives_the_process_and_grows_old(tmp_path):
    file = tmp_path / "deep" / "reference.json"
    Reference(lambda: None, memory=file).remember(20e-6)
    again = Reference(lambda: None, memory=file)
    again.recall()
    assert again.best == 20e-6
    again.remember(30e-6)
    assert again.best == 20e-6
    old = Reference(lambda: None, memory=file, lifetime=-1.0)
    old.recall()
    assert old.best == math.inf
    elsewhere = json.dumps({"cpu": "another", "seconds": 1e-9, "when": time.time()})
    for text in ("not json", "[]", elsewhere):
        file.write_text(text)
        broken = Reference(lambda: None, memory=file)
        broken.recall()
        assert broken.best == math.inf


def test_a_worse_best_does_not_replace_another_processes_better_one(tmp_path):
    file = tmp_path / "reference.json"
    one, other = (Reference(lambda: None, memory=file) for _ in "12")
    one.remember(9.0e-6)
    other.remember(9.5e-6)
    third = Reference(lambda: None, memory=file)
    third.recall()
    assert third.best == other.best == 9.0e-6


def test_the_real_kernel_is_short(tmp_path, monkeypatch):
    monkeypatch.setenv("NETSMITH_CACHE", str(tmp_path))
    result = quick({"kernel": reference().kernel}, seconds=2.0)["kernel"]
    assert 0.001 < result.median_ms < 1.0


def test_quick_measures_on_only_where_samples_disagree():
    world = World()
    shaky = world.work("shaky", 1e-4)

    def uneven() -> None:
        shaky()
        world.time += 5e-5 * world.random.random()

    steady = world.work("steady", 1e-4)
    quick({"steady": steady, "shaky": uneven}, clock=world.clock, reference_kernel=world.reference())
    assert world.calls.count("steady") < 0.7 * world.calls.count("shaky")
