"""AmoebaNet: the cells as published, and the counts that the paper's table has for A."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith.cost.counts import Macs, Params
from netsmith.errors import UserError
from netsmith.spaces.amoebanet import CELLS, AmoebaNet, Cell, Halve, amoebanet, operation


@pytest.mark.parametrize(
    ("cells", "width", "resolution", "millions", "gmacs"),
    [(18, 190, 331, 86.7, 23.1), (12, 50, 224, 5.1, 0.555)],
    ids=["N6 F190", "N4 F50"],
)
def test_amoebanet_a_has_the_papers_counts(cells, width, resolution, millions, gmacs):
    with torch.device("meta"):
        network = amoebanet("a", cells=cells, width=width)
    shape = (3, resolution, resolution)
    assert round(Params()(network, shape) / 1e6, 1) == millions
    assert Macs()(network, shape) / 1e9 == pytest.approx(gmacs, abs=0.05 if gmacs > 1 else 0.0005)


@pytest.mark.parametrize(("width", "millions"), [(32, 2.6), (36, 3.2)])
def test_amoebanet_a_on_small_images(width, millions):
    with torch.device("meta"):
        network = amoebanet("a", 10, cells=18, width=width, stem=3 * width, small=True)
    assert round(Params()(network, (3, 32, 32)) / 1e6, 1) == millions


def test_amoebanet_d_keeps_its_counts():
    """There is no published number: this one is ours, of the network whose sibling A has the published ones."""
    with torch.device("meta"):
        network = amoebanet("d")
    assert Params()(network, (3, 224, 224)) == 121_911_016


@pytest.mark.parametrize(
    ("cell", "kind", "output"),
    [
        ("d", "normal", [0, 3, 4, 6]),
        ("d", "reduction", [4, 5, 6]),
        ("a", "normal", [1, 3, 4, 6]),
        ("a", "reduction", [2, 3, 4, 5, 6]),
    ],
)
def test_what_a_cell_puts_out(cell, kind, output):
    assert Cell(*CELLS[cell][kind], 16, 16, 16, 1, halved=False).output == output


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("small", "resolution"), [(True, 32), (True, 9), (False, 75), (False, 64)])
def test_images_of_any_size_run_forward_and_backward(cell, small, resolution):
    network = amoebanet(cell, 5, cells=3, width=16, stem=8, small=small)
    y = network(torch.randn(2, 3, resolution, resolution))
    assert y.shape == (2, 5)
    y.square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert unused == []


def test_reductions_stand_between_the_stacks():
    with torch.device("meta"):
        network = amoebanet("d", cells=18)
    assert isinstance(network, AmoebaNet)
    strides = [len(cell.edges) == 10 and cell.output == [4, 5, 6] for cell in network.cells]
    assert [number for number, reduces in enumerate(strides) if reduces] == [0, 1, 8, 15]
    assert [cell.outputs for cell in network.cells][-1] == 4 * 1024


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_pools_do_not_see_their_padding(stride, size):
    x = torch.randn(2, 3, size, size) - 5
    padded = F.pad(x, pads(size, 3, stride), value=-torch.inf)
    assert torch.equal(operation("max3", 3, 3, stride)(x), F.max_pool2d(padded, 3, stride))
    ones = torch.ones_like(x)
    zeros, edge = (F.avg_pool2d(F.pad(t, pads(size, 3, stride)), 3, stride) for t in (x, ones))
    assert torch.allclose(operation("avg3", 3, 3, stride)(x), zeros / edge, atol=1e-6)
    assert torch.equal(operation("avg3", 3, 3, stride)(ones), torch.ones_like(edge))


def pads(size: int, kernel: int, stride: int) -> list[int]:
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return [total // 2, total - total // 2] * 2


def test_every_operation_keeps_or_halves_the_size():
    for name in ("none", "1x1", "3x3", "1x7", "avg3", "max3", "max2", "sep3", "sep5", "sep7"):
        for size in (8, 9):
            for stride in (1, 2):
                y = operation(name, 8, 16, stride).eval()(torch.randn(1, 8, size, size))
                assert y.shape == (1, 16, -(-size // stride), -(-size // stride)), (name, size, stride)
    assert isinstance(operation("none", 8, 8, 1), nn.Identity)
    assert Halve(8, 15)(torch.randn(2, 8, 9, 9)).shape == (2, 15, 5, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cell": "e"}, "unknown AmoebaNet 'e'"),
        ({"cells": 2}, "cells is 2; allowed: 3 or more"),
        ({"width": 4}, "width is 4; allowed: 16 or more"),
    ],
)
def test_what_cannot_be(given, said):
    with pytest.raises(UserError, match=said):
        amoebanet(**given)
