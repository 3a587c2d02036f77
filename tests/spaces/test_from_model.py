"""An existing network as a space: what is opened, that nothing else changes, and what is said of the rest."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from netsmith.architecture import check, sample
from netsmith.blocks.mobile import MBConv
from netsmith.blocks.quantized import is_int8
from netsmith.blocks.reparam import Branches
from netsmith.cost.counts import Macs, Params, shipped
from netsmith.cost.device import OrtCpu
from netsmith.cost.onnx_graph import onnx_model
from netsmith.cost.table import entry_key
from netsmith.decisions import decisions, derive
from netsmith.errors import UserError
from netsmith.run import dump_yaml
from netsmith.ship.export import export
from netsmith.ship.weights import load, save
from netsmith.spaces import FROM_MODEL, open_space
from netsmith.spaces.from_model import Replaceable, candidates, carry, in_either, replaceable, source

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
        assert all(len(decision.options) >= 70 for decision in decisions(space).values())


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


BLOCK = timm.create_model("resnet18").layer2[0]  # 64 to 128 channels, stride 2


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (Replaceable("x", (64, 14, 13), (128, 7, 7)), {"ghosted", "attention"}),
        (Replaceable("x", (24, 7, 7), (24, 7, 7)), {"identity", "attention"}),
        (Replaceable("x", (24, 28, 28), (24, 28, 28)), {"identity"}),
        (Replaceable("x", (24, 1, 1), (30, 1, 1)), set()),
    ],
)
def test_every_candidate_of_the_full_pool_can_stand_in(layer, names):
    """Its shapes fit, it learns, it is priced as it ships and that runs; the file says what the network says."""
    found = candidates(layer, "full", BLOCK if "ghosted" in names else None)
    assert {"ghosted", "identity", "attention"} & set(found) == names
    families = ("ghost_e3_se", "ghost_k1", "linear_k5", "collapsed_k3")
    assert set(families) <= set(found)
    prints = []
    for name, made in found.items():
        part = made()
        assert part(torch.randn(2, *layer.input)).shape[1:] == layer.output, name
        if name.startswith(("ghost", "linear", "collapsed", "attention")):
            for tensor in (t for n, t in part.named_buffers() if n.endswith("running_var")):
                tensor.uniform_(0.5, 1.5)
            images, file = torch.randn(1, *layer.input), onnx_model(shipped(part.eval()), layer.input)
            (said,) = OrtCpu().session(file).run(None, {"x": images.numpy()})
            assert np.allclose(said, part(images).detach().numpy(), atol=1e-4), name
            prints.append(entry_key(part, layer.input))
    assert len(set(prints)) == len(prints) >= 12


def test_what_collapses_costs_one_convolution():
    found = candidates(Replaceable("x", (16, 8, 8), (24, 4, 4)), "full")
    for kernel in (3, 5):
        dense = 16 * 24 * kernel**2
        assert Macs()(found[f"linear_k{kernel}"](), (16, 8, 8)) == 16 * dense
        assert Macs()(found[f"collapsed_k{kernel}"](), (16, 8, 8)) == 16 * dense
        assert Params()(found[f"linear_k{kernel}"](), (16, 8, 8)) == dense + 24


def test_a_block_that_prints_the_same_with_ghosts_is_left_out():
    """Its latency would be looked up under the name of the block as it was."""
    block = MBConv(16, 16, hidden=32)
    assert "ghosted" not in candidates(Replaceable("x", (16, 8, 8), (16, 8, 8)), "full", block)


def test_a_network_of_all_families_is_saved_and_shipped(tmp_path):
    of, _ = network_of("timm:test_resnet")
    options = {"of": of, "pool": "full", **SHAPE}
    space = open_space(FROM_MODEL, **options)
    kinds = ("collapsed_k3", "linear_k3", "ghosted", "ghost_e2_se", "attention_e2")
    paths = [path for path, decision in decisions(space).items() if "attention" in decision.options]
    chosen = dict.fromkeys(space.reference, "ghost_k1") | dict(zip(paths, kinds, strict=False))
    assert set(kinds[: len(paths)]) <= set(chosen.values())
    network = derive(space, chosen).eval()
    for tensor in (t for n, t in network.named_buffers() if n.endswith("running_var")):
        tensor.uniform_(0.5, 1.5)
    (tmp_path / "problem.yaml").write_text(dump_yaml({"space": FROM_MODEL, "space_options": options}))
    save(tmp_path, network, chosen)
    images = torch.randn(1, 3, 32, 32)
    again = load(tmp_path)
    assert torch.equal(again(images), network(images))
    file = export(again, (3, 32, 32), tmp_path / "model.onnx")
    session = OrtCpu().session(file)
    (said,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.allclose(said, network(images).detach().numpy(), atol=1e-3)
