"""An existing network as a search space: every layer that can be replaced is opened, with what may stand in its place.

A layer is what stands in a row of layers (`nn.Sequential`, `nn.ModuleList`), takes one feature map and returns one, and
runs once: a residual block with its sum, or a lone convolution. A candidate maps the same shape to the same shape, so
that any combination is a network (LANA, Molchanov et al. 2021, arXiv:2107.10624; the lists are ours, the paper's 197
operations are not published).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netsmith.blocks.attention import Attention
from netsmith.blocks.collapsible import Collapsible, LinearBlock
from netsmith.blocks.ghost import GhostBottleneck, GhostModule, with_ghosts
from netsmith.blocks.mobile import ConvBn, FusedMBConv, MBConv
from netsmith.blocks.quantized import int8
from netsmith.blocks.residual import Bottleneck, ResidualConv
from netsmith.cost.counts import Shape, to_meta
from netsmith.decisions import Architecture, OneOf, derive
from netsmith.errors import UserError
from netsmith.graph.channels import Channels
from netsmith.graph.channels import channels as groups_of
from netsmith.graph.slim import proven
from netsmith.graph.slimmable import Slimmable
from netsmith.spaces import open_space

ORIGINAL = "original"
"""The option that leaves a layer as it is."""
IDENTITY = "identity"
"""The option that leaves it out; where shapes agree."""
FP32, INT8 = "fp32", "int8"
"""The options of a layer that may be quantised."""

PLACES = 14 * 14
"""Places of a map up to which attention between all of them is offered (ours)."""

ROWS = nn.Sequential | nn.ModuleList | nn.ModuleDict

Pool = Literal["identity", "small", "full", "channels", "bits"]
Made = Callable[[], nn.Module]


@dataclass(frozen=True)
class Replaceable:
    """A layer and the shapes of one image before and after it."""

    path: str
    input: Shape
    output: Shape

    @property
    def stride(self) -> int:
        return -(-self.input[1] // self.output[1])


def from_model(of: dict[str, Any], pool: Pool = "small", *, classes: int, channels: int, resolution: int) -> nn.Module:
    """The network ``of`` with a `OneOf` in place of every replaceable layer, or, for the pool "channels", with a `Kept`
    for every group of channels (`Slimmable`); untrained.

    ``of`` says which: `space`, `space_options` and `architecture`, as in a run's folder. ``pool``: what may stand
    there beside the original: "identity" (layers are only left out), "small" (four cheap operations more) or "full";
    for "bits" the layer itself in int8 (`in_either`).

    Raises: UserError for a network in which nothing can be replaced: why not, layer by layer.
    """
    network = source(of, classes=classes, channels=channels, resolution=resolution)
    if pool == "channels":
        return Slimmable(network, _groups(json.dumps(of, sort_keys=True), classes, channels, resolution))
    if pool == "bits":
        return in_either(network, (channels, resolution, resolution))
    found, left = replaceable(network, (channels, resolution, resolution))
    reference: Architecture = {}
    for layer in found:
        original = network.get_submodule(layer.path)
        options = candidates(layer, pool, original)
        if options:
            network.set_submodule(layer.path, OneOf({ORIGINAL: original, **{n: made() for n, made in options.items()}}))
            reference[layer.path] = ORIGINAL
    if not reference:
        reasons = "; ".join(f"{path}: {why}" for path, why in left.items()) or "it has no convolutions in a row"
        raise UserError(f"{of['space']}: there is no layer to replace ({reasons})")
    network.reference = reference  # pyright: ignore[reportArgumentType]
    return network


def source(of: Mapping[str, Any], *, classes: int, channels: int, resolution: int) -> nn.Module:
    """The plain network that is opened, untrained."""
    shape = {"classes": classes, "channels": channels, "resolution": resolution}
    network = open_space(of["space"], **{**of["space_options"], **shape})
    return derive(network, of.get("architecture") or {})


def in_either(network: nn.Module, shape: Shape) -> nn.Module:
    """``network`` itself, with a `OneOf` of "fp32" and "int8" in place of every plain convolution and linear layer that
    runs once: the same parameters, computed with in either way. ``shape`` is (channels, height, width) of the input.

    Raises: UserError where there is no such layer.
    """
    folding = tuple(f"{path}." for path, part in network.named_modules() if hasattr(part, "folded"))
    plain = {
        path: part
        for path, part in network.named_modules()
        if type(part) in (nn.Conv2d, nn.Linear) and not path.startswith(folding)  # what ships is another layer
    }
    runs = _runs(network, list(plain), shape)
    reference: Architecture = {}
    for path, layer in plain.items():
        if len(runs[path]) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros":
            network.set_submodule(path, OneOf({FP32: layer, INT8: int8(layer)}))  # pyright: ignore[reportArgumentType]
            reference[path] = FP32
    if not reference:
        raise UserError(f"{type(network).__name__} has no plain convolution or linear layer that runs once")
    network.reference = reference  # pyright: ignore[reportArgumentType]
    return network


@functools.lru_cache(maxsize=4)
def _groups(of: str, classes: int, channels: int, resolution: int) -> Channels:
    """The channel groups of a network: to trace it takes seconds, and a space is built many times."""
    with torch.device("meta"):
        network = source(json.loads(of), classes=classes, channels=channels, resolution=resolution).eval()
    with torch.device("cpu"):
        shape = (channels, resolution, resolution)
        return proven(network, groups_of(network, shape), shape)


def carry(space: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the layers of the space's reference their weights: those of the plain network, by their names there.

    Raises: UserError for weights that do not fit.
    """
    if isinstance(space, Slimmable):
        weights = {f"network.{name}": tensor for name, tensor in weights.items()}
    opened = {path: part for path, part in space.named_modules() if isinstance(part, OneOf)}
    own: Any = space.reference
    renamed = {}
    for name, tensor in weights.items():
        outer = next((path for path in opened if name.startswith(f"{path}.")), None)
        renamed[name if outer is None else f"{outer}.{own[outer]}.{name.removeprefix(outer + '.')}"] = tensor
    lacking, extra = space.load_state_dict(renamed, strict=False)
    others = tuple(f"{path}.{o}." for path, part in opened.items() for o in (*part.options, "logits") if o != own[path])
    whole = "network." if isinstance(space, Slimmable) else ""
    lacking = [name for name in lacking if name.startswith(whole) and not f"{name}.".startswith(others)]
    if lacking or extra:
        what = f"{lacking[0]!r} is missing" if lacking else f"the network has no {extra[0]!r}"
        raise UserError(f"the weights do not fit the network: {what}")
    if isinstance(space, Slimmable):
        space.rank()


