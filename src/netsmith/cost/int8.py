"""An ONNX model some of whose layers compute in 8-bit integers: how a network says which, and how the model gets them.

A layer that is to be int8 (`blocks.quantized.int8`) is exported as the plain layer with a node before it that nobody
else knows, and that carries the range of the layer's inputs. Both exporters hand such a node through, so what is timed
layer by layer and what ships are made by the same code: ONNX Runtime's own quantiser, which puts int8 weights and
QuantizeLinear / DequantizeLinear pairs where it is told to.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from netsmith.blocks.quantized import QuantConv2d, QuantLinear, without_int8
from netsmith.errors import UserError

DOMAIN, MARK = "netsmith", "Int8"
"""Of the node before a layer that is to be int8; its attributes are `low` and `high`, NaN where they are not known."""
LAYERS = ("Conv", "Gemm", "MatMul")
"""What such a layer is in ONNX."""
BETWEEN = (
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu",
    "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators with an int8 kernel in ONNX Runtime, which stay in int8 where all that they read is made in int8."""
BATCH = 32
"""Calibration images at a time."""


def mark_int8(network: nn.Module) -> nn.Module:
    """A copy that exports its int8 layers as plain ones with a mark, for `in_int8`; itself where it has none."""
    return without_int8(network, lambda plain, layer: nn.Sequential(_Mark(layer), plain))


class _Mark(nn.Module):
    def __init__(self, layer: QuantConv2d | QuantLinear) -> None:
        super().__init__()
        known: Any = layer.input_quantizer
        self.range: dict[str, Any] = {
            end: math.nan if tensor.is_meta else float(tensor) for end, tensor in known.named_buffers()
        }

    def forward(self, x: Tensor) -> Tensor:
        return _mark(x, self.range)


@fx.wrap  # so that a network with marks can be traced: batch norm is found that way
def _mark(x: Tensor, ends: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{MARK}", (x,), ends, dtype=x.dtype, shape=x.shape)


def in_int8(proto: onnx.ModelProto, images: Tensor | None = None) -> onnx.ModelProto:
    """The model with its marked layers, and what lies between two of them, in int8; without marks, the model itself.

    Weights are int8 with a scale for each output channel, activations uint8 with one for each tensor: the pair that
    ONNX Runtime computes fastest on x86 (signed activations: 1.7 times the time on AVX2). Weights lie within -64 and
    64, see `blocks.quantized.Int8`. The mark's range is that of a layer's input; every other tensor gets the smallest
    and largest value that ``images`` make in fp32.

    ``images``: ``(n, channels, height, width)``, normalised; None where only the time counts.

    Raises: UserError for images of another shape than the model takes, a marked layer that is no convolution or matrix
    product, and a model that the quantiser cannot take.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    ranges, chosen = _unmarked(plain)
    if not chosen:
        return proto
    reader: Any = _Images(plain, images)
    ranges = {} if images is None else ranges
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "int8.onnx"
        try:
            quantize_static(
                plain, file, reader, quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                nodes_to_quantize=[*chosen, *_between(plain.graph, chosen)],
                extra_options={
                    "TensorQuantOverrides": ranges,
                    # Their sums are at hand in fp32, as logits should be.
                    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                },
            )  # fmt: skip
        except Exception as error:  # the runtime's errors share no class of their own
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise UserError(f"ONNX Runtime cannot put the network into int8: {reason}") from error
        return onnx.load(file)


def _unmarked(proto: onnx.ModelProto) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Take the marks out; returns the known ranges by tensor, and the names of the marked layers' nodes."""
    graph = proto.graph
    marks = {node.output[0]: node for node in graph.node if node.domain == DOMAIN}
    ranges: dict[str, list[dict[str, Any]]] = {}
    chosen: list[str] = []
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"  # the quantiser goes by names
        for place, tensor in enumerate(node.input):
            if tensor not in marks:
                continue
            if node.op_type not in LAYERS or place > 0:
                raise UserError(f"a layer marked int8 is a {node.op_type} in ONNX; int8 are {', '.join(LAYERS)}")
            source = marks[tensor].input[0]
            node.input[place] = source
            chosen.append(node.name)
            ends = {entry.name: entry.f for entry in marks[tensor].attribute}
            if math.isfinite(ends["low"]) and math.isfinite(ends["high"]):
                other = ranges.get(source, [{"rmin": math.inf, "rmax": -math.inf}])[0]
                low, high = min(ends["low"], other["rmin"]), max(ends["high"], other["rmax"])
                ranges[source] = [{"rmin": np.float32(low), "rmax": np.float32(high)}]
    _keep(graph.node, lambda node: node.domain != DOMAIN)
    _keep(graph.value_info, lambda value: value.name not in marks)
    _keep(proto.opset_import, lambda entry: entry.domain != DOMAIN)
    return ranges, chosen


def _keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    left = [entry for entry in field if wanted(entry)]
    del field[:]
    field.extend(left)


def _between(graph: onnx.GraphProto, chosen: Iterable[str]) -> Iterator[str]:
    """The nodes all of whose inputs are made in int8: constants, layers of ``chosen``, or other such nodes."""
    wanted = set(chosen)
    ready = {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:  # in order: what a node reads stands before it
        inside = node.op_type in BETWEEN and node.name not in wanted and ready.issuperset(node.input)
        if inside:
            yield node.name
        if inside or node.name in wanted or node.op_type == "Constant":
            ready.update(node.output)


class _Images:
    """A reader of calibration images, as the quantiser asks for one."""

    def __init__(self, proto: onnx.ModelProto, images: Tensor | None) -> None:
        entry = proto.graph.input[0]
        batch, *shape = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        if images is None:
            images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        if list(images.shape[1:]) != shape or not len(images) or not images.is_floating_point():
            raise UserError(
                f"the calibration images are {tuple(images.shape)} of {images.dtype}; the network takes "
                f"(n, {', '.join(map(str, shape))}) of floating-point numbers"
            )
        parts = images.float().split(batch or BATCH)
        self.parts = iter([{entry.name: part.numpy()} for part in parts if not batch or len(part) == batch])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.parts, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser recommends steps that a folded and checked model has behind it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
