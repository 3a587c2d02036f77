"""Prices of a supernet: the sum of the options is the network's own price, and the expectation is the true one."""

import math

import pytest
import torch
from torch import nn

from netsmith import gates
from netsmith.architecture import enumerate_architectures, sample
from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.cost.counts import FileBytes, Macs, Params
from netsmith.cost.prices import Prices, atoms, expected, tabulate
from netsmith.decisions import OneOf, Width, decisions, derive, logits
from netsmith.errors import UserError

SHAPE = (3, 8, 8)
COSTS = pytest.mark.parametrize("cost", [Params(), Macs(), FileBytes()], ids=lambda cost: cost.name)


def scatter(model: nn.Module) -> nn.Module:
    for decision in decisions(model).values():
        decision.logits.data.normal_()
    return model


def probability(model: nn.Module, architecture: dict) -> float:
    found = decisions(model)
    return math.prod(
        found[path].logits.softmax(0)[found[path].index(option)].item() for path, option in architecture.items()
    )


@COSTS
def test_the_sum_of_the_options_is_the_derived_networks_price(nested, cost):
    model = nested()
    prices = tabulate(model, cost, SHAPE)
    assert prices.unit == cost.unit
    for architecture in enumerate_architectures(model):
        assert prices.of(architecture) == cost(derive(model, architecture), SHAPE)


@COSTS
def test_a_supernet_without_numbers_has_the_same_prices(nested, cost):
    model = nested()
    assert tabulate(model.to("meta"), cost, SHAPE) == tabulate(nested(), cost, SHAPE)


@COSTS
def test_the_expectation_is_the_true_one(nested, cost):
    model = scatter(nested())
    prices = tabulate(model, cost, SHAPE)
    found = list(enumerate_architectures(model))
    p = [probability(model, a) for a in found]
    assert sum(p) == pytest.approx(1, abs=1e-12)
    truth = sum(q * cost(derive(model, a), SHAPE) for q, a in zip(p, found, strict=True))
    assert expected(model, prices).item() == pytest.approx(truth, rel=1e-12)


def test_the_expectation_is_the_true_one_three_decisions_deep():
    inner = nn.Sequential(OneOf({"block": MBConv(3, 3, hidden=Width((4, 8))), "skip": nn.Identity()}))
    model = scatter(nn.Sequential(OneOf({"inner": inner, "skip": nn.Identity()})).double())
    prices = tabulate(model, Params(), SHAPE)
    truth = sum(probability(model, a) * prices.of(a) for a in enumerate_architectures(model))
    assert expected(model, prices).item() == pytest.approx(truth, rel=1e-12)


def test_the_expectation_agrees_with_its_samples(nested):
    model = scatter(nested())
    prices = tabulate(model, Macs(), SHAPE)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(1500):
        gates.draw(model, gates.single_path, generator)
        values.append(expected(model, prices, drawn=True).item())
    spread = torch.tensor(values).std() / len(values) ** 0.5
    assert abs(sum(values) / len(values) - expected(model, prices).item()) < 4 * spread


def test_gradient_by_formula():
    # FBNet: the gradient of E at g = 0 and tau = 1 is p_i (c_i - sum p c).
    layer = nn.Sequential(OneOf({name: nn.Identity() for name in "abc"})).double()
    scatter(layer)
    costs = {"a": 3.0, "b": 10.0, "c": 1.0}
    total = expected(layer, Prices(7.0, {"0": costs}))
    total.backward()
    p, c = layer[0].logits.softmax(0).detach(), torch.tensor([3.0, 10.0, 1.0], dtype=torch.float64)
    assert total.item() == pytest.approx(7 + (p @ c).item(), abs=1e-12)
    assert torch.allclose(layer[0].logits.grad, p * (c - p @ c), atol=1e-12)


