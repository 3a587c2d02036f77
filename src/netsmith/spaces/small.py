"""Search spaces for small images (8 to 64 px): strides, stage widths, depth, blocks and hidden widths are open.

The outer decision `body` picks a macro: the resolutions and channel counts of three stages. Inside it every layer
picks a block and, in `prunet_small`, the block's hidden width. Strides, depth and stage widths are open because on
small images they explain most of the differences between networks of the same latency; kernels and blocks explain
little.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from pydantic import PositiveInt
from torch import nn

from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv
from netsmith.decisions import OneOf, Width
from netsmith.errors import UserError

Candidates = Callable[[int, int, int], dict[str, nn.Module]]
"""(inputs, outputs, stride) -> what may stand there."""
TINY = 12
"""Pixels up to which images have so little to tell that a third of the operations is enough."""


def prunet_small(
    classes: PositiveInt = 10,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 32,
    *,
    step: PositiveInt | None = None,
    expansion: PositiveInt | None = None,
    depth: PositiveInt | None = None,
) -> nn.Module:
    """PruNet's kind of layer on small images: four blocks, each with an open hidden width.

    Args: ``step`` channels between offered widths (none: the device's staircase, 16 where no device is at hand);
    ``expansion`` the largest hidden width over the input width (6, or 3 up to 12 px); ``depth`` the most layers a stage
    may have (4, or 2 up to 12 px).
    """
    step, largest = step or 16, expansion or (6 if resolution > TINY else 3)

    def candidates(inputs: int, outputs: int, stride: int) -> dict[str, nn.Module]:
        def hidden() -> Width:
            return Width(range(step, max(step, largest * inputs) + 1, step))

        return {
            "ir_k3": MBConv(inputs, outputs, kernel=3, hidden=hidden(), stride=stride),
            "ir_k5": MBConv(inputs, outputs, kernel=5, hidden=hidden(), stride=stride),
            "ir_k5_se": MBConv(inputs, outputs, kernel=5, hidden=hidden(), stride=stride, squeeze=max(8, inputs // 4)),
            "fused_k3": FusedMBConv(inputs, outputs, kernel=3, hidden=hidden(), stride=stride),
        }

    return _space(classes, channels, resolution, depth, candidates)


def fbnet_small(
    classes: PositiveInt = 10,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 32,
    *,
    depth: PositiveInt | None = None,
) -> nn.Module:
    """FBNet's kind of layer on small images: eight fixed blocks and skip."""

    def candidates(inputs: int, outputs: int, stride: int) -> dict[str, nn.Module]:
        blocks: dict[str, nn.Module] = {
            f"ir_k{k}_e{e}": MBConv(inputs, outputs, kernel=k, hidden=e * inputs, stride=stride)
            for k in (3, 5)
            for e in (1, 3, 6)
        }
        for e in (1, 3):
            blocks[f"fused_k3_e{e}"] = FusedMBConv(inputs, outputs, kernel=3, hidden=e * inputs, stride=stride)
        return blocks

    return _space(classes, channels, resolution, depth, candidates)


def macros(resolution: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name -> (strides of stem and three stages, their channels) that suit square images of ``resolution`` px."""
    if not 8 <= resolution <= 64:
        raise UserError(f"the small spaces are for images of 8 to 64 px; given: {resolution} px")
    if resolution <= TINY:
        strides = [(1, 1, 2, 2), (1, 1, 2, 1)]
        widths = [(16, 16, 24, 32), (16, 16, 32, 48)]
    else:
        stem = 2 if resolution > 40 else 1
        strides = [(stem, 1, 2, 2), (stem, 2, 2, 2), (stem, 2, 2, 1)]
        widths = [(16, 16, 32, 64), (16, 32, 64, 96), (16, 32, 64, 160)]
    found = {}
    for s in strides:
        size, sizes = resolution, []
        for stride in s:
            size = -(-size // stride)
            sizes.append(str(size))
        for w in widths:
            found[f"r{'-'.join(sizes[1:])}_w{'-'.join(map(str, w[1:]))}"] = (s, w)
    return found


def _space(classes: int, channels: int, resolution: int, depth: int | None, candidates: Candidates) -> nn.Module:
    found = macros(resolution)
    depth = depth or (4 if resolution > TINY else 2)
    strides, widths = next(iter(found.values()))
    stem = ConvBn(channels, widths[0], 3, stride=strides[0])
    bodies = {name: _body(classes, depth, s, w, candidates) for name, (s, w) in found.items()}
    return nn.Sequential(OrderedDict(stem=stem, body=OneOf(bodies)))


def _body(classes: int, depth: int, strides: tuple, widths: tuple, candidates: Candidates) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = widths[0]
    for stage, (stride, outputs) in enumerate(zip(strides[1:], widths[1:], strict=True), start=1):
        for layer in range(depth):
            step = stride if layer == 0 else 1
            options = candidates(inputs, outputs, step)
            if layer > 0:
                # Only a layer that keeps the shape can be skipped; the first of a stage may change it.
                options["skip"] = nn.Identity()
            parts[f"stage{stage}_{layer}"] = OneOf(options)
            inputs = outputs
    parts["head"] = Head(inputs, 2 * inputs, classes)
    return nn.Sequential(parts)
