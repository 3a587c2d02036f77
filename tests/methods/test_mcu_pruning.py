"""MCU pruning, exactly: what a budget limits at real widths and its gradient, DSA's masks, one move, and what ships."""

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planted import narrowable, new_run, opened, problem_of, search, stripes
from torch import nn
from torch.func import functional_call

from netsmith.blocks.mobile import ConvBn, Head
from netsmith.cost.budget import Budget
from netsmith.cost.counts import Flash, Macs, Params
from netsmith.cost.memory import PeakMemory, Ram
from netsmith.decisions import derive
from netsmith.methods.mcu_pruning import MCUPruning, Pruning, derivative, excess, moved, soft_mask
from netsmith.run import read_events
from netsmith.search.allocate import Infeasible
from netsmith.search.masked import hat, used
from netsmith.search.problem import taught
from netsmith.ship.weights import tensors

COSTS = {"params": Params(), "macs": Macs(), "flash": Flash(), "ram": Ram(), "peak_memory": PeakMemory()}


def limited(*shares: tuple[str, float]):
    """The planted problem under shares of what its whole network takes."""
    problem = problem_of(narrowable, [1.0], task=stripes(64))
    whole = {metric: problem.predicted(Budget(metric, 1.0, ""), problem.reference) for metric, _ in shares}
    problem.budgets = [[Budget(metric, share * whole[metric], "") for metric, share in shares]]
    return problem


@pytest.fixture
def training(tmp_path):
    """Makes a training that has not begun."""
    with ExitStack() as stack:

        def made(problem, **options):
            run = stack.enter_context(new_run(tmp_path / "run"))
            return Pruning(MCUPruning(batch_size=16, **options), problem, run)

        yield made


def real(architecture, by=0.0):
    return {p: torch.tensor(n + by, dtype=torch.float64, requires_grad=True) for p, n in architecture.items()}


# Resources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", COSTS)
def test_at_the_options_it_is_the_cost_of_the_slimmed_network(metric):
    problem = limited((metric, 0.5))
    generator = torch.Generator().manual_seed(0)
    options = problem.outline.options
    for _ in range(8):
        chosen = {p: row[int(torch.randint(len(row), (1,), generator=generator))] for p, row in options.items()}
        found = used(problem, problem.budgets[0][0], real(chosen))
        assert found.item() == pytest.approx(COSTS[metric](problem.plain(chosen), problem.input_shape))


@pytest.mark.parametrize("metric", COSTS)
def test_gradients_are_those_of_finite_differences_and_never_negative(metric):
    problem = limited((metric, 0.5))
    (budget,) = problem.budgets[0]
    middle = {p: (row[0] + row[1]) / 2 + 0.1 for p, row in problem.outline.options.items()}
    s = real(middle)
    used(problem, budget, s).backward()
    for path, width in s.items():
        ends = [used(problem, budget, real({**middle, path: middle[path] + by})).item() for by in (-1e-4, 1e-4)]
        slope = 0.0 if width.grad is None else width.grad.item()
        assert slope == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-6, abs=1e-6)
        assert slope >= 0
    assert any(width.grad is not None and width.grad > 0 for width in s.values())


def test_shares_of_a_number_among_options():
    assert hat([4, 8, 16], torch.tensor(8.0)).tolist() == [0, 1, 0]
    assert hat([4, 8, 16], torch.tensor(10.0)).tolist() == [0, 0.75, 0.25]
    assert hat([4, 8, 16], torch.tensor(16.0)).tolist() == [0, 0, 1]
    assert hat([4], torch.tensor(4.0)).tolist() == [1]


def test_no_excess_and_no_gradient_where_all_budgets_are_kept():
    problem = limited(("params", 0.5), ("ram", 0.9))
    budgets = problem.budgets[0]
    s = real({p: row[0] for p, row in problem.outline.options.items()})
    found = excess({b.metric: used(problem, b, s) for b in budgets}, budgets)
    found.backward()
    assert found.item() == 0
    assert all(width.grad is None or width.grad.item() == 0 for width in s.values())
    whole = real(problem.reference)
    assert excess({b.metric: used(problem, b, whole) for b in budgets}, budgets).item() == pytest.approx(1 + 1 / 9)


# One move -------------------------------------------------------------------------------------------------------------


