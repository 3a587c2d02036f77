"""What is asked: a task, a space, budgets and a device, with everything priced. All that a method gets to see."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from netsmith.architecture import Outline, extreme, mutate, outline
from netsmith.cost.bits import BitOps, QuantizedFileBytes
from netsmith.cost.budget import Budget, show, within
from netsmith.cost.counts import BranchCount, Flash, Macs, Params, Shape
from netsmith.cost.memory import ALIVE, moments
from netsmith.cost.prices import Atom, Options, Prices, atoms, tabulate, tabulate_all
from netsmith.decisions import Architecture, OneOf, Option, decisions, derive
from netsmith.graph.slimmable import Slimmable
from netsmith.search.allocate import Infeasible, Limit, Unsolved, allocate, diverse
from netsmith.tasks.classification import Task
from netsmith.train.recipe import Recipe

COUNTED = {
    "params": Params(),
    "macs": Macs(),
    "file": QuantizedFileBytes(),
    "flash": Flash(),
    "branches": BranchCount(),
    "bitops": BitOps(),
}
"""Costs that add up over layers and need no device."""
SELDOM = ("flash", "bitops")
"""Those of them that are counted only where a budget asks for them: to count one takes a second or two."""
LEARNT = "learnt.safetensors"
"""In the folder of a run: weights that a method has taught the space, which every network made of it then has."""
FILL = 0.95
"""The share of a limit that the networks of a search use, where any network can."""
LAST_RESORT = -1e9
"""Added to an option's value, it is taken only where no network keeps the budgets without it."""
CUTS, CHANGES = 30, 300
"""How long a network within peak memory is looked for: most valuable networks, then changes of the best of them."""


def taught(method: str, number: int) -> str:
    """In the folder of a run: weights that a method has given the space for its network number so and so alone."""
    return f"{method}-{number}.safetensors"


