"""Mixed precision: how many bits each layer gets, in three ways.

HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680): the bits that cost least sensitivity, by an integer program.
HAQ (Wang et al. 2019, arXiv:1811.08886): what an agent proposes becomes bits, and a wall lowers them to the budget.
EdMIPS (Cai and Vasconcelos 2020, arXiv:2004.05795): all bits at once, mixed, and a penalty on the expected cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from netsmith.blocks.quantized import Fixed, QuantConv2d, QuantLinear, quantized
from netsmith.blocks.quantizers import check_bits, hwgq_activation, hwgq_weight, span, symmetric
from netsmith.cost.prices import Options, Prices
from netsmith.decisions import Decision, OneOf, Option
from netsmith.errors import UserError
from netsmith.search.allocate import Limit, allocate
from netsmith.search.hessian import omega

Ties = Sequence[Sequence[str]]
"""Layers that get the same bits, as a shortcut's convolution and the one it is added to."""


# HAWQ-V3


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


# HAQ


def action_bits(action: float, least: int, most: int) -> int:
    """An action in [0, 1] as a number of bits, each as wide as any other: round((most - least + 1) a + least - 1/2).

    Halves go to even, as in the official code; there an odd ``least`` makes one bit too few of 0, here it is clipped.
    """
    return min(max(round((most - least + 1) * action + least - 0.5), least), most)


def action_wall(
    bits: Mapping[str, tuple[int, int]],
    cost: Callable[[Mapping[str, tuple[int, int]]], float],
    budget: float,
    *,
    least: int = 2,
    ends: int = 8,
) -> dict[str, tuple[int, int]]:
    """Lower bits until ``cost`` is within ``budget``: round by round, from the last layer to the first, one bit of the
    inputs and then one of the weights. Where all are at ``least`` and it still costs too much, that is the answer.

    ``bits``: layer -> bits of weight and input, in the order of the network; the first and the last layer get ``ends``.
    ``cost``: of such a mapping, never less for more bits.
    """
    layers = list(bits)
    inner = layers[1:-1]
    found = {path: list(bits[path]) if path in inner else [ends, ends] for path in layers}

    def now() -> dict[str, tuple[int, int]]:
        return {path: (weight, inputs) for path, (weight, inputs) in found.items()}

    while any(b > least for path in inner for b in found[path]):
        for path in reversed(inner):
            for which in (1, 0):
                if cost(now()) <= budget:
                    return now()
                found[path][which] -= found[path][which] > least
    return now()


# EdMIPS


def mixed(network: nn.Module, layers: Iterable[str], bits: Sequence[int]) -> nn.Module:
    """A copy in which each of these layers has two decisions, ``PATH.weight_quantizer`` and ``PATH.input_quantizer``,
    with an option "2" for 2 bits: sum_i p_i Q_i(x) convolved once with sum_i p'_i Q_i(W), W shared.

    The quantisers are HWGQ's, of 1 to 4 bits, which include the ReLU before a layer. Raises: UserError for other bits
    and for a path that is no convolution or linear layer.
    """

    for b in bits:
        check_bits("EdMIPS", b, least=1, most=4)

    def choice(quantize: Callable[..., Tensor]) -> OneOf:
        return OneOf({str(b): Fixed(partial(quantize, bits=b), b) for b in bits})

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
