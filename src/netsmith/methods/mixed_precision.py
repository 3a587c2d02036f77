"""Mixed precision (HAWQ-V3, Yao et al. 2021, arXiv:2011.10680): the layers that int8 harms least compute in int8.

What a runtime runs today is 8 bits, and that is what ships. The integer program itself chooses among any bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.quantized import Fixed, Int8, RunningRange, calibrate, quantized
from netsmith.blocks.quantizers import span, symmetric
from netsmith.cost.prices import Options, Prices
from netsmith.decisions import Decision, OneOf, Option
from netsmith.errors import UserError
from netsmith.run import Run
from netsmith.search.allocate import Limit, allocate
from netsmith.search.hessian import omega, traces
from netsmith.search.problem import Problem
from netsmith.spaces.from_model import FP32, INT8

Ties = Sequence[Sequence[str]]
"""Layers that get the same bits, as a shortcut's convolution and the one it is added to."""
BATCH = 64
"""Images at a time while scoring."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The layers whose int8 harms least, as many as the budget asks for (HAWQ-V3's program, over what a runtime runs).

    Each layer alone gets a price in harm; the integer program takes the least harm within the budget, by latencies
    measured layer by layer in int8 and fp32. The run's recipe then trains the network on with the int8 layers in it.
    """

    pool: ClassVar = "bits"
    """Of `netsmith compress`, where none is asked for."""
    harm: Literal["divergence", "omega"] = "divergence"
    """Of a layer in int8: how far its answers are from the original's (Kullback-Leibler; ours, as it sees inputs and
    weights), or HAWQ's Omega, from the trace of the Hessian (weights only)."""
    images: PositiveInt = 256
    """Training images that this is measured on (ours)."""
    draws: PositiveInt = 50
    """Random vectors of a layer's trace at most (the paper: 100), for `harm: omega`."""
    simulate: tuple[Annotated[int, Field(ge=2, le=8)], ...] = ()
    """Bits that no runtime here runs, such as 4: the accuracy with all layers at them, simulated and untrained, goes
    into events.jsonl as `simulated_bits`. No file has them, no budget is kept by them."""

    def refuses(self, decision: Decision) -> str | None:
        if isinstance(decision, OneOf) and set(decision.options) == {FP32, INT8}:
            return None
        return "is no choice between fp32 and int8 (netsmith compress --pool bits has such)"

    def search(self, problem: Problem, run: Run) -> list[Options]:
        harms = run.once("int8-harms", lambda: self.harms(problem, run))
        run.once("simulated-bits", lambda: [self.simulated(problem, run, bits) for bits in self.simulate])
        return [{path: {FP32: 0.0, INT8: -harms[path]} for path in problem.reference} for _ in problem.budgets]

    def harms(self, problem: Problem, run: Run) -> dict[str, float]:
        """Layer -> what its int8 costs, with all others in fp32; not below zero."""
        network = problem.network(problem.reference).eval()
        images, labels = self.scored(problem, run)
        if self.harm == "omega":
            generator = torch.Generator().manual_seed(run.seed("hutchinson"))
            bent = traces(
                network, lambda n: F.cross_entropy(n(images), labels), problem.reference, generator, draws=self.draws
            )
            weights = {path: network.get_parameter(f"{path}.weight") for path in bent}
            found = {path: omega(bent[path], weight, Int8()(weight)) for path, weight in weights.items()}
        else:
            found = dict(self.divergences(problem, run, network, images))
        for path, harm in found.items():
            run.event("int8_harm", layer=path, harm=harm)
        return found

    def scored(self, problem: Problem, run: Run) -> tuple[Tensor, Tensor]:
        """Training images and labels, the same in all of a run."""
        batches = problem.task.batches("train", self.images, train=True, augmented=False, seed=run.seed("int8"))
        return next(iter(batches))

    def simulated(self, problem: Problem, run: Run, bits: int) -> float:
        """The share of training images that are right with all weights and inputs at so many bits."""

        def weights() -> nn.Module:
            return Fixed(lambda weight: symmetric(*span(weight, axis=0), bits)(weight), bits)

        network = problem.network(problem.reference).eval()
        made = quantized(network, {path: (weights(), RunningRange(bits).train()) for path in problem.reference})
        images, labels = self.scored(problem, run)
        with torch.no_grad():
            made(images)  # which shows the ranges
        right = float((_answers(made, images).argmax(1) == labels).double().mean())
        run.event("simulated_bits", bits=bits, accuracy_on_training_images=right)
        return right

    def divergences(
        self, problem: Problem, run: Run, network: nn.Module, images: Tensor
    ) -> Iterable[tuple[str, float]]:
        """Layer -> mean divergence of the answers to ``images`` where that layer alone is in int8."""
        in_int8 = problem.network(dict.fromkeys(problem.reference, INT8))
        calibrate(in_int8, lambda: images)
        wanted = _answers(network, images)
        for number, path in enumerate(problem.reference):
            own = network.get_submodule(path)
            network.set_submodule(path, in_int8.get_submodule(path))
            harm = F.kl_div(_answers(network, images), wanted, reduction="batchmean", log_target=True)
            network.set_submodule(path, own)
            if not harm.isfinite():
                raise UserError(f"the network's answers are not finite where {path!r} is in int8")
            run.progress("layers in int8", number + 1, len(problem.reference), f"{path}: {float(harm):.2g}")
            yield path, max(0.0, float(harm))


