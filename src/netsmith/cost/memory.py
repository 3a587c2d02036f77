"""Peak activation memory of a network on a device that runs one operator after the other.

Live at an operator: its inputs, its output, and every tensor that a later operator still needs. Batch norm is folded
and an activation or dropout works in place, so neither adds a tensor; weights are streamed and not counted
(the convention of MCUNet's counter, generalised from its block to any traced graph).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from netsmith.cost.counts import Shape, to_meta
from netsmith.errors import UserError

IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Identity, nn.Dropout, nn.Flatten)
IN_PLACE_CALLS = ("sigmoid", "relu", "flatten", "view", "reshape", "contiguous")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of activations alive at the worst moment. Does not add up over layers: checked on derived networks."""

    bytes_per_element: int = 4
    """4 for fp32, 1 for int8."""

    name = "peak_memory"
    unit = "B"

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        return float(self.bytes_per_element * peak_elements(module, input_shape))


def peak_elements(module: nn.Module, input_shape: Shape) -> int:
    """Elements alive at the worst moment, operators in the order the module runs them.

    Raises: UserError when the module cannot be traced (its memory is unknown, not 0).
    """
    shaped = to_meta(module)
    try:
        graph = fx.symbolic_trace(shaped)
        ShapeProp(graph).propagate(torch.empty(1, *input_shape, device="meta"))
    except Exception as error:
        raise UserError(f"peak memory of {type(module).__name__} is unknown: it cannot be traced ({error})") from error
    return peak_of(*_liveness(graph))


def _liveness(graph: fx.GraphModule) -> tuple[list[tuple[int, int, list[int]]], dict[int, int]]:
    """Operators as ``(output buffer, its size, input buffers)`` and the size of each buffer; views share a buffer."""
    buffer: dict[fx.Node, int] = {}
    sizes: dict[int, int] = {}
    operators: list[tuple[int, int, list[int]]] = []
    for node in graph.graph.nodes:
        meta = node.meta.get("tensor_meta")
        inputs = [buffer[n] for n in node.all_input_nodes if n in buffer]
        if node.op == "output" or meta is None or not hasattr(meta, "shape"):
            continue
        if inputs and _in_place(graph, node):
            buffer[node] = inputs[0]
            continue
        buffer[node] = len(sizes)
        sizes[len(sizes)] = meta.shape.numel()
        operators.append((buffer[node], sizes[buffer[node]], inputs))
    return operators, sizes


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), IN_PLACE)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in IN_PLACE_CALLS


def peak_of(operators: list[tuple[int, int, list[int]]], sizes: dict[int, int]) -> int:
    """Peak over a given order: buffers not yet read for the last time, plus the output being written.

    An element-wise sum or product of two dying inputs could reuse one of them; we count its output as new, as MCUNet
    counts a projection that cannot reuse the skip input (8192 rather than 7168 in the sheet's example).
    """
    last_use = {b: i for i, (_, _, inputs) in enumerate(operators) for b in inputs}
    live: set[int] = set()
    peak = 0
    for i, (output, _, inputs) in enumerate(operators):
        live.add(output)
        peak = max(peak, sum(sizes[b] for b in live | set(inputs)))
        live = {b for b in live if last_use.get(b, -1) > i}
    return peak
