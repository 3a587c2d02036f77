"""Layers that compute with quantised weights and inputs, and the quantisers that have something to learn or to keep.

A quantiser is an ``nn.Module`` with ``bits`` that returns what it is given, moved to the numbers those bits can name;
several of them in a `OneOf` are EdMIPS' mixture. The layers keep their real weights, which training goes on changing.
What a quantiser takes from data is NaN until its first batch in training mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.codebooks import kmeans, ttq, ttq_sets
from netsmith.blocks.quantizers import Grid, affine, check_bits, lsq, lsq_range, lsq_scale, pact, span
from netsmith.decisions import Decision, OneOf
from netsmith.errors import UserError

FLOAT_BITS = 32
CALIBRATED = 32
"""Images at a time that show their ranges."""
SMALLEST = 1e-8
"""What a learned scale cannot fall below (ours): at zero it divides by zero, below it mirrors what it scales."""

NO_BITS = "is no choice between numbers of bits (netsmith compress --pool bits has such)"
"""Why a method that chooses bits refuses a decision."""


class Float(nn.Identity):
    """Nothing is quantised."""

    bits = FLOAT_BITS


class Fixed(nn.Module):
    """A quantiser with nothing to learn: a function, and the bits that its result needs.

    >>> Fixed(functools.partial(dorefa_weight, bits=2), 2)
    """

    def __init__(self, function: Callable[[Tensor], Tensor], bits: int) -> None:
        super().__init__()
        self.function, self.bits = function, bits

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class RunningRange(nn.Module):
    """A grid over the range that inputs have had: running minimum and maximum, followed in training, then kept.

    ``grid``: `affine`, which is unsigned after a ReLU, or `symmetric` (HAWQ-V3: symmetric for 8 bits, else unsigned).
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, grid: Callable[[Tensor, Tensor, int], Grid] = affine, momentum: float = 0.99) -> None:
        super().__init__()
        self.bits, self.make, self.momentum = bits, grid, momentum
        self.register_buffer("low", torch.tensor(math.nan))
        self.register_buffer("high", torch.tensor(math.nan))

    def grid(self) -> Grid:
        """Raises: UserError for bits that the grid does not take."""
        return self.make(self.low, self.high, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for kept, now in zip((self.low, self.high), span(x), strict=True):
                kept.copy_(torch.where(kept.isnan(), now, self.momentum * kept + (1 - self.momentum) * now))
        return self.grid()(x)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.make.__name__}"


