"""An existing network as a space: what is opened, that nothing else changes, and what is said of the rest."""

import pytest
import torch
from torch import nn

from netsmith.architecture import check, sample
from netsmith.blocks.quantized import is_int8
from netsmith.blocks.reparam import Branches
from netsmith.cost.counts import Params
from netsmith.decisions import decisions, derive
from netsmith.errors import UserError
from netsmith.spaces import FROM_MODEL, open_space
from netsmith.spaces.from_model import carry, in_either, replaceable, source

SHAPE = {"classes": 10, "channels": 3, "resolution": 32}


def network_of(name: str, **options) -> tuple[dict, nn.Module]:
    of = {"space": name, "space_options": options, "architecture": {}}
    return of, source(of, **SHAPE).eval()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm:resnet18", 8),
        ("timm:resnet50", 16),
        ("timm:mobilenetv3_small_100", 12),
        ("timm:efficientnet_b0", 16),
        ("timm:convnext_atto", 15),
        ("timm:regnetx_002", 13),
        ("timm:mobilenetv2_050", 17),
        ("timm:vgg11_bn", 8),
        ("resnet50", 16),
        ("efficientnet_b0", 16),
    ],
)
def test_the_layers_of_known_networks(name, count):
    with torch.device("meta"):
        _, network = network_of(name)
    found, _ = replaceable(network, (3, 64, 64))
    assert len(found) == count
    assert all(layer.stride in (1, 2) for layer in found)


def test_what_cannot_be_replaced_is_named():
    with torch.device("meta"):
        _, network = network_of("timm:densenet121")
    found, left = replaceable(network, (3, 64, 64))
    assert [layer.path for layer in found] == [f"features.transition{i}.conv" for i in (1, 2, 3)]
    assert left["features.conv0"] == "it is the stem"
    assert left["features.denseblock1.denselayer1"] == "it does not take one feature map and return one"


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_efficientnet", "timm:mobilenetv2_035"])
def test_the_original_comes_out_as_it_went_in(name):
    of, network = network_of(name)
    space = open_space(FROM_MODEL, of=of, **SHAPE).eval()
    carry(space, network.state_dict())
    original = derive(space, space.reference).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(original(images), network(images))
    assert {n: t.shape for n, t in original.state_dict().items()} == {
        n: t.shape for n, t in network.state_dict().items()
    }


@pytest.mark.parametrize("pool", ["identity", "small", "full"])
def test_any_combination_is_a_network(pool):
    of, network = network_of("timm:test_resnet")
    space = open_space(FROM_MODEL, of=of, pool=pool, **SHAPE).eval()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        architecture = sample(space, generator)
        check(space, architecture)
        assert derive(space, architecture).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    shaped = [path for path, decision in decisions(space).items() if "identity" in decision.options]
    shortest = derive(space, space.reference | dict.fromkeys(shaped, "identity"))
    assert Params()(shortest, (3, 32, 32)) < Params()(network, (3, 32, 32))
    if pool == "full":
        assert all(len(decision.options) >= 60 for decision in decisions(space).values())


def test_a_compressed_network_can_be_compressed_again():
    of, _ = network_of("timm:test_resnet")
    space = open_space(FROM_MODEL, of=of, **SHAPE)
    first = next(iter(space.reference))
    once = {
        "space": FROM_MODEL,
        "space_options": {"of": of, **SHAPE},
        "architecture": space.reference | {first: "conv_k3"},
    }
    again = open_space(FROM_MODEL, of=once, **SHAPE)
    assert again(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_weights_of_another_network_do_not_fit():
    of, network = network_of("timm:test_resnet")
    space = open_space(FROM_MODEL, of=of, **SHAPE)
    weights = network.state_dict()
    with pytest.raises(UserError, match=r"the weights do not fit the network: 'fc\.bias' is missing"):
        carry(space, {name: t for name, t in weights.items() if name != "fc.bias"})
    with pytest.raises(UserError, match="the network has no 'nothing'"):
        carry(space, {**weights, "nothing": torch.zeros(1)})


def test_a_network_without_layers_is_refused():
    of = {"space": "timm:test_vit", "space_options": {"img_size": 32}, "architecture": {}}
    with pytest.raises(UserError, match="timm:test_vit: there is no layer to replace"):
        open_space(FROM_MODEL, of=of, **SHAPE)


# In fp32 or in int8 -------------------------------------------------------------------------------------------------


def test_every_layer_in_either_precision_and_the_weights_are_the_same():
    of, original = network_of("timm:resnet18")
    space = open_space(FROM_MODEL, of=of, pool="bits", **SHAPE)
    carry(space, original.state_dict())
    space.eval()
    assert len(space.reference) == 21  # twenty convolutions and the classifier
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(derive(space, space.reference)(x), original(x))
    made = derive(space, {**space.reference, "layer1.0.conv1": "int8"})
    assert [path for path, part in made.named_modules() if is_int8(part)] == ["layer1.0.conv1"]
    assert torch.equal(made.layer1[0].conv1.weight, original.layer1[0].conv1.weight)
    assert Params()(made, (3, 32, 32)) == Params()(original, (3, 32, 32))


def test_layers_that_run_twice_or_fold_or_pad_in_their_own_way_stay_as_they_are():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.folding, self.idle = Branches(4, 4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.folding(self.reflecting(self.once(self.twice(self.twice(x)))))

    assert in_either(Odd(), (4, 8, 8)).reference == {"once": "fp32"}
    with pytest.raises(UserError, match="Sequential has no plain convolution or linear layer that runs once"):
        in_either(nn.Sequential(nn.ReLU()), (4, 8, 8))
