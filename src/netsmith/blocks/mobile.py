"""Mobile building blocks: convolution stage, inverted residual (MBConv), fused inverted residual, squeeze-excite.

Every block that expands has a `hidden` width, a number or an open `Width`. An open block *slices* its weights instead
of masking full-width activations, so a narrow pass costs what the narrow block costs. A block prints the short
canonical text that is also its key in a latency table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.norms import ProxyNorm, make_norm
from netsmith.decisions import Width
from netsmith.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "none": nn.Identity,
}
GATES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "hard": nn.Hardsigmoid}


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, at least ``divisor``, not over 10 % below ``value`` (MobileNetV2)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around ``x`` as TensorFlow's "SAME" has them: the odd one, where there is one, behind and below.

    With stride 2 an even size gets (0, 1) for kernel 3 and (1, 2) for kernel 5, where PyTorch's padding has (1, 1) and
    (2, 2): the same shapes, other numbers.
    """
    sides: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class ConvBn(nn.Module):
    """Convolution, norm, activation. ``narrow`` runs the first channels only.

    ``norm`` is one of `netsmith.blocks.norms.NORMS`; with ``same`` a stride pads as in TensorFlow (`pad_same`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: str = "relu",
        norm: str = "batch",
        same: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        shown = {"kernel": kernel, "stride": stride, "groups": groups, "act": act, "norm": norm, "same": same}
        self.text = _text(ConvBn, inputs, outputs, **shown)
        self.same = same and stride > 1
        padding = 0 if self.same else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = make_norm(norm, outputs, eps=eps, linear=act == "none")
        self.act = activation(act)
        if norm.endswith("proxy") and act != "none":
            self.act = ProxyNorm(outputs, self.act)
        if not self.conv.weight.is_meta:  # there it would draw nothing, slowly
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.normalised(x))

    def normalised(self, x: Tensor) -> Tensor:
        """What goes into the activation."""
        if self.same:
            x = pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])
        return self.bn(self.conv(x))

    def unscaled(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """The output without the last factor of a proxy-normalised activation, and that factor; 1 for any other."""
        x = self.normalised(x)
        return self.act.unscaled(x) if isinstance(self.act, ProxyNorm) else (self.act(x), 1.0)

    def narrow(self, x: Tensor, inputs: int, outputs: int) -> Tensor:
        """This layer restricted to its first ``inputs`` and ``outputs`` channels; ``x`` already has ``inputs``."""
        weight, groups = self._sliced_weight(inputs, outputs)
        if self.same:
            x = pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])
        y = F.conv2d(x, weight, None, self.conv.stride, self.conv.padding, groups=groups)
        bn = self.bn
        if not isinstance(bn, nn.BatchNorm2d):
            raise ValueError("only layers with batch norm have an open width")
        if self.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, var = bn.running_mean[:outputs], bn.running_var[:outputs]
        assert bn.momentum is not None
        y = F.batch_norm(y, mean, var, bn.weight[:outputs], bn.bias[:outputs], self.training, bn.momentum, bn.eps)
        return self.act(y)

    def _sliced_weight(self, inputs: int, outputs: int) -> tuple[Tensor, int]:
        depthwise = self.conv.groups > 1 and self.conv.groups == self.conv.in_channels
        if self.conv.groups > 1 and not depthwise:
            raise ValueError("grouped convolutions have no open width: slicing would cross the groups")
        return self.conv.weight[:outputs, : 1 if depthwise else inputs], outputs if depthwise else 1

    @torch.no_grad()
    def copy_from(self, wide: ConvBn) -> None:
        """Take over the first channels of ``wide``."""
        outputs, inputs = self.conv.weight.shape[:2]
        self.conv.weight.copy_(wide.conv.weight[:outputs, :inputs])
        assert isinstance(self.bn, nn.BatchNorm2d)
        assert isinstance(wide.bn, nn.BatchNorm2d)
        _copy_bn(self.bn, wide.bn)

    def __repr__(self) -> str:
        return self.text


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means (Hu et al. 2018).

    ``gate="hard"`` is MobileNetV3's form: ReLU inside whatever the block's activation, hard sigmoid at the end.
    """

    def __init__(self, channels: int, reduced: int, *, act: str = "relu", gate: str = "sigmoid") -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.act = activation("relu" if gate == "hard" else act)
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = GATES[gate]()

    def forward(self, x: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """``factor`` is still missing in ``x``: what is squeezed does not have it, what comes out does."""
        return x * (factor * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True))))))

    def narrow(self, x: Tensor, channels: int) -> Tensor:
        reduced = F.conv2d(x.mean((2, 3), keepdim=True), self.reduce.weight[:, :channels], self.reduce.bias)
        assert self.expand.bias is not None
        gate = F.conv2d(self.act(reduced), self.expand.weight[:channels], self.expand.bias[:channels])
        return x * self.gate(gate)

    @torch.no_grad()
    def copy_from(self, wide: SqueezeExcite) -> None:
        channels = self.expand.out_channels
        self.reduce.weight.copy_(wide.reduce.weight[:, :channels])
        self.expand.weight.copy_(wide.expand.weight[:channels])
        assert self.reduce.bias is not None
        assert self.expand.bias is not None
        assert wide.reduce.bias is not None
        assert wide.expand.bias is not None
        self.reduce.bias.copy_(wide.reduce.bias)
        self.expand.bias.copy_(wide.expand.bias[:channels])


