"""FBNet's space (Wu et al., CVPR 2019, arXiv:1812.03443): 22 layers of fixed width, nine blocks to choose from in each.

The macro and the released architectures are those of facebookresearch/mobile-vision (`fbnet_modeldef_cls_fbnet.py`) and
AnnaAraslanova/FBNet (`fbnet_modeldef.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.decisions import Architecture, OneOf
from netsmith.errors import UserError, unknown

STAGES = ((16, 1, 1), (24, 4, 2), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
"""(channels, layers, stride of the first layer), after a stem of 16 channels with stride 2."""

BLOCKS = {
    "k3_e1": (3, 1, 1),
    "k3_e1_g2": (3, 1, 2),
    "k3_e3": (3, 3, 1),
    "k3_e6": (3, 6, 1),
    "k5_e1": (5, 1, 1),
    "k5_e1_g2": (5, 1, 2),
    "k5_e3": (5, 3, 1),
    "k5_e6": (5, 6, 1),
}
"""Name -> (kernel, expansion, groups of both 1x1 convolutions)."""

RELEASED = {
    # The third 112-layer of A: the Anna file labels it k5_e1 but configures expansion 3, as mobile-vision has it.
    "fbnet-a": "- | k3e3 k3e1 - - | k5e6 k3e3 k5e1 k3e3 | k5e6 k5e3 k5e1g2 k5e6 | k3e6 k5e1g2 k5e3 k3e1g2 "
    "| k5e6 k5e6 k5e3 k5e6 | k5e6",
    # The two sources disagree about the second 64-layer of B.
    "fbnet-b": "k3e1 | k3e6 k5e1 k3e1 k3e1 | k5e6 k5e3 k3e6 k5e6 | k5e6 k5e1 - k5e3 | k5e6 k3e1 k5e1 k5e3 "
    "| k5e6 k5e1 k5e6 k5e6 | k3e6",
    "fbnet-b-mobile-vision": "k3e1 | k3e6 k5e1 k3e1 k3e1 | k5e6 k5e3 k3e6 k5e6 | k5e6 k5e6 - k5e3 "
    "| k5e6 k3e1 k5e1 k5e3 | k5e6 k5e1 k5e6 k5e6 | k3e6",
    "fbnet-c": "k3e1 | k3e6 - k3e1 k3e1 | k5e6 k5e3 k5e6 k3e6 | k5e6 k5e3 k5e6 k5e6 | k5e6 k5e6 k5e6 k5e3 "
    "| k5e6 k5e6 k5e6 k5e6 | k3e6",
    "fbnet-samsung-s8": "k3e1 | k3e3 k3e1 - - | k5e6 k3e3 k3e3 k3e6 | k5e6 k5e3 k5e3 k5e3 | k3e6 k5e3 k5e3 k5e3 "
    "| k5e6 k5e6 k5e3 k5e6 | k5e6",
    "fbnet-iphone-x": "- | k3e6 k3e1 k3e1 k3e1 | k3e6 k3e6 k3e6 k3e6 | k3e6 k3e6 k3e3 k3e6 | k3e6 k3e3 k3e3 k3e3 "
    "| k5e6 k5e6 k5e6 k5e3 | k5e6",
}
"""Stages between bars, "-" for skip. The head is 1984 wide, 1504 for A (`head`)."""


def fbnet(
    classes: PositiveInt = 1000,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 224,
    *,
    head: PositiveInt = 1984,
    expand_e1: bool = True,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> nn.Module:
    """The supernet: decisions ``layer1`` to ``layer22``; skip is offered only where the shape does not change.

    Args: ``head`` channels before the classifier (1504 in FBNet-A); ``expand_e1`` whether a block of expansion 1 keeps
    its first 1x1 convolution: with it the counts are the paper's, without it mobile-vision's.

    Raises: UserError below 64 px, where the stride of 32 leaves less than 2x2 pixels.
    """
    if resolution < 64:
        raise UserError(f"fbnet divides the resolution by 32 and needs 64 px; given: {resolution} px (see fbnet_small)")
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBn(channels, 16, 3, stride=2))
    inputs = 16
    for outputs, repeats, first in STAGES:
        for stride in (first, *[1] * (repeats - 1)):
            parts[f"layer{len(parts)}"] = OneOf(_candidates(inputs, outputs, stride, expand_e1))
            inputs = outputs
    parts["head"] = Head(inputs, head, classes, dropout=dropout)
    return nn.Sequential(parts)


def released(name: str) -> Architecture:
    """One of the `RELEASED` architectures as an architecture of `fbnet`. Raises: UserError for an unknown name."""
    if name not in RELEASED:
        raise unknown("FBNet", name, RELEASED)
    layers = RELEASED[name].replace("|", "").split()
    spelled = {option.replace("_", ""): option for option in BLOCKS} | {"-": "skip"}
    return {f"layer{i}": spelled[text] for i, text in enumerate(layers, start=1)}


def _candidates(inputs: int, outputs: int, stride: int, expand_e1: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        name: MBConv(
            inputs,
            outputs,
            kernel=kernel,
            hidden=expansion * inputs,
            stride=stride,
            groups=groups,
            expand=expand_e1 or expansion > 1,
        )
        for name, (kernel, expansion, groups) in BLOCKS.items()
    }
    if stride == 1 and inputs == outputs:
        found["skip"] = nn.Identity()
    return found
