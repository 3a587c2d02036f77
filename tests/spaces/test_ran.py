"""RAN-i and RAN-e: the published counts, NN-mass, and what the released code gets wrong when it builds twice."""

import pytest
import torch
from torch import nn

from netsmith.blocks.collapsible import CollapsedBlock
from netsmith.blocks.convnext import ChannelNorm, ConvNeXtBlock
from netsmith.blocks.mobile import MBConv
from netsmith.cost.counts import Macs, Params
from netsmith.errors import UserError
from netsmith.ship.export import fold
from netsmith.spaces.networks import NETWORKS, RESOLUTIONS
from netsmith.spaces.ran import CONVNEXTS, RAN_I, Halved, convnext, multipliers, nn_mass, ran_e, rescaled

COUNTS = [
    # Parameters, MACs in units of the second [ran.md]; ConvNeXt's parameters as torchvision counts them. The sheet has
    # 3.29 G for RAN-i-T and 15.36 G for ConvNeXt-B: 3.2847 and 15.3547, rounded twice.
    ("convnext_t", 28_589_128, 4.46e9, 0.01e9),
    ("convnext_s", 50_223_688, 8.68e9, 0.01e9),
    ("convnext_b", 88_591_464, 15.35e9, 0.01e9),
    ("ran_i_t", 20_760_131, 3.28e9, 0.01e9),
    ("ran_i_s", 28_932_376, 4.58e9, 0.01e9),
    ("ran_i_b", 52_889_769, 8.43e9, 0.01e9),
    ("ran_e_gt", 4_486_680, 434.4e6, 0.1e6),
    ("ran_e_c", 4_634_872, 489e6, 1e6),
]
NAMES = [name for name, *_ in COUNTS]


@pytest.mark.parametrize(("name", "params", "macs", "digit"), COUNTS)
def test_counts(name, params, macs, digit):
    with torch.device("meta"):
        network = NETWORKS[name]()
    shape = (3, RESOLUTIONS[name], RESOLUTIONS[name])
    assert Params()(network, shape) == params
    assert round(Macs()(network, shape) / digit) == round(macs / digit)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ran_i_t", 20.8), ("ran_i_s", 28.9), ("ran_i_b", 52.9), ("ran_e_gt", 4.49), ("ran_e_c", 4.63)],
)
def test_parameters_as_the_sheet_has_them(name, millions):
    params = next(params for known, params, *_ in COUNTS if known == name)
    assert round(params / 1e6, len(str(millions).partition(".")[2])) == millions


def test_base_has_1_82_times_fewer_macs_than_convnext_base():
    with torch.device("meta"):
        large, small = (Macs()(NETWORKS[name](), (3, 224, 224)) for name in ("convnext_b", "ran_i_b"))
    assert round(large / small, 2) == 1.82


# RAN-i ----------------------------------------------------------------------------------------------------------------

SCALED = {
    "t": ((5, 5, 15, 5), (64, 128, 256, 511), 14_710),
    "s": ((5, 5, 15, 5), (76, 151, 303, 606), 17_420),
    "b": ((7, 7, 21, 7), (87, 175, 350, 699), 28_154),
}


@pytest.mark.parametrize("size", SCALED)
def test_blocks_channels_and_nn_mass_of_ran_i(size):
    width, depth, _ = RAN_I[size]
    depths, dims, mass = SCALED[size]
    assert rescaled(width, depth) == (depths, dims)
    assert nn_mass(depths, dims) == mass
    with torch.device("meta"):
        network = NETWORKS[f"ran_i_{size}"]()
    blocks = [m for m in network.modules() if isinstance(m, ConvNeXtBlock)]
    assert sum(2 * block.norm.normalized_shape[0] for block in blocks) == mass


@pytest.mark.parametrize(("size", "mass"), [("t", 13_248), ("s", 27_072), ("b", 36_096)])
def test_nn_mass_of_convnext(size, mass):
    depths, dims, _ = CONVNEXTS[size]
    assert nn_mass(depths, dims) == mass


@pytest.mark.parametrize(("width", "depth"), [(0.5, 3.0), (0.666, 1.65), (1.3, 0.7)])
def test_nn_mass_is_linear_in_width_times_depth_before_rounding(width, depth):
    depths, dims, _ = CONVNEXTS["t"]
    scaled = nn_mass([depth * d for d in depths], [width * w for w in dims])
    assert scaled == pytest.approx(width * depth * nn_mass(depths, dims), rel=1e-12)


@pytest.mark.parametrize(("macs", "mass"), [(1.0, 1.3), (0.74, 1.11), (1.89, 2.1), (0.5, 1.0)])
def test_multipliers_hit_both_ratios(macs, mass):
    width, depth = multipliers(macs, mass)
    assert width**2 * depth == pytest.approx(macs)
    assert width * depth == pytest.approx(mass)


