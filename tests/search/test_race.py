"""Races rank by short training, rung by rung, and resume; settle tries structures; finalists keep the budget."""

from dataclasses import replace

import pytest
import torch
from planted import BRIEF, new_run, problem_of, stripes

from netsmith.architecture import dumps, sample
from netsmith.cost.budget import Budget
from netsmith.cost.memory import PeakMemory
from netsmith.run import read_events
from netsmith.search import race as module
from netsmith.search.allocate import Infeasible, Unsolved
from netsmith.search.problem import Problem
from netsmith.search.race import Finals, finalists, perturbed, race, settle, within_each
from netsmith.search.sampling import at_budget, capacity, usage


@pytest.fixture
def scores(monkeypatch):
    """Short trainings that take no time: the score comes from the list; notes who was trained for how long."""

    def install(score) -> list[tuple[str, int]]:
        trained = []

        def fake(problem, run, architecture, epochs, stage):
            trained.append((dumps(architecture), epochs))
            return score(architecture)

        monkeypatch.setattr(module, "short_training", fake)
        return trained

    return install


ENTRANTS = [{"a": i} for i in range(9)]


def test_successive_halving_keeps_a_third_rounded_up(scores, tmp_path):
    trained = scores(
        lambda architecture: {3: 0.9, 5: 0.8, 7: 0.7}.get(architecture["a"], 0.1 * (architecture["a"] % 2))
    )
    with new_run(tmp_path / "run") as run:
        ranking = race(problem_of(), run, "x", [*ENTRANTS, {"a": 9}], epochs=(1, 2, 4))
    lengths = [epochs for _, epochs in trained]
    assert (lengths.count(1), lengths.count(2), lengths.count(4)) == (10, 4, 2)
    assert [entry[0]["a"] for entry in ranking[:3]] == [3, 5, 7]
    assert sorted(entry[0]["a"] for entry in ranking) == list(range(10))
    assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)


def test_those_that_went_further_stand_first(scores, tmp_path):
    def score(architecture):
        return next(values)

    values = iter([0.5, 0.6, 0.7, 0.2])  # the best of the first rung is worst later
    scores(score)
    with new_run(tmp_path / "run") as run:
        ranking = race(problem_of(), run, "x", ENTRANTS[:3], epochs=(1, 2))
    assert ranking == [({"a": 2}, 0.2), ({"a": 1}, 0.6), ({"a": 0}, 0.5)]


def test_what_has_shown_itself_before_reaches_the_end(scores, tmp_path):
    trained = scores(lambda architecture: 0.1 * architecture["a"])
    with new_run(tmp_path / "run") as run:
        ranking = race(problem_of(), run, "x", ENTRANTS, epochs=(1, 4), always=[{"a": 0}])
    assert [architecture for architecture, epochs in trained if epochs == 4] == [dumps({"a": n}) for n in (8, 7, 6, 0)]
    assert [architecture["a"] for architecture, _ in ranking] == [8, 7, 6, 0, 5, 4, 3, 2, 1]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 4, 9, 12])
def test_a_killed_race_goes_on_with_the_next_entrant(scores, tmp_path, at):
    def dying(architecture):
        if len(trained) == at + 1:
            raise Killed
        return architecture["a"] / 10

    trained = scores(dying)
    with new_run(tmp_path / "run") as run, pytest.raises(Killed):
        race(problem_of(), run, "x", ENTRANTS, epochs=(1, 2, 4))
    assert len(trained) == at + 1
    again = scores(lambda architecture: architecture["a"] / 10)
    with new_run(tmp_path / "run") as run:
        ranking = race(problem_of(), run, "x", ENTRANTS, epochs=(1, 2, 4))
    assert len(again) == 13 - at
    assert [entry[0]["a"] for entry in ranking] == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_a_short_training_is_a_whole_schedule_on_train_scored_on_search(tmp_path):
    problem = problem_of(task=stripes(64), recipe=replace(BRIEF, distillation=0.5))  # whose teacher comes later
    architecture = problem.allocate(capacity(problem), problem.budgets[0])
    with new_run(tmp_path / "run") as run:
        ((found, score),) = race(problem, run, "x", [architecture], epochs=(3,))
    assert found == architecture
    assert 0 <= score <= 1
    assert score * 32 == pytest.approx(round(score * 32))  # of the 32 images of `search`
    assert problem.task.touched == {"train", "search"}
    (event,) = read_events(tmp_path / "run")
    assert (event["kind"], event["epochs"], event["score"]) == ("raced", 3, score)
    assert BRIEF.epochs == 1


