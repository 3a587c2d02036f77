"""What the page draws without plotly: the network as blocks, and the closing brackets of the widths, both as SVG."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from netsmith.report.networks import pick
from netsmith.report.numbers import count, milliseconds, number, short

TALL, WIDE = 84, 74
"""Pixels of the highest resolution and of the most channels."""

SHORT = {
    "kernel": "k",
    "kernel_size": "k",
    "stride": "s",
    "hidden": "h",
    "groups": "g",
    "dilation": "d",
    "bits": "b",
    "expansion": "e",
}


@dataclass(frozen=True)
class Block:
    """A layer as drawn: sides in pixels, the index of its type's colour, and its words."""

    kind: str
    colour: int
    width: float
    height: float
    label: str
    shape: str
    words: str


def blocks(layers: list[dict[str, Any]], kinds: list[str]) -> list[Block]:
    """Height stands for the resolution and width for the channels of what a layer puts out; `kinds` gives the colours.

    Both grow with the square root, or a 4x4 layer would vanish beside a 224x224 one.
    """
    shapes = [_shape(layer.get("output")) for layer in layers]
    most = max((c for c, _, _ in shapes), default=1)
    highest = max((h for _, h, _ in shapes), default=1)
    drawn = []
    for layer, (c, h, w) in zip(layers, shapes, strict=True):
        shape = f"{c:g}×{h:g}×{w:g}" if c else ""
        costs = f"{count(layer.get('macs'))} MACs, {count(layer.get('params'))} parameters"
        words = f"{layer.get('name', '')}: {layer.get('text', '')}, out {shape}, {costs}"
        if number(layer.get("measured_ms")) is not None:
            words += f", {milliseconds(layer['measured_ms'])}"
        sides = 8 + (WIDE - 8) * sqrt(c / (most or 1)), 8 + (TALL - 8) * sqrt(h / (highest or 1))
        drawn.append(Block(kind(layer), kinds.index(kind(layer)), *sides, label(layer), shape, words))
    return drawn


def kind(layer: dict[str, Any]) -> str:
    """The block's type: what stands before the bracket."""
    return str(layer.get("text") or "?").split("(")[0].strip() or "?"


def label(layer: dict[str, Any]) -> str:
    """The block's options in short.

    >>> label({"text": "MBConv(16, 24, kernel=3, hidden=48, stride=2)"})
    'k3 h48 s2'
    """
    text = str(layer.get("text") or "")
    if re.match(r"\w+\(\s*\(", text):  # a block that prints its layers: their options are not its own
        return ""
    options = re.findall(r"(\w+)=\(?([\w.]+)", text)  # (3, 3): a kernel as torch prints it
    known = {name: value for name, value in options if name in SHORT}
    usual = {("stride", "1"), ("groups", "1"), ("dilation", "1")}
    return " ".join(f"{SHORT[n]}{v}" for n, v in known.items() if (n, v) not in usual)


def _shape(shape: Any) -> tuple[float, float, float]:
    """Channels, height and width; a vector is a 1x1 image, what was not recorded is 0."""
    sides = [number(side) or 0.0 for side in shape] if isinstance(shape, list) else []
    if len(sides) == 1:
        return sides[0], 1.0, 1.0
    return (sides[0], sides[1], sides[2]) if len(sides) == 3 else (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Bracket:
    """The range of widths still open for one decision, over the epochs: a polygon in a 100 by 40 box."""

    path: str
    points: str
    first: str
    last: str
    top: str
    name: str = ""
    """The path without what all paths share."""


def brackets(epochs: list[dict[str, Any]]) -> list[Bracket]:
    """One bracket per width decision, low and high over the epochs, drawn as steps."""
    history: dict[str, list[tuple[float, float, float]]] = {}
    for epoch in epochs:
        for path, ends in (epoch.get("widths") or {}).items() if isinstance(epoch.get("widths"), dict) else ():
            at = number(epoch.get("epoch"))
            low, high = (number(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
            if at is not None and low is not None and high is not None:
                history.setdefault(path, []).append((at, low, high))
    names = short(list(history))
    return [
        replace(_bracket(path, sorted(points)), name=name)
        for name, (path, points) in zip(names, history.items(), strict=True)
    ]


def kept(epochs: list[dict[str, Any]]) -> list[Bracket]:
    """How many channels of each group are not masked, over the epochs."""
    noted = [epoch for epoch in epochs if isinstance(epoch.get("kept"), dict)]
    found = brackets([epoch | {"widths": {path: [0, n] for path, n in epoch["kept"].items()}} for epoch in noted])
    return [replace(b, first=b.first.removeprefix("0–"), last=b.last.removeprefix("0–")) for b in found]


def _bracket(path: str, points: list[tuple[float, float, float]]) -> Bracket:
    start, end = points[0][0], points[-1][0] + 1  # an epoch's bracket holds until the next epoch
    top = max(high for _, _, high in points) or 1.0

    def edge(index: int) -> list[tuple[float, float]]:
        stops = [point[0] for point in points[1:]] + [end]
        ends = [(at, 40 - 38 * p[index] / top) for p, stop in zip(points, stops, strict=True) for at in (p[0], stop)]
        return [(100 * (at - start) / (end - start), y) for at, y in ends]

    outline = edge(2) + edge(1)[::-1]

    def words(point: tuple[float, float, float]) -> str:
        return f"{point[1]:g}–{point[2]:g}" if point[1] != point[2] else f"{point[1]:g}"

    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
    return Bracket(path, corners, words(points[0]), words(points[-1]), f"{top:g}")


def narrowed(epochs: list[dict[str, Any]]) -> str:
    """In words, how many width decisions are closed at the end."""
    last = next((e["widths"] for e in reversed(epochs) if isinstance(e.get("widths"), dict)), {})
    closed = sum(pick(last, path) is not None and len({*map(str, last[path])}) == 1 for path in last)
    return f"{closed} of {len(last)} brackets are closed at the end."
