"""PruNet's space (Kierat et al. 2022, arXiv:2209.11785), as far as its two released networks tell it.

The macro is the union of GPUNet-P0 and -P1 (NVIDIA/DeepLearningExamples, GPUNet, `0.5ms-D.json` and `0.8ms-D.json`):
kernels 3 and 5 in every layer, hidden widths in steps of 32 up to eight times the block's input, and open depth. The
paper's own table of the space is not known, so the union is our reading.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.decisions import Architecture, OneOf, Width
from netsmith.errors import UserError, unknown

STEM, TAIL, EPS = 32, 1984, 1e-3
STAGES = (
    (32, "conv conv", 1),
    (64, "conv ir ir", 2),
    (96, "ir ir ir", 2),
    (256, "ir ir ir", 2),
    (704, "ir ir ir ir", 2),
    (704, "ir", 2),
)
"""(channels, kinds of layer, stride of the first), after a stem of stride 2."""

LARGEST_EXPANSION = 8
"""Several layers of P1 sit exactly on it: the limit before pruning."""

RELEASED = {
    "gpunet-p0": "k3 k3 | k3 - - | k3/512 k3/736 k3/736 | k3/736 k5/1088 k3/1216 | k3/2048 k5/2688 k3/2368 k3/1792 "
    "| k3/4032",
    "gpunet-p1": "k3 k3 | k5 k3/512 k3/512 | k5/512 k5/768 - | k5/768 k5/1920 k3/2016 "
    "| k5/2016 k5/5632 k3/5216 k5/5632 | k5/5600",
}
"""Kernel/hidden width of every layer, stages between bars, "-" for skip."""


def prunet(
    classes: PositiveInt = 1000,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 224,
    *,
    step: PositiveInt = 32,
    kernels: tuple[PositiveInt, ...] = (3, 5),
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> nn.Module:
    """The supernet: decisions ``stageS.L`` (kernel or skip) and ``stageS.L.kK.hidden`` (width).

    The two kernels of a layer are separate blocks at full width: 78.0 million parameters, 312 MB in fp32. To count or
    to sample, build it without numbers: ``with torch.device("meta"): prunet()``. Skip is offered only where the shape
    does not change.

    Args: ``step`` channels between offered widths; ``drop_path`` rate below which the layers' rates stay, growing
    linearly from 0 (0.2 in the released training).

    Raises: UserError below 128 px, where the stride of 64 leaves less than 2x2 pixels.
    """
    if resolution < 128:
        raise UserError(
            f"prunet divides the resolution by 64 and needs 128 px; given: {resolution} px (see prunet_small)"
        )
    total = sum(len(kinds.split()) for _, kinds, _ in STAGES)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvBn(channels, STEM, 3, stride=2, eps=EPS))
    inputs, built = STEM, 0
    for stage, (outputs, kinds, first) in enumerate(STAGES, start=1):
        layers = []
        for kind in kinds.split():
            stride, rate = (1 if layers else first), drop_path * built / total
            options: dict[str, nn.Module] = {}
            for kernel in kernels:
                if kind == "conv":
                    block = ConvBn(inputs, outputs, kernel, stride=stride, eps=EPS)
                else:
                    hidden = Width(range(step, LARGEST_EXPANSION * inputs + 1, step))
                    block = MBConv(
                        inputs, outputs, kernel=kernel, hidden=hidden, stride=stride, eps=EPS, drop_path=rate
                    )
                options[f"k{kernel}"] = block
            if stride == 1 and inputs == outputs:
                options["skip"] = nn.Identity()
            layers.append(OneOf(options))
            inputs, built = outputs, built + 1
        parts[f"stage{stage}"] = nn.Sequential(*layers)
    parts["head"] = Head(inputs, TAIL, classes, dropout=dropout, eps=EPS)
    return nn.Sequential(parts)


def released(name: str) -> Architecture:
    """One of the `RELEASED` networks as an architecture of `prunet`. Raises: UserError for an unknown name."""
    if name not in RELEASED:
        raise unknown("PruNet", name, RELEASED)
    architecture: Architecture = {}
    for stage, row in enumerate(RELEASED[name].split("|"), start=1):
        for layer, text in enumerate(row.split()):
            option, _, width = text.partition("/")
            path = f"stage{stage}.{layer}"
            architecture[path] = "skip" if option == "-" else option
            if width:
                architecture[f"{path}.{option}.hidden"] = int(width)
    return architecture
