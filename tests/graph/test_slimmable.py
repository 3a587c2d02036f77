"""A network with open widths: what it computes, what it costs, what it becomes."""

import functools
import itertools

import pytest
import timm
import torch
from torch import nn

from netsmith.architecture import sample
from netsmith.cost.counts import FileBytes, Macs, Params
from netsmith.cost.device import Device
from netsmith.cost.latency import profile_space
from netsmith.cost.prices import expected, tabulate
from netsmith.cost.table import LatencyTable, TableDevice, entry_key
from netsmith.decisions import Draw, decisions, derive, logits
from netsmith.errors import UserError
from netsmith.graph.channels import channels
from netsmith.graph.slim import proven
from netsmith.graph.slimmable import Slimmable, widths

SHAPE = (3, 32, 32)


@functools.cache
def opened(name: str) -> Slimmable:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return Slimmable(network, proven(network, channels(network, SHAPE), SHAPE)).eval()


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("ghostnet_050", "densenet121")]
NAMES = pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", *LARGE])


@NAMES
def test_counts_add_up_over_layers_between_widths(name):
    space, generator = opened(name), torch.Generator().manual_seed(0)
    for cost in (Params(), Macs(), FileBytes()):
        prices = tabulate(space, cost, SHAPE)
        for _ in range(2):
            architecture = sample(space, generator)
            counted = cost(derive(space, architecture), SHAPE)
            assert prices.of(architecture) == pytest.approx(counted, rel=1e-12), cost


@NAMES
def test_masked_is_slimmed(name):
    space = opened(name)
    generator = torch.Generator().manual_seed(1)
    for path, group in space.groups.items():
        space.order(path).copy_(torch.randperm(group.size, generator=generator))
    architecture = sample(space, generator)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)
    space.double()
    for path, decision in decisions(space).items():
        decision.drawn = Draw([decision.index(architecture[path])], torch.ones(1))
    with torch.no_grad():
        masked, slimmed = space(x), derive(space, architecture).eval()(x)
    for decision in decisions(space).values():
        decision.drawn = None
    space.float()
    assert (masked - slimmed).abs().max() < 1e-10 * slimmed.abs().max()


def small() -> Slimmable:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 2)
    )
    return Slimmable(network, channels(network, (3, 4, 4)), step=2, most=2)


def test_all_widths_at_once_are_the_mixture_of_each():
    """What follows the masks is linear: so the mixture of the outputs, exactly."""
    space = small().double()
    with torch.no_grad():
        for parameter in logits(space):
            parameter.uniform_(-1, 1)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = {path: decision for path, decision in decisions(space).items() if path == "2"}
    ((path, decision),) = found.items()
    other = {p: d.options[-1] for p, d in decisions(space).items() if p != path}
    for p, n in other.items():
        decisions(space)[p].drawn = Draw([decisions(space)[p].index(n)], torch.ones(1))
    mixed = space(x)
    chances = decision.logits.softmax(0)
    parts = [derive(space, {path: n, **other})(x) for n in decision.options]
    assert torch.allclose(mixed, sum(p * y for p, y in zip(chances, parts, strict=True)), atol=1e-12)
    mixed.sum().backward()
    assert decision.logits.grad is not None
    assert decision.logits.grad.abs().sum() > 0


def test_the_expectation_equals_enumeration():
    space = small()
    with torch.no_grad():
        for parameter in logits(space):
            parameter.uniform_(-1, 1)
    prices = tabulate(space, Macs(), (3, 4, 4))
    assert prices.pairs
    found = decisions(space)
    total = 0.0
    for chosen in itertools.product(*(range(len(d.options)) for d in found.values())):
        chance = torch.stack([d.logits.softmax(0)[i] for d, i in zip(found.values(), chosen, strict=True)]).prod()
        architecture = {path: d.options[i] for (path, d), i in zip(found.items(), chosen, strict=True)}
        total += float(chance.detach()) * prices.of(architecture)
    assert float(expected(space, prices).detach()) == pytest.approx(total, rel=1e-6)


def test_every_layer_is_timed_at_every_pair_of_widths(tmp_path):
    space = small()
    first, second = space.width("0").options, space.width("2").options
    table = {}
    for n in first:
        table[entry_key(nn.Conv2d(3, n, 3, padding=1), (3, 4, 4))] = 1.0 * n
        for m in second:
            table[entry_key(nn.Conv2d(n, m, 1), (n, 4, 4))] = 100.0 + n * m
    for m in second:
        table[entry_key(nn.Linear(16 * m, 2), (16 * m,))] = 1000.0 * m
    device: Device = TableDevice("board", table)
    latency = profile_space(space, (3, 4, 4), device, LatencyTable(tmp_path / "t.sqlite"))
    for n, m in itertools.product(first, second):
        assert latency.prices.of({"0": n, "2": m}) == pytest.approx(n + 100 + n * m + 1000 * m)
    assert latency.layers.of({"0": first[0], "2": second[0]}) == 3


def test_widths():
    assert widths(64, 8, 8) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert widths(256, 8, 4) == [64, 128, 192, 256]
    assert widths(16, 8, 8) == [4, 8, 12, 16]
    assert widths(1, 8, 8) == [1]
    for size, most in itertools.product(range(1, 200), (1, 3, 8)):
        found = widths(size, 8, most)
        assert found == sorted(set(found))
        assert found[-1] == size
        assert len(found) <= most


def test_a_network_without_channels_to_take_out_says_why():
    network = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"there is no channel to take out \(2: it is the output"):
        Slimmable(network, channels(network, (3, 4, 4)))
