"""Layers of cells: counts by hand, shapes, printed keys, and a Zero that costs nothing."""

import pytest
import torch
from torch import nn

from netsmith.blocks.cells import DilConv, FactorizedReduce, Pool, ReluConvBn, SepConv, Zero, next_node
from netsmith.blocks.mobile import Classifier
from netsmith.cost.counts import FileBytes, Macs, Params
from netsmith.cost.memory import PeakMemory
from netsmith.decisions import Places
from netsmith.ship.export import fold

SHAPE = (16, 8, 8)

BY_HAND = [
    # layer, convolution weights, norm channels, MACs at 16x8x8
    (ReluConvBn(16, 24, 3), 16 * 24 * 9, 24, 16 * 24 * 9 * 64),
    (DilConv(16, 24, 5, stride=2), 16 * 25 + 16 * 24, 24, (16 * 25 + 16 * 24) * 16),
    (SepConv(16, 24, 3, stride=2), 2 * 16 * 9 + 16 * 16 + 16 * 24, 16 + 24, (2 * 16 * 9 + 16 * 16 + 16 * 24) * 16),
    (FactorizedReduce(16, 24), 16 * 24, 24, 16 * 24 * 16),
    (Pool(16, "avg", stride=2), 0, 0, 0),
    (Zero(2), 0, 0, 0),
]


@pytest.mark.parametrize(("layer", "weights", "norms", "macs"), BY_HAND, ids=lambda v: str(v).split("(")[0])
def test_by_hand(layer, weights, norms, macs):
    assert Params()(layer, SHAPE) == weights + 2 * norms
    assert Macs()(layer, SHAPE) == macs
    assert FileBytes()(layer, SHAPE) == 4 * (weights + norms)
    assert PeakMemory()(layer, SHAPE) > 0


@pytest.mark.parametrize("kind", [ReluConvBn, DilConv, SepConv])
def test_without_parameters_of_its_norms_the_same_file_ships(kind):
    plain, bare = kind(16, 16, 3), kind(16, 16, 3, affine=False)
    norms = sum(m.num_features for m in bare.modules() if isinstance(m, nn.BatchNorm2d))
    assert Params()(plain, SHAPE) - Params()(bare, SHAPE) == 2 * norms
    assert FileBytes()(bare, SHAPE) == FileBytes()(plain, SHAPE) == 4 * sum(p.numel() for p in fold(bare).parameters())
    assert repr(bare) == repr(plain)[:-1] + ", affine=False)"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 7])
def test_all_that_may_stand_on_an_edge_return_one_shape(stride, size):
    layers = [Pool(4, "max", stride=stride, norm=True), Pool(4, "avg", stride=stride), Zero(stride)]
    layers += [kind(4, 4, k, stride=stride) for kind in (SepConv, DilConv) for k in (3, 5)]
    x = torch.randn(2, 4, size, size)
    before = x.clone()
    assert {layer(x).shape for layer in layers} == {(2, 4, -(-size // stride), -(-size // stride))}
    assert torch.equal(x, before)  # other edges read it too


def test_a_key_is_what_makes_the_layer_again():
    layers = [layer for layer, *_ in BY_HAND] + [
        Pool(8, "max", norm=True),
        Classifier(8, 3),
        Classifier(8, 3, bn=True),
    ]
    layers += [SepConv(8, 8, 5, affine=False), Zero(), DilConv(8, 8, 3, dilation=1)]
    names = {kind.__name__: kind for kind in (ReluConvBn, DilConv, SepConv, FactorizedReduce, Pool, Zero, Classifier)}
    assert len({repr(layer) for layer in layers}) == len(layers)
    for layer in layers:
        twin = eval(repr(layer), names)
        assert repr(twin) == repr(layer)
        assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_the_factorised_reduction_sees_every_pixel_of_its_diagonals():
    layer = FactorizedReduce(1, 2, affine=False).eval()
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    layer(x).abs().sum().backward()
    assert (x.grad != 0).nonzero()[:, 2:].tolist() == [[i, j] for i in range(4) for j in range(4) if i % 2 == j % 2]


def test_a_node_adds_up_its_edges_and_leaves_zeros_out():
    doubling = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(doubling.weight, 2.0)
    edges = nn.ModuleDict({"0_2": Places([doubling]), "1_2": Places([Zero()])})
    a, b = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), float("nan"))
    assert torch.equal(next_node(edges, [a, b], 0), 2 * a)
    edges["0_2"] = Places([Zero()])
    assert torch.equal(next_node(edges, [a, b], 0), torch.zeros_like(a))
