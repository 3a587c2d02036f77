"""Channel groups: what belongs together, what is closed and why; and that the slimmed network is the masked one."""

import copy

import pytest
import timm
import torch
from torch import nn

from netsmith.blocks.mobile import MBConv
from netsmith.errors import UserError
from netsmith.graph.channels import channels
from netsmith.graph.slim import masked, proven, slim

FAMILIES = {
    "resnet10t": 32, "mobilenetv2_035": 32, "mobilenetv3_small_050": 32, "tinynet_e": 32, "mnasnet_small": 32,
    "regnetx_002": 32, "regnety_002": 32, "ghostnet_050": 32, "lcnet_035": 32, "semnasnet_050": 32, "test_vit": 160,
    "starnet_s050": 32, "convnext_atto": 32, "test_convnext2": 32, "spnasnet_100": 32, "test_byobnet": 32,
}  # fmt: skip
LARGE = {
    "resnet18": 64, "efficientnet_b0": 64, "densenet121": 64, "vgg11_bn": 64, "dla34": 64, "repvgg_a0": 64,
    "resnext50_32x4d": 64, "hrnet_w18_small": 64, "vit_tiny_patch16_224": 224, "efficientformer_l1": 224,
    "mobilevit_xxs": 64, "fbnetc_100": 64, "inception_v3": 96, "mixnet_s": 64,
}  # fmt: skip
"""Tried with the slow tests."""
SIZES = FAMILIES | LARGE


def randomised(network: nn.Module) -> nn.Module:
    """Weights of norms that are not all alike, in float64: a channel that is not masked would show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.double().eval().parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return network


def some(groups, share: float = 0.6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randperm(group.size, generator=generator)[: max(1, int(share * group.size))]
        for name, group in groups.items()
    }


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)])
def test_slimmed_is_masked(name):
    shape = (3, SIZES[name], SIZES[name])
    network = randomised(timm.create_model(name, num_classes=10))
    before = copy.deepcopy(network.state_dict())
    found = proven(network, channels(network, shape), shape)
    assert len(found.groups) >= 2
    keep = some(found.groups)
    images = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        small, muted = slim(network, found.groups, keep).eval(), masked(network, found.groups, keep).eval()
        expected = muted(images)
        assert (small(images) - expected).abs().max() < 1e-10 * expected.abs().max().clamp_min(1)
        assert (network(images) - expected).abs().max() > 1e-3  # something was masked
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert count(small) < 0.85 * count(network)
    assert all(torch.equal(tensor, before[n]) for n, tensor in network.state_dict().items())


def groups_of(network: nn.Module, *shape: int):
    return channels(network.eval(), shape).groups


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm(x + self.back(self.inner(x).relu()))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_a_sum_joins_what_it_adds_and_a_flatten_repeats_it():
    found = groups_of(Residual(), 3, 6, 6)
    assert set(found) == {"stem", "inner"}
    uses = {(use.tensor, use.dim): use for use in found["stem"].uses}
    assert set(uses) == {
        ("stem.weight", 0), ("stem.bias", 0), ("inner.weight", 1), ("back.weight", 0), ("back.bias", 0),
        ("norm.weight", 0), ("norm.bias", 0), ("norm.running_mean", 0), ("norm.running_var", 0), ("head.weight", 1),
    }  # fmt: skip
    assert uses["head.weight", 1].positions.tolist() == [[4 * c + i for i in range(4)] for c in range(8)]
    assert uses["inner.weight", 1].role == "in"
    assert uses["back.weight", 0].role == "out"


def test_depthwise_filters_go_along_and_squeeze_excite_has_channels_of_its_own():
    found = groups_of(nn.Sequential(MBConv(4, 4, hidden=12, squeeze=3), nn.Conv2d(4, 2, 1)), 4, 6, 6)
    assert {name: group.size for name, group in found.items()} == {"0.expand.conv": 12, "0.squeeze.reduce": 3}
    roles = {use.tensor: use.role for use in found["0.expand.conv"].uses}
    assert roles["0.depthwise.conv.weight"] == "along"
    assert roles["0.squeeze.expand.weight"] == "out"


def test_channels_behind_a_concatenation_stay_apart():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    found = groups_of(Joined(), 3, 4, 4)
    places = {name: next(use.positions for use in group.uses if use.role == "in") for name, group in found.items()}
    assert places["a"].flatten().tolist() == [0, 1, 2, 3]
    assert places["b"].flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_grouped_convolutions_lose_the_same_place_of_every_group():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(12, 2, 1))
    found = groups_of(network, 3, 4, 4)
    assert {name: group.size for name, group in found.items()} == {"0": 2, "1": 3}
    small = slim(network, found, {"0": torch.tensor([1]), "1": torch.tensor([0, 2])})
    assert (small[1].in_channels, small[1].out_channels, small[1].groups) == (4, 8, 4)
    images = torch.randn(1, 3, 4, 4)
    expected = masked(network, found, {"0": torch.tensor([1]), "1": torch.tensor([0, 2])})(images)
    assert torch.allclose(small(images), expected, atol=1e-6)


def test_a_layer_that_runs_twice_has_one_group():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.again(self.again(self.stem(x))))

    found = groups_of(Twice(), 3, 4, 4)
    assert {name: group.size for name, group in found.items()} == {"stem": 4}


def test_what_stays_says_why():
    network = timm.create_model("test_vit", num_classes=10, img_size=32).eval()
    found = channels(network, (3, 32, 32))
    assert found.closed["head"] == "it is the output"
    assert found.closed["blocks.0.attn.proj"] == "slice needs all of them"  # of the sum, with the class token
    assert {"blocks.0.attn.qkv", "blocks.0.mlp.fc1"} <= found.groups.keys()


def test_a_size_written_into_the_code_closes_its_group():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x)).mean((2, 3)).view(-1, 6))

    network = Fixed().eval()
    found = proven(network, channels(network, (3, 4, 4)), (3, 4, 4))
    assert set(found.groups) == {"a"}
    assert found.closed["b"].startswith("without some of them: ")


def test_what_cannot_be_traced_or_kept_is_said():
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match="Depends cannot be traced"):
        channels(Depends(), (3, 4, 4))
    network = Residual().eval()
    found = groups_of(network, 3, 6, 6)
    with pytest.raises(UserError, match="there is no group 'body'; groups: stem, inner"):
        slim(network, found, {"body": torch.tensor([0])})
    for kept in ([], [8], [-1]):
        with pytest.raises(UserError, match="of the 8 channels of 'stem'"):
            slim(network, found, {"stem": torch.tensor(kept, dtype=torch.int64)})


def test_keeping_all_changes_nothing():
    network = randomised(timm.create_model("mobilenetv3_small_050", num_classes=10))
    found = channels(network, (3, 64, 64))
    everything = {name: torch.arange(group.size) for name, group in found.groups.items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(slim(network, found.groups, everything).eval()(images), network(images))
