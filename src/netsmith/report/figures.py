"""The charts of the page as plain plotly data: `page.js` draws them and fills in the colours of the theme.

A colour is the name of a CSS variable ("--c0"); texts that come from a run go through `plain`, for plotly reads a
little HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from netsmith.report.networks import Network, pick
from netsmith.report.numbers import interval, is_share, limit, milliseconds, number, quality, scale, short

COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5")
SYMBOLS = ("circle", "square", "triangle-up", "pentagon", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
OPEN = ("circle-open", "square-open", "triangle-up-open", "cross-open", "diamond-open")
"""Colour, symbol and dash change together: no series is told apart by its colour alone."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A chart: plotly traces, layout and height in pixels; `alt` says in words what it shows."""

    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 340
    steps: list[dict[str, Any]] = field(default_factory=list)
    """For a slider: its positions, each with a "label" and the first trace's "z" there."""


def plain(text: Any, width: int = 1000) -> str:
    """A run's text for plotly: escaped, and cut in its middle where it is long."""
    text = str(text)
    if len(text) > width:
        text = f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"
    return escape(text, quote=False)


def clock(values: Iterable[float | None]) -> tuple[float, str]:
    """What to multiply milliseconds with, and the unit that gives: µs where all is faster than 1 ms."""
    known = [value for value in values if value is not None]
    return (1e3, "µs") if known and max(known) < 1 else (1.0, "ms")


def times(values: Iterable[float | None], factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in values]


def style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)]}


