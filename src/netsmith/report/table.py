"""The comparison table: reference, found and baselines side by side, on the page and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from netsmith.report.networks import COSTS, NAMES, ON_DEMAND, Network, budgeted, cost, merged, networks, score
from netsmith.report.numbers import DASH, interval, is_share, quality

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "latency": "latency",
    "params": "parameters",
    "macs": "MACs",
    "file_bytes": "file",
    "peak_memory_bytes": "peak memory",
    "ram_bytes": "RAM in int8",
    "flash_bytes": "flash in int8",
    "branches": "branches",
    "bitops": "bit operations",
}


@dataclass(frozen=True)
class Cell:
    """A number as text, and how it stands to the reference."""

    title: str
    text: str
    relative: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    network: Network
    cells: list[Cell]


def rows(result: dict[str, Any]) -> list[Row]:
    """The rows of one run: reference, found, one per baseline and budget (the mean of several seeds)."""
    listed = networks(result)
    baselines = [n for n in listed if n.kind == "baseline"]
    return arrange([n for n in listed if n.kind != "baseline"] + merged(baselines), columns([result]))


def columns(results: list[dict[str, Any]]) -> list[str]:
    """Which costs the table shows; peak memory, branches and bit operations only where a budget
    asked for them."""
    limited = {NAMES.get(metric, metric) for result in results for metric in budgeted(result)}
    return [name for name in COSTS if name not in ON_DEMAND or name in limited]


def arrange(listed: list[Network], costs: list[str]) -> list[Row]:
    """Networks as rows of text, each relative to its own reference."""
    return [Row(network, [_score(network), *(_cost(network, name) for name in costs)]) for network in listed]


def _score(network: Network) -> Cell:
    text = quality(network.metric, network.score)
    share = is_share(network.metric)
    if network.spread is not None:
        spread = f"{100 * network.spread:.2f}" if share else f"{network.spread:.2g}"
        text = f"{text.removesuffix(' %')} ± {spread}{' %' if share else ''}"
    before = score(network.reference)
    if network.kind == "reference" or network.score is None or before is None:
        return Cell(network.metric, text)
    gain = network.score - before
    return Cell(network.metric, text, (f"{100 * gain:+.2f} points" if share else f"{gain:+.3g}").replace("-", "−"))


def _cost(network: Network, name: str) -> Cell:
    value, before = network.cost(name), cost(network.reference, name)
    relative = ""
    if network.kind != "reference" and value is not None and before:
        ratio = value / before
        relative = f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.2g}×"
    detail = "" if name != "latency" else "predicted" if network.predicted else interval(*network.interval)
    return Cell(TITLES[name], COSTS[name](value), relative, detail)


def table(result: dict[str, Any]) -> Table:
    """What the CLI prints at the end of a search: a row each for reference, found and baselines.

    Args:
        result: the contents of a run's `result.json`.
    """
    from rich.table import Table
    from rich.text import Text

    listed = rows(result)
    predicted = any(row.network.predicted for row in listed)
    clock = "latency as predicted by a table" if predicted else "latency interval (95 %)"
    sheet = Table(caption=f"second line: {clock}, and relative to the reference", caption_justify="left")
    sheet.add_column("network")
    for cell in listed[0].cells if listed else []:
        sheet.add_column(cell.title, justify="right", no_wrap=True)
    for index, row in enumerate(listed):
        network = row.network
        last = index + 1 == len(listed) or listed[index + 1].network.kind != network.kind
        mark = "" if network.kept is None else "kept" if network.kept else "BROKEN"
        style = {"reference": "dim", "found": "bold"}.get(network.kind, "")
        below = " · ".join(part for part in (network.note, mark) if part)
        # Text, not markup: a network called "[red]" is called "[red]"
        name = Text(network.name + (f"\n{below}" if below else ""))
        texts = [Text("\n".join(part for part in (c.text, c.detail, c.relative) if part) or DASH) for c in row.cells]
        sheet.add_row(name, *texts, style=style, end_section=last)
    return sheet