def replaceable(network: nn.Module, shape: Shape) -> tuple[list[Replaceable], dict[str, str]]:
    """The layers that can be replaced, in the order of the network, and for the rest, why not.

    ``shape`` is (channels, height, width) of the input.
    """
    rows = list(_rows("", network))
    runs = _runs(network, rows, shape)
    found: list[Replaceable] = []
    left: dict[str, str] = {}
    for path in rows:
        calls = runs[path]
        if len(calls) != 1:
            left[path] = f"it runs {len(calls)} times in a pass"
        elif calls[0] is None:
            left[path] = "it does not take one feature map and return one"
        elif calls[0][0] == tuple(shape):
            left[path] = "it is the stem"
        else:
            found.append(Replaceable(path, *calls[0]))
    return found, left


def _rows(path: str, module: nn.Module) -> Iterator[str]:
    """The parts that may be layers: what convolves and stands in a row, and blocks that stand alone."""
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if isinstance(child, ROWS) or _holds_a_row(child):
            yield from _rows(inner, child)
        elif _is_block(child) or (isinstance(child, nn.Conv2d) and isinstance(module, ROWS)):
            yield inner


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) and any(isinstance(part, nn.Conv2d) for part in module.modules())


def _holds_a_row(module: nn.Module) -> bool:
    """Whether several blocks stand inside in a row, or several blocks of one kind: then these are the layers."""
    for part in module.modules():
        blocks = [child for child in part.children() if _is_block(child)]
        alike = len({type(block) for block in blocks}) == 1 and all(_deep(block) for block in blocks)
        if len(blocks) > 1 and (isinstance(part, ROWS) or alike):
            return True
    return False


def _deep(module: nn.Module) -> bool:
    return sum(isinstance(part, nn.Conv2d) for part in module.modules()) > 1


def _runs(network: nn.Module, paths: list[str], shape: Shape) -> dict[str, list[Any]]:
    """For each path its calls in one pass: (input shape, output shape), or None for other than feature maps."""
    shadow = to_meta(network).eval()
    calls: dict[str, list[Any]] = {path: [] for path in paths}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            maps = [*inputs, output]
            plain = len(maps) == 2 and all(isinstance(part, Tensor) and part.dim() == 4 for part in maps)
            calls[path].append(tuple(tuple(part.shape[1:]) for part in maps) if plain else None)

        return hook

    for path in paths:
        shadow.get_submodule(path).register_forward_hook(note(path))
    with torch.no_grad():
        shadow(torch.empty(1, *shape, device="meta"))
    return calls


