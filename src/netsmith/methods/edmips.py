"""EdMIPS (Cai and Vasconcelos 2020, arXiv:2004.05795): all bits at once, mixed, and a penalty on the expected cost.

A layer convolves once: the mixture of its inputs at all bits with the mixture of its weights. Weights and the shares of
the bits learn in one step from one loss; in the end the largest share decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.quantized import (
    NO_BITS,
    Fixed,
    Float,
    QuantConv2d,
    QuantLinear,
    calibrate,
    option_bits,
    quantized,
)
from netsmith.blocks.quantizers import check_bits, hwgq_activation, hwgq_weight
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options
from netsmith.decisions import Decision, OneOf, decisions
from netsmith.errors import UserError
from netsmith.gates import Gate, softmax
from netsmith.run import Run
from netsmith.search.differentiable import LONGEST, Batch, CostLoss, Loop, Steps, learn, task_loss, weights
from netsmith.search.problem import Problem
from netsmith.search.supernet import Supernet
from netsmith.ship.export import calibration_images


def _steps() -> Steps:
    return Steps(
        epochs=10,
        warmup_epochs=0,
        learning_rate=0.02,
        architecture_optimizer="sgd",
        architecture_rate=0.1,
        architecture_decay=1e-4,
    )


@dataclass(frozen=True, kw_only=True)
class EdMIPS:
    """One supernet for all budgets, which are what its expected cost aims at."""

    pool: ClassVar = "bits"
    """Of `netsmith compress`, where none is asked for."""
    steps: Steps = field(default_factory=_steps)
    """How weights and logits learn, both by SGD on ``train`` (the paper: 25 epochs of ImageNet, rates 0.1 and 0.01, a
    tenth of them every ten epochs; ours are those of a network that is trained already, along a cosine)."""
    cost: CostLoss = field(default_factory=CostLoss)
    """How the expected cost enters the loss (ours: towards the budget; the paper's `penalty` has a strength to be found
    for each network)."""

    def __post_init__(self) -> None:
        if self.steps.rhythm:
            raise UserError(
                f"EdMIPS teaches weights and logits in one step: steps.rhythm is {self.steps.rhythm}; allowed: 0"
            )

    def refuses(self, decision: Decision) -> str | None:
        return None if option_bits(decision) else NO_BITS

    def search(self, problem: Problem, run: Run) -> list[Options]:
        middle = sorted(problem.budgets, key=lambda budgets: [b.limit for b in budgets])[len(problem.budgets) // 2]
        searcher = learn(problem, run, "edmips", lambda: Composed(self, problem, middle), self.steps)
        assert isinstance(searcher, Composed)
        return [searcher.values() for _ in problem.budgets]


class Composed(Supernet):
    """The network with a `Composite` for every layer with bits to decide."""

    joint = True

    def __init__(self, method: EdMIPS, problem: Problem, budgets: Sequence[Budget]) -> None:
        super().__init__(method, problem, budgets, [])
        calibrate(self.supernet, lambda: calibration_images(problem.task))
        for path, decision in decisions(self.supernet).items():
            self.supernet.set_submodule(path, Composite(dict(decision.named_children())))

    def gate(self, *, learning: bool) -> Gate:
        return softmax

    def weight_step(self, loop: Loop, batch: Batch) -> Tensor:
        """One step of the weights and, after the warm-up, of the logits."""
        self.draw(loop.generator, learning=loop.learning)
        loss = task_loss(self.supernet, batch)
        loop.weights.zero_grad()
        loop.architecture.zero_grad()
        (self.objective(loss) if loop.learning else loss).backward()
        nn.utils.clip_grad_norm_(weights(self.supernet), LONGEST)
        loop.weights.step()
        if loop.learning:
            loop.architecture.step()
        return loss


class Composite(OneOf):
    """A layer at all of its bits in one convolution, of sum_i p_i Q_i(x) with sum_i p_i Q_i(W). The candidates share W;
    what one without quantisers sees is as it is."""

    def forward(self, x: Tensor, *place: int) -> Tensor:
        indices, shares, _ = self.draw()
        layers: list[Any] = [self.candidate(self.options[i]) for i in indices]

        def mixture(of: str, whole: Tensor) -> Tensor:
            each = (getattr(layer, of, Float())(whole) for layer in layers)
            return functools.reduce(torch.add, (p * part for p, part in zip(shares, each, strict=True)))

        layer = layers[0]
        weight, inputs = mixture("weight_quantizer", layer.weight), mixture("input_quantizer", x)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(inputs, weight, layer.bias)
        return F.linear(inputs, weight, layer.bias)


def mixed(network: nn.Module, layers: Iterable[str], bits: Sequence[int]) -> nn.Module:
    """A copy in which each of these layers has two decisions, ``PATH.weight_quantizer`` and ``PATH.input_quantizer``,
    with an option "2" for 2 bits: sum_i p_i Q_i(x) convolved once with sum_i p'_i Q_i(W), W shared.

    The quantisers are HWGQ's, of 1 to 4 bits, which include the ReLU before a layer. Raises: UserError for other bits
    and for a path that is no convolution or linear layer.
    """

    for b in bits:
        check_bits("EdMIPS", b, least=1, most=4)

    def choice(quantize: Callable[..., Tensor]) -> OneOf:
        return OneOf({str(b): Fixed(functools.partial(quantize, bits=b), b) for b in bits})

    return quantized(network, {path: (choice(hwgq_weight), choice(hwgq_activation)) for path in layers})


def expected_bits(quantizer: nn.Module) -> Tensor:
    """sum_i p_i bits_i of a decision, p being what is drawn for the next pass or else the softmax; of a quantiser that
    is not open, its bits."""
    if not isinstance(quantizer, Decision):
        return torch.tensor(float(quantizer.bits))  # pyright: ignore[reportArgumentType]
    assert isinstance(quantizer, OneOf)
    each = [quantizer.candidate(option).bits for option in quantizer.options]
    return torch.stack([weight * each[i] for i, weight in quantizer.draw().pairs()]).sum()  # pyright: ignore[reportOperatorIssue]


def penalty(network: nn.Module, macs: Mapping[str, float], strength: float) -> Tensor:
    """strength sum_l c_l E_l[a] E_l[w] / c_0, differentiable in the logits; to be added to the loss.

    ``macs``: c_l of the quantised layers that count, in any unit; c_0 is the first of them in the network, so that a
    ``strength`` holds for one network only.
    """
    found = {p: m for p, m in network.named_modules() if p in macs and isinstance(m, QuantConv2d | QuantLinear)}
    if not macs or len(found) < len(macs):
        raise UserError(f"no quantised layers: {', '.join(macs.keys() - found.keys())}")
    bits = (macs[p] * expected_bits(m.input_quantizer) * expected_bits(m.weight_quantizer) for p, m in found.items())
    return strength * torch.stack(list(bits)).sum() / macs[next(iter(found))]
