"""What ships as one layer is priced as one: batch norm folds into the layer before it, and an activation runs in that
layer's loop. Timed alone, either takes mostly what a call takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from netsmith.blocks.cells import FREE
from netsmith.cost.counts import Shape, image, run_shapes, to_meta
from netsmith.cost.prices import Atom, atoms
from netsmith.decisions import OneOf, parents


def fused_atoms(supernet: nn.Module, input_shape: Shape) -> list[Atom]:
    """`atoms`, without those that cost nothing, and with norms and activations in the atom that they ship with: a
    fixed layer, or each of the options of a decision.

    Raises: UserError, as `atoms`.
    """
    found = {atom.path: atom for atom in atoms(supernet, input_shape)}
    free = {path for path, atom in found.items() if isinstance(atom.module, FREE)}
    behind: dict[str, list[nn.Module]] = defaultdict(list)
    if any(_follows(atom.module) for path, atom in found.items() if path not in free):  # or a pass more says nothing
        for follower, leaders in _fused(supernet, input_shape, found, free).items():
            module = found.pop(follower).module
            for leader in leaders:
                behind[leader].append(module)
    for path, modules in behind.items():
        found[path] = replace(found[path], module=nn.Sequential(found[path].module, *modules))
    return [atom for path, atom in found.items() if path in behind or path not in free]


def _fused(
    supernet: nn.Module, input_shape: Shape, found: Mapping[str, Atom], free: set[str]
) -> dict[str, tuple[str, ...]]:
    """Atom that follows -> the atoms that it ships with, of which each network has one."""
    shadow, outer = to_meta(supernet), parents(supernet)
    ends: dict[str, tuple[str, ...]] = {path: (path,) for path, atom in found.items() if atom.width is None}
    owners = {path: atom.owner for path, atom in found.items()}
    for path, part in shadow.named_modules():
        if isinstance(part, OneOf) and all(f"{path}.{option}" in ends for option in part.options):
            ends[path] = tuple(f"{path}.{option}" for option in part.options)
            owners[path] = outer.get(path)
    fused = watch_fused({path: shadow.get_submodule(path) for path in ends if path not in free})
    run_shapes(shadow, image(supernet, input_shape))
    return {
        follower: ends[leader]
        for follower, leader in fused().items()
        if follower in found and owners[follower] == owners[leader]
    }


def watch_fused(parts: Mapping[str, nn.Module]) -> Callable[[], dict[str, str]]:
    """Watch parts of a network, by path, during one pass that is still to come. What it returns says, once that pass
    is over, which of them ship as a piece of another, in the order they ran: follower -> the part that made its input,
    or what that follows.

    A follower is a batch norm, or has no parameters and keeps the shape. One that runs several times follows none, as
    each time it ships with another layer.
    """
    makers: dict[int, tuple[Tensor, str]] = {}  # a tensor, kept so that no other gets its id, and what wrote it last
    leaders: dict[str, list[str]] = defaultdict(list)  # in the order they run

    def watch(path: str, part: nn.Module) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            _, maker = makers.get(id(inputs[0]), (None, "")) if len(inputs) == 1 else (None, "")
            leaders[path].append(maker)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept = isinstance(output, Tensor) and isinstance(inputs[0], Tensor) and inputs[0].shape == output.shape
            if not kept or not _follows(module):
                leaders[path][-1] = ""
            makers[id(output)] = output, leaders[path][-1] or path

        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)

    for path, part in parts.items():
        watch(path, part)
    return lambda: {path: found[0] for path, found in leaders.items() if len(found) == 1 and found[0]}


def _follows(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or next(module.parameters(), None) is None