@dataclass
class Problem:
    """A search problem. Methods learn a value per option and leave the rest to the knapsack and the promise loop."""

    task: Task
    """Without its ``test`` split."""
    build: Callable[[], nn.Module]
    """Makes a fresh supernet; the same weights every time it is called."""
    budgets: list[list[Budget]]
    """One list of simultaneous budgets, absolute, per network that is wanted; an empty one limits nothing."""
    latency: Prices
    """Milliseconds on the device, calibrated on whole networks."""
    recipe: Recipe
    """How a final network is trained; short trainings scale it down."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.task = self.task.without_test()
        self._moments: dict[str, list[Prices]] = {}

    @property
    def input_shape(self) -> Shape:
        return self.task.input_shape

    @cached_property
    def shapes(self) -> nn.Module:
        """The supernet without numbers: for counting."""
        with torch.device("meta"):
            return self.build()

    @cached_property
    def supernet(self) -> nn.Module:
        """The supernet that networks are derived from. Nobody trains it: methods build their own."""
        return self.build()

    @cached_property
    def outline(self) -> Outline:
        return outline(self.shapes)

    @property
    def parents(self) -> dict[str, tuple[str, str]]:
        return self.outline.parents

    @cached_property
    def prices(self) -> dict[str, Prices]:
        """Prices of every cost that adds up."""
        usual = {name: price for name, price in COUNTED.items() if name not in SELDOM}
        return OnDemand(self, {"latency": self.latency, **tabulate_all(self.shapes, usual, self.input_shape)})

    @cached_property
    def work(self) -> Prices:
        """MACs of every option in training: those that ship, and those of branches that fold away."""
        if not any(hasattr(part, "folded") for part in self.shapes.modules()):
            return self.prices["macs"]
        return tabulate(self.shapes, Macs(trained=True), self.input_shape)

    @cached_property
    def atoms(self) -> list[Atom]:
        return atoms(self.shapes, self.input_shape)

    @cached_property
    def structural(self) -> list[str]:
        """Decisions whose options hold further layers to decide: strides, stage widths."""
        found = decisions(self.shapes)
        return sorted({outer for path, (outer, _) in self.parents.items() if isinstance(found[path], OneOf)})

    @cached_property
    def reference(self) -> Architecture:
        """The network that the space was made of, or the dearest one; relative budgets are relative to it. What a
        device does not notice, the branches that fold away, is in it as well."""
        if made_of := getattr(self.shapes, "reference", None):
            return made_of
        branches = self.prices["branches"].options
        dearest = {p: {o: ms + 1e-9 * branches[p][o] for o, ms in row.items()} for p, row in self.latency.alone.items()}
        return extreme(dearest, self.parents, self.outline.rules, largest=True)

    def plain(self, architecture: Mapping[str, Option]) -> nn.Module:
        """The network of ``architecture`` without numbers: for counting."""
        return derive(self.shapes, architecture)

    def network(self, architecture: Mapping[str, Option]) -> nn.Module:
        """The network of ``architecture``, weights as the supernet is built."""
        return derive(self.supernet, architecture)

    def predicted(self, budget: Budget, architecture: Mapping[str, Option]) -> float:
        """The cost that ``budget`` limits, in its base unit."""
        if self.adds_up(budget.metric):
            return max(prices.of(architecture) for prices in self.sums(budget.metric))
        return ALIVE[budget.metric](self.plain(architecture), self.input_shape)

    def adds_up(self, metric: str) -> bool:
        """Whether a limit on it is one on sums of prices. Of memory it is where only widths are open."""
        return metric in self.prices or isinstance(self.shapes, Slimmable)

    def sums(self, metric: str) -> list[Prices]:
        """What the metric is the largest of: one price, or for memory one a moment."""
        if metric not in self.prices and metric not in self._moments:
            assert isinstance(self.shapes, Slimmable)
            widths = {path: [int(n) for n in row] for path, row in self.outline.options.items()}
            self._moments[metric] = moments(self.shapes, widths, self.input_shape, ALIVE[metric])
        return [self.prices[metric]] if metric in self.prices else self._moments[metric]

    def limits(self, budgets: Sequence[Budget], scale: Mapping[str, float] | None = None) -> list[Limit]:
        """The budgets as knapsack limits, those of memory as one for each moment, where that can be; ``scale`` corrects
        a limit by what measuring has shown."""
        return [
            Limit(prices, budget.limit * (scale or {}).get(budget.metric, 1.0), name=budget.metric)
            for budget in budgets
            if self.adds_up(budget.metric)
            for prices in self.sums(budget.metric)
        ]

    def allocate(
        self,
        values: Options,
        budgets: Sequence[Budget],
        scale: Mapping[str, float] | None = None,
        *,
        least: float = 0.0,
    ) -> Architecture:
        """The most valuable architecture within ``budgets`` as predicted; an option without a value is out, and one
        with a value as low as `LAST_RESORT` wherever that is possible.

        ``least``: the share of a limit to use, of one limit where there are several. A search whose expected cost is at
        the budget may well have a cheap network as its most probable one: this asks for the most probable one *at* the
        budget. Not asked where no network is there, nor beside peak memory.

        Peak memory does not add up. Where only widths are open, it is a limit on every moment. Elsewhere an
        option whose block alone exceeds the limit is out; if the network as a whole
        still exceeds it, it is cut off and the knapsack solved again, and after `CUTS` of them single changes lead from
        there to a network that keeps it: a good one, no longer the best.

        Raises: Infeasible, naming the smallest reachable cost.
        """
        liked = {path: {o: v for o, v in row.items() if v > LAST_RESORT / 2} or row for path, row in values.items()}
        if liked != values:
            with suppress(Infeasible):
                return self.allocate(liked, budgets, scale, least=least)
            values = {  # still the last, but no longer so far off that the solver sees nothing else
                path: {o: v if v > LAST_RESORT / 2 else v - LAST_RESORT - 1e4 for o, v in row.items()}
                for path, row in values.items()
            }
        memory = [b for b in budgets if b.metric in ALIVE]
        additive = all(self.adds_up(b.metric) for b in memory)
        for budget in () if additive else memory:
            if (fitting := self._fitting(values, budget)) is None:
                raise Infeasible(
                    f"no network is within budget: {budget.metric} <= {show(budget.limit, 'B')}: "
                    f"the smallest network found needs {show(self._least_memory(values, budget.metric), 'B')}"
                )
            values = fitting
        values = _reachable(values, self.parents)
        limits = [replace(limit, prices=_restricted(limit.prices, values)) for limit in self.limits(budgets, scale)]
        if additive:
            return self._filling(values, limits, 0.0 if memory else least)
        forbidden: list[Architecture] = []
        while len(forbidden) < CUTS:
            architecture = allocate(values, limits, self.parents, rules=self.outline.rules, forbidden=forbidden)
            if all(within(self.predicted(b, architecture), b.limit) for b in memory):
                return architecture
            forbidden.append(architecture)
        return self._changed(values, limits, memory, forbidden[0])

    def diverse(
        self, values: Options, budgets: Sequence[Budget], k: int, overlap: float, *, time_limit: float = 60.0
    ) -> list[Architecture]:
        """The most valuable architecture within ``budgets`` as predicted, then the best that makes at most ``overlap``
        of its choices again, and so on: up to k. An option without a value is out; peak memory is not looked at.

        Raises: Infeasible; Unsolved where not even the first is found in ``time_limit`` seconds.
        """
        limits = [replace(limit, prices=_restricted(limit.prices, values)) for limit in self.limits(budgets)]
        return diverse(values, limits, self.parents, k, overlap, time_limit=time_limit)

    def _changed(
        self, values: Options, limits: Sequence[Limit], memory: Sequence[Budget], start: Architecture
    ) -> Architecture:
        """A network within ``limits`` and ``memory``, by random single changes of ``start`` that come nearer to them
        or, within them, are worth more. Raises: Infeasible."""
        generator = torch.Generator().manual_seed(0)

        def standing(architecture: Architecture) -> tuple[float, float]:
            if any(option not in values.get(path, ()) for path, option in architecture.items()):
                return math.inf, 0.0
            uses = [limit.price(architecture) / limit.at_most for limit in limits]
            uses += [self.predicted(b, architecture) / b.limit for b in memory]
            return max(0.0, *(use - 1 for use in uses)), -math.fsum(values[p][o] for p, o in architecture.items())

        best, at = start, standing(start)
        for _ in range(CHANGES):
            other = mutate(self.outline, best, generator)
            if (there := standing(other)) < at:
                best, at = other, there
        if at[0] > 0:
            limited = ", ".join(f"{b.metric} <= {show(b.limit, b.unit)}" for b in memory)
            raise Infeasible(
                f"no network within budget: {limited} was found, by cutting off {CUTS} and "
                f"{CHANGES} changes; the nearest exceeds a limit by {100 * at[0]:.2g} %"
            )
        return best

    def _filling(self, values: Options, limits: Sequence[Limit], least: float) -> Architecture:
        best = allocate(values, limits, self.parents, rules=self.outline.rules)
        full = [replace(limit, at_least=least * limit.at_most) for limit in limits]
        if not least or any(limit.holds(best) for limit in full):
            return best
        found = []
        for number, limit in enumerate(full):
            with suppress(Infeasible, Unsolved):
                asked = [*limits[:number], limit, *limits[number + 1 :]]
                found.append(allocate(values, asked, self.parents, rules=self.outline.rules))
        return max(found, key=lambda a: math.fsum(values[p][o] for p, o in a.items()), default=best)

    @cached_property
    def _memory_alone(self) -> Callable[[int, Option | None, str], float]:
        """Of atom number i alone, at a width where it has one: what it takes of a metric of `ALIVE`, bytes."""
        known = {}
        signatures = [atom.signature for atom in self.atoms]

        def alone(i: int, width: Option | None, metric: str) -> float:
            key = signatures[i], width, metric
            if key not in known:
                atom = self.atoms[i]
                known[key] = ALIVE[metric](atom.module if width is None else atom.at(width), atom.shape)
            return known[key]

        return alone

    def largest_block(self, architecture: Mapping[str, Option], metric: str) -> float:
        """The memory of the network's largest block alone, bytes: no more than that of the whole network."""
        active = [
            (i, None if atom.width is None else architecture[atom.width])
            for i, atom in enumerate(self.atoms)
            if atom.owner is None or architecture.get(atom.owner[0]) == atom.owner[1]
        ]
        return max(self._memory_alone(i, width, metric) for i, width in active)

    def _parts_of(self, values: Options) -> list[tuple[int, Atom]]:
        """The atoms with their numbers, but for those of a part of the space that ``values`` leave out."""
        deciding = [atom.width or (atom.owner and atom.owner[0]) for atom in self.atoms]
        return [(i, self.atoms[i]) for i, path in enumerate(deciding) if path is None or path in values]

    def _fitting(self, values: Options, budget: Budget) -> Options | None:
        """Without the options whose block alone exceeds a memory budget; None where a decision has no option left."""
        alone, limit = self._memory_alone, budget.limit
        fitting = {path: dict(row) for path, row in values.items()}
        for i, atom in self._parts_of(values):
            if atom.width is not None:
                widths = sorted(fitting[atom.width])  # a wider block needs no less
                fits = bisect_left(widths, True, key=lambda n, i=i: alone(i, n, budget.metric) > limit)
                fitting[atom.width] = {n: fitting[atom.width][n] for n in widths[:fits]}
            elif alone(i, None, budget.metric) > limit:
                if atom.owner is None:
                    return None
                fitting[atom.owner[0]].pop(atom.owner[1], None)
        # An option whose inner decision has nothing left is out as well, from the inside outwards.
        for path in reversed(list(fitting)):
            if not fitting[path]:
                if path not in self.parents:
                    return None
                outer, option = self.parents[path]
                fitting.get(outer, {}).pop(option, None)
        return fitting

    def _least_memory(self, values: Options, metric: str) -> float:
        """Memory of a small network: one within the lowest limit under which every block alone is."""
        narrowest = {i: None if atom.width is None else min(values[atom.width]) for i, atom in self._parts_of(values)}
        limits = sorted({self._memory_alone(i, width, metric) for i, width in narrowest.items()})

        def fitting_at(limit: float) -> Options | None:
            return self._fitting(values, Budget(metric, limit, "B"))

        least = limits[bisect_left(limits, True, key=lambda limit: fitting_at(limit) is not None)]
        fitting = _reachable(fitting_at(least) or values, self.parents)
        prices = _restricted(self.prices["macs"], fitting).alone
        smallest = extreme(prices, self.parents, self.outline.rules, largest=False)
        return ALIVE[metric](self.plain(smallest), self.input_shape)


