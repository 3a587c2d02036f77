"""What LANA learnt: how well the candidates do what the layers in their places do, and what each alone harms."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

from netsmith.report.figures import COLOURS, DASHES, Event, Figure, axis, curves, lanes, plain, style
from netsmith.report.heat import HIGH, SCALE
from netsmith.report.networks import asked, items, pick
from netsmith.report.numbers import number, short

ORIGINAL = "original"
"""The option that leaves a layer as it is; its harm is 0."""
READABLE = 8
"""Options up to which a cell has room for its number, on a phone as well."""


def learning(epochs: list[Event]) -> Figure | None:
    """The mean error of the candidates over the epochs, in shares of the layers' outputs."""
    traces = curves(epochs, {"error": "error"}, "epoch")
    if not traces:
        return None
    known = [value for value in traces[0]["y"] if value is not None]
    traces[0]["mode"] = "lines+markers"  # the epochs are few
    axes = {"xaxis": axis("epoch") | {"dtick": max(1, len(known) // 8)}, "showlegend": False}
    axes["yaxis"] = axis("error of the layers' outputs") | {"rangemode": "tozero"}
    return Figure(f"Mean error of the candidates over epochs: from {known[0]:.3g} to {known[-1]:.3g}.", traces, axes)


def replacements(scores: list[Event], members: list[dict[str, Any]]) -> Figure | None:
    """The harm of each replacement: layers down, options across; outlined is what was found."""
    alone = _alone(scores)
    if not alone:
        return None
    chosen = [pick(member, "architecture") or {} for member in members]
    paths = list(dict.fromkeys([path for choice in chosen for path in choice] + list(alone)))
    names = list(dict.fromkeys([ORIGINAL, *(option for row in alone.values() for option in row)]))
    cells = [[0.0 if name == ORIGINAL else alone.get(path, {}).get(name) for name in names] for path in paths]
    known = [harm for row in cells for harm in row if harm is not None and harm > 0]
    # Colour for what could be taken: a few hopeless options would leave all others pale.
    most = quantiles(known, n=4)[2] if len(known) > 1 else max(known, default=1.0)
    heat: dict[str, Any] = {"type": "heatmap", "x": list(range(len(names))), "y": list(range(len(paths))), "z": cells}
    heat |= {"zmin": 0, "zmax": most, "xgap": 1, "ygap": 1, "colorscale": SCALE, "showscale": False}
    heat["customdata"] = [[f"{plain(path)}<br>{plain(name)}" for name in names] for path in paths]
    heat["hovertemplate"] = "%{customdata}: %{z:+.3f}<extra></extra>"
    if len(names) <= READABLE:
        heat["text"] = [["" if z is None else f"{z:+.2f}" if z else "0" for z in row] for row in cells]
        heat["texttemplate"] = "%{text}"
    boxes = []
    for index, (member, choice) in enumerate(zip(members, chosen, strict=True)):
        name = "found" if len(members) == 1 else plain(asked(member) or f"found {index + 1}", 26)
        at = [(names.index(str(o)), paths.index(p)) for p, o in choice.items() if str(o) in names]
        look = {"color": COLOURS[(index + 1) % len(COLOURS)], "width": 2, "dash": DASHES[index % len(DASHES)]}
        boxes += [_box(x, y, 0.44 - 0.06 * index) | {"line": look, "name": name} for x, y in at]
        if at:
            boxes[-1]["showlegend"] = True
    rows = lanes(list(range(len(paths))), [plain(name, 18) for name in short(paths)])
    across = {"tickvals": list(range(len(names))), "ticktext": [plain(name, 18) for name in names]}
    across |= {"showgrid": False, "zeroline": False, "autotickangles": [0, -45, -90]}  # to the left: there is room
    axes = {"xaxis": axis("") | across}
    axes["yaxis"] = rows | {"range": [len(paths) - 0.5, -0.5]}
    return Figure(_words(alone), [heat], axes | {"shapes": boxes}, HIGH + 40 + 26 * len(paths))


def _box(x: int, y: int, half: float) -> dict[str, Any]:
    return {"type": "rect", "x0": x - half, "x1": x + half, "y0": y - half, "y1": y + half}


def _words(alone: dict[str, dict[str, float | None]]) -> str:
    least = [
        f"{plain(path)} {plain(option)} {harm:+.3f}"
        for path, row in alone.items()
        for option, harm in sorted(row.items(), key=lambda both: float("inf") if both[1] is None else both[1])[:1]
        if harm is not None
    ]
    said = "; ".join(least[:12]) + ("; ..." if len(least) > 12 else "")
    count = sum(map(len, alone.values()))
    return f"Harm of {count} replacements in {len(alone)} layers; the least of each layer: {said}."


def together(
    networks: list[Event], scores: list[Event], members: list[dict[str, Any]], score: str = "loss"
) -> Figure | None:
    """Of the networks that the integer program found, what the harms add up to, and what each was scored as a whole."""
    alone = _alone(scores)
    traces = []
    for index, event in enumerate(networks):
        whole = [number(harm) for harm in event.get("harm") or []]
        listed = items(event, "networks")
        points = [(_sum(alone, n), y) for n, y in zip(listed, whole, strict=False) if y is not None]
        points = [(x, y) for x, y in points if x is not None]
        if not points:
            continue
        several = len(networks) > 1 and index < len(members)
        name = plain(asked(members[index]), 26) if several else f"{len(points)} networks"
        best = min(points, key=lambda point: point[1])
        look = {"size": 9, "opacity": 0.75} | style(index + 1)  # in the colours of the boxes
        traces.append(_points(points, name, look))
        ring = {"size": 17, "symbol": "circle-open", "color": look["color"], "line": {"width": 2}}
        traces.append(_points([best], "the best", ring) | {"showlegend": len(networks) == 1})
    if not traces:
        return None
    axes = {"xaxis": axis("harms, added up"), "yaxis": axis(f"{score} of the whole network")}
    found = [trace for trace in traces if trace["marker"]["symbol"] != "circle-open"]
    alt = f"{sum(len(t['x']) for t in found)} networks of the integer program: {score} against the sum of the harms."
    return Figure(alt, traces, axes)


def _points(points: list[tuple[float, float]], name: str, marker: dict[str, Any]) -> dict[str, Any]:
    x, y = zip(*points, strict=True)
    trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "marker": marker}
    return trace | {"hovertemplate": "added up %{x:+.3f}, together %{y:.3f}<extra></extra>"}


def _alone(scores: list[Event]) -> dict[str, dict[str, float | None]]:
    """Layer -> replacement -> harm; None where it was no number."""
    found: dict[str, dict[str, float | None]] = {}
    for event in scores:
        for row in event.get("rows") or []:
            if isinstance(row, list) and len(row) == 3:
                found.setdefault(str(row[0]), {})[str(row[1])] = number(row[2])
    return found


def _sum(alone: dict[str, dict[str, float | None]], network: dict[str, Any]) -> float | None:
    harms = [alone.get(path, {}).get(str(option)) for path, option in network.items() if option != ORIGINAL]
    known = [harm for harm in harms if harm is not None]
    return sum(known) if len(known) == len(harms) else None