def test_gradient_through_nested_decisions(nested):
    model = scatter(nested())
    prices = tabulate(model, Macs(), SHAPE)
    expected(model, prices).backward()
    found = list(enumerate_architectures(model))
    for parameter in logits(model):
        for i in range(len(parameter)):
            values = []
            for shift in (1e-5, -2e-5):
                parameter.data[i] += shift
                values.append(sum(probability(model, a) * prices.of(a) for a in found))
            parameter.data[i] += 1e-5
            numeric = (values[0] - values[1]) / 2e-5
            assert parameter.grad[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-2)


def test_a_drawn_mixture_costs_its_weights(nested):
    # FBNet: LAT(a) = sum_l sum_i m_li LAT_li, with the very masks of the forward pass.
    model = nested()
    prices = tabulate(model, Macs(), SHAPE)
    gates.draw(model, gates.Gumbel(), torch.Generator().manual_seed(0))
    m = decisions(model)["second.hidden"].draw().weights
    one = Prices(0.0, {path: dict.fromkeys(row, 0.0) for path, row in prices.options.items()})
    one.options["second.hidden"] = prices.options["second.hidden"]
    value = m @ m.new_tensor(list(one.options["second.hidden"].values()))
    assert expected(model, one, drawn=True).item() == pytest.approx(value.item(), rel=1e-12)


def test_removing_an_option_needs_no_edit_of_the_prices(nested):
    model = scatter(nested())
    prices = tabulate(model, Params(), SHAPE)
    for path, option in (("first", "k3"), ("first.k5.hidden", 24), ("third.deep.1", "skip")):
        decisions(model)[path].remove(option)
        found = list(enumerate_architectures(model))
        p = [probability(model, a) for a in found]
        assert sum(p) == pytest.approx(1, abs=1e-12)
        truth = sum(q * Params()(derive(model, a), SHAPE) for q, a in zip(p, found, strict=True))
        assert expected(model, prices).item() == pytest.approx(truth, rel=1e-12)
        assert model(torch.zeros(1, *SHAPE).double()).shape == (1, 5)


def test_a_missing_price_raises(nested):
    model = nested()
    prices = tabulate(model, Params(), SHAPE)
    architecture = next(enumerate_architectures(model))
    del prices.options["first"]["k3"]
    for attempt in (lambda: prices.of(architecture), lambda: expected(model, prices)):
        with pytest.raises(UserError, match="option 'k3' of decision 'first' has no price"):
            attempt()


def test_scaled_prices():
    prices = Prices(10.0, {"a": {"x": 1.0, "y": 2.0}}, "ms").map(scale=2, constant=3)
    assert prices == Prices(23.0, {"a": {"x": 2.0, "y": 4.0}}, "ms")
    assert prices.of({"a": "y"}) == 27


def test_tabulate_leaves_the_supernet_alone(nested):
    model = nested().train()
    model.stem.eval()
    gates.draw(model, gates.Gumbel(), torch.Generator())
    before = {path: decision.drawn for path, decision in decisions(model).items()}
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tabulate(model, Macs(), SHAPE)
    assert model.training
    assert not model.stem.training
    assert all(decision.drawn is before[path] for path, decision in decisions(model).items())
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_atoms_know_where_they_stand(nested):
    found = {atom.path: atom for atom in atoms(nested(), SHAPE)}
    assert found["second"].shape == (8, 8, 8)
    assert found["third.fused"].shape == (12, 4, 4)
    assert found["third.deep.0"].owner == ("third", "deep")
    assert found["third.deep.1.conv"].owner == ("third.deep.1", "conv")
    assert found["third.fused"].width == "third.fused.hidden"
    assert found["stem"].owner is None


def test_what_would_have_no_price_raises():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBn(3, 3)
            self.choice = OneOf({"a": ConvBn(3, 3), "skip": nn.Identity()})
            self.idle = nn.ReLU()

        def forward(self, x):
            return self.conv(self.choice(self.conv(x)))

    class Unused(Twice):
        def forward(self, x):
            return self.choice(x)

    class Scaled(Unused):
        def __init__(self) -> None:
            super().__init__()
            del self.conv
            self.scale = nn.Parameter(torch.ones(1))

    for model, message in (
        (Twice(), "runs twice"),
        (Unused(), "'conv' has parameters but does not run"),
        (nn.Sequential(Scaled()), "Scaled at '0' has parameters of its own"),
    ):
        with pytest.raises(UserError, match=message):
            tabulate(model, Macs(), SHAPE)


