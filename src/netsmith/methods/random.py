"""Random search's smallest form: one network at the budget, drawn at random. The first baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from netsmith.cost.prices import Options
from netsmith.run import Run
from netsmith.search.problem import Problem, prefer
from netsmith.search.sampling import at_budget, flat


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random network that uses its budget."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        found = []
        for number, budgets in enumerate(problem.budgets):
            generator = torch.Generator().manual_seed(run.seed(f"random-{number}"))
            found.append(prefer(flat(problem), at_budget(problem, budgets, generator), 1.0))
        return found