def pareto(listed: Sequence[Network], metric: str) -> Figure | None:
    """The metric against the latency, with interval bars; the dotted line joins what nothing dominates."""
    points = [n for n in listed if n.score is not None and n.cost("latency") is not None]
    if not points:
        return None
    factor, unit = clock(n.cost("latency") for n in points)
    percent = 100 if is_share(metric) else 1
    where = {id(n): ((n.cost("latency") or 0) * factor, (n.score or 0) * percent) for n in points}
    edge, best = [], float("-inf")
    for x, y in sorted(where.values(), key=lambda at: (at[0], -at[1])):
        if y > best:
            best = y
            edge.append((x, y))
    line = {"color": "--muted", "width": 1, "dash": "dot"}
    traces: list[dict[str, Any]] = [_line([x for x, _ in edge], [y for _, y in edge], "front", line)]
    traces[0] |= {"line": line | {"shape": "hv"}, "hoverinfo": "skip"}
    index = {"found": 0, "baseline": 0}
    for kind, name in dict.fromkeys((n.kind, n.name) for n in points):
        group = [n for n in points if (n.kind, n.name) == (kind, name)]
        marker: dict[str, Any] = {"size": 11, "color": "--muted", "symbol": "diamond"}
        if kind == "found":
            marker = {"size": 14, "line": {"color": "--panel", "width": 1}} | style(index[kind])
        elif kind == "baseline":
            marker = {"size": 10, "color": COLOURS[(3 + index[kind]) % 6], "symbol": OPEN[index[kind] % len(OPEN)]}
        index[kind] = index.get(kind, 0) + 1
        x, y = zip(*(where[id(n)] for n in group), strict=True)
        ends = [n.interval for n in group]
        up = [max(0, (high or 0) * factor - a) if high else 0 for (_, high), a in zip(ends, x, strict=True)]
        down = [max(0, a - (low or 0) * factor) if low else 0 for (low, _), a in zip(ends, x, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": marker["color"]}
        words = [f"{n.sentence} {interval(*n.interval)} {n.note}".strip() for n in group]
        trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": plain(name, 40), "marker": marker}
        traces.append(trace | {"error_x": bars, "text": [plain(w) for w in words], "hoverinfo": "text"})
    said = "; ".join(n.sentence for n in points[:12]) + ("; ..." if len(points) > 12 else "")
    known = {"predicted" if n.predicted else "measured" for n in points}
    latency = f"{known.pop()} latency" if len(known) == 1 else "latency"
    axes = {"xaxis": axis(f"{latency} ({unit})"), "yaxis": axis(f"{metric} (%)" if percent == 100 else metric)}
    return Figure(f"{metric} against {latency}. {said}", traces, axes, 420)


def losses(searches: Sequence[tuple[str, list[Event]]]) -> Figure | None:
    """Training and search loss of each supernet, by name."""
    traces = []
    for name, epochs in searches:
        ahead = f"{plain(name, 40)} " if len(searches) > 1 else ""
        traces += curves(epochs, {"train_loss": f"{ahead}train", "search_loss": f"{ahead}search"}, "epoch")
    traces = [trace | _look(index) for index, trace in enumerate(traces)]
    if not traces:
        return None
    ends = ", ".join(f"{t['name']} from {_first(t['y']):.3g} to {_first(t['y'][::-1]):.3g}" for t in traces)
    return Figure(f"Loss over epochs: {ends}.", traces, {"xaxis": axis("epoch"), "yaxis": axis("loss")})


def expected(epochs: list[Event]) -> Figure | None:
    """The latency the search expects of what it would pick, against its target."""
    epochs = [e | {"latency": number(pick(e, "expected", "latency"))} for e in epochs]
    traces = curves(epochs, {"latency": "expected"}, "epoch")
    if not traces:
        return None
    goals = [e | {"target": number(pick(e, "target", "latency") or e.get("target"))} for e in epochs]
    targets = curves(goals, {"target": "target"}, "epoch")
    factor, unit = clock(v for trace in traces + targets for v in trace["y"])
    said = " to ".join(milliseconds(v) for v in (_first(traces[0]["y"]), _first(traces[0]["y"][::-1])))
    goal = f" Target: {milliseconds(_first(targets[0]['y'][::-1]))}." if targets else ""
    for trace in targets:
        trace |= {"mode": "lines", "line": {"color": "--c1", "dash": "dash", "width": 2}}
    for trace in traces + targets:
        trace["y"] = times(trace["y"], factor)
    axes = {"xaxis": axis("epoch"), "yaxis": axis(f"expected latency ({unit})") | {"rangemode": "tozero"}}
    return Figure(f"Expected latency over epochs: from {said}.{goal}", traces + targets, axes)


def layers(listed: list[dict[str, Any]]) -> Figure | None:
    """Latency layer by layer: measured as bars, predicted as diamonds."""
    predicted = [number(layer.get("predicted_ms")) for layer in listed]
    measured = [number(layer.get("measured_ms")) for layer in listed]
    if not any(value is not None for value in predicted + measured):
        return None
    factor, unit = clock(predicted + measured)
    rows = list(range(len(listed)))
    names = [plain(name, 18) for name in short([layer.get("name", "") for layer in listed])]
    texts = [
        f"{plain(layer.get('text', ''), 60)}<br>measured {milliseconds(m)}, predicted {milliseconds(p)}"
        for layer, p, m in zip(listed, predicted, measured, strict=True)
    ]
    shared = {"y": rows, "text": texts, "hoverinfo": "text"}
    bars = {"type": "bar", "orientation": "h", "x": times(measured, factor), "name": "measured"}
    bars |= shared | {"marker": {"color": "--c0"}, "textposition": "none"}
    dots = {"type": "scatter", "mode": "markers", "x": times(predicted, factor), "name": "predicted"}
    diamond = {"color": "--c1", "symbol": "diamond", "size": 9, "line": {"color": "--panel", "width": 1}}
    dots |= shared | {"marker": diamond}
    known = [[value for value in values if value is not None] for values in (measured, predicted)]
    drawn = [(trace, values) for trace, values in zip((bars, dots), known, strict=True) if values]
    sums = ", ".join(f"{trace['name']} {milliseconds(sum(values))}" for trace, values in drawn)
    traces = [trace for trace, _ in drawn]
    axes = {"xaxis": axis(f"latency ({unit})") | {"rangemode": "tozero"}, "yaxis": lanes(rows, names), "bargap": 0.35}
    alt = f"Latency of {len(listed)} layers; sum {sums}."
    return Figure(alt, traces, axes, 110 + 20 * len(rows))


def rounds(listed: list[Event], metric: str, unit: str) -> Figure | None:
    """The promise loop on one metric: what each round predicted, what was measured, and the limit."""
    known = [e for e in listed if number(e.get("measured")) is not None or number(e.get("predicted")) is not None]
    if not known:
        return None
    columns = {key: [number(e.get(key)) for e in known] for key in ("limit", "predicted", "measured")}
    every = [v for values in columns.values() for v in values if v is not None]
    factor, shown = clock(every) if unit == "ms" else scale(max(every), unit)
    limits, names = ({str(e.get(key)) for e in known} for key in ("limit", "name"))

    def tick(event: Event) -> str:
        """Networks of a front differ in this limit, or only in that of another metric."""
        words = [plain(event.get("round"), 9)]
        if len(limits) > 1:
            words.append(f"≤ {limit(event.get('limit'), unit)}")
        elif len(names) > 1:
            words.append(plain(event.get("name"), 20))
        return "<br>".join(words)

    place = list(range(len(known)))
    marks = {"limit": ("line-ew-open", "--text", 34), "predicted": ("diamond-open", "--c1", 11)}
    marks["measured"] = ("circle", "--c0", 11)
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": place,
            "y": times(columns[name], factor),
            "name": name,
            "marker": {"symbol": symbol, "color": colour, "size": width, "line": {"width": 2, "color": colour}},
            "hovertemplate": f"%{{y:.3~f}} {shown}",
        }
        for name, (symbol, colour, width) in marks.items()
        if any(value is not None for value in columns[name])
    ]
    ticks = {"tickvals": place, "ticktext": [tick(e) for e in known], "range": [-0.6, len(place) - 0.4]}
    ticks |= {"showgrid": False, "zeroline": False}
    title = metric.replace("_", " ")
    axes = {"xaxis": axis("round") | ticks, "yaxis": axis(f"{title} ({shown})" if shown else title)}
    alt = f"{len(known)} rounds of the promise loop, {plain(title)}; the table beside it holds the numbers."
    return Figure(alt, traces, axes, 320)


