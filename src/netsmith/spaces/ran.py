"""Restructurable Activation Networks (Bhardwaj et al. 2022, arXiv:2208.08562): how much non-linearity a network has.

RAN-e: a MobileNet-like network in which some inverted bottlenecks are one dense 3x3 convolution, found by a search and
by hand. RAN-i: ConvNeXt made deeper and narrower without training anything, by NN-mass, which stands for how well
gradients travel. Numbers from ARM-software/ML-restructurable-activation-networks, `RAN_e/model/ran_e_model.py` and
`RAN_i/models`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from netsmith.blocks.collapsible import CollapsedBlock
from netsmith.blocks.convnext import EPS, ChannelNorm, ConvNeXtBlock
from netsmith.blocks.initial import initialise
from netsmith.blocks.mobile import ConvBn, MBConv, activation
from netsmith.errors import UserError, unknown

CONVNEXTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "t": ((3, 3, 9, 3), (96, 192, 384, 768), 0.1),
    "s": ((3, 3, 27, 3), (96, 192, 384, 768), 0.4),
    "b": ((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
}
"""Blocks and channels of the four stages; rate of drop path."""

RAN_I = {"t": (0.666, 1.65, 0.1), "s": (0.789, 1.65, 0.2), "b": (0.9105, 2.30, 0.4)}
"""Times the channels and the blocks of ConvNeXt-T; rate of drop path."""

RAN_E = {
    "gt": "32 s1 t2 c | 48 s2 t2 c | 64 s2 t2 c | 80 s1 t2 c | 80 s2 t6 k5 k5 | 96 s1 t4 k3 k3 | 128 s1 t2 c c/2 "
    "| 160 s2 t6 k7 | 176 s1 t4 k3 k3 k3 | 224 s1 t6 k5 k5",
    "c": "32 s1 t6 c | 48 s2 t6 c | 64 s2 t6 k3 | 80 s1 t6 c | 80 s2 t6 k5 c | 96 s1 t4 k5 c | 128 s1 t6 k3 k3/2 "
    "| 160 s2 t6 c | 176 s1 t4 k7 k3 c | 224 s1 t6 k5 k5",
}
"""Stages: channels, stride, expansion, and a word per block: k5 an inverted bottleneck with that kernel, c a collapsed
block, /2 in two units through half the channels. GT ("ground truth") is set by hand after what was found, C was found.
"""


def nn_mass(depths: Sequence[float], dims: Sequence[float]) -> float:
    """NN-mass of a ConvNeXt as RAN's code counts it: the sum over all blocks of 2 * channels.

    For DenseNet-like networks NN-mass is density * width * depth, the density being the links across layers over all
    that are possible (Bhardwaj et al. 2021, arXiv:1910.00780). Of the formula for expected non-linear units that RAN
    adds, only this form is known.

    >>> nn_mass((3, 3, 9, 3), (96, 192, 384, 768))
    13248
    """
    return sum(2 * depth * dim for depth, dim in zip(depths, dims, strict=True))


def multipliers(macs: float, mass: float) -> tuple[float, float]:
    """Width and depth multipliers that take MACs times ``macs`` and NN-mass times ``mass``, but for rounding.

    MACs grow with width^2 depth and NN-mass with width depth, so width = macs / mass, depth = mass^2 / macs. RAN-i's
    recipe is a ``mass`` that is not below that of the larger network it stands for; the closed form is ours.

    Raises: UserError for a ratio that is not positive.
    """
    if macs <= 0 or mass <= 0:
        raise UserError(f"ratios of MACs and NN-mass are above 0; given: {macs} and {mass}")
    return macs / mass, mass * mass / macs


def rescaled(
    width: float, depth: float, *, size: str = "t", divisor: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of a ConvNeXt's stages, rounded, the channels to a multiple of ``divisor``.

    RAN-i's own widths, such as 87 and 151, do not suit SIMD; 8 does, and changes the MACs.

    Raises: UserError for an unknown size, and where a stage would have no block or no channel.
    """
    if size not in CONVNEXTS:
        raise unknown("ConvNeXt", size, CONVNEXTS)
    depths, dims, _ = CONVNEXTS[size]
    blocks = tuple(round(count * depth) for count in depths)
    channels = tuple(round(count * width / divisor) * divisor for count in dims)
    if min(*blocks, *channels) < 1:
        raise UserError(f"width times {width} and depth times {depth} leave blocks {blocks} with channels {channels}")
    return blocks, channels


