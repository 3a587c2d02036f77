"""One supernet for all budgets, every option alive to the end: what FBNet, ProxylessNAS, DARTS and RARTS share.

The structural decisions are settled by a race first. Then the logits are learned; then, for each budget, networks are
drawn around them within it, trained briefly, and the best is taken. What is new in a paper is how options are mixed and
how a step is made: a subclass of `Supernet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options, expected
from netsmith.decisions import Architecture, OneOf, decisions
from netsmith.gates import Gate, draw, uniform_path
from netsmith.run import Run
from netsmith.search.differentiable import CostLoss, Searcher, Steps, learn
from netsmith.search.problem import Problem, prefer
from netsmith.search.race import Finals, finalists, race, settle
from netsmith.search.sampling import capacity


class Method(Protocol):
    """What such a method's dataclass has."""

    @property
    def steps(self) -> Steps: ...
    @property
    def cost(self) -> CostLoss: ...
    @property
    def finals(self) -> Finals: ...


class Supernet(Searcher):
    """The supernet of a problem, restricted to the structures that some budget chose; logits aim at ``budgets``."""

    method: Any
    """The `Method`, as the subclass knows it."""

    def __init__(
        self, method: Any, problem: Problem, budgets: Sequence[Budget], chosen: Sequence[Architecture]
    ) -> None:
        self.method, self.problem = method, problem
        self.targets = {b.metric: b.limit for b in budgets if b.metric in problem.prices}
        self.supernet = problem.build()
        restrict(self.supernet, chosen)
        self.progress = 0.0
        self.structural = set(problem.structural)

    def gate(self, *, learning: bool) -> Gate:
        """How a decision that is searched is mixed in the next pass."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        found = decisions(self.supernet)
        return [d.logits for path, d in found.items() if path not in self.structural and len(d.options) > 1]

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        self.mix(self.supernet, generator, self.gate(learning=learning))

    def mix(self, network: nn.Module, generator: torch.Generator, gate: Gate) -> None:
        """Draw for this supernet or a copy of it; structures take turns, since mixing them would cost one each."""
        gates = {path: uniform_path if path in self.structural else gate for path in decisions(network)}
        draw(network, gates, generator)

    def objective(self, loss: Tensor) -> Tensor:
        return self.method.cost(loss, self.costs(), self.targets)

    def costs(self) -> dict[str, Tensor]:
        """Of the mixture that was drawn."""
        return {name: expected(self.supernet, self.problem.prices[name], drawn=True) for name in self.targets}

    def stepped(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        self.progress = progress

    def describe(self) -> dict[str, Any]:
        found = {path: d for path, d in decisions(self.supernet).items() if isinstance(d, OneOf) and len(d.options) > 1}
        with torch.no_grad():
            costs = {name: expected(self.supernet, self.problem.prices[name]).item() for name in self.targets}
            probabilities = {path: d.logits.softmax(0).tolist() for path, d in found.items()}
        return {
            "expected": costs,
            "target": self.targets.get("latency"),
            "probabilities": {
                path: dict(zip(found[path].options, p, strict=True)) for path, p in probabilities.items()
            },
        }

    def state(self) -> dict[str, Any]:
        return {**super().state(), "progress": self.progress}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.progress = state["progress"]

    def values(self) -> Options:
        """log p of every option, relative to the best of its decision, and a little capacity.

        Relative, because otherwise a block whose width is open would count with log p twice, and lose to a skip that
        has nothing inside. The capacity keeps slack from being left unspent. Where a rule says how many of several
        decisions are not idle (two edges into a node of DARTS), these compete with log p itself and idling counts
        nothing: the best by log p are those that DARTS takes (section 2.4).
        """
        values = {path: dict(row) for path, row in capacity(self.problem).items()}
        for path, decision in decisions(self.supernet).items():
            if path not in self.structural:
                below_best = (decision.logits.detach() - decision.logits.detach().max()).tolist()
                for option, value in zip(decision.options, below_best, strict=True):
                    values[path][option] = value + 0.05 * values[path][option]
        for rule in self.problem.outline.rules:
            for path in rule.paths if rule.at_least == rule.at_most else ():
                decision = decisions(self.supernet)[path]
                log_p = dict(zip(decision.options, decision.logits.detach().log_softmax(0).tolist(), strict=True))
                values[path] = {option: 0.0 if option == rule.idle else log_p[option] for option in values[path]}
        return values


def search_supernet(method: Method, problem: Problem, run: Run, name: str, kind: type[Supernet]) -> list[Options]:
    """The whole search with a searcher of ``kind``, which aims at the middle one of the budgets."""
    finals = method.finals
    chosen = [
        settle(problem, run, f"{name}-settle-{i}", budgets, capacity(problem), finals.epochs)
        for i, budgets in enumerate(problem.budgets)
    ]
    middle = sorted(problem.budgets, key=lambda budgets: [b.limit for b in budgets])[len(chosen) // 2]
    searcher = learn(problem, run, name, lambda: kind(method, problem, middle, chosen), method.steps)
    assert isinstance(searcher, Supernet)
    found = []
    for i, budgets in enumerate(problem.budgets):
        generator = torch.Generator().manual_seed(run.seed(f"finalists-{i}"))
        values = prefer(searcher.values(), chosen[i], 1e3)
        drawn = finalists(problem, budgets, values, finals, generator)
        best, _ = race(problem, run, f"{name}-finalists-{i}", drawn, epochs=finals.epochs)[0]
        found.append(prefer(values, best, 1e3))
    return found


def restrict(supernet: nn.Module, chosen: Sequence[Architecture]) -> None:
    """Remove every structural option that no budget chose."""
    for path in dict.fromkeys(path for choice in chosen for path in choice):
        decision = decisions(supernet).get(path)
        if decision is None:  # went with the option that it was nested in
            continue
        kept = {choice[path] for choice in chosen if path in choice}
        for option in [option for option in decision.options if option not in kept]:
            decision.remove(option)
