"""Several methods on one problem: what they share, what each gets, what fails, what is killed and continued."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planted import problem_of, stripes
from test_pipeline import RECIPE, STEPS, Quiet

import netsmith
from netsmith import compare as module
from netsmith import pipeline
from netsmith.cli import main
from netsmith.compare import BASELINES, compare, compared, open_comparison, prepare_comparison
from netsmith.cost.fused import fused_atoms
from netsmith.cost.table import entry_key
from netsmith.effort import counted, effort, peak_memory_bytes, processor_seconds
from netsmith.errors import UserError
from netsmith.methods import best_of
from netsmith.methods.best_of import BestOf
from netsmith.options import CompareOptions
from netsmith.run import Run, load_yaml, read_events
from netsmith.search.problem import prefer
from netsmith.search.sampling import flat
from netsmith.spaces import open_space

SPACE = {"depth": 1}
TINY = {"fbnet": {"finals": {"samples": 1, "epochs": [1]}, "steps": STEPS}, "best_of": {"epochs": 1}}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["netsmith"])


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A device known by a table alone: half a microsecond a layer and one a thousand weights."""
    with torch.device("meta"):
        space = open_space("fbnet_small", resolution=8, channels=1, **SPACE)
        parts = [(atom.module, atom.shape) for atom in fused_atoms(space, (1, 8, 8))]
    rows = {entry_key(part, shape): 5e-4 + 1e-6 * sum(p.numel() for p in part.parameters()) for part, shape in parts}
    file = tmp_path_factory.mktemp("table") / "planted.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("key", "ms"), *rows.items()])
    return file


class NoProcess:
    exitcode = 0

    def join(self) -> None: ...
    def kill(self) -> None: ...


def telling(sentence: str):
    """A process that has ended and said why."""
    told, tell = multiprocessing.Pipe(duplex=False)
    tell.send(("ended", sentence))
    return NoProcess(), told


def here(folder: Path, jobs: int):
    """A run in this process: what a process of its own costs is time to load PyTorch."""
    sentence = ""
    try:
        with Run.open(folder) as run:
            pipeline.search(run, Quiet(), enough=module.MATCHED)
    except UserError as error:
        sentence = str(error)
    return telling(sentence)


def asked(table: Path, **options) -> CompareOptions:
    given = {"space": "fbnet_small", "space_options": SPACE, "recipe": RECIPE, "table": table, "seeds": 1}
    return CompareOptions(**{**given, "methods": "fbnet", "method_options": TINY, **options})


@pytest.fixture(scope="module")
def done(table, tmp_path_factory):
    """One whole comparison: its folder and result."""
    folder = tmp_path_factory.mktemp("compare") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_start", here)
        with prepare_comparison(asked(table, out=folder)) as run:
            return folder, compare(run, Quiet())


def stage(folder: Path, name: str):
    return json.loads((folder / "stages" / f"{name}.json").read_text())["value"]


def test_every_run_is_an_ordinary_one(done):
    folder, result = done
    assert result == json.loads((folder / "result.json").read_text())
    (row,) = result["budgets"]
    assert [r["method"] for r in row["rows"]] == ["fbnet", *BASELINES]
    for name in ("fbnet", *BASELINES):
        assert sum(p.numel() for p in netsmith.load(folder / f"{name}-0").parameters()) > 0
        assert sum(event["kind"] == "gate" for event in read_events(folder / f"{name}-0")) == 1  # test, once
        own = json.loads((folder / f"{name}-0" / "result.json").read_text())
        assert (own["method"], own["seed"], own["baselines"], own["kept"]) == (name, 0, [], True)
    with pytest.raises(UserError, match="no comparison: go on with netsmith search --resume"):
        open_comparison(folder / "fbnet-0")
    assert main(["search", "--resume", str(folder)]) == 2


def test_all_plan_with_one_price_list_and_one_reference(done):
    folder, result = done
    for name in ("fbnet", *BASELINES):
        for shared in pipeline.GROUND:
            assert stage(folder / f"{name}-0", shared) == stage(folder / "shared", shared)
    trained = [event for place in folder.glob("*-0") for event in read_events(place) if event["kind"] == "train_epoch"]
    assert {event["which"] for event in trained} == {"found-0"}  # the reference was trained in `shared`, once
    (budget,) = result["budgets"]
    limits = {json.loads((p / "result.json").read_text())["budgets"][0]["limit"] for p in folder.glob("*-0")}
    assert limits == {budget["limits"][0]["limit"]}


