"""MCU pruning (Liberis and Lane 2022, arXiv:2110.08350): how many channels stay is moved along the gradient of what
they take of a microcontroller, and of what the loss says.

What the published text leaves open (the update, the salience, the schedules) is ours, after µNAS of the same author and
DSA (Ning et al. 2020, arXiv:2004.02164), the method it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture
from netsmith.run import Run
from netsmith.search.masked import Masked, Masking, Share, search_masked, used
from netsmith.search.problem import Problem, prefer


@dataclass(frozen=True, kw_only=True)
class MCUPruning(Masking):
    """Each group of channels has a width s, a real number. Every so often it moves by what the budgets are relieved of
    by a channel less, R'(s), against what the loss would lose; the best channels, so many, are left unmasked."""

    warm: Share = 0.1
    """The share of the steps before anything moves."""
    ramp: Share = 0.7
    """The share of the steps in which widths move; the masks stay as they are for the rest."""
    moves: PositiveInt = 40
    """How often they move, at most once a step (every 50 to 100 steps, of trainings from scratch)."""
    step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of its channels that a group moves by at most (eta)."""
    caution: NonNegativeFloat = 0.3
    """How much the loss counts beside the budgets (kappa)."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the running mean of what a channel is worth."""
    loss: Literal["importance", "dsa"] = "importance"
    """How the loss has its say. importance: the least worth of the channels that a group has left, which hard masks
    leave; dsa: the derivative of the loss in the share of channels that is kept, through soft masks."""
    hardness: tuple[PositiveFloat, PositiveFloat] = (1.0, 16.0)
    """Of DSA's masks, from the first move to the last (beta_2), by the same factor each time."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return search_masked(problem, run, "mcu_pruning", lambda number: Pruning(self, problem, run, number))


class Pruning(Masked):
    """The training of the network for one of the problem's budgets."""

    STATE: ClassVar = (*Masked.STATE, "widths", "slopes")

    def __init__(self, method: MCUPruning, problem: Problem, run: Run, number: int = 0) -> None:
        super().__init__("mcu_pruning", method, problem, run, number)
        self.widths = {path: float(group.size) for path, group in self.space.groups.items()}
        """s, of each group."""
        self.slopes = dict.fromkeys(self.widths, 0.0)
        """-dL/ds since the last move: what a channel more is worth to the loss (DSA)."""

    @property
    def soft(self) -> bool:
        """Whether DSA's masks are in the network."""
        return any(mask.requires_grad for mask in self.masks.values())

    def tensors(self) -> dict[str, Tensor]:
        if not self.soft:
            return super().tensors()
        masked = self.space.masks(self.masks)
        return {name: self.space.network.get_parameter(name) * mask for name, mask in masked.items()}

    def learn(self) -> None:
        """Worth of a channel c: |dL/dm_c|, m being a factor on what reads it; a running mean."""
        if self.soft:
            slopes: dict[str, Tensor] = {}
            for path, mask in self.masks.items():
                assert mask.grad is not None
                slopes[path], mask.grad = mask.grad, None
                self.slopes[path] -= float(slopes[path] @ derivative(mask.detach())) / len(mask)  # s is len(mask) alpha
        else:
            slopes = self.read_sums(lambda weight, gradient: weight * gradient)
        for path, slope in slopes.items():
            before = self.gathered[path]
            self.gathered[path] = self.method.memory * before + (1 - self.method.memory) * slope.abs()

    def choose(self, total: int) -> None:
        method = self.method
        first, last = math.ceil(method.warm * total), min(total, math.ceil((method.warm + method.ramp) * total))
        if self.step == last:
            self.settle()
        elif (
            self.budgets and first <= self.step < last and (self.step - first) % -(-(last - first) // method.moves) == 0
        ):
            self.move((self.step - first) / (last - first))

    def move(self, way: float) -> None:
        """One move of all widths, ``way`` being how much of the ramp is done."""
        limits = self.limits(way)
        s = {path: torch.tensor(width, dtype=torch.float64, requires_grad=True) for path, width in self.widths.items()}
        uses = {b.metric: used(self.problem, b, s) for b in limits}
        over = excess(uses, limits)
        if over.requires_grad:
            over.backward()
        relief = {path: 0.0 if width.grad is None else float(width.grad) for path, width in s.items()}
        self.widths = moved(self.widths, self.sizes, relief, self.losses(), self.method.step, self.method.caution)
        self.slopes = dict.fromkeys(self.slopes, 0.0)
        counts: Architecture = {path: round(width) for path, width in self.widths.items()}
        if self.method.loss == "dsa":
            low, high = self.method.hardness
            self.masks = {
                path: soft_mask(self.gathered[path], width / len(self.masks[path]), low * (high / low) ** way)
                for path, width in self.widths.items()
            }
            for mask in self.masks.values():
                mask.requires_grad_()
            back = 0
        else:
            back = self.keep(counts)
        self.run.event(
            "mcu_pruning_move",
            number=self.number,
            step=self.step,
            uses={name: use.item() for name, use in uses.items()},
            limits={b.metric: b.limit for b in limits},
            widths=counts,
            back=back,
        )

    def settle(self) -> None:
        """Widths that are options, within the budgets, as near to s as can be: rounding alone may break a limit."""
        nearest = {
            path: min(self.space.width(path).options, key=lambda n, s=s: abs(n - s)) for path, s in self.widths.items()
        }
        values = self.values()
        self.masks = {path: mask.detach() for path, mask in self.masks.items()}
        back = self.keep(self.problem.allocate(prefer(values, nearest, 1.0 + len(values)), self.budgets))
        self.widths = {path: float(n) for path, n in self.architecture.items()}
        self.run.event(
            "mcu_pruning_move", number=self.number, step=self.step, widths=self.architecture, settled=True, back=back
        )

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The fewest and the most channels of each group."""
        options = {path: self.space.width(path).options for path in self.space.groups}
        return {path: (int(min(row)), int(max(row))) for path, row in options.items()}

    def limits(self, way: float) -> list[Budget]:
        """B(t) = B + (B_0 - B) (1 - t)^3, from what the whole network takes."""
        whole = [self.problem.predicted(b, self.problem.reference) for b in self.budgets]
        return [
            replace(b, limit=b.limit + max(0.0, cost - b.limit) * (1 - way) ** 3)
            for b, cost in zip(self.budgets, whole, strict=True)
        ]

    def losses(self) -> dict[str, float]:
        """What the loss says against taking a channel from each group."""
        if self.soft:
            return dict(self.slopes)
        found = {}
        for path, worth in self.gathered.items():
            left = max(1, round(self.widths[path]))
            found[path] = float(worth.sort(descending=True).values[left - 1])
        return found


def excess(uses: Mapping[str, Tensor], limits: Sequence[Budget]) -> Tensor:
    """R = sum of max(0, r_k / B_k - 1): 0, and its gradient 0, where all budgets are kept."""
    return torch.stack([(uses[b.metric] / b.limit - 1).clamp_min(0) for b in limits]).sum()


def moved(
    widths: Mapping[str, float],
    sizes: Mapping[str, tuple[int, int]],
    relief: Mapping[str, float],
    losses: Mapping[str, float],
    step: float,
    caution: float,
) -> dict[str, float]:
    """s + step C clip(caution D / mean |D| - R' / mean R', -1, 1), C being all channels of a group: not below its
    fewest and not above its most."""

    def scaled(found: Mapping[str, float]) -> dict[str, float]:
        mean = math.fsum(map(abs, found.values())) / len(found)
        return {path: value / mean if mean else 0.0 for path, value in found.items()}

    against, for_it = scaled(losses), scaled(relief)
    result = {}
    for path, width in widths.items():
        low, high = sizes[path]
        way = min(1.0, max(-1.0, caution * against[path] - for_it[path]))
        result[path] = min(float(high), max(float(low), width + step * high * way))
    return result


def soft_mask(worth: Tensor, share: float, hardness: float) -> Tensor:
    """DSA's chances to be kept, p_c = 1 / (1 + (beta_1 / b_c)^hardness) ``(channels,)``, whose mean is ``share``; b is
    what the channels are worth."""
    b = worth.double().clamp_min(1e-12 * float(worth.max()) + 1e-300).log()
    if share >= 1:
        return torch.ones_like(worth)
    low, high = float(b.min()) - 50 / hardness, float(b.max()) + 50 / hardness
    for _ in range(100):  # the mean falls as beta_1 rises
        middle = (low + high) / 2
        if float((hardness * (b - middle)).sigmoid().mean()) > share:
            low = middle
        else:
            high = middle
    return (hardness * (b - (low + high) / 2)).sigmoid().to(worth)


def derivative(mask: Tensor) -> Tensor:
    """dp_c / d share of `soft_mask`, by its equation: C f_c / sum f, f = p (1 - p), which adds up to C channels."""
    f = mask * (1 - mask)
    return len(mask) * f / f.sum().clamp_min(1e-12)
