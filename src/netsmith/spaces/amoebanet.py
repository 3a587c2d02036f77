"""AmoebaNet-A and -D (Real et al. 2019, arXiv:1802.01548): cells that evolution found, stacked as tensorflow/tpu does.

A cell has two inputs, state 0 (the output of the cell before, brought to the cell's width) and state 1 (that of the one
before it), and five sums of two operations on earlier states; what its row does not mark as used is its output,
concatenated. D won DAWNBench's ImageNet training cost in 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.mobile import pad_same
from netsmith.errors import UserError, unknown

EPS, MOMENTUM = 1e-3, 3e-4
"""Of batch norm, as in the official code (decay 0.9997)."""

CELLS = {
    # Pairs of operation:state; then the states that are used inside, and not part of the output.
    "a": {
        "normal": (
            "avg3:0 max3:0 | sep3:1 none:1 | none:0 avg3:1 | sep3:0 sep5:2 | avg3:5 sep3:0",
            (1, 0, 1, 0, 0, 1, 0),
        ),
        "reduction": (
            "sep3:1 avg3:0 | max3:0 sep7:2 | max3:1 max3:0 | sep3:4 1x7:0 | avg3:1 sep7:0",
            (1, 1, 0, 0, 0, 0, 0),
        ),
    },
    "d": {
        "normal": (
            "1x1:1 max3:1 | none:1 1x7:0 | 1x1:0 1x7:0 | max3:2 none:2 | avg3:1 1x1:5",
            (0, 1, 1, 0, 0, 1, 0),
        ),
        "reduction": (
            "max2:0 max3:0 | none:2 3x3:1 | 1x7:2 max3:2 | none:3 max2:1 | avg3:2 1x1:3",
            (1, 1, 1, 1, 0, 0, 0),
        ),
    },
}
"""`models/official/amoeba_net/model_specs.py`; which states are used is data there, not what the pairs say."""


def amoebanet(
    cell: str = "d",
    classes: int = 1000,
    channels: int = 3,
    *,
    cells: int = 18,
    width: int = 256,
    stem: int = 32,
    small: bool = False,
    dropout: float = 0.5,
) -> nn.Module:
    """AmoebaNet with ``cells`` normal cells in three stacks (3N in the paper) of ``width`` (F), twice and four times
    that.

    For ImageNet a 3x3 convolution of stride 2 and two reduction cells at a quarter and half the width come first;
    ``small`` leaves these out for images up to 64 px. No auxiliary head.

    Raises: UserError for an unknown cell, fewer than three cells, or a width below 16.
    """
    if cell not in CELLS:
        raise unknown("AmoebaNet", cell, CELLS)
    if cells < 3:
        raise UserError(f"cells is {cells}; allowed: 3 or more, for three stacks")
    if width < 16:
        raise UserError(f"width is {width}; allowed: 16 or more")
    return AmoebaNet(CELLS[cell], classes, channels, cells, width, stem, small, dropout)


class AmoebaNet(nn.Module):
    """The stack; logits `(n, classes)` of images `(n, channels, H, W)`."""

    def __init__(
        self,
        specs: dict[str, tuple[str, tuple[int, ...]]],
        classes: int,
        channels: int,
        cells: int,
        width: int,
        stem: int,
        small: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        stride, padding = (1, 1) if small else (2, 0)
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, stride, padding, bias=False), _norm(stem))
        made: list[Cell] = []
        inputs, before, halved = stem, 0, False  # channels of the last output and of the one before it

        def add(kind: str, scale: float) -> None:
            nonlocal inputs, before, halved
            reduces = kind == "reduction"
            made.append(Cell(*specs[kind], inputs, before, int(width * scale), 2 if reduces else 1, halved=halved))
            inputs, before, halved = made[-1].outputs, inputs, reduces

        for scale in () if small else (0.25, 0.5):
            add("reduction", scale)
        scale = 1.0
        for number in range(cells):
            if number in (cells // 3, 2 * cells // 3):
                scale *= 2
                add("reduction", scale)
            add("normal", scale)
        self.cells = nn.ModuleList(made)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.classify = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        before, now = None, self.stem(x)
        for cell in self.cells:
            before, now = now, cell(now, before)
        return self.classify(self.head(now))


class Cell(nn.Module):
    """One cell of ``width`` channels a state; ``inputs`` and ``before`` are the channels of its two inputs (0: there is
    no second, and state 1 is the first as it is), ``halved`` says whether the first has half the second's size."""

    def __init__(
        self, pairs: str, used: Sequence[int], inputs: int, before: int, width: int, stride: int, *, halved: bool
    ) -> None:
        super().__init__()
        self.enter = _conv(inputs, width)
        self.match: nn.Module = nn.Identity()
        if before and halved:
            self.match = nn.Sequential(nn.ReLU(), Halve(before, width))
        elif before and before != width:
            self.match = _conv(before, width)
        counts = [width, width if before else inputs]
        self.edges, self.states = nn.ModuleList(), []
        for pair in pairs.split("|"):
            for word in pair.split():
                name, _, state = word.partition(":")
                step = stride if int(state) < 2 else 1
                self.edges.append(operation(name, counts[int(state)], width, step))
                self.states.append(int(state))
            counts.append(width)
        self.output = [state for state, inside in enumerate(used) if not inside]
        self.shrink = nn.ModuleDict()
        for state in self.output:
            if state < 2 and stride > 1:
                self.shrink[str(state)] = Halve(counts[state], width)
            elif counts[state] != width:
                self.shrink[str(state)] = nn.Sequential(nn.Conv2d(counts[state], width, 1, bias=False), _norm(width))
        self.outputs = width * len(self.output)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        states = [self.enter(x), x if before is None else self.match(before)]
        for left, right in zip(range(0, 10, 2), range(1, 10, 2), strict=True):
            a, b = (self.edges[edge](states[self.states[edge]]) for edge in (left, right))
            states.append(a + b)
        parts = [self.shrink[str(s)](states[s]) if str(s) in self.shrink else states[s] for s in self.output]
        return torch.cat(parts, 1)