class _Inverted(nn.Module):
    """What MBConv and FusedMBConv share: an open or fixed hidden width, squeeze-excite, projection, residual sum.

    Subclasses give the layers before the squeeze (`opening`), each a ConvBn.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        inputs, outputs, hidden = options["inputs"], options["outputs"], options["hidden"]
        if isinstance(hidden, Width):
            self.hidden = hidden
        self.width = hidden.maximum if isinstance(hidden, Width) else hidden
        self.residual = options["stride"] == 1 and inputs == outputs
        reduced = options["squeeze"]
        gate = options.get("gate", "sigmoid")
        self.squeeze = SqueezeExcite(self.width, reduced, act=options["act"], gate=gate) if reduced else None
        plain = {"norm": options["norm"], "eps": options["eps"]}
        self.project = ConvBn(self.width, outputs, groups=options.get("groups", 1), act="none", **plain)
        self.drop_path = drop_path_of(options["drop_path"] if self.residual else 0.0)

    def opening(self) -> list[ConvBn]:
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        """The block without its residual sum."""
        if "hidden" in self._modules:
            return self.body_at(x, *self.hidden.extent())
        *first, last = self.opening()
        for layer in first:
            x = layer(x)
        if self.squeeze is None:
            x = last(x)
        elif self.options["delay_scale"]:
            x = self.squeeze(*last.unscaled(x))
        else:
            x = self.squeeze(last(x))
        return self.project(x)

    def body_at(self, x: Tensor, width: int, mask: Tensor | None = None) -> Tensor:
        """`body` with only the first ``width`` hidden channels, which ``mask`` (shape ``(width,)``) weighs.

        The mask stands after activation and before squeeze and projection: before batch norm, beta would leak.
        """
        inputs = x.shape[1]
        for layer in self.opening():
            x = layer.narrow(x, inputs, width)
            inputs = width
        if mask is not None:
            x = x * mask[:, None, None]
        if self.squeeze is not None:
            x = self.squeeze.narrow(x, width)
        return self.project.narrow(x, width, self.options["outputs"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + self.drop_path(y) if self.residual else y

    def at(self, hidden: int | Width) -> _Inverted:
        """A fresh block of the same kind with another hidden width."""
        return type(self)(**{**self.options, "hidden": hidden})

    def sliced(self, width: int) -> _Inverted:
        """The same block, physically ``width`` wide, with this one's weights."""
        weight = self.project.conv.weight
        with torch.device("meta"):  # its numbers come from here: draw none
            block = self.at(width)
        block = block.to(weight.dtype).to_empty(device=weight.device)
        for mine, wide in zip(block.opening(), self.opening(), strict=True):
            mine.copy_from(wide)
        block.project.copy_from(self.project)
        if block.squeeze is not None and self.squeeze is not None:
            block.squeeze.copy_from(self.squeeze)
        return block.train(self.training)

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.options.items() if k not in ("inputs", "outputs", "eps", "drop_path")}
        return _text(type(self), self.options["inputs"], self.options["outputs"], **shown)


