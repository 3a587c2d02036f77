"""What bits cost: bytes of quantised weights, and bit operations.

A BitOP is one bit of a weight times one bit of an input: a MAC of weights with w bits and inputs with a bits counts
w a, of floating-point numbers 32 * 32 = 1024. Conventions differ: some authors count first and last layers at 8 bits
whatever they have, some leave them out. Here every layer counts at the bits it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from netsmith.blocks.quantized import FLOAT_BITS, QuantConv2d, QuantLinear, layer_bits
from netsmith.cost.counts import FileBytes, Shape, count_macs, image, run_shapes, shipped, to_meta


class Layer(NamedTuple):
    """A convolution or linear layer, as far as its bits cost anything."""

    macs: int
    """Of one image."""
    weights: int
    """Numbers in the weight, without the bias."""

    def weight_bytes(self, weight_bits: int) -> float:
        return self.weights * weight_bits / 8

    def bitops(self, weight_bits: int, input_bits: int) -> float:
        return float(self.macs * weight_bits * input_bits)


def layers(network: nn.Module, input_shape: Shape) -> dict[str, Layer]:
    """Path -> layer, for every convolution and linear layer that runs on an image of ``input_shape``, in their order in
    the network; one that runs twice has the MACs of both. Raises what the network's own forward raises."""
    shadow = shipped(to_meta(network))
    macs: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        macs[layer] = macs.get(layer, 0) + output.numel() * math.prod(layer.weight.shape[1:])

    named = {path: m for path, m in shadow.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for layer in named.values():
        layer.register_forward_hook(note)
    run_shapes(shadow, image(shadow, input_shape))
    return {path: Layer(macs[layer], layer.weight.numel()) for path, layer in named.items() if layer in macs}


@dataclass(frozen=True)
class BitOps:
    """Bit operations of one image; what is not quantised counts 1024 a MAC."""

    name = "bitops"
    unit = ""
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        """Raises: UserError where bits are still to be decided."""
        quantized = _quantized(module)
        if not quantized:
            return FLOAT_BITS**2 * count_macs(module, input_shape)
        found = layers(module, input_shape)
        rest = count_macs(module, input_shape) - sum(found[path].macs for path in quantized if path in found)
        bits = {path: layer_bits(path, layer) for path, layer in quantized.items() if path in found}
        return rest * FLOAT_BITS**2 + sum(found[path].bitops(*pair) for path, pair in bits.items())


@dataclass(frozen=True)
class QuantizedFileBytes:
    """`FileBytes` with the weights of quantised layers at their bits, packed; biases, learned scales and centroids are
    fp32. Scales that are not parameters count nothing."""

    name = "file"
    unit = "B"
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        """Raises: UserError where bits are still to be decided."""
        saved = 0.0
        for path, layer in _quantized(module).items():
            weight_bits, _ = layer_bits(path, layer)
            saved += layer.weight.numel() * (FLOAT_BITS - weight_bits) / 8
        return FileBytes()(module, input_shape) - saved


def _quantized(module: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {path: m for path, m in module.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}
