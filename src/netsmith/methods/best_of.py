"""N random networks at the budget, ranked by short training; the best is taken. The baseline to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture
from netsmith.effort import processor_seconds
from netsmith.run import Run
from netsmith.search.problem import Problem, prefer
from netsmith.search.race import race, short_training
from netsmith.search.sampling import at_budget, flat


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Random search with a cheap but honest signal."""

    candidates: PositiveInt = 20
    """Networks drawn for each budget."""
    epochs: PositiveInt = 2
    """Length of the short training that ranks them."""
    processor_seconds: PositiveFloat | None = None
    """Instead of a number of candidates: draw and train until a search of all budgets together has taken so long."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        found = []
        for number, budgets in enumerate(problem.budgets):
            generator = torch.Generator().manual_seed(run.seed(f"best_of-{number}"))
            if self.processor_seconds is None:
                entrants = [at_budget(problem, budgets, generator) for _ in range(self.candidates)]
                best, _ = race(problem, run, f"best_of-{number}", entrants, epochs=(self.epochs,))[0]
            else:
                share = self.processor_seconds / len(problem.budgets)
                best = self._within(share, problem, run, f"best_of-{number}", budgets, generator)
            found.append(prefer(flat(problem), best, 1.0))
        return found

    def _within(
        self,
        seconds: float,
        problem: Problem,
        run: Run,
        name: str,
        budgets: Sequence[Budget],
        generator: torch.Generator,
    ) -> Architecture:
        """The best of as many as so many processor seconds allow. What each took is stored with its score, so that a
        continued search draws no more of them."""
        scored: list[tuple[float, Architecture]] = []
        spent = 0.0
        while spent < seconds:
            started, stage = processor_seconds(), f"{name}-0-{len(scored)}"
            architecture = at_budget(problem, budgets, generator)

            def trained(architecture=architecture, stage=stage, started=started) -> dict:
                score = short_training(problem, run, architecture, self.epochs, stage)
                return {"score": score, "processor_seconds": processor_seconds() - started}

            stored = run.once(stage, trained)
            scored.append((stored["score"], architecture))
            spent += stored["processor_seconds"]
            run.progress(
                f"short trainings ({name}), seconds",
                round(min(spent, seconds)),
                round(seconds),
                f"{len(scored)} networks",
            )
        return max(scored, key=lambda entry: entry[0])[1]
