"""N random networks at the budget, ranked by short training; the best is taken. The baseline to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt

from netsmith.cost.prices import Options
from netsmith.run import Run
from netsmith.search.problem import Problem, prefer
from netsmith.search.race import race
from netsmith.search.sampling import at_budget, flat


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Random search with a cheap but honest signal."""

    candidates: PositiveInt = 20
    """Networks drawn for each budget."""
    epochs: PositiveInt = 2
    """Length of the short training that ranks them."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        found = []
        for number, budgets in enumerate(problem.budgets):
            generator = torch.Generator().manual_seed(run.seed(f"best_of-{number}"))
            entrants = [at_budget(problem, budgets, generator) for _ in range(self.candidates)]
            best, _ = race(problem, run, f"best_of-{number}", entrants, epochs=(self.epochs,))[0]
            found.append(prefer(flat(problem), best, 1.0))
        return found