def candidates(layer: Replaceable, pool: Pool, original: nn.Module | None = None) -> dict[str, Made]:
    """What may stand in place of a layer, by name; each makes its module. Empty where the shapes allow nothing.
    ``original``, the layer itself, for what is made of it (its convolutions as ghost modules, in the full pool)."""
    (inputs, height, width), (outputs, *after), stride = layer.input, layer.output, layer.stride
    options: dict[str, Made] = {}
    if layer.input == layer.output:
        options[IDENTITY] = nn.Identity
    if pool == "identity" or after != [-(-height // stride), -(-width // stride)]:
        return options
    if pool == "small":
        return options | _small(inputs, outputs, stride)
    options |= _full(inputs, outputs, stride) | _ghosts(inputs, outputs, stride, original) | _collapsing(layer)
    return options | (_attention(layer) if 1 < after[0] * after[1] <= PLACES else {})


def _small(inputs: int, outputs: int, stride: int) -> dict[str, Made]:
    return {
        "conv_k3": lambda: ResidualConv(inputs, outputs, 3, stride=stride),
        "bottleneck_k3_m4": lambda: Bottleneck(inputs, outputs, 3, hidden=_part(outputs, 4), stride=stride),
        "mb_k3_e1": lambda: MBConv(inputs, outputs, kernel=3, hidden=inputs, stride=stride, expand=False),
        "mb_k3_e2": lambda: MBConv(inputs, outputs, kernel=3, hidden=2 * inputs, stride=stride),
    }


def _full(inputs: int, outputs: int, stride: int) -> dict[str, Made]:
    found = _small(inputs, outputs, stride)
    for kernel in (3, 5, 7):
        for expansion in (1, 2, 3, 4, 6):
            for squeeze in (0, max(1, inputs // 4)):
                name = f"mb_k{kernel}_e{expansion}" + ("_se" if squeeze else "")
                found[name] = lambda k=kernel, e=expansion, s=squeeze: MBConv(
                    inputs, outputs, kernel=k, hidden=e * inputs, stride=stride, squeeze=s, expand=e > 1
                )
    for kernel in (3, 5):
        for expansion in (1, 2, 4, 6):
            for squeeze in (0, max(1, inputs // 4)):
                name = f"fused_k{kernel}_e{expansion}" + ("_se" if squeeze else "")
                found[name] = lambda k=kernel, e=expansion, s=squeeze: FusedMBConv(
                    inputs, outputs, kernel=k, hidden=e * inputs, stride=stride, squeeze=s
                )
        for share in (8, 4, 2):
            found[f"bottleneck_k{kernel}_m{share}"] = lambda k=kernel, m=share: Bottleneck(
                inputs, outputs, k, hidden=_part(outputs, m), stride=stride
            )
        for share in (4, 2, 1):
            found[f"basic_k{kernel}_m{share}"] = lambda k=kernel, m=share: nn.Sequential(
                ConvBn(inputs, _part(outputs, m), k, stride=stride), ConvBn(_part(outputs, m), outputs, k)
            )
    for kernel in (1, 5):
        found[f"conv_k{kernel}"] = lambda k=kernel: ResidualConv(inputs, outputs, k, stride=stride)
    return found


def _ghosts(inputs: int, outputs: int, stride: int, original: nn.Module | None) -> dict[str, Made]:
    """Of C-Ghost, with two maps of a kind (s = 2) and cheap 3x3 ones, as GhostNet has them."""
    found: dict[str, Made] = {}
    for kernel in (1, 3):
        found[f"ghost_k{kernel}"] = lambda k=kernel: GhostModule(inputs, outputs, k, stride=stride)
    for expansion in (2, 3, 6):
        for squeeze in (0, max(1, inputs // 4)):
            name = f"ghost_e{expansion}" + ("_se" if squeeze else "")
            found[name] = lambda e=expansion, s=squeeze: GhostBottleneck(
                inputs, outputs, hidden=e * inputs, stride=stride, squeeze=s
            )
    made = with_ghosts(original) if original is not None else None
    if made is not None and repr(made) != repr(original):  # or it would have the original's price
        found["ghosted"] = lambda: copy.deepcopy(made)
    return found


def _collapsing(layer: Replaceable) -> dict[str, Made]:
    """Wide while they learn, one convolution when they ship: without activation, and RAN's block with one in front."""
    inputs, outputs, stride = layer.input[0], layer.output[0], layer.stride
    hidden = max(outputs, min(4 * outputs, 256))  # SESR's 256, where that is not too much
    found: dict[str, Made] = {}
    for kernel in (3, 5):
        found[f"linear_k{kernel}"] = lambda k=kernel: LinearBlock(
            inputs, outputs, k, hidden=hidden, stride=stride, skip=layer.input == layer.output, online=True
        )
        found[f"collapsed_k{kernel}"] = lambda k=kernel: Collapsible(
            MBConv(inputs, outputs, kernel=k, hidden=2 * inputs, stride=stride), gate=0.0
        )
    return found


def _attention(layer: Replaceable) -> dict[str, Made]:
    """With heads of about 32 channels, alone and with two 1x1 convolutions behind it."""
    (inputs, *_), (outputs, *_) = layer.input, layer.output
    heads = next(n for n in range(max(1, outputs // 32), 0, -1) if outputs % n == 0)
    return {
        name: lambda e=expansion: Attention(inputs, outputs, heads=heads, stride=layer.stride, expansion=e)
        for name, expansion in (("attention", 0), ("attention_e2", 2))
    }


def _part(channels: int, share: int) -> int:
    return max(8, channels // share)
