"""Options from YAML, strictly; methods by name; and what a run's problem.yaml says of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from netsmith.errors import UserError
from netsmith.methods import METHODS, make_method
from netsmith.options import SearchOptions, checked, read_config
from netsmith.prepare import check, default_space, next_folder, open_run, prepare
from netsmith.run import dump_yaml
from netsmith.train.recipe import Recipe


def written(folder: Path, text: str) -> Path:
    file = folder / "options.yaml"
    file.write_text(text)
    return file


def test_a_file_is_the_options(tmp_path):
    text = "task: cifar10\ndata: /x\nbudget: [latency<=1ms]\nbaselines: []\nrecipe: {learning_rate: 1e-3, ema: 0.9}\n"
    options = read_config(written(tmp_path, text))
    assert options == SearchOptions(
        task="cifar10",
        data=Path("/x"),
        budget=("latency<=1ms",),
        baselines=(),
        recipe={"learning_rate": 1e-3, "ema": 0.9},
    )
    assert checked(Recipe, options.recipe, "recipe").learning_rate == 1e-3
    assert read_config(written(tmp_path, "")) == SearchOptions()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methd: prunet", "methd: unknown; did you mean method?"),
        ("seed: '3'", "seed: '3' was given; it should be a valid integer"),
        ("seed: 1.5", "seed: 1.5 was given"),
        ("seed: true", "seed: True was given"),
        ("budget: latency<=1ms", "budget: 'latency<=1ms' was given; it should be a list"),
        ("recipe: 3", "recipe: 3 was given; it should be a mapping"),
        ("- task", "options are a mapping"),
        ("task: [", "is no YAML that can be read: see line"),
        ("task: digits\ntask: cifar10", "see line 2 (task is given twice)"),
    ],
)
def test_a_wrong_file_says_where(tmp_path, text, said):
    with pytest.raises(UserError, match=r"options\.yaml") as error:
        read_config(written(tmp_path, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "no.yaml")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_by_name(name):
    assert hasattr(make_method(name), "search")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"finals": {"sampels": 1}}, "method_options.finals.sampels: unknown; did you mean samples?"),
        ({"steps": {"epoch": 1}}, "method_options.steps.epoch: unknown; did you mean epochs?"),
        ({"steps": {"epochs": "1"}}, "method_options.steps.epochs: '1' was given"),
        ({"cost": {"form": "powr"}}, "method_options.cost.form: 'powr' was given; it should be 'relative' or 'power'"),
        ({"finals": {"epochs": [1, "x"]}}, "method_options.finals.epochs.1: 'x' was given"),
    ],
)
def test_method_options_are_strict(options, said):
    with pytest.raises(UserError) as error:
        make_method("fbnet", options)
    assert said in str(error.value)


def test_method_options_become_what_the_fields_are():
    made = make_method("fbnet", {"finals": {"epochs": [1, 3]}, "steps": {"epochs": 7}, "temperature": 1})
    assert (made.finals.epochs, made.steps.epochs, made.temperature) == ((1, 3), 7, 1.0)


def test_a_part_of_nested_options_leaves_the_rest_as_the_method_has_it():
    given = make_method("prunet", {"finals": {"samples": 2}, "cost": {"form": "power"}})
    default = make_method("prunet")
    assert given.finals == replace(default.finals, samples=2)
    assert given.cost == replace(default.cost, form="power")
    assert default.cost.weight != make_method("fbnet").cost.weight  # so there was something to lose


def test_an_unknown_method():
    with pytest.raises(UserError, match="did you mean 'fbnet'"):
        make_method("fbnett")


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("best_of", {"candidates": 0}, "candidates: 0 was given; it should be greater than 0"),
        ("prunet", {"finals": {"epochs": []}}, "finals.epochs: [] was given; it"),
        ("prunet", {"check_every": 0}, "check_every: 0 was given"),
        ("prunet", {"headroom": -1}, "headroom: -1 was given; it should be greater than or equal to 0"),
        ("prunet", {"layer_start": 1.0}, "layer_start: 1.0 was given; it should be less than 1"),
        ("prunet", {"settled": 0.0}, "settled: 0.0 was given"),
        ("fbnet", {"temperature": 0}, "temperature: 0 was given"),
        ("fbnet", {"steps": {"architecture_rate": -1}}, "steps.architecture_rate: -1 was given"),
        ("fbnet", {"steps": {"batch_size": 0}}, "steps.batch_size: 0 was given"),
        ("prunet", {"steps": {"epochs": 3, "warmup_epochs": 3}}, "steps.warmup_epochs is 3; allowed: less than the 3"),
    ],
)
def test_method_options_out_of_range_are_named_before_anything_runs(method, options, said):
    with pytest.raises(UserError) as error:
        make_method(method, options)
    assert said in str(error.value)


def test_a_value_out_of_range_is_named():
    with pytest.raises(UserError, match=r"recipe\.batch_size is 0; allowed: 1 or more"):
        checked(Recipe, {"batch_size": 0}, "recipe")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "prunett"}, "unknown method 'prunett'; did you mean 'prunet'?"),
        ({"baselines": ("rand",)}, "unknown method 'rand'; did you mean 'random'?"),
        ({"space": "prunet_smal"}, "did you mean 'prunet_small'?"),
        ({"task": "digit"}, "did you mean 'digits'?"),
        ({"device": "ort-gpu"}, "did you mean 'ort-cpu'?"),
        ({"budget": ("latency<=5parsec",)}, "no unit 'parsec'"),
        ({"budget": ()}, "no budget"),
        ({"table": Path("/no.csv")}, "/no.csv does not exist"),
        ({"epochs": 0}, "epochs is 0"),
        ({"data": Path("/x")}, "the digits come with scikit-learn"),
        ({"table_part": "gpu"}, "--table-part gpu was given without --table"),
    ],
)
def test_checked_before_anything_is_loaded(change, said):
    with pytest.raises(UserError) as error:
        check(SearchOptions(**change))
    assert said in str(error.value)


def test_the_space_suits_the_images():
    assert [default_space("prunet", side) for side in (8, 64, 96, 224)] == ["prunet_small"] * 2 + ["fbnet", "prunet"]
    assert [default_space("fbnet", side) for side in (32, 224)] == ["fbnet_small", "fbnet"]


def test_a_run_says_everything_and_can_be_asked_again(tmp_path):
    options = SearchOptions(
        epochs=2, search_epochs=8, recipe={"ema": None}, method_options={"steps": {"momentum": 0.5}}
    )
    with prepare(options, tmp_path / "a", command=["netsmith", "search"]) as run:
        problem = run.problem
    assert problem["space"] == "prunet_small"
    step = problem["space_options"]["step"]  # the device's staircase
    assert step in (4, 8, 16, 32)
    assert problem["space_options"] == {"classes": 10, "channels": 1, "resolution": 8, "step": step}
    assert problem["method_options"]["steps"] == {"warmup_epochs": 2, "momentum": 0.5, "epochs": 8}
    assert (problem["recipe"]["epochs"], problem["recipe"]["ema"], problem["recipe"]["batch_size"]) == (2, None, 64)
    Recipe(**problem["recipe"])

    again = read_config(tmp_path / "a" / "problem.yaml")
    with prepare(again, tmp_path / "b") as run:
        assert run.problem == {key: value for key, value in problem.items() if key != "command"}
    with prepare(options, tmp_path / "a", command=["netsmith", "search", "--json"]):
        pass  # the same question in other words continues its run


def test_the_task_decides_the_shape_of_the_space(tmp_path):
    options = SearchOptions(space_options={"resolution": 32, "classes": 7, "depth": 2})
    with prepare(options, tmp_path / "a") as run:
        made = run.problem["space_options"]
    assert (made["resolution"], made["classes"], made["channels"], made["depth"]) == (8, 10, 1, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": None}, "method: None was given"),
        ({"budgets": ["params<=1k"]}, "budgets: unknown; did you mean budget?"),
        ({"recipe": {"speed": 3}}, "recipe.speed: unknown"),
        ({"method_options": {"starts": -1}}, "method_options.starts: -1 was given"),
    ],
)
def test_a_run_in_another_versions_words_is_named(tmp_path, change, said):
    with prepare(SearchOptions(), tmp_path / "a") as run:
        asked = run.problem
    (tmp_path / "a" / "problem.yaml").write_text(dump_yaml({"format": 1, **asked, **change}))
    with pytest.raises(UserError, match=r"problem\.yaml is not of this version of netsmith") as error:
        open_run(tmp_path / "a")
    assert said in str(error.value)
    (tmp_path / "a" / "problem.yaml").write_text("format: 1\n")
    with pytest.raises(UserError, match="it lacks task"):
        open_run(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space_options": {"dept": 1}}, "unknown option of space 'prunet_small': 'dept'; did you mean 'depth'?"),
        ({"space": "fbnet"}, "needs 64 px; given: 8 px"),
        ({"space_options": {"depth": "3"}}, "space_options.depth is '3'; it should be a valid integer"),
        ({"space_options": {"depth": -1}}, "space_options.depth is -1; it should be greater than 0"),
        ({"space_options": {"step": 0.5}}, "space_options.step is 0.5"),
        ({"budget": ("branches<=44",)}, "budget on branches was given, but the space 'prunet_small' has none"),
        ({"recipe": {"epoch": 1}}, "recipe.epoch: unknown; did you mean epochs?"),
        ({"method": "random", "search_epochs": 3}, "random trains nothing to search"),
        ({"task": "folder:/no/such"}, "no such folder"),
        ({"task": "cifar100", "data": Path("/no/such")}, "/no/such does not exist"),
    ],
)
def test_a_wrong_question_leaves_no_folder(tmp_path, change, said):
    with pytest.raises(UserError) as error:
        prepare(SearchOptions(**change), tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):  # the first is taken as soon as it is named
        assert next_folder("digits", "prunet") == Path(f"runs/digits-prunet-{number}")
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    assert next_folder("folder:.", "prunet") == Path("runs/cats-prunet-1")
    assert next_folder("folder:/data/cats", "fbnet") == Path("runs/cats-fbnet-1")
