"""The page as text: what it says, what it survives, what it never does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import events, front, result

from netsmith.errors import UserError
from netsmith.report.page import write_report

EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2">'


class Reader(HTMLParser):
    """The page's tags, its visible words, and its scripts apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.style = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "style":
            self.style += data
        else:
            self.words += data

    @property
    def figures(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Reader]:
    """Write the report of the run folders and read it back."""
    return lambda *runs: Reader(write_report(list(runs), tmp_path / "out" / "report.html").read_text("utf-8"))


def test_it_returns_the_file_and_leaves_nothing_else(run_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write_report([run_folder()], out) == out
    assert list(out.parent.iterdir()) == [out]


def test_nothing_is_loaded_and_plotly_is_there_once(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    page = read(run_folder("a"), run_folder("b", seed=1))
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert tag != "a" or str(attributes["href"]).startswith("#")
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert len(page.scripts) == 3
    assert sum("plotly.js v" in script for script in page.scripts) == 1
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy).startswith("default-src 'none'")


def test_it_says_what_was_kept_and_what_broke(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    assert "✓ Promise kept" in read(run_folder("kept")).words
    broken = read(run_folder("broken", kept=False)).words
    assert "✗ Promise broken" in broken
    assert "above the budget of 5 ms" in broken


def test_the_parts_stand_in_order(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    words = read(run_folder()).words
    order = [
        "Promise kept",
        "reference",
        "Accuracy against latency",
        "made up its mind",
        "Widths",
        "Loss, and expected",
    ]
    order += ["Latency per layer", "The network", "Keeping the promise", "Training", "The gate", "needed to repeat it"]
    places = [words.index(part) for part in order]
    assert places == sorted(places)
    for fact in (
        "sha256:9f31c2d4aa07",
        "torch 2.13.0+cpu",
        "'latency<=5ms'",
        "temperature: 5.0",
        "1 h 26 min",
        "3.1e-06",
    ):
        assert fact in words


def test_figures_are_json_that_a_browser_reads(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    folder = run_folder()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"kind": "train_epoch", "which": "found", "epoch": 60, "loss": NaN, "accuracy": Infinity}\n')
    page = read(folder)
    assert "NaN" not in page.scripts[0]
    assert "Infinity" not in page.scripts[0]
    alts = [a["aria-label"] for t, a in page.tags if t == "div" and "chart" in str(a.get("class"))]
    assert len(alts) == len(page.figures) == 9
    assert all(alts)


def test_probabilities_per_epoch_behind_the_slider(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    made = result()
    page = read(run_folder(made=made))
    figure = next(f for f in page.figures if f["steps"])
    logged = [e for e in events(made) if e["kind"] == "search_epoch"]
    assert [step["label"] for step in figure["steps"]] == [f"epoch {e['epoch']}" for e in logged]
    names = figure["layout"]["xaxis"]["ticktext"]
    for step, event in zip(figure["steps"], logged, strict=True):
        shares = event["probabilities"]["blocks.3"]
        assert step["z"][3] == [pytest.approx(shares[n], abs=6e-4) if n in shares else None for n in names]
    assert figure["data"][0]["z"] == figure["steps"][-1]["z"]


def test_a_run_that_was_continued_counts_each_epoch_once(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    folder = run_folder()
    lines = (folder / "events.jsonl").read_text().splitlines()
    again = [line for line in lines if json.loads(line).get("epoch") in (3, 4)]
    (folder / "events.jsonl").write_text("\n".join([*lines, *again, '{"kind": "search_ep']))
    page = read(folder)
    losses = next(f for f in page.figures if f["layout"]["yaxis"]["title"]["text"] == "loss")
    assert losses["data"][0]["x"] == list(range(30))
    assert "1 line of events.jsonl could not be read" in page.words


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"method": "random", "metric": None, "cost": {"latency_ms": None}, "layers": None, "baselines": [3, {}]},
        {"metric": 3, "cost": [], "budgets": {}, "front": []},
        {"layers": [{"text": 5, "output": [1, 2]}, {}], "reference": {}, "device": "cpu", "seconds": {"search": None}},
        {"front": [{}, 7], "kept": "yes", "architecture": [], "parity_max_abs_diff": "small"},
    ],
)
def test_missing_parts_are_said_in_their_place(
    run_folder: Callable[..., Path], read: Callable[..., Reader], made: dict[str, Any]
) -> None:
    folder = run_folder(made=made or {"seed": None})
    for name in ("events.jsonl", "problem.yaml"):
        (folder / name).unlink()
    words = read(folder).words
    for part in (
        "No probabilities were logged",
        "No training epochs",
        "No round of the promise loop",
        "problem.yaml is",
    ):
        assert part in words


def test_odd_events_do_not_break_the_page(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    folder = run_folder()
    odd = [
        {"kind": "search_epoch"},
        {"kind": "search_epoch", "epoch": 1, "probabilities": {"a": 3, "b": {"x": "high"}}, "widths": {"w": [4]}},
        {"kind": "search_epoch", "epoch": 2, "expected": 4, "target": {"latency": 2}, "widths": {"w": [None, 8]}},
        {"kind": "removed", "path": ["a"], "epoch": None},
        {"kind": "promise_round", "round": 1, "limit": {"latency": 5}, "predicted": None, "measured": "slow"},
        {"kind": "train_epoch", "epoch": "last"},
        {"kind": ["list"]},
    ]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, odd)) + "\n[1]\n")
    assert "Promise kept" in read(folder).words