class MBConv(_Inverted):
    """Inverted residual: 1x1 expansion, depthwise kxk, 1x1 projection (Sandler et al. 2018; FBNet's block with groups).

    Args: ``hidden`` channels between the 1x1 convolutions (a number or an open `Width`); ``groups`` of both 1x1
    convolutions, with a channel shuffle after the first; ``squeeze`` reduced channels of squeeze-excite, 0 for none,
    and its ``gate``; ``expand=False`` leaves out the first 1x1 (only where ``hidden == inputs``); ``group_size``
    channels in each group of the kxk convolution, 1 for depthwise, with ``hidden // group_size`` groups, one at least
    (Masters et al. 2021, arXiv:2106.03640); ``norm`` and ``same`` as in `ConvBn`; ``delay_scale``: the squeeze sees
    a proxy-normalised activation without its last factor, which then multiplies the gate (graphcore/examples v2.1.0).

    Raises: UserError for an open width with groups, with ``expand=False`` or with a norm other than batch norm, and
    for a width that its groups do not divide.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        hidden: int | Width,
        stride: int = 1,
        groups: int = 1,
        squeeze: int = 0,
        gate: str = "sigmoid",
        act: str = "relu",
        expand: bool = True,
        group_size: int = 1,
        norm: str = "batch",
        same: bool = False,
        delay_scale: bool = False,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        if isinstance(hidden, Width) and (groups > 1 or group_size > 1 or norm != "batch"):
            raise UserError(
                "an MBConv with an open width has batch norm and no groups: slicing would cross groups; given "
                f"groups={groups}, group_size={group_size}, norm={norm!r}"
            )
        if not expand and hidden != inputs:
            raise UserError(f"an MBConv without expansion keeps its {inputs} channels; given hidden={hidden}")
        parts = max(self.width // group_size, 1)
        if self.width % parts:
            raise UserError(f"{self.width} channels do not divide into {parts} groups (of {group_size} or more)")
        plain = {"act": act, "norm": norm, "eps": eps}
        self.expand = ConvBn(inputs, self.width, groups=groups, **plain) if expand else None
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = ConvBn(self.width, self.width, kernel, stride=stride, groups=parts, same=same, **plain)

    def opening(self) -> list[ConvBn]:
        return [self.depthwise] if self.expand is None else [self.expand, self.depthwise]

    def body(self, x: Tensor) -> Tensor:
        if self.options["groups"] == 1 or self.expand is None:
            return super().body(x)
        x = self.depthwise(self.shuffle(self.expand(x)))
        return self.project(x if self.squeeze is None else self.squeeze(x))


class FusedMBConv(_Inverted):
    """Fused inverted residual: kxk expansion, 1x1 projection (EfficientNetV2). Arguments as in `MBConv`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        hidden: int | Width,
        stride: int = 1,
        squeeze: int = 0,
        act: str = "relu",
        norm: str = "batch",
        same: bool = False,
        delay_scale: bool = False,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.expand = ConvBn(inputs, self.width, kernel, stride=stride, act=act, norm=norm, same=same, eps=eps)

    def opening(self) -> list[ConvBn]:
        return [self.expand]


class Head(nn.Module):
    """1x1 convolution, global mean, dropout, linear classifier.

    ``norm`` as in `ConvBn`; with ``delay_scale`` a proxy-normalised activation is left without its last factor, which
    the classifier can learn as well.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        classes: int,
        *,
        act: str = "relu",
        norm: str = "batch",
        delay_scale: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        shown = {"classes": classes, "act": act, "norm": norm, "delay_scale": delay_scale}
        self.text = _text(Head, inputs, features, **shown)
        self.delay_scale = delay_scale
        self.conv = ConvBn(inputs, features, act=act, norm=norm, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv.unscaled(x)[0] if self.delay_scale else self.conv(x)
        return self.linear(self.dropout(x.mean((2, 3))))

    def __repr__(self) -> str:
        return self.text


class Classifier(nn.Module):
    """Batch norm and ReLU (with ``bn``), global mean, linear classifier."""

    def __init__(self, inputs: int, classes: int, *, bn: bool = False) -> None:
        super().__init__()
        self.text = _text(Classifier, inputs, classes, bn=bn)
        self.bn = nn.BatchNorm2d(inputs) if bn else nn.Identity()
        self.act = nn.ReLU() if bn else nn.Identity()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(self.bn(x)).mean((2, 3)))

    def __repr__(self) -> str:
        return self.text


DEFAULTS = {
    "stride": 1,
    "groups": 1,
    "squeeze": 0,
    "gate": "sigmoid",
    "act": "relu",
    "expand": True,
    "affine": True,
    "bn": False,
    "group_size": 1,
    "norm": "batch",
    "same": False,
    "delay_scale": False,
}


def _text(kind: type, inputs: int, outputs: int, **options: Any) -> str:
    shown = [f"{k}={v!r}" for k, v in options.items() if k not in DEFAULTS or DEFAULTS[k] != v]
    return f"{kind.__name__}({', '.join([str(inputs), str(outputs), *shown])})"


def drop_path_of(rate: float) -> nn.Module:
    """Stochastic depth of a residual branch (Huang et al. 2016): an image goes without it with that probability."""
    if not rate:
        return nn.Identity()
    from timm.layers.drop import DropPath

    return DropPath(rate)


def activation(name: str) -> nn.Module:
    kind = ACTIVATIONS[name]
    return kind() if kind is nn.Identity else kind(inplace=True)


def _copy_bn(narrow: nn.BatchNorm2d, wide: nn.BatchNorm2d) -> None:
    channels = narrow.num_features
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(narrow, name).copy_(getattr(wide, name)[:channels])
    assert narrow.num_batches_tracked is not None
    assert wide.num_batches_tracked is not None
    narrow.num_batches_tracked.copy_(wide.num_batches_tracked)
