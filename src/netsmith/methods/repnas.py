"""RepNAS (Zhang et al. 2021, arXiv:2109.03508): which branches of blocks that fold are worth training.

In every step noise on the logits decides which K branches of the whole network run. One loss teaches the weights, and
the logits of the branches that ran. What ships is one convolution a block, whatever was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from netsmith.blocks.reparam import is_branch
from netsmith.cost.budget import TOLERANCE, Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Decision, Draw, Rule, decisions
from netsmith.errors import UserError
from netsmith.run import Run
from netsmith.search.differentiable import LONGEST, Batch, Loop, Searcher, Steps, learn, task_loss, weights
from netsmith.search.problem import Problem


def _steps() -> Steps:
    return Steps(warmup_epochs=5)


@dataclass(frozen=True, kw_only=True)
class RepNAS:
    """One supernet for all budgets, each of which keeps its own number of the best branches."""

    steps: Steps = field(default_factory=_steps)
    """How the supernet is trained, on ``train`` alone: a third of it with branches drawn uniformly (15 of 50 epochs in
    the paper), then weights and logits together, the rates of both along a cosine. (Rate of the logits: 1e-4 over 35
    epochs of ImageNet.)"""
    kept_ratio: Annotated[float, Field(gt=0, le=1)] = 0.34
    """Of all branches, how many are kept where no budget on branches says (official code; 44 of 132)."""

    def __post_init__(self) -> None:
        if self.steps.rhythm:
            raise UserError(
                f"RepNAS teaches weights and logits in one step: steps.rhythm is {self.steps.rhythm}; allowed: 0"
            )

    def refuses(self, decision: Decision) -> str | None:
        """Why a decision cannot be searched, None for one that can."""
        if is_branch(decision):
            return None
        return "is not whether a branch is on or off, and RepNAS keeps the best branches of all"

    def search(self, problem: Problem, run: Run) -> list[Options]:
        counts = [self.count(problem, budgets) for budgets in problem.budgets]
        middle = sorted(counts)[len(counts) // 2]
        searcher = learn(problem, run, "repnas", lambda: Sampled(problem, middle), self.steps)
        assert isinstance(searcher, Sampled)
        return [searcher.values(count) for count in counts]

    def count(self, problem: Problem, budgets: Sequence[Budget]) -> int:
        """Branches to keep (K)."""
        total = len(problem.outline.options)
        asked = min((b.limit for b in budgets if b.metric == "branches"), default=self.kept_ratio * total)
        return min(total, math.floor(asked * (1 + TOLERANCE)))


class Sampled(Searcher):
    """The supernet, of which ``count`` branches run at a time."""

    joint = True

    def __init__(self, problem: Problem, count: int) -> None:
        self.supernet, self.count = problem.build(), count
        self.branches, self.rules = decisions(self.supernet), problem.outline.rules

    def parameters(self) -> list[nn.Parameter]:
        return [branch.logits for branch in self.branches.values()]

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        """r = alpha + G - G', G and G' Gumbel noise; the largest r run, times 1 with the gradient of sigma(r)."""
        noise = logistic(len(self.branches), generator)
        noisy = {path: alpha(branch) + n for (path, branch), n in zip(self.branches.items(), noise, strict=True)}
        kept = largest({path: r.item() for path, r in noisy.items()}, self.count, self.rules)
        for path, branch in self.branches.items():
            if path in kept:
                share = noisy[path].sigmoid().reshape(1)
                branch.drawn = Draw([branch.index("on")], 1 + (share - share.detach()))
            else:  # a draw of its own for each: what did not run has no gradient, so Adam lets it be
                branch.drawn = Draw([branch.index("off")], torch.ones(1))

    def weight_step(self, loop: Loop, batch: Batch) -> Tensor:
        """One step of the weights and, after the warm-up, of the logits of the branches that ran."""
        self.draw(loop.generator, learning=loop.learning)
        loss = task_loss(self.supernet, batch)
        loop.weights.zero_grad()
        loop.architecture.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights(self.supernet), LONGEST)
        loop.weights.step()
        if loop.learning:
            loop.architecture.step()
        return loss

    def sweep(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        """The rate of the logits falls along a cosine as well."""
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * optimizer.defaults["lr"] * (1 + math.cos(math.pi * progress))
        return []

    def shares(self) -> dict[str, float]:
        """sigma(alpha) of every branch."""
        return {path: alpha(branch).detach().double().sigmoid().item() for path, branch in self.branches.items()}

    def describe(self) -> dict[str, Any]:
        return {"probabilities": {path: {"on": share, "off": 1 - share} for path, share in self.shares().items()}}

    def values(self, count: int) -> Options:
        """sigma(alpha) where a branch is on; of all but the ``count`` largest 1 less, so that the knapsack leaves them
        off without a budget on branches, too."""
        shares = self.shares()
        kept = largest(shares, count, self.rules)
        return {path: {"on": share - (path not in kept), "off": 0.0} for path, share in shares.items()}


def alpha(branch: Decision) -> Tensor:
    """The one logit of a branch; that of "off" stays 0."""
    return branch.logits[branch.index("on")]


def logistic(count: int, generator: torch.Generator) -> Tensor:
    """Differences of two Gumbel variables, ``(count,)``."""
    uniform = torch.rand(2, count, generator=generator, dtype=torch.float64).clamp_min(1e-20)
    first, second = -(-uniform.log()).log()
    return (first - second).float()


def largest(scores: Mapping[str, float], count: int, rules: Sequence[Rule]) -> set[str]:
    """The ``count`` branches with the largest scores, among them the best of every block that needs one (where the
    official code falls back to the 3x3)."""

    def best(paths: Sequence[str], many: int) -> list[str]:
        return sorted(paths, key=lambda path: -scores[path])[:many]

    needed = [path for rule in rules for path in best(rule.paths, rule.at_least)]
    others = [path for path in scores if path not in needed]
    return {*needed, *best(others, max(0, count - len(needed)))}
