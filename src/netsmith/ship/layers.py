"""A network layer by layer, as it runs: shapes, counts, and what each layer adds to the latency of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from netsmith.blocks.cells import FREE
from netsmith.cost import meter
from netsmith.cost.counts import Macs, Params, Shape, shipped, to_meta
from netsmith.cost.device import Device


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
    seconds: float = 10.0,
) -> list[Layer]:
    """The layers of nested `nn.Sequential`s, lists and cells in the order they run, as shipped; what does nothing is
    left out.

    With a ``device`` each gets the time by which it makes the network longer: all beginnings of the network (the first
    layer, the first two, ...) are timed in turn for about ``seconds``, and neighbours subtracted. Layers timed one by
    one instead add up to 0.82-0.93 of networks of 0.25-0.6 ms, whose weights do not all stay in the cache, and to 1.6
    of one of 0.05 ms, as each pays for a call; profiled operators to 1.1-2.7; these differences to 0.96-1.00. They are
    noisier: 0.3-0.8 % of the whole for one layer, 4 % on a busy machine.

    A network that is no `nn.Sequential` gives its children, without measured times.
    """
    network = shipped(network)
    shapes = _shapes(network, [name for name, _ in _flat(network)], input_shape)
    chain = [(name, network.get_submodule(name)) for name in shapes]
    chained = type(network) is nn.Sequential
    measured = _differences([m for _, m in chain], input_shape, device, seconds) if device and chained else []
    found = []
    for i, (name, module) in enumerate(chain):
        before, after = shapes[name]
        found.append(
            Layer(
                name=name,
                text=" ".join(repr(module).split()),
                input=before,
                output=after,
                macs=Macs()(module, before),
                params=Params()(module, before),
                predicted_ms=(predicted or {}).get(name),
                measured_ms=measured[i] if measured else None,
            )
        )
    return found


def _flat(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) is nn.Sequential or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _flat(child, f"{prefix}{name}.")
        elif not isinstance(child, FREE):
            yield f"{prefix}{name}", child


def _shapes(network: nn.Module, names: list[str], input_shape: Shape) -> dict[str, tuple[Any, Any]]:
    """Input and output shapes, batch left out, of the layers that run once and take one tensor."""
    shadow = to_meta(network)
    found: dict[str, list[tuple[Any, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            shapes = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:])) if tensors else (None, None)
            found.setdefault(name, []).append(shapes)

        return hook

    for name in names:
        shadow.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return {name: calls[0] for name, calls in found.items() if len(calls) == 1 and calls[0][0] is not None}


def _differences(chain: list[nn.Module], input_shape: Shape, device: Device, seconds: float) -> list[float]:
    """Milliseconds that each layer adds; together they are the whole less what an empty call takes."""
    timed: dict[str, Callable[[], object]] = {"": device.load(nn.ReLU(), (1, 1, 1))}
    for end in range(1, len(chain) + 1):
        timed[str(end)] = device.load(nn.Sequential(*chain[:end]), input_shape)
    medians = [result.median_ms for result in meter.measure(timed, seconds=seconds).values()]
    # Noise can make a tiny layer negative.
    return [max(0.0, after - before) for before, after in pairwise(medians)]
