"""Peak activation memory of a network on a device that runs one operator after the other.

Live at an operator: its inputs, its output, and every tensor that a later operator still needs. Batch norm is folded
and an activation or dropout works in place, so neither adds a tensor; weights are streamed and not counted
(the convention of MCUNet's counter, generalised from its block to any traced graph).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from netsmith.blocks.quantized import in_fp32
from netsmith.cost.counts import Shape, image, shipped, to_meta
from netsmith.cost.prices import Options, Prices
from netsmith.errors import UserError

ALIASES = (nn.Identity, nn.Dropout, nn.Flatten)
"""Hand the same memory on."""
IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid)
"""Overwrite their input, where nothing later reads it."""
ALIAS_CALLS = ("flatten", "view", "reshape", "contiguous", "dropout", "chunk", "split")
IN_PLACE_CALLS = ("relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid")
SUMS = ("add", "iadd")
STATES = 20_000
"""Sets of operators that are looked at for the best order; a graph with more keeps the order that it has."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of activations alive at the worst moment. Does not add up over layers: checked on derived networks, and
    where only widths are open a limit on each moment (`moments`)."""

    bytes_per_element: int = 4
    """4 for fp32, 1 for int8."""
    reorder: bool = False
    """Operators in the order that needs least, not as the module runs them."""
    sums_in_place: bool = False
    """Whether a sum may overwrite a summand that nothing else reads: µNAS counts so, TFLite Micro does not do it."""

    name = "peak_memory"
    unit = "B"

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        """Raises: UserError when the module cannot be traced: its memory is unknown, not 0."""
        return float(self.bytes_per_element * peak_of(*self.operators(module, input_shape)))

    def operators(self, module: nn.Module, input_shape: Shape) -> tuple[list[Operator], dict[int, int]]:
        """The operators in their order, and the elements of every buffer."""
        operators, sizes = liveness(module, input_shape, self.sums_in_place)
        return (least_order(operators, sizes) if self.reorder else operators), sizes


@dataclass(frozen=True)
class Ram(PeakMemory):
    """What a microcontroller's runtime needs for activations with the whole network in int8: a byte each, in the order
    that needs least (Liberis and Lane 2022). Scratch buffers of kernels come on top."""

    bytes_per_element: int = 1
    reorder: bool = True

    name = "ram"


ALIVE = {"peak_memory": PeakMemory(), "ram": Ram()}
"""What a budget can limit."""


class Operator(NamedTuple):
    """What it writes and what it reads; a view is no operator, it shares the buffer."""

    output: int
    size: int
    """Elements."""
    inputs: list[int]


def alive(module: nn.Module, input_shape: Shape) -> dict[str, float]:
    """All of `ALIVE`, from one trace. Raises as `PeakMemory`."""
    operators, sizes = liveness(module, input_shape)
    ordered = {False: operators, True: least_order(operators, sizes)}
    return {name: float(m.bytes_per_element * peak_of(ordered[m.reorder], sizes)) for name, m in ALIVE.items()}


def peak_elements(module: nn.Module, input_shape: Shape) -> int:
    """Elements alive at the worst moment, operators in the order the module runs them. Raises as `PeakMemory`."""
    return peak_of(*liveness(module, input_shape))


def liveness(
    module: nn.Module, input_shape: Shape, sums_in_place: bool = False
) -> tuple[list[Operator], dict[int, int]]:
    """The operators in the order that the module runs them, and the elements of every buffer.

    Layers in int8 count as in fp32: how much of what lies between them is in int8, the runtime decides.

    Raises: UserError when the module cannot be traced.
    """
    shaped = shipped(in_fp32(to_meta(module)))
    try:
        graph = fx.symbolic_trace(shaped)
        ShapeProp(graph).propagate(image(module, input_shape))
    except Exception as error:
        raise UserError(f"peak memory of {type(module).__name__} is unknown: it cannot be traced ({error})") from error
    return _liveness(graph, sums_in_place)


def _liveness(graph: fx.GraphModule, sums_in_place: bool) -> tuple[list[Operator], dict[int, int]]:
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    holders: list[list[fx.Node]] = []
    buffer: dict[fx.Node, int] = {}
    sizes: dict[int, int] = {}
    operators: list[Operator] = []
    for node in graph.graph.nodes:
        size = _elements(node.meta.get("tensor_meta"))
        inputs = [buffer[n] for n in node.all_input_nodes if n in buffer]
        if node.op == "output" or not size:
            continue

        def last(held: int, node: fx.Node = node) -> bool:  # reader of a buffer
            return all(position[user] <= position[node] for holder in holders[held] for user in holder.users)

        shared = inputs[:1] if inputs and _shares(graph, node, last(inputs[0])) else []
        if sums_in_place and not shared and _name(node) in SUMS:
            shared = [held for held in inputs if sizes[held] == size and last(held)][:1]
        if shared:
            buffer[node] = shared[0]
            holders[shared[0]].append(node)
            if len(set(inputs)) > 1 or any(shared[0] in earlier.inputs for earlier in operators):
                operators.append(Operator(shared[0], 0, inputs))  # so that what has to run before it does
            continue
        buffer[node] = len(sizes)
        holders.append([node])
        sizes[len(sizes)] = size
        operators.append(Operator(buffer[node], size, inputs))
    return operators, sizes


def _elements(meta: object) -> int:
    """Elements of a traced value: a tensor, a tuple of tensors (``chunk``), or 0 for what is no tensor."""
    shape = getattr(meta, "shape", None)
    if shape is not None:
        return shape.numel()
    return sum(_elements(part) for part in meta) if isinstance(meta, tuple | list) else 0


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _shares(graph: fx.GraphModule, node: fx.Node, last: bool) -> bool:
    """Whether the operator writes no memory of its own; ``last``: it is the last to read what it would overwrite."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, ALIASES) or (isinstance(module, IN_PLACE) and last)
    if node.op not in ("call_method", "call_function"):
        return False
    name = _name(node)
    if name == "getitem":  # of a tuple: one of its parts
        return not hasattr(node.all_input_nodes[0].meta["tensor_meta"], "shape")
    return name in ALIAS_CALLS or (name in IN_PLACE_CALLS and last)


