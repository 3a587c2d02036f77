"""FBNet (Wu et al. 2019, arXiv:1812.03443): Gumbel-softmax over blocks, loss times a power of log-latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options, expected
from netsmith.decisions import OneOf, decisions
from netsmith.gates import Gumbel, draw, single_path, uniform_path
from netsmith.run import Run
from netsmith.search.differentiable import CostLoss, Steps, learn
from netsmith.search.problem import Problem, prefer
from netsmith.search.race import finalists, race, settle
from netsmith.search.sampling import capacity


@dataclass(frozen=True, kw_only=True)
class FBNet:
    """One supernet for all budgets: its options stay alive, so every budget is one more knapsack."""

    steps: Steps = field(default_factory=Steps)
    """How the supernet is trained."""
    temperature: PositiveFloat = 5.0
    """Of the Gumbel-softmax at the start (tau, section 3.2)."""
    cooling: Annotated[float, Field(gt=0, le=1)] = 0.956
    """Factor on the temperature each epoch; at 90 epochs the paper ends at 5 * exp(-0.045 * 90) = 0.087."""
    paths: Literal["all", "one"] = "all"
    """What a weight step runs in each layer. all: every block, mixed, as in the paper; one: a single block drawn from
    the probabilities (ours; an eighth of the time)."""
    cost: CostLoss = field(default_factory=CostLoss)
    """How latency enters the architecture loss; the paper's is the power form."""
    samples: PositiveInt = 6
    """Networks drawn around the result and trained briefly; the best is kept (section 4.1 samples too)."""
    noise: NonNegativeFloat = 1.0
    """Gumbel noise on the values when drawing them: 1 samples in proportion to the probabilities (ours)."""
    race_epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2,)
    """Length of the short trainings (ours)."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        start = capacity(problem)
        chosen = [
            settle(problem, run, f"fbnet-settle-{i}", budgets, start, self.race_epochs)
            for i, budgets in enumerate(problem.budgets)
        ]
        middle = sorted(problem.budgets, key=lambda budgets: [b.limit for b in budgets])[len(chosen) // 2]
        searcher = learn(
            problem,
            run,
            "fbnet",
            lambda: _Supernet(self, problem, middle, chosen),
            self.steps,
        )
        assert isinstance(searcher, _Supernet)
        found = []
        for i, budgets in enumerate(problem.budgets):
            generator = torch.Generator().manual_seed(run.seed(f"finalists-{i}"))
            values = prefer(searcher.values(), chosen[i], 1e3)
            drawn = finalists(problem, budgets, values, self.samples, generator, self.noise)
            best, _ = race(problem, run, f"fbnet-finalists-{i}", drawn, epochs=self.race_epochs)[0]
            found.append(prefer(values, best, 1e3))
        return found


class _Supernet:
    """The stochastic super net of section 3.1, restricted to the structures that some budget chose."""

    def __init__(self, method: FBNet, problem: Problem, target: Sequence[Budget], chosen: list[dict]) -> None:
        self.method, self.problem = method, problem
        self.targets = {b.metric: b.limit for b in target if b.metric in problem.prices}
        self.supernet = problem.build()
        restrict(self.supernet, chosen)
        self.progress = 0.0
        self.structural = set(problem.structural)

    def parameters(self) -> list[nn.Parameter]:
        found = decisions(self.supernet)
        return [d.logits for path, d in found.items() if path not in self.structural and len(d.options) > 1]

    @property
    def temperature(self) -> float:
        # Written over progress, so that a short search cools as far as the paper's 90 epochs.
        return self.method.temperature * self.method.cooling ** (90 * self.progress)

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        gumbel = Gumbel(self.temperature)
        layer = single_path if not learning and self.method.paths == "one" else gumbel
        gates = {path: uniform_path if path in self.structural else layer for path in decisions(self.supernet)}
        draw(self.supernet, gates, generator)

    def objective(self, loss: Tensor) -> Tensor:
        prices = self.problem.prices
        costs = {name: expected(self.supernet, prices[name], drawn=True) for name in self.targets}
        return self.method.cost(loss, costs, self.targets)

    def stepped(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        self.progress = progress

    def sweep(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        return []

    def describe(self) -> dict[str, Any]:
        return describe(self.supernet, self.problem, self.targets)

    def state(self) -> dict[str, Any]:
        return {"supernet": self.supernet.state_dict(), "progress": self.progress}

    def restore(self, state: dict[str, Any]) -> None:
        self.supernet.load_state_dict(state["supernet"])
        self.progress = state["progress"]

    def values(self) -> Options:
        """log p of every option, relative to the best of its decision, and a little capacity.

        Relative, because otherwise a block whose width is open would count with log p twice, and lose to a skip that
        has nothing inside. The capacity keeps slack from being left unspent.
        """
        values = {path: dict(row) for path, row in capacity(self.problem).items()}
        for path, decision in decisions(self.supernet).items():
            if path not in self.structural:
                below_best = (decision.logits.detach() - decision.logits.detach().max()).tolist()
                for option, value in zip(decision.options, below_best, strict=True):
                    values[path][option] = value + 0.05 * values[path][option]
        return values


def restrict(supernet: nn.Module, chosen: Sequence[dict]) -> None:
    """Remove every structural option that no budget chose."""
    for path in dict.fromkeys(path for choice in chosen for path in choice):
        decision = decisions(supernet).get(path)
        if decision is None:  # went with the option that it was nested in
            continue
        kept = {choice[path] for choice in chosen if path in choice}
        for option in [option for option in decision.options if option not in kept]:
            decision.remove(option)


def describe(supernet: nn.Module, problem: Problem, targets: dict[str, float]) -> dict[str, Any]:
    """Probabilities of every open choice and the expected costs."""
    found = {path: d for path, d in decisions(supernet).items() if isinstance(d, OneOf) and len(d.options) > 1}
    with torch.no_grad():
        costs = {name: expected(supernet, problem.prices[name]).item() for name in targets}
    return {
        "expected": costs,
        "target": targets.get("latency"),
        "probabilities": {
            path: dict(zip(d.options, d.logits.detach().softmax(0).tolist(), strict=True)) for path, d in found.items()
        },
    }
