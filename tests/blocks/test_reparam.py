"""Every branch alone and every sum of branches equals its one folded convolution."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith import gates
from netsmith.architecture import sample
from netsmith.blocks.mobile import ConvBn
from netsmith.blocks.reparam import KINDS, Branches
from netsmith.cost.counts import BranchCount, FileBytes, Macs, Params, shipped
from netsmith.cost.memory import PeakMemory
from netsmith.cost.prices import atoms, tabulate
from netsmith.decisions import Draw, OneOf, decisions, derive
from netsmith.errors import UserError

SHAPES = pytest.mark.parametrize(("channels", "groups"), [((8, 12), 1), ((8, 8), 1), ((8, 12), 2), ((8, 8), 8)])
STRIDES = pytest.mark.parametrize("stride", [1, 2])
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["double", "single"]
)


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """As after training: no statistic at its start, some scales negative, weights in what starts as the identity."""
    for name, tensor in model.to(dtype).state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "bn" in name or "identity" in name or "running" in name:
            tensor.uniform_(-1.5, 1.5) if tensor.is_floating_point() else None
        elif name.endswith("point.weight"):
            tensor.normal_(std=0.3)
    return model.eval()


def masked(block: Branches, *on: str) -> Branches:
    network = derive(block, {kind: "on" if kind in on else "off" for kind in block.kinds})
    assert isinstance(network, Branches)
    return network


def error(block: Branches, size: tuple[int, int] = (7, 9)) -> float:
    """Largest difference to the folded layer, over the largest output."""
    x = torch.randn(2, block.options["inputs"], *size, dtype=next(block.parameters()).dtype)
    plain = block.folded()
    assert type(plain) is ConvBn
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.no_grad():
        expected = block(x)
        return float((plain(x) - expected).abs().max() / expected.abs().max())


@SHAPES
@STRIDES
@PRECISIONS
@pytest.mark.parametrize("kind", KINDS)
def test_every_branch_alone_folds_exactly(kind, channels, groups, stride, dtype, tolerance):
    block = Branches(*channels, stride=stride, groups=groups, act="none")
    block.identity = None
    alone = settled(masked(block, kind), dtype)
    assert isinstance(alone, Branches)
    assert error(alone) < tolerance


@SHAPES
@STRIDES
@PRECISIONS
@pytest.mark.parametrize("kernel", [3, 5])
def test_random_masks_fold_exactly(channels, groups, stride, kernel, dtype, tolerance):
    block = settled(Branches(*channels, kernel=kernel, stride=stride, groups=groups), dtype)
    assert isinstance(block, Branches)
    generator = torch.Generator().manual_seed(kernel)
    for size in ((7, 7), (8, 6), (1, 1)):
        on = [kind for kind in KINDS if torch.rand((), generator=generator) < 0.5] or ["kxk"]
        assert error(masked(block, *on), size) < tolerance, (size, on)


def test_the_identity_alone_is_a_batch_norm():
    block = settled(masked(Branches(4, 4, groups=2, act="none")))
    assert isinstance(block, Branches)
    assert block.identity is not None
    x = torch.randn(2, 4, 5, 5).double()
    assert torch.equal(block(x), block.identity(x))
    assert error(block) < 1e-10
    weight = block.folded().conv.weight
    assert weight.count_nonzero() == 4
    assert (weight[:, :, 1, 1] != 0).equal(torch.eye(2, dtype=torch.bool).repeat(2, 1))


def test_a_fold_by_hand():
    """1x1 and its average with fresh norms: the mean of nine pixels, and zero outside."""
    block = masked(Branches(1, 2, kinds=("1x1_avg",), act="none", eps=0.0), "1x1_avg").eval()
    a, b = block.get_submodule("1x1_avg").point.weight.flatten().tolist()
    expected = torch.tensor([a, b])[:, None, None, None].expand(2, 1, 3, 3) / 9
    torch.testing.assert_close(block.folded().conv.weight, expected)
    assert block.folded().conv.bias.tolist() == [0, 0]


def test_zeros_in_between_would_not_be_exact():
    """The border is padded with what the norm gives to zeros: with zeros there the fold would fail."""
    block = settled(masked(Branches(4, 6, act="none"), "1x1_avg"))
    branch = block.get_submodule("1x1_avg")
    x = torch.randn(1, 4, 6, 6).double()
    wrong = branch.bn(branch.spatial(F.pad(branch.point_bn(branch.point(x)), (1, 1, 1, 1))))
    right = block(x)
    assert torch.allclose(wrong[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1])
    assert (wrong - right).abs().max() > 0.1


def test_the_1x1_starts_as_the_identity():
    """In eval mode a fresh 1x1_kxk branch is its kxk and two norms that do nothing yet."""
    block = masked(Branches(6, 8, groups=2, act="none", eps=0.0), "1x1_kxk").double().eval()
    spatial = block.get_submodule("1x1_kxk").spatial
    torch.testing.assert_close(block.folded().conv.weight, spatial.weight)
    x = torch.randn(1, 6, 5, 5).double()
    torch.testing.assert_close(block(x), F.conv2d(x, spatial.weight, padding=1, groups=2))


def test_with_a_stride_the_chain_is_only_its_second_part():
    assert hasattr(masked(Branches(4, 4), "1x1_kxk").get_submodule("1x1_kxk"), "point")
    assert not hasattr(masked(Branches(4, 4, stride=2), "1x1_kxk").get_submodule("1x1_kxk"), "point")


def test_the_supernet_folds_into_what_it_computes():
    """Mixed, drawn with weights, and fixed: m_b is a factor of the branch and of its kernel alike."""
    block = settled(Branches(6, 6))
    assert isinstance(block, Branches)
    assert error(block) < 1e-10  # nothing drawn: every branch counts half
    for decision in decisions(block).values():
        decision.drawn = Draw([0], torch.rand(1).double().requires_grad_())
    assert error(block) < 1e-10
    gates.fix(block, {kind: "on" if kind in ("kxk", "1xk") else "off" for kind in KINDS})
    assert error(block) < 1e-10
    x = torch.randn(1, 6, 5, 5).double()
    torch.testing.assert_close(block(x), masked(block, "kxk", "1xk")(x))


def test_a_branch_that_is_off_is_not_computed_and_gets_no_gradient():
    block = Branches(4, 6)
    gates.fix(block, {kind: "on" if kind == "kxk" else "off" for kind in KINDS})
    block(torch.randn(2, 4, 5, 5)).square().mean().backward()
    touched = {name.split(".")[0] for name, p in block.named_parameters() if p.grad is not None}
    assert touched == {"kxk"}
    assert {k for k in KINDS if decisions(block)[k].candidate("on").bn.num_batches_tracked} == {"kxk"}


@pytest.mark.parametrize("use", ["forward", "folded"])
def test_nothing_on_and_no_identity_is_an_error(use):
    block = masked(Branches(4, 6))
    with pytest.raises(UserError, match=r"Branches\(4, 6, kernel=3, on=''\) has no branch on and no identity"):
        block(torch.zeros(1, 4, 5, 5)) if use == "forward" else block.folded()
    supernet = Branches(4, 6)
    gates.fix(supernet, dict.fromkeys(KINDS, "off"))
    with pytest.raises(UserError, match="has no branch on"):
        supernet(torch.zeros(1, 4, 5, 5))


def test_wrong_arguments():
    with pytest.raises(UserError, match="odd and at least 3; given: 4"):
        Branches(4, 4, kernel=4)
    with pytest.raises(UserError, match="unknown branch '3x3'"):
        Branches(4, 4, kinds=("3x3",))


def test_folding_leaves_the_block_alone():
    block = settled(Branches(4, 6)).train()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert block.folded().training
    assert block.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


# cost -----------------------------------------------------------------------------------------------------------------


def space() -> nn.Module:
    torch.manual_seed(0)
    choice = OneOf({"branches": Branches(8, 8), "conv": ConvBn(8, 8, 3), "skip": nn.Identity()})
    fixed = nn.Sequential(ConvBn(8, 8), masked(Branches(8, 8), "kxk", "1x1"))
    return nn.Sequential(Branches(3, 8, stride=2), choice, fixed)


COSTS = (Params(), Macs(), FileBytes(), BranchCount())


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.name)
def test_the_shipped_costs_do_not_depend_on_the_branches(cost):
    model = space()
    prices = tabulate(model, cost, (3, 8, 8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        architecture = sample(model, generator)
        assert prices.of(architecture) == cost(derive(model, architecture), (3, 8, 8))
    inner = {path: row for path, row in prices.options.items() if path != "1"}
    assert len(inner) == 12
    on = 1.0 if cost.name == "branches" else 0.0
    assert all(row == {"on": on, "off": 0.0} for row in inner.values())


def test_a_block_costs_what_its_convolution_costs():
    block, shape = Branches(8, 12, stride=2, groups=2), (8, 9, 9)
    plain = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, groups=2), nn.ReLU())
    assert Params()(block, shape) == Params()(plain, shape)
    assert Macs()(block, shape) == Macs()(plain, shape)
    assert FileBytes()(block, shape) == 4 * Params()(plain, shape)
    assert PeakMemory()(block, shape) == PeakMemory()(plain, shape)
    assert BranchCount()(block, shape) == 6


def test_an_atom_is_the_folded_layer_even_while_nothing_is_on():
    """Its text is that of the plain layer: both have one entry in a latency table."""
    model = space()
    gates.fix(model, {path: "off" for path in decisions(model) if path != "1"})
    found = {atom.path: atom for atom in atoms(model, (3, 8, 8))}
    assert set(found) == {"0", "1.branches", "1.conv", "1.skip", "2"}
    assert repr(found["1.branches"].module) == repr(found["1.conv"].module) == "ConvBn(8, 8, kernel=3)"
    assert not any(isinstance(module, Branches) for module in found["2"].module.modules())


def test_what_has_nothing_to_fold_ships_as_it_is():
    plain = nn.Sequential(ConvBn(3, 8), nn.ReLU())
    assert shipped(plain) is plain
    block = Branches(3, 8)
    twice = shipped(nn.ModuleDict({"a": block, "b": block}))
    assert twice["a"] is twice["b"]
