"""RepVGG's plain networks (Ding et al. 2021, arXiv:2101.03697) with the branches of RepNAS (arXiv:2109.03508) open.

Every 3x3 layer is a sum of up to six branches and an identity, and ships as one 3x3 convolution: what is decided costs
training time and nothing else. Numbers from bestfleer/RepNAS, `cnn/supernet.py` and `arch.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pydantic import PositiveInt
from torch import nn

from netsmith.blocks.mobile import Classifier
from netsmith.blocks.reparam import KINDS, Branches
from netsmith.decisions import Architecture
from netsmith.errors import UserError, unknown
from netsmith.spaces.small import macros

VARIANTS: dict[str, tuple[tuple[int, ...], float, float, int]] = {
    "a0": ((2, 4, 14, 1), 0.75, 2.5, 1),
    "a1": ((2, 4, 14, 1), 1, 2.5, 1),
    "a2": ((2, 4, 14, 1), 1.5, 2.75, 1),
    "b1": ((4, 6, 16, 1), 2, 4, 1),
    "b2": ((4, 6, 16, 1), 2.5, 5, 1),
    "b2g4": ((4, 6, 16, 1), 2.5, 5, 4),
    "b3": ((4, 6, 16, 1), 3, 5, 1),
}
"""Layers of the four stages, width factors a (64a, 128a, 256a channels) and b (512b), groups of every other layer."""

RELEASED_A0 = (
    "kxk,1x1_kxk kxk,1x1_kxk kxk kxk,1x1_kxk 1x1_kxk 1x1_kxk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk 1x1_kxk kxk,1x1_kxk "
    "kxk,1x1_kxk,1xk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk kxk,1x1_kxk 1x1_kxk "
    "kxk,1x1_kxk 1x1,1x1_avg,kxk,1x1_kxk,1xk,kx1"
)
"""The branches that are on in the 22 layers of the released A0: 44 of 132."""


def repvgg(
    classes: PositiveInt = 1000, channels: PositiveInt = 3, resolution: PositiveInt = 224, *, variant: str = "a0"
) -> nn.Module:
    """Plain 3x3 layers with open branches; A0 has 22 layers and 132 branches.

    Raises: UserError for an unknown variant, and below 64 px, where the stride of 32 leaves less than 2x2 pixels.
    """
    if variant not in VARIANTS:
        raise unknown("RepVGG", variant, VARIANTS)
    if resolution < 64:
        raise UserError(
            f"repvgg divides the resolution by 32 and needs 64 px; given: {resolution} px (see repvgg_small)"
        )
    layers, a, b, groups = VARIANTS[variant]
    widths = [int(64 * a), int(128 * a), int(256 * a), int(512 * b)]
    return _plain(classes, channels, min(64, widths[0]), widths, (2, 2, 2, 2, 2), layers, groups)


def repvgg_small(
    classes: PositiveInt = 10, channels: PositiveInt = 3, resolution: PositiveInt = 32, *, depth: PositiveInt = 2
) -> nn.Module:
    """The same kind of layer on small images: a stem and three stages of ``depth`` layers, 16 to 64 channels.

    Raises: UserError for images that are not 8 to 64 px.
    """
    strides, (stem, *widths) = next(iter(macros(resolution).values()))
    return _plain(classes, channels, stem, widths, strides, (depth,) * 3)


def _plain(
    classes: int,
    channels: int,
    stem: int,
    widths: Sequence[int],
    strides: Sequence[int],
    layers: Sequence[int],
    groups: int = 1,
) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=Branches(channels, stem, stride=strides[0]))
    inputs, built = stem, 1
    for stage, (outputs, first, count) in enumerate(zip(widths, strides[1:], layers, strict=True), start=1):
        blocks = []
        for layer in range(count):
            stride, grouped = (1 if layer else first), (1 if built % 2 else groups)
            blocks.append(Branches(inputs, outputs, stride=stride, groups=grouped))
            inputs, built = outputs, built + 1
        parts[f"stage{stage}"] = nn.Sequential(*blocks)
    parts["head"] = Classifier(inputs, classes)
    return nn.Sequential(parts)


def released() -> Architecture:
    """The branches RepNAS found for A0, as an architecture of `repvgg`."""
    layers = ["stem", *(f"stage{s}.{i}" for s, n in enumerate(VARIANTS["a0"][0], start=1) for i in range(n))]
    rows = (row.split(",") for row in RELEASED_A0.split())
    return {
        f"{layer}.{kind}": "on" if kind in row else "off"
        for layer, row in zip(layers, rows, strict=True)
        for kind in KINDS
    }
