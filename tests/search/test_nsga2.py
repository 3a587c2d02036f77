"""NSGA-II: ranks against their definition, crowding by hand, and that a search finds a front that is known."""

import math

import pytest
import torch
from planted import new_run
from torch import nn

from netsmith.architecture import dumps, enumerate_architectures, outline, sample
from netsmith.decisions import OneOf
from netsmith.run import read_events
from netsmith.search.nsga2 import NSGA2, Individual, crowding, dominates, ranks, survivors

SPACE = outline(nn.Sequential(*(OneOf({"a": nn.Identity(), "b": nn.Identity(), "c": nn.Identity()}) for _ in range(6))))
WORTH = {"a": 0.0, "b": 1.0, "c": 1.5}


def points(count: int, axes: int, seed: int) -> list[list[float]]:
    """On a coarse grid, so that ties and copies occur, and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(12, (count, axes), generator=generator) / 8).tolist()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_the_definition(axes, seed):
    given = points(40, axes, seed)
    left, by_hand, rank = set(range(40)), [0] * 40, 0
    while left:
        rank += 1
        front = {i for i in left if not any(dominates(given[j], given[i]) for j in left)}
        by_hand = [rank if i in front else known for i, known in enumerate(by_hand)]
        left -= front
    assert ranks(given) == by_hand


def test_domination():
    assert dominates([1, 2], [1, 3])
    assert not dominates([1, 2], [1, 2])
    assert not dominates([0, 3], [1, 2])


def test_crowding_by_hand():
    found = crowding([[0, 10], [4, 2], [1, 6], [2, 4]])
    assert found == [math.inf, math.inf, 2 / 4 + 6 / 8, 3 / 4 + 4 / 8]
    assert crowding([[1, 1]]) == [math.inf]
    assert crowding([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])[1] == 1  # no extent, no distance
    assert crowding([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_order_does_not_depend_on_units(seed):
    given = points(30, 2, seed)
    scaled = [[32 * a + 3, b / 16 - 5] for a, b in given]  # exact in binary
    order, again = (
        [i.architecture for i in survivors([Individual({"n": n}, p) for n, p in enumerate(of)], 30)]
        for of in (given, scaled)
    )
    assert order == again


def test_survivors_are_the_best_ranks_and_of_the_last_the_lonelier():
    given = [Individual({"n": n}, p) for n, p in enumerate([[0, 4], [1, 3], [1.2, 2.8], [4, 0], [5, 5], [0, 9]])]
    assert [i.architecture["n"] for i in survivors(given, 6)] == [0, 3, 2, 1, 4, 5]
    assert [i.architecture["n"] for i in survivors(given, 2)] == [0, 3]


def score(architecture: dict) -> tuple[float, float]:
    """Worth falls and price rises along the options, and differently in each layer."""
    worth = sum((i + 1) * WORTH[option] for i, option in enumerate(architecture.values()))
    return -worth, sum((6 - i) * "abc".index(option) for i, option in enumerate(architecture.values()))


def allowed(architecture: dict) -> bool:
    return 8 <= score(architecture)[1] <= 24


def evolve(path, score=score, **options):
    def first(generator):
        drawn = {dumps(a): a for a in (sample(SPACE, generator) for _ in range(100)) if allowed(a)}
        return list(drawn.values())[:32]

    with new_run(path) as run:
        return NSGA2(**{"population": 32, "iterations": 20, **options}).evolve(run, "x", SPACE, first, score, allowed)


def test_it_finds_the_front_of_a_space_that_can_be_enumerated(tmp_path):
    everything = [Individual(a, score(a)) for a in enumerate_architectures(SPACE) if allowed(a)]
    front = {i.objectives for i in survivors(everything, len(everything)) if not any(
        dominates(other.objectives, i.objectives) for other in everything
    )}  # fmt: skip
    living, everyone = evolve(tmp_path / "run")
    found = {tuple(individual.objectives) for individual in living}
    assert len(everyone) < len(everything)
    assert len(found & front) >= 0.9 * len(front)
    assert len({dumps(i.architecture) for i in everyone}) == len(everyone)
    assert all(allowed(individual.architecture) for individual in everyone)
    assert len(living) == 32


def test_a_finished_generation_is_not_scored_again_and_no_network_twice(tmp_path):
    scored = []

    def counting(architecture):
        scored.append(dumps(architecture))
        if len(scored) == 50:
            raise KeyboardInterrupt
        return score(architecture)

    with pytest.raises(KeyboardInterrupt):
        evolve(tmp_path / "run", counting, iterations=3)
    again = evolve(tmp_path / "run", counting, iterations=3)
    assert again == evolve(tmp_path / "whole", iterations=3)
    assert len(scored) - len(set(scored)) == 50 - 32  # of the generation that was cut off
    events = read_events(tmp_path / "run")
    assert [event["born"] for event in events] == [32] * 4
    assert events == read_events(tmp_path / "whole")


def test_an_exhausted_space_ends_the_search(tmp_path):
    tiny = outline(nn.Sequential(OneOf({"a": nn.Identity(), "b": nn.Identity()})))
    with new_run(tmp_path / "run") as run:
        living, everyone = NSGA2().evolve(
            run, "x", tiny, lambda generator: [{"0": "a"}], lambda a: (float(a["0"] == "a"), 0.0), lambda a: True
        )
    assert [individual.architecture for individual in living] == [{"0": "b"}, {"0": "a"}]
    assert len(everyone) == 2


def test_the_better_parent_wins_the_tournament():
    best, worst = (dict.fromkeys(SPACE.options, option) for option in "ab")
    parents, near = [Individual(best, (0.0, 0.0)), Individual(worst, (1.0, 1.0))], 0
    method, generator = NSGA2(population=20, crossover=0.0), torch.Generator().manual_seed(0)
    for _ in range(20):
        children = method._children(SPACE, parents, lambda _: True, (), generator)
        near += sum(2 * ([*c.values()].count("a") > [*c.values()].count("b")) - 1 for c in children)
    assert near > 0
