"""A network with open widths: of each group of channels that belong together, as many stay as a decision says."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netsmith.cost.between import Between, Extent
from netsmith.cost.counts import Shape, image, run_shapes, to_meta
from netsmith.decisions import Option, Width
from netsmith.errors import UserError
from netsmith.graph.channels import Channels, Group
from netsmith.graph.slim import shorten, slim


class Kept(Width):
    """How many channels of a group stay."""


class Slimmable(nn.Module):
    """``network`` with one `Kept` for every group of channels of which some can go.

    Which channels stay is no decision: of a group the first ones in ``order``, a buffer ``(channels,)`` that a method
    sorts by what the channels are worth. While several widths are drawn, channels count as `Width.extent` says: what
    reads them is multiplied by that, so that a network in which none is drawn by less than 1 is the slimmed one.
    """

    def __init__(self, network: nn.Module, found: Channels, *, step: int = 8, most: int = 8) -> None:
        """``step``: widths are multiples of it; ``most``: of how many, at most, one can choose in a group."""
        super().__init__()
        self.network = network
        self.groups: dict[str, Group] = {}
        for name, group in found.groups.items():
            options = widths(group.size, 1 if group.heads else step, most)  # a head is many channels
            if len(options) > 1:
                path = name.replace(".", "/")
                self.groups[path] = group
                self.add_module(path, Kept(options))
                self.register_buffer(_order(path), torch.arange(group.size))
        self.reference = {path: group.size for path, group in self.groups.items()}
        if not self.groups:
            reasons = "; ".join(f"{layer}: {why}" for layer, why in found.closed.items()) or "its layers are too narrow"
            raise UserError(f"{type(network).__name__}: there is no channel to take out ({reasons})")

    def order(self, path: str) -> Tensor:
        """The channels of a group ``(channels,)``, those that stay longest first."""
        return self.get_buffer(_order(path))

    @torch.no_grad()
    def rank(self) -> None:
        """Put the channels with the largest weights first, of what reads them."""
        for path, group in self.groups.items():
            size = torch.zeros(group.size)
            for use in group.uses:
                if use.role == "in":
                    along = self.network.get_parameter(use.tensor).abs().transpose(0, use.dim).flatten(1).sum(1)
                    size += along[use.positions].sum(1)
            self.order(path).copy_(size.argsort(descending=True, stable=True))

    def width(self, path: str) -> Kept:
        found = self.get_submodule(path)
        assert isinstance(found, Kept)
        return found

    def forward(self, x: Tensor) -> Tensor:
        counts: dict[str, Tensor] = {}
        like = next(self.network.parameters()).detach()
        for path, group in self.groups.items():
            channels, shares = self.width(path).extent()
            if channels < group.size or shares is not None:
                kept = self.order(path)[:channels]
                shares = like.new_ones(channels) if shares is None else shares.to(like)
                counts[path] = like.new_zeros(group.size).index_put((kept,), shares)
        return functional_call(self.network, self.read(counts), (x,))

    def read(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that read channels of these groups, by their names in ``network``, times what each channel
        counts: ``(channels,)`` for a group."""
        masks = self.masks(counts)
        return {name: self.network.get_parameter(name) * mask for name, mask in masks.items()}

    def masks(self, counts: Mapping[str, Tensor], role: str = "in") -> dict[str, Tensor]:
        """What each channel counts ``(channels,)``, along the dimensions that read it (``out``: that make it): by the
        name of the weight, in shapes that it can be multiplied by."""
        found: dict[str, Tensor] = {}
        for path, count in counts.items():
            for use in self.groups[path].uses:
                if use.role == role:
                    weight = self.network.get_parameter(use.tensor)
                    along = count.new_ones(weight.shape[use.dim])
                    along = along.index_put((use.positions.to(count.device),), count[:, None].expand_as(use.positions))
                    shape = [1] * weight.dim()
                    shape[use.dim] = -1
                    mask = along.view(shape)
                    found[use.tensor] = found[use.tensor] * mask if use.tensor in found else mask
        return found

    def narrowed(self, chosen: Mapping[str, Option]) -> nn.Module:
        """The network with so many channels of each group."""
        groups = {group.name: group for group in self.groups.values()}
        keep = {self.groups[path].name: self.order(path)[: int(n)].sort().values for path, n in chosen.items()}
        if next(self.network.parameters()).device.type == "meta":  # without numbers, which ones does not matter
            keep = {self.groups[path].name: torch.arange(int(n), device="cpu") for path, n in chosen.items()}
        return slim(self.network, groups, keep)

    @property
    def heads(self) -> list[str]:
        """The decisions about heads: products of activations take part in what these cost, which no layer has."""
        return [path for path, group in self.groups.items() if group.heads]

    def between(self, input_shape: Shape) -> list[Between]:
        """The layers with parameters, each between the widths that it lies between, as `cost.prices` asks for them."""
        extents: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        for path, group in self.groups.items():
            for use in group.uses:
                places = extents[use.tensor][use.dim]
                places[path] = places.get(path, 0) + use.positions.shape[1]
        shadow = to_meta(self.network)
        shapes = _shapes(shadow, input_shape)
        return [
            _between(path, layer, shapes[path], self, extents)
            for path, layer in leaves(shadow).items()
            if path in shapes
        ]