class Halve(nn.Module):
    """Half the size from two strided 1x1 convolutions, the second a pixel further, zeros behind the edge; a norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.bn = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.even(x), self.odd(F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:])], 1))


class Same(nn.Module):
    """A convolution or pooling after TensorFlow's "SAME" padding: what is added counts as the lowest value for a
    maximum, and not at all for a mean."""

    def __init__(self, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, kernel: int, stride: int) -> None:
        super().__init__()
        self.layer, self.kernel, self.stride = layer, kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_same(x, self.kernel, self.stride)
        if isinstance(self.layer, nn.MaxPool2d):
            edge = pad_same(x.new_zeros(1, 1, *x.shape[2:]) + 1, self.kernel, self.stride)
            return self.layer(padded.masked_fill(edge == 0, -torch.inf))
        if isinstance(self.layer, nn.AvgPool2d):
            edge = pad_same(x.new_zeros(1, 1, *x.shape[2:]) + 1, self.kernel, self.stride)
            return self.layer(padded) / self.layer(edge)
        return self.layer(padded)


def operation(name: str, inputs: int, outputs: int, stride: int) -> nn.Module:
    """One operation of a cell: none, 1x1, 3x3 and 1x7 (then 7x1) through a quarter of the width, avg3, max3, max2,
    sep3, sep5 and sep7 (twice)."""
    if name == "none" and stride == 1 and inputs == outputs:
        return nn.Identity()
    if name in ("none", "1x1"):
        return _conv(inputs, outputs, stride)
    kernel = int(name[-1])
    if name.startswith(("avg", "max")):
        pool = (nn.AvgPool2d if name.startswith("avg") else nn.MaxPool2d)(kernel, stride)
        shaped = [] if inputs == outputs else [nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs)]
        return nn.Sequential(Same(pool, kernel, stride), *shaped)
    if name.startswith("sep"):
        return nn.Sequential(*_separable(inputs, outputs, kernel, stride), *_separable(outputs, outputs, kernel, 1))
    narrow = outputs // 4
    if name == "3x3":
        middle: list[nn.Module] = [Same(nn.Conv2d(narrow, narrow, 3, stride, bias=False), 3, stride)]
    else:
        across = nn.Conv2d(narrow, narrow, (1, 7), (1, stride), (0, 3), bias=False)
        down = nn.Conv2d(narrow, narrow, (7, 1), (stride, 1), (3, 0), bias=False)
        middle = [across, _norm(narrow), nn.ReLU(), down]
    return nn.Sequential(_conv(inputs, narrow), nn.ReLU(), *middle, _norm(narrow), _conv(narrow, outputs))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs))


def _separable(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, kernel, stride, groups=inputs, bias=False)
    return [
        nn.ReLU(),
        Same(depthwise, kernel, stride),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        _norm(outputs),
    ]


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)
