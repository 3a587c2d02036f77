"""Mobile blocks: an open block is exactly the sliced one, and prints what the latency table reads."""

import copy

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv, make_divisible
from netsmith.decisions import Draw, Width, derive
from netsmith.errors import UserError

WIDTHS = (4, 8, 20)
KINDS = {
    "mb": (MBConv, {}),
    "mb_k5_se": (MBConv, {"kernel": 5, "squeeze": 3}),
    "mb_hard_se": (MBConv, {"squeeze": 3, "gate": "hard", "act": "hardswish"}),
    "fused": (FusedMBConv, {}),
    "fused_k5_se": (FusedMBConv, {"kernel": 5, "squeeze": 3, "act": "swish"}),
}
every = pytest.mark.parametrize("kind", KINDS)
strides = pytest.mark.parametrize(("outputs", "stride"), [(6, 1), (6, 2), (10, 1), (10, 2)])


def block(kind: str, outputs: int = 6, stride: int = 1):
    build, options = KINDS[kind]
    return randomize(build(6, outputs, hidden=Width(WIDTHS), stride=stride, **options).double())


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms as after some training, so that no statistic hides a wrong slice."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def fixed(model, width: int):
    model.hidden.drawn = Draw([model.hidden.index(width)], torch.ones(1))
    return model


def masked(model, x: torch.Tensor, width: int) -> torch.Tensor:
    """The textbook form: everything at full width, channels beyond ``width`` zeroed after activation."""
    y = x
    for layer in model.opening():
        y = layer(y)
    y = y * (torch.arange(y.shape[1]) < width).to(y)[:, None, None]
    if model.squeeze is not None:
        y = model.squeeze(y)
    y = model.project(y)
    return x + y if model.residual else y


@every
@strides
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("training", [True, False])
def test_open_equals_masked_equals_sliced(kind, outputs, stride, width, training):
    wide = block(kind, outputs, stride).train(training)
    narrow = derive(wide, {"hidden": width})
    assert isinstance(narrow, nn.Module)
    x = torch.randn(4, 6, 9, 9).double()
    textbook = masked(copy.deepcopy(wide), x, width)
    opened = fixed(wide, width)(x)
    assert (opened - textbook).abs().max() < 1e-10
    assert (opened - narrow(x)).abs().max() < 1e-10
    # Also the statistics that training leaves behind.
    again = derive(wide, {"hidden": width}).state_dict()
    for name, tensor in narrow.state_dict().items():
        assert torch.allclose(tensor, again[name], atol=1e-12), name
    assert narrow.training is training