def test_a_move_by_hand():
    sizes = {"a": (2, 10), "b": (2, 20), "c": (2, 10)}
    widths = {"a": 10.0, "b": 20.0, "c": 3.0}
    found = moved(widths, sizes, {"a": 1.0, "b": 0.0, "c": 2.0}, {"a": 4.0, "b": 1.0, "c": 1.0}, 0.1, 0.3)
    # relief over its mean of 1: 1, 0, 2; losses over theirs of 2: 2, 0.5, 0.5
    assert found["a"] == pytest.approx(10 + 0.1 * 10 * (0.3 * 2 - 1))
    assert found["b"] == 20, "not above what the group has"
    assert found["c"] == pytest.approx(2.0), "by a tenth at most, and not below the fewest"
    still = moved(widths, sizes, dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0.0), 0.1, 0.3)
    assert still == widths


def test_limits_fall_along_a_cubic(training):
    problem = limited(("params", 0.25))
    (budget,), pruning = problem.budgets[0], training(problem)
    whole = 4 * budget.limit
    assert pruning.limits(0.0)[0].limit == pytest.approx(whole)
    assert pruning.limits(0.5)[0].limit == pytest.approx(budget.limit + 0.125 * (whole - budget.limit))
    assert pruning.limits(1.0)[0].limit == pytest.approx(budget.limit)


def test_what_a_channel_is_worth_is_the_derivative_in_a_factor_on_it(training):
    problem = limited(("params", 0.5))
    images, labels = next(iter(problem.task.batches("train", 16, train=False)))
    pruning = training(problem, memory=0.0)
    space, (path, group) = pruning.space.eval(), next(iter(pruning.space.groups.items()))
    loss = nn.functional.cross_entropy(functional_call(space.network, pruning.tensors(), (images,)), labels)
    loss.backward()
    pruning.learn()
    factors = {p: torch.ones(g.size, requires_grad=p == path) for p, g in space.groups.items()}
    again = functional_call(space.network, space.read(factors), (images,))
    nn.functional.cross_entropy(again, labels).backward()
    assert group.size > 1
    assert torch.allclose(pruning.gathered[path], factors[path].grad.abs(), atol=1e-6)


# DSA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardness", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_soft_masks_have_the_mean_that_was_asked_for(share, hardness):
    worth = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    mask = soft_mask(worth, share, hardness)
    assert mask.mean().item() == pytest.approx(share, abs=1e-6)
    assert torch.equal(mask.argsort(), worth.argsort())
    assert derivative(mask).sum().item() == pytest.approx(40)
    ends = [soft_mask(worth, share + by, hardness) for by in (-1e-5, 1e-5)]
    assert torch.allclose(derivative(mask), (ends[1] - ends[0]) / 2e-5, rtol=1e-3, atol=1e-4)


def test_harder_masks_are_nearer_to_all_or_nothing():
    worth = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    between = [(p * (1 - p)).sum().item() for p in (soft_mask(worth, 0.5, hardness) for hardness in (1, 2, 4, 16, 64))]
    assert between == sorted(between, reverse=True)
    assert torch.equal(soft_mask(worth, 1.0, 4.0), torch.ones_like(worth))
    assert soft_mask(torch.zeros(4), 0.5, 4.0).tolist() == pytest.approx([0.5] * 4), "nothing is known yet"


def test_the_loss_through_soft_masks_moves_widths_by_its_own_derivative(training):
    problem = limited(("params", 0.5))
    images, labels = next(iter(problem.task.batches("train", 16, train=False)))
    pruning = training(problem, loss="dsa")
    generator = torch.Generator().manual_seed(0)
    pruning.gathered = {p: torch.rand(len(m), generator=generator) for p, m in pruning.masks.items()}
    pruning.move(0.5)
    network, path = pruning.space.eval().network, next(iter(pruning.masks))

    def loss(by: float):
        masks = {p: m.detach() for p, m in pruning.masks.items()}
        size, hardness = len(masks[path]), math.sqrt(1.0 * 16.0)
        share = (pruning.widths[path] + by) / size
        masks[path] = soft_mask(pruning.gathered[path], share, hardness)
        return nn.functional.cross_entropy(functional_call(network, pruning.space.read(masks), (images,)), labels)

    before = dict(pruning.gathered)
    nn.functional.cross_entropy(functional_call(network, pruning.tensors(), (images,)), labels).backward()
    pruning.learn()
    after, pruning.gathered = pruning.gathered, before
    assert after[path].shape == before[path].shape
    slope = (loss(0.05) - loss(-0.05)).item() / 0.1
    assert -pruning.slopes[path] == pytest.approx(slope, rel=0.05, abs=1e-4)


