"""The best architecture within budgets: an exact multiple-choice knapsack over a tree of decisions.

    maximise    sum of values of the chosen options
    such that   every active decision chooses one option; a nested decision is active if its outer option is chosen;
                for each limit: constant + sum of prices of the chosen options (and of pairs of them) <= at_most

solved by HiGHS through `scipy.optimize.milp` and checked afterwards. With thousands of options most of them can be left
out: the linear relaxation bounds from above what any solution with a given option is worth (Lagrangian bound), and an
option whose bound is below a solution that is already known cannot be in the best one.

What two options cost together, as a layer between two widths does, is a column of its own: for options i and j of two
decisions z_ij = x_i x_j, stated as sum_j z_ij = x_i and sum_i z_ij = x_j, which is exact where the x are whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from netsmith.architecture import extreme
from netsmith.cost.budget import TOLERANCE, show
from netsmith.cost.prices import Prices
from netsmith.decisions import Rule
from netsmith.errors import UserError

Option = str | int
Options = Mapping[str, Mapping[Any, float]]
"""Decision path -> option -> number."""
Architecture = dict[str, Option]
Parents = Mapping[str, tuple[str, Option]]
"""Nested decision -> (outer decision, its option); decisions of the top level are absent."""

_CORE = 2  # options a decision, on average, that the first attempt looks at


@dataclass(frozen=True)
class Limit:
    """at_least <= constant + prices of the chosen options <= at_most, in the unit of the prices."""

    prices: Prices
    at_most: float
    at_least: float | None = None
    name: str = "price"
    """What is limited, for messages."""

    def price(self, architecture: Mapping[str, Option]) -> float:
        return self.prices.of(architecture)

    def holds(self, architecture: Mapping[str, Option]) -> bool:
        return self.low - self.slack <= self.price(architecture) <= self.at_most + self.slack

    @property
    def low(self) -> float:
        return -math.inf if self.at_least is None else self.at_least

    @property
    def slack(self) -> float:
        bounds = (self.at_most, self.at_least or 0.0, self.prices.constant)
        return TOLERANCE * max(abs(bound) for bound in bounds if math.isfinite(bound))


class Infeasible(UserError):
    """No architecture is within all limits."""

    reachable: Sequence[tuple[float, float]] = ()
    """The smallest and largest price under each limit alone; empty where a cost that does not add up is in the way."""


class Unsolved(UserError):
    """The solver has stopped without a proof, by the time limit or for trouble of its own."""

    best: Architecture | None = None
    """The best architecture it had found; it is within all limits."""
    gap: float = math.inf
    """How far from the optimum that may be, relative to it."""


def allocate(
    values: Options,
    limits: Sequence[Limit],
    parents: Parents | None = None,
    *,
    rules: Sequence[Rule] = (),
    forbidden: Sequence[Mapping[str, Option]] = (),
    time_limit: float = 60.0,
    gap: float = 0.0,
) -> Architecture:
    """The architecture (active decisions only) with the largest sum of values within all limits.

    rules: how many of some decisions of the top level are not idle.
    forbidden: no answer contains all choices of one of these; whole architectures or parts of them.
    time_limit: seconds. gap: relative distance from the optimum that is good enough; 0 means proven optimal.

    Infeasible: nothing is within the limits. Unsolved: no proof within the time limit; its `best` is the
    best found until then. UserError: values and prices
    have different decisions or options, or a number that is not finite.

        allocate({"block": {"k3": 0.2, "k5": 0.5}}, [Limit(prices, at_most=5.0)])  # {"block": "k5"}
    """
    cuts = [(choices, len(choices) - 1) for choices in forbidden]
    return _solve(values, limits, parents or {}, cuts, time_limit, gap, rules)


def diverse(
    values: Options,
    limits: Sequence[Limit],
    parents: Parents | None = None,
    k: int = 10,
    overlap: float = 0.8,
    *,
    forbidden: Sequence[Mapping[str, Option]] = (),
    time_limit: float = 60.0,
    gap: float = 0.0,
) -> list[Architecture]:
    """The best architecture, then the best that makes at most `overlap` of its choices again, and so on: k, or as many
    as there are. No two are equal, whatever the overlap. time_limit: seconds for each. Errors as in `allocate`.
    """
    cuts = [(choices, len(choices) - 1) for choices in forbidden]
    found: list[Architecture] = []
    while len(found) < k:
        try:
            architecture = _solve(values, limits, parents or {}, cuts, time_limit, gap)
        except Infeasible:
            if not found:
                raise
            break
        found.append(architecture)
        count = len(architecture)
        cuts.append((architecture, min(math.floor(overlap * count + TOLERANCE), count - 1)))
    return found


Cut = tuple[Mapping[str, Option], int]
"""Choices, and how many of them may be made together."""


def _solve(
    values: Options,
    limits: Sequence[Limit],
    parents: Parents,
    cuts: Sequence[Cut],
    time_limit: float,
    gap: float,
    rules: Sequence[Rule] = (),
) -> Architecture:
    _check(values, limits, parents, cuts)
    counts = [_counted(rule, values) for rule in rules]

    def end(limit: Limit, largest: bool) -> float:
        return limit.price(extreme(limit.prices.alone, parents, rules, largest=largest))

    reachable = [(end(limit, False), end(limit, True)) for limit in limits]
    infeasible = _infeasible(limits, reachable, len(cuts))
    for limit, (small, large) in zip(limits, reachable, strict=True):
        unreachable = small > limit.at_most + limit.slack or large < limit.low - limit.slack
        if unreachable and not limit.prices.pairs:  # with pairs the ends are exact only where prices rise with widths
            raise infeasible
    if not values:
        return {}
    limits = [*limits, *counts]
    deadline = time.monotonic() + time_limit
    cuts = list(cuts)
    for _ in range(100):
        try:
            architecture = _Program(values, limits, parents, cuts).best(deadline, gap)
        except Unsolved as error:
            if error.best is not None:
                _verify(error.best, values, parents, cuts)
                if not all(limit.holds(error.best) for limit in limits):
                    error.best = None
            raise
        if architecture is None:
            raise infeasible
        _verify(architecture, values, parents, cuts)
        if all(limit.holds(architecture) for limit in limits):
            return architecture
        cuts.append((architecture, len(architecture) - 1))  # within the solver's tolerance, not within ours
    raise Unsolved("the solver's answers do not keep the limits: are prices of very different size added up?")


def _counted(rule: Rule, values: Options) -> Limit:
    """The rule as a limit: a decision that is not idle costs 1."""
    if not rule.can_hold(values):
        raise Infeasible(f"no network is within budget: the options that are left cannot keep the rule that {rule}")
    count = {p: {o: float(p in rule.paths and o != rule.idle) for o in row} for p, row in values.items()}
    return Limit(Prices(0.0, count), rule.at_most, rule.at_least, "rule")


class _Program:
    """The integer program: one column per option, x = 1 where it is chosen, then one per pair of options that have a
    price together. Minimised, as scipy does."""

    def __init__(self, values: Options, limits: Sequence[Limit], parents: Parents, cuts: Sequence[Cut]):
        import numpy as np
        from scipy.sparse import csr_array

        self.columns = [(path, option) for path, row in values.items() for option in row]
        at: dict[Any, int] = {column: index for index, column in enumerate(self.columns)}
        paired = dict.fromkeys(ends for limit in limits for ends in limit.prices.pairs)
        for a, b in paired:
            at |= {((a, i), (b, j)): len(at) + n for n, (i, j) in enumerate(product(values[a], values[b]))}
        self.width = len(at)

        def matrix(rows: list[dict[int, float]]) -> Any:
            entries = [(i, j, entry) for i, row in enumerate(rows) for j, entry in row.items()]
            i, j, data = zip(*entries, strict=True) if entries else ((), (), ())
            return csr_array((np.array(data, float), (np.array(i, int), np.array(j, int))), (len(rows), self.width))

        # The solver's tolerances are absolute (1e-6): large numbers make them small beside our own.
        cost = np.zeros(self.width)
        cost[: len(self.columns)] = [-values[path][option] for path, option in self.columns]
        self.cost = cost * (1e4 / (np.abs(cost).max(initial=0.0) or 1.0))
        self.whole = np.arange(self.width) < len(self.columns)
        choose = [{at[path, option]: 1.0 for option in row} for path, row in values.items()]
        for path, row in zip(values, choose, strict=True):
            if path in parents:
                row[at[parents[path]]] = -1.0
        one = [0.0 if path in parents else 1.0 for path in values]
        for a, b in paired:
            firsts, seconds = [(a, i) for i in values[a]], [(b, j) for j in values[b]]
            choose += [{at[i]: -1.0, **{at[i, j]: 1.0 for j in seconds}} for i in firsts]
            choose += [{at[j]: -1.0, **{at[i, j]: 1.0 for i in firsts}} for j in seconds]
        self.equal: Any = matrix(choose)
        self.one: Any = np.array(one + [0.0] * (len(choose) - len(one)))
        below: list[dict[int, float]] = []
        bound: list[float] = []
        for limit in limits:
            prices = [limit.prices.options[path][option] for path, option in self.columns] + [0.0] * (
                self.width - len(self.columns)
            )
            for (a, b), row in limit.prices.pairs.items():
                for (i, j), price in row.items():
                    prices[at[(a, i), (b, j)]] = price
            scale = 1e4 / (max(map(abs, prices), default=0.0) or 1.0)
            for sign, end in ((1.0, limit.at_most), (-1.0, limit.low)):
                if math.isfinite(end):
                    below.append({j: sign * scale * price for j, price in enumerate(prices) if price})
                    # Half of the slack: the solver's own tolerance comes on top.
                    bound.append(scale * (sign * (end - limit.prices.constant) + limit.slack / 2))
        for choices, most in cuts:
            below.append({at[choice]: 1.0 for choice in choices.items()})
            bound.append(most)
        self.below: Any = matrix(below)
        self.bound: Any = np.array(bound)

    def best(self, deadline: float, gap: float) -> Architecture | None:
        """The best architecture, None if there is none."""
        import numpy as np

        everything = np.ones(self.width, bool)
        if self.width > len(self.columns) or self.width <= 2 * _CORE * len(self.one):
            found = self._milp(everything, deadline, gap)
            return None if found is None else found[1]
        relaxed = self._relaxed(deadline)
        if relaxed is None:
            return None
        floor, reduced = relaxed  # any solution costs at least floor, and with option j at least floor + reduced[j]
        core = np.partition(reduced, _CORE * len(self.one))[_CORE * len(self.one)]
        found = self._milp(reduced <= core, deadline, gap, floor)
        if found is None:
            found = self._milp(everything, deadline, gap, floor)
        elif (missing := found[0] - floor) > max(core, gap * abs(found[0])):
            found = self._milp(reduced <= missing, deadline, gap, floor)
        return None if found is None else found[1]

    def _milp(
        self, kept: Any, deadline: float, gap: float, floor: float | None = None
    ) -> tuple[float, Architecture] | None:
        """The best solution among the kept columns: its cost and itself. floor: what all columns cannot go below."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        index = np.flatnonzero(kept)
        constraints = [LinearConstraint(self.equal[:, index], self.one, self.one)]
        if len(self.bound):
            constraints.append(LinearConstraint(self.below[:, index], -np.inf, self.bound))
        options = {"time_limit": max(deadline - time.monotonic(), 0.01), "mip_rel_gap": gap}
        found = milp(
            self.cost[index],
            integrality=self.whole[index],
            bounds=Bounds(0, 1),
            constraints=constraints,
            options=options,
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise _unsolved(found)
        chosen = index[(found.x > 0.5) & self.whole[index]]
        architecture = dict(self.columns[j] for j in chosen)
        if len(architecture) < len(chosen):
            raise Unsolved("the solver failed on the knapsack: its answer chooses two options of one decision")
        cost = float(self.cost[chosen].sum())
        if found.status != 0:
            bound = found.mip_dual_bound if floor is None else floor
            raise _unsolved(found, architecture, abs(cost - bound) / max(abs(cost), 1e-9))
        return cost, architecture

    def _relaxed(self, deadline: float) -> tuple[float, Any] | None:
        """A lower bound of the cost, and what each option adds to that bound when it is chosen; None: infeasible.

        For any multipliers y (of the right sign), cost·x >= y·b + (cost - A'y)·x: so this holds also where the solver's
        multipliers are a little off.
        """
        import numpy as np
        from scipy.optimize import linprog

        options = {"time_limit": max(deadline - time.monotonic(), 0.01)}  # interior point: 4x faster than simplex here
        rows: dict[str, Any] = {"A_ub": self.below, "b_ub": self.bound} if len(self.bound) else {}
        found = linprog(self.cost, A_eq=self.equal, b_eq=self.one, **rows, method="highs-ipm", options=options)
        if found.status == 2:
            return None
        if found.status != 0:
            raise _unsolved(found)
        y, z = found.eqlin.marginals, np.minimum(found.ineqlin.marginals, 0.0)
        reduced = self.cost - self.equal.T @ y - self.below.T @ z
        floor = y @ self.one + z @ self.bound + np.minimum(reduced, 0.0).sum()
        return floor, np.maximum(reduced, 0.0)


def _infeasible(limits: Sequence[Limit], reachable: Sequence[tuple[float, float]], cuts: int) -> Infeasible:
    wrong = []
    for limit, (small, large) in zip(limits, reachable, strict=True):
        unit = limit.prices.unit
        if small > limit.at_most + limit.slack:
            wrong.append(f"{limit.name} <= {show(limit.at_most, unit)}: the smallest network needs {show(small, unit)}")
        elif large < limit.low - limit.slack:
            wrong.append(f"{limit.name} >= {show(limit.low, unit)}: the largest network has {show(large, unit)}")
    if not wrong:
        alone = ", ".join(
            f"{limit.name} from {show(small, unit)}"
            for limit, (small, _) in zip(limits, reachable, strict=True)
            for unit in [limit.prices.unit]
        )
        wrong.append(
            "the limits cannot be kept all at once"
            + (f" beside {cuts} excluded architectures" if cuts else "")
            + (f" (each alone is reachable: {alone})" if alone else "")
        )
    error = Infeasible("no network is within budget: " + "; ".join(wrong))
    error.reachable = reachable
    return error


def _unsolved(found: Any, best: Architecture | None = None, gap: float = math.inf) -> Unsolved:
    if found.status == 1:
        known = f" (one within {gap:.1g} of it is known)" if best else ""
        error = Unsolved(f"no proven best network within the time limit{known}: allow more seconds, or a larger gap")
    else:
        error = Unsolved(f"the solver failed on the knapsack: {found.message}")
    error.best, error.gap = best, gap
    return error


def _check(values: Options, limits: Sequence[Limit], parents: Parents, cuts: Sequence[Cut]) -> None:
    """Raise where values, prices, parents and cuts do not speak of the same decisions and options."""
    for path, row in values.items():
        if not row:
            raise UserError(f"decision {path!r} has no options")
        _finite("value", path, row)
    for limit in limits:
        _same(values, limit.prices.options, f"no {limit.name}")
        _same(limit.prices.options, values, "no value")
        for path, row in limit.prices.options.items():
            _finite(limit.name, path, row)
        for ends, pairs in limit.prices.pairs.items():
            if any(path in parents or path not in values for path in ends):
                raise UserError(
                    f"{' and '.join(ends)} have a {limit.name} together: only decisions of the top level can"
                )
            if set(pairs) != set(product(values[ends[0]], values[ends[1]])):
                raise UserError(f"not all options of {' and '.join(ends)} have a {limit.name} together, or too many")
            _finite(limit.name, " and ".join(ends), pairs)
        if not math.isfinite(limit.prices.constant) or math.isnan(limit.at_most):
            raise UserError(
                f"the limit of {limit.name} is no number: {limit.at_most}, constant {limit.prices.constant}"
            )
    cut_choices = chain.from_iterable(choices.items() for choices, _ in cuts)
    for path, option in chain(cut_choices, (parents[path] for path in values if path in parents)):
        if option not in values.get(path, ()):
            raise UserError(f"option {option!r} of decision {path!r} has no value")
    for path in values:
        outer, depth = path, 0
        while outer in parents:
            outer, depth = parents[outer][0], depth + 1
            if depth > len(values):
                raise UserError(f"decision {path!r} is nested in itself")


def _same(given: Options, other: Options, missing: str) -> None:
    for path, row in given.items():
        if path not in other:
            raise UserError(f"decision {path!r} has {missing}")
        for option in row:
            if option not in other[path]:
                raise UserError(f"option {option!r} of decision {path!r} has {missing}")


def _finite(name: str, path: str, row: Mapping[Any, float]) -> None:
    for option, number in row.items():
        if not math.isfinite(number):
            raise UserError(f"option {option!r} of decision {path!r} has the {name} {number}, which is not finite")


def _verify(architecture: Architecture, values: Options, parents: Parents, cuts: Sequence[Cut]) -> None:
    """Raise if an answer of the solver is no architecture or contains what was cut off: solvers have been wrong."""
    active = {path for path in values if path not in parents or _chosen(architecture, parents[path])}
    if set(architecture) != active or any(option not in values[path] for path, option in architecture.items()):
        raise Unsolved("the solver failed on the knapsack: its answer is no architecture")
    for choices, most in cuts:
        if sum(_chosen(architecture, choice) for choice in choices.items()) > most:
            raise Unsolved("the solver failed on the knapsack: its answer is one that was excluded")


def _chosen(architecture: Architecture, choice: tuple[str, Option]) -> bool:
    return choice[0] in architecture and architecture[choice[0]] == choice[1]
