"""Norms without batches, and proxy-normalised activations: golden values [more-efficient-efficientnet.md]."""

import math

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.blocks.norms import NORMS, PROXY_EPS, ProxyNorm, make_norm
from netsmith.errors import UserError

GOLDEN = [
    (nn.SiLU, (1, 0, 0, 0), 0.206048, 0.310004, 1.714977, (-0.814596, -0.353368, 2.667725)),
    (nn.SiLU, (0.5, 0.3, 0, 0), 0.228737, 0.105096, 2.720690, (-0.867276, -0.153459, 2.157094)),
    (nn.SiLU, (1.5, -1, 0.2, 0.1), 0.178199, 0.562959, 1.298637, (-0.477696, -0.580673, 2.056255)),
    (nn.ReLU, (1, 0, 0, 0), 0.398451, 0.338035, 1.648373, (-0.656796, -0.656796, 2.639950)),
    (nn.ReLU, (1.5, -1, 0.2, 0.1), 0.370816, 0.569246, 1.291806, (-0.479023, -0.479023, 2.104590)),
]


def proxy(act: nn.Module, numbers: tuple[float, ...] = (1, 0, 0, 0), channels: int = 1) -> ProxyNorm:
    found = ProxyNorm(channels, act).double()
    for parameter, number in zip(found.parameters(), numbers, strict=True):
        parameter.data.fill_(number)
    middles = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    found.quantiles = math.sqrt(2) * torch.erfinv(2 * middles - 1)
    return found


@pytest.mark.parametrize(("act", "numbers", "mean", "variance", "factor", "outputs"), GOLDEN)
def test_golden_values(act, numbers, mean, variance, factor, outputs):
    found = proxy(act(), numbers)
    m, f = found.proxy()
    assert m.item() == pytest.approx(mean, abs=1e-6)
    assert 1 / f.item() ** 2 - PROXY_EPS == pytest.approx(variance, abs=1e-6)
    assert f.item() == pytest.approx(factor, abs=1e-6)
    z = found(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 3, 1))
    assert z.flatten().tolist() == pytest.approx(outputs, abs=1e-6)


def test_golden_derivatives():
    found = proxy(nn.SiLU())
    mean, factor = found.proxy()
    slopes = [torch.autograd.grad(one, list(found.parameters()), retain_graph=True) for one in (mean, factor)]
    assert [s.item() for s in slopes[0]] == pytest.approx([0.350387, 0.5, 0.350387, 0.5], abs=1e-6)
    assert [s.item() for s in slopes[1]][:2] == pytest.approx([-1.723131, -0.883675], abs=1e-6)


def test_gradients_flow_into_all_four():
    found = proxy(nn.SiLU(), (0.8, 0.2, 0.1, -0.1), channels=2)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(found.parameters())

    def call(x, *numbers):
        return torch.func.functional_call(found, dict(zip(names, numbers, strict=True)), (x,))

    names = [name for name, _ in found.named_parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_an_identity_gives_the_closed_form():
    numbers = gamma, _, gamma_, beta_ = (1.3, 0.7, 0.2, -0.4)
    found = proxy(nn.Identity(), numbers)
    y = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 9, 1)
    spread = found.quantiles.square().mean()
    assert spread.item() == pytest.approx(0.993596, abs=1e-6)
    expected = gamma * (y - beta_) / torch.sqrt(gamma**2 * (1 + gamma_) ** 2 * spread + PROXY_EPS)
    assert torch.allclose(found(y), expected, rtol=0, atol=1e-12)
    assert torch.allclose(found(y), proxy(nn.Identity(), (gamma, 5.0, gamma_, beta_))(y), rtol=0, atol=1e-12)


def test_what_is_distributed_as_assumed_comes_out_normal():
    found = proxy(nn.SiLU(), (1.5, -1, 0.2, 0.1))
    x = (1.2 * found.quantiles + 0.1).view(1, 1, 200, 1)
    _, factor = found.proxy()
    variance = 1 / factor**2 - PROXY_EPS
    assert found(x).mean().item() == pytest.approx(0, abs=1e-12)
    assert found(x).var(correction=0).item() == pytest.approx((variance / (variance + PROXY_EPS)).item(), abs=1e-12)


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "batch"])
def test_images_do_not_see_each_other(norm):
    torch.manual_seed(0)
    block = MBConv(8, 8, hidden=16, squeeze=2, act="swish", norm=norm).double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    together = block(x)
    assert torch.allclose(together[:1], block(x[:1]), rtol=0, atol=1e-12)
    assert torch.equal(together, block.eval()(x))


def test_the_projection_has_a_scale_alone():
    block = MBConv(8, 8, hidden=16, norm="layer+proxy")
    assert [name for name, _ in block.project.bn.named_parameters()] == ["weight"]
    assert list(block.expand.bn.parameters()) == []
    assert isinstance(block.depthwise.act, ProxyNorm)


def test_group_norm_with_one_group_is_layer_norm():
    x = torch.randn(3, 8, 5, 5)
    expected = nn.functional.layer_norm(x, (8, 5, 5), eps=1e-3)
    assert torch.allclose(make_norm("layer", 8, eps=1e-3, linear=False)(x), expected, atol=1e-6)
    assert make_norm("group", 6, eps=1e-3, linear=False).num_groups == 2  # four do not divide six


def test_a_delayed_factor_changes_what_is_squeezed_and_nothing_else():
    torch.manual_seed(0)
    now, later = (
        MBConv(8, 8, hidden=16, squeeze=squeeze, act="swish", norm="layer+proxy", delay_scale=delay).double()
        for squeeze, delay in ((4, False), (4, True))
    )
    later.load_state_dict(now.state_dict())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    _, factor = later.depthwise.unscaled(x[:, :0].new_zeros(2, 16, 6, 6))
    with torch.no_grad():  # the squeeze sees means without the factor: its first weights can take it over
        later.squeeze.reduce.weight.mul_(factor.view(1, -1, 1, 1))
    assert torch.allclose(now(x), later(x), rtol=0, atol=1e-10)


def test_a_head_without_the_factor():
    head = Head(4, 6, 3, act="swish", norm="layer+proxy", delay_scale=True).double().eval()
    whole = Head(4, 6, 3, act="swish", norm="layer+proxy").double().eval()
    whole.load_state_dict(head.state_dict())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        _, factor = head.conv.unscaled(x)
        head.linear.weight.mul_(factor.view(1, -1))
    assert torch.allclose(head(x), whole(x), rtol=0, atol=1e-10)


def test_unknown_norms():
    with pytest.raises(UserError, match="did you mean 'layer\\+proxy'"):
        make_norm("layer+prox", 8, eps=1e-3, linear=False)


def test_a_plain_layer_is_what_it_was():
    torch.manual_seed(0)
    layer = ConvBn(3, 8, 3, stride=2)
    assert isinstance(layer.bn, nn.BatchNorm2d)
    assert repr(layer) == "ConvBn(3, 8, kernel=3, stride=2)"
