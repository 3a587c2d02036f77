"""Ghost blocks: what is exact by construction, whatever the weights."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from netsmith.blocks.ghost import GGhostStage, GhostBottleneck, GhostModule, ghosted, with_ghosts
from netsmith.blocks.mobile import ConvBn
from netsmith.blocks.residual import Bottleneck
from netsmith.cost.counts import Macs, Params
from netsmith.errors import UserError
from netsmith.ship.export import export


def settled(network: nn.Module) -> nn.Module:
    """In eval mode, with batch norms as after some training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("outputs", [6, 7, 10])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
def test_the_first_maps_are_the_convolutions_and_the_others_their_ghosts(outputs, ratio):
    module = settled(GhostModule(4, outputs, 3, ratio=ratio, stride=2))
    x = torch.randn(2, 4, 9, 9)
    y, primary = module(x), module.primary(x)
    intrinsic = -(-outputs // ratio)
    assert y.shape == (2, outputs, 5, 5)
    assert torch.equal(y[:, :intrinsic], primary)
    if module.cheap is not None:  # the code concatenates all ghosts, then drops what is too many
        assert torch.equal(y, torch.cat([primary, module.cheap(primary)], 1)[:, :outputs])
        assert module.cheap.conv.out_channels == (ratio - 1) * intrinsic


@pytest.mark.parametrize("ratio", [2, 3])
def test_ghosts_of_1x1_ones_are_copies(ratio):
    module = settled(GhostModule(4, 4 * ratio, ratio=ratio, cheap_kernel=1)).double()
    nn.init.ones_(module.cheap.conv.weight)
    bn = module.cheap.bn = nn.BatchNorm2d(4 * (ratio - 1)).double().eval()
    bn.running_var.fill_(1 - bn.eps)
    y = module(torch.randn(2, 4, 5, 5).double())
    assert torch.allclose(y[:, 4:], y[:, :4].repeat_interleave(ratio - 1, 1), rtol=0, atol=1e-12)


def test_ghosts_without_weights_are_constant():
    module = settled(GhostModule(4, 12, act="none"))
    nn.init.zeros_(module.cheap.conv.weight)
    ghosts = module(torch.randn(2, 4, 5, 5))[:, 6:]
    assert torch.equal(ghosts, ghosts[:1, :, :1, :1].expand_as(ghosts))
    assert ghosts.std() > 0


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize(("kernel", "cheap_kernel"), [(1, 3), (3, 3), (3, 5)])
def test_the_speed_up_of_the_paper(ratio, kernel, cheap_kernel):
    """s c k^2 / (c k^2 + (s - 1) d^2), of MACs and of weights (arXiv:1911.11907, section 3.1)."""
    with torch.device("meta"):
        plain = ConvBn(24, 32, kernel)
        module = GhostModule(24, 32, kernel, ratio=ratio, cheap_kernel=cheap_kernel)
    expected = ratio * 24 * kernel**2 / (24 * kernel**2 + (ratio - 1) * cheap_kernel**2)
    norms = 2 * 32
    assert Macs()(plain, (24, 8, 8)) / Macs()(module, (24, 8, 8)) == pytest.approx(expected)
    assert (Params()(plain, (24, 8, 8)) - norms) / (Params()(module, (24, 8, 8)) - norms) == pytest.approx(expected)


@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (8, 2), (12, 1), (12, 2)])
@pytest.mark.parametrize("squeeze", [0, 4])
def test_a_bottleneck_adds_its_input_or_a_convolution_of_it(outputs, stride, squeeze):
    block = settled(GhostBottleneck(8, outputs, kernel=5, hidden=20, stride=stride, squeeze=squeeze))
    x = torch.randn(2, 8, 9, 9)
    y = block(x)
    assert y.shape == (2, outputs, -(-9 // stride), -(-9 // stride))
    assert isinstance(block.shortcut, nn.Identity) is (outputs == 8 and stride == 1)
    assert isinstance(block.depthwise, nn.Identity) is (stride == 1)
    nn.init.zeros_(block.project.primary.bn.weight)
    nn.init.zeros_(block.project.primary.bn.bias)
    nn.init.zeros_(block.project.cheap.bn.weight)
    nn.init.zeros_(block.project.cheap.bn.bias)
    assert torch.equal(block(x), block.shortcut(x))


@pytest.mark.parametrize(
    ("outputs", "group_width", "raw"),
    [(192, 48, 72), (432, 48, 216), (240, 120, 90), (720, 120, 360), (512, 128, 192), (896, 128, 384)],
    ids=["3.2GF-2", "3.2GF-3", "8.0GF-2", "8.0GF-3", "16GF-2", "16GF-3"],
)
def test_a_stage_splits_its_channels_as_released(outputs, group_width, raw):
    with torch.device("meta"):
        stage = GGhostStage(8, outputs, depth=3, group_width=group_width)
    assert stage.raw == raw
    assert stage.cheap.conv.in_channels == stage.cheap.conv.out_channels == outputs - raw


@pytest.mark.parametrize("cheap_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_stage_has_as_many_blocks_and_the_shape_of_a_plain_one(cheap_ratio, depth, stride):
    stage = GGhostStage(8, 48, depth=depth, group_width=8, stride=stride, cheap_ratio=cheap_ratio)
    plain = Bottleneck(8, 48, hidden=48, stride=stride, group_size=8)
    x = torch.randn(2, 8, 9, 9)
    y = stage(x)
    assert y.shape == plain(x).shape
    blocks = [m for m in stage.modules() if isinstance(m, Bottleneck)]
    assert len(blocks) == depth
    assert {b.conv.conv.in_channels // b.conv.conv.groups for b in stage.inner} == {6}
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.parameters())


def test_without_tau_a_stage_is_the_one_without_mix():
    torch.manual_seed(0)
    mixed, plain = (settled(GGhostStage(8, 48, depth=4, group_width=8, mix=mix)) for mix in (True, False))
    missing, unexpected = plain.load_state_dict(mixed.state_dict(), strict=False)
    assert missing == []
    assert all(name.startswith("mix.") for name in unexpected)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        assert not torch.allclose(mixed(x), plain(x), atol=1e-3)
        mixed.mix.layers[1].bn.weight.zero_()
        mixed.mix.layers[1].bn.bias.zero_()
        assert torch.equal(mixed(x), plain(x))


def test_tau_does_not_see_where_anything_is():
    stage = settled(GGhostStage(8, 48, depth=4, group_width=8)).double()
    maps = [torch.randn(2, channels, 5, 5).double() for channels in (48, stage.raw, stage.raw)]
    order = torch.randperm(25)
    moved = [m.flatten(2)[:, :, order].unflatten(2, (5, 5)) for m in maps]
    tau = stage.mix(maps)
    assert tau.shape == (2, 48 - stage.raw, 1, 1)
    assert torch.allclose(tau, stage.mix(moved), rtol=0, atol=1e-12)
    # The means of the maps together, as the code has them.
    assert torch.allclose(tau, stage.mix([torch.cat(maps, 1)]), rtol=0, atol=1e-12)


def test_tau_cannot_be_trained_on_one_image():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GGhostStage(8, 48, depth=3, group_width=8)(torch.randn(1, 8, 9, 9))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "outputs", "ratio"),
    [(1, 1, 0, 8, 2), (3, 1, 1, 7, 2), (3, 2, 1, 9, 4), (3, 1, "same", 8, 2), (5, 2, 2, 3, 3), (7, 2, 3, 1, 1)],
)
def test_a_ghost_module_stands_where_a_convolution_stood(kernel, stride, padding, outputs, ratio):
    conv = nn.Conv2d(4, outputs, kernel, stride, padding, dtype=torch.float64).eval()
    module = ghosted(conv, ratio)
    x = torch.randn(2, 4, 11, 8).double()
    y = module(x)
    assert (y.shape, y.dtype) == (conv(x).shape, conv(x).dtype)
    assert not module.training
    assert y.min() < 0  # linear: the norm and activation of the network come behind it


def test_a_ghost_module_of_a_convolution_without_memory_has_none():
    module = ghosted(nn.Conv2d(4, 8, 3, padding=1, device="meta"), act="relu", cheap_kernel=5)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert repr(module) == "GhostModule(4, 8, kernel=3, ratio=2, cheap_kernel=5)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 2}, "reads all its inputs"),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, "square kernel"),
        ({"stride": (1, 2)}, "square kernel and stride"),
        ({"padding": 0}, "half the kernel for padding"),
        ({"dilation": 2, "padding": 2}, "no dilation"),
    ],
)
def test_convolutions_without_a_ghost_module(options, said):
    with pytest.raises(UserError, match=said):
        ghosted(nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 1, **options}))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: GhostModule(4, 8, ratio=0), "ratio is 0; allowed for 8 channels: 1 to 8"),
        (lambda: GhostModule(4, 8, ratio=9), "ratio is 9; allowed for 8 channels: 1 to 8"),
        (lambda: GhostModule(4, 8, cheap_kernel=2), "cheap_kernel is 2; allowed: odd numbers"),
        (lambda: GGhostStage(8, 48, depth=2, group_width=8), "depth is 2; allowed: 3 or more"),
        (lambda: GGhostStage(8, 48, depth=3, group_width=1), "group_width is 1; allowed: 2 or more"),
        (lambda: GGhostStage(8, 48, depth=3, group_width=8, cheap_ratio=0.9), "cheap_ratio is 0.9; allowed: above 0"),
        (lambda: GGhostStage(8, 48, depth=3, group_width=8, cheap_ratio=0.0), "cheap_ratio is 0.0; allowed: above 0"),
        (lambda: GGhostStage(8, 50, depth=3, group_width=8), "50 channels do not divide into 6 groups"),
    ],
)
def test_what_cannot_be(build, said):
    with pytest.raises(UserError, match=said):
        build()


