"""Residual blocks that do not widen inside: ResNet's bottleneck, and one convolution with a sum around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from netsmith.blocks.mobile import ConvBn, activation, drop_path_of
from netsmith.errors import UserError


class ResidualConv(ConvBn):
    """Convolution, norm, activation; where the shape stays, added to the input (EfficientNetV2's fused block of
    expansion 1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, drop_path: float = 0.0, **options: Any) -> None:
        super().__init__(inputs, outputs, kernel, **options)
        self.residual = inputs == outputs and options.get("stride", 1) == 1
        self.text = self.text.replace("ConvBn", "ResidualConv")
        self.drop_path = drop_path_of(drop_path if self.residual else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + self.drop_path(y) if self.residual else y


class Bottleneck(nn.Module):
    """1x1, kxk with the stride, 1x1, added to the input or to its strided 1x1 projection, then the activation (He et
    al. 2016, arXiv:1512.03385, figure 5; the stride where torchvision has it).

    ``group_size`` channels in each group of the kxk convolution, none for a dense one (Xie et al. 2017,
    arXiv:1611.05431). Raises: UserError for a width that its groups do not divide.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        hidden: int,
        stride: int = 1,
        group_size: int | None = None,
        act: str = "relu",
        norm: str = "batch",
        same: bool = False,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        plain = {"norm": norm, "eps": eps}
        groups = max(hidden // group_size, 1) if group_size else 1
        if hidden % groups:
            raise UserError(f"{hidden} channels do not divide into {groups} groups (of {group_size} or more)")
        self.text = f"Bottleneck({inputs}, {outputs}, {kernel=}, {hidden=}, {stride=}, {act=}, {norm=}, {same=}"
        self.text += f", {group_size=})" if group_size else ")"
        self.reduce = ConvBn(inputs, hidden, act=act, **plain)
        self.conv = ConvBn(hidden, hidden, kernel, stride=stride, groups=groups, act=act, same=same, **plain)
        self.expand = ConvBn(hidden, outputs, act="none", **plain)
        shaped = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if shaped else ConvBn(inputs, outputs, stride=stride, act="none", **plain)
        self.drop_path = drop_path_of(drop_path)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.expand(self.conv(self.reduce(x))))
        return self.act(self.shortcut(x) + y)

    def __repr__(self) -> str:
        return self.text