class OnDemand(dict[str, Prices]):
    """Prices by their cost, those of `SELDOM` when they are looked up."""

    def __init__(self, problem: Problem, known: Mapping[str, Prices]) -> None:
        super().__init__(known)
        self.problem = problem

    def __contains__(self, name: object) -> bool:
        return name in SELDOM or super().__contains__(name)

    def __missing__(self, name: str) -> Prices:
        if name not in SELDOM:
            raise KeyError(name)
        self[name] = tabulate(self.problem.shapes, COUNTED[name], self.problem.input_shape)
        return self[name]


def _reachable(values: Options, parents: Mapping[str, tuple[str, str]]) -> Options:
    """Without the decisions whose outer option is out."""
    found: Options = {}
    for path, row in values.items():
        if path not in parents or parents[path][1] in found.get(parents[path][0], ()):
            found[path] = row
    return found


def _restricted(prices: Prices, values: Options) -> Prices:
    options = {path: {option: prices.at(path, option) for option in row} for path, row in values.items()}
    pairs = {
        (a, b): {(i, j): price for (i, j), price in row.items() if i in values[a] and j in values[b]}
        for (a, b), row in prices.pairs.items()
    }
    return replace(prices, options=options, pairs=pairs)


def prefer(values: Options, architecture: Mapping[str, Option], weight: float) -> Options:
    """``values`` with a bonus on the options of one architecture: the knapsack then returns it where it fits, and
    otherwise the network within the budget that is nearest to it.

    A width below the chosen one keeps its share of the bonus and a larger one all of it, so that a tightened budget
    shaves widths before it changes blocks, and slack goes into widths.
    """

    def bonus(path: str, option: Option) -> float:
        chosen = architecture.get(path)
        if isinstance(chosen, int) and isinstance(option, int):
            return weight * min(option, chosen) / chosen
        return weight * (chosen == option)

    return {path: {o: value + bonus(path, o) for o, value in row.items()} for path, row in values.items()}
