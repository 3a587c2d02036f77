"""GhostNet (Han et al. 2020, arXiv:1911.11907), and RegNetX with G-Ghost stages (Han et al. 2022, arXiv:2201.03297), as
huawei-noah/Efficient-AI-Backbones has released them; plain RegNetX (Radosavovic et al. 2020, arXiv:2003.13678).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import nn

from netsmith.blocks.ghost import GGhostStage, GhostBottleneck
from netsmith.blocks.mobile import ConvBn, make_divisible
from netsmith.blocks.residual import Bottleneck
from netsmith.errors import UserError, unknown

GHOSTNET = (
    "3,16,16,,1 3,48,24,,2 3,72,24,,1 5,72,40,se,2 5,120,40,se,1 3,240,80,,2 3,200,80,,1 3,184,80,,1 3,184,80,,1 "
    "3,480,112,se,1 3,672,112,se,1 5,672,160,se,2 5,960,160,,1 5,960,160,se,1 5,960,160,,1 5,960,160,se,1"
)
"""kernel, hidden width, channels, squeeze-excite, stride; one word per block."""

REGNETX = {
    "002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "004": ((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "006": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "008": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "016": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "032": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "040": ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "064": ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "080": ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "160": ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
}
"""Hundreds of MMACs -> depths, widths, channels in a group."""


def ghostnet(
    width: float = 1.0, classes: int = 1000, channels: int = 3, *, stem_stride: int = 2, dropout: float = 0.2
) -> nn.Module:
    """GhostNet with all channels but the classifier's 1,280 times ``width``; for small images ``stem_stride=1``.

    Raises: UserError for a width of 0 or less.
    """
    if width <= 0:
        raise UserError(f"width is {width}; allowed: above 0")

    def scaled(count: str | int) -> int:
        return make_divisible(int(count) * width, 4)

    inputs = scaled(16)
    layers: list[nn.Module] = [ConvBn(channels, inputs, 3, stride=stem_stride)]
    hidden = inputs
    for kernel, wide, base, se, stride in (row.split(",") for row in GHOSTNET.split()):
        hidden, outputs = scaled(wide), scaled(base)
        options = {"hidden": hidden, "stride": int(stride), "squeeze": make_divisible(hidden / 4, 4) if se else 0}
        layers.append(GhostBottleneck(inputs, outputs, kernel=int(kernel), **options))
        inputs = outputs
    head: OrderedDict[str, nn.Module] = OrderedDict(
        conv=ConvBn(inputs, hidden),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        hidden=nn.Linear(hidden, 1280),
        act=nn.ReLU(),
        dropout=nn.Dropout(dropout),
        linear=nn.Linear(1280, classes),
    )
    return nn.Sequential(*layers, nn.Sequential(head))


def regnetx(
    size: str = "032", classes: int = 1000, channels: int = 3, *, stem_stride: int = 2, dropout: float = 0.0
) -> nn.Module:
    """RegNetX-200MF ("002") to -16GF ("160"). Raises: UserError for an unknown size."""
    return _regnetx(size, classes, channels, stem_stride, dropout, _stage)


def g_ghost_regnetx(
    size: str = "032",
    classes: int = 1000,
    channels: int = 3,
    *,
    cheap_ratio: float = 0.5,
    mix: bool = True,
    stem_stride: int = 2,
    dropout: float = 0.2,
) -> nn.Module:
    """RegNetX with a `GGhostStage` for every stage of more than two blocks but the first; ``cheap_ratio`` and ``mix``
    are the stages'. Training needs batches of two or more.

    Raises: UserError for an unknown size, and what `GGhostStage` raises.
    """
    ghost = partial(GGhostStage, cheap_ratio=cheap_ratio, mix=mix)
    return _regnetx(size, classes, channels, stem_stride, dropout, ghost)


def _regnetx(
    size: str, classes: int, channels: int, stem_stride: int, dropout: float, later: Callable[..., nn.Module]
) -> nn.Module:
    """``later`` builds the stages of more than two blocks but the first."""
    if size not in REGNETX:
        raise unknown("RegNetX", size, REGNETX)
    depths, widths, group_width = REGNETX[size]
    layers: list[nn.Module] = [ConvBn(channels, 32, 3, stride=stem_stride)]
    for number, ((inputs, outputs), depth) in enumerate(zip(pairwise((32, *widths)), depths, strict=True)):
        stage = later if number > 0 and depth > 2 else _stage
        layers.append(stage(inputs, outputs, depth=depth, group_width=group_width))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(widths[-1], classes))
    return nn.Sequential(*layers, head)


def _stage(inputs: int, outputs: int, *, depth: int, group_width: int) -> nn.Module:
    block = partial(Bottleneck, outputs=outputs, hidden=outputs, group_size=group_width)
    return nn.Sequential(block(inputs, stride=2), *(block(outputs) for _ in range(depth - 1)))
