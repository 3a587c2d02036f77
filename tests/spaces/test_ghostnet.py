"""GhostNet and RegNetX, plain and ghosted: counts to the unit, and the same functions as timm's."""

import pytest
import torch
from torch import nn

from netsmith.blocks.ghost import GGhostStage
from netsmith.cost.counts import Macs, Params
from netsmith.errors import UserError
from netsmith.spaces.ghostnet import REGNETX, g_ghost_regnetx, ghostnet, regnetx
from netsmith.spaces.networks import NETWORKS, RESOLUTIONS

SHAPE = (3, 224, 224)

GHOSTNETS = {
    "ghostnet_050": (2_587_292, 42_328_152),
    "ghostnet_100": (5_182_508, 141_150_512),
    "ghostnet_130": (7_358_820, 227_003_256),
}
"""Of 1.0x to the unit in the sheet, of the others to the digits it has: 2.59 and 7.36 M, 42.3 and 227.0 MMAC."""


@pytest.mark.parametrize("name", GHOSTNETS)
def test_ghostnets_to_the_unit(name):
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert RESOLUTIONS[name] == 224
    assert (Params()(network, SHAPE), Macs()(network, SHAPE)) == GHOSTNETS[name]


# Millions of parameters and GMAC, plain and ghosted [ghostnet.md].
REGNETS = {
    "002": (2.68, 0.20, 1.83, 0.13),
    "004": (5.16, 0.40, 2.88, 0.22),
    "006": (6.20, 0.60, 4.03, 0.39),
    "008": (7.26, 0.80, 5.25, 0.53),
    "016": (9.19, 1.60, 7.11, 1.02),
    "032": (15.30, 3.18, 10.51, 1.80),
    "040": (22.12, 3.96, 15.73, 2.23),
    "064": (26.21, 6.46, 17.99, 4.06),
    "080": (39.57, 8.00, 24.59, 4.15),
    "120": (46.11, 12.09, 30.63, 7.38),
    "160": (54.28, 15.94, 32.38, 9.00),
}


@pytest.mark.parametrize("size", REGNETS)
def test_regnets_plain_and_ghosted(size):
    found: list[float] = []
    for name in (f"regnetx_{size}", f"g_ghost_regnetx_{size}"):
        with torch.device("meta"):
            network = NETWORKS[name]()
        assert RESOLUTIONS[name] == 224
        found += [round(Params()(network, SHAPE) / 1e6, 2), round(Macs()(network, SHAPE) / 1e9, 2)]
    assert tuple(found) == REGNETS[size]


def test_the_mix_has_many_weights_and_little_to_compute():
    with torch.device("meta"):
        mixed, plain = g_ghost_regnetx("032"), g_ghost_regnetx("032", mix=False)
    assert Params()(mixed, SHAPE) - Params()(plain, SHAPE) == 819_840
    assert Macs()(mixed, SHAPE) - Macs()(plain, SHAPE) == 818_496


@pytest.mark.parametrize(("size", "ghosts"), [("002", [3, 4]), ("006", [2, 3, 4]), ("032", [2, 3]), ("064", [2, 3])])
def test_which_stages_are_ghosted(size, ghosts):
    with torch.device("meta"):
        stages = list(g_ghost_regnetx(size).children())[1:5]
    assert [number for number, stage in enumerate(stages, 1) if isinstance(stage, GGhostStage)] == ghosts


@pytest.mark.parametrize("name", ["ghostnet_100", *(f"regnetx_{size}" for size in REGNETX)])
def test_counts_are_timms(name):
    import timm

    with torch.device("meta"):
        assert Params()(NETWORKS[name](), SHAPE) == Params()(timm.create_model(name), SHAPE)


@pytest.mark.parametrize(("build", "name"), [(ghostnet, "ghostnet_100"), (regnetx, "regnetx_002")])
def test_networks_compute_what_timms_compute(build, name):
    import timm

    torch.manual_seed(0)
    given = {"size": "002"} if build is regnetx else {}
    mine, other = build(**given, classes=10).eval(), timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    # Layers with numbers, in the order they run; a 1x1 convolution of one pixel is a linear layer here.
    for a, b in zip(running(mine, x), running(other, x), strict=True):
        shapes = {key: tensor.shape for key, tensor in a.state_dict().items()}
        a.load_state_dict({key: tensor.reshape(shapes[key]) for key, tensor in b.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(mine(x), other(x), rtol=1e-3, atol=1e-5)


def running(network: nn.Module, x: torch.Tensor) -> list[nn.Module]:
    order: list[nn.Module] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    hooks = [m.register_forward_hook(lambda m, *_: order.append(m)) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return order


@pytest.mark.parametrize("name", ["ghostnet_050", "regnetx_002", "g_ghost_regnetx_002"])
def test_small_images_run_forward_and_backward(name):
    network = NETWORKS[name](classes=10, channels=1, stem_stride=1)
    sizes: list[int] = []
    network[-1].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    y = network(torch.randn(4, 1, 32, 32))
    assert y.shape == (4, 10)
    assert sizes == [2]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_what_cannot_be():
    with pytest.raises(UserError, match="width is 0; allowed: above 0"):
        ghostnet(0)
    for build in (regnetx, g_ghost_regnetx):
        with pytest.raises(UserError, match="unknown RegNetX '32'; did you mean '032'"):
            build("32")
