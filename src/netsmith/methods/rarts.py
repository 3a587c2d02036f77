"""RARTS (Xue et al. 2020, arXiv:2008.03901): two copies of the weights, one for each half of the data, pulled together;
the logits learn from both halves, by first derivatives only.

min over (y, w, alpha) of L_search(y, alpha) + lambda * L_train(w, alpha) + beta / 2 * |y - w|^2, one gradient step on
each in turn (Gauss-Seidel). The equations are the best reading of the abstract and of what is known of the paper;
constants are ours unless a field says otherwise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from netsmith.cost.prices import Options
from netsmith.decisions import decisions
from netsmith.errors import UserError
from netsmith.gates import Gate, softmax
from netsmith.run import Run
from netsmith.search.differentiable import LONGEST, Batch, CostLoss, Loop, Steps, frozen, task_loss, weights
from netsmith.search.problem import Problem
from netsmith.search.race import Finals
from netsmith.search.supernet import Supernet, search_supernet


def _steps() -> Steps:
    return Steps(rhythm=1, learning_rate=0.025, weight_decay=3e-4, architecture_decay=1e-3)


@dataclass(frozen=True, kw_only=True)
class RARTS:
    """One supernet for all budgets, in two copies; blocks and widths alike."""

    steps: Steps = field(default_factory=_steps)
    """As DARTS has them; y takes its steps with the rate, momentum and decay of w."""
    train_weight: NonNegativeFloat = 1.0
    """Of the loss on ``train`` (lambda)."""
    coupling: NonNegativeFloat = 0.1
    """How strongly the two copies pull at each other (beta)."""
    order: Literal["gauss_seidel", "jacobi"] = "gauss_seidel"
    """gauss_seidel: every step sees what the one before has changed (the paper), four passes; jacobi: the logits'
    gradients come from the passes of w and y, two passes."""
    cost: CostLoss = field(default_factory=CostLoss)
    """How costs enter the loss of the logits (ours)."""
    finals: Finals = field(default_factory=Finals)
    """Networks drawn around the result (ours)."""

    def __post_init__(self) -> None:
        if self.steps.rhythm != 1:
            raise UserError(f"RARTS updates w, y and alpha in turn: steps.rhythm is {self.steps.rhythm}; allowed: 1")

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return search_supernet(self, problem, run, "rarts", Pair)


class Pair(Supernet):
    """`supernet` holds w and alpha, `twin` holds y and the same alpha; it is split off when the warm-up ends."""

    method: RARTS
    twin: nn.Module | None = None
    twin_weights: torch.optim.SGD | None = None
    train_loss: Tensor | None = None
    """Of w, in the round that has just been made."""

    def gate(self, *, learning: bool) -> Gate:
        return softmax

    def split(self) -> None:
        self.twin = copy.deepcopy(self.supernet)
        for mine, other in zip(decisions(self.supernet).values(), decisions(self.twin).values(), strict=True):
            other.logits = mine.logits
        self.twin_weights = self.method.steps.descent(weights(self.twin))

    def weight_step(self, loop: Loop, batch: Batch) -> Tensor:
        if self.twin is None:  # the warm-up
            return super().weight_step(loop, batch)
        assert self.train_loss is not None
        return self.train_loss  # w has made its step in the round

    def architecture_step(self, loop: Loop, batch: Batch, beside: Batch | None) -> Tensor:
        """One round: w on ``beside``, y on ``batch``, alpha on both."""
        assert beside is not None
        if self.twin is None:
            self.split()
        assert self.twin is not None
        assert self.twin_weights is not None
        self.twin_weights.param_groups[0]["lr"] = loop.rate
        self.twin.train()
        loop.architecture.zero_grad()
        halves = ((self.supernet, beside, self.method.train_weight), (self.twin, batch, 1.0))
        joint = self.method.order == "jacobi"
        self.train_loss, loss = (
            self.descend(optimizer, network, images, weight, loop.generator, logits_too=joint)
            for optimizer, (network, images, weight) in zip((loop.weights, self.twin_weights), halves, strict=True)
        )
        if not joint:
            for network, images, weight in halves:  # one after the other: the activations of one at a time
                with frozen(weights(network)):
                    (weight * self.loss_on(network, images, loop.generator)).backward()
        self.charge(self.method.train_weight * self.train_loss + loss, loop.generator)
        loop.architecture.step()
        return loss

    def loss_on(self, network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        self.mix(network, generator, softmax)
        return task_loss(network, batch)

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        network: nn.Module,
        batch: Batch,
        weight: float,
        generator: torch.Generator,
        *,
        logits_too: bool,
    ) -> Tensor:
        """A step of one copy along weight * dL/dw + beta * (w - y); with ``logits_too``, weight * dL/dalpha is added to
        theirs. Returns the loss."""
        assert self.twin is not None
        own, others = weights(network), weights(self.supernet if network is self.twin else self.twin)
        optimizer.zero_grad()
        with frozen([] if logits_too else self.parameters()):
            loss = self.loss_on(network, batch, generator)
            (weight * loss).backward()
        nn.utils.clip_grad_norm_(own, LONGEST)  # of the data's gradient alone: the coupling is not to be cut
        with torch.no_grad():
            for mine, theirs in zip(own, others, strict=True):
                pull = self.method.coupling * (mine - theirs)
                mine.grad = pull if mine.grad is None else mine.grad + pull
        optimizer.step()
        return loss.detach()

    def charge(self, loss: Tensor, generator: torch.Generator) -> None:
        """Bring the costs into the logits' gradient: that of the data is there, d objective / d loss scales it."""
        leaf = loss.clone().requires_grad_()
        self.mix(self.supernet, generator, softmax)
        objective = self.objective(leaf)
        (slope,) = torch.autograd.grad(objective, leaf, retain_graph=True)
        for logits in self.parameters():
            if logits.grad is not None:
                logits.grad *= slope
        objective.backward()

    def state(self) -> dict[str, Any]:
        if self.twin is None or self.twin_weights is None:
            return super().state()
        return {**super().state(), "twin": self.twin.state_dict(), "twin_weights": self.twin_weights.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if "twin" in state:
            self.split()
            assert self.twin is not None
            assert self.twin_weights is not None
            self.twin.load_state_dict(state["twin"])
            self.twin_weights.load_state_dict(state["twin_weights"])
