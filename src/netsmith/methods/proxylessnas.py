"""ProxylessNAS (Cai et al. 2019, arXiv:1812.00332): binary gates, so that a search takes the memory of one path.

A weight step runs one option of each decision, drawn from the probabilities. An architecture step runs two, one of them
active, and sends the gradient to the logits through the gates (section 3.2), or scores whole sampled networks and needs
no gradient of anything (REINFORCE, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from netsmith.blocks.reparam import NO_PATH, is_branch
from netsmith.cost.prices import Options, expected
from netsmith.decisions import Decision, Draw, decisions
from netsmith.gates import Gate, binary, draw, single_path, softmax, two_path
from netsmith.run import Run
from netsmith.search.differentiable import Batch, CostLoss, Loop, Steps
from netsmith.search.problem import Problem
from netsmith.search.race import Finals
from netsmith.search.supernet import Supernet, search_supernet


def _steps() -> Steps:
    return Steps(rhythm=5, architecture_momentum=0.0, architecture_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class ProxylessNAS:
    """One supernet for all budgets; constants are those of the official repository where it has one."""

    steps: Steps = field(default_factory=_steps)
    """How the supernet is trained: five weight steps to one of the architecture, Adam on the logits with beta_1 = 0
    and no decay, so that a logit that was not drawn does not move. (Rate 0.001 over 120 epochs in the paper.)"""
    gradient: Literal["two_path", "binary", "reinforce"] = "two_path"
    """Of the logits. two_path: through two options of each decision; binary: through all of them, one running at a
    time; reinforce: of the reward of sampled networks."""
    cost: CostLoss = field(default_factory=CostLoss)
    """How latency enters the loss of the gradient forms. In the paper: loss + lambda * E[latency]."""
    networks: PositiveInt = 10
    """reinforce: networks sampled in a step (M)."""
    exponent: NonNegativeFloat = 0.1
    """reinforce: reward = accuracy * (target / latency)^exponent."""
    baseline_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """reinforce: of the mean reward that is subtracted. It is updated after the advantage is formed: the official code
    does so before, which takes nearly all of the signal between two steps away."""
    finals: Finals = field(default_factory=Finals)
    """Networks drawn around the result (ours; the paper takes the most probable option of each decision)."""

    def refuses(self, decision: Decision) -> str | None:
        """Why a decision cannot be searched, None for one that can."""
        return NO_PATH if is_branch(decision) else None

    def search(self, problem: Problem, run: Run) -> list[Options]:
        kind = Sampled if self.gradient == "reinforce" else Gated
        return search_supernet(self, problem, run, "proxylessnas", kind)


class Gated(Supernet):
    """Binary gates with their gradient estimate."""

    method: ProxylessNAS

    def gate(self, *, learning: bool) -> Gate:
        if not learning:
            return single_path
        return two_path if self.method.gradient == "two_path" else binary

    def costs(self) -> dict[str, Tensor]:
        """Expected over all options of the structure that was drawn, E = sum_j p_j F(o_j), with the gradient of the
        pairs: the logits of all others have to stay where they are."""
        pairs = super().costs()
        drawn = {path: decision.drawn for path, decision in decisions(self.supernet).items()}
        with torch.no_grad():
            gates = {path: again(d) if d and path in self.structural else softmax for path, d in drawn.items()}
            draw(self.supernet, gates, torch.Generator())
            whole = super().costs()
        for path, decision in decisions(self.supernet).items():
            decision.drawn = drawn[path]
        return {name: whole[name] + (pair - pair.detach()) for name, pair in pairs.items()}

    def architecture_step(self, loop: Loop, batch: Batch, beside: Batch | None) -> Tensor:
        before = {path: d.logits.detach().clone() for path, d in decisions(self.supernet).items()}
        loss = super().architecture_step(loop, batch, beside)
        for path, decision in decisions(self.supernet).items():
            if path not in self.structural and decision.drawn is not None:
                keep_share(decision, before[path])
        return loss


def again(drawn: Draw) -> Gate:
    """A gate that draws what was drawn before."""
    return lambda logits, generator: drawn


@torch.no_grad()
def keep_share(decision: Decision, before: Tensor) -> None:
    """Shift the logits that were drawn so that together they are as probable as before the step: the probabilities of
    all others then stay as they were (section 3.2.1)."""
    assert decision.drawn is not None
    drawn = decision.drawn.indices
    decision.logits[drawn] -= decision.logits[drawn].logsumexp(0) - before[drawn].logsumexp(0)


class Sampled(Gated):
    """REINFORCE: d/dalpha E[R] = E[(R - b) d/dalpha log p(network)]."""

    baseline: float | None = None
    """b, the moving mean of the rewards."""

    def gate(self, *, learning: bool) -> Gate:
        return single_path

    def architecture_step(self, loop: Loop, batch: Batch, beside: Batch | None) -> Tensor:
        images, labels = batch
        rewards, chances, losses = [], [], []
        for _ in range(self.method.networks):
            self.draw(loop.generator, learning=True)
            with torch.no_grad():  # batch norm runs on the batch, as in the paper
                scores = self.supernet(images)
                costs = {name: expected(self.supernet, self.problem.prices[name], drawn=True) for name in self.targets}
            losses.append(F.cross_entropy(scores, labels))
            accuracy = (scores.argmax(1) == labels).float().mean().item()
            rewards.append(self.reward(accuracy, costs))
            chances.append(self._log_probability())
        baseline = sum(rewards) / len(rewards) if self.baseline is None else self.baseline
        advantage = torch.tensor([reward - baseline for reward in rewards])
        loop.architecture.zero_grad()
        (-(advantage * torch.stack(chances)).mean()).backward()
        loop.architecture.step()
        decay = self.method.baseline_decay
        self.baseline = decay * baseline + (1 - decay) * sum(rewards) / len(rewards)
        return torch.stack(losses).mean()

    def reward(self, accuracy: float, costs: dict[str, Tensor]) -> float:
        """R = accuracy * (target / cost)^exponent, with the cost that exceeds its target most."""
        share = max((cost.item() / self.targets[name] for name, cost in costs.items()), default=1.0)
        return accuracy * share**-self.method.exponent

    def _log_probability(self) -> Tensor:
        """Of the network that was drawn."""
        found = {p: d for p, d in decisions(self.supernet).items() if p not in self.structural and d.drawn is not None}
        return torch.stack([d.logits.log_softmax(0)[d.drawn.indices[0]] for d in found.values()]).sum()  # pyright: ignore

    def state(self) -> dict:
        return {**super().state(), "baseline": self.baseline}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.baseline = state["baseline"]
