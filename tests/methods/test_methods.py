"""What every method promises: legal networks within every budget, repeatable, resumable, blind to the test split."""

import copy
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import torch
from planted import (
    BRANCHED,
    BRIEF,
    NARROWING,
    QUANTISING,
    REPLACING,
    Outcome,
    new_run,
    one_breaks_in_int8,
    one_is_misled_in_int8,
    one_works,
    problem_of,
    search,
    search_one_budget,
    some_branches_work,
    some_channels_work,
    some_copies_work,
    stripes,
    toy_for,
)

from netsmith import run as run_module
from netsmith.architecture import check, dumps
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Prices
from netsmith.decisions import decisions
from netsmith.methods import METHODS, haq, lana
from netsmith.run import Run, read_events
from netsmith.search import differentiable, masked
from netsmith.search.problem import Problem
from netsmith.search.sampling import at_budget
from netsmith.tasks.classification import TestSplitTouched
from netsmith.train.loop import evaluate, train

EVERY = pytest.mark.parametrize("method", METHODS)
VARIANTS = [name for name in planted.OPTIONS if "+" in name]
LEARNING = [method for method in METHODS if method not in ("random", "capacity")]
"""Methods that look at the data while they search."""
TRAINING = pytest.mark.parametrize("method", [*LEARNING, *VARIANTS])
LIKE_FBNET = ("proxylessnas", "darts", "rarts")
"""Whose search begins, goes on and ends as FBNet's does."""
KILLED = [
    pytest.param(method, marks=[pytest.mark.slow] if method in (*VARIANTS, *LIKE_FBNET) else [])
    for method in (*LEARNING, *VARIANTS)
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a method's search for a front of two, made once."""
    found: dict[str, Outcome] = {}

    def outcome(method: str) -> Outcome:
        if method not in found:
            found[method] = search(method, tmp_path_factory.mktemp(method) / "run")
        return found[method]

    return outcome


@EVERY
def test_legal_networks_within_every_budget(method, undisturbed):
    problem, outcome = toy_for(method), undisturbed(method)
    assert len(outcome.architectures) == len(problem.budgets) == 2
    for architecture, (budget,) in zip(outcome.architectures, problem.budgets, strict=True):
        check(problem.outline, architecture)
        assert problem.predicted(budget, architecture) <= budget.limit
        assert problem.network(architecture)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    for values in outcome.values:
        assert {path: set(row) for path, row in values.items()} == {
            path: set(row) for path, row in problem.latency.options.items()
        }


@EVERY
def test_without_a_budget_any_network_will_do(method, tmp_path):
    problem = toy_for(method, [])
    problem.budgets = [[]]
    (architecture,) = search(method, tmp_path / "run", problem=problem).architectures
    check(problem.outline, architecture)


@EVERY
def test_same_seed_same_result_whatever_the_global_generator(method, undisturbed, tmp_path):
    torch.manual_seed(12345)
    assert search(method, tmp_path / "again").same(undisturbed(method))


@EVERY
def test_another_seed_is_another_valid_search(method, undisturbed, tmp_path):
    problem = toy_for(method, task=stripes(64))
    other = search(method, tmp_path / "other", seed=1, problem=problem)
    for architecture, (budget,) in zip(other.architectures, problem.budgets, strict=True):
        check(problem.outline, architecture)
        assert problem.predicted(budget, architecture) <= budget.limit
    if method != "capacity":  # which knows nothing random
        assert other.values != undisturbed(method).values


@EVERY
def test_what_comes_in_stays_as_it_was(method, tmp_path):
    problem = toy_for(method, (0.5,), task=stripes(64))
    latency, budgets = copy.deepcopy(problem.latency), copy.deepcopy(problem.budgets)
    splits = {name: (split.source.clone(), split.labels.clone()) for name, split in problem.task.splits.items()}
    weights = problem.build().state_dict()
    search(method, tmp_path / "run", problem=problem)
    assert problem.latency == latency
    assert problem.budgets == budgets
    for name, (source, labels) in splits.items():
        assert torch.equal(problem.task.splits[name].source, source)
        assert torch.equal(problem.task.splits[name].labels, labels)
    exactly = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}  # ranges that no data has shown are NaN
    torch.testing.assert_close(problem.build().state_dict(), weights, **exactly)
    with torch.device("meta"):
        options = {path: decision.options for path, decision in decisions(problem.build()).items()}
    assert {path: decision.options for path, decision in decisions(problem.shapes).items()} == options


# The test split ---------------------------------------------------------------------------------------------------


