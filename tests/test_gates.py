"""Gates: what a draw is, in expectation and in the limits; the traps that FBNet's re-implementations fell into."""

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from netsmith import gates
from netsmith.architecture import enumerate_architectures
from netsmith.blocks.mobile import ConvBn
from netsmith.decisions import OneOf, decisions

GATES = {
    "softmax": gates.softmax,
    "gumbel": gates.Gumbel(),
    "cold gumbel": gates.Gumbel(1e-3),
    "single": gates.single_path,
    "uniform": gates.uniform_path,
    "binary": gates.binary,
    "two paths": gates.two_path,
}
LOGITS = torch.tensor([0.5, -0.3, 1.2, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", GATES)
def test_weights_sum_to_one_and_follow_the_seed(name):
    def drawn(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return [GATES[name](LOGITS, generator) for _ in range(20)]

    state = torch.get_rng_state()
    for first, again in zip(drawn(1), drawn(1), strict=True):
        assert first.indices == again.indices
        assert torch.equal(first.weights, again.weights)
        assert first.weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert len(first.indices) == len(first.weights)
    assert torch.equal(state, torch.get_rng_state())


def frequencies(gate, draws: int = 10_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(LOGITS))
    for _ in range(draws):
        indices, weights, _ = gate(LOGITS, generator)
        counts[indices[int(weights.argmax())]] += 1
    return counts


@pytest.mark.parametrize(
    ("gate", "p"),
    [
        (gates.Gumbel(1e-6), LOGITS.softmax(0)),
        (gates.single_path, LOGITS.softmax(0)),
        (gates.uniform_path, torch.full((4,), 0.25)),
        (gates.binary, LOGITS.softmax(0)),
    ],
    ids=["gumbel", "single", "uniform", "binary"],
)
def test_frequencies_are_the_probabilities(gate, p):
    counts = frequencies(gate)
    assert chisquare(counts.numpy(), (p * counts.sum()).numpy(), sum_check=False).pvalue > 1e-3


def test_of_two_paths_the_active_one_is_drawn_by_their_own_odds():
    generator, counts = torch.Generator().manual_seed(0), {}
    for _ in range(6000):
        active, other = gates.two_path(LOGITS, generator).indices
        first, second = sorted((active, other))
        counts.setdefault((first, second), [0, 0])[active == second] += 1
    assert len(counts) == 6
    p = LOGITS.softmax(0)  # i first and then j, or j first and then i
    chances = [p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in counts]
    drawn = [sum(seen) for seen in counts.values()]
    assert chisquare(drawn, [6000 * chance.item() for chance in chances], sum_check=False).pvalue > 1e-4
    for pair, seen in counts.items():
        odds = LOGITS[list(pair)].softmax(0) * sum(seen)
        assert chisquare(seen, odds.numpy(), sum_check=False).pvalue > 1e-4


def test_cold_gumbel_is_one_hot_and_never_nan():
    # JunrQ/NAS issue 15: NaN once the temperature had become small.
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-2, 1e-6, 1e-30):
        for _ in range(200):
            weights = gates.Gumbel(temperature)(LOGITS.float() * 100, generator).weights
            assert weights.isfinite().all()
            assert weights.sum().item() == pytest.approx(1)
    assert weights.max() == 1


def test_warm_gumbel_is_flat():
    weights = gates.Gumbel(1e6)(LOGITS, torch.Generator().manual_seed(0)).weights
    assert (weights - 0.25).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["softmax", "gumbel"])
def test_gradient_is_that_of_the_softmax(name):
    logits = LOGITS.clone().requires_grad_()
    values = torch.tensor([3.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    _, weights, _ = GATES[name](logits, torch.Generator().manual_seed(0))
    (weights @ values).backward()
    assert logits.grad is not None
    m = weights.detach()
    temperature = 1 if name == "softmax" else 5
    assert torch.allclose(logits.grad, m * (values - m @ values) / temperature, atol=1e-12)


def test_only_what_is_reached_is_drawn(nested):
    model = nested()
    generator = torch.Generator().manual_seed(0)
    legal = [set(a) for a in enumerate_architectures(model)]
    for _ in range(50):
        gates.release(model)
        gates.draw(model, gates.single_path, generator)
        assert {path for path, d in decisions(model).items() if d.drawn is not None} in legal


def test_old_draws_of_what_is_not_reached_do_no_harm(nested):
    model, generator = nested(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    for _ in range(20):
        gates.draw(model, gates.single_path, generator)
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()
        ran = {decision.options[decision.drawn.indices[0]] for p, decision in decisions(model).items() if p == "first"}
        touched = {
            name.split(".")[1]
            for name, p in model.named_parameters()
            if name.startswith("first.") and p.grad is not None
        }
        assert touched <= ran


def test_one_gate_per_path(nested):
    model = nested()
    chosen = dict.fromkeys(decisions(model), gates.softmax) | {"first": gates.single_path}
    gates.draw(model, chosen, torch.Generator().manual_seed(0))
    drawn = {path: d.drawn for path, d in decisions(model).items()}
    assert len(drawn["first"].indices) == 1
    assert len(drawn["third"].indices) == 2


def test_validation_after_release_has_no_noise(nested):
    # AnnaAraslanova/FBNet validates with Gumbel noise.
    model, x = nested().eval(), torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        quiet = model(x)
        gates.draw(model, gates.Gumbel(), torch.Generator().manual_seed(0))
        assert not torch.allclose(model(x), quiet)
        gates.release(model)
        assert torch.equal(model(x), quiet)


def test_the_good_operation_wins():
    # FBNet sheet, small check: P(good) > 0.9 in less than 300 steps.
    layer = OneOf({"bad": nn.Identity(), "good": nn.Identity()})
    optimizer = torch.optim.Adam([layer.logits], lr=0.01, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        gates.draw(layer, gates.Gumbel(1.0), generator)
        (layer.draw().weights @ torch.tensor([1.0, 0.0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.logits.softmax(0)[1] > 0.9


def test_fix_refuses_an_unknown_option():
    layer = nn.Sequential(OneOf({"conv": ConvBn(3, 3), "skip": nn.Identity()}))
    with pytest.raises(Exception, match="did you mean 'skip'"):
        gates.fix(layer, {"0": "skp"})
