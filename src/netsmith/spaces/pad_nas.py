"""PAD-NAS's two spaces (Xia et al. 2020, arXiv:2005.07564): 22 inverted bottlenecks, each of 7 kinds or of 19.

The large one is the paper's point: searched as it is, its networks were worse than the basic one's; shrunk, better.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.decisions import OneOf
from netsmith.errors import UserError

EXPANSIONS = {"basic": (3, 6), "large": (1, 2, 3, 4, 5, 6)}
STEM = {"basic": (32, 16), "large": (16, 16)}
"""Channels of the first convolution (stride 2) and of the first layer, which does not expand."""
STAGES = {
    "basic": ((32, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)),
    "large": ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)),
}
"""(channels, layers, stride of the first layer)."""


def pad_nas(
    classes: PositiveInt = 1000,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 224,
    *,
    variant: Literal["basic", "large"] = "basic",
) -> nn.Module:
    """Kernel 3, 5 or 7 and the expansion of 22 MBConv layers; ``variant`` gives 6.64e17 or 1.55e27 networks.

    The first layer of a stage cannot be skipped. An expansion of 1 has no first 1x1 convolution, and activations are
    ReLU (ours; the paper does not say).

    Raises: UserError below 64 px, where the stride of 32 leaves less than 2x2 pixels.
    """
    if resolution < 64:
        raise UserError(
            f"pad_nas divides the resolution by 32 and needs 64 px; given: {resolution} px (see fbnet_small)"
        )
    stem, inputs = STEM[variant]
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBn(channels, stem, 3, stride=2))
    parts["first"] = OneOf(_blocks(stem, inputs, 1, (1,)))
    for stage, (outputs, layers, first) in enumerate(STAGES[variant], start=1):
        for layer in range(layers):
            options = _blocks(inputs, outputs, first if layer == 0 else 1, EXPANSIONS[variant])
            if layer > 0:
                options["skip"] = nn.Identity()
            parts[f"stage{stage}_{layer}"] = OneOf(options)
            inputs = outputs
    parts["head"] = Head(inputs, 1280, classes)
    return nn.Sequential(parts)


def _blocks(inputs: int, outputs: int, stride: int, expansions: tuple[int, ...]) -> dict[str, nn.Module]:
    return {
        f"k{k}_e{e}": MBConv(inputs, outputs, kernel=k, hidden=e * inputs, stride=stride, expand=e > 1)
        for k in (3, 5, 7)
        for e in expansions
    }
