"""No search: spend the whole budget on capacity with one knapsack and train nothing on the way. The second baseline."""

from __future__ import annotations

from dataclasses import dataclass

from netsmith.cost.prices import Options
from netsmith.run import Run
from netsmith.search.problem import Problem
from netsmith.search.sampling import capacity


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The knapsack on capacities."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return [capacity(problem) for _ in problem.budgets]