class LSQ(nn.Module):
    """Learned step size; starts from the first batch and stays above zero.

    ``channels``: that many scales, along the first axis of a weight, instead of one. ``per_sample``: for inputs, of
    which one sample counts in the scale of the gradient, not the batch. Raises: UserError for 1 bit with a sign.
    """

    def __init__(
        self, bits: int, *, signed: bool = True, channels: int | None = None, per_sample: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.per_sample = bits, per_sample
        self.low, self.high = lsq_range(bits, signed=signed)
        # One axis at most, so that weight decay passes it over.
        self.scale = nn.Parameter(torch.full(() if channels is None else (channels,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        per_channel = self.scale.dim() == 1
        if self.training:
            _keep_positive(self.scale, lsq_scale(x, self.high, 0 if per_channel else None))
        scale = self.scale.view(-1, *[1] * (x.dim() - 1)) if per_channel else self.scale
        count = x[0].numel() if per_channel or self.per_sample else x.numel()
        return lsq(x, scale, self.low, self.high, 1 / math.sqrt(count * self.high))

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.low}..{self.high}"


class PACT(nn.Module):
    """A ReLU with a learned ceiling, then 2^bits levels. ``start`` is ours. The paper decays alpha by L2, which the
    optimizers here do not do to what is one number. Raises: UserError for bits outside of 1 to 32."""

    def __init__(self, bits: int, start: float = 10.0) -> None:
        super().__init__()
        check_bits("PACT", bits, least=1)
        self.bits = bits
        self.alpha = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            _keep_positive(self.alpha, self.alpha)
        return pact(x, self.alpha, self.bits)

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class TTQ(nn.Module):
    """Trained ternary weights: 0 and two learned numbers, which start at the means of what they replace (ours)."""

    bits = 2

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Parameter(torch.tensor(math.nan)), nn.Parameter(torch.tensor(math.nan))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            size = weight.detach().abs()
            for learned, members in zip((self.positive, self.negative), ttq_sets(weight), strict=True):
                _keep_positive(learned, (size * members).sum() / members.sum().clamp(min=1))
        return ttq(weight, self.positive, self.negative)


class Codebook(nn.Module):
    """2^bits centroids of ``weight``, found by k-means and then learned: each gets the summed gradient of its members
    (HAQ's size mode). Who belongs to which is settled; what the layer's own weight becomes no longer counts."""

    codes: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        centroids, codes = kmeans(weight, bits)
        self.centroids = nn.Parameter(centroids)
        self.register_buffer("codes", codes)

    def forward(self, weight: Tensor) -> Tensor:
        return self.centroids[self.codes]

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class Int8(nn.Module):
    """Weights as an int8 file holds them: whole multiples, -64 to 64, of a scale for each output channel, so that a
    batch norm after the layer may fold into it first. What marks a layer that ships in int8 (`is_int8`).

    Not to 127: x86 processors without VNNI add two products in 16 bits, and 2 * 255 * 127 does not fit. With 127 a
    three-layer network was off by a third of its largest output there; with 64 the file computes the same everywhere.
    """

    bits = 8
    largest = 64

    def forward(self, weight: Tensor) -> Tensor:
        low, high = span(weight, axis=0)
        scale = torch.maximum(-low, high) / self.largest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return Grid(scale, torch.zeros_like(scale), -self.largest, self.largest)(weight)


def _keep_positive(learned: nn.Parameter, start: Tensor) -> None:
    """NaN becomes ``start``, and what an optimizer has pushed to zero or below the smallest scale. The parameter stays
    the one that the optimizer knows."""
    # By .data: another pass of the same step may still be waiting for its gradient.
    learned.data.copy_(torch.where(learned.isnan(), start, learned).clamp(min=SMALLEST))


class QuantConv2d(nn.Conv2d):
    """The convolution ``layer``, whose parameters it shares, with a quantiser for weights and one for inputs."""

    def __init__(self, layer: nn.Conv2d, weight: nn.Module, inputs: nn.Module) -> None:
        has_bias = layer.bias is not None
        super().__init__(*_shape(layer), bias=has_bias, padding_mode=layer.padding_mode, device="meta")  # pyright: ignore[reportArgumentType]
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = weight, inputs
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """The linear ``layer``, whose parameters it shares, with a quantiser for weights and one for inputs."""

    def __init__(self, layer: nn.Linear, weight: nn.Module, inputs: nn.Module) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = weight, inputs
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


def quantized(network: nn.Module, quantizers: Mapping[str, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A copy of ``network`` in which every layer named has its quantisers, of the weight and of the input.

    Raises: UserError for a path that is no plain convolution or linear layer: what computes in a way of its own would
    lose it.

    >>> quantized(network, {"head": (LSQ(4), RunningRange(8))})
    """
    made: dict[int, object] = {}
    layers = dict(network.named_modules())
    for path, (weight, inputs) in quantizers.items():
        layer = layers.get(path)
        if type(layer) not in (nn.Conv2d, nn.Linear):
            raise UserError(f"only plain convolutions and linear layers can be quantised; {path!r} is {layer}")
        own = copy.deepcopy(layer, made)
        made[id(layer)] = (QuantConv2d if isinstance(own, nn.Conv2d) else QuantLinear)(own, weight, inputs)  # pyright: ignore[reportArgumentType]
    return copy.deepcopy(network, made)


def layer_bits(path: str, layer: QuantConv2d | QuantLinear) -> tuple[int, int]:
    """Bits of weight and input. Raises: UserError, naming ``path``, where they are still to be decided."""
    weight, inputs = (getattr(part, "bits", None) for part in (layer.weight_quantizer, layer.input_quantizer))
    if weight is None or inputs is None:
        raise UserError(f"the bits of {path!r} are still open: derive the network first")
    return weight, inputs


def option_bits(decision: Decision) -> dict[str, int]:
    """Option -> bits, where the options are one layer at different bits of weights and inputs; else empty."""
    found: dict[str, int] = {}
    for option in decision.options if isinstance(decision, OneOf) else ():
        layer = decision.get_submodule(option)
        if isinstance(layer, QuantConv2d | QuantLinear):
            found[option], _ = layer_bits(option, layer)
        elif type(layer) in (nn.Conv2d, nn.Linear):
            found[option] = FLOAT_BITS
        else:
            return {}
    return found if len(set(found.values())) == len(found) else {}


def int8(layer: nn.Conv2d | nn.Linear) -> QuantConv2d | QuantLinear:
    """The layer as an int8 file computes it, sharing its parameters: `Int8` weights, inputs of 8 bits over the range
    that they have had, which training or `calibrate` has to show."""
    return (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear)(layer, Int8(), RunningRange(Int8.bits))  # pyright: ignore[reportArgumentType]


def is_int8(module: nn.Module) -> TypeGuard[QuantConv2d | QuantLinear]:
    """Whether it is a layer that ships in int8; any other quantised layer ships as what it computes, in fp32."""
    return isinstance(module, QuantConv2d | QuantLinear) and isinstance(module.weight_quantizer, Int8)


def in_fp32(network: nn.Module) -> nn.Module:
    """A copy with its int8 layers in fp32; where there is none, ``network`` itself."""
    return without_int8(network, lambda plain, layer: plain)


def without_int8(
    network: nn.Module, stand_in: Callable[[nn.Module, QuantConv2d | QuantLinear], nn.Module]
) -> nn.Module:
    """A copy of ``network`` with ``stand_in(plain, layer)`` for every int8 ``layer``, ``plain`` being the layer in fp32
    with the same parameters; where there is none, ``network`` itself."""
    made: dict[int, object] = {}
    for layer in filter(is_int8, network.modules()):
        made[id(layer)] = stand_in(_plain(layer), layer)
    return copy.deepcopy(network, made) if made else network


def _plain(layer: QuantConv2d | QuantLinear) -> nn.Module:
    """The layer without its quantisers, sharing its parameters."""
    if isinstance(layer, nn.Conv2d):
        plain = nn.Conv2d(*_shape(layer), bias=layer.bias is not None, padding_mode=layer.padding_mode, device="meta")  # pyright: ignore[reportArgumentType]
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    return plain.train(layer.training)


def _shape(layer: nn.Conv2d) -> tuple:
    c = layer
    return c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups


@torch.no_grad()
def calibrate(network: nn.Module, images: Callable[[], Tensor]) -> None:
    """Give every int8 layer that has none yet the range of its inputs: smallest and largest over ``images()``, ``(n,
    channels, height, width)``, with all layers in fp32, in eval mode. Without such a layer nothing is asked for."""
    layers = filter(is_int8, network.modules())
    fresh = {id(layer) for layer in layers if layer.input_quantizer.get_buffer("low").isnan()}
    if not fresh:
        return

    def watched(plain: nn.Module, layer: QuantConv2d | QuantLinear) -> nn.Module:
        kept: Any = layer.input_quantizer

        def widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = span(inputs[0])
            kept.low.copy_(torch.fmin(kept.low, low))
            kept.high.copy_(torch.fmax(kept.high, high))

        if id(layer) in fresh:
            plain.register_forward_pre_hook(widen)
        return plain

    shadow = without_int8(network, watched).eval()
    for part in images().split(CALIBRATED):
        shadow(part)
