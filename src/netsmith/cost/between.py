"""What a layer costs between two widths: one that it reads, one that it makes.

Parameters and MACs of a convolution are products of the two, and latency is a staircase in both, so such a layer has
no price per option of one decision: it has one per pair of options (`Prices.pairs`). Where more than two decisions
meet in a layer (behind a concatenation) the price is taken to be bilinear, which counts are exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import NamedTuple

from torch import nn

from netsmith.cost.counts import Shape
from netsmith.decisions import Option


class Extent(NamedTuple):
    """How long a dimension is: what always stays, and for each decision how many places one channel of it takes."""

    fixed: int
    parts: Mapping[str, int]

    def at(self, widths: Mapping[str, Option]) -> int:
        return self.fixed + sum(places * int(widths[path]) for path, places in self.parts.items())


class Between(NamedTuple):
    """A layer between open widths."""

    path: str
    layer: nn.Module
    """The whole one, without numbers."""
    reads: Extent
    makes: Extent
    at: Callable[[int, int], tuple[nn.Module, Shape]]
    """The layer where the two extents have these lengths, without numbers, and its input."""

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys([*self.reads.parts, *self.makes.parts]))


Row = dict[tuple[str, ...], dict[tuple[Option, ...], float]]
"""No, one or two decisions -> an option of each -> price."""


def spread(layer: Between, price: Callable[[int, int], float], options: Mapping[str, list[Option]]) -> Row:
    """The price of a layer, a function of the lengths of both extents, by the decisions that the lengths depend on."""
    paths = layer.paths
    if len(paths) > 2:
        return _expanded(layer, price, options)
    choices = [dict(zip(paths, chosen, strict=True)) for chosen in product(*(options[path] for path in paths))]
    return {tuple(paths): {tuple(c.values()): price(layer.reads.at(c), layer.makes.at(c)) for c in choices}}


def bilinear(
    layer: Between, price: Callable[[int, int], float], options: Mapping[str, list[Option]]
) -> Callable[[int, int], float]:
    """The function a + b u + c v + d u v with the price at the four ends of both extents: what counts are."""
    corners = _corners(layer, options)
    values = {corner: price(*corner) for corner in product(*corners)}
    return lambda u, v: _plane(corners, values, u, v)


def needed(layer: Between, options: Mapping[str, list[Option]]) -> list[tuple[int, int]]:
    """The lengths at which `spread` asks for the price."""
    asked: dict[tuple[int, int], None] = {}

    def note(u: int, v: int) -> float:
        asked[u, v] = None
        return 0.0

    spread(layer, note, options)
    return list(asked)


def gathered(rows: Iterable[Row], options: Mapping[str, list[Option]]) -> tuple[float, dict, dict]:
    """All rows added up: constant, options and pairs of `Prices`."""
    constant = 0.0
    alone: dict[str, dict[Option, float]] = {path: dict.fromkeys(row, 0.0) for path, row in options.items()}
    pairs: dict[tuple[str, str], dict[tuple[Option, Option], float]] = {}
    for row in rows:
        for paths, prices in row.items():
            if not paths:
                constant += prices[()]
            elif len(paths) == 1:
                for (option,), price in prices.items():
                    alone[paths[0]][option] += price
            else:
                ends = min(paths), max(paths)
                whole = pairs.setdefault(ends, dict.fromkeys(product(options[ends[0]], options[ends[1]]), 0.0))
                for both, price in prices.items():
                    whole[both if paths == ends else both[::-1]] += price  # pyright: ignore[reportArgumentType]
    return constant, alone, pairs


def _corners(layer: Between, options: Mapping[str, list[Option]]) -> tuple[list[int], list[int]]:
    ends = [{path: end(options[path]) for path in layer.paths} for end in (min, max)]
    u, v = ([extent.at(end) for end in ends] for extent in (layer.reads, layer.makes))
    return sorted(set(u)), sorted(set(v))


def _plane(corners: tuple[list[int], list[int]], values: Mapping[tuple[int, ...], float], u: int, v: int) -> float:
    def weights(ends: list[int], x: int) -> dict[int, float]:
        if len(ends) == 1:
            return {ends[0]: 1.0}
        share = (x - ends[0]) / (ends[1] - ends[0])
        return {ends[0]: 1 - share, ends[1]: share}

    across, down = weights(corners[0], u), weights(corners[1], v)
    return sum(p * q * values[i, j] for i, p in across.items() for j, q in down.items())


def _expanded(layer: Between, price: Callable[[int, int], float], options: Mapping[str, list[Option]]) -> Row:
    """a + b u + c v + d u v with u and v sums over decisions, multiplied out."""
    plane = bilinear(layer, price, options)
    a = plane(0, 0)
    b, c = plane(1, 0) - a, plane(0, 1) - a
    d = plane(1, 1) - a - b - c
    reads, makes = layer.reads, layer.makes
    rows: dict[tuple[str, ...], dict[tuple[Option, ...], float]] = defaultdict(lambda: defaultdict(float))
    rows[()][()] = plane(reads.fixed, makes.fixed)
    for parts, slope in ((reads.parts, b + d * makes.fixed), (makes.parts, c + d * reads.fixed)):
        for path, places in parts.items():
            for n in options[path]:
                rows[path,][n,] += slope * places * int(n)
    for (p, first), (q, second) in product(reads.parts.items(), makes.parts.items()):
        for m, n in product(options[p], options[q] if p != q else [None]):
            if n is None:
                rows[p,][m,] += d * first * second * int(m) ** 2
            else:
                rows[p, q][m, n] += d * first * second * int(m) * int(n)
    return {paths: dict(row) for paths, row in rows.items()}
