"""DARTS' space (Liu et al., ICLR 2019, arXiv:1806.09055): a normal and a reduction cell, stacked.

A cell has two inputs, the outputs of the two cells before it, and four nodes, each the sum of two operations on earlier
nodes; it puts out all four. Macro and released cells are those of quark0/darts (`model.py`, `genotypes.py`).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from netsmith.blocks.cells import DilConv, FactorizedReduce, Pool, ReluConvBn, SepConv, Zero, next_node
from netsmith.blocks.mobile import Classifier, ConvBn
from netsmith.decisions import Architecture, OneOf, Places, Rule
from netsmith.errors import UserError, unknown

KINDS = ("normal", "reduce")
NODES = range(2, 6)
"""The nodes of a cell; 0 is the output of the cell before the last one, 1 that of the last one."""

RELEASED = {
    "DARTS_V1": (
        "sep3 1, sep3 0 | skip 0, sep3 1 | skip 0, sep3 1 | sep3 0, skip 2",
        "max3 0, max3 1 | skip 2, max3 0 | max3 0, skip 2 | skip 2, avg3 0",
    ),
    "DARTS_V2": (
        "sep3 0, sep3 1 | sep3 0, sep3 1 | sep3 1, skip 0 | skip 0, dil3 2",
        "max3 0, max3 1 | skip 2, max3 1 | max3 0, skip 2 | skip 2, max3 1",
    ),
}
"""Normal and reduction cell; nodes between bars, each with its two operations and the nodes that they read."""


def darts(
    classes: PositiveInt = 10,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 32,
    *,
    width: PositiveInt = 16,
    cells: Annotated[int, Field(ge=3)] = 8,
    affine: bool = True,
) -> nn.Module:
    """The supernet: decisions ``normal.i_j`` and ``reduce.i_j`` for the edge from node i to node j, each shared by all
    cells of its kind; the edges that are not ``none`` are two at every node.

    The defaults are the network that DARTS searches, its evaluation network has ``width=36, cells=20`` (without the
    auxiliary head of its training). Reduction cells stand at one and two thirds.

    Args: ``affine`` whether the batch norms of the operations have parameters. Networks are derived from the supernet,
    so they have what it has: DARTS searches without and trains its final network with them. Pools are followed by a
    batch norm in both, in DARTS only while searching.

    Raises: UserError unless the resolution is a multiple of 4, as two cells halve it.
    """
    if resolution % 4:
        raise UserError(f"darts halves the resolution twice: it needs a multiple of 4 px; given: {resolution} px")
    return _Network(classes, channels, width, cells, affine)


class _Network(nn.Module):
    def __init__(self, classes: int, channels: int, width: int, cells: int, affine: bool) -> None:
        super().__init__()
        self.reducing = (cells // 3, 2 * cells // 3)
        self.stem = ConvBn(channels, 3 * width, 3, act="none")
        inputs: list[nn.Module] = []
        widths: dict[str, list[int]] = {kind: [] for kind in KINDS}
        older, last = 3 * width, 3 * width
        for cell in range(cells):
            width *= 2 if cell in self.reducing else 1
            halved = cell - 1 in self.reducing  # the older input is still twice as large
            first = FactorizedReduce if halved else ReluConvBn
            both = [first(older, width, affine=affine), ReluConvBn(last, width, affine=affine)]
            inputs.append(nn.ModuleList(both))
            widths[KINDS[cell in self.reducing]].append(width)
            older, last = last, len(NODES) * width
        self.inputs = nn.ModuleList(inputs)
        self.normal = _edges(widths["normal"], 1, affine)
        self.reduce = _edges(widths["reduce"], 2, affine)
        self.head = Classifier(last, classes)
        self.rules = tuple(
            Rule(tuple(f"{kind}.{i}_{j}" for i in range(j)), "none", 2, 2) for kind in KINDS for j in NODES
        )

    def forward(self, x: Tensor) -> Tensor:
        older = last = self.stem(x)
        places = dict.fromkeys(KINDS, 0)
        for cell, (first, second) in enumerate(self.inputs):  # pyright: ignore[reportGeneralTypeIssues]
            kind = KINDS[cell in self.reducing]
            nodes = [first(older), second(last)]
            for _ in NODES:
                nodes.append(next_node(getattr(self, kind), nodes, places[kind]))
            places[kind] += 1
            older, last = last, torch.cat(nodes[2:], 1)
        return self.head(last)


def _edges(widths: list[int], stride: int, affine: bool) -> nn.ModuleDict:
    """The edges of a kind of cell; those from the two inputs stride."""
    return nn.ModuleDict({f"{i}_{j}": _edge(widths, stride if i < 2 else 1, affine) for j in NODES for i in range(j)})


def _edge(widths: list[int], stride: int, affine: bool) -> OneOf:
    def options(n: int) -> dict[str, nn.Module]:
        return {
            "none": Zero(stride),
            "max3": Pool(n, "max", stride=stride, norm=True),
            "avg3": Pool(n, "avg", stride=stride, norm=True),
            "skip": nn.Identity() if stride == 1 else FactorizedReduce(n, n, affine=affine),
            "sep3": SepConv(n, n, 3, stride=stride, affine=affine),
            "sep5": SepConv(n, n, 5, stride=stride, affine=affine),
            "dil3": DilConv(n, n, 3, stride=stride, affine=affine),
            "dil5": DilConv(n, n, 5, stride=stride, affine=affine),
        }

    places = [options(n) for n in widths]
    return OneOf({name: Places(place[name] for place in places) for name in places[0]})


def released(name: str) -> Architecture:
    """One of the `RELEASED` pairs of cells as an architecture of `darts`. Raises: UserError for an unknown name."""
    if name not in RELEASED:
        raise unknown("released DARTS cells:", name, RELEASED)
    architecture: Architecture = {f"{kind}.{i}_{j}": "none" for kind in KINDS for j in NODES for i in range(j)}
    for kind, cell in zip(KINDS, RELEASED[name], strict=True):
        for j, node in zip(NODES, cell.split("|"), strict=True):
            for written in node.split(","):
                operation, i = written.split()
                architecture[f"{kind}.{i}_{j}"] = operation
    return architecture
