"""NAS-Bench-201 (Dong & Yang, ICLR 2020, arXiv:2001.00326), also the topology space of NATS-Bench: one small cell.

Four nodes, six edges, five operations: 5^6 = 15,625 cells, 6,466 of them different. Macro, names and the order of the
benchmark's indices are those of D-X-Y/AutoDL-Projects; its tables of accuracies can be read with them.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping

from pydantic import PositiveInt
from torch import Tensor, nn

from netsmith.blocks.cells import Pool, ReluConvBn, Zero, next_node
from netsmith.blocks.mobile import Classifier, ConvBn, _text
from netsmith.decisions import Architecture, OneOf, Option, Places
from netsmith.errors import UserError, unknown

EDGES = tuple(f"{i}_{j}" for j in range(1, 4) for i in range(j))
"""From node i to node j, in the order of the benchmark; node 0 is the input and node 3 the output of the cell."""

OPERATIONS = {
    "none": "none",
    "skip": "skip_connect",
    "conv1x1": "nor_conv_1x1",
    "conv3x3": "nor_conv_3x3",
    "avg3": "avg_pool_3x3",
}
"""Our name -> the benchmark's, in its order."""


def nasbench201(
    classes: PositiveInt = 10,
    channels: PositiveInt = 3,
    resolution: PositiveInt = 32,
    *,
    cells: PositiveInt = 5,
    width: PositiveInt = 16,
    affine: bool = True,
) -> nn.Module:
    """The supernet: decisions ``edges.0_1`` to ``edges.2_3``, each shared by all cells.

    Args: ``cells`` in each of the three stages; ``width`` channels of the first stage; ``affine`` whether the batch
    norms of the operations have parameters. Networks are derived from the supernet, so they have what it has: the
    benchmark's own have them, its weight-sharing searches do without.

    Raises: UserError unless the resolution is a multiple of 4, as two stages halve it.
    """
    if resolution % 4:
        raise UserError(f"nasbench201 halves the resolution twice: it needs a multiple of 4 px; given: {resolution} px")
    return _Network(classes, channels, cells, width, affine)


class _Network(nn.Module):
    def __init__(self, classes: int, channels: int, cells: int, width: int, affine: bool) -> None:
        super().__init__()
        self.cells = cells
        widths = [stage * width for stage in (1, 2, 4) for _ in range(cells)]
        self.stem = ConvBn(channels, width, 3, act="none")
        self.edges = nn.ModuleDict({edge: _edge(widths, affine) for edge in EDGES})
        self.reductions = nn.ModuleList([_Reduction(width, 2 * width), _Reduction(2 * width, 4 * width)])
        self.head = Classifier(4 * width, classes, bn=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for place in range(3 * self.cells):
            if place in (self.cells, 2 * self.cells):
                x = self.reductions[place // self.cells - 1](x)
            nodes = [x]
            while len(nodes) < 4:
                nodes.append(next_node(self.edges, nodes, place))
            x = nodes[-1]
        return self.head(x)


def _edge(widths: list[int], affine: bool) -> OneOf:
    return OneOf(
        {
            "none": Places(Zero() for _ in widths),
            "skip": Places(nn.Identity() for _ in widths),
            "conv1x1": Places(ReluConvBn(n, n, 1, affine=affine) for n in widths),
            "conv3x3": Places(ReluConvBn(n, n, 3, affine=affine) for n in widths),
            "avg3": Places(Pool(n, "avg") for n in widths),
        }
    )


class _Reduction(nn.Module):
    """The residual block between stages: half the resolution, more channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.text = _text(type(self), inputs, outputs).removeprefix("_")
        self.first = ReluConvBn(inputs, outputs, 3, stride=2)
        self.second = ReluConvBn(outputs, outputs, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))

    def __repr__(self) -> str:
        return self.text


def to_string(architecture: Mapping[str, Option]) -> str:
    """As the benchmark writes a cell: ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``."""

    def written(i: int, j: int) -> str:
        return f"{OPERATIONS[str(architecture[f'edges.{i}_{j}'])]}~{i}"

    return "+".join(f"|{'|'.join(written(i, j) for i in range(j))}|" for j in range(1, 4))


def from_string(text: str) -> Architecture:
    """The architecture that `to_string` writes so. Raises: UserError for anything else."""
    ours = {theirs: name for name, theirs in OPERATIONS.items()}
    written = [part.partition("~")[0] for node in text.split("+") for part in node.strip("|").split("|")]
    for operation in written:
        if operation not in ours:
            raise unknown("NAS-Bench-201 operation", operation, ours)
    architecture: Architecture = {f"edges.{e}": ours[o] for e, o in zip(EDGES, written, strict=False)}
    if len(architecture) != len(EDGES) or to_string(architecture) != text:
        raise UserError(f"a cell of NAS-Bench-201 is written |op~0|+|op~0|op~1|+|op~0|op~1|op~2|; given: {text}")
    return architecture


@functools.cache
def _order() -> list[tuple[str, ...]]:
    # The benchmark shuffled its cells with this seed (exps/NAS-Bench-201/main.py).
    cells = list(itertools.product(OPERATIONS, repeat=len(EDGES)))
    random.Random(88).shuffle(cells)
    return cells


@functools.cache
def _indices() -> dict[tuple[str, ...], int]:
    return {cell: index for index, cell in enumerate(_order())}


def at_index(index: int) -> Architecture:
    """The cell with that index in the benchmark. Raises: UserError outside of 0 to 15,624."""
    if not 0 <= index < len(_order()):
        raise UserError(f"NAS-Bench-201 numbers its cells from 0 to {len(_order()) - 1}; given: {index}")
    return {f"edges.{edge}": operation for edge, operation in zip(EDGES, _order()[index], strict=True)}


def index_of(architecture: Mapping[str, Option]) -> int:
    """The index of a cell in the benchmark."""
    return _indices()[tuple(str(architecture[f"edges.{edge}"]) for edge in EDGES)]


def isomorphism_class(architecture: Mapping[str, Option]) -> str:
    """Equal for cells that compute the same (6,466 classes): what is cut off is "#", a skip leaves no trace."""
    nodes = ["0"]
    for j in range(1, 4):
        into = []
        for i, node in enumerate(nodes):
            operation = str(architecture[f"edges.{i}_{j}"])
            if operation == "none" or node == "#":
                into.append("#")
            else:
                into.append(node if operation == "skip" else f"({node})@{OPERATIONS[operation]}")
        nodes.append("+".join(sorted(into)))
    return nodes[-1]
