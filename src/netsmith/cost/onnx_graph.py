"""The cheap way from a module to an ONNX model: about a millisecond, where `torch.onnx.export(dynamo=True)` takes
most of a second.

Each aten call becomes the nodes that torch's own exporter writes for it (opset 20), so that ONNX Runtime fuses both
alike and a table entry is the time of the shipped file's layer. An operator that is not in `WRITERS` raises
`Unsupported`: the caller then takes the thorough exporter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from netsmith.cost.trace import Call, Program, Slot, record


class Unsupported(Exception):
    """An aten call, or a variant of one, that has no writer here."""


def onnx_model(module: nn.Module, input_shape: tuple[int, int, int]) -> bytes:
    """A serialised ONNX model of the module in eval mode, fp32, batch 1, batch norm folded.

    `input_shape` is (channels, height, width). Errors: `Unsupported` names the operator.
    """
    example = torch.zeros(1, *input_shape, device="meta")
    try:
        program = record(module, example)
    except (NotImplementedError, RuntimeError):  # it asks for numbers, or has an operator that cannot do without
        program = record(module, torch.zeros(1, *input_shape))
    if program.aliased_writes:
        raise Unsupported("an in-place operation on a tensor that is also seen through a view")
    graph = _Graph(program)
    for call in program.calls:
        if call.name not in WRITERS:
            raise Unsupported(f"operator {call.target}")
        WRITERS[call.name](graph, call)
    for slot in program.outputs:
        if graph.name(slot) == "x":  # a graph may not hand its input through without a node
            graph.nodes.append(helper.make_node("Identity", ["x"], ["same"]))
            graph.aliases[slot] = "same"
    outputs = [graph.name(slot) for slot in program.outputs]
    proto = helper.make_graph(
        graph.nodes,
        type(module).__name__,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, example.shape)],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, program.shapes[s])
            for n, s in zip(outputs, program.outputs, strict=True)
        ],
        graph.constants,
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


class _Graph:
    """Nodes and constants as they grow; a slot's name is `v<index>`, a constant's `c<number>`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.aliases: dict[Slot, str] = {Slot(0): "x"}

    def name(self, value: Any) -> str:
        """The name of a slot, or of a new constant."""
        if isinstance(value, Slot):
            return self.aliases.get(value, f"v{value.index}")
        array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def add(self, operator: str, inputs: list[Any], output: Slot | str, **attributes: Any) -> None:
        names = ["" if value is None else value if isinstance(value, str) else self.name(value) for value in inputs]
        self.nodes.append(
            helper.make_node(operator, names, [output if isinstance(output, str) else self.name(output)], **attributes)
        )


def _simple(operator: str, **attributes: Any) -> Callable[[_Graph, Call], None]:
    return lambda graph, call: graph.add(operator, call.arguments[:1], call.outputs[0], **attributes)


def _convolution(graph: _Graph, call: Call) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.arguments
    if transposed or weight.dim() != 4:
        raise Unsupported("transposed or not two-dimensional convolution")
    inputs = [x, weight] if bias is None else [x, weight, bias]
    sizes = {"strides": _pair(stride), "pads": _pair(padding) * 2, "dilations": _pair(dilation)}
    graph.add("Conv", inputs, call.outputs[0], **sizes, group=groups, kernel_shape=list(weight.shape[2:]))


def _batch_norm(graph: _Graph, call: Call) -> None:
    x, scale, shift, mean, variance, training = call.arguments[:6]
    if training or mean is None:
        raise Unsupported("batch norm with statistics of the batch")
    scale, shift = torch.ones_like(mean) if scale is None else scale, torch.zeros_like(mean) if shift is None else shift
    graph.add("BatchNormalization", [x, scale, shift, mean, variance], call.outputs[0], epsilon=call.arguments[-1])


def _binary(operator: str) -> Callable[[_Graph, Call], None]:
    def write(graph: _Graph, call: Call) -> None:
        if call.options.get("alpha", 1) != 1 or call.options.get("rounding_mode"):
            raise Unsupported(f"{call.target} with {call.options}")
        inputs = [np.float32(v) if isinstance(v, (int, float)) else v for v in call.arguments[:2]]
        graph.add(operator, inputs, call.outputs[0])

    return write