def test_a_plain_network_has_a_constant_price_only():
    prices = tabulate(ConvBn(3, 8, 3), Macs(), SHAPE)
    assert prices == Prices(3 * 8 * 9 * 64, {})
    assert expected(ConvBn(3, 8, 3), prices).item() == 3 * 8 * 9 * 64


def test_a_single_open_block():
    block = MBConv(3, 3, hidden=Width((4, 8)))
    prices = tabulate(block, Params(), SHAPE)
    assert prices.of({"hidden": 4}) == Params()(derive(block, {"hidden": 4}), SHAPE)


def test_a_count_that_is_no_polynomial_in_the_width_is_taken_at_every_width():
    class Padded:
        """Channels as a device has them that computes eight at a time."""

        unit, counted = "channels", True

        def __call__(self, module: nn.Module, shape: tuple[int, ...]) -> float:
            return -8 * (-max(p.shape[0] for p in module.parameters()) // 8)

    block = MBConv(3, 3, hidden=Width(range(4, 33, 4)))
    assert tabulate(block, Padded(), SHAPE).options["hidden"] == {n: -8 * (-n // 8) for n in range(4, 33, 4)}


def test_a_block_costs_less_on_a_smaller_image():
    blocks = [OneOf({"conv": ConvBn(3, 3, 3), "skip": nn.Identity()}) for _ in range(2)]
    prices = tabulate(nn.Sequential(blocks[0], nn.MaxPool2d(2), blocks[1]), Macs(), SHAPE)
    assert prices.at("0", "conv") == 4 * prices.at("2", "conv") == 9 * 3 * 3 * 64


def test_modules_that_print_alike_are_not_confused():
    class Scale(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(OneOf({"one": Scale((1,)), "each": Scale((3, 1, 1))}))
    assert tabulate(model, Params(), SHAPE).options == {"0": {"one": 1.0, "each": 3.0}}

    class Down(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

        def forward(self, x):
            return x[:, :, :: self.by]

    def smaller(by: int) -> nn.Module:
        return nn.Sequential(Down(by), nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1))

    candidates = {f"by{n}": smaller(n) for n in (2, 4)}
    options = tabulate(nn.Sequential(OneOf(candidates)), Macs(), SHAPE).options
    assert options == {"0": {name: Macs()(module, SHAPE) for name, module in candidates.items()}}
    assert options["0"]["by2"] == 2 * options["0"]["by4"]


@COSTS
def test_a_choice_in_many_places_costs_their_sum(tied, cost):
    model, generator = tied(), torch.Generator().manual_seed(0)
    prices = tabulate(model, cost, SHAPE)
    for architecture in [sample(model, generator) for _ in range(10)]:
        assert prices.of(architecture) == cost(derive(model, architecture), SHAPE)
    assert prices.at("edges.a", "conv") == 3 * cost(ConvBn(8, 8, 3), (8, 8, 8))
    assert [atom.path for atom in atoms(model, SHAPE) if atom.owner == ("edges.b", "skip")] == [
        f"edges.b.skip.{place}" for place in range(3)
    ]


def test_a_part_that_takes_a_list_has_no_price():
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 8, 1)

        def forward(self, maps):
            return self.conv(torch.cat(maps, 1))

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = OneOf({"a": nn.Conv2d(3, 8, 1), "b": ConvBn(3, 8)})
            self.joins = Joins()

        def forward(self, x):
            return self.joins([self.choice(x)] * 2)

    with pytest.raises(UserError, match="Joins takes list, not a tensor: alone it cannot be timed or counted"):
        atoms(Dense(), SHAPE)
