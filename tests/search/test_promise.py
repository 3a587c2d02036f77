"""The promise loop keeps what it promises on devices that are not what the table says."""

import random
from collections import OrderedDict

import pytest
import torch
from planted import FakeDevice, macro, new_run, problem_of
from torch import nn

from netsmith.architecture import check
from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.cost.budget import Budget
from netsmith.decisions import OneOf
from netsmith.errors import PromiseBroken
from netsmith.run import read_events
from netsmith.search import promise
from netsmith.search.allocate import Infeasible, Unsolved
from netsmith.search.problem import Problem, prefer
from netsmith.search.promise import keep, with_shifts
from netsmith.search.sampling import at_budget, capacity, flat


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep a budget on a fake device: `kept(share, time)`."""

    def run_it(share: float, time, name: str = "x", budget: Budget | None = None):
        problem = problem_of(shares=(share,))
        budgets = [budget] if budget else problem.budgets[0]
        device = FakeDevice(problem, time)
        monkeypatch.setattr(promise, "export_untrained", device.export)
        with new_run(tmp_path / "run") as run:
            found = keep(problem, run, name, capacity(problem), budgets, device.time_file if time else None)
        check(macro(), found.architecture)
        return found, budgets[0].limit, device

    return run_it


SHARES = [0.2, 0.35, 0.5, 0.7, 0.9]


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1], ids=["faster", "as predicted", "slower"])
@pytest.mark.parametrize("share", SHARES)
def test_a_device_that_is_not_what_the_table_says(kept, share, factor):
    found, limit, device = kept(share, lambda predicted, _: factor * predicted)
    assert 0.95 * limit <= found.measured["latency"] <= limit
    assert found.measured["latency"] == pytest.approx(factor * found.predicted["latency"])
    assert found.rounds == (1 if factor == 1.0 else 2)
    assert found.rounds <= device.timed <= 2 * found.rounds  # what is close to its limit is timed twice


@pytest.mark.parametrize("share", SHARES)
def test_a_constant_that_the_table_does_not_know(kept, share):
    found, limit, _ = kept(share, lambda predicted, _: predicted + 0.01)
    assert 0.95 * limit <= found.measured["latency"] <= limit
    assert found.rounds <= 3


@pytest.mark.parametrize("share", SHARES[:3])
def test_a_constant_that_the_table_has_and_the_device_has_not(kept, share):
    """As a bad calibration had it: the first network lands at 70 % of the limit, corrected in proportion the next is
    over it, and so on; between the two lies the answer."""
    too_much = 0.3 * problem_of(shares=(share,)).budgets[0][0].limit
    found, limit, _ = kept(share, lambda predicted, _: predicted - too_much)
    assert 0.95 * limit <= found.measured["latency"] <= limit
    assert found.rounds <= 4


def test_a_noisy_meter(kept):
    shares, landed, rounds = [0.15 + 0.04 * i for i in range(20)], [], []
    noise = random.Random(0)
    for i, share in enumerate(shares):
        found, limit, _ = kept(share, lambda predicted, _: predicted * noise.gauss(1.02, 0.01), f"x{i}")
        landed.append(found.measured["latency"] / limit)
        rounds.append(found.rounds)
    assert all(share <= 1 for share in landed)
    assert 0.95 <= sorted(landed)[10] <= 1
    assert max(rounds) <= 4
    assert sorted(rounds)[10] <= 2


def test_a_device_that_cannot_be_kept(kept, tmp_path):
    with pytest.raises(PromiseBroken, match=r"no exported network kept its budget in \d rounds: latency.*was measured"):
        kept(0.4, lambda predicted, number: 10.0 + number)
    assert all(not event["kept"] for event in read_events(tmp_path / "run"))


def test_a_device_far_slower_than_the_smallest_network_allows(kept):
    # Corrected, nothing fits any more: what was measured is said, not what a corrected limit would have needed.
    with pytest.raises(PromiseBroken, match="in 1 rounds"):
        kept(0.2, lambda predicted, _: 50 * predicted)


def test_the_best_kept_network_stays_when_a_later_round_breaks(kept):
    # Round 1 lands at 90 %; every further one, larger, breaks the budget.
    found, limit, device = kept(0.5, lambda predicted, number: predicted * (0.9 if number == 1 else 1.3))
    assert found.measured["latency"] <= limit
    assert device.timed >= found.rounds > 1


def test_a_landing_too_close_to_the_limit_is_looked_past(kept):
    # 0.98 is aimed at, 0.99 to 1.00 measured: kept here, and perhaps over in another process.
    found, limit, _ = kept(0.5, lambda predicted, number: predicted * (1.015 if number <= 2 else 1.0))
    assert found.rounds == 2
    assert found.measured["latency"] < 0.985 * limit


def test_a_landing_close_to_the_limit_is_taken_where_nothing_safer_is_found(kept):
    found, limit, _ = kept(0.5, lambda predicted, number: predicted * (1.015 if number <= 2 else 50))
    assert 0.985 * limit < found.measured["latency"] <= limit


def test_a_time_close_to_its_limit_is_taken_twice_and_the_slower_counts(kept):
    found, _, device = kept(0.5, lambda predicted, number: predicted * (1.0 if number == 1 else 1.004))
    assert device.timed == 2
    assert found.measured["latency"] == pytest.approx(1.004 * found.predicted["latency"])


def test_three_rounds_are_enough_for_a_network_that_uses_nine_tenths(kept):
    # Whatever is asked of the table, the device runs it at 0.92 of the limit: no correction leads any further.
    limit = problem_of(shares=(0.5,)).budgets[0][0].limit
    found, _, _ = kept(0.5, lambda predicted, number: (0.92 + 0.001 * number) * limit)
    assert found.rounds == 3
    found, _, _ = kept(0.5, lambda predicted, number: (0.8 + 0.001 * number) * limit, "far")
    assert found.rounds > 3


def test_the_size_of_the_file_is_measured(kept, tmp_path):
    found, _, _ = kept(0.5, None, budget=Budget("file", 100_000, "B"))
    size = (tmp_path / "run" / "untrained.onnx").stat().st_size
    assert found.measured["file"] == size != found.predicted["file"]


def test_an_untrained_network_has_the_shifts_that_a_trained_one_has():
    network = with_shifts(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert (network[1].bias != 0).all()


def test_what_was_kept_survives_a_solver_that_runs_out_of_time(kept, monkeypatch):
    allocate, calls = Problem.allocate, []

    def late(self, *args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise Unsolved("out of time")
        return allocate(self, *args, **options)

    monkeypatch.setattr(Problem, "allocate", late)
    found, limit, _ = kept(0.5, lambda predicted, _: 0.8 * predicted)
    assert found.measured["latency"] < 0.9 * limit
    assert found.rounds == 1


def test_a_limit_met_to_the_last_digit_is_kept(kept):
    problem = problem_of()
    exact = problem.latency.of(problem.reference)
    found, limit, _ = kept(1.0, None, budget=Budget("latency", exact * (1 - 1e-15), "ms"))
    assert limit < found.measured["latency"] == exact


def test_a_budget_just_above_the_smallest_network(kept):
    # The aim leaves 1.5 % for the meter; where that is too little room for any network, the limit itself counts.
    problem = problem_of()
    smallest = problem.allocate(
        {path: {o: -price for o, price in row.items()} for path, row in problem.latency.options.items()},
        [Budget("latency", 1e9, "ms")],
    )
    floor = problem.latency.of(smallest)
    found, _, _ = kept(1.0, lambda predicted, _: predicted, budget=Budget("latency", 1.001 * floor, "ms"))
    assert found.architecture == smallest
    with pytest.raises(Infeasible, match="the smallest network needs"):
        kept(1.0, lambda predicted, _: predicted, "y", Budget("latency", 0.99 * floor, "ms"))


def blocks_only() -> nn.Module:
    layers = {f"layer{i}": OneOf({f"e{e}": MBConv(8, 8, hidden=8 * e) for e in (1, 2, 3, 4, 6)}) for i in range(4)}
    return nn.Sequential(OrderedDict(stem=ConvBn(1, 8, 3), **layers, head=Head(8, 16, 3)))


@pytest.mark.parametrize(("share", "factor", "least"), [(0.6, 1.0, 0.0), (0.97, 0.7, 0.9)])
def test_in_a_space_without_widths(share, factor, least, tmp_path, monkeypatch):
    """A network well below its limit is what the method wanted, and stays; one that is there only because the table is
    too high makes room for a larger one."""
    problem = problem_of(blocks_only, shares=(0.5,))
    (budget,) = problem.budgets[0]
    below = [Budget("latency", share / 0.97 * budget.limit, "ms")]
    wanted = at_budget(problem, below, torch.Generator().manual_seed(0))
    device = FakeDevice(problem, lambda predicted, _: factor * predicted)
    monkeypatch.setattr(promise, "export_untrained", device.export)
    with new_run(tmp_path / "run") as run:
        found = keep(problem, run, "x", prefer(flat(problem), wanted, 1e3), [budget], device.time_file)
    assert least * budget.limit <= found.measured["latency"] <= budget.limit
    assert (found.architecture == wanted) == (factor == 1.0)


def test_a_table_only_predicts_and_needs_one_round(kept):
    found, limit, device = kept(0.5, None)
    assert device.timed == 0
    assert found.rounds == 1
    assert found.measured == found.predicted
    assert 0.97 * limit <= found.measured["latency"] <= limit


def test_every_budget_is_measured_and_kept(tmp_path, monkeypatch):
    problem = problem_of(shares=(0.5,))
    (latency,), sizes = problem.budgets[0], problem.prices["file"]
    file = Budget("file", sizes.of(problem.allocate(capacity(problem), [latency])), "B")

    def export(problem, architecture, path):  # a fifth larger than predicted
        path.write_bytes(bytes(int(1.2 * sizes.of(architecture))))
        return nn.Identity(), path

    monkeypatch.setattr(promise, "export_untrained", export)
    with new_run(tmp_path / "run") as run:
        found = keep(problem, run, "x", capacity(problem), [latency, file], lambda *_: 0.96 * latency.limit)
    assert 0.9 * file.limit < found.measured["file"] <= file.limit


def test_a_kept_promise_is_not_measured_again(kept):
    first, _, _ = kept(0.5, lambda predicted, _: 1.1 * predicted)
    again, _, device = kept(0.5, lambda predicted, _: 1.1 * predicted)
    assert again == first
    assert device.timed == 0


def test_a_round_that_was_measured_before_a_kill_is_not_measured_again(kept):
    def killed(predicted: float, number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return 1.1 * predicted

    with pytest.raises(KeyboardInterrupt):
        kept(0.5, killed)
    resumed, _, device = kept(0.5, lambda predicted, _: 1.1 * predicted)
    undisturbed, _, other = kept(0.5, lambda predicted, _: 1.1 * predicted, name="undisturbed")
    assert resumed == undisturbed
    assert device.timed == other.timed - 1


def test_every_round_is_an_event(kept, tmp_path):
    found, limit, _ = kept(0.5, lambda predicted, _: 1.1 * predicted)
    events = [event for event in read_events(tmp_path / "run") if event["kind"] == "promise_round"]
    assert [event["round"] for event in events] == [1, 2]
    assert [event["kept"] for event in events] == [False, True]
    assert events[-1]["measured"] == found.measured["latency"]
    assert all(event["limit"] == limit for event in events)