def test_settle_takes_the_structure_that_wins_the_race(scores, tmp_path):
    problem = problem_of()
    for wanted in ("slim", "broad"):
        trained = scores(lambda architecture, wanted=wanted: float(architecture["body"] == wanted))
        with new_run(tmp_path / wanted) as run:
            assert settle(problem, run, "s", problem.budgets[0], capacity(problem), (2,)) == {"body": wanted}
        assert len(trained) == 2


def test_a_structure_without_a_network_in_the_budget_does_not_race(scores, tmp_path):
    problem = problem_of()
    smallest = {
        body: problem.latency.of(
            problem.allocate(
                {p: {o: -v for o, v in row.items()} for p, row in only(problem, body).items()}, problem.budgets[1]
            )
        )
        for body in ("slim", "broad")
    }
    cheaper = min(smallest, key=lambda body: smallest[body])
    between = [Budget("latency", sum(smallest.values()) / 2, "ms")]
    assert [a["body"] for a in within_each(problem, between, capacity(problem), ["body"])] == [cheaper]
    trained = scores(lambda architecture: 0.5)
    with new_run(tmp_path / "run") as run:
        assert settle(problem, run, "s", between, capacity(problem), (2,)) == {"body": cheaper}
        assert trained == []  # nobody to race against
        with pytest.raises(Infeasible, match="the smallest network needs"):
            settle(problem, run, "t", [Budget("latency", 1e-9, "ms")], capacity(problem), (2,))


def only(problem: Problem, body: str) -> dict:
    """What the MACs of each option are, with one body alone."""
    return {**problem.latency.options, "body": {body: 0.0}}


def test_a_structure_that_needs_too_much_memory_does_not_race():
    problem = problem_of()
    both = within_each(problem, problem.budgets[1], capacity(problem), ["body"])
    assert {a["body"] for a in both} == {"slim", "broad"}
    memory = Budget("peak_memory", 1.0, "B")
    least = {}  # what the smallest network of each needs
    for body in ("slim", "broad"):
        macs = {p: {o: -v for o, v in row.items()} for p, row in problem.prices["macs"].options.items()}
        small = problem.allocate({**macs, "body": {body: 0.0}}, problem.budgets[1])
        least[body] = problem.predicted(memory, small)
    assert least["slim"] < least["broad"]
    tight = [*problem.budgets[1], replace(memory, limit=0.5 * sum(least.values()))]
    assert {a["body"] for a in within_each(problem, tight, capacity(problem), ["body"])} == {"slim"}


