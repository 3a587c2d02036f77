"""A network layer by layer, as it runs: shapes, counts, and what each layer adds to the latency of those before it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from netsmith.blocks.cells import FREE
from netsmith.cost import meter
from netsmith.cost.counts import Macs, Params, Shape, image, run_shapes, shipped, to_meta
from netsmith.cost.device import Device
from netsmith.cost.fused import watch_fused


@dataclass(frozen=True)
class Layer:
    """One layer, and the shapes of one image before and after it: (channels, height, width), or (features,)."""

    name: str
    text: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    macs: float
    params: float
    predicted_ms: float | None = None
    measured_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "input": list(self.input), "output": list(self.output)}


def layers(
    network: nn.Module,
    input_shape: Shape,
    device: Device | None = None,
    *,
    predicted: Mapping[str, float] | None = None,
    seconds: float = 5.0,
) -> list[Layer]:
    """The layers of nested `nn.Sequential`s, lists and cells in the order they run, as shipped: a norm or an activation
    is a piece of the layer before it, and what does nothing is left out. ``predicted``: milliseconds by name; what has
    a number there is one layer.

    With a ``device`` each gets the time by which it makes the network longer: all beginnings of the network (the first
    layer, the first two, ...) are timed in turn for about ``seconds``, and neighbours subtracted. Layers timed one by
    one instead add up to 0.82-0.93 of networks of 0.25-0.6 ms, whose weights do not all stay in the cache, and to 1.6
    of one of 0.05 ms, as each pays for a call; profiled operators to 1.1-2.7; these differences to 0.96-1.00. They are
    noisier: 0.3-0.8 % of the whole for one layer, 4 % on a busy machine.

    A network that is no `nn.Sequential` gives its children, without measured times.
    """
    network, times = shipped(network), predicted or {}
    shapes, fused = _shapes(network, [name for name, _ in _flat(network, times)], input_shape)
    rows = {name: [name, *(follower for follower, leader in fused.items() if leader == name)] for name in shapes}
    chain = {name: [network.get_submodule(part) for part in rows[name]] for name in shapes if name not in fused}
    wholes = [nn.Sequential(*parts) for parts in chain.values()]
    chained = type(network) is nn.Sequential
    measured = _differences(wholes, input_shape, device, seconds) if device and chained else []
    found = []
    for i, (name, parts) in enumerate(chain.items()):
        before, after = shapes[name][0], shapes[rows[name][-1]][1]
        known = [times[part] for part in rows[name] if part in times]
        found.append(
            Layer(
                name=name,
                text=", ".join([" ".join(repr(parts[0]).split()), *(type(part).__name__ for part in parts[1:])]),
                input=before,
                output=after,
                macs=Macs()(wholes[i], before),
                params=Params()(wholes[i], before),
                predicted_ms=sum(known) if known else None,
                measured_ms=measured[i] if measured else None,
            )
        )
    return found


def _flat(module: nn.Module, whole: Container[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        row = type(child) is nn.Sequential or isinstance(child, nn.ModuleList | nn.ModuleDict)
        if row and f"{prefix}{name}" not in whole:
            yield from _flat(child, whole, f"{prefix}{name}.")
        elif not isinstance(child, FREE):
            yield f"{prefix}{name}", child


def _shapes(
    network: nn.Module, names: list[str], input_shape: Shape
) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
    """Input and output shapes, batch left out, of the layers that run once and take one tensor; and of those that ship
    as a piece of another, of which."""
    shadow = to_meta(network)
    found: dict[str, list[tuple[Any, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            shapes = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:])) if tensors else (None, None)
            found.setdefault(name, []).append(shapes)

        return hook

    fused = watch_fused({name: shadow.get_submodule(name) for name in names})
    for name in names:
        shadow.get_submodule(name).register_forward_hook(note(name))
    run_shapes(shadow, image(network, input_shape))
    once = {name: calls[0] for name, calls in found.items() if len(calls) == 1 and calls[0][0] is not None}
    return once, {name: leader for name, leader in fused().items() if name in once and leader in once}


def _differences(chain: Sequence[nn.Module], input_shape: Shape, device: Device, seconds: float) -> list[float]:
    """Milliseconds that each layer adds; together they are the whole less what an empty call takes."""
    timed: dict[str, Callable[[], object]] = {"": device.load(nn.ReLU(), (1, 1, 1))}
    for end in range(1, len(chain) + 1):
        timed[str(end)] = device.load(nn.Sequential(*chain[:end]), input_shape)
    medians = [result.median_ms for result in meter.measure(timed, seconds=seconds).values()]
    # Noise can make a tiny layer negative.
    return [max(0.0, after - before) for before, after in pairwise(medians)]
