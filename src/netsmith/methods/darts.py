"""DARTS (Liu et al. 2019, arXiv:1806.09055): all options mixed by a softmax, architecture and weights in alternating
gradient steps; the second order looks one step of the weights ahead.

min_alpha L_search(w*(alpha), alpha), w*(alpha) = argmin_w L_train(w, alpha) (section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from netsmith.cost.prices import Options
from netsmith.decisions import decisions
from netsmith.errors import UserError
from netsmith.gates import Gate, softmax
from netsmith.run import Run
from netsmith.search.differentiable import Batch, CostLoss, Loop, Steps, task_loss, weights
from netsmith.search.problem import Problem
from netsmith.search.race import Finals
from netsmith.search.supernet import Supernet, search_supernet


def _steps() -> Steps:
    return Steps(rhythm=1, learning_rate=0.025, weight_decay=3e-4, architecture_decay=1e-3)


@dataclass(frozen=True, kw_only=True)
class DARTS:
    """One supernet for all budgets. The paper knows no budget: there the search ends with the largest weights."""

    steps: Steps = field(default_factory=_steps)
    """An architecture step before every weight step, as in the official code (there 50 epochs, Adam's rate 3e-4)."""
    order: Literal["first", "second"] = "first"
    """first: the gradient at the weights as they are; second: at the weights after one more step (section 2.3), five
    passes instead of two."""
    cost: CostLoss = field(default_factory=CostLoss)
    """How costs enter the architecture loss (ours)."""
    finals: Finals = field(default_factory=Finals)
    """Networks drawn around the result (ours, against the collapse to skips; the authors search four times and take the
    best by a short training)."""

    def __post_init__(self) -> None:
        if self.order == "second" and self.steps.rhythm == 0:
            raise UserError("order second looks a step of the weights ahead: steps.rhythm is 0; allowed: 1 and more")

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return search_supernet(self, problem, run, "darts", Relaxed)


class Relaxed(Supernet):
    """The continuous relaxation of section 2.2."""

    method: DARTS

    def gate(self, *, learning: bool) -> Gate:
        return softmax

    def architecture_step(self, loop: Loop, batch: Batch, beside: Batch | None) -> Tensor:
        if self.method.order == "first":
            return super().architecture_step(loop, batch, beside)
        assert beside is not None
        seen: list[Tensor] = []
        structure = loop.generator.get_state()

        def loss_on(images: Batch) -> Tensor:
            loop.generator.set_state(structure)  # all passes of a step run the same structure
            self.draw(loop.generator, learning=True)
            return task_loss(self.supernet, images)

        def search_loss() -> Tensor:
            seen.append(loss_on(batch))
            return self.objective(seen[0])

        trained = weights(self.supernet)
        gradient = unrolled_gradient(
            lambda: loss_on(beside), search_loss, trained, self.parameters(), loop.rate, velocity(loop.weights)
        )
        ran = {id(d.logits) for d in decisions(self.supernet).values() if d.drawn is not None}
        for logits, slope in zip(self.parameters(), gradient, strict=True):
            logits.grad = slope if id(logits) in ran else None  # another structure's: not even their decay
        loop.architecture.step()
        return seen[0].detach()


def velocity(optimizer: torch.optim.Optimizer) -> Callable[[nn.Parameter, Tensor], Tensor]:
    """The direction of the next weight step from a gradient, if its norm is not cut: momentum * buffer + gradient +
    decay * w (the official code), or what Nesterov's momentum makes of it. No buffer yet counts as zero."""
    (group,) = optimizer.param_groups

    def direction(w: nn.Parameter, gradient: Tensor) -> Tensor:
        buffer = optimizer.state.get(w, {}).get("momentum_buffer")
        moving = gradient + group["weight_decay"] * w.detach()
        kept = moving if buffer is None else moving + group["momentum"] * buffer
        return moving + group["momentum"] * kept if group["nesterov"] else kept

    return direction


def unrolled_gradient(
    train_loss: Callable[[], Tensor],
    search_loss: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    logits: Sequence[nn.Parameter],
    rate: float,
    direction: Callable[[nn.Parameter, Tensor], Tensor] = lambda w, gradient: gradient,
) -> list[Tensor]:
    """d/dalpha of L_search(w', alpha) with w' = w - xi * direction(dL_train/dw) (equation 7), xi = ``rate``.

    The second term, xi times the mixed second derivative of L_train times v = dL_search/dw', is a difference along v
    (equation 8): (dL_train(w + eps v) - dL_train(w - eps v)) / dalpha / (2 eps), eps = 0.01 / |v|. The weights are
    afterwards as they were, to the bit.
    """
    steps = gradients(train_loss(), weights)
    with moved(weights, [-rate * direction(w, step) for w, step in zip(weights, steps, strict=True)]):
        found = gradients(search_loss(), [*logits, *weights])
    direct, v = found[: len(logits)], found[len(logits) :]
    length = torch.stack([each.norm() for each in v]).norm()
    if length == 0:
        return direct
    eps = (0.01 / length).item()
    with moved(weights, [eps * each for each in v]):
        ahead = gradients(train_loss(), logits)
    with moved(weights, [-eps * each for each in v]):
        behind = gradients(train_loss(), logits)
    return [d - rate * (a - b) / (2 * eps) for d, a, b in zip(direct, ahead, behind, strict=True)]


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Zero where a parameter did not take part. None is left in ``.grad``: the next weight step must not see these."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@contextmanager
def moved(parameters: Sequence[nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """The parameters shifted, for a while."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, shift in zip(parameters, by, strict=True):
            parameter += shift
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