def convnext(
    size: str = "t",
    classes: int = 1000,
    channels: int = 3,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    divisor: int = 1,
    patch: int = 4,
    drop_path: float = 0.0,
) -> nn.Module:
    """ConvNeXt-T, -S or -B with channels times ``width`` and blocks times ``depth``; logits `(n, classes)` of images
    `(n, channels, H, W)`.

    Args: ``divisor`` of the channels (see `rescaled`); ``patch``, kernel and stride of the stem, 1 for small images;
    ``drop_path``, the last block's rate, those before have less in equal steps from 0 (0.1, 0.4 and 0.5 for the
    published T, S and B).

    Raises: UserError as `rescaled`.
    """
    depths, dims = rescaled(width, depth, size=size, divisor=divisor)
    layers: list[nn.Module] = [nn.Conv2d(channels, dims[0], patch, patch), ChannelNorm(dims[0])]
    built = 0
    for stage, (count, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            layers += [ChannelNorm(dims[stage - 1]), nn.Conv2d(dims[stage - 1], dim, 2, 2)]
        for _ in range(count):
            layers.append(ConvNeXtBlock(dim, drop_path=drop_path * built / max(1, sum(depths) - 1)))
            built += 1
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(dims[-1], eps=EPS))
    network = nn.Sequential(*layers, *pooled, nn.Linear(dims[-1], classes))
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and not part.weight.is_meta:
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)  # pyright: ignore[reportArgumentType]
    return network


class Halved(nn.Module):
    """Units through half the channels, added to the input: what RAN-e's code builds wherever a block has 128 channels
    on both sides, whatever the width multiplier says. Here the rows say where."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.units = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.units(x)

    def __repr__(self) -> str:
        return f"Halved({', '.join(map(repr, self.units))})"


def ran_e(
    variant: str = "gt",
    classes: int = 1000,
    channels: int = 3,
    *,
    stem_stride: int = 2,
    dropout: float = 0.2,
    eps: float = 1e-3,
    momentum: float = 0.01,
) -> nn.Module:
    """RAN-e-GT or -C, trained in collapsed form as published; for small images ``stem_stride=1``.

    Strides pad evenly, one pixel beside TensorFlow's: published weights would need its padding.

    Raises: UserError for an unknown variant.
    """
    if variant not in RAN_E:
        raise unknown("RAN-e", variant, RAN_E)
    plain: dict[str, Any] = {"act": "hardswish", "eps": eps}
    inputs = 16
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, stem_stride, 1, bias=False)]  # the stem is linear
    for row in RAN_E[variant].split("|"):
        width, stride, expansion, *words = row.split()
        for number, word in enumerate(words):
            outputs, step = int(width), 1 if number else int(stride[1:])
            kernel, _, half = word.partition("/")
            if half:
                layers.append(_halved(outputs, kernel, plain))
            elif kernel == "c":
                layers.append(CollapsedBlock(inputs, outputs, stride=step, **plain))
            else:
                hidden = inputs * int(expansion[1:])
                layers.append(MBConv(inputs, outputs, kernel=int(kernel[1:]), hidden=hidden, stride=step, **plain))
            inputs = outputs
    layers += [ConvBn(inputs, 1344, **plain), ConvBn(1344, 1344, 7, groups=1344, **plain)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(1344, classes))
    network = nn.Sequential(*layers, *head)
    initialise(network, momentum)
    return network


def _halved(channels: int, kernel: str, plain: dict[str, Any]) -> Halved:
    """Two collapsed blocks, of which the second has the activation alone in front; or two inverted bottlenecks, whose
    hidden width is six times the full width in both."""
    half = channels // 2
    if kernel == "c":
        back = ConvBn(half, channels, 3, **{**plain, "act": "none"})
        return Halved(CollapsedBlock(channels, half, **plain), activation(plain["act"]), back)
    same = {"kernel": int(kernel[1:]), "hidden": 6 * channels, **plain}
    return Halved(MBConv(channels, half, **same), MBConv(half, channels, **same))