@torch.inference_mode()
def _answers(network: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities ``(n, classes)``, in float64: the differences are small."""
    return torch.cat([network.eval()(part).double().log_softmax(1) for part in images.split(BATCH)])


def sensitivities(network: nn.Module, traces: Mapping[str, float], bits: Iterable[int]) -> Options:
    """Layer -> bits -> Omega, for symmetric weights with a scale per channel. ``traces``: from `search.hessian`."""
    found: Options = {}
    for path, trace in traces.items():
        weight = network.get_parameter(f"{path}.weight")
        found[path] = {b: omega(trace, weight, symmetric(*span(weight, axis=0), b)(weight)) for b in bits}
    return found


def between(prices: Prices, share: float) -> float:
    """The limit L_low + share (L_high - L_low), between all layers at their fewest bits and all at their most; the
    paper's alpha, of 0.25, 0.5 and 0.75. The prices' options are numbers of bits."""
    low, high = (prices.constant + math.fsum(row[end(row)] for row in prices.options.values()) for end in (min, max))
    return low + share * (high - low)


def least_sensitive(sensitivity: Options, limits: Sequence[Limit], ties: Ties = ()) -> dict[str, Option]:
    """Layer -> bits with the least sum of Omega within all limits, proven; a layer with one option is fixed.

    Raises: UserError for tied layers with different options or a layer tied twice, and as `allocate` does.
    """
    leader = _leaders(sensitivity, ties)

    def grouped(limit: Limit) -> Limit:
        prices, unit = limit.prices, getattr(limit.prices, "unit", "")
        return replace(limit, prices=Prices(prices.constant, _grouped(prices.options, leader), unit))

    values = {path: {b: -omega for b, omega in row.items()} for path, row in _grouped(sensitivity, leader).items()}
    chosen = allocate(values, [grouped(limit) for limit in limits])
    return {path: chosen[leader[path]] for path in sensitivity}


def _leaders(layers: Options, ties: Ties) -> dict[str, str]:
    """Layer -> the layer that decides for it."""
    leader: dict[str, str] = {}
    for tie in ties:
        for path in tie:
            if path not in layers or path in leader:
                wrong = "is tied twice" if path in leader else "is no layer with bits to decide"
                raise UserError(f"layers cannot be tied as {', '.join(tie)}: {path!r} {wrong}")
            leader[path] = tie[0]
    return {path: leader.get(path, path) for path in layers}


def _grouped(options: Mapping[str, Mapping[Option, float]], leader: Mapping[str, str]) -> Options:
    """One row per deciding layer, the sum of those it decides for."""
    rows: Options = {}
    for path, row in options.items():
        first = leader.get(path, path)
        sums = rows.setdefault(first, dict.fromkeys(row, 0.0))
        if sums.keys() != row.keys():
            raise UserError(f"{path!r} cannot be tied to {first!r}: its options are {[*row]}, not {[*sums]}")
        for option, number in row.items():
            sums[option] += number
    return rows
