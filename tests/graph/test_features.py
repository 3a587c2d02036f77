"""A network as a backbone: channels and strides as told; the last map is what the classifier pools; no head."""

import copy

import pytest
import timm
import torch
from torch import nn

from netsmith.architecture import sample
from netsmith.blocks.mobile import ConvBn, MBConv
from netsmith.decisions import derive
from netsmith.errors import UserError
from netsmith.graph.features import features
from netsmith.spaces import open_space

TIMM = [
    "resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "tinynet_e", "convnext_atto", "regnetx_002",
    "test_byobnet", "ghostnet_050", "vgg11_bn", "selecsls42b",
]  # fmt: skip
TIMMS_OWN = ["resnet18", "mobilenetv3_small_050", "convnext_atto", "regnetx_002"]
"""Whose `feature_info` ends with what the classifier pools, too."""


def checked(network: nn.Module, channels: int = 3, side: int = 64):
    """The features of a network in eval mode, and maps of the shapes that they say."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    backbone = features(network.eval(), (channels, side, side))
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = backbone(images)
    assert [found.shape[1] for found in maps] == backbone.channels
    assert [-(-side // r) for r in backbone.reductions] == [found.shape[2] for found in maps]
    assert backbone.reductions == sorted(set(backbone.reductions))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    return backbone, images, maps


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks(name):
    network = timm.create_model(name, num_classes=7)
    backbone, images, maps = checked(network)
    with torch.no_grad():
        assert torch.allclose(maps[-1], network.forward_features(images), atol=1e-5)
    assert "classifier" not in str(backbone)
    if name in TIMMS_OWN:
        told = timm.create_model(name, features_only=True).feature_info
        assert (backbone.channels, backbone.reductions) == (told.channels(), told.reduction())


@pytest.mark.parametrize("name", ["fbnet_small", "prunet_small", "repvgg_small", "nasbench201", "fbnet"])
def test_networks_of_our_spaces(name):
    """From the last map to the logits there is a mean, and the classifier."""
    space = open_space(name, classes=7, resolution=64)
    network = derive(space, sample(space, torch.Generator().manual_seed(1)))
    backbone, images, maps = checked(network)
    classifier = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        assert torch.allclose(classifier(maps[-1].mean((2, 3))), network(images), atol=1e-5)
    assert sum(p.numel() for p in classifier.parameters()) == sum(p.numel() for p in network.parameters()) - sum(
        p.numel() for p in backbone.parameters()
    )


def small() -> nn.Module:
    layers = [ConvBn(1, 8, 3, stride=2), MBConv(8, 12, hidden=16, stride=2), MBConv(12, 12, hidden=24)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def test_scales_are_found_though_a_task_has_few_pixels():
    backbone, _, maps = checked(small(), channels=1, side=8)
    assert (backbone.channels, backbone.reductions) == ([8, 12], [2, 4])
    assert [tuple(found.shape[2:]) for found in maps] == [(4, 4), (2, 2)]


def test_it_trains_and_switches_modes():
    network = small().eval()
    backbone = features(network, (1, 8, 8))
    assert not backbone.training
    for copied in (backbone, copy.deepcopy(backbone)):
        copied.train()
        mean = copied.get_buffer("body.0.bn.running_mean")
        before = mean.clone()
        sum(found.square().mean() for found in copied(torch.randn(4, 1, 8, 8))).backward()
        assert not torch.equal(mean, before)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in copied.parameters())
    assert network[0].bn.running_mean.eq(0).all()


def test_it_exports(tmp_path):
    import onnxruntime

    backbone = features(small().eval(), (1, 8, 8))
    images = torch.randn(1, 1, 16, 16)
    torch.onnx.export(backbone, (images,), tmp_path / "backbone.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for ours, theirs in zip(backbone(images), found, strict=True):
        assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)


def test_a_map_is_what_it_was_before_the_next_layer_wrote_over_it():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    images = torch.randn(1, 1, 16, 16)
    stage = features(nn.Sequential(network[0], Block(network[1]), *network[2:]).eval(), (1, 16, 16))
    assert torch.equal(stage(images)[0], network[0](images))
    assert network[1][0].inplace


class Block(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def test_a_stage_may_end_with_its_stride():
    class Stage(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.block, self.down = MBConv(inputs, inputs, hidden=inputs), ConvBn(inputs, outputs, 3, stride=2)

        def forward(self, x):
            return self.down(self.block(x))

    network = nn.Sequential(ConvBn(3, 8, 3, stride=2), Stage(8, 16), Stage(16, 24), nn.AdaptiveAvgPool2d(1))
    backbone, images, maps = checked(network)
    with torch.no_grad():
        assert torch.equal(maps[0], network[1].block(network[0](images)))
    assert backbone.channels == [8, 16, 24]


def test_a_network_of_a_fixed_size_and_one_of_one_scale():
    fixed = nn.Sequential(ConvBn(3, 8, 3, stride=2), ConvBn(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16 * 16, 3))
    assert checked(fixed, side=32)[0].reductions == [2]
    flat = nn.Sequential(ConvBn(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    assert (checked(flat)[0].channels, checked(flat)[0].reductions) == ([8], [1])


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        return self.conv(x) if x.shape[0] < 9 else x


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.linear = nn.Conv2d(3, 6, 16, 16), nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Tokens, r"Tokens goes on behind its last feature map .*: what linear makes is \(1, 256, 6\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), "Sequential has no feature maps"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1)), r"Sequential does not run on \(3, 64, 64\): .*channel"),
        (Asks, "Asks cannot be traced for its features: symbolically traced variables"),
    ],
)
def test_what_is_no_backbone(network, sentence):
    with pytest.raises(UserError, match=sentence):
        features(network().eval(), (3, 64, 64))
