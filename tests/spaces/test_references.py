"""Plain reference networks: counts to the unit, and the same function as torchvision's."""

import math

import pytest
import torch
import torchvision.models as tv
from torch import nn

from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.cost.counts import Macs, Params
from netsmith.decisions import derive
from netsmith.errors import UserError
from netsmith.spaces import prunet, references
from netsmith.spaces.networks import gpunet
from netsmith.spaces.references import fitting_strides, mobilenet_v2, mobilenet_v3


@pytest.mark.parametrize("variant", ["p0", "p1"])
def test_the_prunets_written_out_are_those_of_the_space(variant):
    with torch.device("meta"):
        derived = derive(prunet.prunet(), prunet.released(f"gpunet-{variant}"))
        written = gpunet(variant)

    def layers(network: nn.Module) -> list[str]:
        """Convolutions, norms and activations as PyTorch prints them, in the order they run."""
        return [
            repr(m)
            for m in network.modules()
            if type(m).__module__.startswith("torch.") and not list(m.children()) and not isinstance(m, nn.Identity)
        ]

    assert sorted(layers(derived)) == sorted(layers(written))
    blocks = [repr(m) for m in derived.modules() if type(m).__name__ in ("MBConv", "Head")]
    assert blocks == [repr(m) for m in written.modules() if type(m).__name__ in ("MBConv", "Head")]


OURS = {
    "v2": (mobilenet_v2, tv.mobilenet_v2, {}, 3_504_872),
    "v3-large": (mobilenet_v3, tv.mobilenet_v3_large, {"size": "large"}, 5_483_032),
    "v3-small": (mobilenet_v3, tv.mobilenet_v3_small, {"size": "small"}, 2_542_856),
}


@pytest.mark.parametrize("name", OURS)
def test_mobilenets_at_full_width(name):
    build, _, options, params = OURS[name]
    with torch.device("meta"):
        assert Params()(build(**options), (3, 224, 224)) == params


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
def test_scaled_mobilenets_are_torchvisions(name, width):
    build, theirs, options, _ = OURS[name]
    with torch.device("meta"):
        mine, other = build(width, **options), theirs(width_mult=width)
    assert Params()(mine, (3, 224, 224)) == Params()(other, (3, 224, 224))
    assert Macs()(mine, (3, 224, 224)) == Macs()(other, (3, 224, 224))


@pytest.mark.parametrize("name", OURS)
def test_mobilenets_compute_what_torchvisions_compute(name):
    build, theirs, options, _ = OURS[name]
    mine, other = build(0.5, **options).eval(), theirs(width_mult=0.5).eval()
    x = torch.randn(2, 3, 64, 64)
    # Layers with numbers, in the order they run, correspond one to one.
    for a, b in zip(running(mine, x), running(other, x), strict=True):
        a.load_state_dict(b.state_dict())
    # 64 px would change our strides only if we asked for 64 px.
    with torch.no_grad():
        assert torch.allclose(mine(x), other(x), rtol=1e-4, atol=1e-5)


def running(network: nn.Module, x: torch.Tensor) -> list[nn.Module]:
    order: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda module, *_: order.append(module))
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return order


@pytest.mark.parametrize(("resolution", "total"), [(224, 32), (96, 32), (64, 16), (32, 8), (28, 8), (8, 2), (2, 1)])
def test_small_images_lose_the_first_strides(resolution, total):
    strides = fitting_strides(references.V2_STRIDES, resolution)
    assert math.prod(strides) == total
    assert fitting_strides(strides, resolution) == strides


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("channels", "resolution"), [(3, 32), (1, 28), (1, 8)])
def test_small_images_run_forward_and_backward(name, channels, resolution):
    build, _, options, _ = OURS[name]
    network = build(0.35, 10, channels, resolution, **options)
    y = network(torch.randn(4, channels, resolution, resolution))
    assert y.shape == (4, 10)
    y.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "depth", "blocks"),
    [(mobilenet_v2, 1.0, 17), (mobilenet_v2, 0.5, 11), (mobilenet_v2, 0.1, 7), (mobilenet_v3, 1.0, 15),
     (mobilenet_v3, 0.5, 9), (mobilenet_v3, 0.1, 6)],
)  # fmt: skip
def test_depth_shortens_stages_and_keeps_their_first_layers(build, depth, blocks):
    """Layers of the stages, rounded up: V2 has 1 2 3 4 3 3 1 of them, V3-large 1 2 3 4 2 3."""
    with torch.device("meta"):
        whole, short = build(), build(depth=depth)
    found = [m for m in short.modules() if isinstance(m, MBConv)]
    assert len(found) == blocks
    strides = [math.prod(m.conv.stride[0] for m in n.modules() if isinstance(m, ConvBn)) for n in (whole, short)]
    assert strides[0] == strides[1] == 32
    assert short(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_given_strides_and_unknown_names():
    with torch.device("meta"):
        network = mobilenet_v2(strides=(1, 1, 1, 2, 2, 1, 2, 1), resolution=32)
    assert [m.conv.stride[0] for m in network.modules() if type(m).__name__ == "ConvBn"].count(2) == 3
    with pytest.raises(UserError, match="8 numbers here"):
        mobilenet_v2(strides=(1, 2))
    with pytest.raises(UserError, match="unknown MobileNetV3 'medium'"):
        mobilenet_v3(size="medium")
    with pytest.raises(UserError, match="unknown GPUNet 'P0'; did you mean"):
        gpunet("P0")
