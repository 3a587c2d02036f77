"""PAD-NAS (Xia et al. 2020, arXiv:2005.07564): the search space of a one-shot supernet shrinks in stages.

Train one path at a time, search, drop the options that the found networks do not use, go on training with inherited
weights. A smaller space shares its weights among fewer networks, so the supernet ranks them better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from netsmith.architecture import Outline, dumps, outline, sample
from netsmith.cost.budget import within
from netsmith.cost.prices import Options, expected
from netsmith.decisions import Architecture, decisions, derive
from netsmith.errors import UserError
from netsmith.gates import fix
from netsmith.run import Run
from netsmith.search.differentiable import Searcher, Steps, learn
from netsmith.search.nsga2 import NSGA2, Individual, ranks
from netsmith.search.problem import LAST_RESORT, Problem, prefer
from netsmith.search.race import Finals, race, settle
from netsmith.search.sampling import at_budget, capacity, usage
from netsmith.search.supernet import restrict
from netsmith.train.batchnorm import recalibrate
from netsmith.train.loop import evaluate

POPULATION = 64
"""The paper's, for which its threshold is meant."""


def _steps() -> Steps:
    return Steps(epochs=60, warmup_epochs=0)  # of one path each, which take an eighth of the time of all


@dataclass(frozen=True, kw_only=True)
class PADNAS:
    """Algorithm 2; one supernet and one search serve all budgets of a front."""

    steps: Steps = field(default_factory=_steps)
    """How the supernet is trained; the epochs are those of all stages (240 in the paper). There are no architecture
    steps, and no warm-up."""
    stages: Annotated[int, Field(ge=2)] = 4
    """M: the space is cut down M - 2 times; 2 is plain one-shot search."""
    fine_tuning: PositiveFloat = 0.2
    """Learning rate after the first stage, in shares of the first one's (0.1 after 0.5)."""
    evolution: NSGA2 = field(default_factory=NSGA2)
    """The constrained evolutionary search (section 5.4)."""
    window: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Cost of the cheapest network that is searched, in shares of the tightest budget; the dearest is within the
    loosest. (60 to 70 ms for the basic space.)"""
    rank: Annotated[int, Field(ge=2)] = 10
    """Individuals of a lower non-domination rank are counted: the front alone is noise."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """An option of at most that frequency is dropped (P_th), in a population of 64; with fewer individuals the
    threshold is higher, with more lower, so that 1 % always means never (ours)."""
    evidence: NonNegativeFloat = 2.0
    """A decision loses nothing where fewer individuals than this many times its options take it: options would be
    missing by chance (ours; 0: the paper's)."""
    calibration: PositiveInt = 8
    """Training batches that give an individual its batch norm statistics."""
    finals: Finals = field(default_factory=Finals)
    """Networks of the last search that are trained briefly (ours; the paper trains the best). They are the best within
    the budget, not drawn: ``noise`` has no part in it."""

    def __post_init__(self) -> None:
        if self.steps.epochs < self.stages - 1:
            raise UserError(f"steps.epochs is {self.steps.epochs}; allowed: {self.stages - 1}, one a stage, or more")

    def search(self, problem: Problem, run: Run) -> list[Options]:
        chosen = [
            settle(problem, run, f"pad_nas-settle-{i}", budgets, capacity(problem), self.finals.epochs)
            for i, budgets in enumerate(problem.budgets)
        ]
        searcher = SinglePath(problem, chosen)
        best = run.once("pad_nas-window", lambda: self._inside(problem, run, searcher))
        window = Window.around(problem, best, self.window)
        shares: Options = {}
        everyone: list[Individual] = []
        for stage in range(1, self.stages):
            name = f"pad_nas-stage{stage}"
            steps = self.schedule(stage)
            learn(problem, run, name, lambda: searcher, steps)
            population, everyone = self._evolve(problem, run, name, searcher, window, best)
            counted = [one.architecture for one in low_ranked(population, self.rank)]
            shares = frequencies(searcher.space, counted)
            best = [self._ranking(window, everyone, i)[0] for i in range(len(best))]
            # The search counts as one more epoch: it is the one that made up its mind.
            run.event("search_epoch", search=name, epoch=steps.epochs + 1, **searcher.describe(shares))
            if stage < self.stages - 1:
                for dropped in searcher.drop(self.rare(searcher.space, counted, spared=best)):
                    run.event("removed", search=name, epoch=steps.epochs + 1, **dropped)
        found = [self._decide(problem, run, i, shares, self._ranking(window, everyone, i)) for i in range(len(best))]
        return [without_dropped(values, searcher.space) for values in found]

    def schedule(self, stage: int) -> Steps:
        """How a stage, from 1, is trained; of the epochs it gets 3/6, 2/6 or 1/6 where M is 4 (120, 80, 40)."""
        trainings = self.stages - 1

        def end(stage: int) -> int:
            share = sum(trainings - k for k in range(stage)) / sum(range(self.stages))
            return min(round(self.steps.epochs * share), self.steps.epochs - (trainings - stage))  # one each at least

        rate = self.steps.learning_rate * (1.0 if stage == 1 else self.fine_tuning)
        return replace(self.steps, epochs=end(stage) - end(stage - 1), warmup_epochs=0, learning_rate=rate)

    # The constrained evolutionary search --------------------------------------------------------------------------

    def _inside(self, problem: Problem, run: Run, searcher: SinglePath) -> list[Architecture]:
        """A network for each budget, in the window if there is one."""
        generator = torch.Generator().manual_seed(run.seed("pad_nas-window"))
        return [at_budget(problem, b, generator, least=self.window, space=searcher.space) for b in problem.budgets]

    def _evolve(
        self,
        problem: Problem,
        run: Run,
        name: str,
        searcher: SinglePath,
        window: Window,
        seeds: Sequence[Architecture],
    ) -> tuple[list[Individual], list[Individual]]:
        """NSGA-II on the error with inherited weights and the cost, in the window; ``seeds`` are in the first
        population, so that no budget is without a network."""

        def first(generator: torch.Generator) -> list[Architecture]:
            drawn = list(seeds)
            for i in range(self.evolution.population - len(seeds)):
                number = i % len(problem.budgets)
                least, budgets = window.least[number], problem.budgets[number]
                drawn.append(at_budget(problem, budgets, generator, least=least, space=searcher.space))
            return [architecture for architecture in drawn if window.holds(architecture)]

        seen: list[Tensor] = []

        def score(architecture: Architecture) -> tuple[float, float]:
            if not seen:
                seen.extend(self._calibrating(problem, run))
            network = derive(searcher.supernet, architecture)
            recalibrate(network, seen)
            return 1 - evaluate(network, problem.task, "search"), window.share(architecture)

        return self.evolution.evolve(run, f"{name}-evolution", searcher.space, first, score, window.holds)

    def _calibrating(self, problem: Problem, run: Run) -> Iterable[Tensor]:
        """The same images for all, or the luck of the draw would be ranked too."""
        size = self.steps.batch_size or problem.recipe.batch_size
        seed, mirror = run.seed("pad_nas-calibration"), problem.recipe.mirror
        batches = problem.task.batches("train", size, train=True, seed=seed, epoch=0, mirror=mirror)
        return (images for images, _ in islice(batches, self.calibration))

    # Cutting the space down ---------------------------------------------------------------------------------------

    def rare(
        self, space: Outline, counted: Sequence[Architecture], spared: Sequence[Architecture]
    ) -> list[dict[str, Any]]:
        """The options to drop: their p_ij is at most P_th among the ``counted`` in which the decision is active.

        Nothing that one of ``spared`` uses is among them, nor a decision's most frequent option: no layer is emptied,
        no rule broken, and every budget keeps a network.
        """
        found = []
        for path, row in frequencies(space, counted).items():
            active = sum(path in architecture for architecture in counted)
            if not active or active < self.evidence * len(row):
                continue
            kept = {one[path] for one in spared if path in one} | {max(row, key=row.__getitem__)}
            limit = self.threshold * POPULATION / active
            found += [
                {"path": path, "option": option, "probability": p}
                for option, p in row.items()
                if p <= limit and option not in kept
            ]
        return found

    # Results ------------------------------------------------------------------------------------------------------

    def _ranking(self, window: Window, everyone: Sequence[Individual], number: int) -> list[Architecture]:
        """Those within a budget, the most accurate first."""
        fitting = [one for one in everyone if within(window.uses(one.architecture)[number], 1.0)]
        return [one.architecture for one in sorted(fitting, key=lambda one: tuple(one.objectives))]

    def _decide(
        self, problem: Problem, run: Run, number: int, shares: Options, ranking: Sequence[Architecture]
    ) -> Options:
        entrants = ranking[: self.finals.samples]
        best, _ = race(problem, run, f"pad_nas-finalists-{number}", entrants, epochs=self.finals.epochs)[0]
        values = {
            path: {option: shares.get(path, {}).get(option, 0.0) + 0.05 * worth for option, worth in row.items()}
            for path, row in capacity(problem).items()
        }
        return prefer(values, best, 1e3)


@dataclass(frozen=True)
class Window:
    """What the search may cost: from a share of the tightest budget to the loosest budget."""

    problem: Problem
    least: list[float]
    """For each budget, in shares of it, from where networks are drawn."""
    known: dict[str, list[float]] = field(default_factory=dict)
    """Architecture -> what `uses` found: peak memory takes a trace of the network."""

    @classmethod
    def around(cls, problem: Problem, nearest: Sequence[Architecture], least: float) -> Window:
        """Where even the ``nearest`` network to a budget is cheaper than ``least`` (a budget above the largest
        network, a coarse space), the window hangs below that network."""
        uses = [usage(problem, one, budgets) for one, budgets in zip(nearest, problem.budgets, strict=True)]
        return cls(problem, [least if use >= least else least * use for use in uses])

    def uses(self, architecture: Architecture) -> list[float]:
        """Cost in shares of each budget."""
        if (key := dumps(architecture)) not in self.known:
            self.known[key] = [usage(self.problem, architecture, budgets) for budgets in self.problem.budgets]
        return self.known[key]

    def share(self, architecture: Architecture) -> float:
        """Cost in shares of the tightest budget."""
        return max(self.uses(architecture))

    def holds(self, architecture: Architecture) -> bool:
        uses = self.uses(architecture)
        return within(min(uses), 1.0) and max(uses) >= min(self.least)


class SinglePath(Searcher):
    """A supernet of which one network, drawn uniformly, is trained at a time; options can be dropped for good."""

    def __init__(self, problem: Problem, chosen: Sequence[Architecture]) -> None:
        self.problem = problem
        self.supernet: nn.Module = problem.build()
        restrict(self.supernet, chosen)
        self.space = outline(self.supernet)

    def parameters(self) -> list[nn.Parameter]:
        return []

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        fix(self.supernet, sample(self.space, generator))  # a whole network, so that rules hold

    def drop(self, rare: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remove options with all that is nested in them; weights and buffers of the others stay as they are.

        Returns those that were still there.
        """
        dropped = []
        for entry in rare:
            if decision := decisions(self.supernet).get(entry["path"]):
                decision.remove(entry["option"])
                dropped.append(entry)
        self.space = outline(self.supernet)
        return dropped

    def describe(self, shares: Options | None = None) -> dict[str, Any]:
        """With the probabilities that training draws with, or with the frequencies that a search has found."""
        rows = shares or {path: dict.fromkeys(o, 1 / len(o)) for path, o in self.space.options.items()}
        with torch.no_grad():
            latency = expected(self.supernet, self.problem.latency).item()
        return {
            "expected": {"latency": latency},
            "probabilities": {path: row for path, row in rows.items() if len(row) > 1},
        }


def without_dropped(values: Options, space: Outline) -> Options:
    """``values`` with what was dropped as a last resort: no correction of a limit brings it back where anything that is
    left will do."""
    left = space.options
    return {
        path: {o: value if o in left.get(path, row) else value + LAST_RESORT for o, value in row.items()}
        for path, row in values.items()
    }


def low_ranked(individuals: Sequence[Individual], rank: int) -> list[Individual]:
    """Those whose non-domination rank, from 1, is below ``rank``."""
    found = ranks([individual.objectives for individual in individuals])
    return [individual for individual, own in zip(individuals, found, strict=True) if own < rank]


def frequencies(space: Outline, architectures: Sequence[Architecture]) -> Options:
    """p_ij: how often each option is taken among the architectures in which its decision is active; 0 for all options
    of a decision that none of them has."""
    counts = Counter(item for architecture in architectures for item in architecture.items())
    totals = {path: sum(counts[path, option] for option in options) for path, options in space.options.items()}
    return {
        path: {option: counts[path, option] / max(1, totals[path]) for option in options}
        for path, options in space.options.items()
    }