def test_a_structure_that_was_not_solved_in_time_is_no_structure_without_a_network(monkeypatch):
    """It would miss in the race on a busy machine, and the scores stored for the others would move up by one."""
    problem = problem_of()
    allocate, calls = Problem.allocate, []

    def late(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise Unsolved("out of time")
        return allocate(self, *args)

    monkeypatch.setattr(Problem, "allocate", late)
    with pytest.raises(Unsolved):
        within_each(problem, problem.budgets[1], capacity(problem), ["body"])


def test_random_networks_within_a_memory_budget_are_traced_only_where_blocks_fit(monkeypatch):
    problem, traced = problem_of(), []
    networks = [
        problem.plain(at_budget(problem, problem.budgets[1], torch.Generator().manual_seed(i))) for i in range(8)
    ]
    memory = sorted(PeakMemory()(network, problem.input_shape) for network in networks)
    budgets = [Budget("peak_memory", memory[2], "B")]
    plain = Problem.plain
    monkeypatch.setattr(Problem, "plain", lambda self, a: traced.append(a) or plain(self, a))
    found = [at_budget(problem, budgets, torch.Generator().manual_seed(i)) for i in range(20)]
    assert len(traced) < 3 * len(found)
    assert all(PeakMemory()(plain(problem, a), problem.input_shape) <= memory[2] for a in found)


def test_a_block_alone_needs_no_more_memory_than_the_network():
    problem, generator = problem_of(), torch.Generator().manual_seed(0)
    for _ in range(30):
        network = sample(problem.outline, generator)
        assert problem.largest_block(network, "peak_memory") <= PeakMemory()(
            problem.plain(network), problem.input_shape
        )


def test_finalists_use_the_budget_where_cheap_options_are_liked_best():
    problem = problem_of()
    (budget,) = problem.budgets[0]
    values = {p: {o: -0.1 * v for o, v in row.items()} for p, row in capacity(problem).items()}
    assert problem.latency.of(problem.allocate(values, [budget])) < 0.8 * budget.limit
    found = finalists(problem, [budget], values, Finals(noise=0.5), torch.Generator().manual_seed(0))
    assert all(0.95 * budget.limit <= problem.latency.of(a) <= budget.limit for a in found)


def test_finalists_are_distinct_and_within_the_budget():
    problem, values = problem_of(), capacity(problem_of())
    (budget,) = problem.budgets[0]
    found = finalists(problem, [budget], values, Finals(noise=0.5), torch.Generator().manual_seed(0))
    assert len({dumps(architecture) for architecture in found}) == len(found) == 6
    assert all(problem.latency.of(architecture) <= budget.limit for architecture in found)
    assert found[0] == problem.allocate(values, [budget])
    again = finalists(problem, [budget], values, Finals(noise=0.5), torch.Generator().manual_seed(0))
    assert again == found
    assert len(finalists(problem, [budget], values, Finals(noise=0.0), torch.Generator().manual_seed(0))) == 1


def test_finalists_leave_no_room_for_a_wider_layer():
    problem, values = problem_of(), capacity(problem_of())
    (budget,) = problem.budgets[0]
    for architecture in finalists(problem, [budget], values, Finals(noise=0.5), torch.Generator().manual_seed(0)):
        for path, width in architecture.items():
            for wider in (option for option in values[path] if isinstance(width, int) and option > width):
                assert problem.latency.of(architecture | {path: wider}) > budget.limit


# Random networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_random_networks_use_their_budget(share):
    problem = problem_of(shares=(share,))
    generator = torch.Generator().manual_seed(0)
    drawn = [at_budget(problem, problem.budgets[0], generator) for _ in range(5)]
    assert all(0.97 <= usage(problem, architecture, problem.budgets[0]) <= 1 for architecture in drawn)
    assert len({dumps(architecture) for architecture in drawn}) >= 3  # a small space has few


def test_the_tightest_of_several_budgets_counts():
    problem = problem_of(shares=(0.4,))
    params = 0.5 * problem.prices["params"].of(problem.reference)
    budgets = [*problem.budgets[0], Budget("params", params, "")]
    architecture = at_budget(problem, budgets, torch.Generator().manual_seed(0))
    shares = [problem.prices[b.metric].of(architecture) / b.limit for b in budgets]
    assert max(shares) == usage(problem, architecture, budgets)
    assert 0.97 <= max(shares) <= 1


def test_a_budget_above_the_largest_network_is_no_error():
    problem = problem_of(shares=(3.0,))
    architecture = at_budget(problem, problem.budgets[0], torch.Generator().manual_seed(0))
    assert problem.latency.of(architecture) > 0.8 * problem.latency.of(problem.reference)


def test_a_budget_below_the_smallest_network_names_it():
    problem = problem_of(shares=(1e-3,))
    with pytest.raises(Infeasible, match="the smallest network needs"):
        at_budget(problem, problem.budgets[0], torch.Generator().manual_seed(0))


def test_noise_favours_no_option_for_what_is_nested_in_it():
    """All values 0, no budget: a skip and a block with 12 widths inside come up equally often."""
    values = {"layer": {"skip": 0.0, "block": 0.0}, "layer.block.hidden": dict.fromkeys(range(1, 13), 0.0)}
    generator = torch.Generator().manual_seed(0)
    taken = 0
    for _ in range(600):
        noisy = perturbed(values, generator, 0.5)
        worth = {path: max(row.values()) for path, row in noisy.items()}
        taken += noisy["layer"]["block"] + worth["layer.block.hidden"] > noisy["layer"]["skip"]
    assert 0.4 < taken / 600 < 0.6