def _between(
    path: str, layer: nn.Module, shape: Shape, space: Slimmable, extents: Mapping[str, Mapping[int, Mapping[str, int]]]
) -> Between:
    if any(list(child.parameters()) for child in layer.children()):  # layers themselves: what is left computes nothing
        own, layer = layer, nn.Identity()
        for name, parameter in own.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
    tensors = [name for name, _ in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]]
    lengths: dict[int, tuple[int, Mapping[str, int]]] = {}
    for name in tensors:
        for dim, parts in extents.get(f"{path}.{name}".lstrip("."), {}).items():
            lengths.setdefault(dim, (getattr(layer, name).shape[dim], parts))

    def extent(dim: int) -> Extent:
        whole, parts = lengths.get(dim, (0, {}))
        return Extent(whole - sum(space.groups[g].size * places for g, places in parts.items()), dict(parts))

    reads, makes = extent(1), extent(0)

    def at(u: int, v: int) -> tuple[nn.Module, Shape]:
        smaller = copy.deepcopy(layer)
        for name in tensors:
            dims = extents.get(f"{path}.{name}".lstrip("."), {})
            if dims:
                length = {0: v, 1: u}
                shorten(smaller, name, {dim: torch.arange(length[dim], device="meta") for dim in dims})
        return smaller, _input(smaller, shape, v)

    return Between(path, layer, reads, makes, at)


def _input(layer: nn.Module, shape: Shape, made: int) -> Shape:
    """The input of a layer that has become narrower."""
    if isinstance(layer, nn.Conv2d):
        return (layer.in_channels, *shape[1:])
    if isinstance(layer, nn.Linear):
        return (*shape[:-1], layer.in_features)
    return (made or shape[0], *shape[1:])


def leaves(network: nn.Module) -> dict[str, nn.Module]:
    """The parts that hold parameters of their own."""
    return {p: m for p, m in network.named_modules() if next(m.parameters(recurse=False), None) is not None}


def _shapes(shadow: nn.Module, input_shape: Shape) -> dict[str, Shape]:
    """What goes into each layer; one that does not run has none."""
    shapes: dict[str, Shape] = {}
    names = {layer: path for path, layer in leaves(shadow).items()}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[names[layer]] = tuple(inputs[0].shape[1:])  # pyright: ignore[reportArgumentType]

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    run_shapes(shadow, image(shadow, input_shape))
    for handle in handles:
        handle.remove()
    return shapes


def widths(size: int, step: int, most: int) -> list[int]:
    """Multiples of ``step``, at most so many, and the whole; of a group narrower than two steps multiples of less.

    >>> widths(64, 8, 8), widths(256, 8, 4), widths(16, 8, 8)
    ([8, 16, 24, 32, 40, 48, 56, 64], [64, 128, 192, 256], [4, 8, 12, 16])
    """
    while step > 1 and size < 4 * step:
        step //= 2
    step *= -(-size // (step * most))
    return [*range(step, size, step), size]


def _order(path: str) -> str:
    return f"order of {path}"
