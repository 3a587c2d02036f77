"""Several methods on one problem: the numbers over seeds, the table in the terminal, and the page.

An interval is Student's, over seeds: mean plus or minus t(0.975, n - 1) * s / sqrt(n); one seed has none. A method is
compared with the best baseline seed by seed (the interval of the paired differences), since luck of the data and of the
device's table is shared. The best of three baselines is a little better by luck: that makes the test stricter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from netsmith.report import figures
from netsmith.report.folder import read
from netsmith.report.networks import cost, found, metric_name, pick, predicted, score
from netsmith.report.numbers import DASH, count, duration, is_share, milliseconds, quality, size
from netsmith.report.page import Gallery, render

if TYPE_CHECKING:
    from rich.table import Table

FEW = 3
"""Seeds below which nothing can be said about noise that would be of use (two: an interval of 12.7 standard errors)."""

MATCHED_PERCENT = 2.0
"""Latencies that lie no farther apart count as equal."""


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean (Student's t); None for a single value.

    >>> interval([1.0, 2.0, 3.0])
    (-0.484..., 4.484...)
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def summary(
    parts: Sequence[dict[str, Any]],
    *,
    failed: Sequence[dict[str, Any]],
    budgets: Sequence[dict[str, Any]],
    methods: Sequence[str],
    spaces: Mapping[str, str],
    baselines: Sequence[str],
    seeds: int,
) -> dict[str, Any]:
    """What the comparison says, as plain data.

    Args:
        parts: results of the runs, each with "run" (its folder), "in_turn_ms" (latency of each of its networks when
            all were timed in turn; empty where nothing runs), "trainings" (short ones, in the search), "effort".
        failed: {"method", "seed", "error"} of the runs without a result.
        budgets: {"asked", "limits"} of each network of the front.
        spaces: methods that searched another space than the rest, and which.
    """
    first = parts[0]
    metric = metric_name(first)
    tables = []
    for place, budget in enumerate(budgets):
        rows = [_row(name, [p for p in parts if p["method"] == name], place, name in baselines) for name in methods]
        tables.append(budget | _judged([row for row in rows if row["points"]], metric, spaces))
    notes = []
    if seeds < FEW:
        what = "One seed says" if seeds == 1 else f"{seeds} seeds say"
        notes.append(f"{what} next to nothing about noise: take {FEW} at least, better 5.")
    notes += [f"{name} searched {space}, another space than the rest." for name, space in spaces.items()]
    if len(budgets) > 1:
        notes.append("A method searches all budgets at once: seconds and memory are those of the whole search.")
    return {
        **{key: first[key] for key in ("task", "space", "device")},
        "metric": metric,
        "seeds": seeds,
        "interval": "Student t over seeds, 95 %",
        "budgets": tables,
        "failed": list(failed),
        "notes": notes,
    }


def _row(method: str, parts: Sequence[dict[str, Any]], place: int, baseline: bool) -> dict[str, Any]:
    """One method at one budget, over its seeds."""
    points = []
    for own in parts:
        network = found(own)[place]
        in_turn = own["in_turn_ms"]
        points.append(
            {
                "seed": own["seed"],
                "run": own["run"],
                "score": score(network),
                "latency_ms": in_turn[place] if in_turn else cost(network, "latency"),
                "gate_latency_ms": cost(network, "latency"),
                "params": cost(network, "params"),
                "kept": pick(network, "kept"),
                "trainings": own["trainings"],
                **(own["effort"] or {}),
            }
        )
    keys = ("score", "latency_ms", "params", "processor_seconds", "seconds", "peak_memory_bytes", "trainings")
    columns = {key: [point[key] for point in points if point.get(key) is not None] for key in keys}
    means = {key: fmean(values) if values else None for key, values in columns.items()}
    return {
        "method": method,
        "baseline": baseline,
        "predicted": any(predicted(found(own)[place]) for own in parts),
        **means,
        "score_interval": interval(columns["score"]),
        "latency_range_ms": [min(columns["latency_ms"]), max(columns["latency_ms"])] if columns["latency_ms"] else None,
        "kept": sum(point["kept"] is True for point in points),
        "points": points,
    }


def _judged(rows: list[dict[str, Any]], metric: str, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The rows, and how each method stands to the best baseline. Those that searched ``elsewhere`` may have had nothing
    as large as the budget, so their latencies are not among those that have to be alike."""
    known = [row for row in rows if row["baseline"] and row["score"] is not None]
    best = max(known, key=lambda row: row["score"], default=None)
    for row in rows:
        row["lead"] = None if row["baseline"] or best is None else _lead(row, best, metric)
    alike = [row for row in rows if row["method"] not in elsewhere]
    times = [point["latency_ms"] for row in alike for point in row["points"] if point["latency_ms"] is not None]
    return {
        "rows": rows,
        "best_baseline": best and best["method"],
        "latency_spread_percent": 100 * (max(times) / min(times) - 1) if times else None,
    }