def stays_blind(method, problem, run) -> None:
    method.search(problem, run)
    assert "test" not in problem.task.touched


@EVERY
def test_the_test_split_is_never_touched(method, tmp_path):
    problem = toy_for(method, (0.5,), task=stripes(64))
    search(method, tmp_path / "run", problem=problem)
    assert "test" not in problem.task.touched
    assert bool(problem.task.touched) == (method not in ("random", "capacity"))


class Peeking:
    """Scores on the test split."""

    def search(self, problem, run):
        return next(problem.task.batches("test", 8, train=False))


class Sneaking:
    """Breaks the seal first."""

    def search(self, problem, run):
        return replace(problem.task, sealed=False).split("test")


@pytest.mark.parametrize(("fake", "error"), [(Peeking, TestSplitTouched), (Sneaking, AssertionError)])
def test_a_method_that_asks_for_the_test_split_fails(fake, error, tmp_path):
    with new_run(tmp_path / "run") as run, pytest.raises(error, match="test"):
        stays_blind(fake(), problem_of(), run)


# Interruptions ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@contextmanager
def dying_at(point: int | None) -> Iterator[list[str]]:
    """Die before the given write to the run's folder, counted from 1; the list fills with the writes."""
    writes: list[str] = []

    def before(original, kind):
        def wrapped(*args, **kwargs):
            writes.append(kind)
            if len(writes) == point:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "event", before(Run.event, "event"))
        patch.setattr(run_module, "_write_json", before(run_module._write_json, "stage"))
        for module in (differentiable, haq, lana, masked):
            patch.setattr(module, "save_state", before(module.save_state, "checkpoint"))
        yield writes