def _silu(graph: _Graph, call: Call) -> None:
    inner = f"s{call.outputs[0].index}"
    graph.add("Sigmoid", [call.arguments[0]], inner)
    graph.add("Mul", [call.arguments[0], inner], call.outputs[0])


def _clip(graph: _Graph, call: Call) -> None:
    low, high = (
        ([*call.arguments[1:3], None, None][:2]) if call.name == "clamp" else ([*call.arguments[1:3], -1.0, 1.0][:2])
    )
    bounds = [None if bound is None else np.float32(bound) for bound in (low, high)]
    graph.add("Clip", [call.arguments[0], *bounds], call.outputs[0])


def _mean(graph: _Graph, call: Call) -> None:
    x, *rest = call.arguments
    if not rest or not rest[0]:
        raise Unsupported("a mean over all axes")
    axes, keep = [*rest, False][:2]
    graph.add("ReduceMean", [x, np.array(axes, np.int64)], call.outputs[0], keepdims=int(keep))


def _linear(graph: _Graph, call: Call) -> None:
    bias, x, matrix = call.arguments[:3]
    if isinstance(matrix, Slot) or call.options:
        raise Unsupported("a matrix product of two computed tensors with a bias")
    graph.add("Gemm", [x, matrix.t().contiguous(), bias], call.outputs[0], transB=1)


def _same(graph: _Graph, call: Call) -> None:
    graph.aliases[call.outputs[0]] = graph.name(call.arguments[0])


def _reshape(graph: _Graph, call: Call) -> None:
    graph.add("Reshape", [call.arguments[0], np.array(call.shapes[0], np.int64)], call.outputs[0], allowzero=1)


def _transpose(graph: _Graph, call: Call) -> None:
    order = list(range(len(call.shapes[0])))
    if call.name == "permute":
        order = [axis % len(order) for axis in call.arguments[1]]
    else:
        a, b = call.arguments[1:3] if call.name == "transpose" else (0, 1)
        order[a], order[b] = order[b], order[a]
    graph.add("Transpose", [call.arguments[0]], call.outputs[0], perm=order)


def _concat(graph: _Graph, call: Call) -> None:
    graph.add("Concat", call.arguments[0], call.outputs[0], axis=[*call.arguments, 0][1])


def _split(graph: _Graph, call: Call) -> None:
    axis = [*call.arguments, 0][2]
    sizes = np.array([shape[axis] for shape in call.shapes], np.int64)
    names = [graph.name(slot) for slot in call.outputs]
    graph.nodes.append(helper.make_node("Split", [graph.name(call.arguments[0]), graph.name(sizes)], names, axis=axis))


def _slice(graph: _Graph, call: Call) -> None:
    x, axis, start, end, step = [*call.arguments, *[0, None, None, 1][len(call.arguments) - 1 :]]
    end = 2**62 if end is None else end
    graph.add("Slice", [x, *(np.array([v], np.int64) for v in (start or 0, end, axis, step))], call.outputs[0])


def _pool(operator: str) -> Callable[[_Graph, Call], None]:
    def write(graph: _Graph, call: Call) -> None:
        x, kernel, stride, padding, *rest = [*call.arguments, [], 0][: max(4, len(call.arguments))]
        attributes: dict[str, Any] = {
            "kernel_shape": _pair(kernel),
            "strides": _pair(stride or kernel),
            "pads": _pair(padding or 0) * 2,
        }
        if operator == "AveragePool":
            if any(rest[:1]) or any(v is not None for v in rest[2:]):
                raise Unsupported("average pooling with ceil_mode or a divisor")
            attributes["count_include_pad"] = int(rest[1]) if len(rest) > 1 else 1
        else:
            if rest[1:] and rest[1]:
                raise Unsupported("max pooling with ceil_mode")
            attributes["dilations"] = _pair(rest[0]) if rest else [1, 1]
        graph.add(operator, [x], call.outputs[0], **attributes)

    return write