def test_what_a_latency_table_reads():
    with torch.device("meta"):
        bottleneck = GhostBottleneck(8, 8, hidden=20, squeeze=4)
        stage = GGhostStage(8, 48, depth=3, group_width=8)
    assert repr(bottleneck) == "GhostBottleneck(8, 8, kernel=3, hidden=20, squeeze=4, ratio=2, cheap_kernel=3)"
    assert repr(stage) == "GGhostStage(8, 48, depth=3, group_width=8, stride=2, cheap_ratio=0.5, mix=True)"


def test_the_file_agrees_with_pytorch(tmp_path):
    torch.manual_seed(0)
    network = settled(
        nn.Sequential(
            GhostModule(3, 10, 3, ratio=3),
            GhostBottleneck(10, 14, hidden=15, stride=2, squeeze=4),
            GGhostStage(14, 24, depth=3, group_width=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )
    x = torch.randn(3, 3, 16, 16)
    file = export(network, (3, 16, 16), tmp_path / "ghost.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(None, {"image": x.numpy()})[0])
    with torch.no_grad():
        assert np.allclose(found, network(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_block_with_ghosts_keeps_what_has_a_bias_or_groups():
    block = timm.create_model("efficientnet_b0").blocks[1][0].eval()
    made = with_ghosts(block)
    assert made is not None
    ghosts = {name for name, part in made.named_modules() if isinstance(part, GhostModule)}
    assert ghosts == {"conv_pw", "conv_pwl"}
    assert type(made.se.conv_reduce) is nn.Conv2d
    assert torch.equal(made.se.conv_reduce.weight, block.se.conv_reduce.weight)
    assert type(block.conv_pw) is nn.Conv2d
    assert made.eval()(torch.zeros(1, 16, 8, 8)).shape == (1, 24, 4, 4)
    saved = 64 * (16 * 48 - 48 * 9) + 16 * (96 * 12 - 12 * 9)  # half of each convolution, less 3x3 ghosts of the other
    assert Macs()(made, (16, 8, 8)) == Macs()(block, (16, 8, 8)) - saved
    assert with_ghosts(nn.Conv2d(4, 4, 1, bias=False)) is None
    assert with_ghosts(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 4, 1))) is None