@every
@pytest.mark.parametrize("training", [True, False])
def test_channels_that_do_not_exist_get_exactly_zero_gradient(kind, training):
    wide = fixed(block(kind).train(training), 8)
    wide(torch.randn(4, 6, 9, 9).double()).square().sum().backward()

    def beyond(name: str, gradient: torch.Tensor) -> torch.Tensor:
        inner = name.startswith(("project.conv", "squeeze.reduce.weight"))
        return gradient[:, 8:] if inner else gradient[8:]

    for name, parameter in wide.named_parameters():
        if name == "hidden.logits":
            assert parameter.grad is None
        elif not name.startswith(("project.bn", "squeeze.reduce.bias")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            assert (beyond(name, parameter.grad) == 0).all(), name


@pytest.mark.parametrize("kind", ["mb", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_several_widths_are_their_mixture_before_the_last_norm(kind, training):
    wide = block(kind).train(training)
    seen = []
    wide.project.narrow = (
        lambda x, inputs, outputs: (
            seen.append(  # type: ignore[method-assign]
                torch.nn.functional.conv2d(x, wide.project.conv.weight[:outputs, :inputs])
            )
            or torch.zeros(())
        )
    )
    x = torch.randn(4, 6, 9, 9).double()
    with torch.no_grad():
        wide.hidden.logits.normal_()
    p = wide.hidden.logits.softmax(0)
    for width in WIDTHS:
        wide.body_at(x, width)
    wide(x)
    *alone, together = seen
    assert (together - sum(q * y for q, y in zip(p, alone, strict=True))).abs().max() < 1e-10


def test_drawn_weights_get_their_gradient_through_the_mask():
    wide = block("mb").eval()
    x = torch.randn(2, 6, 9, 9).double()
    wide(x).sum().backward()
    analytic = wide.hidden.logits.grad.clone()
    numeric = torch.zeros_like(analytic)
    with torch.no_grad():
        for i in range(len(WIDTHS)):
            for sign in (1, -1):
                wide.hidden.logits[i] += sign * 1e-6
                numeric[i] += sign * wide(x).sum() / 2e-6
                wide.hidden.logits[i] -= sign * 1e-6
    assert torch.allclose(analytic, numeric, rtol=1e-6, atol=1e-7)


def test_a_narrow_pass_computes_no_more_than_the_narrow_block():
    from torch.utils.flop_counter import FlopCounterMode

    wide = fixed(block("mb"), 4)
    x = torch.randn(1, 6, 9, 9).double()
    counts = []
    for model in (wide, derive(wide, {"hidden": 4})):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_blocks_without_open_width_and_with_groups():
    x = torch.randn(2, 8, 9, 9)
    grouped = MBConv(8, 8, hidden=24, groups=2).eval()
    y = grouped.project(grouped.depthwise(nn.functional.channel_shuffle(grouped.expand(x), 2)))
    assert torch.allclose(grouped(x), x + y)
    plain = MBConv(8, 8, hidden=8, expand=False).eval()
    assert torch.allclose(plain(x), x + plain.project(plain.depthwise(x)))
    with pytest.raises(UserError, match="no groups"):
        MBConv(8, 8, hidden=Width((8, 16)), groups=2)
    with pytest.raises(UserError, match="without expansion"):
        MBConv(8, 8, hidden=16, expand=False)


def test_drop_path_drops_the_branch_of_whole_images():
    layer = MBConv(8, 8, hidden=16, drop_path=0.5)
    x = torch.randn(64, 8, 5, 5)
    kept = (layer(x) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 64
    assert MBConv(8, 8, hidden=16, stride=2, drop_path=0.5)(x).shape == (64, 8, 3, 3)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (ConvBn(3, 16, 3, stride=2), "ConvBn(3, 16, kernel=3, stride=2)"),
        (ConvBn(3, 16, act="none"), "ConvBn(3, 16, kernel=1, act='none')"),
        (MBConv(16, 24, kernel=3, hidden=48, stride=2), "MBConv(16, 24, kernel=3, hidden=48, stride=2)"),
        (MBConv(16, 24, hidden=48, squeeze=4), "MBConv(16, 24, kernel=3, hidden=48, squeeze=4)"),
        (
            MBConv(16, 16, hidden=16, squeeze=4, gate="hard", expand=False),
            "MBConv(16, 16, kernel=3, hidden=16, squeeze=4, gate='hard', expand=False)",
        ),
        (FusedMBConv(16, 24, hidden=48, act="swish"), "FusedMBConv(16, 24, kernel=3, hidden=48, act='swish')"),
        (Head(16, 32, 10), "Head(16, 32, classes=10)"),
    ],
)
def test_printed_form(module, text):
    assert repr(module) == text


def test_the_printed_form_of_a_slice_is_that_of_the_plain_block():
    assert repr(block("mb_k5_se").sliced(8)) == repr(MBConv(6, 6, kernel=5, hidden=8, squeeze=3))


@pytest.mark.parametrize(
    ("value", "rounded"), [(1, 8), (11.9, 16), (12, 16), (10, 16), (33, 32), (36, 40), (67.2, 64), (491, 488)]
)
def test_make_divisible(value, rounded):
    assert make_divisible(value) == rounded
