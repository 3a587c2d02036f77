"""EdMIPS: the mixture in one convolution, the penalty, and the step in which weights and logits learn."""

import pytest
import torch
from planted import new_run, one_is_misled_in_int8, problem_of, small, stripes, toy_for
from torch import nn
from torch.nn import functional as F

from netsmith.blocks.quantized import Fixed, quantized
from netsmith.blocks.quantizers import hwgq_activation, hwgq_weight
from netsmith.cost.bits import BitOps, layers
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Prices, expected
from netsmith.decisions import decisions, derive, logits
from netsmith.errors import UserError
from netsmith.gates import Gumbel, draw, fix, release, single_path
from netsmith.methods.edmips import Composed, EdMIPS, expected_bits, mixed, penalty
from netsmith.run import read_events
from netsmith.search.differentiable import Loop, Steps

SHAPE = (3, 8, 8)


def searched(bits=(1, 2, 4)) -> nn.Module:
    return mixed(small(), ["2", "5"], bits)


def randomized(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, one in enumerate(logits(network)):
            one.copy_(torch.linspace(-1, 1, len(one)).roll(number))
    return network


def test_one_convolution_with_two_mixtures():
    network, x = randomized(searched()), torch.randn(2, 8, 8, 8)
    conv = network[2]
    p, q = conv.input_quantizer.logits.softmax(0), conv.weight_quantizer.logits.softmax(0)
    inputs = sum(w * hwgq_activation(x, b) for w, b in zip(p, (1, 2, 4), strict=True))
    weight = sum(w * hwgq_weight(conv.weight, b) for w, b in zip(q, (1, 2, 4), strict=True))
    assert torch.allclose(conv(x), F.conv2d(inputs, weight, conv.bias, stride=2, groups=2), atol=1e-6)
    assert list(decisions(network)) == [f"{p}.{part}_quantizer" for p in ("2", "5") for part in ("weight", "input")]


def test_one_hot_is_the_plain_quantised_network():
    network, x = searched().eval(), torch.randn(2, *SHAPE)
    bits = {"2": (4, 1), "5": (2, 4)}
    plain = quantized(
        small(),
        {
            path: (Fixed(lambda v, w=w: hwgq_weight(v, w), w), Fixed(lambda v, a=a: hwgq_activation(v, a), a))
            for path, (w, a) in bits.items()
        },
    ).eval()
    chosen = {f"{p}.weight_quantizer": str(w) for p, (w, _) in bits.items()}
    chosen |= {f"{p}.input_quantizer": str(a) for p, (_, a) in bits.items()}
    expected = plain(x)
    derived = derive(network, chosen)
    assert torch.equal(derived(x), expected)
    assert BitOps()(derived, SHAPE) == BitOps()(plain, SHAPE)
    fix(network, chosen)
    assert torch.equal(network(x), expected)
    release(network)
    with torch.no_grad():
        for path, decision in decisions(network).items():
            decision.logits.fill_(-1e9)[decision.index(chosen[path])] = 0
    assert torch.equal(network(x), expected)


MACS_OF = {path: layer.macs for path, layer in layers(small(), SHAPE).items() if path in ("2", "5")}


def test_the_penalty_by_hand():
    network = randomized(searched()).double()
    value = 0.0
    for path, macs in MACS_OF.items():
        product = 1.0
        for part in ("weight", "input"):
            p = decisions(network)[f"{path}.{part}_quantizer"].logits.softmax(0)
            product *= float(p.detach() @ torch.tensor([1.0, 2, 4], dtype=torch.float64))
        value += macs * product
    assert penalty(network, MACS_OF, 0.03).item() == pytest.approx(0.03 * value / MACS_OF["2"])
    millions = {path: macs * 1e-6 for path, macs in reversed(MACS_OF.items())}
    assert penalty(network, millions, 0.03).item() == pytest.approx(0.03 * value / MACS_OF["2"]), (
        "c_0 is the first layer"
    )


def test_the_penaltys_derivative():
    network = randomized(searched()).double()
    found = torch.autograd.grad(penalty(network, MACS_OF, 0.7), logits(network))
    for one, gradient in zip(logits(network), found, strict=True):
        for i in range(len(one)):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    one[i] += step
                    ends.append(penalty(network, MACS_OF, 0.7).item())
                    one[i] -= step
            assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-9)
    head = network[5]
    (gradient,) = torch.autograd.grad(penalty(network, MACS_OF, 1.0), head.weight_quantizer.logits)
    p, bits = head.weight_quantizer.logits.softmax(0), torch.tensor([1.0, 2, 4], dtype=torch.float64)
    slope = MACS_OF["5"] / MACS_OF["2"] * expected_bits(head.input_quantizer)
    assert torch.allclose(gradient, slope * p * (bits - p @ bits)), "p_i (b_i - E)"


def test_expected_bits_of_what_is_drawn():
    network, generator = searched(), torch.Generator().manual_seed(0)
    for gate in (single_path, Gumbel(0.5)):
        draw(network, gate, generator)
        for decision in decisions(network).values():
            expected = sum(w.item() * (1, 2, 4)[i] for i, w in decision.drawn.pairs())
            assert expected_bits(decision).item() == pytest.approx(expected)
    assert expected_bits(Fixed(torch.clone, 8)) == 8