def test_best_of_gets_what_the_dearest_search_took(done):
    folder, result = done
    rows = {row["method"]: row for row in result["budgets"][0]["rows"]}
    with Run.open(folder / "best_of-0") as run:
        given = run.problem["method_options"]
    assert given == {"epochs": 1, "processor_seconds": round(rows["fbnet"]["processor_seconds"], 1)}
    assert rows["best_of"]["processor_seconds"] >= given["processor_seconds"]
    assert rows["best_of"]["trainings"] >= 1
    assert rows["random"]["trainings"] == 0
    assert rows["random"]["processor_seconds"] < rows["fbnet"]["processor_seconds"]
    assert all(row["peak_memory_bytes"] > 5e7 for row in rows.values())


def test_continuing_what_is_complete_changes_nothing(done, monkeypatch):
    folder, result = done
    monkeypatch.setattr(module, "_start", None)
    with open_comparison(folder) as run:
        assert compare(run, Quiet()) == result
    for line in (["report", str(folder), "--out", "page.html"], ["compare", "--resume", str(folder), "--json"]):
        assert main(line) == 0
    assert "fbnet" in Path("page.html").read_text()
    assert (folder / "report.html").is_file()


class Killed(BaseException):
    pass


def scores(result: dict) -> dict:
    rows = result["budgets"][0]["rows"]
    return {r["method"]: [(p["score"], p["params"], p["kept"]) for p in r["points"]] for r in rows}


@pytest.fixture
def torn(done, tmp_path) -> Path:
    """The comparison as a kill leaves it: one run before its training, all after it undone."""
    folder = tmp_path / "torn"
    shutil.copytree(done[0], folder)
    left = ("stages/ship-found-0.json", "checkpoints/train-found-0.pt", "weights.safetensors", "result.json")
    for file in (folder / "result.json", *(folder / "random-0" / name for name in left)):
        file.unlink(missing_ok=True)
    return folder


def test_killed_and_continued_ends_the_same(done, torn, monkeypatch):
    whole, result = done
    begun = []
    monkeypatch.setattr(module, "_start", lambda folder, jobs: begun.append(folder.name) or here(folder, jobs))
    with open_comparison(torn) as run:
        assert scores(compare(run, Quiet())) == scores(result)
    assert begun == ["random-0"]
    one, other = (folder / "random-0" / "weights.safetensors" for folder in (whole, torn))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_that_fails_costs_no_other(torn, monkeypatch, capsys):
    monkeypatch.setattr(module, "_start", lambda folder, jobs: telling("the loss became nan"))
    assert main(["compare", "--resume", str(torn)]) == 2
    said = capsys.readouterr()
    assert "random, seed 0, failed: the loss became nan" in said.out
    assert said.err.endswith(f"netsmith: failed: random-0 (netsmith compare --resume {torn} tries again)\n")
    assert list(scores(json.loads((torn / "result.json").read_text()))) == ["fbnet", "capacity", "best_of"]
    monkeypatch.setattr(module, "_start", here)
    assert main(["compare", "--resume", str(torn)]) == 0
    assert "random" in scores(json.loads((torn / "result.json").read_text()))


@pytest.mark.slow
def test_best_of_runs_again_when_a_search_that_failed_before_has_ended(torn, monkeypatch):
    shutil.rmtree(torn / "fbnet-0")
    failing = lambda folder, jobs: telling("no memory") if folder.name == "fbnet-0" else here(folder, jobs)  # noqa: E731
    monkeypatch.setattr(module, "_start", failing)
    begun = []
    with open_comparison(torn) as run:
        compare(run, Quiet())
    monkeypatch.setattr(module, "_start", lambda folder, jobs: begun.append(folder.name) or here(folder, jobs))
    with open_comparison(torn) as run:
        compare(run, Quiet())
    assert begun == ["fbnet-0", "best_of-0"]
    spent = json.loads((torn / "fbnet-0" / "result.json").read_text())["effort"]["processor_seconds"]
    assert load_yaml((torn / "best_of-0" / "problem.yaml").read_text())["method_options"] == {
        "epochs": 1,
        "processor_seconds": round(spent, 1),
    }


