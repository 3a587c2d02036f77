"""The table at the end of a search, and how numbers are written."""

from __future__ import annotations

import doctest

import pytest
from rich.console import Console
from synthetic_run import front, predicted, result

from netsmith.report import drawing, numbers
from netsmith.report.drawing import blocks, brackets
from netsmith.report.figures import pareto
from netsmith.report.networks import networks
from netsmith.report.table import rows, table


def printed(made: dict, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table(made))
        return console.export_text()


def test_rows_are_reference_found_baselines() -> None:
    listed = rows(result())
    assert [row.network.name for row in listed] == ["reference", "found", "random", "capacity"]
    assert [cell.title for cell in listed[0].cells] == ["accuracy", "latency", "parameters", "MACs", "file"]
    found = [(cell.text, cell.relative) for cell in listed[1].cells]
    assert found[:2] == [("91.85 %", "−0.44 points"), ("4.83 ms", "0.51×")]
    assert found[2:] == [("1.03 M", "0.46×"), ("37.4 M", "0.40×"), ("4.18 MB", "0.46×")]


@pytest.mark.parametrize(("metric", "title"), [("branches", "branches"), ("bitops", "bit operations")])
def test_counts_stand_there_when_they_were_asked_for(metric: str, title: str) -> None:
    made = result()
    assert title not in [cell.title for cell in rows(made)[0].cells]
    made["budgets"].append({"metric": metric, "limit": 44.0, "unit": "", "measured": 44.0})
    made["cost"][metric], made["reference"]["cost"][metric] = 44.0, 132.0
    found = next(row for row in rows(made) if row.network.kind == "found")
    (cell,) = [cell for cell in found.cells if cell.title == title]
    assert (cell.text, cell.relative) == ("44", "0.33×")


def test_peak_memory_stands_there_when_it_was_asked_for() -> None:
    made = result()
    made["budgets"].append({"metric": "peak_memory", "limit": 512_000, "unit": "bytes", "measured": 401_408})
    assert rows(made)[1].cells[-1].text == "401 kB"


def test_printed() -> None:
    text = printed(result(), 80)
    for part in ("reference", "found", "kept", "mean of 5", "capacity", "4.80–4.88 ms", "0.51×"):
        assert part in text
    assert "BROKEN" in printed(result(kept=False))
    assert "found, latency ≤ 7 ms" in printed(front())
    assert max(map(len, text.splitlines())) <= 80


def test_a_baseline_of_a_front_has_a_row_for_each_budget() -> None:
    made = front()
    budgets = [member["budgets"] for member in made["front"]]
    made["baselines"] = [
        {**baseline, "name": "random", "budgets": budget, "seed": seed}
        for budget, baseline in zip(budgets, made["baselines"], strict=False)
        for seed in (0, 1)
    ]
    listed = [row.network for row in rows(made) if row.network.kind == "baseline"]
    assert [network.name for network in listed] == [f"random, latency ≤ {limit} ms" for limit in (3, 5, 7)]
    assert {network.note for network in listed} == {"mean of 2"}


def test_what_a_table_predicts_is_said_to_be() -> None:
    made = predicted(result())
    latency = [row.cells[1] for row in rows(made)]
    assert [cell.text for cell in latency[:2]] == ["9.28 ms", "4.76 ms"]
    assert {cell.detail for cell in latency} == {"predicted"}
    assert latency[1].relative == "0.51×"
    text = printed(made)
    assert "latency as predicted by a table" in text
    assert "interval" not in text


@pytest.mark.parametrize("made", [{}, {"front": []}, {"baselines": [{"name": "[red]"}]}, {"metric": {"test": None}}])
def test_an_empty_result_still_prints(made: dict) -> None:
    assert "network" in printed(made)


@pytest.mark.parametrize("module", [numbers, drawing])
def test_examples(module) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "5", True, [], {}])
def test_what_is_no_number_is_a_dash(bad: object) -> None:
    assert {numbers.milliseconds(bad), numbers.count(bad), numbers.size(bad), numbers.quality("accuracy", bad)} == {"–"}
    assert numbers.duration(bad) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (1e-4, "100 ns"), (0.9996, "1.00 ms"), (0.0999, "99.9 µs"), (1234, "1.23 s"), (-2.5, "-2.50 ms")],
)
def test_times(value: float, text: str) -> None:
    assert numbers.milliseconds(value) == text


def test_the_front_is_what_nothing_dominates() -> None:
    figure = pareto(networks(result()), "accuracy")
    assert figure is not None
    edge = list(zip(figure.data[0]["x"], figure.data[0]["y"], strict=True))
    assert edge == sorted(edge)
    points = [(x, y) for trace in figure.data[1:] for x, y in zip(trace["x"], trace["y"], strict=True)]
    assert len(points) == 8
    for x, y in points:
        assert any(a <= x and b >= y for a, b in edge)


def test_blocks_grow_with_resolution_and_channels() -> None:
    drawn = blocks(result()["layers"], ["ConvBN", "MBConv", "Identity", "Linear"])
    assert drawn[0].height == drawing.TALL
    assert max(block.width for block in drawn) == pytest.approx(drawing.WIDE)
    assert all(8 <= block.height <= drawing.TALL for block in drawn)


def test_a_bracket_is_a_closed_outline_in_its_box() -> None:
    (bracket,) = brackets([{"epoch": e, "widths": {"w": [16 * (1 + e), 64 - 16 * e]}} for e in range(2)])
    assert (bracket.first, bracket.last) == ("16–64", "32–48")
    corners = [tuple(map(float, point.split(","))) for point in bracket.points.split()]
    assert len(corners) == 8
    assert all(0 <= x <= 100 and 0 <= y <= 40 for x, y in corners)
