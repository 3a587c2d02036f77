"""Rank architectures by training each for a short while: the dearest signal of quality, and the best one there is."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from netsmith.architecture import dumps
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture
from netsmith.run import Run
from netsmith.search.allocate import Infeasible
from netsmith.search.problem import FILL, Problem, prefer
from netsmith.train.loop import evaluate, train


def race(
    problem: Problem,
    run: Run,
    name: str,
    entrants: Sequence[Architecture],
    *,
    epochs: Sequence[int] = (2,),
    keep: int = 3,
    always: Collection[Architecture] = (),
) -> list[tuple[Architecture, float]]:
    """Train every entrant for ``epochs[0]``, the best ``1/keep`` of them for ``epochs[1]``, and so on; entrants in
    ``always``, which have shown themselves before, whatever they score.

    Each training is a whole short schedule on ``train``, scored on ``search``. Returns entrants with their last score
    (accuracy, 0 to 1), best first; those that went further stand before those that did not. Every training is a stage
    of ``run``: a killed race goes on with the next entrant.
    """
    standing = list(entrants)
    ranking: list[tuple[Architecture, float]] = []
    for rung, length in enumerate(epochs):
        scored = []
        for number, architecture in enumerate(standing):
            stage = f"{name}-{rung}-{number}"
            score = run.once(stage, lambda a=architecture, s=stage, e=length: short_training(problem, run, a, e, s))
            scored.append((architecture, score))
            run.progress(f"short trainings ({name})", number + 1, len(standing), f"accuracy {score:.3f}")
        scored.sort(key=lambda entry: -entry[1])
        ranking = scored + [(architecture, score) for architecture, score in ranking if architecture not in standing]
        best = [architecture for architecture, _ in scored[: max(1, -(-len(scored) // keep))]]
        standing = best + [
            architecture for architecture in standing if architecture in always and architecture not in best
        ]
    return ranking


def short_training(problem: Problem, run: Run, architecture: Architecture, epochs: int, stage: str) -> float:
    """Accuracy on ``search`` (0 to 1) after a whole schedule of so many epochs on ``train``, seeded by ``stage``."""
    warmup = min(problem.recipe.warmup_epochs, epochs / 4)
    recipe = replace(problem.recipe, epochs=epochs, warmup_epochs=warmup, distillation=0.0)  # no teacher is trained yet
    torch.manual_seed(run.seed(stage))
    network = problem.network(architecture)
    train(network, problem.task, recipe, split="train", seed=run.seed(stage))
    score = evaluate(network, problem.task, "search")
    run.event("raced", stage=stage, epochs=epochs, score=score, architecture=architecture)
    return score


def settle(
    problem: Problem, run: Run, name: str, budgets: Sequence[Budget], values: Options, epochs: Sequence[int]
) -> Architecture:
    """Decide the structural decisions (strides, stage widths): a race between the best network of each option.

    Mixing such options in one supernet would cost a whole network per option, and where the resolution falls moves
    accuracy more than all else, so they are tried, not relaxed. Returns the winner's structural choices.
    """
    structural = problem.structural
    if not structural:
        return {}
    entrants = within_each(problem, budgets, values, structural)
    winner = race(problem, run, name, entrants, epochs=epochs)[0][0] if len(entrants) > 1 else entrants[0]
    return {path: option for path, option in winner.items() if path in structural}


def within_each(
    problem: Problem, budgets: Sequence[Budget], values: Options, structural: Sequence[str]
) -> list[Architecture]:
    """The most valuable network within the budget for each structural option that has one.

    Raises: Infeasible when none has.
    """
    found: dict[str, Architecture] = {}
    for path in structural:
        for option in values[path]:
            only = {**values, path: {option: values[path][option]}}
            try:
                architecture = problem.allocate(only, budgets)
            except Infeasible:
                continue
            found.setdefault(dumps({p: architecture[p] for p in structural if p in architecture}), architecture)
    return list(found.values()) or [problem.allocate(values, budgets)]


@dataclass(frozen=True, kw_only=True)
class Finals:
    """How a gradient search ends: networks drawn around its result are trained briefly, and the best is taken."""

    samples: PositiveInt = 6
    """Networks drawn."""
    noise: NonNegativeFloat = 1.0
    """Gumbel noise on the values when drawing them: 1 samples in proportion to the probabilities (ours)."""
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2,)
    """Lengths of the short trainings, those that settle the structure before the search as well: the best third of
    one length goes on to the next (ours)."""


def finalists(
    problem: Problem,
    budgets: Sequence[Budget],
    values: Options,
    finals: Finals,
    generator: torch.Generator,
    *,
    still: Collection[str] = (),
) -> list[Architecture]:
    """Distinct networks at the budget (`FILL` of it at least) drawn around ``values``: the knapsack on Gumbel-perturbed
    values.

    The first is the unperturbed optimum. For additive values this samples architectures with probability growing with
    their value (perturb-and-MAP), under the hard budget. Decisions that stand ``still`` get no noise.
    """
    found = {dumps(best): best for best in [problem.allocate(values, budgets, least=FILL)]}
    moving = {path: row for path, row in values.items() if path not in still}
    for _ in range(4 * finals.samples):
        if len(found) >= finals.samples:
            break
        drawn = problem.allocate(values | perturbed(moving, generator, finals.noise), budgets, least=FILL)
        drawn = problem.allocate(prefer(values, drawn, 1e3), budgets)  # what the noise left unspent goes into widths
        found.setdefault(dumps(drawn), drawn)
    return list(found.values())


def perturbed(values: Options, generator: torch.Generator, noise: float) -> Options:
    """``values`` plus Gumbel noise. The largest of a decision's n noises is ``noise * (log n + 0.577)`` in the mean,
    which is taken off again: a block with many widths inside must not beat a skip by their number."""

    def gumbel() -> float:
        return float(-torch.log(-torch.log(torch.rand((), generator=generator, dtype=torch.float64).clamp_min(1e-12))))

    return {
        path: {o: value + noise * (gumbel() - math.log(len(row)) - 0.5772) for o, value in row.items()}
        for path, row in values.items()
    }
