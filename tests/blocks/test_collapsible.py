"""What is wide in training equals the one convolution it ships as; a gate goes from the block to that convolution."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith.blocks.collapsible import ORDERS, CollapsedBlock, Collapsible, LinearBlock
from netsmith.blocks.mobile import ConvBn, FusedMBConv, MBConv
from netsmith.blocks.residual import Bottleneck, ResidualConv
from netsmith.cost.counts import Macs, Params, shipped
from netsmith.decisions import Width
from netsmith.errors import UserError
from netsmith.ship.export import fold
from netsmith.spaces.references import mobilenet_v2

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["double", "single"]
)
SIZES = ((7, 9), (8, 8), (1, 1))


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """As after training: no statistic and no bias at its start, some scales negative."""
    for module in model.to(dtype).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.uniform_(-1.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.eval()


def error(block: nn.Module, channels: int, size: tuple[int, int] = (7, 9)) -> float:
    """Largest difference to what ships, over the largest output."""
    x = torch.randn(2, channels, *size, dtype=next(block.parameters()).dtype)
    with torch.no_grad():
        expected, found = block(x), shipped(block)(x)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# linear blocks --------------------------------------------------------------------------------------------------------

LINEAR = {
    **{order: {"order": order} for order in ORDERS},
    "depthwise": {"order": "1x1_kxk_1x1", "depthwise": True},
}


@PRECISIONS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("form", LINEAR)
def test_every_linear_block_folds_exactly(form, kernel, stride, dtype, tolerance):
    block = settled(LinearBlock(6, 8, kernel, hidden=24, stride=stride, **LINEAR[form]), dtype)
    assert type(shipped(block)) is nn.Conv2d
    assert max(error(block, 6, size) for size in SIZES) < tolerance


@PRECISIONS
@pytest.mark.parametrize("form", LINEAR)
def test_a_skip_is_one_in_the_centre(form, dtype, tolerance):
    block = settled(LinearBlock(6, 6, hidden=24, skip=True, **LINEAR[form]), dtype)
    assert max(error(block, 6, size) for size in SIZES) < tolerance
    with_skip, block.skip = block.folded().weight, False
    ones = (with_skip - block.folded().weight).double()
    torch.testing.assert_close(ones[:, :, 1, 1], torch.eye(6).double(), atol=tolerance, rtol=0)
    assert ones.abs().sum().item() == pytest.approx(6, abs=1e-4)


def test_zero_padding_in_between_is_exact_behind_the_kxk_and_wrong_behind_a_1x1_with_bias():
    """[ran.md] kxk then 1x1 folds with plain zero padding; 1x1 then kxk only in the interior."""
    x = torch.randn(1, 6, 8, 8).double()

    def zero_padded(block: LinearBlock) -> torch.Tensor:
        y = x
        for conv in block.convs:
            y = F.conv2d(y, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        return y

    first, second = (settled(LinearBlock(6, 8, hidden=12, order=order)) for order in ORDERS[:2])
    torch.testing.assert_close(zero_padded(first), first.folded()(x), atol=1e-10, rtol=0)
    wrong, right = zero_padded(second), second.folded()(x)
    torch.testing.assert_close(wrong[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1], atol=1e-10, rtol=0)
    assert (wrong - right).abs().max() > 0.1
    second.convs[0].bias.data.zero_()
    torch.testing.assert_close(zero_padded(second), second.folded()(x), atol=1e-10, rtol=0)


def test_a_linear_block_by_hand():
    """W = 2 * 3 + 4 * 5 = 26 in the centre; b = 2 * 7 + 4 * 9 + 1 = 51."""
    block = LinearBlock(1, 1, hidden=2)
    spatial, point = block.convs
    with torch.no_grad():
        spatial.weight.zero_()[:, 0, 1, 1] = torch.tensor([3.0, 5.0])
        spatial.bias.copy_(torch.tensor([7.0, 9.0]))
        point.weight.copy_(torch.tensor([2.0, 4.0])[None, :, None, None])
        point.bias.fill_(1)
    conv = block.folded()
    assert conv.weight.flatten().tolist() == [0, 0, 0, 0, 26, 0, 0, 0, 0]
    assert conv.bias.tolist() == [51]


@PRECISIONS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", LINEAR)
def test_online_has_the_same_loss_and_gradients(form, stride, dtype, tolerance):
    expanded = settled(LinearBlock(6, 6, hidden=32, stride=stride, skip=stride == 1, **LINEAR[form]), dtype).train()
    online = copy.deepcopy(expanded)
    online.online = True
    x = torch.randn(4, 6, 7, 9, dtype=dtype)
    inputs, losses = [x.clone().requires_grad_() for _ in range(2)], []
    for block, given in zip((expanded, online), inputs, strict=True):
        losses.append(block(given).sigmoid().square().mean())
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    pairs = [(inputs[0].grad, inputs[1].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(expanded.parameters(), online.parameters(), strict=True)]
    for a, b in pairs:
        assert float((a - b).abs().max() / a.abs().max()) < tolerance


def test_online_trains_to_the_same_weights():
    blocks = [LinearBlock(4, 4, hidden=16, order="1x1_kxk_1x1", skip=True).double()]
    blocks.append(copy.deepcopy(blocks[0]))
    blocks[1].online = True
    x, target = torch.randn(2, 8, 4, 6, 6).double()
    for block in blocks:
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(block(x), target).backward()
            optimizer.step()
    for a, b in zip(*(block.parameters() for block in blocks), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_sesr_has_its_published_macs():
    """SESR-M5 on 32 images of 64x64: 41.77 G expanded, 1.84 G online [sesr README]. Online SESR convolves padded unit
    images to get a kernel; here it is a matrix product, so that it takes less."""

    def sesr(*, online: bool) -> nn.Module:
        shapes = [(1, 16, 5), *[(16, 16, 3)] * 5, (16, 4, 5)]
        with torch.device("meta"):
            return nn.Sequential(*(LinearBlock(i, o, k, skip=i == o, online=online) for i, o, k in shapes))

    gmacs = {online: 32 * Macs(trained=True)(sesr(online=online), (1, 64, 64)) / 1e9 for online in (False, True)}
    file = 32 * Macs()(sesr(online=False), (1, 64, 64)) / 1e9
    kernels = (gmacs[True] - file) / 32  # counted with every image, computed once for the batch
    assert gmacs[False] == pytest.approx(41.77, abs=0.01)
    assert file == pytest.approx(1.772, abs=0.001)
    assert file + kernels < 1.78


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"order": "1x1"}, "unknown order of a linear block '1x1'"),
        ({"kernel": 4}, "needs an odd kernel; given: 4"),
        ({"skip": True}, "a skip needs the shape to stay; given: 4 to 6 channels, stride 1"),
        ({"depthwise": True}, "stands between two 1x1 ones; given: order 'kxk_1x1'"),
    ],
)
def test_linear_blocks_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said):
        LinearBlock(4, 6, **given)


# gates ----------------------------------------------------------------------------------------------------------------

BLOCKS = {
    "mbconv": lambda: MBConv(8, 8, hidden=24, act="hardswish"),
    "mbconv_wider": lambda: MBConv(8, 12, hidden=24, kernel=5, act="swish"),
    "mbconv_stride": lambda: MBConv(8, 12, hidden=24, stride=2, act="relu6"),
    "mbconv_same": lambda: MBConv(8, 12, hidden=24, stride=2, same=True),
    "mbconv_no_expand": lambda: MBConv(8, 8, hidden=8, expand=False),
    "mbconv_grouped": lambda: MBConv(8, 8, hidden=24, group_size=4),
    "fused": lambda: FusedMBConv(8, 8, hidden=24, act="swish"),
    "fused_same": lambda: FusedMBConv(8, 12, hidden=24, stride=2, same=True),
    "bottleneck": lambda: Bottleneck(8, 8, hidden=4),
    "bottleneck_stride": lambda: Bottleneck(8, 12, hidden=4, stride=2),
    "bottleneck_grouped": lambda: Bottleneck(8, 8, hidden=4, group_size=2),
}
NAMES = pytest.mark.parametrize("name", BLOCKS)
FRONTS = pytest.mark.parametrize("front", [True, False])


def collapsible(name: str, gate: float, *, front: bool = True, dtype: torch.dtype = torch.float64) -> Collapsible:
    made = settled(Collapsible(BLOCKS[name](), front=front, gate=gate), dtype)
    assert isinstance(made, Collapsible)
    return made


@NAMES
@FRONTS
@pytest.mark.parametrize("training", [True, False])
def test_a_gate_of_one_is_the_block(name, front, training):
    block = settled(BLOCKS[name]()).train(training)
    made = Collapsible(block, front=front)
    x = torch.randn(2, 8, 8, 8).double()
    expected = copy.deepcopy(block)(x)
    assert torch.equal(made(x), expected)
    made.gate = torch.ones(())  # a learned gate runs the mixture
    torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=0)
    made.gate = 1.0
    ships = shipped(made)
    assert type(ships) is type(block)
    assert all(torch.equal(a, b) for a, b in zip(ships.parameters(), block.parameters(), strict=True))


@PRECISIONS
@NAMES
@FRONTS
def test_a_gate_of_zero_is_one_convolution(name, front, dtype, tolerance):
    made = collapsible(name, 0.0, front=front, dtype=dtype)
    assert max(error(made, 8, size) for size in SIZES) < tolerance
    ships = shipped(made)
    kept = front and not isinstance(made.block, Bottleneck)
    assert type(ships) is (CollapsedBlock if kept else ConvBn)
    assert sum(isinstance(m, nn.Conv2d) for m in ships.modules()) == 1
    assert sum(isinstance(m, nn.BatchNorm2d) for m in ships.modules()) == kept


@NAMES
@FRONTS
def test_in_between_it_mixes(name, front):
    """By the definition: a s(z) + (1 - a) z behind every inner layer, with (1 - a) of what zeros become around it."""
    a, made = 0.3, collapsible(name, 0.3, front=front)
    x = torch.randn(2, 8, 8, 8).double()
    block = made.block
    layers = [block.reduce, block.conv, block.expand] if "bottleneck" in name else [*block.opening(), block.project]
    with torch.no_grad():
        y = x if made.front is None else a * x + (1 - a) * made.front(x)
        edge = torch.zeros(1, y.shape[1], 1, 1).double()
        for number, layer in enumerate(layers):
            size, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            low = 0 if layer.same and size == 3 else size // 2  # the even sizes here: TensorFlow pads behind
            padded = edge.expand(2, -1, 8 + size // 2 + low, 8 + size // 2 + low).clone()
            padded[..., low : low + y.shape[-2], low : low + y.shape[-1]] = y
            padded = padded[..., : y.shape[-2] + low + size // 2, : y.shape[-1] + low + size // 2]
            z = layer.bn(F.conv2d(padded, layer.conv.weight, None, stride, groups=layer.conv.groups))
            zero = layer.bn(layer.conv.weight.new_zeros(1, len(layer.conv.weight), 1, 1))
            last = number == len(layers) - 1
            y, edge = (z, zero) if last else (a * made.acts[number](z) + (1 - a) * z, (1 - a) * zero)
        if "bottleneck" in name:
            y = block.act(y + block.shortcut(x))
        elif block.residual:
            y = y + x
        torch.testing.assert_close(made(x), y, atol=1e-10, rtol=0)


def test_a_learned_gate_has_its_gradient():
    made = collapsible("mbconv", 1.0)
    x = torch.randn(1, 8, 5, 5).double()

    def at(gate: torch.Tensor) -> torch.Tensor:
        made.gate = gate
        return made(x)

    assert torch.autograd.gradcheck(at, torch.tensor(0.4).double().requires_grad_())
    learned = torch.tensor(0.4).double().requires_grad_()
    made.gate = learned.sigmoid()  # as in a search: a tensor with a graph, which no copy takes along
    made(x).sum().backward()
    assert learned.grad is not None
    assert copy.deepcopy(made).gate == pytest.approx(made.gate.item())


@pytest.mark.parametrize("use", [shipped, lambda block: Params()(block, (8, 8, 8)), fold])
def test_a_gate_in_between_does_not_ship(use):
    with pytest.raises(UserError, match=r"with a gate of 1 or 0: Collapsible\(MBConv\(8, 8, .*front=True, gate=0.3\)"):
        use(collapsible("mbconv", 0.3))


def test_the_block_that_was_given_stays():
    block = settled(MBConv(8, 8, hidden=24)).train()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    made = Collapsible(block, gate=0.5)
    made(torch.randn(2, 8, 6, 6).double()).sum().backward()
    made.gate = 0.0
    assert made.folded().training
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (lambda: MBConv(8, 8, hidden=24, squeeze=4), "squeeze-excite multiplies channels"),
        (lambda: MBConv(8, 8, hidden=Width((8, 16))), "its width is open; derive it first"),
        (lambda: MBConv(8, 8, hidden=24, groups=2), "groups and a shuffle between them"),
        (lambda: MBConv(8, 8, hidden=24, norm="layer+proxy"), "only batch norm folds"),
        (lambda: fold(MBConv(8, 8, hidden=24)), "only batch norm folds"),
        (lambda: Bottleneck(8, 12, hidden=4, stride=2, same=True), "depends on the image's size where in the kernel"),
        (lambda: ResidualConv(8, 8, 3), "no MBConv, FusedMBConv or Bottleneck"),
        (lambda: nn.Conv2d(8, 8, 3), "no MBConv, FusedMBConv or Bottleneck"),
    ],
)
def test_blocks_that_do_not_collapse(block, said):
    with pytest.raises(UserError, match=rf"does not collapse into one convolution: .*{said}"):
        Collapsible(block())


def test_a_gate_is_between_0_and_1():
    with pytest.raises(UserError, match=r"a gate is between 0 and 1; given: 1.5"):
        Collapsible(MBConv(8, 8, hidden=24), gate=1.5)


# whole networks -------------------------------------------------------------------------------------------------------


def collapsed_mobilenet(gate: float) -> tuple[nn.Module, nn.Module]:
    plain = settled(mobilenet_v2(0.25, 10, resolution=32), torch.float32)
    changed = copy.deepcopy(plain)
    for name, block in list(changed.named_children()):
        if isinstance(block, MBConv):
            changed.add_module(name, Collapsible(block, gate=gate))
    return plain, changed


def test_a_network_stays_itself_until_its_gates_move():
    plain, changed = collapsed_mobilenet(1.0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), changed(x))
    assert Macs()(plain, (3, 32, 32)) == Macs()(changed, (3, 32, 32))
    assert Params()(plain, (3, 32, 32)) == Params()(changed, (3, 32, 32))


def test_a_collapsed_network_folds_and_counts():
    """The exported file is in tests/ship/test_export.py."""
    _, network = collapsed_mobilenet(0.0)
    settled(network, torch.float32)
    x, plain = torch.randn(2, 3, 32, 32), fold(network)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(plain(x), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert sum(isinstance(m, CollapsedBlock) for m in plain.modules()) == 17
    with torch.device("meta"):
        empty = mobilenet_v2(0.25, 10, resolution=32)
    changed = [Collapsible(m, gate=0.0) if isinstance(m, MBConv) else m for m in empty]
    assert Macs()(nn.Sequential(*changed), (3, 32, 32)) == Macs()(network, (3, 32, 32))
