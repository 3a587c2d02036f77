"""The page as text: what it says, what it survives, what it never does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import DEVICE, events, front, predicted, result

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
        DEVICE,
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


def test_a_network_trained_anew_for_fewer_epochs_shows_these_alone(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    folder = run_folder()
    again = [{"kind": "train_epoch", "which": "found-0", "epoch": epoch, "loss": 0.5} for epoch in (1, 2, 3)]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in again)
    page = read(folder)
    lines = [line for f in page.figures if f["layout"]["yaxis"]["title"]["text"] == "loss" for line in f["data"]]
    assert [0.5, 0.5, 0.5] in [line["y"] for line in lines]


def test_a_damaged_line_of_events_is_one_sentence(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    file = run_folder() / "events.jsonl"
    file.write_bytes(b'{"kind": "gate"}\n\xff\0\n{"kind": "gate"}\n')
    with pytest.raises(UserError, match=re.escape(f"{file} is damaged")):
        read(file.parent)


def write(folder: Path, *events: dict[str, Any]) -> Path:
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_rounds_and_gate_are_those_of_the_network_found(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    page = read(run_folder())
    assert "the gate on found-0" in page.words
    assert "the gate on capacity-0" not in page.words
    assert "the gate on reference" not in page.words
    (chart,) = (f for f in page.figures if f["layout"]["xaxis"]["title"]["text"] == "round")
    drawn = {trace["name"]: trace["y"] for trace in chart["data"]}
    assert drawn == {"limit": [5.0] * 3, "predicted": [4.97, 4.91, 4.86], "measured": [5.34, 5.08, 4.83]}
    assert "5 mslatency 4.97 ms5.34 ms" in " ".join(page.words.split())
    assert "4.94 ms" not in page.words.partition("Keeping the promise")[2].partition("Training")[0]


def epoch(search: str, number: int, **more: Any) -> dict[str, Any]:
    shares = {"probabilities": {"blocks.0": {"k3_e1": 0.1 * number, "skip": 1 - 0.1 * number}}}
    logged = {"train_loss": 1 / number, "expected": {"latency": 4.0}, "target": 5.0, "widths": {"w": [8, 16]}}
    return {"kind": "search_epoch", "search": search, "epoch": number, **shares, **logged, **more}


def pruning() -> list[dict[str, Any]]:
    """What PruNet logs for two budgets: a warm-up they share, then a supernet for each."""
    logged = [epoch("warm-0", number) for number in (1, 2)]
    for search in ("prune-0", "prune-1"):
        logged += [epoch(search, number, search_loss=0.5) for number in (3, 4, 5)]
        logged += [{"kind": "removed", "search": search, "epoch": 4, "path": "blocks.0", "option": "k5_e3"}]
    return logged


def test_every_search_is_drawn(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    page = read(write(run_folder(made=front()), *pruning()))
    for title in ("prune-0 (latency ≤ 3 ms)", "prune-1 (latency ≤ 5 ms)"):
        assert f"How the search made up its mind, {title}" in page.words
    assert "mind, warm-0" not in page.words  # nothing is chosen in a warm-up
    losses = next(f for f in page.figures if f["layout"]["yaxis"]["title"]["text"] == "loss" and "search" in str(f))
    assert {trace["name"]: trace["x"] for trace in losses["data"]} == {
        "warm-0 train": [1, 2],
        "prune-0 train": [3, 4, 5],
        "prune-0 search": [3, 4, 5],
        "prune-1 train": [3, 4, 5],
        "prune-1 search": [3, 4, 5],
    }
    looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in losses["data"]]
    assert len(set(looks)) == len(looks)
    titles = [f["layout"]["yaxis"]["title"]["text"] for f in page.figures]
    assert titles.count("expected latency (ms)") == 2
    removed = [t["x"] for f in page.figures for t in f["data"] if t.get("name") == "option removed"]
    assert removed == [[4], [4]]


def test_the_search_of_a_baseline_is_not_the_methods(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    mine = {"kind": "promise_round", "name": "random-0", "round": 1, "metric": "latency", "limit": 5, "measured": 4}
    rival = mine | {"name": "prunet-0"}
    words = read(write(run_folder(made=result(method="random")), mine, *pruning(), rival)).words
    assert "No probabilities were logged" in words
    assert "No search epochs were logged" in words


def test_rounds_of_every_metric_in_its_own_unit(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    made = result()
    made["budgets"] += [{"metric": "params", "limit": 50_000, "unit": "", "measured": 49_314, "kept": True}]
    made["budgets"] += [{"metric": "peak_memory", "limit": 256_000, "unit": "B", "measured": 2e5, "kept": True}]
    limits = {"latency": (5.0, 4.9), "params": (5e4, 49_314), "peak_memory": (256e3, 2e5)}
    rounds = [
        {"kind": "promise_round", "name": "fbnet-0", "round": 1, "metric": m, "limit": a, "predicted": b, "measured": b}
        for m, (a, b) in limits.items()
    ]
    page = read(write(run_folder(made=made), *rounds))
    charts = [f for f in page.figures if f["layout"]["xaxis"]["title"]["text"] == "round"]
    titles = [chart["layout"]["yaxis"]["title"]["text"] for chart in charts]
    assert titles == ["latency (ms)", "params (k)", "peak memory (kB)"]
    assert [chart["data"][0]["y"] for chart in charts] == [[5.0], [50.0], [256.0]]
    words = " ".join(page.words.split())
    for text in ("5 mslatency 4.90 ms", "50 kparams 49.3 k49.3 k", "256 kBpeak memory 200 kB"):
        assert text in words
    assert "50 s" not in page.words


def test_a_table_predicts_and_the_page_says_so(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    page = read(run_folder(made=predicted(result())))
    pareto = page.figures[0]
    assert pareto["layout"]["xaxis"]["title"]["text"] == "predicted latency (ms)"
    assert sum(len(trace["x"]) for trace in pareto["data"][1:]) == 8
    assert "(predicted)" in pareto["data"][1]["text"][0]
    for text in ("4.76 mspredicted", "is predicted to take 4.76 ms", "4.76 ms predicted, 5 ms allowed"):
        assert text in page.words
    assert "measured at" not in page.words
    rounds = next(f for f in page.figures if f["layout"]["xaxis"]["title"]["text"] == "round")
    assert [trace["name"] for trace in rounds["data"]] == ["limit", "predicted"]


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
        {"kind": "promise_round", "name": "fbnet-0", "limit": {"latency": 5}, "predicted": None, "measured": "slow"},
        {"kind": "promise_round", "name": "fbnet-0", "metric": ["a"], "round": {}, "limit": [5], "measured": 3},
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
    lines += [lines[0] | {"search": EVIL, "train_loss": 1.0, "expected": {"latency": 1.0}}]
    lines += [
        {"kind": "promise_round", "name": f"{EVIL}-{i}", "metric": EVIL, "measured": 1, "round": EVIL} for i in (0, 1)
    ]
    lines += [{"kind": "gate", "which": "found-0", EVIL: EVIL}]
    lines += [{"kind": "train_epoch", "which": EVIL, "epoch": 0, "loss": 1.0}]
    write(folder, *lines)
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


def test_runs_on_different_devices_are_not_compared(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    other = result(1)
    other["device"] = other["device"] | {"fingerprint": "ort-cpu:threads=4 | another"}
    page = read(run_folder("first"), run_folder("second", made=other))
    assert page.words.count("Accuracy against latency") == 2
    assert "ort-cpu:threads=4 | another" in page.words


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
    for slower, said in ((1.01, "does not beat random"), (1.03, "No baseline is both")):  # processes differ by 1.2 %
        made["baselines"][2]["cost"]["latency_ms"] = {"median": slower * made["cost"]["latency_ms"]["median"]}
        assert said in read(run_folder(f"c{slower}", made=made)).words


@pytest.mark.parametrize(
    ("budgets", "cost", "says"),
    [
        (["params"], {"params": 1e6, "latency_ms": {"median": 9}}, "found does not beat random (1 of 5): {}."),
        (["params"], {"params": 2e6, "latency_ms": {"median": 1}}, "No baseline is both {} as what was found."),
        (["params"], {"latency_ms": {"median": 1}}, "No baseline is both {} as what was found."),
        (["file"], {"file_bytes": 1e6}, "found does not beat random (1 of 5): as good and with as small a file."),
        (["latency", "params"], {"params": 1e6, "latency_ms": {"median": 9}}, "No baseline is as good, as fast and w"),
    ],
)
def test_baselines_are_compared_on_what_has_a_budget(
    run_folder: Callable[..., Path], read: Callable[..., Reader], budgets: list[str], cost: dict[str, Any], says: str
) -> None:
    made = result() | {"budgets": [{"metric": metric, "limit": 2e6, "unit": ""} for metric in budgets]}
    made["baselines"] = [b | {"cost": b["cost"] | {"params": 3e6, "file_bytes": 9e6}} for b in made["baselines"]]
    made["baselines"][2] |= {"metric": {"name": "accuracy", "test_exported": 0.95}, "cost": cost}
    assert says.format("as good and with as few parameters") in read(run_folder(made=made)).words


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": \x00}', None])
def test_a_broken_result_is_one_sentence(run_folder: Callable[..., Path], tmp_path: Path, text: str | None) -> None:
    folder = run_folder()
    file = folder / "result.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("place", ["folder", "file/report.html", "full.html"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    run_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = run_folder()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))

    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / place))) as error:
        write_report([folder], tmp_path / place)
    assert ("is a folder" in str(error.value)) == (place == "folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report([], tmp_path / "report.html")


def test_lana_shows_what_each_replacement_harms(run_folder: Callable[..., Path], read: Callable[..., Reader]) -> None:
    made = result(method="lana")
    made["architecture"] |= {"blocks.0": "original", "blocks.1": "k3_e3"}
    page = read(run_folder("lana", made=made))
    assert "What the replacements learnt" in page.words
    assert "No probabilities were logged" not in page.words
    found = {figure["layout"]["yaxis"]["title"]["text"]: figure for figure in page.figures}
    error = found["error of the layers' outputs"]["data"][0]
    assert (error["x"], error["y"]) == ([1, 2, 3], [0.9, 0.6, 0.5])  # of an epoch that was repeated, the last
    logged = next(event for event in events(made) if event["kind"] == "lana_scores")["rows"]
    heat = next(f for f in page.figures if f["data"][0]["type"] == "heatmap")
    names, paths = heat["layout"]["xaxis"]["ticktext"], list(made["architecture"])
    cells = heat["data"][0]["z"]
    for path, option, harm in logged:
        drawn = cells[paths.index(path)][names.index(option)]
        assert drawn is None if path == "blocks.3" and option == "k3_e1" else drawn == pytest.approx(harm)
    assert sum(z is not None for row in cells for z in row) == len(logged) - 1 + len(paths)  # and the originals' 0
    boxes = {(round(box["x0"] + 0.44), round(box["y0"] + 0.44)) for box in heat["layout"]["shapes"]}
    assert {(names.index("original"), 0), (names.index("k3_e3"), 1)} <= boxes
    whole, best = found["loss of the whole network"]["data"]
    assert best["y"] == [min(whole["y"])]
    assert all(y == pytest.approx(0.3 + 0.8 * x) for x, y in zip(whole["x"], whole["y"], strict=True))


def test_a_baseline_that_replaces_is_not_drawn_as_the_search(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    folder = run_folder("fbnet")
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "lana_scores", "rows": [["blocks.0", "skip", 0.5]]}) + "\n")
    page = read(folder)
    assert "What the replacements learnt" not in page.words
    assert "How the search made up its mind" in page.words


def test_the_kernel_of_a_plain_convolution_is_its_own_and_that_of_a_block_is_none(
    run_folder: Callable[..., Path], read: Callable[..., Reader]
) -> None:
    made = result()
    made["layers"][0]["text"] = "Conv2d(3, 8, kernel_size=(7, 7), stride=(2, 2)), BatchNorm2d, ReLU"
    made["layers"][1]["text"] = "BasicBlock( (conv): Conv2d(8, 8, kernel_size=(9, 9)) )"
    words = read(run_folder("plain", made=made)).words
    assert "k7 s2" in words
    assert "k9" not in words