def test_networks_are_found_where_their_run_has_put_them(table, tmp_path):
    options = asked(table, methods="fbnet,repnas", space=None, budget=("latency<=0.3x,0.5x", "params<=1M"))
    with prepare_comparison(replace(options, out=tmp_path / "x")) as run:
        ground = {"reference": {"cost": {"latency": 2.0}}, "profile": {"seconds": 0.0}}
        for name in ("repnas", "random"):
            module._begin(run, ground, name, 0, tmp_path / name)
    found = {name: [place.name for place in module._places(tmp_path / name)] for name in ("repnas", "random")}
    assert found == {
        "repnas": ["latency-600µs_params-1M", "latency-1ms_params-1M"],
        "random": ["latency-0.3x_params-1M", "latency-0.5x_params-1M"],
    }


@pytest.mark.slow
def test_a_budget_that_nothing_keeps_is_said_at_once(table, tmp_path):
    with (
        prepare_comparison(asked(table, out=tmp_path / "x", budget=("latency<=0.0001x",))) as run,
        pytest.raises(UserError, match="the nearest that can be kept"),
    ):
        compare(run, Quiet())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--methods prunt", "unknown method 'prunt'; did you mean 'prunet'?"),
        ("--methods fbnet,random,fbnet", "fbnet is given twice"),
        ("--seeds 0", "seeds is 0; allowed: 1 or more"),
        ("--seed 2", "did you mean '--seeds'?"),
        ("--method fbnet", "did you mean '--methods'?"),
        ("--space prunet_smll", "did you mean 'prunet_small'?"),
        ("--budget latency<=0", "not above zero"),
        ("--config bad.yaml", "unknown method in method_options, 'fbnett'; did you mean 'fbnet'?"),
        ("--config worse.yaml", "method_options.temprature: unknown; did you mean temperature?"),
        ("--config search.yaml", "method: unknown; did you mean methods?"),
        ("--resume nowhere", "nowhere is no run of netsmith"),
        ("--resume nowhere --seeds 2", "--resume takes no other options"),
    ],
)
def test_bad_input_is_one_sentence(line, said, capsys, tmp_path):
    Path("bad.yaml").write_text("methods: fbnet\nmethod_options: {fbnett: {}}\n")
    Path("worse.yaml").write_text("methods: fbnet\nmethod_options: {fbnet: {temprature: 2}}\n")
    Path("search.yaml").write_text("method: fbnet\n")
    assert main(["compare", *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert not (tmp_path / "runs").exists()


def test_search_epochs_are_those_of_the_searches():
    options = CompareOptions(methods="fbnet", search_epochs=4)
    assert module.part(options, "fbnet").search_epochs == 4
    assert [module.part(options, name).search_epochs for name in BASELINES] == [None] * 3


def test_best_of_gets_the_seconds_of_the_dearest_search_with_its_own_seed(table, tmp_path):
    spent = {"fbnet-0": 3.0, "prunet-0": 7.0, "fbnet-1": 9.0, "prunet-1": 4.0, "random-0": 99.0}
    with prepare_comparison(asked(table, out=tmp_path / "x", methods="fbnet,prunet", seeds=2)) as run:
        for name, seconds in spent.items():
            (run.path / name).mkdir()
            (run.path / name / "result.json").write_text(json.dumps({"effort": {"processor_seconds": seconds}}))
        for seed, seconds in ((0, 7.0), (1, 9.0)):
            module._begin(run, {}, "best_of", seed, run.path / f"best_of-{seed}")
            with Run.open(run.path / f"best_of-{seed}") as own:
                assert own.problem["method_options"]["processor_seconds"] == seconds
                assert own.problem["seed"] == seed


def test_a_child_aims_at_the_matched_window(tmp_path, monkeypatch):
    noted, (told, tell) = [], multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(pipeline, "search", lambda run, say, *, enough=None: noted.append(enough))
    monkeypatch.setattr(module, "_die_with", lambda parent: None)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    Run.create(tmp_path / "run", {}).close()
    module._child(tmp_path / "run", tell, 1)
    assert (told.recv(), noted) == (("ended", ""), [module.MATCHED])


def test_all_networks_are_timed_in_turn_in_one_call(tmp_path, monkeypatch):
    calls = []

    def measure(functions, *, seconds):
        calls.append(list(functions))
        return {name: SimpleNamespace(median_ms=float(i)) for i, name in enumerate(functions)}

    monkeypatch.setattr("netsmith.cost.meter.measure", measure)
    monkeypatch.setattr("netsmith.cost.device.load_shipped", lambda *_: None)
    monkeypatch.setattr("netsmith.ship.weights.load", lambda place: None)
    for name in ("fbnet-0", "random-0"):
        Run.create(tmp_path / name, {"budget": ["params<=60k,100k"]}).close()
    job = SimpleNamespace(time=1, device=None, task=SimpleNamespace(input_shape=(1, 8, 8)), say=Quiet())
    ended = [tmp_path / "fbnet-0", tmp_path / "random-0"]
    found = module._in_turn(SimpleNamespace(path=tmp_path), job, ended)
    places = [f"{name}/params-{size}" for name in ("fbnet-0", "random-0") for size in ("60k", "100k")]
    assert calls == [places]
    assert found == dict(zip(places, (0.0, 1.0, 2.0, 3.0), strict=True))


def test_baselines_always_run_and_run_last():
    assert compared(CompareOptions(methods="best_of, prunet,fbnet")) == ["prunet", "fbnet", *BASELINES]


# What it takes --------------------------------------------------------------------------------------------------------


def working_until_killed(run: Run) -> None:
    started = processor_seconds()
    while processor_seconds() < started + 0.1:
        pass
    run.progress("work", 1, 2, "")
    raise Killed


def test_effort_counts_what_a_killed_process_did(tmp_path):
    with Run.create(tmp_path / "run", {}) as run:
        assert effort(run, "x") is None
        with pytest.raises(Killed), counted(run, "x"):
            working_until_killed(run)
        first = effort(run, "x")
        assert first["processor_seconds"] >= 0.09  # a difference of the clock's ticks
        with counted(run, "x"):
            pass
        second = effort(run, "x")
    assert second["processor_seconds"] >= first["processor_seconds"]
    assert second["peak_memory_bytes"] >= first["peak_memory_bytes"] > 0


def test_peak_memory_sees_a_block_that_is_gone():
    before = peak_memory_bytes()
    size = before + 200_000_000  # more than was ever resident
    bytearray(b"x") * size
    assert peak_memory_bytes() >= size


def test_best_of_draws_until_its_seconds_are_spent(tmp_path, monkeypatch):
    clock, trained, drawn = [0.0], [], []

    def training(problem, run, architecture, epochs, stage):
        clock[0] += 2.0
        trained.append(stage)
        drawn.append(architecture)
        return [0.1, 0.3, 0.2, 0.0][len(trained) % 4]  # the first of four is the best

    monkeypatch.setattr(best_of, "short_training", training)
    monkeypatch.setattr(best_of, "processor_seconds", lambda: clock[0])
    problem = problem_of(shares=(0.4, 0.6), task=stripes(64))
    for _ in range(2):  # the second time all is there
        with Run.create(tmp_path / "run", {}) as run:
            found = BestOf(processor_seconds=14.0).search(problem, run)
        assert trained == [f"best_of-{i}-0-{k}" for i in (0, 1) for k in range(4)]  # 7 seconds each
    assert found == [prefer(flat(problem), drawn[4 * i], 1.0) for i in (0, 1)]


# Processes of their own -----------------------------------------------------------------------------------------------


def test_a_run_in_its_own_process_tells_why_it_failed(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0] / "random-0", folder)
    (folder / "result.json").unlink()
    problem = (folder / "problem.yaml").read_text()
    (folder / "problem.yaml").write_text(problem.replace("task: digits", "task: folder:/no/such"))
    process, told = module._start(folder, 1)
    while (heard := told.recv())[0] != "ended":
        pass
    assert "no such folder" in heard[1]
    process.join()


def test_best_of_waits_for_the_searches_of_its_seed_and_for_no_others(table, tmp_path, monkeypatch):
    begun, tells = [], {}

    class Process(NoProcess):
        def __init__(self, name: str) -> None:
            self.name = name

    def start(folder: Path, jobs: int):
        told, tells[folder.name] = multiprocessing.Pipe(duplex=False)
        begun.append(folder.name)
        if folder.name != "fbnet-0":  # which takes until all others that can have ended
            tells[folder.name].send(("ended", "not tried"))
        return Process(folder.name), told

    waited = module.wait

    def waiting(open_):
        if len(open_) == 1 and begun[-1] != "fbnet-0" and "best_of-0" not in begun:
            tells["fbnet-0"].send(("ended", "not tried"))
        return waited(open_)

    monkeypatch.setattr(module, "_start", start)
    monkeypatch.setattr(module, "wait", waiting)
    monkeypatch.setattr(module, "_begin", lambda *_: None)
    with prepare_comparison(asked(table, out=tmp_path / "x", seeds=2, jobs=2)) as run:
        failed = module._search_all(run, Quiet(), {})
    assert begun[-1] == "best_of-0"
    assert begun.index("fbnet-1") < begun.index("best_of-1") < begun.index("best_of-0")
    assert len(failed) == len(begun) == len(set(begun)) == 8


@pytest.mark.slow
def test_a_comparison_whose_process_is_killed_can_be_continued(table, tmp_path):
    options = asked(table, out=tmp_path / "torn", methods="random", method_options={"best_of": {"candidates": 2}})
    prepare_comparison(options).close()
    line = [sys.executable, "-m", "netsmith", "compare", "--resume", str(tmp_path / "torn"), "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "torn" / "capacity-0" / "stages").exists():
            time.sleep(0.2)
        time.sleep(1.0)
        os.kill(process.pid, signal.SIGKILL)
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "leaked" not in ended.stderr
    assert [row["kept"] for row in json.loads(ended.stdout)["budgets"][0]["rows"]] == [1, 1, 1]


def test_a_method_that_cannot_search_the_space_searches_its_own_under_the_same_numbers(table, tmp_path):
    with prepare_comparison(asked(table, out=tmp_path / "x", methods="fbnet,repnas", space=None)) as run:
        assert run.problem["space"] == "fbnet_small"
        assert run.problem["spaces"] == {"repnas": "repvgg_small"}
        ground = {"reference": {"cost": {"latency": 2.0}}, "profile": {"seconds": 0.0}}
        for name in ("repnas", "random"):
            module._begin(run, ground, name, 0, tmp_path / name)
    own, other = (load_yaml((tmp_path / name / "problem.yaml").read_text()) for name in ("repnas", "random"))
    assert (own["space"], own["budget"]) == ("repvgg_small", ["latency<=1ms"])
    assert (other["space"], other["budget"]) == ("fbnet_small", ["latency<=0.5x"])
    assert not (tmp_path / "repnas" / "stages").exists() or not list((tmp_path / "repnas" / "stages").iterdir())
    assert "depth" in other["space_options"]
    assert "depth" not in own["space_options"]
    with pytest.raises(UserError, match="repnas cannot search the space 'fbnet_small'"):
        prepare_comparison(asked(table, out=tmp_path / "y", methods="fbnet,repnas"))
    assert not (tmp_path / "y").exists()


def test_spaces_can_be_given(table, tmp_path):
    options = asked(table, out=tmp_path / "x", methods="fbnet,prunet", spaces={"prunet": "prunet_small"})
    with prepare_comparison(replace(options, method_options={})) as run:
        assert run.problem["spaces"] == {"prunet": "prunet_small"}
    with pytest.raises(UserError, match="unknown method in spaces, 'prunett'"):
        prepare_comparison(asked(table, out=tmp_path / "y", spaces={"prunett": "prunet_small"}))
    with pytest.raises(UserError, match="unknown space 'prunet_smal'"):
        prepare_comparison(asked(table, out=tmp_path / "z", spaces={"fbnet": "prunet_smal"}))
    given = asked(table, out=tmp_path / "w", methods="fbnet,repnas", spaces={"repnas": "repvgg_small"})
    with prepare_comparison(given) as run:  # as a comparison's problem.yaml says it, which names a space too
        assert run.problem["spaces"] == {"repnas": "repvgg_small"}