def training(epochs: list[Event], key: str, metric: str = "accuracy") -> Figure | None:
    """Loss or metric of each network trained from scratch."""
    names = list(dict.fromkeys(str(e.get("which", "found")) for e in epochs))
    names.sort(key=lambda name: name == "reference")  # what was found has the first colour, as everywhere
    traces = []
    for index, name in enumerate(names):
        mine = [e for e in epochs if str(e.get("which", "found")) == name]
        traces += [t | _look(index) for t in curves(mine, {key: plain(name, 40)}, "epoch")]
    if not traces:
        return None
    known = [v for trace in traces for v in trace["y"] if v is not None]
    percent = key != "loss" and is_share(metric) and max(known) <= 1
    ends = []
    for trace in traces:
        last = _first(trace["y"][::-1])
        ends.append(f"{trace['name']} {quality(metric, last) if percent else f'{last:.3g}'}")
        trace["y"] = times(trace["y"], 100 if percent else 1)
    title = key if key == "loss" else f"{metric} (%)" if percent else metric
    axes = {"xaxis": axis("epoch"), "yaxis": axis(title)}
    return Figure(f"{title} over training epochs; at the end: {', '.join(ends)}.", traces, axes)


def curves(epochs: list[Event], keys: dict[str, str], x: str) -> list[dict[str, Any]]:
    """A line per key over the epochs that hold it; a gap where one was not a number."""
    epochs = sorted((e for e in epochs if number(e.get(x)) is not None), key=lambda e: e[x])
    traces = []
    for index, (key, name) in enumerate(keys.items()):
        mine = [e for e in epochs if key in e]
        values = [number(e[key]) for e in mine]
        if any(value is not None for value in values):
            line = _line([e[x] for e in mine], values, name, {}) | _look(index)
            traces.append(line | {"mode": "lines+markers" if len(mine) == 1 else "lines"})  # a lone point is no line
    return traces


def _line(x: list[Any], y: list[Any], name: str, line: dict[str, Any]) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": line}


def _look(index: int) -> dict[str, Any]:
    dash = index + index // len(COLOURS)  # the seventh has the first colour again, with another dash
    line = {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[dash % len(DASHES)], "width": 2}
    return {"line": line, "hovertemplate": "epoch %{x}: %{y:.4~g}"}


def _first(values: Sequence[float | None]) -> float:
    return next(value for value in values if value is not None)


def axis(title: str) -> dict[str, Any]:
    return {"title": {"text": plain(title)}}


def lanes(rows: list[int], names: list[str]) -> dict[str, Any]:
    """A vertical axis with a name per row, the first on top."""
    ticks = {"tickvals": rows, "ticktext": names, "range": [len(rows) - 0.4, -0.6]}
    return ticks | {"showgrid": False, "zeroline": False, "title": {"text": ""}}


def unpack(figure: Figure) -> dict[str, Any]:
    """The figure as page.js reads it."""
    return {"data": figure.data, "layout": figure.layout | {"height": figure.height}, "steps": figure.steps}
