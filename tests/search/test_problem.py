"""The problem: prices, peak memory by brute force, and a preferred network that survives the knapsack."""

import functools
from collections import OrderedDict

import pytest
import torch
from planted import macro, problem_of, stripes
from torch import nn

from netsmith.architecture import check, enumerate_architectures
from netsmith.blocks.cells import Zero
from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv
from netsmith.cost.budget import Budget
from netsmith.cost.memory import PeakMemory
from netsmith.decisions import OneOf, Rule, Width
from netsmith.errors import UserError
from netsmith.search import problem as module
from netsmith.search.allocate import Infeasible
from netsmith.search.problem import prefer
from netsmith.search.sampling import at_budget, capacity, flat
from netsmith.spaces.nasbench201 import nasbench201
from netsmith.tasks.classification import TestSplitTouched


def tiny() -> nn.Module:
    """Two layers of six networks each."""

    def layer(channels: int) -> OneOf:
        return OneOf(
            {
                "ir": MBConv(channels, channels, hidden=Width((4, 16, 48))),
                "fused": FusedMBConv(channels, channels, hidden=Width((8, 24))),
                "skip": nn.Identity(),
            }
        )

    down = ConvBn(8, 12, 3, stride=2)
    parts = OrderedDict(stem=ConvBn(1, 8, 3), first=layer(8), down=down, second=layer(12), head=Head(12, 16, 3))
    return nn.Sequential(parts)


def test_a_problem_hides_the_test_split():
    problem = problem_of()
    with pytest.raises(TestSplitTouched):
        problem.task.split("test")


def test_structural_decisions_are_those_with_layers_inside():
    assert problem_of().structural == ["body"]
    assert problem_of(tiny).structural == []


def test_the_reference_is_the_dearest_network():
    problem = problem_of(tiny)
    assert problem.latency.of(problem.reference) == max(map(problem.latency.of, enumerate_architectures(tiny())))


def test_peak_memory_equals_brute_force():
    problem = problem_of(tiny)
    values = {
        path: {o: v + 0.01 * i for i, (o, v) in enumerate(row.items())} for path, row in capacity(problem).items()
    }
    networks = list(enumerate_architectures(tiny()))
    assert len(networks) == 36
    memory = [PeakMemory()(problem.plain(a), problem.input_shape) for a in networks]
    latency = [problem.latency.of(a) for a in networks]
    worth = [sum(values[path][option] for path, option in a.items()) for a in networks]
    tried = 0
    for limit in sorted(set(memory)):
        for share in (0.3, 0.6, 1.0):
            budgets = [Budget("latency", share * max(latency), "ms"), Budget("peak_memory", limit, "B")]
            fitting = [
                w for w, m, t in zip(worth, memory, latency, strict=True) if m <= limit and t <= budgets[0].limit
            ]
            if not fitting:
                continue
            found = problem.allocate(values, budgets)
            assert PeakMemory()(problem.plain(found), problem.input_shape) <= limit
            assert sum(values[path][option] for path, option in found.items()) == pytest.approx(max(fitting))
            tried += 1
    assert tried > 10


def test_too_little_memory_is_said_in_a_sentence():
    with pytest.raises(UserError, match=r"peak_memory <= 1 B: the smallest network found needs"):
        problem_of(tiny).allocate(capacity(problem_of(tiny)), [Budget("peak_memory", 1.0, "B")])


def test_a_scaled_limit_is_tighter():
    problem = problem_of(shares=(0.5,))
    (budget,) = problem.budgets[0]
    architecture = problem.allocate(capacity(problem), [budget], {"latency": 0.8})
    assert 0.7 * budget.limit < problem.latency.of(architecture) <= 0.8 * budget.limit


def test_a_budget_to_be_used_is_used_by_the_most_valuable_network_that_does():
    # Values that favour cheap options: alone they leave most of the budget unspent.
    problem = problem_of(tiny)
    values = {p: {o: -v for o, v in row.items()} for p, row in capacity(problem).items()}
    networks = list(enumerate_architectures(tiny()))
    latency = [problem.latency.of(a) for a in networks]
    macs = [problem.prices["macs"].of(a) for a in networks]
    worth = [sum(values[path][option] for path, option in a.items()) for a in networks]

    def found(budgets, least):
        architecture = problem.allocate(values, budgets, least=least)
        return sum(values[path][option] for path, option in architecture.items())

    tried = 0
    for share in (0.4, 0.5, 0.7, 0.9, 1.0):
        one = [Budget("latency", share * max(latency), "ms")]
        two = [*one, Budget("macs", 0.8 * max(macs), "")]
        for budgets in (one, two):
            costs = zip(latency, macs, strict=True)
            used = [max(c / b.limit for c, b in zip(cost, budgets, strict=False)) for cost in costs]
            for least in (0.5, 0.9, 0.95, 0.999):
                window = [w for w, u in zip(worth, used, strict=True) if least <= u <= 1]
                fitting = [w for w, u in zip(worth, used, strict=True) if u <= 1]
                assert found(budgets, least) == pytest.approx(max(window or fitting))
                tried += bool(window) and max(window) < max(fitting)
    assert tried > 10


def test_an_option_without_a_value_is_out():
    problem = problem_of()
    values = capacity(problem)
    del values["body"]["broad"]
    architecture = problem.allocate(values, problem.budgets[1])
    assert architecture["body"] == "slim"
    check(macro(), architecture)