def _lead(row: dict[str, Any], best: dict[str, Any], metric: str) -> dict[str, Any]:
    """How far a method is ahead of the best baseline, seed by seed, and the sentence about it."""
    theirs = {point["seed"]: point["score"] for point in best["points"]}
    pairs = [(point["score"], theirs.get(point["seed"])) for point in row["points"]]
    leads = [a - b for a, b in pairs if a is not None and b is not None]
    name, rival = row["method"], f"{best['method']}, the best baseline"
    if not leads:
        return {"mean": None, "interval": None, "seeds": 0, "sentence": f"{name} and {rival}, share no seed."}
    ends, mean, n = interval(leads), fmean(leads), len(leads)
    if ends is None:
        side = "above" if mean > 0 else "below"
        far = f"{difference(metric, abs(mean), sign=False)} {side} {rival}" if mean else f"level with {rival}"
        sentence = f"{name} is {far}, with one seed, which cannot tell a lead from luck."
    else:
        noise = f"{difference(metric, mean)} (95 % interval {_ends(metric, *ends)}, {n} seeds)"
        if ends[0] > 0:
            sentence = f"{name} beats {rival}, by more than the noise: {noise}."
        elif ends[1] < 0:
            sentence = f"{name} is worse than {rival}, by more than the noise: {noise}."
        else:
            sentence = f"{name} does not beat {rival}, by more than the noise: {noise}."
        sentence += " Seeds are too few for a verdict." if n < FEW else ""
    return {"mean": mean, "interval": ends, "seeds": n, "sentence": sentence}


def difference(metric: str, value: float, *, sign: bool = True) -> str:
    """
    >>> difference("accuracy", -0.0123)
    '−1.23 points'
    """
    plus = "+" if sign else ""
    text = f"{100 * value:{plus}.2f} points" if is_share(metric) else f"{value:{plus}.3g}"
    return text.replace("-", "−")


def _ends(metric: str, low: float, high: float) -> str:
    return " to ".join(difference(metric, end).removesuffix(" points") for end in (low, high))


# Shown ----------------------------------------------------------------------------------------------------------------

TITLES = ("latency", "parameters", "search, processor", "search, wall", "peak memory", "kept")