def peak_of(operators: Sequence[Operator], sizes: Mapping[int, int]) -> int:
    """Peak over a given order: buffers not yet read for the last time, plus the output being written.

    An element-wise sum or product of two dying inputs could reuse one of them; we count its output as new, as MCUNet
    counts a projection that cannot reuse the skip input (8192 rather than 7168 in the sheet's example).
    """
    return max((sum(sizes[b] for b in live) for live in _alive(operators)), default=0)


def _alive(operators: Sequence[Operator]) -> list[set[int]]:
    """The buffers that are there while each operator runs."""
    last_use = {b: i for i, (_, _, inputs) in enumerate(operators) for b in inputs}
    found: list[set[int]] = []
    live: set[int] = set()
    for i, (output, _, inputs) in enumerate(operators):
        live.add(output)
        found.append(live | set(inputs))
        live = {b for b in live if last_use.get(b, -1) > i}
    return found


def least_order(operators: Sequence[Operator], sizes: Mapping[int, int]) -> list[Operator]:
    """The operators in an order of least peak, of all in which each runs after what it reads was written and before
    that is overwritten; as they are where that takes more than `STATES`.

    Best first over the sets of operators that have run, by the peak so far. An operator that neither raises the peak
    nor leaves more alive than before runs at once: no order is worse for it.
    """
    count = len(operators)
    after = [0] * count  # which have to run before each, as bits
    for i, (output, _, inputs) in enumerate(operators):
        for j, earlier in enumerate(operators[:i]):
            if earlier.output in inputs or earlier.output == output or output in earlier.inputs:
                after[i] |= 1 << j
    readers = {b: sum(1 << i for i, op in enumerate(operators) if b in op.inputs) for b in sizes}

    def run(i: int, done: int, alive: int) -> tuple[int, int]:
        """What is alive while it runs, and what then."""
        output, _, inputs = operators[i]
        there = any(done >> j & 1 and op.output == output for j, op in enumerate(operators))
        moment = alive + (0 if there else sizes[output])
        gone = (b for b in {output, *inputs} if not readers[b] & ~(done | 1 << i))
        return moment, moment - sum(sizes[b] for b in gone)

    best: dict[int, int] = {0: 0}
    heap: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, 0, 0, 0, ())]
    while heap and len(best) <= STATES:
        peak, _, done, alive, order = heapq.heappop(heap)
        if len(order) == count:
            return [operators[i] for i in order]
        ready = [i for i in range(count) if not done >> i & 1 and not after[i] & ~done]
        results = {i: run(i, done, alive) for i in ready}
        free = [i for i, (moment, then) in results.items() if moment <= peak and then <= alive]
        for i in free[:1] or ready:
            moment, then = results[i]
            raised, reached = max(peak, moment), done | 1 << i
            if raised < best.get(reached, raised + 1):
                best[reached] = raised
                heapq.heappush(heap, (raised, -len(order) - 1, reached, then, (*order, i)))
    return list(operators)


