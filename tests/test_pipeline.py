"""The whole job on the digits: search, promise, training, gate, results; as a front; killed, resumed, repeated."""

import csv
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import netsmith
from netsmith import pipeline
from netsmith.architecture import check, loads
from netsmith.cost.fused import fused_atoms
from netsmith.cost.latency import _widths
from netsmith.cost.table import entry_key
from netsmith.errors import UserError
from netsmith.job import Job
from netsmith.options import SearchOptions
from netsmith.prepare import problem_of
from netsmith.run import Run, read_events
from netsmith.spaces import open_space
from netsmith.tasks.classification import Task

SPACE = {"depth": 2, "expansion": 2}
STEPS = {"epochs": 2, "warmup_epochs": 1, "batch_size": 256}
TINY = {"steps": STEPS, "finals": {"samples": 1, "epochs": [1]}}
RECIPE = {"epochs": 1, "batch_size": 256, "ema": None}


class Quiet:
    def stage(self, name):
        pass

    def line(self, text):
        pass

    def progress(self, name, done, total, note=""):
        pass


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A device known by a table alone: half a microsecond a layer and one a thousand weights."""
    with torch.device("meta"):
        space = open_space("prunet_small", resolution=8, channels=1, **SPACE)
    rows = {}
    for atom in fused_atoms(space, (1, 8, 8)):
        for width in _widths(atom, {atom.width: space.get_submodule(atom.width).options} if atom.width else {}):
            part = atom.module if width is None else atom.at(width)
            rows[entry_key(part, atom.shape)] = 5e-4 + 1e-6 * sum(p.numel() for p in part.parameters())
    file = tmp_path_factory.mktemp("table") / "planted.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["key", "ms"])
        writer.writerows(rows.items())
    return file


def ask(folder: Path, table: Path | None, **options) -> Run:
    given = {"space": "prunet_small", "space_options": SPACE, "recipe": RECIPE, "baselines": (), "table": table}
    return Run.create(folder, problem_of(SearchOptions(**{**given, **options})))


def finish(folder: Path, table: Path, **options) -> dict:
    with ask(folder, table, **options) as run:
        return pipeline.search(run, Quiet())


@pytest.fixture(scope="module")
def splits() -> dict[str, set[str]]:
    """Which splits the final training, the gate and all the rest of the job asked for."""
    return defaultdict(set)


@pytest.fixture(scope="module")
def job(table, tmp_path_factory, splits):
    """One whole job of PruNet beside a baseline: its folder, question and result."""
    folder = tmp_path_factory.mktemp("job") / "run"
    options = {"method": "prunet", "method_options": TINY, "baselines": ("random",), "budget": ("latency<=0.5x",)}
    under_way, split = ["rest"], Task.split

    def noted(name):
        step = getattr(pipeline, name)

        def inner(*args, **options):
            under_way.append(name)
            result = step(*args, **options)
            under_way.pop()
            return result

        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train", noted("train"))
        patch.setattr(pipeline, "gate", noted("gate"))
        patch.setattr(Task, "split", lambda task, name: splits[under_way[-1]].add(name) or split(task, name))
        return folder, options, finish(folder, table, **options)


def has(data: dict, keys: dict) -> None:
    for key, inner in keys.items():
        assert key in data
        if inner:
            has(data[key], inner)


COST = dict.fromkeys(("params", "macs", "peak_memory_bytes", "file_bytes")) | {
    "latency_ms": dict.fromkeys(("predicted", "median", "ci95"))
}
NETWORK = {"metric": dict.fromkeys(("name", "test", "test_exported")), "cost": COST, "parity_max_abs_diff": None}
SHARED = dict.fromkeys(("method", "space", "task", "seed")) | {
    "reference": {"metric": None, "cost": COST},
    "seconds": dict.fromkeys(("profile", "search", "train", "ship")),
}


def test_the_result_says_everything(job):
    folder, _, result = job
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    has(result, SHARED | NETWORK)
    assert (result["method"], result["space"], result["task"], result["seed"]) == (
        "prunet",
        "prunet_small",
        "digits",
        0,
    )
    (budget,) = result["budgets"]
    assert {"metric", "limit", "unit", "measured", "kept"} <= set(budget)
    assert result["kept"] is budget["kept"] is True
    # A table predicts and measures nothing.
    assert budget["measured"] is result["cost"]["latency_ms"]["median"] is None
    assert 0.9 * budget["limit"] < result["cost"]["latency_ms"]["predicted"] <= budget["limit"]
    assert budget["limit"] == pytest.approx(0.5 * result["reference"]["cost"]["latency_ms"]["predicted"])
    assert result["metric"]["test"] == result["metric"]["test_exported"]
    assert result["parity_max_abs_diff"] < 1e-4
    (baseline,) = result["baselines"]
    assert baseline["name"] == "random"
    has(baseline, {"metric": None, "cost": COST})
    assert all(value >= 0 for value in result["seconds"].values())


def test_what_was_found_loads_as_a_plain_network(job):
    folder, _, result = job
    network = netsmith.load(folder)
    architecture = loads((folder / "architecture.json").read_text())
    assert architecture == result["architecture"]
    check(open_space("prunet_small", resolution=8, channels=1, **SPACE), architecture)
    assert sum(p.numel() for p in network.parameters()) == result["cost"]["params"]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert (folder / "model.onnx").stat().st_size == result["cost"]["file_bytes"]


def test_each_network_is_judged_once_and_after_the_search(job):
    folder, _, _ = job
    kinds = [event["kind"] for event in read_events(folder)]
    assert kinds.count("gate") == 3  # reference, found, random: each touches the test split once
    assert kinds.index("search_epoch") < kinds.index("promise_round") < kinds.index("gate")


@pytest.mark.parametrize("device", ["torch-cpu", "ort-cpu"])
def test_what_is_timed_is_what_the_device_runs(device, tmp_path):
    """The exported file, or the network that it was made from where no file can be run."""
    options = {"device": device, "space_options": {**SPACE, "step": 8}}
    network, file = torch.nn.Flatten(), tmp_path / "absent.onnx"
    with ask(tmp_path / "run", None, **options) as run:
        time = Job(run, Quiet()).time
        if device == "torch-cpu":
            assert 0 < time(network, file) < 10
        else:
            with pytest.raises(UserError, match="no such file"):
                time(network, file)


def test_every_part_of_the_job_sees_its_own_images(job, splits):
    assert splits == {"rest": {"train", "search"}, "train": {"trainval"}, "gate": {"test"}}


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_resuming_what_is_complete_does_nothing(job, table, monkeypatch):
    folder, options, result = job
    before = content(folder)
    for name in ("train", "export", "gate", "keep"):
        monkeypatch.setattr(pipeline, name, None)
    monkeypatch.setattr("netsmith.job.export_untrained", None)
    assert finish(folder, table, **options) == json.loads(json.dumps(result))
    assert content(folder) == before


class Killed(BaseException):
    pass


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("search_epoch", "promise_round", "gate")]


@pytest.mark.parametrize("kind", ["train_epoch", *SLOW])
def test_killed_and_resumed_ships_the_same_bits(kind, job, table, tmp_path, monkeypatch):
    folder, options, result = job
    event = Run.event

    def dying(self, what, **data):
        if what == kind:
            raise Killed
        event(self, what, **data)

    monkeypatch.setattr(Run, "event", dying)
    with pytest.raises(Killed):
        finish(tmp_path / "run", table, **options)
    monkeypatch.setattr(Run, "event", event)
    resumed = finish(tmp_path / "run", table, **options)
    for key in ("architecture", "cost", "metric", "budgets", "parity_max_abs_diff"):
        assert resumed[key] == result[key]
    for file in ("weights.safetensors", "architecture.json"):
        assert (tmp_path / "run" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.slow
def test_a_front_has_a_folder_a_budget(table, tmp_path):
    result = finish(tmp_path / "run", table, method="random", budget=("latency<=0.4x,0.7x",))
    has(result, SHARED | {"front": None, "kept": None})
    assert result["kept"]
    small, large = result["front"]
    for point, name in ((small, "latency-0.4x"), (large, "latency-0.7x")):
        has(point, NETWORK | {"budgets": None})
        folder = tmp_path / "run" / name
        network = netsmith.load(folder)
        assert sum(p.numel() for p in network.parameters()) == point["cost"]["params"]
        written = json.loads((folder / "result.json").read_text())
        assert {key: written[key] for key in point} == point
    assert small["cost"]["latency_ms"]["predicted"] < large["cost"]["latency_ms"]["predicted"]
    again = finish(tmp_path / "run", table, method="random", budget=("latency<=0.4x,0.7x",))
    assert again == json.loads(json.dumps(result))


def test_a_budget_below_the_smallest_network_is_said_before_anything_is_trained(table, tmp_path):
    with pytest.raises(UserError, match=r"the smallest network needs .*; the nearest that can be kept: ") as error:
        finish(tmp_path / "run", table, method="prunet", budget=("latency<=0.001x",))
    assert not any(event["kind"] in ("search_epoch", "raced") for event in read_events(tmp_path / "run"))
    near = str(error.value).rpartition("can be kept: ")[2]
    assert near.startswith("latency<=0.")
    with ask(tmp_path / "again", table, method="random", budget=(near,)) as run:
        job = Job(run, Quiet())
        pipeline.check_feasible(job, job.problem)  # does not raise


@pytest.mark.parametrize("method", ["random", pytest.param("prunet", marks=pytest.mark.slow)])
def test_peak_memory_alone_is_a_budget(method, table, tmp_path):
    steps = {"fbnet": TINY, "prunet": TINY}
    options = {"method": method, "method_options": steps.get(method, {}), "budget": ("peak_memory<=0.8x",)}
    result = finish(tmp_path / "run", table, **options)
    (budget,) = result["budgets"]
    assert budget["metric"] == "peak_memory"
    assert 0 < budget["measured"] <= budget["limit"] < result["reference"]["cost"]["peak_memory_bytes"]
    assert result["kept"]


@pytest.mark.slow
def test_the_reference_is_trained_only_where_something_is_relative_to_it(table, tmp_path):
    budget = ("params<=100k", "latency<=1ms")
    result = finish(tmp_path / "run", table, method="random", budget=budget)
    has(result["reference"], {"metric": None, "cost": COST})
    assert result["reference"]["metric"]["test"] is None
    assert result["cost"]["params"] <= 100_000 < result["reference"]["cost"]["params"]
    trained = {event["which"] for event in read_events(tmp_path / "run") if event["kind"] == "train_epoch"}
    assert trained == {"found-0"}


@pytest.mark.slow
def test_the_reference_teaches_where_the_recipe_distils(table, tmp_path, monkeypatch):
    taught = {}

    def noted(network, *args, teacher=None, **options):
        taught[sum(p.numel() for p in network.parameters())] = teacher
        return train(network, *args, teacher=teacher, **options)

    train = pipeline.train
    monkeypatch.setattr(pipeline, "train", noted)
    options = {"method": "capacity", "recipe": RECIPE | {"distillation": 0.5}, "budget": ("latency<=0.5x",)}
    result = finish(tmp_path / "run", table, **options)
    small, large = result["cost"]["params"], result["reference"]["cost"]["params"]
    assert taught[large] is None
    assert sum(p.numel() for p in taught[small].parameters()) == large


@pytest.mark.slow
def test_the_reference_teaches_under_an_absolute_budget_too(table, tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(pipeline, "train", lambda *_, teacher, **__: taught.append(teacher is not None))
    options = {"recipe": RECIPE | {"distillation": 0.5}, "budget": ("params<=100k",)}
    finish(tmp_path / "run", table, method="capacity", **options)
    assert taught == [False, True]


def test_a_front_is_kept_as_a_whole_and_a_point_ships_under_its_own_budget(table, tmp_path, monkeypatch):
    judge, kept, seen = pipeline.gate, iter((True, False, True)), []

    def gate(network, file, task, device, budgets, *args, **options):
        seen.append(budgets[0].limit)
        return replace(judge(network, file, task, device, budgets, *args, **options), kept=next(kept))

    monkeypatch.setattr(pipeline, "train", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "gate", gate)
    result = finish(tmp_path / "run", table, method="random", budget=("params<=60k,100k",))
    assert result["kept"] is False
    pipeline.ship(tmp_path / "run" / "params-100k", Quiet())
    assert seen == [60e3, 100e3, 100e3]


def test_a_run_whose_images_have_changed_is_refused(tmp_path):
    with (
        Run.create(tmp_path / "run", {"task": "digits", "images": "others"}) as run,
        pytest.raises(UserError, match=r"has other images than when .* was started"),
    ):
        Job(run, Quiet()).task  # noqa: B018
