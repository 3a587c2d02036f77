"""Bytes and bit operations against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.blocks.quantized import LSQ, Codebook, Fixed, Float, RunningRange, quantized
from netsmith.blocks.reparam import Branches
from netsmith.cost.bits import BitOps, Layer, QuantizedFileBytes, layers
from netsmith.cost.counts import FileBytes, Macs
from netsmith.cost.prices import tabulate
from netsmith.decisions import OneOf, derive
from netsmith.errors import UserError
from netsmith.spaces.from_model import in_either

SHAPE = (3, 8, 8)


def network() -> nn.Sequential:
    return nn.Sequential(
        ConvBn(3, 8, 3, stride=2), ConvBn(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


TABLE = {"0.conv": Layer(216 * 16, 216), "1.conv": Layer(72 * 16, 72), "4": Layer(40, 40)}


def test_layers_by_hand():
    found = layers(network(), SHAPE)
    assert found == TABLE
    assert list(found) == list(TABLE)
    assert sum(layer.macs for layer in found.values()) == Macs()(network(), SHAPE)
    assert found["0.conv"].weight_bytes(4) == 108
    assert found["0.conv"].bitops(4, 8) == 216 * 16 * 32


@pytest.mark.parametrize("model", [network(), MBConv(3, 8, hidden=16, squeeze=4), Branches(3, 8)], ids=lambda m: "")
def test_floating_point_is_1024_a_mac(model):
    assert BitOps()(model, SHAPE) == 1024 * Macs()(model, SHAPE)
    assert QuantizedFileBytes()(model, SHAPE) == FileBytes()(model, SHAPE)


def test_32_bits_are_floating_point():
    model = quantized(network(), {path: (Float(), Float()) for path in TABLE})
    assert BitOps()(model, SHAPE) == 1024 * Macs()(model, SHAPE)
    assert layers(model, SHAPE) == TABLE
    assert QuantizedFileBytes()(model, SHAPE) == FileBytes()(network(), SHAPE)


def test_mixed_bits_by_hand():
    model = network()
    quantizers = {"0.conv": (LSQ(4), RunningRange(8)), "4": (Codebook(model[4].weight, 2), Float())}
    made = quantized(model, quantizers)
    assert BitOps()(made, SHAPE) == 216 * 16 * 4 * 8 + 72 * 16 * 1024 + 40 * 2 * 32
    # weights at their bits, one bias a folded norm, the head's bias, LSQ's scale, four centroids
    assert QuantizedFileBytes()(made, SHAPE) == 216 * 4 / 8 + 72 * 4 + 40 * 2 / 8 + 4 * (8 + 8 + 5 + 1 + 4)


def test_bit_operations_add_up_over_layers():
    space = in_either(network(), SHAPE)
    prices = tabulate(space, BitOps(), SHAPE)
    for path, layer in TABLE.items():
        assert prices.options[path] == {"fp32": layer.macs * 1024.0, "int8": layer.macs * 64.0}
    chosen = {"0.conv": "int8", "1.conv": "fp32", "4": "int8"}
    assert prices.of(chosen) == BitOps()(derive(space, chosen), SHAPE) == (216 * 16 + 40) * 64 + 72 * 16 * 1024


def test_monotone_in_the_bits():
    def made(bits: int) -> nn.Module:
        return quantized(network(), {"0.conv": (Fixed(torch.clone, bits), RunningRange(bits))})

    for cost in (BitOps(), QuantizedFileBytes()):
        row = [cost(made(bits), SHAPE) for bits in range(1, 33)]
        assert row == sorted(set(row))


def test_a_layer_that_runs_twice_costs_twice_the_macs():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert layers(nn.Sequential(conv, conv), SHAPE) == {"0": Layer(2 * 81 * 64, 81)}
    made = quantized(nn.Sequential(conv, conv), {"0": (Float(), RunningRange(8))})
    assert BitOps()(made, SHAPE) == 2 * 81 * 64 * 32 * 8


def test_what_does_not_run_costs_no_operations():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].add_module("idle", quantized(nn.Conv2d(3, 4, 1), {"": (LSQ(2), Float())}))
    assert list(layers(model, SHAPE)) == ["0"]
    assert BitOps()(model, SHAPE) == 1024 * 12 * 64


def test_open_bits_have_no_price():
    model = quantized(network(), {"4": (OneOf({"2": LSQ(2), "4": LSQ(4)}), Float())})
    for cost in (BitOps(), QuantizedFileBytes()):
        with pytest.raises(UserError, match="the bits of '4' are still open"):
            cost(model, SHAPE)
