"""How the probabilities of a search moved: heat maps of decisions against options and against epochs."""

from __future__ import annotations

from typing import Any

from netsmith.report.figures import SYMBOLS, Event, Figure, axis, lanes, plain
from netsmith.report.networks import asked, pick
from netsmith.report.numbers import number, short

SCALE = [[0, "--low"], [1, "--c0"]]
HIGH = 110
"""Pixels that a heat map needs besides its rows."""


def choices(epochs: list[Event], members: list[dict[str, Any]]) -> list[Figure]:
    """How sure each decision is, epoch by epoch, for decisions between named options and between numbers.

    One heat map with a slider per kind: decisions down, options across; squares mark what was found in the end.
    """
    epochs = [e for e in epochs if isinstance(e.get("probabilities"), dict)]
    options: dict[str, list[str]] = {}
    for epoch in epochs:
        for path, shares in epoch["probabilities"].items():
            known = options.setdefault(path, [])
            known += [name for name in shares if name not in known] if isinstance(shares, dict) else []
    numeric = {path: all(name.isdigit() for name in names) for path, names in options.items()}
    drawn = []
    for kind in (False, True):
        paths = [path for path in options if options[path] and numeric[path] == kind]
        if paths:
            names = list(dict.fromkeys(name for path in paths for name in options[path]))
            names = sorted(names, key=int) if kind else names
            drawn.append(_heat(_thin(epochs), paths, names, members))
    return drawn


def _thin(epochs: list[Event], most: int = 120) -> list[Event]:
    """At most that many epochs, the first and the last among them: the page stays light after a long search."""
    if len(epochs) <= most:
        return epochs
    return [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]


def _heat(epochs: list[Event], paths: list[str], names: list[str], members: list[dict[str, Any]]) -> Figure:
    def at(epoch: Event) -> list[list[float | None]]:
        shares = [[number(pick(epoch, "probabilities", path, name)) for name in names] for path in paths]
        return [[None if p is None else round(p, 3) for p in row] for row in shares]

    steps = [{"label": f"epoch {e.get('epoch')}", "z": at(e)} for e in epochs]
    rows, place = list(range(len(paths))), list(range(len(names)))
    cells = [[f"{plain(path)}<br>{plain(name)}" for name in names] for path in paths]
    heat = {"type": "heatmap", "x": place, "y": rows, "z": steps[-1]["z"], "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1}
    heat |= {
        "text": cells,
        "hovertemplate": "%{text}: %{z:.2f}<extra></extra>",
        "colorscale": SCALE,
        "showscale": False,
    }
    traces: list[dict[str, Any]] = [heat]
    for index, member in enumerate(members):
        picked = [(place[names.index(str(o))], rows[paths.index(p)]) for p, o in _architecture(member, paths, names)]
        if picked:
            x, y = zip(*picked, strict=True)
            marker = {"symbol": f"{SYMBOLS[(index + 1) % len(SYMBOLS)]}-open", "size": 11}
            marker |= {"color": "--c1", "line": {"width": 2}}
            name = "found" if len(members) == 1 else plain(asked(member) or f"found {index + 1}", 26)
            trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "marker": marker}
            traces.append(trace | {"hoverinfo": "skip", "showlegend": True})
    across = {"tickvals": place, "ticktext": [plain(name, 14) for name in names], "range": [-0.5, len(names) - 0.5]}
    axes = _axes(paths, axis("option") | across)
    sure = sum(max((p for p in row if p is not None), default=0) > 0.5 for row in steps[-1]["z"])
    alt = f"Probability of each option; at {steps[-1]['label']}, {sure} of {len(paths)} decisions lean on one option."
    return Figure(alt, traces, axes, HIGH + 20 * len(rows), steps)


def _axes(paths: list[str], x: dict[str, Any]) -> dict[str, Any]:
    """A row per decision; the same margins everywhere, so that the rows of maps side by side are level."""
    names = [plain(name, 18) for name in short(paths)]
    rows = lanes(list(range(len(paths))), names) | {"range": [len(paths) - 0.5, -0.5]}
    still = {"showgrid": False, "zeroline": False, "tickangle": "auto"}
    return {"xaxis": x | still, "yaxis": rows, "margin": {"t": 40, "b": 50, "l": 8, "r": 12}}


def _architecture(member: dict[str, Any], paths: list[str], names: list[str]) -> list[tuple[str, Any]]:
    chosen = pick(member, "architecture")
    return [(p, o) for p, o in chosen.items() if p in paths and str(o) in names] if isinstance(chosen, dict) else []


def certainty(epochs: list[Event], removed: list[Event]) -> Figure | None:
    """Each decision's highest probability over the epochs: when it made up its mind; crosses where an option left."""
    epochs = [e for e in epochs if isinstance(e.get("probabilities"), dict) and number(e.get("epoch")) is not None]
    epochs = _thin(epochs)
    paths = list(dict.fromkeys(path for e in epochs for path in e["probabilities"]))
    if not paths:
        return None
    z, texts = [], []
    for path in paths:
        shares = [pick(e, "probabilities", path) for e in epochs]
        pairs = [
            [(p, o) for o, v in (s.items() if isinstance(s, dict) else ()) if (p := number(v)) is not None]
            for s in shares
        ]
        tops = [max(pair, default=(None, "")) for pair in pairs]
        z.append([None if p is None else round(p, 3) for p, _ in tops])
        texts.append([f"{plain(path)}: {plain(option)}" for _, option in tops])
    rows = list(range(len(paths)))
    heat = {"type": "heatmap", "x": [e["epoch"] for e in epochs], "y": rows, "z": z, "zmin": 0, "zmax": 1, "ygap": 1}
    heat |= {"text": texts, "hovertemplate": "epoch %{x}, %{text} %{z:.2f}<extra></extra>", "showscale": False}
    heat["colorscale"] = SCALE
    traces: list[dict[str, Any]] = [heat]
    gone = [e for e in removed if e.get("path") in paths and number(e.get("epoch")) is not None]
    if gone:
        marker = {"symbol": "x-thin", "size": 7, "line": {"color": "--c1", "width": 1.5}}
        x, y = [e["epoch"] for e in gone], [paths.index(e["path"]) for e in gone]
        cross = {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": "option removed", "marker": marker}
        texts = [f"{plain(e['path'])}: {plain(e.get('option'))} removed" for e in gone]
        traces.append(cross | {"text": texts, "hoverinfo": "text", "showlegend": True})
    axes = _axes(paths, axis("epoch") | {"range": [epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5]})
    alt = f"Highest probability of each of {len(paths)} decisions over {len(epochs)} epochs; {len(gone)} removals."
    return Figure(alt, traces, axes, HIGH + 20 * len(rows))