def test_names_cannot_break_out(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    made = result()
    made |= {"method": EVIL, "space": EVIL, "verdict": EVIL}
    made["device"] |= {"name": EVIL, "versions": {EVIL: EVIL}}
    made["baselines"][0]["name"] = EVIL
    made["layers"][0] |= {"name": EVIL, "text": EVIL}
    folder = run_folder(made=made)
    lines = [{"kind": "search_epoch", "epoch": 0, "probabilities": {EVIL: {EVIL: 1.0}}, "widths": {EVIL: [8, 8]}}]
    lines += [{"kind": "gate", EVIL: EVIL}, {"kind": "train_epoch", "which": EVIL, "epoch": 0, "loss": 1.0}]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "problem.yaml").write_text(f"command: '{EVIL}'\n")
    page = read(folder)
    assert len(page.scripts) == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "<img" not in json.dumps(page.figures)  # plotly reads a little HTML: names reach it escaped
    assert EVIL in page.words


def test_several_runs_share_one_table_and_one_chart(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    page = read(run_folder("first"), run_folder("second", seed=1, kept=False))
    assert "1 of 2 runs keep what they promised. Broken: second." in page.words
    assert page.words.count("Accuracy against latency") == 1
    heads = [a for t, a in page.tags if t == "tr" and a.get("class")]
    assert [a["class"] for a in heads] == ["reference", "found", "found", "found", "baseline", "baseline"]
    assert "mean of 2" in page.words  # over the seeds of the same search
    assert [a["id"] for t, a in page.tags if t == "article"] == ["run-1", "run-2"]


def test_runs_of_different_tasks_are_not_compared(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    other = result(1) | {"task": "div2k", "metric": {"name": "psnr", "test": 33.12}}
    words = read(run_folder("first"), run_folder("second", made=other)).words
    assert "Accuracy against latency" in words
    assert "Psnr against latency" in words


def test_a_front_shows_every_network(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    page = read(run_folder(made=front()))
    for limit in ("3", "5", "7"):
        assert f"found, latency ≤ {limit} ms" in page.words
        assert f"The network, latency ≤ {limit} ms" in page.words


def test_a_search_that_chance_equals_says_so(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    made = result()
    made["baselines"][2] |= {"metric": {"name": "accuracy", "test_exported": 0.95}}
    made["baselines"][2]["cost"]["latency_ms"] = {"median": 4.8}
    assert "found does not beat random (1 of 5): as good and as fast." in read(run_folder("a", made=made)).words
    assert "No baseline is both as good and as fast as what was found." in read(run_folder("b")).words


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": \x00}', None])
def test_a_broken_result_is_one_sentence(run_folder: Callable[..., Path], tmp_path: Path, text: str | None) -> None:
    folder = run_folder()
    file = folder / "result.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report([], tmp_path / "report.html")
