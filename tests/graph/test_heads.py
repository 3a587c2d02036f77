"""Heads of an attention as channels: what goes with one, that slimmed is masked, and what it costs."""

import copy
import functools

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from test_channels import randomised, some
from torch import Tensor, nn

from netsmith.architecture import sample
from netsmith.blocks.attention import Attention
from netsmith.blocks.mobile import ConvBn
from netsmith.cost.counts import FileBytes, Macs, Params
from netsmith.cost.prices import tabulate
from netsmith.decisions import derive
from netsmith.graph.channels import Channels, channels
from netsmith.graph.slim import masked, proven, slim
from netsmith.graph.slimmable import Slimmable
from netsmith.ship.export import export

SHAPE = (3, 32, 32)


def transformer(name: str = "vit_tiny_patch16_224", depth: int = 2, **options) -> nn.Module:
    """Of timm, on four patches: heads of 64 places."""
    return timm.create_model(name, img_size=32, depth=depth, num_classes=5, **options)


class Written(nn.Module):
    """Attention in tokens of 16 channels, in the words of many: four heads of four places, perhaps each with a
    temperature."""

    def __init__(self, name: str = "heads", scale: bool = False, temperature: bool = True) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 32, bias=False), nn.Linear(16, 16)
        self.temperature = nn.Parameter(torch.ones(4 if temperature else 1, 1, 1))
        self.name, self.scale = name, scale
        setattr(self, name, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, heads = self.stem(x).flatten(2).transpose(1, 2), getattr(self, self.name)
        q = self.q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        seen = q @ k.transpose(-2, -1) * self.temperature
        seen = seen * (16 / heads) ** -0.5 if self.scale else seen
        return self.out((x + self.proj((seen.softmax(-1) @ v).transpose(1, 2).flatten(2))).mean(1))


class Gated(timm.layers.Attention):
    def __init__(self, dim: int, **options) -> None:
        super().__init__(dim, gated=True, **options)


NETWORKS = {
    "vit": transformer,
    "deit": lambda: transformer("deit_tiny_distilled_patch16_224"),
    "narrow": lambda: transformer(depth=1, embed_dim=24, num_heads=6),
    "norms in the heads": lambda: transformer(depth=1, qk_norm=True),
    "gated": lambda: transformer(depth=1, attn_layer=Gated),
    "ours": lambda: nn.Sequential(
        ConvBn(3, 24, 3, stride=4), Attention(24, 24, heads=6, expansion=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    ),
    "written": Written,
}  # fmt: skip


def found_in(network: nn.Module) -> Channels:
    return proven(network.eval(), channels(network, SHAPE), SHAPE)


def heads(found: Channels) -> dict:
    return {name: group for name, group in found.groups.items() if group.heads}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_slimmed_is_masked(name):
    network = randomised(NETWORKS[name]())
    found = found_in(network)
    assert heads(found)
    images = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for groups in (heads(found), found.groups):
        keep = some(groups)
        with torch.no_grad():
            small, muted = slim(network, groups, keep).eval(), masked(network, groups, keep).eval()
            expected = muted(images)
            assert (small(images) - expected).abs().max() < 1e-10 * expected.abs().max().clamp_min(1)
            assert (network(images) - expected).abs().max() > 1e-3
        assert count(small) < count(network)


def test_a_head_takes_its_rows_and_its_columns():
    network = transformer()
    group = found_in(network).groups["blocks.1.attn.qkv"]
    assert (group.size, group.heads) == (3, ("blocks.1.attn",))
    uses = {(use.tensor.removeprefix("blocks.1.attn."), use.dim, use.role): use.positions for use in group.uses}
    assert set(uses) == {("qkv.weight", 0, "out"), ("qkv.bias", 0, "along"), ("proj.weight", 1, "in")}
    rows = torch.arange(3 * 192).view(3, 3, 64).transpose(0, 1).flatten(1)  # of head i: those in q, in k, in v
    assert torch.equal(uses["qkv.weight", 0, "out"], rows)
    assert torch.equal(uses["qkv.bias", 0, "along"], rows)
    assert torch.equal(uses["proj.weight", 1, "in"], torch.arange(192).view(3, 64))
    small = slim(network, {group.name: group}, {group.name: torch.tensor([0, 2])})
    attention = small.get_submodule("blocks.1.attn")
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 64, 128)
    assert count(network) - count(small) == 64 * (3 * (192 + 1) + 192)
    assert network.get_submodule("blocks.1.attn").num_heads == 3


def test_a_head_of_ours():
    network = NETWORKS["ours"]()
    found = found_in(network)
    ((name, group),) = heads(found).items()
    assert (name, group.size) == ("1.qkv.conv", 6)
    small = slim(network, found.groups, {name: torch.tensor([1, 3, 4])})
    assert count(network) - count(small) == 3 * 4 * (3 * (24 + 2) + 24)  # three heads of four, with their norms
    assert small(torch.zeros(2, *SHAPE)).shape == (2, 5)


def test_what_a_network_reads_from_elsewhere_stays():
    named = found_in(Written("many", temperature=False))
    assert named.closed["q"] == "without some of them the code makes other heads"
    assert "stem" in named.groups
    assert found_in(Written(scale=True)).closed["q"] == "without some of them the network computes with other numbers"


def test_what_divides_into_two_is_closed():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.b(self.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))

    assert found_in(Shuffled()).closed["a"] == "unflatten splits them"


@functools.cache
def opened(name: str) -> Slimmable:
    network = copy.deepcopy(NETWORKS[name]()).eval()
    return Slimmable(network, found_in(network), step=2).eval()


@pytest.mark.parametrize("name", ["narrow", "ours", "written"])
def test_counts_add_up_with_the_products(name):
    space, generator = opened(name), torch.Generator().manual_seed(0)
    assert space.heads
    for cost in (Params(), Macs(), FileBytes()):
        prices = tabulate(space, cost, SHAPE)
        for _ in range(4):
            architecture = sample(space, generator)
            counted = cost(derive(space, architecture), SHAPE)
            assert prices.of(architecture) == pytest.approx(counted, rel=1e-12), cost


def test_the_products_are_linear_in_the_heads():
    """Five tokens: a head is 64 channels of q, k, v and the projection, and two products of 5 x 5 x 64."""
    row = tabulate(opened("vit"), Macs(), SHAPE)
    whole = opened("vit").reference
    each = [row.of({**whole, "blocks/0/attn/qkv": n}) for n in (1, 2, 3)]
    assert each[2] - each[1] == each[1] - each[0] == 5 * 192 * 64 * 4 + 2 * 5 * 5 * 64


def test_any_number_of_heads_may_stay():
    assert opened("vit").width("blocks/0/attn/qkv").options == [1, 2, 3]
    assert opened("ours").width("1/qkv/conv").options == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["ours", "narrow"])
def test_the_file_of_a_slimmed_network_says_the_same(name, tmp_path):
    space = opened(name)
    chosen = {path: min(space.width(path).options) for path in space.groups}
    small = derive(space, chosen).eval()
    export(small, SHAPE, tmp_path / "model.onnx")
    images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images.numpy()})
    assert np.allclose(logits, small(images).detach().numpy(), atol=1e-4)