@pytest.mark.parametrize(("strength", "fewest"), [(0.0, False), (10.0, True)])
def test_a_strong_penalty_leaves_the_fewest_bits(strength, fewest):
    network, generator = searched(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        x = torch.randn(32, *SHAPE, generator=generator)
        y = (x[:, 0].mean((1, 2)) > 0).long()
        loss = F.cross_entropy(network(x), y) + penalty(network, MACS_OF, strength)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(int(one.argmax()) == 0 for one in logits(network)) == fewest


def test_a_stronger_penalty_never_costs_more():
    costs = []
    for strength in (0.001, 0.01, 0.1, 1.0):
        network = searched()
        optimizer = torch.optim.SGD(logits(network), 0.5)
        for _ in range(20):
            optimizer.zero_grad()
            # Something that wants many bits stands for the loss.
            wants = sum(decision.logits.softmax(0)[0] for decision in decisions(network).values())
            (wants + penalty(network, MACS_OF, strength)).backward()
            optimizer.step()
        costs.append(penalty(network, MACS_OF, 1.0).item())
    assert costs == sorted(costs, reverse=True)


def test_what_the_penalty_cannot_count():
    network = searched()
    for macs, text in ({"0": 1.0}, "0"), ({}, ""), ({"2": 1.0, "9": 1.0}, "9"):
        with pytest.raises(UserError, match=f"no quantised layers: {text}$"):
            penalty(network, macs, 1.0)
    with pytest.raises(UserError, match="1 to 4 bits"):
        searched((2, 8))


# The method ---------------------------------------------------------------------------------------------------------


def composed(share: float = 0.5, **steps) -> tuple[Composed, Loop]:
    problem = toy_for("edmips", [share], task=stripes(32))
    method = EdMIPS(steps=Steps(warmup_epochs=0, epochs=1, architecture_optimizer="sgd", **steps))
    searcher = Composed(method, problem, problem.budgets[0])
    return searcher, Loop(problem, searcher, method.steps)


def test_a_layer_at_all_its_bits_convolves_once():
    searcher, _ = composed()
    layer, x = searcher.supernet.get_submodule("1.conv"), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.3, -0.4]))
    p, q = layer.logits.softmax(0).tolist()
    low = layer.int8
    weight = p * low.weight + q * low.weight_quantizer(low.weight)
    inputs = p * x + q * low.eval().input_quantizer(x)
    torch.testing.assert_close(layer(x), F.conv2d(inputs, weight, padding=1))
    head, x = searcher.supernet.get_submodule("4.linear"), torch.rand(2, 16)
    fix(searcher.supernet, {"1.conv": "int8", "4.linear": "int8"})
    assert torch.equal(layer(x1 := torch.randn(2, 8, 8, 8)), low(x1))
    assert torch.equal(head(x), head.int8.eval()(x))


def test_weights_and_logits_learn_in_one_step():
    searcher, loop = composed(architecture_rate=0.5, architecture_decay=0.1)
    batch = next(loop._batches("train", 0))
    before = {path: d.logits.detach().clone().normal_(generator=torch.Generator().manual_seed(2)) for path, d in
              decisions(searcher.supernet).items()}  # fmt: skip
    for path, decision in decisions(searcher.supernet).items():
        decision.logits.data.copy_(before[path])
    searcher.supernet.train()
    other, _ = composed()
    other.supernet.load_state_dict(searcher.supernet.state_dict())
    other.draw(loop.generator, learning=True)
    (target,) = searcher.targets.values()
    prices = searcher.problem.prices["latency"]
    loss = F.cross_entropy(other.supernet.train()(batch[0]), batch[1])
    loss = loss + (expected(other.supernet, prices) / target - 1).abs()
    wanted = torch.autograd.grad(loss, logits(other.supernet))
    weight = searcher.supernet.get_parameter("1.conv.fp32.weight").detach().clone()
    searcher.weight_step(loop, batch)
    for (path, decision), gradient in zip(decisions(searcher.supernet).items(), wanted, strict=True):
        step = 0.5 * (gradient + 0.1 * before[path])
        torch.testing.assert_close(decision.logits.detach(), before[path] - step)
    assert not torch.equal(searcher.supernet.get_parameter("1.conv.fp32.weight"), weight)
    assert searcher.supernet.get_submodule("1.conv.int8").weight is searcher.supernet.get_parameter(
        "1.conv.fp32.weight"
    )


def test_the_expected_cost_goes_to_the_budget(tmp_path):
    harmless = {path: {"fp32": 2.0, "int8": 1.0} for path in one_is_misled_in_int8("first").reference}  # pyright: ignore
    prices = Prices(0.1, harmless, "ms")
    problem = problem_of(lambda: one_is_misled_in_int8("first"), task=stripes(96), prices=prices)
    problem.budgets = [[Budget("latency", 6.1, "ms")]]
    steps = Steps(epochs=8, warmup_epochs=0, batch_size=16, architecture_optimizer="sgd", architecture_rate=0.3)
    with new_run(tmp_path / "run") as run:
        (values,) = EdMIPS(steps=steps).search(problem, run)
    costs = [event["expected"]["latency"] for event in read_events(tmp_path / "run") if event["kind"] == "search_epoch"]
    assert abs(costs[-1] - 6.1) < abs(costs[0] - 6.1)
    assert max(values["first.conv"], key=lambda option: values["first.conv"][option]) == "fp32"


def test_what_cannot_be():
    with pytest.raises(UserError, match=r"in one step: steps.rhythm is 1; allowed: 0"):
        EdMIPS(steps=Steps(rhythm=1))
    assert "numbers of bits" in EdMIPS().refuses(decisions(searched())["2.weight_quantizer"])  # quantisers, no layers
