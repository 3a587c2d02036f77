"""Conformance of every space in SPACES; a new one is covered by being listed."""

import functools

import pytest
import torch
from torch import nn

from netsmith import gates
from netsmith.architecture import check, dumps, loads, mutate, sample
from netsmith.cost.prices import Prices, expected, tabulate_all
from netsmith.decisions import Decision, decisions, derive, logits
from netsmith.errors import UserError
from netsmith.search.problem import COUNTED
from netsmith.spaces import SPACES, open_space

RESOLUTIONS = {"fbnet": 224, "prunet": 224, "single_path": 224, "proxylessnas": 224, "pad_nas": 224, "repvgg": 224}
"""Pixels each is made for; 32 where nothing is said."""

every = pytest.mark.parametrize("name", SPACES)


def shape(name: str) -> tuple[int, int, int]:
    """Grey images, to see that no space insists on three channels."""
    size = RESOLUTIONS.get(name, 32)
    return (1, size, size)


@functools.cache
def build(name: str) -> nn.Module:
    """Without numbers, but for the logits: shapes, legality and counts need none."""
    with torch.device("meta"):
        model = open_space(name, classes=7, channels=1, resolution=shape(name)[1])
    for decision in decisions(model).values():
        decision.logits = nn.Parameter(torch.zeros(len(decision.options)))
    return model


@functools.cache
def tables(name: str) -> dict[str, Prices]:
    return tabulate_all(build(name), COUNTED, shape(name))


@every
def test_samples_are_legal_round_trip_and_repeat(name):
    model = build(name)
    for seed in range(5):
        a = sample(model, torch.Generator().manual_seed(seed))
        assert loads(dumps(a)) == a
        assert a == sample(model, torch.Generator().manual_seed(seed))
        check(model, a)
        check(model, mutate(model, a, torch.Generator().manual_seed(seed)))


@every
def test_every_sample_runs_forward_and_backward(name):
    """On the meta device: every shape is checked at the true resolution, nothing is computed."""
    model = build(name).train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        child = derive(model, sample(model, generator))
        assert not any(isinstance(module, Decision) for module in child.modules())
        y = child(torch.empty(2, *shape(name), device="meta"))
        assert y.shape == (2, 7)
        y.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in child.parameters())


@every
def test_the_derived_network_equals_the_supernet_fixed_to_it(name):
    torch.manual_seed(0)
    model = open_space(name, classes=7, channels=1, resolution=shape(name)[1]).train()
    assert {p: d.options for p, d in decisions(model).items()} == {
        p: d.options for p, d in decisions(build(name)).items()
    }
    a = sample(model, torch.Generator().manual_seed(1))
    x = torch.randn(2, *shape(name))
    gates.fix(model, a)
    model(x).square().mean().backward()
    touched = {path for path, p in model.named_parameters() if p.grad is not None}
    assert touched
    assert not any(path.endswith("logits") for path in touched)
    model.eval()
    child = derive(model, a)
    with torch.no_grad():
        assert torch.allclose(child(x), model(x), rtol=1e-4, atol=1e-5)


@every
def test_the_prices_of_the_options_add_up_to_the_derived_network(name):
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    a = sample(model, generator)
    child = derive(model, a)
    for cost in COUNTED.values():
        assert tables(name)[cost.name].of(a) == cost(child, shape(name)), cost


@every
def test_the_expectation_reaches_every_logit(name):
    model = build(name)
    # What is decided in a space of branches costs training only.
    prices = tables(name)["branches" if tables(name)["branches"].of(sample(model, torch.Generator())) else "params"]
    total = expected(model, prices)
    total.backward()
    assert prices.constant < total.item() < sum(max(row.values()) for row in prices.options.values()) + prices.constant
    assert all(p.grad is not None and p.grad.isfinite().all() for p in logits(model))


def test_the_space_of_proxylessnas_has_the_papers_size():
    options = [len(decision.options) for decision in decisions(build("proxylessnas")).values()]
    assert sorted(options) == [6] * 6 + [7] * 15


def test_unknown_names_and_options():
    with pytest.raises(UserError, match="unknown space 'fbnett'; did you mean 'fbnet'"):
        open_space("fbnett")
    with pytest.raises(UserError, match="did you mean 'classes'"):
        open_space("fbnet", clases=10)


@pytest.mark.parametrize(
    ("name", "resolution"),
    [("fbnet", 32), ("prunet", 96), ("single_path", 32), ("proxylessnas", 32), ("pad_nas", 32), ("repvgg", 32)],
)
def test_imagenet_strides_refuse_small_images(name, resolution):
    # AnnaAraslanova/FBNet ran ImageNet strides on 32 px: 1x1 maps, hence many skips and some 80 % on CIFAR.
    with pytest.raises(UserError, match=rf"needs \d+ px; given: {resolution} px"):
        open_space(name, resolution=resolution)
