"""Hutchinson's traces against exact Hessians."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith.search.hessian import omega, trace, traces


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x'Ax/2 and x."""
    x = torch.randn(len(matrix), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(x @ matrix @ x / 2, x, create_graph=True)
    return gradient, x


@pytest.mark.parametrize("sign", [1, -1])
def test_one_draw_is_exact_for_a_diagonal_hessian(sign):
    diagonal = sign * torch.rand(20, dtype=torch.float64)
    found = trace(*quadratic(diagonal.diag()), generator(), draws=1)
    assert found == pytest.approx(float(diagonal.sum()), rel=1e-12)


class Counted(torch.autograd.Function):
    """x -> x'Ax/2, whose products with the Hessian are scripted: one number a draw."""

    products: tuple[float, ...] = ()
    drawn = 0

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        Counted.drawn += 1
        return grad * Counted.products[Counted.drawn - 1]


@pytest.mark.parametrize(
    ("products", "draws", "mean"),
    [
        ((8, 8, 9, 9), 2, 8),  # nothing changes
        ((8, 4, 6, 100), 3, 6),  # the mean stays at 6
        ((8, 2, 1, 1, 1, 1), 6, 14 / 6),  # falls all the time: without the absolute value it would end at once
        ((-8, -9, -8.5, 3), 3, -8.5),  # negative traces end, too
        ((0, 0, 0, 0), 4, 0),
    ],
)
def test_when_it_stops(products, draws, mean):
    Counted.products, Counted.drawn = products, 0
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = trace(Counted.apply(x), x, generator(), draws=len(products))
    assert Counted.drawn == draws
    assert found == pytest.approx(mean)


def test_at_most_the_draws_asked_for():
    matrix = torch.randn(30, 30, dtype=torch.float64)
    gradient, x = quadratic(matrix + matrix.T)
    short = [trace(gradient, x, generator(seed), draws=7, tolerance=0) for seed in (0, 0, 1)]
    assert short[0] == short[1] != short[2]


def two_layers() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    model[1].running_mean.uniform_(-0.2, 0.2)
    return model, torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 4, (32,))


def test_two_layers_against_the_exact_hessian():
    model, x, y = two_layers()
    found = traces(model, lambda n: F.cross_entropy(n(x), y), ["0", "3"], generator(), draws=1000, tolerance=0)
    for path, estimate in found.items():
        shadow, name = copy.deepcopy(model).eval(), f"{path}.weight"
        weight = shadow.get_parameter(name).detach()

        def loss(w, shadow=shadow, name=name):
            return F.cross_entropy(torch.func.functional_call(shadow, {name: w}, x), y)

        hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), -1)
        assert estimate == pytest.approx(float(hessian.trace()), rel=0.05)


def test_the_network_stays_as_it_was():
    model, x, y = two_layers()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = traces(model, lambda n: F.cross_entropy(n(x), y), ["0"], generator(), draws=3)
    assert found["0"] != 0, "frozen or not"
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad


def test_where_nothing_bends():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(5, 3)
    assert traces(model[:1], lambda n: n(x).sum(), ["0"], generator()) == {"0": 0.0}, "the loss is linear in it"
    found = traces(model, lambda n: n[0](x).square().sum(), ["0", "1"], generator())
    assert found["0"] > found["1"] == 0, "the loss does not use it"
    assert traces(model, lambda n: n(x).sum(), ["0", "1"], generator()) == {"0": 0.0, "1": 0.0}, "linear in each"


def test_omega_by_hand():
    weight, moved = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.5], [3.0, 3.0]])
    assert omega(8.0, weight, moved) == pytest.approx(8 / 4 * (0.25 + 1))
    assert omega(-8.0, weight, moved) == 0