class Narrowed(Protocol):
    """A space of which only widths are open, as `graph.slimmable.Slimmable`."""

    reference: dict[str, int]

    def narrowed(self, chosen: Mapping[str, int]) -> nn.Module: ...


def moments(
    space: Narrowed, options: Mapping[str, Sequence[int]], input_shape: Shape, memory: PeakMemory
) -> list[Prices]:
    """What is alive while each operator runs, one price a moment, in the order of the whole network: the largest of
    them is the network's peak, so that a limit on memory is a limit on each. Moments that are never the largest are
    left out.

    A tensor's size is a constant plus a multiple of each width, found by narrowing one group after the other.

    Raises: UserError where a size is none, and as `PeakMemory`.
    """
    whole = {path: max(row) for path, row in options.items()}
    operators, sizes = memory.operators(space.narrowed(whole), input_shape)

    def sizes_at(widths: Mapping[str, int]) -> dict[int, int]:
        return liveness(space.narrowed(widths), input_shape, memory.sums_in_place)[1]

    slopes: dict[str, dict[int, float]] = {}
    for path, row in options.items():
        there = sizes_at({**whole, path: min(row)})
        slopes[path] = {b: (sizes[b] - there[b]) / (whole[path] - min(row)) for b in sizes if sizes[b] != there[b]}
    least = sizes_at({path: min(row) for path, row in options.items()})
    for b, size in sizes.items():
        if size - sum(slope.get(b, 0) * (whole[p] - min(options[p])) for p, slope in slopes.items()) != least[b]:
            raise UserError(f"peak memory of {type(space).__name__}: a tensor's size is no sum over the open widths")

    def price(live: set[int]) -> Prices:
        along = {p: memory.bytes_per_element * sum(slope.get(b, 0) for b in live) for p, slope in slopes.items()}
        full = memory.bytes_per_element * sum(sizes[b] for b in live)
        rows: Options = {p: {n: along[p] * n for n in row} for p, row in options.items()}
        return Prices(full - sum(along[p] * whole[p] for p in along), rows, memory.unit)

    return _undominated([price(live) for live in {frozenset(live): live for live in _alive(operators)}.values()])


def _undominated(prices: Sequence[Prices]) -> list[Prices]:
    """Without those that another one exceeds, whatever the widths: prices rise with them, so the narrowest network and
    the slopes tell."""

    def key(price: Prices) -> list[float]:
        narrow = [min(row.values()) for row in price.options.values()]
        return [price.constant + sum(narrow), *(max(r.values()) - min(r.values()) for r in price.options.values())]

    found: list[tuple[list[float], Prices]] = []
    for mine, price in sorted(((key(p), p) for p in prices), key=lambda pair: -sum(pair[0])):
        if not any(all(a >= b for a, b in zip(other, mine, strict=True)) for other, _ in found):
            found.append((mine, price))
    return [price for _, price in found]
