"""The page of a training: what it says is what the run holds, alone, beside others, and in a browser."""

from __future__ import annotations

import doctest
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import cost, layers
from test_report_page import EVIL, Reader

from netsmith.cli import main
from netsmith.report import training
from netsmith.report.training import is_training, write_trainings
from netsmith.run import dump_yaml
from netsmith.train.recipe import Recipe

RECIPE = Recipe(
    epochs=4, batch_size=32, optimizer="rmsprop", rmsprop_decay=0.9980471, resolutions=(5, 6), tune_epochs=2
)


def epoch(number: int, loss: float, **more: float) -> dict[str, float]:
    return {"epoch": number, "loss": loss, "learning_rate": 0.1 / number, "seconds": 10.0 + number, **more}


def history(watched: bool = True) -> list[dict[str, float]]:
    """Four epochs, and two of tuning."""
    numbers = [1, 2, 3, 4, 1, 2]
    return [epoch(n, 2.5 - i / 8, **({"accuracy": 0.5 + i / 16} if watched else {})) for i, n in enumerate(numbers)]


def trained(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What `result.json` of a training holds."""
    dice = random.Random(seed)
    drawn = [{**layer, "measured_ms": None} for layer in layers(dice, {f"blocks.{i}": "k3_e3" for i in range(15)})]
    device = {
        "name": "ort-cpu",
        "fingerprint": "ort-cpu:threads=1 | AMD EPYC 7B13",
        "versions": {"onnxruntime": "1.32"},
    }
    return {
        "kept": True,
        "verdict": "kept: 93.7 % through the file, 93.8 % in PyTorch",
        "metric": {"name": "accuracy", "test": 0.9382, "test_exported": 0.9371},
        "budgets": [],
        "cost": cost(4.83, 4_019_782, 388_000_000),
        "parity_max_abs_diff": 3.1e-6,
        "parity_same_class": 0.9975,
        "layers": drawn,
        "device": device,
        "model": "efficientnet_b0",
        "task": "imagenette",
        "recipe": "graphcore_b0_half_resolution",
        "seed": seed,
        "replicas": 2,
        "trained_on": "AMD EPYC 9B45",
        "versions": {"torch": "2.13.0"},
        "history": history(),
        "images_per_second": 153.84,
        "data_share": 0.0417,
        "skipped": [],
        **changes,
    }


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes the folder of a training."""

    def write(name: str = "b0", recipe: Recipe = RECIPE, done: bool = True, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["netsmith", "train", "--model", "efficientnet_b0", "--seed", str(changes.get("seed", 0))]
        problem = {"task": "imagenette", "resolution": 8, "recipe_name": "x", "recipe": asdict(recipe)}
        (folder / "problem.yaml").write_text(dump_yaml({"format": 1, **problem, "command": command}))
        if done:
            (folder / "result.json").write_text(json.dumps(trained(**changes)))
        return folder

    return write


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Reader]:
    return lambda *runs: Reader(write_trainings(list(runs), tmp_path / "out.html").read_text("utf-8"))


def lines(figure: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    return {trace["name"]: (trace["x"], trace["y"]) for trace in figure["data"]}


def title(figure: dict[str, Any]) -> str:
    return figure["layout"]["yaxis"]["title"]["text"]


def test_the_numbers_are_those_of_the_run(make: Make, read: Callable[..., Reader]) -> None:
    words = read(make()).words
    said = ["✓ Passed the gate", "efficientnet_b0 on imagenette: 93.7 % through the file, 93.8 % in PyTorch."]
    said += ["by the recipe graphcore_b0_half_resolution for 4 epochs and 2 of tuning, in 1 min 13 s."]
    said += ["93.71 %", "93.82 % in PyTorch", "4.83 ms", "4.80–4.88 ms", "4.02 M", "388 M", "16.1 MB"]
    said += ["154", "by 2 processes", "4.2 %", "99.75 % of the images", "3.1e-06"]
    said += ["netsmith train --model efficientnet_b0 --seed 0", "AMD EPYC 9B45", "ort-cpu:threads=1 | AMD EPYC 7B13"]
    said += ["torch 2.13.0, onnxruntime 1.32", "recipe_name: x", "MBConv"]
    for part in said:
        assert part in words
    assert "could not be read" not in words


def test_the_curves_are_those_of_the_run(make: Make, read: Callable[..., Reader]) -> None:
    figures = {title(figure): lines(figure) for figure in read(make()).figures}
    assert list(figures) == [
        "loss",
        "accuracy on search (%)",
        "learning rate at the end of the epoch",
        "pixels a side of the training images",
        "seconds an epoch",
    ]
    # The tuning's two epochs, numbered from 1 again, come after the four of the training.
    assert figures["loss"] == {"training": ([1, 2, 3, 4], [2.5, 2.375, 2.25, 2.125]), "tuning": ([5, 6], [2.0, 1.875])}
    assert figures["accuracy on search (%)"]["tuning"][1] == [75.0, 81.25]
    assert figures["pixels a side of the training images"] == {
        "training": ([1, 2, 3, 4], [5, 5, 6, 6]),
        "tuning": ([5, 6], [8, 8]),
    }
    assert figures["seconds an epoch"]["training"][1] == [11.0, 12.0, 13.0, 14.0]


def test_what_was_not_there_is_not_drawn(make: Make, read: Callable[..., Reader]) -> None:
    recipe = replace(RECIPE, resolutions=(), tune_epochs=0)
    page = read(make(recipe=recipe, history=history(watched=False)[:4]))
    assert [title(f) for f in page.figures] == ["loss", "learning rate at the end of the epoch", "seconds an epoch"]
    assert all(list(lines(figure)) == ["training"] for figure in page.figures)
    assert "No accuracy was watched" in page.words
    assert "for 4 epochs, in" in page.words


def options(text: str) -> dict[str, list[str]]:
    """The rows of the recipe: an option, its values and its default."""
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', text)
    return {name: re.findall(r"<td>(?:<b>)?([^<]*)", cells) for name, cells in rows}


def test_the_recipe_names_first_what_differs(make: Make, tmp_path: Path) -> None:
    text = write_trainings([make()], tmp_path / "out.html").read_text()
    changed, usual = map(options, text.split("<details>"))
    assert changed == {
        "epochs": ["4", "30"],
        "batch_size": ["32", "128"],
        "optimizer": ["rmsprop", "sgd"],
        "rmsprop_decay": ["0.998047", "0.9"],
        "resolutions": ["5, 6", "none"],
        "tune_epochs": ["2", "0"],
    }
    assert usual["augmented"] == ["true", "true"]
    assert {*changed, *usual} == {*asdict(Recipe())}
    assert doctest.testmod(training).failed == 0


def test_a_gate_that_was_failed_and_images_that_were_not_read(make: Make, read: Callable[..., Reader]) -> None:
    names = [f"broken-{i}.jpg" for i in range(30)]
    said = "broken: the file's outputs differ from PyTorch's by 2; 10.0 % through the file, 93.8 % in PyTorch"
    words = read(make(kept=False, verdict=said, skipped=names)).words
    assert "✗ Failed at the gate" in words
    assert "on imagenette: the file's outputs differ from PyTorch's by 2" in words
    assert "30 were left out" in words
    assert "broken-19.jpg" in words
    assert "broken-20.jpg" not in words


def test_several_lie_over_each_other(make: Make, read: Callable[..., Reader], tmp_path: Path) -> None:
    faster = replace(RECIPE, learning_rate=0.4)
    runs = make("a"), make("b", faster, seed=1, kept=False, metric={"test": 0.5, "test_exported": 0.51})
    page = read(*runs)
    assert "1 of 2 trainings passed the gate. Failed: b." in page.words
    assert {name: x for name, (x, _) in lines(page.figures[0]).items()} == {name: [1, 2, 3, 4, 5, 6] for name in "ab"}
    assert "51.00 %" in page.words
    assert options((tmp_path / "out.html").read_text())["learning_rate"] == ["0.1", "0.4", "0.1"]
    assert [a["id"] for t, a in page.tags if t == "article"] == ["run-1", "run-2"]


def test_the_verb(make: Make, run_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make("a"), make("b", seed=1), make("stopped", done=False), run_folder("search")
    assert [is_training(Path(name)) for name in ("a", "stopped", "search", "nowhere")] == [True, True, False, False]
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "a/report.html\n"
    assert main(["report", "a", "stopped", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "report.html", "runs": ["a", "b"], "left_out": ["stopped"]}
    assert main(["report", "a", "search", "stopped", "--out", "all.html"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "left out, a training, which has a page of its own: a (netsmith report a)",
        "left out, not finished: stopped (the command that began it goes on with it)",
        "all.html",
    ]
    assert "Promise kept" in Path("all.html").read_text()
    assert main(["report", "stopped"]) == 2
    assert "stopped/result.json does not exist; a report needs" in capsys.readouterr().err


def test_a_page_needs_no_torch(make: Make) -> None:
    code = "import sys; from netsmith.cli import main; main(['report', sys.argv[1]]); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, make()], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("report.html\nFalse\n")


@pytest.mark.parametrize(
    "made",
    [
        {},
        {
            "metric": None,
            "cost": {"latency_ms": None},
            "layers": None,
            "history": [3, {}],
            "skipped": 7,
            "device": "cpu",
        },
        {"history": [{"epoch": 1, "loss": None, "seconds": "long"}], "kept": "yes", "versions": [], "replicas": None},
    ],
)
def test_missing_parts_are_said_in_their_place(make: Make, read: Callable[..., Reader], made: dict[str, Any]) -> None:
    folder = make()
    (folder / "result.json").write_text(json.dumps(made))
    text = (folder / "problem.yaml").read_text()
    for problem in (text, text.replace("momentum:", "momentun:"), "recipe_name: x", "recipe: [", ""):
        (folder / "problem.yaml").write_text(problem)
        words = read(folder).words
        assert "No verdict" in words
        assert "No layers were recorded." in words
    assert "No command was recorded." in words


def test_names_cannot_break_out(make: Make, read: Callable[..., Reader]) -> None:
    folder = make(model=EVIL, verdict=EVIL, skipped=[EVIL], versions={EVIL: EVIL}, trained_on=EVIL)
    (folder / "problem.yaml").write_text(dump_yaml({"recipe_name": EVIL, "recipe": {EVIL: EVIL}, "command": [EVIL]}))
    page = read(folder)
    assert len(page.scripts) == 3
    assert not any(tag == "img" for tag, _ in page.tags)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(browser: Any, make: Make, tmp_path: Path, width: int, scheme: str) -> None:
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_trainings([make("a", skipped=["x.jpg"]), make("b", seed=1)], tmp_path / "page.html").as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=20_000)
    drawn = '[...document.querySelectorAll(".chart")].filter(chart => chart.querySelector(".subplot path")).length'
    assert page.evaluate(drawn) == page.evaluate('document.querySelectorAll(".chart").length') == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert complaints == []
