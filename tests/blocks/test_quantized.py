"""Layers with quantisers: what they compute, what they learn, what they remember."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith.blocks.codebooks import bwn, twn
from netsmith.blocks.quantized import (
    LSQ,
    PACT,
    SMALLEST,
    TTQ,
    Codebook,
    Fixed,
    Float,
    QuantConv2d,
    QuantLinear,
    RunningRange,
    layer_bits,
    quantized,
)
from netsmith.blocks.quantizers import affine, dorefa_weight, lsq_scale, pact, span, symmetric
from netsmith.decisions import OneOf
from netsmith.errors import UserError


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5, bias=False)
    )


def weights(bits: int) -> Fixed:
    return Fixed(lambda w: symmetric(*span(w, 0), bits)(w), bits)


QUANTIZERS = {
    "symmetric": lambda w: weights(4),
    "dorefa": lambda w: Fixed(functools.partial(dorefa_weight, bits=3), 3),
    "bwn": lambda w: Fixed(bwn, 1),
    "twn": lambda w: Fixed(twn, 2),
    "ttq": lambda w: TTQ(),
    "lsq": lambda w: LSQ(3),
    "lsq per channel": lambda w: LSQ(3, channels=len(w)),
    "codebook": lambda w: Codebook(w, 3),
}


def test_a_quantised_layer_is_the_layer_on_quantised_numbers():
    model, x = network(), torch.rand(2, 3, 8, 8)
    ranges = RunningRange(8), RunningRange(4)
    made = quantized(model, {"0": (weights(4), ranges[0]), "3": (weights(8), ranges[1])})
    y = made(x)
    conv, _, _, head = model
    hidden = F.conv2d(affine(*span(x), 8)(x), weights(4)(conv.weight), conv.bias, stride=2, padding=1).relu().flatten(1)
    assert torch.equal(y, F.linear(affine(*span(hidden), 4)(hidden), weights(8)(head.weight)))
    assert isinstance(made[0], QuantConv2d)
    assert isinstance(made[3], QuantLinear)
    assert layer_bits("0", made[0]) == (4, 8)


def test_the_network_stays_as_it_was():
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    made = quantized(model, {"0": (weights(4), Float())})
    with torch.no_grad():
        made[0].weight.add_(1)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert made.state_dict().keys() == before.keys(), "trained weights load"
    assert not made[0].training


def test_without_bits_nothing_changes():
    model, x = network(), torch.rand(2, 3, 8, 8)
    made = quantized(model, {path: (Float(), Float()) for path in ("0", "3")})
    assert torch.equal(made(x), model(x))
    assert layer_bits("3", made[3]) == (32, 32)


def test_a_layer_in_two_places_and_settings_out_of_the_ordinary():
    conv = nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular")
    model, x = nn.Sequential(conv, nn.ReLU(), conv).double(), torch.rand(1, 4, 9, 9, dtype=torch.float64)
    made = quantized(model, {"0": (Float(), Float())})
    assert made[0] is made[2]
    assert torch.equal(made(x), model(x))
    alone = quantized(conv, {"": (weights(2), Float())})
    assert isinstance(alone, QuantConv2d)


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize("path", ["1", "9", "own"])
def test_what_cannot_be_quantised(path):
    model = network()
    model.add_module("own", Own(8, 8, 1))
    with pytest.raises(UserError, match=f"only plain convolutions and linear layers can be quantised; '{path}' is"):
        quantized(model, {path: (Float(), Float())})


def test_open_bits_are_named():
    layer = QuantLinear(nn.Linear(4, 4), OneOf({"2": weights(2), "4": weights(4)}), Float())
    with pytest.raises(UserError, match="the bits of 'head' are still open"):
        layer_bits("head", layer)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_weight_quantizer_trains(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    quantizer = QUANTIZERS[name](layer.weight)
    model = QuantConv2d(layer, quantizer, LSQ(4, signed=False, per_sample=True))
    x, wanted = torch.rand(16, 3, 6, 6), torch.rand(16, 8, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    used = quantizer(layer.weight)
    for row in used if name in ("symmetric", "bwn", "lsq per channel") else [used]:
        assert len(row.unique()) <= 2**quantizer.bits
    clone = copy.deepcopy(model)
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone.eval()(x), model.eval()(x))


def test_running_ranges():
    ranges = RunningRange(8, momentum=0.9)
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 1.0])
    ranges(first)
    assert (ranges.low, ranges.high) == (-1, 3)
    y = ranges(second)
    assert float(ranges.low) == pytest.approx(-1.1)
    assert float(ranges.high) == pytest.approx(2.8)
    assert torch.equal(y, affine(ranges.low, ranges.high, 8)(second))
    assert RunningRange(8).momentum == 0.99
    ranges.eval()(torch.tensor([100.0]))
    assert float(ranges.high) == pytest.approx(2.8)


def test_ranges_after_a_relu_are_unsigned():
    ranges = RunningRange(4)
    ranges(torch.randn(100).relu())
    assert ranges.grid().zero == 0
    assert ranges.grid().low == 0
    signed = RunningRange(8, symmetric)
    signed(torch.randn(100))
    assert signed.grid().zero == 0
    assert signed.grid().low == -128


def test_nothing_seen_is_no_number():
    x = torch.randn(3, 4)
    for quantizer in (RunningRange(8), LSQ(4), TTQ()):
        assert quantizer.eval()(x).isnan().any()
        assert quantizer.train()(x).isfinite().all()


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (8, 12)])
def test_lsq_starts_from_the_first_batch_alone(shape):
    first, second = torch.randn(shape), torch.randn(shape)
    for channels in (None, 8):
        quantizer = LSQ(4, channels=channels)
        scale = quantizer.scale
        quantizer(first)
        expected = lsq_scale(first, 7, None if channels is None else 0)
        quantizer(second)
        assert quantizer.scale is scale, "the parameter that an optimizer knows"
        assert torch.equal(scale, expected)
        assert scale.dim() == (0 if channels is None else 1)


@pytest.mark.parametrize(
    ("quantizer", "count"),
    [(LSQ(3), 8 * 12), (LSQ(3, channels=8), 12), (LSQ(3, signed=False, per_sample=True), 12)],
)
def test_how_many_share_a_scale(quantizer, count):
    """A known trap: the whole tensor's count for each channel's scale."""
    x = torch.rand(8, 12, dtype=torch.float64)
    quantizer.double()(x).sum().backward()
    scale = quantizer.scale.detach().view(-1, *[1] * quantizer.scale.dim())
    v = x / scale
    each = torch.where(v >= quantizer.high, quantizer.high, v.round() - v)
    summed = each.sum(1) if quantizer.scale.dim() else each.sum()
    assert torch.allclose(quantizer.scale.grad, summed / (count * quantizer.high) ** 0.5)


def test_learned_scales_stay_above_zero():
    x = torch.randn(4, 4)
    for quantizer in (LSQ(4), PACT(4), TTQ()):
        quantizer(x)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.fill_(-1.0)
        assert quantizer(x).isfinite().all()
        assert all(parameter == torch.tensor(SMALLEST) for parameter in quantizer.parameters())


def test_a_layer_may_run_twice_in_a_step():
    """What keeps a scale positive must not disturb the gradient of an earlier pass."""
    layer = QuantLinear(nn.Linear(4, 4), LSQ(4), LSQ(4, per_sample=True))
    (layer(layer(torch.randn(2, 4)))).sum().backward()
    assert layer.weight_quantizer.scale.grad.isfinite()


def test_pact_learns_its_ceiling():
    quantizer, x = PACT(4, start=2.0), torch.tensor([-1.0, 1.0, 5.0])
    y = quantizer(x)
    assert torch.equal(y, pact(x, torch.tensor(2.0), 4))
    y.sum().backward()
    assert quantizer.alpha.grad == 1


def test_ttq_starts_at_the_means_of_what_it_replaces():
    quantizer = TTQ()
    y = quantizer(torch.tensor([1.0, 0.5, 0.0, -0.2]))
    assert y.tolist() == pytest.approx([0.75, 0.75, 0, -0.2])


def test_a_centroid_gets_the_summed_gradient_of_its_members():
    weight = torch.randn(6, 5)
    quantizer = Codebook(weight, 2)
    upstream = torch.randn(6, 5)
    (upstream * quantizer(weight)).sum().backward()
    sums = torch.stack([upstream[quantizer.codes == index].sum() for index in range(4)])
    assert torch.allclose(quantizer.centroids.grad, sums)


def test_they_print_their_bits():
    text = repr(quantized(network(), {"0": (LSQ(3), RunningRange(8))}))
    assert "LSQ(3 bits, -4..3)" in text
    assert "RunningRange(8 bits, affine)" in text
