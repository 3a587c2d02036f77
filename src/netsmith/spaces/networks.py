"""Networks of the literature, written as rows of blocks: references, starting points, and what the recipes train.

EfficientNet (Tan & Le 2019, arXiv:1905.11946; tensorflow/tpu), EfficientNetV2-S (Tan & Le 2021, arXiv:2104.00298;
google/automl), their variants with group convolutions and other norms (Masters et al. 2021, arXiv:2106.03640), GPUNet
(Wang et al. 2022, arXiv:2205.00841; NVIDIA/DeepLearningExamples), ResNet-50 (He et al. 2016, arXiv:1512.03385, with the
stride in the 3x3 convolution as torchvision has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from netsmith.blocks.initial import initialise
from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv, make_divisible
from netsmith.blocks.norms import NORMS
from netsmith.blocks.residual import Bottleneck, ResidualConv
from netsmith.errors import UserError, unknown
from netsmith.spaces.amoebanet import amoebanet
from netsmith.spaces.ghostnet import REGNETX, g_ghost_regnetx, ghostnet, regnetx
from netsmith.spaces.ran import CONVNEXTS, RAN_E, RAN_I, convnext, ran_e


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a network's rows leave open."""

    norm: str = "batch"
    """One of `netsmith.blocks.norms.NORMS`."""
    group_size: int = 1
    """Channels in each group of the kxk convolutions of inverted residuals; 1: depthwise."""
    expansion: float | None = None
    """Replaces the expansion 6 of the rows (4 with groups of 16 in Masters et al.); none: as they say."""
    delay_scale: bool = False
    """Proxy norm's factor after squeeze-excite, and none in the head; see `MBConv`."""
    same: bool = False
    """Pad strides as TensorFlow does: for weights that were trained there."""
    dropout: float = 0.2
    drop_path: float = 0.2
    """Rate of drop path below which the blocks' rates stay: block i of n has rate * i / n."""
    eps: float = 1e-3
    """Of the norms."""
    momentum: float = 0.01
    """Of batch norm's running statistics (TensorFlow's 0.99)."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.group_size < 1:
            raise UserError(f"group_size is {self.group_size}; allowed: 1 or more")
        for name in ("dropout", "drop_path"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise UserError(f"{name} is {given}; allowed: 0 to below 1")


# Row: kind, kernel, channels, stride, layers, activation; for blocks that expand also the expansion (e6) or the hidden
# width (512), and "se" for squeeze-excite of a quarter of the block's input.
B0 = (
    "stem k3 32 s2 x1 swish | ir k3 16 s1 x1 swish e1 se | ir k3 24 s2 x2 swish e6 se | ir k5 40 s2 x2 swish e6 se "
    "| ir k3 80 s2 x3 swish e6 se | ir k5 112 s1 x3 swish e6 se | ir k5 192 s2 x4 swish e6 se "
    "| ir k3 320 s1 x1 swish e6 se | head 1280 swish"
)
V2_S = (
    "stem k3 24 s2 x1 swish | fused k3 24 s1 x2 swish e1 | fused k3 48 s2 x4 swish e4 | fused k3 64 s2 x4 swish e4 "
    "| ir k3 128 s2 x6 swish e4 se | ir k3 160 s1 x9 swish e6 se | ir k3 256 s2 x15 swish e6 se | head 1280 swish"
)
GPUNETS = {
    "0": "stem k3 32 s2 x1 swish | conv k3 32 s1 x2 relu | fused k3 32 s2 x2 relu e5 | fused k3 64 s2 x3 relu e5 "
    "| ir k3 256 s2 x3 swish e5 | ir k3 704 s2 x2 relu e5 se | head 1280 relu",
    "1": "stem k3 24 s2 x1 swish | conv k3 24 s1 x1 relu | fused k3 64 s2 x2 swish e4 | fused k3 96 s2 x2 swish e4 "
    "| ir k3 160 s2 x1 swish e2 se | ir k3 288 s1 x4 relu e5 | ir k3 448 s2 x4 relu e4 se | head 1280 relu",
    "2": "stem k3 32 s2 x1 swish | conv k3 32 s1 x3 relu | fused k5 32 s2 x1 swish e6 se | fused k3 112 s2 x3 swish e3 "
    "| ir k3 144 s2 x6 swish e6 | ir k5 160 s1 x4 relu e3 | ir k3 224 s2 x8 swish e3 se | ir k5 832 s1 x7 relu e2 "
    "| head 1280 relu",
    "p0": "stem k3 32 s2 x1 relu | conv k3 32 s1 x2 relu | conv k3 64 s2 x1 relu | ir k3 96 s2 x1 relu 512 "
    "| ir k3 96 s1 x2 relu 736 | ir k3 256 s2 x1 relu 736 | ir k5 256 s1 x1 relu 1088 | ir k3 256 s1 x1 relu 1216 "
    "| ir k3 704 s2 x1 relu 2048 | ir k5 704 s1 x1 relu 2688 | ir k3 704 s1 x1 relu 2368 | ir k3 704 s1 x1 relu 1792 "
    "| ir k3 704 s2 x1 relu 4032 | head 1984 relu",
    "p1": "stem k3 32 s2 x1 relu | conv k3 32 s1 x2 relu | conv k5 64 s2 x1 relu | ir k3 64 s1 x2 relu 512 "
    "| ir k5 96 s2 x1 relu 512 | ir k5 96 s1 x1 relu 768 | ir k5 256 s2 x1 relu 768 | ir k5 256 s1 x1 relu 1920 "
    "| ir k3 256 s1 x1 relu 2016 | ir k5 704 s2 x1 relu 2016 | ir k5 704 s1 x1 relu 5632 | ir k3 704 s1 x1 relu 5216 "
    "| ir k5 704 s1 x1 relu 5632 | ir k5 704 s2 x1 relu 5600 | head 1984 relu",
}
"""The stem's activation is not in the configs: swish is the code's default, PruNets are ReLU throughout."""

COMPOUND = {
    "b0": (1.0, 1.0, 224, 0.2),
    "b1": (1.0, 1.1, 240, 0.2),
    "b2": (1.1, 1.2, 260, 0.3),
    "b3": (1.2, 1.4, 300, 0.3),
    "b4": (1.4, 1.8, 380, 0.4),
    "b5": (1.6, 2.2, 456, 0.4),
    "b6": (1.8, 2.6, 528, 0.5),
    "b7": (2.0, 3.1, 600, 0.5),
}
"""Width, depth, resolution (px) and dropout of the released EfficientNets."""
HALF = {"b0": 160, "b1": 176, "b2": 196, "b3": 204, "b4": 252, "b5": 328}
"""Resolutions of about half the cost (graphcore-research, configs.yml; its README has 192 for B2)."""


def efficientnet(
    size: str = "b0", classes: int = 1000, channels: int = 3, *, stem_stride: int = 2, **style: Any
) -> nn.Module:
    """EfficientNet-B0 to -B7; ``style`` are fields of `Style`. For small images ``stem_stride=1``.

    Raises: UserError for an unknown size or style.
    """
    if size not in COMPOUND:
        raise unknown("EfficientNet", size, COMPOUND)
    width, depth, _, dropout = COMPOUND[size]
    rows = scaled(B0, width, depth).replace("s2", f"s{stem_stride}", 1)
    return build(rows, classes, channels, _style(style, dropout=dropout))


def efficientnet_v2_s(classes: int = 1000, channels: int = 3, **style: Any) -> nn.Module:
    """EfficientNetV2-S. Raises: UserError for an unknown style."""
    return build(V2_S, classes, channels, _style(style))


def gpunet(variant: str = "0", classes: int = 1000, channels: int = 3, **style: Any) -> nn.Module:
    """GPUNet-0, -1, -2, -P0 or -P1. Raises: UserError for an unknown variant or style."""
    if variant not in GPUNETS:
        raise unknown("GPUNet", variant, GPUNETS)
    return build(GPUNETS[variant], classes, channels, _style(style, drop_path=0.0, momentum=0.1))


def resnet50(classes: int = 1000, channels: int = 3, **style: Any) -> nn.Module:
    """ResNet-50. Raises: UserError for an unknown style."""
    rows = (
        "stem k7 64 s2 x1 relu | pool k3 64 s2 x1 - | res k3 256 s1 x3 relu 64 | res k3 512 s2 x4 relu 128 "
        "| res k3 1024 s2 x6 relu 256 | res k3 2048 s2 x3 relu 512 | head 0 -"
    )
    plain = {"eps": 1e-5, "momentum": 0.1, "dropout": 0.0, "drop_path": 0.0}
    return build(rows, classes, channels, _style(style, **plain))


def _style(given: dict[str, Any], **defaults: Any) -> Style:
    known = {field.name: field for field in fields(Style)}
    for name in given:
        if name not in known:
            raise unknown("option of a network,", name, known)
    return Style(**{**defaults, **given})


def scaled(rows: str, width: float, depth: float) -> str:
    """Rows with all channels times ``width``, rounded to 8, and the layers of every block row times ``depth``, rounded
    up (compound scaling, Tan & Le 2019, section 3.3)."""
    found = []
    for row in rows.split("|"):
        kind, *words = row.split()
        if kind == "head":
            words[0] = str(make_divisible(int(words[0]) * width))
        else:
            words[1] = str(make_divisible(int(words[1]) * width))
            if kind != "stem":
                words[3] = f"x{math.ceil(int(words[3][1:]) * depth)}"
        found.append(" ".join([kind, *words]))
    return " | ".join(found)


def build(rows: str, classes: int, channels: int, style: Style) -> nn.Module:
    """The network of these rows, initialised as the EfficientNets are; logits `(n, classes)` of images `(n, channels,
    H, W)`."""
    *body, head = (row.split() for row in rows.split("|"))
    blocks = max(1, sum(int(row[4][1:]) for row in body if row[0] not in ("stem", "conv", "pool")))
    layers: list[nn.Module] = []
    inputs, built = channels, 0
    for kind, kernel, outputs, stride, repeats, act, *expansion in body:
        for number in range(int(repeats[1:])):
            rate = style.drop_path * built / blocks
            step = int(stride[1:]) if number == 0 else 1
            made = _layer(kind, inputs, int(outputs), int(kernel[1:]), step, act, expansion, style, rate)
            built += kind not in ("stem", "conv", "pool")
            inputs = int(outputs)
            layers.append(made)
    _, features, act = head
    last: nn.Module
    if int(features):
        plain = {"norm": style.norm, "delay_scale": style.delay_scale, "eps": style.eps}
        last = Head(inputs, int(features), classes, act=act, dropout=style.dropout, **plain)
    else:
        last = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(style.dropout), nn.Linear(inputs, classes)
        )
    network = nn.Sequential(*layers, last)
    initialise(network, style.momentum)
    return network


def _layer(
    kind: str,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    act: str,
    expansion: list[str],
    style: Style,
    drop_path: float,
) -> nn.Module:
    plain = {"stride": stride, "act": act, "norm": style.norm, "same": style.same, "eps": style.eps}
    if kind in ("stem", "conv"):
        return ConvBn(inputs, outputs, kernel, **plain)
    if kind == "pool":
        return nn.MaxPool2d(kernel, stride, kernel // 2)
    width, *se = expansion
    factor = float(width[1:]) if width.startswith("e") else 0.0
    if factor == 6 and style.expansion:
        factor = style.expansion
    hidden = make_divisible(inputs * factor) if factor else int(width)
    if kind == "res":
        return Bottleneck(inputs, outputs, kernel, hidden=hidden, drop_path=drop_path, **plain)
    if kind == "fused" and factor == 1:
        return ResidualConv(inputs, outputs, kernel, drop_path=drop_path, **plain)
    own = {"squeeze": max(1, inputs // 4) if se else 0, "delay_scale": style.delay_scale, "drop_path": drop_path}
    if kind == "fused":
        return FusedMBConv(inputs, outputs, kernel=kernel, hidden=hidden, **own, **plain)
    own |= {"expand": hidden != inputs, "group_size": style.group_size}
    return MBConv(inputs, outputs, kernel=kernel, hidden=hidden, **own, **plain)


def _group_16(size: str, **style: Any) -> Callable[..., nn.Module]:
    return partial(efficientnet, size, group_size=16, expansion=4.0, **style)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"efficientnet_{size}": partial(efficientnet, size) for size in COMPOUND},
    **{f"efficientnet_{size}_g16": _group_16(size) for size in HALF},
    **{f"efficientnet_{size}_g16_pn": _group_16(size, norm="layer+proxy") for size in HALF},
    "efficientnet_v2_s": efficientnet_v2_s,
    **{f"gpunet_{variant}": partial(gpunet, variant) for variant in GPUNETS},
    "resnet50": resnet50,
    "amoebanet_a": partial(amoebanet, "a", width=190),
    "amoebanet_d": partial(amoebanet, "d"),
    "ghostnet_050": partial(ghostnet, 0.5),
    "ghostnet_100": ghostnet,
    "ghostnet_130": partial(ghostnet, 1.3),
    **{f"regnetx_{size}": partial(regnetx, size) for size in REGNETX},
    **{f"g_ghost_regnetx_{size}": partial(g_ghost_regnetx, size) for size in REGNETX},
    **{f"convnext_{size}": partial(convnext, size, drop_path=rate) for size, (*_, rate) in CONVNEXTS.items()},
    **{f"ran_i_{size}": partial(convnext, width=w, depth=d, drop_path=rate) for size, (w, d, rate) in RAN_I.items()},
    **{f"ran_e_{variant}": partial(ran_e, variant) for variant in RAN_E},
}
"""Name -> function of classes, channels and the fields of `Style` (AmoebaNets, GhostNets, RegNets, ConvNeXts, RANs:
options of their own)."""

RESOLUTIONS = {
    **{f"efficientnet_{size}": row[2] for size, row in COMPOUND.items()},
    **{f"efficientnet_{size}_g16": COMPOUND[size][2] for size in HALF},
    **{f"efficientnet_{size}_g16_pn": COMPOUND[size][2] for size in HALF},
    "efficientnet_v2_s": 300,
    "gpunet_0": 320,
    "gpunet_1": 288,
    "gpunet_2": 384,
    "gpunet_p0": 224,
    "gpunet_p1": 224,
    "resnet50": 224,
    "amoebanet_a": 331,
    "amoebanet_d": 224,
    "ghostnet_050": 224,
    "ghostnet_100": 224,
    "ghostnet_130": 224,
    **{f"{family}_{size}": 224 for family in ("regnetx", "g_ghost_regnetx") for size in REGNETX},
    **{f"{family}_{size}": 224 for family in ("convnext", "ran_i") for size in CONVNEXTS},
    **{f"ran_e_{variant}": 224 for variant in RAN_E},
}
"""Pixels a side that each is trained at."""