def test_multipliers_lead_to_a_network_of_the_asked_cost():
    """ConvNeXt-T's MACs and the NN-mass of RAN-i-S, but for what rounding blocks and widths leaves open."""
    width, depth = multipliers(1.0, 17_420 / 13_248)
    depths, dims = rescaled(width, depth, divisor=8)
    assert all(dim % 8 == 0 for dim in dims)
    with torch.device("meta"):
        base, found = convnext(), convnext(width=width, depth=depth, divisor=8)
    ratio = Macs()(found, (3, 224, 224)) / Macs()(base, (3, 224, 224))
    assert ratio == pytest.approx(1, rel=0.1)
    assert nn_mass(depths, dims) == pytest.approx(17_420, rel=0.1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rescaled(1, 0.1), r"leave blocks \(0, 0, 1, 0\)"),
        (lambda: rescaled(0.001, 1), "with channels"),
        (lambda: rescaled(1, 1, size="xl"), "unknown ConvNeXt 'xl'"),
        (lambda: multipliers(0, 1), "above 0; given: 0 and 1"),
        (lambda: ran_e("a"), "unknown RAN-e 'a'"),
    ],
)
def test_what_cannot_be(call, said):
    with pytest.raises(UserError, match=said):
        call()


# networks -------------------------------------------------------------------------------------------------------------


def test_convnext_is_timms():
    import timm

    mine, other = convnext(classes=10).eval(), timm.create_model("convnext_tiny", num_classes=10).eval()
    blocks = [m for m in other.modules() if type(m).__name__ == "ConvNeXtBlock"]
    with torch.no_grad():
        for block in blocks:  # at 1e-6 a wrong block would not be seen
            block.gamma.normal_()
        kinds = (nn.Conv2d, nn.LayerNorm, nn.Linear)
        layers = [[m for m in network.modules() if isinstance(m, kinds)] for network in (mine, other)]
        ordered = [m for m in layers[1] if m is not other.head.norm and m is not other.head.fc]
        for a, b in zip(layers[0], [*ordered, other.head.norm, other.head.fc], strict=True):
            a.load_state_dict(b.state_dict())
        for a, b in zip((m for m in mine if isinstance(m, ConvNeXtBlock)), blocks, strict=True):
            a.scale.copy_(b.gamma)
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(mine(x), other(x), rtol=1e-3, atol=1e-4)


def test_channels_are_normalised_pixel_by_pixel():
    norm = ChannelNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight[:, None, None] + norm.bias[:, None, None])


def test_drop_path_of_ran_i_grows_to_its_rate():
    with torch.device("meta"):
        network = NETWORKS["ran_i_t"]()
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in network if isinstance(m, ConvNeXtBlock)]
    assert rates == pytest.approx([0.1 * i / 29 for i in range(30)])


@pytest.mark.parametrize(
    ("variant", "kernels", "collapsed"),
    [
        # Of inverted bottlenecks the kernel, 0 for collapsed blocks; the halved block is two units.
        ("gt", [0, 0, 0, 0, 5, 5, 3, 3, 0, 0, 7, 3, 3, 3, 5, 5], 6),
        ("c", [0, 0, 3, 0, 5, 0, 5, 0, 3, 3, 3, 0, 7, 3, 0, 5, 5], 7),
    ],
)
def test_blocks_of_ran_e(variant, kernels, collapsed):
    with torch.device("meta"):
        network = ran_e(variant)
    found = [m for m in network.modules() if isinstance(m, MBConv | CollapsedBlock)]
    assert [m.options["kernel"] if isinstance(m, MBConv) else 0 for m in found] == kernels
    assert kernels.count(0) == collapsed
    (halved,) = (m for m in network if isinstance(m, Halved))
    outputs = [m.out_channels for m in halved.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(outputs) == ([64, 128] if variant == "gt" else [64, 128, *[768] * 4])
    assert type(network[0]) is nn.Conv2d  # the stem is linear


@pytest.mark.parametrize("name", NAMES)
def test_building_twice_gives_the_same_network(name):
    """The released `ran_e()` writes strides and filters into a shared table: a second network differs."""
    with torch.device("meta"):
        first, second = (NETWORKS[name]() for _ in range(2))
    assert str(first) == str(second)
    assert [(n, p.shape) for n, p in first.named_parameters()] == [(n, p.shape) for n, p in second.named_parameters()]
    shape = (3, 224, 224)
    assert Macs()(first, shape) == Macs()(second, shape)


@pytest.mark.parametrize(
    ("name", "options"), [("ran_e_gt", {"stem_stride": 1}), ("ran_e_c", {"stem_stride": 1}), ("ran_i_t", {"patch": 1})]
)
def test_small_images_run_forward_and_backward(name, options):
    network = NETWORKS[name](classes=10, channels=1, **options)
    y = network(torch.randn(2, 1, 32, 32))
    assert y.shape == (2, 10)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("variant", ["gt", "c"])
def test_ran_e_folds(variant):
    network = ran_e(variant, 10, stem_stride=1)
    x = torch.randn(4, 3, 32, 32)
    network(x)  # statistics other than those of the start
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(fold(network)(x), network(x), rtol=1e-4, atol=1e-4)
