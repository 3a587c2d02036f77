"""SMCP, exactly: which gradients reach what, what a channel is worth, when masks move, and what ships."""

import math
from dataclasses import replace

import pytest
import torch
from planted import Summed, narrowable, new_run, problem_of, stripes
from torch import nn
from torch.func import functional_call

from netsmith.blocks.mobile import ConvBn, Head
from netsmith.cost.budget import Budget
from netsmith.decisions import derive
from netsmith.errors import UserError
from netsmith.graph.channels import channels
from netsmith.graph.slimmable import Slimmable
from netsmith.methods import check_searchable
from netsmith.methods.smcp import SMCP, Pruning
from netsmith.run import read_events
from netsmith.search.problem import taught
from netsmith.ship.weights import tensors


def narrowed(shares=(0.6,)):
    return problem_of(narrowable, shares, task=stripes(64))


@pytest.fixture
def pruning(tmp_path):
    """Before its first step, with some channels masked."""
    problem = narrowed()
    with new_run(tmp_path / "run") as run:
        found = Pruning(SMCP(epochs=2, batch_size=16), problem, run)
        generator = torch.Generator().manual_seed(0)
        for mask in found.masks.values():
            mask[torch.randperm(len(mask), generator=generator)[: len(mask) // 2]] = 0.0
        yield found


# Gradients --------------------------------------------------------------------------------------------------------


def toy(masks: str, path: str, tmp_path):
    """Convolution, activation, convolution, no bias and no norm; channel 1 of the first is masked."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 3)
    )
    with torch.device("cpu"):
        space = Slimmable(network, channels(network, (1, 8, 8)), step=2)
    problem = narrowed()
    problem.build = lambda: space
    with new_run(tmp_path / path) as run:
        found = Pruning(SMCP(masks=masks), problem, run)
    found.masks["0"][1] = 0.0
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        network[0].weight.abs_()  # so that every channel passes the activation
    functional_call(network, found.tensors(), (images,)).square().sum().backward()
    return network


def test_what_reads_a_masked_channel_goes_on_learning_and_what_makes_it_does_not(tmp_path):
    network = toy("soft", "soft", tmp_path)
    assert network[2].weight.grad[:, 1].abs().min() > 0
    assert torch.equal(network[0].weight.grad[1], torch.zeros(1, 3, 3))
    assert network[0].weight.grad[[0, 2, 3]].abs().sum() > 0


def test_hard_masks_let_nothing_through(tmp_path):
    network = toy("hard", "hard", tmp_path)
    assert torch.equal(network[2].weight.grad[:, 1], torch.zeros(4, 3, 3))


def test_the_gradient_of_a_masked_weight_is_that_of_what_runs(pruning):
    images, _ = next(pruning.problem.task.batches("train", 16, train=False))
    runs = {name: tensor.detach().clone().requires_grad_() for name, tensor in pruning.tensors().items()}
    pruning.space.eval()
    functional_call(pruning.space.network, pruning.tensors(), (images,)).square().mean().backward()
    functional_call(pruning.space.network, runs, (images,)).square().mean().backward()
    assert len(runs) >= 3
    for name, tensor in runs.items():
        assert torch.allclose(pruning.space.network.get_parameter(name).grad, tensor.grad, atol=1e-7), name


def test_a_scaled_norm_learns_as_if_it_were_not(pruning):
    name = "0.bn.weight"
    gamma = pruning.space.network.get_parameter(name)
    pruning.masks, pruning.scales = {}, {name: 0.25}
    runs = pruning.tensors()[name]
    assert torch.allclose(runs, 0.25 * gamma)
    (runs * torch.arange(1.0, 9.0)).sum().backward()
    assert torch.allclose(gamma.grad, torch.arange(1.0, 9.0) / 0.25)
    gamma.grad = None
    pruning.scales = {name: 0.0}
    runs = pruning.tensors()[name]
    assert torch.equal(runs, torch.zeros(8))
    runs.sum().backward()
    assert torch.equal(gamma.grad, torch.zeros(8))


# What a channel is worth --------------------------------------------------------------------------------------------


def test_importance_is_the_sum_over_what_reads_a_channel_of_rows_that_are_there(pruning):
    network, space = pruning.space.network, pruning.space
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    pruning.gather()
    weight = network.get_parameter("2.conv.weight")  # (12, 8, 3, 3): the only one that reads the first group
    rows = pruning.masks["2/conv"].bool()
    expected = (-weight * weight.grad)[rows].sum((0, 2, 3)).abs()
    assert torch.allclose(pruning.gathered["0/conv"], expected, rtol=1e-5)
    assert {use.tensor for use in space.groups["0/conv"].uses if use.role == "in"} == {"2.conv.weight"}
    pruning.gather()
    assert torch.allclose(pruning.gathered["0/conv"], 2 * expected, rtol=1e-5), "batches add up"


def test_masked_weights_decay_on_top(pruning):
    network = pruning.space.network
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruning.decay()
    weight, gone = network.get_parameter("2.conv.weight"), pruning.masks["0/conv"] == 0
    assert torch.allclose(weight.grad[:, gone], 2e-4 * weight[:, gone])
    assert torch.equal(weight.grad[:, ~gone], torch.zeros_like(weight[:, ~gone]))


def test_norms_behind_masked_weights_are_scaled_by_what_is_left(pruning):
    for worth in pruning.gathered.values():
        worth.copy_(torch.arange(1.0, len(worth) + 1))
    pruning.scale()
    left = (pruning.gathered["0/conv"] * pruning.masks["0/conv"]).sum() / pruning.gathered["0/conv"].sum()
    assert pruning.scales["2.bn.weight"] == pytest.approx(float(left))
    pruning.method = replace(pruning.method, scaling="share")
    pruning.scale()
    assert pruning.scales["2.bn.weight"] == 0.5
    pruning.method = replace(pruning.method, scaling="none")
    pruning.scale()
    assert pruning.scales == {}


# The schedule -------------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_papers():
    method = SMCP(warm=10 / 90, ramp=55 / 90)
    known = {1: 0.052, 5: 0.236, 10: 0.419, 20: 0.673, 30: 0.827, 40: 0.921}
    for t, share in known.items():
        assert method.tightened(10 + t, 90) == pytest.approx(share, abs=5e-4)
    assert method.tightened(9, 90) == 0
    assert method.tightened(65, 90) == method.tightened(90, 90) == 1
    ramp = [method.tightened(10 + t, 90) for t in range(1, 56)]
    assert ramp == sorted(set(ramp))


def test_masks_move_in_the_ramp_alone_and_follow_the_budget(tmp_path):
    problem, method = narrowed(), SMCP(epochs=10, batch_size=16, every=2)
    with new_run(tmp_path / "run") as run:
        method.search(problem, run)
    steps = 10 * 4
    choices = [event for event in read_events(tmp_path / "run") if event["kind"] == "smcp_choice"]
    assert len(choices) > 5
    assert all(0.1 * steps <= choice["step"] <= math.ceil(0.7 * steps) for choice in choices)
    whole, (budget,) = problem.latency.of(problem.reference), problem.budgets[0]
    for choice in choices:
        limit = budget.limit + (1 - choice["tightened"]) * (whole - budget.limit)
        assert problem.latency.of(choice["widths"]) <= limit * (1 + 1e-9)
    assert choices[-1]["tightened"] == 1
    assert all(n % 2 == 0 for choice in choices for n in choice["widths"].values())


def test_a_budget_that_the_whole_network_keeps_masks_nothing(tmp_path):
    problem = narrowed()
    problem.budgets = [[Budget("latency", 2 * problem.latency.of(problem.reference), "ms")]]
    with new_run(tmp_path / "run") as run:
        (values,) = SMCP(epochs=2, batch_size=16, every=2).search(problem, run)
    assert problem.allocate(values, problem.budgets[0]) == problem.reference


# What ships ---------------------------------------------------------------------------------------------------------


def test_what_is_derived_computes_what_the_masked_network_did(tmp_path):
    problem = narrowed()
    with new_run(tmp_path / "run") as run:
        pruning = Pruning(SMCP(epochs=4, batch_size=16, every=2), problem, run)
        pruning.train()
        space = pruning.space
        images = torch.rand(4, 1, 8, 8)
        space.eval()
        pruning.scales = {}  # which are in the weights by now
        with torch.no_grad():
            masked = functional_call(space.network, pruning.tensors(), (images,))
            other = problem.build()
            other.load_state_dict(tensors(run.path / taught("smcp", 0)))
            derived = derive(other, pruning.architecture).eval()
            assert torch.allclose(derived(images), masked, atol=1e-5)
    assert pruning.architecture != problem.reference
    assert sum(p.numel() for p in derived.parameters()) < sum(p.numel() for p in space.network.parameters())


def test_joined_tensors_have_one_mask():
    network = nn.Sequential(ConvBn(1, 8, 3), Summed(ConvBn(8, 8, 3)), Head(8, 16, 3))
    space = Slimmable(network, channels(network, (1, 8, 8)), step=4)
    reading = {use.tensor for use in space.groups["0/conv"].uses if use.role == "in"}
    assert reading >= {"1.inner.conv.weight"}
    assert len(reading) == 2, "the layer inside of the sum and what comes after it"


# Bad input ----------------------------------------------------------------------------------------------------------


def test_other_decisions_are_refused():
    with pytest.raises(UserError, match=r"smcp cannot search .* is not how many channels of a group stay"):
        check_searchable("smcp", nn.Sequential(Head(8, 16, 3), problem_of().build()), "some")


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    with (
        new_run(tmp_path / "run") as run,
        pytest.raises(UserError, match=r"the loss became nan in epoch .* learning_rate"),
    ):
        SMCP(learning_rate=1e9, epochs=3, batch_size=16).search(narrowed(), run)
