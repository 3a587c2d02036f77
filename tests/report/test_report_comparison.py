"""What a comparison says: intervals, leads over the best baseline, the table and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import cost, result, scored
from test_report_page import EVIL

from netsmith.report.comparison import interval, is_comparison, sentences, summary, tables, write_comparison

BASELINES = ("random", "best_of")


def part(method: str, seed: int, score: float, latency: float = 4.9) -> dict[str, Any]:
    """A run's result, as a comparison knows it."""
    spent = {"processor_seconds": 100.0 + seed, "seconds": 120.0, "peak_memory_bytes": 400_000_000}
    made = result(seed, method=method)
    cut = {"metric": scored(score) | {"test_exported": score}, "cost": cost(latency, 10_000, 1_000_000)}
    told = {"run": f"{method}-{seed}", "in_turn_ms": [latency + 0.01], "trainings": 4, "effort": spent}
    return {**made, "baselines": [], **cut, **told}


def compared(scores: dict[str, list[float]], **options: Any) -> dict[str, Any]:
    parts = [part(method, seed, score) for method, own in scores.items() for seed, score in enumerate(own)]
    limits = [{"metric": "latency", "limit": 5.0, "unit": "ms"}]
    given = {"failed": [], "budgets": [{"asked": "latency<=5ms", "limits": limits}], "methods": list(scores)}
    return summary(parts, spaces={}, baselines=BASELINES, seeds=max(map(len, scores.values())), **{**given, **options})


def lead(scores: dict[str, list[float]]) -> dict[str, Any]:
    return compared(scores)["budgets"][0]["rows"][0]["lead"]


def test_the_interval_is_students():
    assert interval([0.5]) is None
    assert interval([0.0, 2.0]) == pytest.approx(
        (1 - 12.7062, 1 + 12.7062), abs=1e-3
    )  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)  # t(0.975, 2) / sqrt(3)
    assert interval([3.0, 3.0]) == (3.0, 3.0)


def test_a_lead_is_that_over_the_best_baseline_seed_by_seed():
    # Seeds differ by 10 points, which both share: the lead is as good as certain.
    found = lead({"fbnet": [0.72, 0.821, 0.919], "random": [0.7, 0.8, 0.9], "best_of": [0.5, 0.5, 0.5]})
    assert found["mean"] == pytest.approx(0.02)
    assert found["interval"] == pytest.approx((0.02 - 0.002484, 0.02 + 0.002484), abs=1e-5)
    assert found["sentence"] == (
        "fbnet beats random, the best baseline, by more than the noise: "
        "+2.00 points (95 % interval +1.75 to +2.25, 3 seeds)."
    )


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([0.72, 0.79, 0.91], "fbnet does not beat random, the best baseline, by more than the noise: +0.67 points"),
        ([0.68, 0.781, 0.879], "fbnet is worse than random, the best baseline, by more than the noise: −2.00 points"),
    ],
)
def test_a_lead_within_the_noise_is_none(own, said):
    assert lead({"fbnet": own, "random": [0.7, 0.8, 0.9]})["sentence"].startswith(said)


def test_few_seeds_say_so():
    one = compared({"fbnet": [0.72], "random": [0.7]})
    (row, baseline), said = one["budgets"][0]["rows"], sentences(one["budgets"][0])
    assert row["score_interval"] is None
    assert baseline["lead"] is None
    assert (
        said[0]
        == "fbnet is 2.00 points above random, the best baseline, with one seed, which cannot tell a lead from luck."
    )
    assert one["notes"] == ["One seed says next to nothing about noise: take 3 at least, better 5."]
    two = compared({"fbnet": [0.72, 0.73], "random": [0.7, 0.7]})
    assert "2 seeds say next to nothing" in two["notes"][0]
    assert sentences(two["budgets"][0])[0].endswith("Seeds are too few for a verdict.")
    assert compared({"fbnet": [0.72] * 3, "random": [0.7] * 3})["notes"] == []


def test_seeds_that_failed_are_left_out_of_the_pairs():
    scores = {"fbnet": [0.72, 0.73, 0.75], "random": [0.7, 0.7]}
    failed = [{"method": "random", "seed": 2, "error": "the loss became nan"}]
    found = compared(scores, failed=failed)
    assert found["budgets"][0]["rows"][0]["lead"]["seeds"] == 2
    assert any("random, seed 2, failed: the loss became nan" in str(line) for line in tables(found))


def test_latencies_are_those_timed_in_turn():
    parts = [part("fbnet", 0, 0.7, 4.8), part("random", 0, 0.7, 4.9)]
    found = summary(
        parts,
        spaces={},
        failed=[],
        budgets=[{"asked": "x", "limits": []}],
        methods=["fbnet", "random"],
        baselines=BASELINES,
        seeds=1,
    )["budgets"][0]
    assert found["rows"][0]["latency_ms"] == 4.81
    assert found["latency_spread_percent"] == pytest.approx(100 * (4.91 / 4.81 - 1))
    small = summary(
        [*parts, part("repnas", 0, 0.7, 1.2)],
        spaces={"repnas": "repvgg_small"},
        failed=[],
        budgets=[{"asked": "x", "limits": []}],
        methods=["fbnet", "random", "repnas"],
        baselines=BASELINES,
        seeds=1,
    )["budgets"][0]
    assert small["rows"][2]["latency_ms"] < 2
    assert small["latency_spread_percent"] == found["latency_spread_percent"]
    parts = [{**one, "in_turn_ms": []} for one in parts]  # from a table, or not timed
    asked = [{"asked": "x", "limits": []}]
    again = summary(parts, failed=[], budgets=asked, methods=["fbnet"], spaces={}, baselines=(), seeds=1)
    assert again["budgets"][0]["rows"][0]["latency_ms"] == 4.8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scores = {"fbnet": [0.72, 0.74, 0.75], "random": [0.7, 0.72, 0.71], "best_of": [0.73, 0.73, 0.74]}
    made = compared(scores, failed=[{"method": "prunet", "seed": 0, "error": EVIL}])
    (tmp_path / "result.json").write_text(json.dumps(made))
    (tmp_path / "problem.yaml").write_text("task: imagenette\ncommand: [netsmith, compare, --seeds, '3']\n")
    return tmp_path


def test_the_page_holds_the_table_the_verdict_and_how_to_repeat_it(folder):
    assert is_comparison(folder)
    text = write_comparison(folder, folder / "page.html").read_text()
    for part_of_it in ("fbnet does not beat best_of", "73.67 ± 3.79 %", "netsmith compare --seeds 3", "0.982 of limit"):
        assert part_of_it in text
    assert EVIL not in text


def test_the_page_in_a_browser(browser: Any, folder: Path):
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_comparison(folder, folder / "page.html").as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=20_000)
    drawn = '[...document.querySelectorAll(".chart")].filter(chart => chart.querySelector(".subplot path")).length'
    assert page.evaluate(drawn) == 3
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.evil === undefined")
    page.close()
    assert complaints == []