@pytest.mark.parametrize("method", KILLED)
def test_killed_and_resumed_equals_undisturbed(method, tmp_path):
    with dying_at(None) as writes:
        whole = search_one_budget(method, tmp_path / "whole")
    count, checkpoints = len(writes), [i for i, kind in enumerate(writes, start=1) if kind == "checkpoint"]
    assert count > 5
    # Among others right before a checkpoint, when its epoch's events are already written.
    points = {count // 2, count, *checkpoints[1::2][:1]}
    for point in sorted(points):
        with dying_at(point), pytest.raises(Killed):
            search_one_budget(method, tmp_path / str(point))
        assert search_one_budget(method, tmp_path / str(point)).same(whole), f"after a kill at write {point} of {count}"


def test_the_search_that_is_killed_prunes_in_every_tier(tmp_path):
    search_one_budget("prunet", tmp_path / "run")
    events = read_events(tmp_path / "run")
    assert {event["tier"] for event in events if event["kind"] == "removed"} == {2, 3}
    widths = [event["widths"] for event in events if event["kind"] == "search_epoch"]
    assert widths[0] != widths[-1]


def test_a_finished_search_is_not_repeated(undisturbed, tmp_path):
    whole = search_one_budget("prunet", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differentiable.Loop, "train_epoch", None)
        assert search_one_budget("prunet", tmp_path / "run").same(whole)


def kill_at_random_moments(method: str, folder: Path, moments: int, monkeypatch) -> None:
    """kill -9 of a real process, at moments drawn over its whole length."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["planted"])  # loads torch once for all processes
    monkeypatch.setenv("PYTHONPATH", str(Path(planted.__file__).parent))

    def start(path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=search_one_budget, args=(method, path))
        process.start()
        return process

    start(folder / "first").join()
    begin = time.monotonic()
    start(folder / "whole").join()
    length = time.monotonic() - begin
    whole = search_one_budget(method, folder / "whole")
    draw, killed = random.Random(0), 0
    for number in range(moments):
        path = folder / str(number)
        process = start(path)
        process.join(draw.uniform(0.05, 0.95) * length)
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert search_one_budget(method, path).same(whole), f"kill {number}"
    assert killed >= moments // 2  # the rest were faster than the first and had ended


@pytest.mark.slow
@TRAINING
def test_kill_9_at_twenty_random_moments(method, tmp_path, monkeypatch):
    kill_at_random_moments(method, tmp_path, 20, monkeypatch)


# What it is for ---------------------------------------------------------------------------------------------------


def planted_problem(good_kernel: int, method: str = "") -> tuple[Problem, dict]:
    """Two layers of which a part works and the rest cannot learn, and what works: of two blocks each one, the cheapest
    or dearest of four networks that are within 2 % of the budget; or of eight branches the four that are allowed."""
    if method in BRANCHED:
        good = ("1x1", "1xk") if good_kernel == 3 else ("kxk", "kx1")
        problem = problem_of(lambda: some_branches_work(good), task=stripes(96))
        problem.budgets = [[Budget("branches", 4.0, "")]]
        paths = problem.outline.options
        return problem, {path: "on" if path.endswith(good) else "off" for path in paths}
    works, misled = (1.01, 0.99) if good_kernel == 5 else (0.99, 1.01)
    working = {"stage1_0": "works", "stage1_1": "works"}
    options = {"works": works, "misled": misled}
    if method.split("+")[0] in QUANTISING:
        broken = "first" if good_kernel == 3 else "second"
        # Those that train or only score undo, or do not see, what breaks an untrained network.
        space = one_is_misled_in_int8 if method in ("haq", "edmips") else one_breaks_in_int8
        harmless = {path: {"fp32": 2.0, "int8": 1.0} for path in space(broken).reference}  # pyright: ignore
        problem = problem_of(lambda: space(broken), task=stripes(96), prices=Prices(0.1, harmless, "ms"))
        problem.budgets = [[Budget("latency", 1.1 + len(harmless), "ms")]]
        return problem, {**dict.fromkeys(harmless, "int8"), f"{broken}.conv": "fp32"}
    if method.split("+")[0] in NARROWING:
        problem = problem_of(lambda: some_channels_work(good_kernel), task=stripes(96))
        working = {"misled/conv": 4, "works/conv": 8}
        problem.budgets = [[Budget("latency", problem.latency.of(working), "ms")]]
        return problem, working
    if method in REPLACING:
        options |= {"original": 2.0}
        prices = Prices(0.1, dict.fromkeys(working, options), "ms")
        problem = problem_of(lambda: some_copies_work(good_kernel), task=stripes(96), prices=prices)
        problem.budgets = [[Budget("latency", 2.15, "ms")]]
        return problem, working
    prices = Prices(0.1, dict.fromkeys(working, options), "ms")
    return problem_of(lambda: one_works(good_kernel), shares=(1.0,), task=stripes(96), prices=prices), working


@TRAINING
@pytest.mark.parametrize("good_kernel", [3, 5], ids=["cheap", "dear"])
def test_finds_what_works(method, good_kernel, tmp_path):
    steps = {"epochs": 8, "warmup_epochs": 2, "batch_size": 16, "architecture_rate": 0.05}
    if method.startswith(("proxylessnas", "darts", "rarts")):
        steps["rhythm"] = 1
    alone = {"samples": 1, "noise": 0.0, "epochs": [1]}  # what the logits say, and nobody to race against
    options = {
        "best_of": {"candidates": 12, "epochs": 4},
        "prunet": {"steps": steps, "finals": {"epochs": [4]}},  # which races against its start
        "pad_nas": {"steps": {**steps, "epochs": 16}, "finals": alone},
        "repnas": {"steps": {**steps, "epochs": 24, "architecture_rate": 0.03}},  # half of the branches learn in a step
        "smcp": {"epochs": 12, "batch_size": 16, "every": 2},
        "mcu_pruning": {"epochs": 12, "batch_size": 16},
        "mcu_pruning+dsa": {"epochs": 12, "batch_size": 16, "loss": "dsa"},
        "mixed_precision": {},
        "haq": {"episodes": 40, "warmup_episodes": 10, "images": 48},
        "edmips": {"steps": {**steps, "architecture_rate": 0.3}},
        "mixed_precision+omega": {},
        "lana": {"epochs": 24, "learning_rate": 1e-2, "batch_size": 16, "images": 96, "score": "kl", "solutions": 1},
    }.get(method, {"steps": steps, "finals": alone})
    problem, working = planted_problem(good_kernel, method)
    found = search(method, tmp_path / "run", problem=problem, **options)
    assert found.architectures == [working]


@pytest.mark.parametrize("method", ["", "repnas"])
def test_a_random_network_seldom_works(method):
    # What the test above is worth: the network that works is far better than the mean of what random search returns.
    problem, working = planted_problem(3, method)

    def accuracy(architecture) -> float:
        network = problem.network(architecture)
        train(network, problem.task, replace(BRIEF, epochs=8), split="train", seed=0)
        return evaluate(network, problem.task, "search")

    generator = torch.Generator().manual_seed(0)
    drawn = [at_budget(problem, problem.budgets[0], generator) for _ in range(6)]
    others = {dumps(architecture): accuracy(architecture) for architecture in drawn if architecture != working}
    assert accuracy(working) > 0.9
    assert statistics.mean(others.values()) < 0.65
