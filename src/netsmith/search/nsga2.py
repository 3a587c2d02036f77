"""NSGA-II (Deb et al. 2002, IEEE Trans. Evol. Comput. 6(2)) over architectures: rank by domination, then by crowding.

Ours: a library's bookkeeping takes longer than scoring a small network, and none knows nested decisions and rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from netsmith.architecture import Outline, crossover, dumps, mutate
from netsmith.decisions import Architecture
from netsmith.run import Run

Point = Sequence[float]
"""Objectives; less is better in each."""
ATTEMPTS = 20
"""Children made for each that is wanted, before a generation goes on with fewer."""


class Individual(NamedTuple):
    architecture: Architecture
    objectives: Point


@dataclass(frozen=True, kw_only=True)
class NSGA2:
    """Its operators work on decisions: options have no order that Deb's polynomial mutation could use."""

    population: Annotated[int, Field(ge=2)] = 64
    """Individuals alive."""
    iterations: NonNegativeInt = 5
    """Generations after the first (PAD-NAS: up to 40). Scoring soon takes longer than training: 5 is ours."""
    crossover: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability that a child has two parents; it takes after the second between two points of the decisions."""
    mutations: NonNegativeFloat = 1.0
    """Decisions re-drawn in a child, in the mean: of J each with probability 1/J."""

    def evolve(
        self,
        run: Run,
        name: str,
        space: Outline,
        first: Callable[[torch.Generator], Sequence[Architecture]],
        score: Callable[[Architecture], Point],
        allowed: Callable[[Architecture], bool],
    ) -> tuple[list[Individual], list[Individual]]:
        """The last population, best first, and everyone who was ever scored; ``first`` draws the first population.

        All individuals are distinct, since a copy would tell nothing new; children that are not ``allowed`` are
        discarded. Every generation is a stage of ``run``.
        """
        everyone: dict[str, Individual] = {}
        living: list[Individual] = []
        for generation in range(self.iterations + 1):
            stage = f"{name}-{generation}"

            def scored(stage: str = stage, parents: list[Individual] = living) -> list[Individual]:
                random = torch.Generator().manual_seed(run.seed(stage))
                drawn = self._children(space, parents, allowed, everyone, random) if parents else first(random)
                return [Individual(found, score(found)) for found in {dumps(found): found for found in drawn}.values()]

            born = [Individual(*pair) for pair in run.once(stage, scored)]
            if not born:
                break  # the space is exhausted
            everyone.update((dumps(individual.architecture), individual) for individual in born)
            living = survivors([*living, *born], self.population)
            run.event("generation", search=name, born=len(born), living=[list(i.objectives) for i in living])
            run.progress(f"evolution ({name})", generation, self.iterations, f"{len(everyone)} networks scored")
        return living, list(everyone.values())

    def _children(
        self,
        space: Outline,
        parents: Sequence[Individual],
        allowed: Callable[[Architecture], bool],
        known: Collection[str],
        generator: torch.Generator,
    ) -> list[Architecture]:
        """A generation of new architectures; ``parents`` stand best first."""

        def tournament() -> Architecture:
            one, other = torch.randint(len(parents), (2,), generator=generator).tolist()
            return parents[min(one, other)].architecture

        def chance(probability: float, times: int = 1) -> int:
            return int((torch.rand(times, generator=generator) < probability).sum())

        found: dict[str, Architecture] = {}
        for _ in range(ATTEMPTS * self.population):
            child = tournament()
            if chance(self.crossover):
                child = crossover(space, child, tournament(), generator)
            open_ = sum(len(space.options[path]) > 1 for path in child)
            for _ in range(chance(self.mutations / max(1, open_), open_)):
                child = mutate(space, child, generator)
            if (key := dumps(child)) not in known and key not in found and allowed(child):
                found[key] = child
            if len(found) == self.population:
                break
        return list(found.values())


def survivors(individuals: Sequence[Individual], count: int) -> list[Individual]:
    """The best ``count``, best first: by rank, and of one rank the lonelier."""
    points = [individual.objectives for individual in individuals]
    rank, distance = ranks(points), [0.0] * len(points)
    for front in range(1, max(rank, default=0) + 1):
        members = [i for i in range(len(points)) if rank[i] == front]
        for i, alone in zip(members, crowding([points[i] for i in members]), strict=True):
            distance[i] = alone
    order = sorted(range(len(points)), key=lambda i: (rank[i], -distance[i]))
    return [individuals[i] for i in order[:count]]


def ranks(points: Sequence[Point]) -> list[int]:
    """Non-domination rank of each point: 1 where nothing dominates it, 2 where only points of rank 1 do, and so on."""
    below = [[j for j, other in enumerate(points) if dominates(point, other)] for point in points]
    above = [sum(dominates(other, point) for other in points) for point in points]
    found = [0] * len(points)
    front, rank = [i for i, count in enumerate(above) if not count], 1
    while front:
        following = []
        for i in front:
            found[i] = rank
            for j in below[i]:
                above[j] -= 1
                if not above[j]:
                    following.append(j)
        front, rank = following, rank + 1
    return found


def dominates(point: Point, other: Point) -> bool:
    """No worse in any objective, and better in one."""
    return all(a <= b for a, b in zip(point, other, strict=True)) and tuple(point) != tuple(other)


def crowding(points: Sequence[Point]) -> list[float]:
    """How lonely each point of a front is: the sum over objectives of the distance between its two neighbours, in
    shares of the front's extent; infinite at the ends."""
    found = [0.0] * len(points)
    for axis in range(len(points[0]) if points else 0):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        extent = points[order[-1]][axis] - points[order[0]][axis]
        found[order[0]] = found[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            found[i] += (points[after][axis] - points[before][axis]) / extent if extent else 0.0
    return found
