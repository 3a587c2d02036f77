"""Layers of cell-based spaces (DARTS, NAS-Bench-201): activation first, then convolution and batch norm.

A layer prints the short canonical text that is also its key in a latency table. ``affine`` says whether its batch norms
have parameters; without them (as DARTS and NAS-Bench-201 search) no option gains weight by its scale alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from netsmith.blocks.mobile import _text
from netsmith.decisions import Places


class ReluConvBn(nn.Module):
    """ReLU, convolution, batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.text = _text(ReluConvBn, inputs, outputs, kernel=kernel, stride=stride, affine=affine)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.act(x)))

    def __repr__(self) -> str:
        return self.text


class DilConv(nn.Module):
    """ReLU, depthwise convolution (dilated by 2 unless said otherwise), 1x1 convolution, batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 2, affine: bool = True
    ) -> None:
        super().__init__()
        self.text = _text(DilConv, inputs, outputs, kernel=kernel, stride=stride, dilation=dilation, affine=affine)
        padding = dilation * (kernel // 2)
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, stride, padding, dilation, inputs, bias=False)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.depthwise(self.act(x))))

    def __repr__(self) -> str:
        return self.text


class SepConv(nn.Module):
    """A depthwise separable convolution, twice; the first one strides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.text = _text(SepConv, inputs, outputs, kernel=kernel, stride=stride, affine=affine)
        self.first = DilConv(inputs, inputs, kernel, stride=stride, dilation=1, affine=affine)
        self.second = DilConv(inputs, outputs, kernel, dilation=1, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def __repr__(self) -> str:
        return self.text


class FactorizedReduce(nn.Module):
    """Half the resolution from two 1x1 convolutions of stride 2, the second shifted by a pixel, so that all are seen.

    Needs an even resolution and an even number of outputs.
    """

    def __init__(self, inputs: int, outputs: int, *, affine: bool = True) -> None:
        super().__init__()
        self.text = _text(FactorizedReduce, inputs, outputs, affine=affine)
        self.act = nn.ReLU()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))

    def __repr__(self) -> str:
        return self.text


class Pool(nn.Module):
    """3x3 pooling, "avg" (over the pixels that exist) or "max"; ``norm`` adds a batch norm without parameters."""

    def __init__(self, channels: int, kind: str, *, stride: int = 1, norm: bool = False) -> None:
        super().__init__()
        self.text = f"Pool({channels}, {kind!r}, stride={stride}, norm={norm})"
        averages = kind == "avg"
        self.pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False) if averages else nn.MaxPool2d(3, stride, 1)
        self.bn = nn.BatchNorm2d(channels, affine=False) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(x))

    def __repr__(self) -> str:
        return self.text


class Zero(nn.Module):
    """No connection: zeros. `next_node` leaves it out wherever something else comes in.

    They are the input times 0, not new zeros: a network that they cut off would be a constant, and the exported file
    empty, so that its time would say nothing about the layers that are still there.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * (x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])

    def __repr__(self) -> str:
        return f"Zero(stride={self.stride})"


FREE = (nn.Identity, Zero)
"""Layers that do nothing: no entry in a latency table, no box in a drawing."""


def next_node(edges: nn.ModuleDict, nodes: list[Tensor], place: int) -> Tensor:
    """The sum over the edges ``"i_j"`` from the nodes i so far to the next one, j, as they stand in cell ``place``.

    An edge closed to `Zero` is left out where another edge comes in, so that it costs nothing.
    """
    into = [(edges[f"{i}_{len(nodes)}"], node) for i, node in enumerate(nodes)]
    live = [(edge, node) for edge, node in into if not (isinstance(edge, Places) and isinstance(edge[0], Zero))]
    return functools.reduce(torch.add, (edge(node, place) for edge, node in live or into[:1]))