def _resize(graph: _Graph, call: Call) -> None:
    scales = [b / a for a, b in zip(graph.program.shapes[call.arguments[0]], call.shapes[0], strict=True)]
    graph.add("Resize", [call.arguments[0], None, np.array(scales, np.float32)], call.outputs[0], mode="nearest",
              nearest_mode="floor", coordinate_transformation_mode="asymmetric")  # fmt: skip


def _pad(graph: _Graph, call: Call) -> None:
    x, pads, value = [*call.arguments, 0.0][:3]
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]  # torch counts from the last axis
    pairs = [(0, 0)] * (len(call.shapes[0]) - len(pairs)) + pairs
    amounts = np.array([a for a, _ in pairs] + [b for _, b in pairs], np.int64)
    graph.add("Pad", [x, amounts, np.float32(value)], call.outputs[0], mode="constant")


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _channel_shuffle(graph: _Graph, call: Call) -> None:
    batch, channels, height, width = call.shapes[0]
    groups, split, mixed = call.arguments[1], f"split{call.outputs[0].index}", f"mixed{call.outputs[0].index}"
    apart = np.array([batch, groups, channels // groups, height, width], np.int64)
    graph.add("Reshape", [call.arguments[0], apart], split, allowzero=1)
    graph.add("Transpose", [split], mixed, perm=[0, 2, 1, 3, 4])
    graph.add("Reshape", [mixed, np.array(call.shapes[0], np.int64)], call.outputs[0], allowzero=1)


def _leaky_relu(graph: _Graph, call: Call) -> None:
    graph.add("LeakyRelu", call.arguments[:1], call.outputs[0], alpha=[*call.arguments, 0.01][1])


def _gelu(graph: _Graph, call: Call) -> None:
    graph.add("Gelu", call.arguments[:1], call.outputs[0], approximate=call.options.get("approximate", "none"))


def _softmax(graph: _Graph, call: Call) -> None:
    graph.add("Softmax", call.arguments[:1], call.outputs[0], axis=call.arguments[1])


def _symbolic(graph: _Graph, call: Call) -> None:
    """A node that another domain has a meaning for, with its floating-point attributes (`cost.int8` makes such)."""
    inputs, operator, *_ = call.arguments
    numbers = dict(zip(call.options["attr_keys"], call.options["attr_floats"], strict=True))
    graph.add(operator, inputs, call.outputs[0], domain=call.options["domain"], **numbers)


def _pixel_shuffle(graph: _Graph, call: Call) -> None:
    graph.add("DepthToSpace", call.arguments[:1], call.outputs[0], blocksize=call.arguments[1], mode="CRD")


WRITERS: dict[str, Callable[[_Graph, Call], None]] = {
    "convolution": _convolution, "native_batch_norm": _batch_norm, "addmm": _linear,
    "mm": _binary("MatMul"), "bmm": _binary("MatMul"),
    "relu": _simple("Relu"), "sigmoid": _simple("Sigmoid"), "tanh": _simple("Tanh"),
    "hardswish": _simple("HardSwish"), "silu": _silu, "hardsigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardtanh": _clip, "clamp": _clip, "leaky_relu": _leaky_relu, "gelu": _gelu, "_softmax": _softmax,
    "pixel_shuffle": _pixel_shuffle, "_symbolic": _symbolic, "channel_shuffle": _channel_shuffle,
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"),
    "div": _binary("Div"), "mean": _mean, "view": _reshape, "_unsafe_view": _reshape, "squeeze": _reshape,
    "unsqueeze": _reshape, "transpose": _transpose, "t": _transpose, "permute": _transpose, "cat": _concat,
    "split": _split, "split_with_sizes": _split, "slice": _slice, "max_pool2d_with_indices": _pool("MaxPool"),
    "avg_pool2d": _pool("AveragePool"), "upsample_nearest2d": _resize, "constant_pad_nd": _pad, "clone": _same,
    "detach": _same, "alias": _same, "contiguous": _same,
}  # fmt: skip