def test_a_preferred_network_is_returned_where_it_fits():
    # Wherever slack is left it goes into wider widths; all blocks and structures stay.
    problem = problem_of(shares=(0.5,))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        wanted = at_budget(problem, problem.budgets[0], generator)
        values = prefer(flat(problem), wanted, 1.0)
        exactly = [Budget("latency", problem.latency.of(wanted), "ms")]
        found = problem.allocate(values, exactly)
        for path, option in wanted.items():
            if isinstance(option, int):
                assert found[path] >= option
            else:
                assert found[path] == option
        assert problem.latency.of(found) <= exactly[0].limit


def test_a_tightened_budget_shaves_widths_before_it_changes_blocks():
    problem = problem_of(shares=(0.6,))
    wanted = at_budget(problem, problem.budgets[0], torch.Generator().manual_seed(1))
    found = problem.allocate(prefer(flat(problem), wanted, 1.0), problem.budgets[0], {"latency": 0.93})
    assert found != wanted
    assert {p: o for p, o in found.items() if isinstance(o, str)} == {
        p: o for p, o in wanted.items() if isinstance(o, str)
    }
    assert any(found[path] < option for path, option in wanted.items() if isinstance(option, int))


def test_a_preference_within_its_weight_changes_nothing_else():
    values = {"a": {"x": 1.0, "y": 2.0}, "w": {8: 0.0, 16: 0.0, 24: 0.0}}
    preferred = prefer(values, {"a": "x", "w": 16}, 10.0)
    assert preferred == {"a": {"x": 11.0, "y": 2.0}, "w": {8: 5.0, 16: 10.0, 24: 10.0}}
    assert values["w"] == {8: 0.0, 16: 0.0, 24: 0.0}


def test_capacity_grows_with_macs_and_skip_is_worth_nothing():
    problem = problem_of(task=stripes(64))
    values, macs = capacity(problem), problem.prices["macs"].options
    for path, row in values.items():
        assert sorted(row, key=row.__getitem__) == sorted(row, key=macs[path].__getitem__)
        assert row.get("skip", 0.0) == 0.0


class Branches(nn.Module):
    """Four branches side by side, of which one or two run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(1, 8, 3)
        kinds = {"k1": 1, "k3": 3, "k5": 5}
        self.branches = nn.ModuleDict(
            {f"b{i}": OneOf({"none": Zero(), **{n: ConvBn(8, 8, k) for n, k in kinds.items()}}) for i in range(4)}
        )
        self.head = Head(8, 16, 3)
        self.rules = (Rule(tuple(f"branches.b{i}" for i in range(4)), "none", 1, 2),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(functools.reduce(torch.add, [branch(x) for branch in self.branches.values()]))


def test_allocations_and_the_reference_keep_the_rules():
    problem = problem_of(Branches)
    networks = list(enumerate_architectures(Branches()))
    latency = [problem.latency.of(a) for a in networks]
    assert len(networks) == 4 * 3 + 6 * 9
    assert problem.latency.of(problem.reference) == max(latency)
    generator = torch.Generator().manual_seed(0)
    values = {p: {o: float(torch.randn((), generator=generator)) for o in row} for p, row in capacity(problem).items()}
    for sign in (1, -1):
        signed = {path: {o: sign * v for o, v in row.items()} for path, row in values.items()}
        for share in (0.3, 0.6, 1.0):
            limit = share * max(latency)
            worth = [sum(signed[p][o] for p, o in a.items()) for a in networks]
            found = problem.allocate(signed, [Budget("latency", limit, "ms")])
            assert found in networks
            best = max(w for w, t in zip(worth, latency, strict=True) if t <= limit)
            assert sum(signed[p][o] for p, o in found.items()) == pytest.approx(best)
    assert at_budget(problem, problem.budgets[0], generator) in networks


def test_a_rule_counts_in_what_the_smallest_network_needs():
    problem = problem_of(Branches)
    smallest = min(problem.latency.of(a) for a in enumerate_architectures(Branches()))
    with pytest.raises(Infeasible) as caught:
        problem.allocate(capacity(problem), [Budget("latency", 0.99 * smallest, "ms")])
    assert caught.value.reachable[0][0] == pytest.approx(smallest)
    only = {path: {"k1": 0.0} for path in problem.outline.options}
    with pytest.raises(Infeasible, match=r"cannot keep the rule that 1 to 2 of branches.b0"):
        problem.allocate(only, [])


@pytest.mark.slow
def test_a_network_within_peak_memory_is_found_where_no_block_alone_is_too_large(monkeypatch):
    # In a cell the nodes that are alive together take the memory, so that thousands of dear networks are above it.
    problem = problem_of(functools.partial(nasbench201, 3, 1, 8, cells=1, width=4))
    memory = Budget("peak_memory", 0.6 * problem.predicted(Budget("peak_memory", 1.0, "B"), problem.reference), "B")
    monkeypatch.setattr(module, "CUTS", 3)
    monkeypatch.setattr(module, "CHANGES", 60)
    found = problem.allocate(capacity(problem), [memory])
    check(problem.outline, found)
    assert problem.predicted(memory, found) <= memory.limit
    least = Budget("peak_memory", 0.7 * memory.limit, "B")
    with pytest.raises(UserError, match=r"no network within budget: peak_memory <= 2\.15 kB was found"):
        problem.allocate(capacity(problem), [least])


def test_peak_memory_where_a_part_of_the_space_has_been_cut_off():
    problem = problem_of(shares=(0.2,))
    memory = Budget("peak_memory", 0.9 * problem.predicted(Budget("peak_memory", 1.0, "B"), problem.reference), "B")
    slim = {path: row for path, row in capacity(problem).items() if not path.startswith("body.broad.")}
    slim["body"] = {"slim": slim["body"]["slim"]}
    assert problem.allocate(slim, [*problem.budgets[0], memory])["body"] == "slim"
