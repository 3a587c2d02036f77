"""SMCP (Humble et al. 2022, arXiv:2211.02206): channels are masked while the network trains, and may come back.

Every few steps a knapsack keeps the channels that matter most within a budget that tightens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from netsmith.cost.prices import Options
from netsmith.run import Run
from netsmith.search.masked import Masked, Masking, Share, search_masked
from netsmith.search.problem import Problem


@dataclass(frozen=True, kw_only=True)
class SMCP(Masking):
    """Sections 3.1 to 3.4. The paper trains 90 epochs of ImageNet from scratch: the shares of the schedule are its own,
    the rest of the training is that of a network which is trained already (ours)."""

    warm: Share = 0.1
    """The share of the steps before anything is masked (10 of 90 epochs)."""
    ramp: Share = 0.6
    """The share of the steps in which the budget tightens (55 of 90); the masks stay as they are for the rest."""
    every: PositiveInt = 20
    """Steps from one choice of channels to the next (80 of 256 images, of ImageNet's 450,000)."""
    importance: Literal["taylor", "weight"] = "taylor"
    """What a channel is worth: how much the loss would change without it, to first order, or its weights' size."""
    scaling: Literal["importance", "share", "none"] = "importance"
    """By what a norm behind masked weights is scaled: the share of importance, or of channels, that is left."""
    masked_decay: NonNegativeFloat = 2e-4
    """Weight decay of masked weights on top."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return search_masked(problem, run, "smcp", lambda number: Pruning(self, problem, run, number))

    def tightened(self, step: int, total: int) -> float:
        """The share of the way from the whole network to the budget: 0, then 1 - e^(-0.05 t) over what that is one
        epoch after the ramp, t counting 55 paper epochs, then 1."""
        done = step / total
        if done < self.warm or self.ramp == 0:
            return float(done >= self.warm)
        t = 55 * (done - self.warm) / self.ramp
        return min(1.0, (1 - math.exp(-0.05 * t)) / (1 - math.exp(-0.05 * 56))) if t < 55 else 1.0


class Pruning(Masked):
    """The training of the network for one of the problem's budgets."""

    STATE: ClassVar = (*Masked.STATE, "scales")

    def __init__(self, method: SMCP, problem: Problem, run: Run, number: int = 0) -> None:
        super().__init__("smcp", method, problem, run, number)
        self.scales: dict[str, float] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Norms are scaled, too: on the way back a gradient is divided by the scale (0 by 0)."""
        found = super().tensors()
        for name, scale in self.scales.items():
            weight = self.space.network.get_parameter(name)
            found[name] = weight / scale + (weight * scale - weight / scale).detach() if scale else weight * 0.0
        return found

    def learn(self) -> None:
        self.gather()
        self.decay()

    def gather(self) -> None:
        """Importance of each channel c: |sum over what reads it of -W dL/dW|; a mean over the batches since the last
        choice (ours: the paper takes the last batch)."""
        taylor = self.method.importance == "taylor"
        for path, total in self.read_sums(lambda w, gradient: -w * gradient if taylor else w.abs()).items():
            self.gathered[path] += total.abs()

    @torch.no_grad()
    def decay(self) -> None:
        for name, mask in self.space.masks(self.masks).items():
            weight = self.space.network.get_parameter(name)
            if weight.grad is not None:
                weight.grad += self.method.masked_decay * weight * (1 - mask)

    def choose(self, total: int) -> None:
        """Keep the channels that matter most within the budgets of now."""
        method, tightened = self.method, self.method.tightened(self.step, total)
        last = min(total, math.ceil(total * (method.warm + method.ramp)))
        due = tightened > 0 and self.step < last and self.step % method.every == 0
        if not due and self.step != last:
            return
        whole = [self.problem.predicted(budget, self.problem.reference) for budget in self.budgets]
        now = [
            replace(b, limit=b.limit + (1 - tightened) * max(0.0, cost - b.limit))
            for b, cost in zip(self.budgets, whole, strict=True)
        ]
        back = self.keep(self.problem.allocate(self.values(), now))
        self.scale()
        self.run.event(
            "smcp_choice",
            number=self.number,
            step=self.step,
            tightened=tightened,
            widths=self.architecture,
            back=back,
        )
        if tightened < 1:
            self.gathered = {path: torch.zeros_like(found) for path, found in self.gathered.items()}

    def scale(self) -> None:
        """What each norm behind a reading layer is multiplied by."""
        self.scales = {}
        if self.method.scaling == "none":
            return
        left: dict[str, float] = defaultdict(lambda: 1.0)
        for path, group in self.space.groups.items():
            worth = self.gathered[path] if self.method.scaling == "importance" else torch.ones(group.size)
            kept = float((worth * self.masks[path]).sum() / worth.sum().clamp_min(1e-12))
            for use in group.uses:
                if use.role == "in" and (norm := self.norms.get(use.tensor.rpartition(".")[0])):
                    left[f"{norm}.weight"] *= kept
        self.scales = {name: share for name, share in left.items() if share < 1}

    @torch.no_grad()
    def finish(self) -> None:
        """The weights as they run."""
        for name, scale in self.scales.items():
            self.space.network.get_parameter(name).mul_(scale)
        super().finish()
