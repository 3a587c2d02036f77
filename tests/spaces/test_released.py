"""Released networks are architectures of our spaces, with the counts of specs/fbnet.md and specs/prunet.md."""

import pytest
import torch
from torch import nn

from netsmith.architecture import check, sample
from netsmith.cost.counts import Macs, Params
from netsmith.decisions import OneOf, Width, decisions, derive
from netsmith.errors import UserError
from netsmith.spaces import fbnet, prunet

SHAPE = (3, 224, 224)

FBNETS = [
    # name, parameters and MACs in millions: blocks of expansion 1 keep their first 1x1, or drop it (mobile-vision)
    ("fbnet-a", (4.321, 249.9), (4.305, 244.5)),
    ("fbnet-b", (4.813, 296.6), (4.747, 280.6)),
    ("fbnet-b-mobile-vision", (4.863, 306.2), (4.801, 291.0)),
    ("fbnet-c", (5.572, 385.0), (5.571, 378.1)),
]


@pytest.fixture(scope="module")
def fbnets() -> dict[tuple[int, bool], nn.Module]:
    with torch.device("meta"):
        return {(h, e): fbnet.fbnet(head=h, expand_e1=e) for h in (1504, 1984) for e in (True, False)}


@pytest.fixture(scope="module")
def prunet_space() -> nn.Module:
    with torch.device("meta"):
        return prunet.prunet()


@pytest.mark.parametrize(("name", "keeping", "dropping"), FBNETS)
def test_fbnet_counts(fbnets, name, keeping, dropping):
    head = 1504 if name == "fbnet-a" else 1984
    for expand, (params, macs) in ((True, keeping), (False, dropping)):
        supernet = fbnets[head, expand]
        architecture = fbnet.released(name)
        check(supernet, architecture)
        network = derive(supernet, architecture)
        assert round(Params()(network, SHAPE) / 1e6, 3) == params
        assert round(Macs()(network, SHAPE) / 1e6, 1) == macs


@pytest.mark.parametrize("name", fbnet.RELEASED)
def test_every_released_fbnet_is_legal(fbnets, name):
    check(fbnets[1984, True], fbnet.released(name))


def test_fbnet_is_22_layers_of_nine_blocks_where_the_shape_stays(fbnets):
    found = decisions(fbnets[1984, True])
    assert list(found) == [f"layer{i}" for i in range(1, 23)]
    reducing = {f"layer{i}" for i in (2, 6, 10, 14, 18, 22)}
    for path, decision in found.items():
        assert len(decision.options) == (8 if path in reducing else 9)
        assert ("skip" in decision.options) is (path not in reducing)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"), [("gpunet-p0", 22_815_080, 1.870), ("gpunet-p1", 39_905_672, 3.242)]
)
def test_prunets_to_the_unit(prunet_space, name, params, gmacs):
    architecture = prunet.released(name)
    check(prunet_space, architecture)
    network = derive(prunet_space, architecture)
    assert Params()(network, SHAPE) == params
    assert round(Macs()(network, SHAPE) / 1e9, 3) == gmacs
    assert {norm.eps for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)} == {1e-3}


def test_prunet_space(prunet_space):
    found = decisions(prunet_space)
    layers = {path: d for path, d in found.items() if isinstance(d, OneOf)}
    assert [sum(p.startswith(f"stage{s}.") for p in layers) for s in range(1, 7)] == [2, 3, 3, 3, 4, 1]
    widths = {path: d for path, d in found.items() if isinstance(d, Width)}
    assert len(widths) == 2 * (2 + 3 + 3 + 4 + 1)
    assert widths["stage5.1.k5.hidden"].options == list(range(32, 5633, 32))
    for path, layer in layers.items():
        assert ("skip" in layer.options) is (path.startswith("stage1.") or not path.endswith(".0"))
    stored = sum(p.numel() for p in prunet_space.parameters())
    assert stored == pytest.approx(78.0e6, rel=1e-3)  # what the docstring promises: 312 MB


def test_prunet_granularity_and_drop_path():
    with torch.device("meta"):
        fine = prunet.prunet(step=8, drop_path=0.2)
    assert decisions(fine)["stage2.1.k3.hidden"].options == list(range(8, 513, 8))
    rates = [m.drop_prob for m in fine.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[-1] < 0.2
    derive(fine, sample(fine, torch.Generator().manual_seed(0)))


def test_unknown_releases():
    with pytest.raises(UserError, match="did you mean 'fbnet-c'"):
        fbnet.released("fbnet_c")
    with pytest.raises(UserError, match="did you mean 'gpunet-p1'"):
        prunet.released("gpunet-p2")
