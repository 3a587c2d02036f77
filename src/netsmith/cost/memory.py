"""Peak activation memory of a network on a device that runs one operator after the other.

Live at an operator: its inputs, its output, and every tensor that a later operator still needs. Batch norm is folded
and an activation or dropout works in place, so neither adds a tensor; weights are streamed and not counted
(the convention of MCUNet's counter, generalised from its block to any traced graph).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from netsmith.blocks.quantized import in_fp32
from netsmith.cost.counts import Shape, image, shipped, to_meta
from netsmith.errors import UserError

ALIASES = (nn.Identity, nn.Dropout, nn.Flatten)
"""Hand the same memory on."""
IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid)
"""Overwrite their input, where nothing later reads it."""
ALIAS_CALLS = ("flatten", "view", "reshape", "contiguous", "dropout", "chunk", "split")
IN_PLACE_CALLS = ("relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid")


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

    Layers in int8 count as in fp32: how much of what lies between them is in int8, the runtime decides.

    Raises: UserError when the module cannot be traced (its memory is unknown, not 0).
    """
    shaped = shipped(in_fp32(to_meta(module)))
    try:
        graph = fx.symbolic_trace(shaped)
        ShapeProp(graph).propagate(image(module, input_shape))
    except Exception as error:
        raise UserError(f"peak memory of {type(module).__name__} is unknown: it cannot be traced ({error})") from error
    return peak_of(*_liveness(graph))


def _liveness(graph: fx.GraphModule) -> tuple[list[tuple[int, int, list[int]]], dict[int, int]]:
    """Operators as ``(output buffer, its size, input buffers)`` and the size of each buffer; views share a buffer."""
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    holders: list[list[fx.Node]] = []
    buffer: dict[fx.Node, int] = {}
    sizes: dict[int, int] = {}
    operators: list[tuple[int, int, list[int]]] = []
    for node in graph.graph.nodes:
        size = _elements(node.meta.get("tensor_meta"))
        inputs = [buffer[n] for n in node.all_input_nodes if n in buffer]
        if node.op == "output" or not size:
            continue
        if inputs and _shares(graph, node, [user for n in holders[inputs[0]] for user in n.users], position):
            buffer[node] = inputs[0]
            holders[inputs[0]].append(node)
            continue
        buffer[node] = len(sizes)
        holders.append([node])
        sizes[len(sizes)] = size
        operators.append((buffer[node], size, inputs))
    return operators, sizes


def _elements(meta: object) -> int:
    """Elements of a traced value: a tensor, a tuple of tensors (``chunk``), or 0 for what is no tensor."""
    shape = getattr(meta, "shape", None)
    if shape is not None:
        return shape.numel()
    return sum(_elements(part) for part in meta) if isinstance(meta, tuple | list) else 0


def _shares(graph: fx.GraphModule, node: fx.Node, readers: list[fx.Node], position: dict[fx.Node, int]) -> bool:
    """Whether the operator writes no memory of its own; ``readers`` are all that read what it would overwrite."""
    last = all(position[reader] <= position[node] for reader in readers)
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, ALIASES) or (isinstance(module, IN_PLACE) and last)
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "getitem":  # of a tuple: one of its parts
        return not hasattr(node.all_input_nodes[0].meta["tensor_meta"], "shape")
    return name in ALIAS_CALLS or (name in IN_PLACE_CALLS and last)


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
