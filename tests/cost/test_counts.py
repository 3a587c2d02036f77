"""Counted costs against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv
from netsmith.cost.counts import FileBytes, Macs, Params, to_meta

SHAPE = (16, 10, 10)

BY_HAND = [
    # module, parameters, of which norms have 2 per channel, MACs at 16x10x10
    (ConvBn(16, 24, 3), 16 * 24 * 9 + 2 * 24, 16 * 24 * 9 * 100),
    (ConvBn(16, 24, 3, stride=2), 16 * 24 * 9 + 2 * 24, 16 * 24 * 9 * 25),
    (ConvBn(16, 16, 5, groups=16), 16 * 25 + 2 * 16, 16 * 25 * 100),
    (ConvBn(16, 24, groups=2), 8 * 24 + 2 * 24, 8 * 24 * 100),
    (
        MBConv(16, 24, kernel=5, hidden=48, stride=2),
        16 * 48 + 48 * 25 + 48 * 24 + 2 * (48 + 48 + 24),
        16 * 48 * 100 + 48 * 25 * 25 + 48 * 24 * 25,
    ),
    (
        MBConv(16, 16, hidden=48, squeeze=4),
        16 * 48 + 48 * 9 + 48 * 16 + 2 * (48 + 48 + 16) + 48 * 4 + 4 + 4 * 48 + 48,
        (16 * 48 + 48 * 9 + 48 * 16) * 100 + 2 * 48 * 4,
    ),
    (
        MBConv(16, 24, hidden=32, groups=2),
        8 * 32 + 32 * 9 + 16 * 24 + 2 * (32 + 32 + 24),
        (8 * 32 + 32 * 9 + 16 * 24) * 100,
    ),
    (
        FusedMBConv(16, 24, hidden=48, stride=2),
        16 * 48 * 9 + 48 * 24 + 2 * (48 + 24),
        (16 * 48 * 9 + 48 * 24) * 25,
    ),
    (Head(16, 32, 10), 16 * 32 + 2 * 32 + 32 * 10 + 10, 16 * 32 * 100 + 32 * 10),
    (nn.Identity(), 0, 0),
]


@pytest.mark.parametrize(
    ("module", "params", "macs"), BY_HAND, ids=lambda v: repr(v) if isinstance(v, nn.Module) else ""
)
def test_by_hand(module, params, macs):
    assert Params()(module, SHAPE) == params
    assert Macs()(module, SHAPE) == macs
    folded = sum(norm.num_features for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))
    assert FileBytes()(module, SHAPE) == 4 * (params - folded)


@pytest.mark.parametrize("kind", [MBConv, FusedMBConv])
@pytest.mark.parametrize("cost", [Params(), Macs(), FileBytes()])
def test_monotone_in_the_width(kind, cost):
    row = [cost(kind(16, 24, hidden=width), SHAPE) for width in range(4, 64, 4)]
    assert row == sorted(set(row))


def test_a_wrong_shape_raises():
    with pytest.raises(RuntimeError):
        Macs()(ConvBn(16, 24), (3, 8, 8))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counting_leaves_the_module_alone(device):
    module = ConvBn(16, 24).to(device).train()
    before = dict(module.state_dict(keep_vars=True))
    Macs()(module, SHAPE)
    assert module.training
    assert module.bn.training
    assert all(tensor is before[name] for name, tensor in module.state_dict(keep_vars=True).items())
    shadow = to_meta(module)
    assert not shadow.training
    assert all(isinstance(p, nn.Parameter) and p.device.type == "meta" for p in shadow.parameters())


def test_half_the_flop_counters_number():
    from torch.utils.flop_counter import FlopCounterMode

    module = MBConv(16, 16, hidden=48, squeeze=4)
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *SHAPE))
    assert Macs()(module, SHAPE) == counter.get_total_flops() / 2


def test_tied_weights_count_once():
    module = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    module[1].weight = module[0].weight
    assert Params()(module, SHAPE) == 256 + 32
    assert Macs()(module, SHAPE) == 2 * 256 * 100