def cells(row: dict[str, Any], table: dict[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """A row's cells: title, text, small print."""
    ends, percent = row["score_interval"], is_share(metric)
    text = quality(metric, row["score"])
    if ends:
        half = (ends[1] - ends[0]) / 2
        text = f"{text.removesuffix(' %')} ± {100 * half:.2f} %" if percent else f"{text} ± {half:.2g}"
    limit = next((one["limit"] for one in table["limits"] if one["metric"] == "latency"), None)
    used = ""
    if row["latency_range_ms"]:
        low, high = row["latency_range_ms"]
        shares = dict.fromkeys(f"{ms / limit:.3f}" for ms in (low, high)) if limit else ()
        used = f"{'–'.join(shares)} of limit" if limit else ""
    used = ", ".join(filter(None, ("predicted" if row["predicted"] else "", used)))
    trainings = f"{row['trainings']:.3g} short trainings" if row["trainings"] else ""
    n = len(row["points"])
    return [
        (metric, text, f"{n} seed{'s' if n > 1 else ''}"),
        *zip(
            TITLES,
            (
                milliseconds(row["latency_ms"]),
                count(row["params"]),
                duration(row["processor_seconds"]),
                duration(row["seconds"]),
                size(row["peak_memory_bytes"]),
                f"{row['kept']} of {n}",
            ),
            (used, "", trainings, "", "", ""),
            strict=True,
        ),
    ]


def tables(result: dict[str, Any]) -> list[Table | str]:
    """What the CLI prints: for each budget a table and its sentences, then what failed, and notes."""
    from rich.table import Table
    from rich.text import Text

    said: list[Table | str] = []
    for table in result["budgets"]:
        caption = "95 % intervals over seeds; processor and wall time, and memory, are those of the search alone"
        sheet = Table(caption=caption, caption_justify="left")
        sheet.add_column("method")
        rows = [(row, cells(row, table, result["metric"])) for row in table["rows"]]
        for title, _, _ in rows[0][1] if rows else []:
            sheet.add_column(title, justify="right", no_wrap=title != "latency")
        for index, (row, listed) in enumerate(rows):
            last = index + 1 == len(rows) or rows[index + 1][0]["baseline"] != row["baseline"]
            name = Text(row["method"] + ("\nbaseline" if row["baseline"] else ""))
            texts = [Text("\n".join(filter(None, (text, small))) or DASH) for _, text, small in listed]
            sheet.add_row(name, *texts, style="" if row["baseline"] else "bold", end_section=last)
        said += [table["asked"], sheet, *sentences(table)]
    return [
        *said,
        *(f"{one['method']}, seed {one['seed']}, failed: {one['error']}" for one in result["failed"]),
        *result["notes"],
    ]


def sentences(table: dict[str, Any]) -> list[str]:
    """What came out at one budget, plainly."""
    said = [row["lead"]["sentence"] for row in table["rows"] if row["lead"]]
    if (spread := table["latency_spread_percent"]) is not None:
        far = ": more than 2 %, so they are not compared at one latency (see how much of the limit each uses)"
        said.append(f"Latencies of one space lie up to {spread:.1f} % apart{far if spread > MATCHED_PERCENT else ''}.")
    return said


def against_latency(table: dict[str, Any], metric: str) -> figures.Figure | None:
    """The metric against the latency: a mark with intervals for each method, its seeds as small points."""
    rows = [row for row in table["rows"] if row["score"] is not None and row["latency_ms"] is not None]
    if not rows:
        return None
    points = [p for row in rows for p in row["points"] if p["score"] is not None and p["latency_ms"] is not None]
    factor, unit = figures.clock(point["latency_ms"] for point in points)
    percent = 100 if is_share(metric) else 1
    traces = []
    for index, row in enumerate(rows):
        look = (
            figures.style(index) if not row["baseline"] else figures.style(index) | {"symbol": figures.OPEN[index % 5]}
        )
        own = [point for point in row["points"] if point in points]
        x, y = [p["latency_ms"] * factor for p in own], [p["score"] * percent for p in own]
        name = figures.plain(row["method"], 40)
        small = {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "legendgroup": name}
        small |= {"showlegend": False, "opacity": 0.55, "marker": look | {"size": 6}, "hoverinfo": "text"}
        small["text"] = [
            figures.plain(
                f"{row['method']}, seed {p['seed']}: {quality(metric, p['score'])} at {milliseconds(p['latency_ms'])}"
            )
            for p in own
        ]
        mean = {"type": "scatter", "mode": "markers", "name": name, "legendgroup": name, "hoverinfo": "text"}
        mean |= {"x": [row["latency_ms"] * factor], "y": [row["score"] * percent], "marker": look | {"size": 14}}
        mean["text"] = [figures.plain(f"{row['method']}: " + " ".join(cells(row, table, metric)[0][1:]))]
        for axis, ends, centre, times in (
            ("error_y", row["score_interval"], row["score"], percent),
            ("error_x", interval([p["latency_ms"] for p in own]), row["latency_ms"], factor),
        ):
            if ends:
                mean[axis] = {"type": "data", "array": [(ends[1] - centre) * times], "color": look["color"], "width": 6}
        traces += [small, mean]
    axes = {
        "xaxis": figures.axis(f"latency ({unit})") | _around([p["latency_ms"] * factor for p in points]),
        "yaxis": figures.axis(f"{metric} (%)" if percent == 100 else metric)
        | _around([p["score"] * percent for p in points]),
    }
    said = "; ".join(
        f"{row['method']} {quality(metric, row['score'])} at {milliseconds(row['latency_ms'])}" for row in rows
    )
    return figures.Figure(f"{metric} against latency. {said}.", traces, axes, 440)


def _around(values: Sequence[float]) -> dict[str, Any]:
    """An axis that shows the points; an interval of few seeds would shrink them to one."""
    low, high = min(values), max(values)
    room = 0.6 * (high - low) or 0.02 * abs(high) or 1.0
    return {"range": [low - room, high + room]}


def bars(table: dict[str, Any], key: str, title: str, factor: float, unit: str) -> figures.Figure | None:
    """One number of each method as a bar, its seeds as points."""
    rows = [row for row in table["rows"] if row[key] is not None]
    if not rows:
        return None
    lanes = list(range(len(rows)))
    names = [figures.plain(row["method"], 18) for row in rows]
    shown = [duration(row[key]) if unit == "s" else size(row[key]) for row in rows]
    bar = {"type": "bar", "orientation": "h", "x": [row[key] * factor for row in rows], "y": lanes, "name": "mean"}
    bar |= {"marker": {"color": "--c0"}, "text": shown, "textposition": "auto", "hoverinfo": "none"}
    seeds = [(point[key] * factor, lane) for lane, row in enumerate(rows) for point in row["points"] if key in point]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in seeds],
        "y": [y for _, y in seeds],
        "name": "seeds",
    }
    dots |= {"marker": {"color": "--c1", "size": 7, "symbol": "line-ns-open"}, "hovertemplate": f"%{{x:.4~g}} {unit}"}
    axes = {"xaxis": figures.axis(f"{title} ({unit})") | {"rangemode": "tozero"}, "yaxis": figures.lanes(lanes, names)}
    said = ", ".join(f"{row['method']} {text}" for row, text in zip(rows, shown, strict=True))
    return figures.Figure(f"{title}: {said}.", [bar, dots], axes | {"bargap": 0.35}, 120 + 34 * len(rows))


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds a comparison that came to an end, not a run."""
    file = folder / "result.json"
    return file.is_file() and b'"best_baseline"' in file.read_bytes()


def write_comparison(folder: Path, out: Path) -> Path:
    """Write one self-contained page about the comparison in a folder. UserError: it has no result that can be read."""
    read_folder = read(folder)
    gallery, result = Gallery(), read_folder.result
    metric = result["metric"]
    shown = []
    for table in result["budgets"]:
        shown.append(
            {
                "asked": table["asked"],
                "rows": [(row, cells(row, table, metric)) for row in table["rows"]],
                "sentences": sentences(table),
                "pareto": gallery.hang(against_latency(table, metric)),
            }
        )
    spent = [("processor_seconds", "processor seconds of the search", 1.0, "s")]
    spent += [("peak_memory_bytes", "peak memory of the search", 1e-6, "MB")]
    context = {
        "result": result,
        "metric": metric,
        "tables": shown,
        "spent": [gallery.hang(bars(result["budgets"][0], *one)) for one in spent],
        "command": read_folder.command,
        "problem": read_folder.problem,
        "title": f"{result['task']}, compared · netsmith",
    }
    return render("comparison.html.j2", context, gallery, out)
