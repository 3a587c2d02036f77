"""Random networks that use their budget, and values that know nothing: what baselines and searches start from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from netsmith.architecture import Outline, mutate, sample
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture, Option
from netsmith.search.problem import Problem


def usage(problem: Problem, architecture: Mapping[str, Option], budgets: Sequence[Budget]) -> float:
    """The largest predicted share of a budget: 1 is exactly at the limit, 0 where there is none. Peak memory, which
    takes a trace of the network, is looked at only where nothing cheaper exceeds a limit."""

    def cost(budget: Budget, *, traced: bool) -> float:
        if traced or problem.adds_up(budget.metric):
            return problem.predicted(budget, architecture)
        return problem.largest_block(architecture, budget.metric)

    share = max((cost(budget, traced=False) / budget.limit for budget in budgets), default=0.0)
    return share if share > 1 else max((cost(budget, traced=True) / budget.limit for budget in budgets), default=0.0)


def at_budget(
    problem: Problem,
    budgets: Sequence[Budget],
    generator: torch.Generator,
    *,
    least: float = 0.97,
    space: Outline | None = None,
) -> Architecture:
    """A random network whose predicted cost is ``least`` to 1 times the limit, of ``space`` where the problem's own has
    been cut down.

    Drawn uniformly; where it misses the window, random single mutations that bring it closer are accepted until it is
    in. The walk keeps most of the random network, where rejection would need thousands of draws for a small budget.
    Where no network is found in the window (a coarse space, a limit above the largest network), the one within the
    limit that comes closest to it. Peak memory alone has steps too large for a window: any network within it will do;
    without a budget, any network.

    Raises: Infeasible, naming the smallest reachable cost.
    """
    space = space or problem.outline
    least = least if problem.limits(budgets) else 0.0
    nearest: tuple[float, Architecture] | None = None
    for _ in range(20):
        architecture = sample(space, generator)
        distance = _distance(usage(problem, architecture, budgets), least)
        for _ in range(300):
            if distance == 0:
                return architecture
            other = mutate(space, architecture, generator)
            if (there := _distance(usage(problem, other, budgets), least)) < distance:
                architecture, distance = other, there
        if usage(problem, architecture, budgets) <= 1 and (nearest is None or distance < nearest[0]):
            nearest = distance, architecture
    if nearest:
        return nearest[1]
    values = flat(problem)
    left = {path: {option: values[path][option] for option in options} for path, options in space.options.items()}
    return problem.allocate(left, budgets)


def _distance(share: float, least: float) -> float:
    if share > 1:
        return math.log(share)
    return math.log(least / max(share, 1e-9)) if share < least else 0.0


def flat(problem: Problem) -> Options:
    """The same small value for everything, growing a little with capacity so that no budget is left unspent."""
    return {path: {o: 1e-3 * v for o, v in row.items()} for path, row in capacity(problem).items()}


def capacity(problem: Problem) -> Options:
    """How much an option can do before anything is known: the logarithm of one plus its share of the MACs.

    log(1 + MACs / m), with m the mean price of an option in the space: doubling a small block is worth more than
    doubling a large one, and a skip is worth nothing. A branch that folds away counts with its MACs in training.
    """
    macs = problem.work.options
    prices = [price for row in macs.values() for price in row.values() if price > 0]
    unit = sum(prices) / len(prices) if prices else 1.0
    return {path: {o: math.log1p(price / unit) for o, price in row.items()} for path, row in macs.items()}
