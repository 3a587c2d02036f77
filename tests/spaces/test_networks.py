"""The literature's networks: counts to the unit, shapes, padding, and what the plug-ins change."""

import math

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, MBConv, pad_same
from netsmith.cost.counts import Macs, Params
from netsmith.errors import UserError
from netsmith.spaces.networks import HALF, NETWORKS, RESOLUTIONS, efficientnet, resnet50

COUNTS = [
    # [efficientnet.md, prunet.md]; ResNet-50 as torchvision counts it
    ("efficientnet_b0", 5_288_548, 0.3858),
    ("efficientnet_b1", 7_794_184, 0.6868),
    ("efficientnet_b2", 9_109_994, 0.9936),
    ("efficientnet_b3", 12_233_232, 1.8271),
    ("efficientnet_b4", 19_341_616, 4.3938),
    ("efficientnet_b5", 30_389_784, 10.2664),
    ("efficientnet_b6", 43_040_704, 19.0676),
    ("efficientnet_b7", 66_347_960, 37.7459),
    ("efficientnet_v2_s", 21_458_488, 5.308),
    ("gpunet_0", 11_885_432, 3.309),
    ("gpunet_1", 12_704_192, 3.375),
    ("gpunet_2", 25_798_704, 8.709),
    ("gpunet_p0", 22_815_080, 1.870),
    ("gpunet_p1", 39_905_672, 3.242),
    ("resnet50", 25_557_032, 4.089),
]


def counted(network: nn.Module, resolution: int) -> tuple[float, float]:
    shape = (3, resolution, resolution)
    return Params()(network, shape), Macs()(network, shape) / 1e9


@pytest.mark.parametrize(("name", "params", "gmacs"), COUNTS)
def test_parameters_to_the_unit(name, params, gmacs):
    with torch.device("meta"):
        found = counted(NETWORKS[name](), RESOLUTIONS[name])
    digits = len(str(gmacs).partition(".")[2])
    assert found[0] == params
    assert round(found[1], digits) == pytest.approx(gmacs, abs=10**-digits)


# Millions of parameters, GMAC at the native size and at half [more-efficient-efficientnet.md].
GROUPED = {
    "b0": (5.914, 0.6347, 0.3246),
    "b1": (8.332, 1.1117, 0.6060),
    "b2": (9.504, 1.5225, 0.8909),
    "b3": (12.591, 2.7309, 1.2907),
    "b4": (19.328, 6.1832, 2.7430),
    "b5": (28.715, 13.5012, 7.0965),
}


@pytest.mark.parametrize("size", GROUPED)
def test_groups_of_16_at_both_sizes(size):
    with torch.device("meta"):
        network = NETWORKS[f"efficientnet_{size}_g16"]()
    millions, native, half = GROUPED[size]
    params, gmacs = counted(network, RESOLUTIONS[f"efficientnet_{size}"])
    assert round(params / 1e6, 3) == millions
    assert round(gmacs, 4) == native
    assert round(counted(network, HALF[size])[1], 4) == half


@pytest.mark.parametrize(
    ("group", "expansion", "millions", "gmacs"),
    [
        (2, 6, 5.471, 0.4203),
        (4, 6, 5.835, 0.4894),
        (4, 5, 5.146, 0.4167),
        (4, 4, 4.457, 0.3440),
        (8, 6, 6.563, 0.6275),
        (8, 4, 4.942, 0.4409),
        (16, 6, 8.019, 0.9038),
        (32, 4, 7.857, 1.0223),
        (64, 4, 11.925, 1.8835),
    ],
)
def test_other_groups_of_b0(group, expansion, millions, gmacs):
    with torch.device("meta"):
        params, macs = counted(efficientnet("b0", group_size=group, expansion=float(expansion)), 224)
    assert round(params / 1e6, 3) == millions
    assert round(macs, 4) == gmacs


def test_a_width_that_its_groups_do_not_divide():
    with pytest.raises(UserError, match="120 channels do not divide into 7 groups"):
        efficientnet("b0", group_size=16, expansion=5.0)


def test_squeezes_are_a_quarter_of_the_blocks_inputs():
    with torch.device("meta"):
        blocks = [m for m in efficientnet("b0").modules() if isinstance(m, MBConv)]
    squeezes = [block.squeeze.reduce.out_channels for block in blocks]
    assert squeezes == [8, 4, 6, 6, 10, 10, 20, 20, 20, 28, 28, 28, 48, 48, 48, 48][: len(squeezes)]


def test_drop_path_grows_from_0():
    with torch.device("meta"):
        blocks = [m for m in efficientnet("b0").modules() if isinstance(m, MBConv)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    for number, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
        assert rate == pytest.approx(0.2 * number / 16 if block.residual else 0.0)


def test_resnet_is_torchvisions():
    import torchvision.models as tv

    mine, other = resnet50(10).eval(), tv.resnet50(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(running(mine, x), running(other, x), strict=True):
        a.load_state_dict(b.state_dict())
    with torch.no_grad():
        assert torch.allclose(mine(x), other(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kernel", "padding"), [(3, (0, 1)), (5, (1, 2))])
def test_a_stride_pads_behind_as_tensorflow_does(kernel, padding):
    x = torch.ones(1, 1, 8, 8)
    padded = pad_same(x, kernel, 2)
    before, behind = padding
    assert padded.shape[-1] == 8 + before + behind
    assert torch.equal(padded[..., before : before + 8, before : before + 8], x)
    assert padded.sum() == 64


@pytest.mark.parametrize("size", [240, 260, 300, 456, 32])
def test_both_paddings_give_the_same_shapes_and_other_numbers(size):
    ours, theirs = (ConvBn(1, 1, 5, stride=2, same=same).eval() for same in (False, True))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, size, size)
    with torch.no_grad():
        a, b = ours.normalised(x), theirs.normalised(x)
    assert a.shape == b.shape == (1, 1, math.ceil(size / 2), math.ceil(size / 2))
    assert not torch.allclose(a, b)


def test_a_group_as_large_as_the_width_is_a_dense_convolution():
    dense, grouped = MBConv(8, 8, hidden=16, group_size=64), MBConv(8, 8, hidden=16, group_size=4)
    assert dense.depthwise.conv.groups == 1
    assert grouped.depthwise.conv.groups == 4
    assert MBConv(8, 8, hidden=16).depthwise.conv.groups == 16


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b0_g16_pn", "efficientnet_v2_s", "resnet50"])
def test_small_images_run_forward_and_backward(name):
    network = NETWORKS[name](classes=10, channels=1)
    y = network(torch.randn(2, 1, 64, 64))
    assert y.shape == (2, 10)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ({"norm": "batc"}, "did you mean 'batch'"),
        ({"nrom": "batch"}, "unknown option of a network, 'nrom'; did you mean 'norm'"),
        ({"group_size": 0}, "group_size is 0; allowed: 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_styles_that_do_not_exist(style, said):
    with pytest.raises(UserError, match=said):
        efficientnet("b0", **style)


def running(network: nn.Module, x: torch.Tensor) -> list[nn.Module]:
    """Layers with numbers, in the order they run."""
    order: list[nn.Module] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    hooks = [m.register_forward_hook(lambda m, *_: order.append(m)) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return order
