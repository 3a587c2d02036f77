"""A network without its head, as a backbone: the last map of every scale.

The forward pass is traced (`torch.fx`) as far down as scales change: what keeps the scale or halves it, a block, stays
the module that it is. The graph is then cut behind the last map of each scale, and what only the head needed falls off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from netsmith.cost.counts import Shape, to_meta
from netsmith.errors import UserError

SIDE = 256
"""Pixels a side of the image that shapes are traced with: at the few pixels of a small task several scales of a network
can be one."""
COARSEST = 64
"""The largest stride of a map; what is coarser is a head that was written as a convolution (timm's VGG)."""


class Features(nn.Module):
    """``(n, channels, height, width)`` -> the last map of each scale, the finest first.

    Map i is ``(n, channels[i], height / reductions[i], width / reductions[i])``, rounded as the network rounds.
    """

    def __init__(self, body: nn.Module, channels: list[int], reductions: list[int]) -> None:
        super().__init__()
        self.body = body
        self.channels, self.reductions = channels, reductions

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x))


def features(network: nn.Module, shape: Shape) -> Features:
    """The maps of a copy of ``network`` at the strides 2, 4, 8, ... that it has (1, where that is all), as timm's
    ``features_only`` has them; but the last is what the classifier pools. In the network's mode (train or eval).

    ``shape`` is (channels, height, width) of the images it was made for.

    Raises: UserError for a network whose forward pass cannot be traced, or in which there are no maps.
    """
    network = copy.deepcopy(network)
    for part in network.modules():
        if getattr(part, "inplace", False):  # what comes next would write over a map that is given out
            part.inplace = False  # pyright: ignore[reportArgumentType]
    for side in (SIDE, shape[1]):
        try:
            seen = _watched(network, (shape[0], side, side))
            break
        except Exception as error:  # whatever the network's own code raises for another size, or for its own
            failure = error
    else:
        raise UserError(f"{type(network).__name__} does not run on {shape}: {_reason(failure)}") from failure
    try:
        graph = _Tracer(seen).trace(network)
        values = _values(network, graph, (shape[0], side, side))
    except Exception as error:  # fx fails in as many ways as Python can
        raise UserError(f"{type(network).__name__} cannot be traced for its features: {_reason(error)}") from error
    scales: dict[int, fx.Node] = {}
    for node, value in values.items():
        if (found := _map(value)) and (scale := 2 ** round(math.log2(side / found[1]))) <= COARSEST:
            scales[scale] = node
    reductions = sorted(scale for scale in scales if scale > 1) or list(scales)
    if not reductions:
        raise UserError(f"{type(network).__name__} has no feature maps (channels, height, width) to give out")
    taps = [scales[scale] for scale in reductions]
    if (layer := _behind(network, values, taps[-1])) is not None:
        raise UserError(
            f"{type(network).__name__} goes on behind its last feature map (images, channels, height, width): what "
            f"{layer.target} makes is {tuple(values[layer].shape)}"
        )
    channels = [values[node].shape[1] for node in taps]
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    graph.output(tuple(taps))
    graph.eliminate_dead_code()
    return Features(fx.GraphModule(network, graph), channels, reductions).train(network.training)


_Seen = dict[str, bool]


def _watched(network: nn.Module, shape: Shape) -> _Seen:
    """Which modules run over several scales, or from a map to none, by path."""
    shadow = to_meta(network)
    calls: dict[str, list[tuple[Shape | None, Shape | None]]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            maps = sorted(filter(None, map(_map, _tensors(inputs))), key=lambda each: each[1])
            calls.setdefault(path, []).append((maps[0] if maps else None, _map(output)))

        return hook

    for path, part in shadow.named_modules():
        part.register_forward_hook(note(path))
    with torch.no_grad():
        shadow(torch.empty(1, *shape, device="meta"))
    return {path: any(_several(network, path, calls, *call) for call in found) for path, found in calls.items()}


def _several(
    network: nn.Module, path: str, calls: dict[str, list[Any]], before: Shape | None, after: Shape | None
) -> bool:
    if before is None or after is None or before[1] > 2.5 * after[1]:
        return True
    if before[1] < 1.5 * after[1]:
        return False
    # A stage that ends with its stride has blocks before that, which keep the shape that it gets.
    inner = (name for name in calls if name.startswith(f"{path}."))
    blocks = (
        name for name in inner if sum(isinstance(p, nn.Conv2d) for p in network.get_submodule(name).modules()) > 1
    )
    return any(call == (before, before) for name in blocks for call in calls[name])


class _Tracer(fx.Tracer):
    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path) and self.seen.get(path, True):
            try:
                return forward(*args, **kwargs)
            except Exception:  # its Python asks for values; what was noted of it so far leads nowhere and falls off
                pass
        return self.create_proxy("call_module", path, args, kwargs)


def _values(network: nn.Module, graph: fx.Graph, shape: Shape) -> dict[fx.Node, Any]:
    """What each node makes of an image, on the meta device, in the order they run."""
    values: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def fetch_attr(self, target: str) -> Any:
            value = super().fetch_attr(target)  # may be a constant that tracing has put into the network
            return value.to("meta") if isinstance(value, Tensor) else value

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op not in ("placeholder", "get_attr", "output"):
                values[n] = value
            return value

    with torch.no_grad():
        Watch(fx.GraphModule(to_meta(network), graph)).run(torch.empty(1, *shape, device="meta"))
    return values


def _behind(network: nn.Module, values: dict[fx.Node, Any], last: fx.Node) -> fx.Node | None:
    """A layer behind the last map that still sees places: of tokens, or of maps whose channels come last."""
    order = list(values)
    for node in order[order.index(last) + 1 :]:
        value = values[node]
        if not isinstance(value, Tensor) or _map(value) or sum(size > 1 for size in value.shape[1:]) < 2:
            continue
        if node.op == "call_module" and any(True for _ in network.get_submodule(str(node.target)).parameters()):
            return node
    return None


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _tensors(value) if isinstance(value, list | tuple) else (value,)


def _map(value: Any) -> Shape | None:
    """Its shape, of a square map of more than one place: what is 1x1 has been pooled."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != value.shape[3] or value.shape[2] < 2:
        return None
    return value.shape[1], value.shape[2], value.shape[3]


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
