"""FBNet (Wu et al. 2019, arXiv:1812.03443): Gumbel-softmax over blocks, loss times a power of log-latency."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from netsmith.blocks.reparam import NO_PATH, is_branch
from netsmith.cost.prices import Options
from netsmith.decisions import Decision
from netsmith.gates import Gate, Gumbel, single_path
from netsmith.run import Run
from netsmith.search.differentiable import CostLoss, Steps
from netsmith.search.problem import Problem
from netsmith.search.race import Finals
from netsmith.search.supernet import Supernet, search_supernet


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
    finals: Finals = field(default_factory=Finals)
    """Networks drawn around the result (section 4.1 samples too)."""

    def refuses(self, decision: Decision) -> str | None:
        """Why a decision cannot be searched, None for one that can."""
        return NO_PATH if self.paths == "one" and is_branch(decision) else None

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return search_supernet(self, problem, run, "fbnet", Stochastic)


class Stochastic(Supernet):
    """The stochastic super net of section 3.1."""

    method: FBNet

    @property
    def temperature(self) -> float:
        # Written over progress, so that a short search cools as far as the paper's 90 epochs.
        return self.method.temperature * self.method.cooling ** (90 * self.progress)

    def gate(self, *, learning: bool) -> Gate:
        return single_path if not learning and self.method.paths == "one" else Gumbel(self.temperature)