# The training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["importance", "dsa"])
def test_what_is_found_keeps_all_budgets_as_integers_and_ships_as_it_ran(loss, tmp_path):
    problem = limited(("flash", 0.5), ("ram", 0.8), ("macs", 0.6))
    method = MCUPruning(epochs=5, batch_size=16, loss=loss)
    with new_run(tmp_path / "run") as run:
        pruning = Pruning(method, problem, run)
        pruning.train()
        for budget in problem.budgets[0]:
            cost = COSTS[budget.metric](problem.plain(pruning.architecture), problem.input_shape)
            assert cost <= budget.limit * (1 + 1e-9)
        images = torch.rand(4, 1, 8, 8)
        with torch.no_grad():
            masked = functional_call(pruning.space.eval().network, pruning.tensors(), (images,))
            other = problem.build()
            other.load_state_dict(tensors(run.path / taught("mcu_pruning", 0)))
            assert torch.allclose(derive(other, pruning.architecture).eval()(images), masked, atol=1e-5)
    moves = [event for event in read_events(tmp_path / "run") if event["kind"] == "mcu_pruning_move"]
    assert len(moves) > 3
    assert moves[-1]["settled"]
    assert all(a["limits"]["flash"] >= b["limits"]["flash"] for a, b in pairwise(moves[:-1]))


def tower(channels: int = 16) -> nn.Module:
    """Large maps first, many weights last."""
    layers = [ConvBn(1, channels, 3), ConvBn(channels, channels, 3), ConvBn(channels, channels, 3, stride=2)]
    layers += [ConvBn(channels, 2 * channels, 3, stride=2), ConvBn(2 * channels, 2 * channels, 3)]
    return opened(nn.Sequential(*layers, Head(2 * channels, 16, 3)))


@pytest.mark.parametrize(("metric", "early"), [("ram", True), ("flash", False)])
def test_memory_narrows_the_early_layers_and_size_the_late_ones(metric, early, tmp_path):
    problem = problem_of(tower, [1.0], task=stripes(64))
    whole = problem.predicted(Budget(metric, 1.0, ""), problem.reference)
    problem.budgets = [[Budget(metric, 0.6 * whole, "")]]
    found = search("mcu_pruning", tmp_path / "run", problem=problem, epochs=4).architectures[0]
    left = [found[path] / problem.reference[path] for path in ("0/conv", "1/conv", "3/conv", "4/conv")]
    first, last = sum(left[:2]) / 2, sum(left[2:]) / 2
    assert first < last if early else last < first, left


def test_other_budgets_are_left_alone_where_they_are_not_asked_for(tmp_path):
    problem = problem_of(tower, [1.0], task=stripes(64))
    costs = {m: problem.predicted(Budget(m, 1.0, ""), problem.reference) for m in ("ram", "flash")}
    problem.budgets = [[Budget("ram", 0.6 * costs["ram"], "")]]
    found = search("mcu_pruning", tmp_path / "run", problem=problem, epochs=4).architectures[0]
    assert problem.predicted(Budget("flash", 1.0, ""), found) > 0.6 * costs["flash"]


def test_a_budget_that_no_widths_keep_is_said(tmp_path):
    problem = limited(("ram", 0.01))
    with pytest.raises(Infeasible, match=r"ram <= .*: the smallest network needs"):
        search("mcu_pruning", tmp_path / "run", problem=problem)


def test_peak_memory_is_a_budget_of_smcp_too(tmp_path):
    problem = limited(("peak_memory", 0.7))
    found = search("smcp", tmp_path / "run", problem=problem).architectures[0]
    (budget,) = problem.budgets[0]
    assert PeakMemory()(problem.plain(found), problem.input_shape) <= budget.limit
    wider = {p: max(problem.outline.options[p]) for p in found}
    assert found != wider
    assert problem.predicted(replace(budget, metric="params"), found) > 0.2 * problem.predicted(
        replace(budget, metric="params"), wider
    )
