"""The space of single-path NAS (Stamoulis et al. 2019, arXiv:1904.02877): kernel and expansion of twenty MBConv layers.

Five stages of four layers as in MnasNet; its published latency table of a Pixel 1 phone covers every option at 224 px
(`netsmith search --space single_path --table lut_singlepath_pixel1.json.gz`), so a network can be searched for a phone
that is not there.
"""

from __future__ import annotations

from collections import OrderedDict

from pydantic import PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.decisions import OneOf
from netsmith.errors import UserError

STAGES = ((24, 2), (40, 2), (80, 2), (96, 1), (192, 2))
"""Channels and stride of the first layer; the first stage takes 16 channels at a quarter of the pixels."""


def single_path(classes: PositiveInt = 1000, channels: PositiveInt = 3, resolution: PositiveInt = 224) -> nn.Module:
    """Blocks are kernel 3 or 5 with expansion 3 or 6, as in the table; a layer that keeps the shape may be skipped."""
    if resolution < 64:
        raise UserError(f"the space single_path needs 64 px; given: {resolution} px")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = ConvBn(channels, 32, 3, stride=2)
    parts["first"] = MBConv(32, 16, kernel=3, hidden=32, expand=False)
    inputs = 16
    for stage, (outputs, first) in enumerate(STAGES, start=1):
        for layer in range(4):
            stride = first if layer == 0 else 1
            options: dict[str, nn.Module] = {
                f"k{k}_e{e}": MBConv(inputs, outputs, kernel=k, hidden=e * inputs, stride=stride)
                for k in (3, 5)
                for e in (3, 6)
            }
            if layer > 0:
                options["skip"] = nn.Identity()
            parts[f"stage{stage}_{layer}"] = OneOf(options)
            inputs = outputs
    parts["last"] = MBConv(192, 320, kernel=3, hidden=6 * 192)
    parts["head"] = Head(320, 1280, classes)
    return nn.Sequential(parts)
