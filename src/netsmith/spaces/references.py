"""Networks of the literature as plain modules from numbers: what a searched network is compared with.

MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) and MobileNetV3 (Howard et al. 2019, arXiv:1905.02244), as
torchvision counts them. Networks that are trained by published recipes are in `networks.py`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv, make_divisible
from netsmith.errors import UserError, unknown

V2_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
"""Stem, then the seven stages."""
V2_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""(expansion, channels, layers)."""

V3_ROWS = {
    "large": (
        "3,16,16,,relu,1 3,64,24,,relu,2 3,72,24,,relu,1 5,72,40,se,relu,2 5,120,40,se,relu,1 5,120,40,se,relu,1 "
        "3,240,80,,hardswish,2 3,200,80,,hardswish,1 3,184,80,,hardswish,1 3,184,80,,hardswish,1 "
        "3,480,112,se,hardswish,1 3,672,112,se,hardswish,1 5,672,160,se,hardswish,2 5,960,160,se,hardswish,1 "
        "5,960,160,se,hardswish,1"
    ),
    "small": (
        "3,16,16,se,relu,2 3,72,24,,relu,2 3,88,24,,relu,1 5,96,40,se,hardswish,2 5,240,40,se,hardswish,1 "
        "5,240,40,se,hardswish,1 5,120,48,se,hardswish,1 5,144,48,se,hardswish,1 5,288,96,se,hardswish,2 "
        "5,576,96,se,hardswish,1 5,576,96,se,hardswish,1"
    ),
}
"""kernel, hidden width, channels, squeeze-excite, activation, stride; one word per block."""
V3_FEATURES = {"large": 1280, "small": 1024}


def mobilenet_v2(
    width: float = 1.0,
    classes: int = 1000,
    channels: int = 3,
    resolution: int = 224,
    *,
    depth: float = 1.0,
    strides: Sequence[int] | None = None,
    dropout: float = 0.2,
) -> nn.Module:
    """MobileNetV2 with all channels times ``width``.

    Args: ``depth`` scales the layers of each stage, rounded up (as EfficientNet does it); ``strides`` of stem and
    stages, eight numbers; by default the published ones, the first of them set to 1 on small images (see
    `fitting_strides`).
    """
    stem, *firsts = _strides(strides, V2_STRIDES, resolution)
    inputs = make_divisible(32 * width)
    layers: list[nn.Module] = [ConvBn(channels, inputs, 3, stride=stem, act="relu6")]
    for (expansion, base, repeats), first in zip(V2_STAGES, firsts, strict=True):
        outputs = make_divisible(base * width)
        for stride in (first, *[1] * (math.ceil(depth * repeats) - 1)):
            hidden = expansion * inputs
            layers.append(MBConv(inputs, outputs, hidden=hidden, stride=stride, act="relu6", expand=expansion > 1))
            inputs = outputs
    features = make_divisible(1280 * max(1.0, width))
    return nn.Sequential(*layers, Head(inputs, features, classes, act="relu6", dropout=dropout))


def mobilenet_v3(
    width: float = 1.0,
    classes: int = 1000,
    channels: int = 3,
    resolution: int = 224,
    *,
    size: str = "large",
    depth: float = 1.0,
    strides: Sequence[int] | None = None,
    dropout: float = 0.2,
) -> nn.Module:
    """MobileNetV3-large or -small with all channels times ``width``.

    Args: ``depth`` as in `mobilenet_v2`, a stage being the blocks with the same output channels; its first ones stay;
    ``strides`` of stem and blocks (16 numbers for large, 12 for small); by default as in `mobilenet_v2`.

    Raises: UserError for an unknown size.
    """
    if size not in V3_ROWS:
        raise unknown("MobileNetV3", size, V3_ROWS)

    def scaled(count: int) -> int:
        return make_divisible(count * width)

    rows = [row.split(",") for row in V3_ROWS[size].split()]
    stem, *firsts = _strides(strides, (2, *(int(row[-1]) for row in rows)), resolution)
    inputs = scaled(16)
    layers: list[nn.Module] = [ConvBn(channels, inputs, 3, stride=stem, act="hardswish", eps=1e-3)]
    stages = Counter(row[2] for row in rows)
    built: Counter[str] = Counter()
    for (kernel, wide, base, se, act, _), stride in zip(rows, firsts, strict=True):
        if built[base] == math.ceil(depth * stages[base]):
            continue
        built[base] += 1
        hidden, outputs = scaled(int(wide)), scaled(int(base))
        layers.append(
            MBConv(
                inputs,
                outputs,
                kernel=int(kernel),
                hidden=hidden,
                stride=stride,
                squeeze=make_divisible(hidden // 4) if se else 0,
                gate="hard",
                act=act,
                expand=hidden != inputs,
                eps=1e-3,
            )
        )
        inputs = outputs
    features, last = 6 * inputs, scaled(V3_FEATURES[size])
    head: OrderedDict[str, nn.Module] = OrderedDict(
        conv=ConvBn(inputs, features, act="hardswish", eps=1e-3),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        hidden=nn.Linear(features, last),
        act=nn.Hardswish(),
        dropout=nn.Dropout(dropout),
        linear=nn.Linear(last, classes),
    )
    return nn.Sequential(*layers, nn.Sequential(head))


def fitting_strides(published: Sequence[int], resolution: int) -> tuple[int, ...]:
    """The published strides, from the first on set to 1 until the last map has at least 3x3 pixels.

    224 and 96 px keep all of them; 32 and 28 px keep a total of 8, 8 px a total of 2.
    """
    strides = list(published)
    while math.prod(strides) > 1 and resolution / math.prod(strides) < 3:
        strides[next(i for i, stride in enumerate(strides) if stride > 1)] = 1
    return tuple(strides)


def _strides(given: Sequence[int] | None, published: Sequence[int], resolution: int) -> Sequence[int]:
    if given is None:
        return fitting_strides(published, resolution)
    if len(given) != len(published):
        raise UserError(f"strides are {len(published)} numbers here, such as {tuple(published)}; given: {tuple(given)}")
    return given
