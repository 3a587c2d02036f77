"""ProxylessNAS' space (Cai et al., ICLR 2019, arXiv:1812.00332): MBConv of kernel 3, 5 or 7 and expansion 3 or 6, or
nothing.

Macro of the official repository (mit-han-lab/proxylessnas, `super_proxyless.py`, `imagenet_arch_search.py`). There the
nothing is a zero beside the block's shortcut, here a ``skip``: the same network.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.decisions import OneOf
from netsmith.errors import UserError

STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
"""(channels, layers, stride of the first layer), after a stem of 32 and a fixed block of 16 channels at half the
pixels."""


def proxylessnas(
    classes: PositiveInt = 1000,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 224,
    *,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> nn.Module:
    """The supernet: decisions ``layer1`` to ``layer21``, 6^6 x 7^15 networks.

    Raises: UserError below 64 px, where the stride of 32 leaves less than 2x2 pixels.
    """
    if resolution < 64:
        raise UserError(f"proxylessnas divides the resolution by 32 and needs 64 px; given: {resolution} px")
    common = {"act": "relu6", "eps": 1e-3}
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = ConvBn(channels, 32, 3, stride=2, act="relu6", eps=1e-3)
    parts["first"] = MBConv(32, 16, kernel=3, hidden=32, expand=False, **common)
    inputs, number = 16, 1
    for outputs, repeats, first in STAGES:
        for stride in (first, *[1] * (repeats - 1)):
            options: dict[str, nn.Module] = {
                f"k{k}_e{e}": MBConv(inputs, outputs, kernel=k, hidden=e * inputs, stride=stride, **common)
                for k in (3, 5, 7)
                for e in (3, 6)
            }
            if stride == 1 and inputs == outputs:
                options["skip"] = nn.Identity()
            parts[f"layer{number}"] = OneOf(options)
            inputs, number = outputs, number + 1
    parts["head"] = Head(inputs, 1280, classes, act="relu6", eps=1e-3, dropout=dropout)
    return nn.Sequential(parts)
