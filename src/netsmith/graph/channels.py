"""Which channels of a network belong together: what has to go when one of them goes.

The network is exported (`torch.export`), and its operators run once more, on labels in place of numbers: every channel
that a layer makes gets a label of its own, and an operator that only moves numbers (flatten, concatenate, split) moves
the labels by itself. Where two labels meet in a sum they become one, and so do all of an attention head where it is
multiplied. A label that reaches an operator that needs all channels (layer norm, the output) is closed, with the
reason. In the end, labels that are in the same places are a group, of which any may go.
"""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from netsmith.errors import UserError

Role = Literal["out", "in", "along"]
"""The weights of a dimension make the channels, read them, or go along with them (norms, depthwise filters)."""


class Use(NamedTuple):
    """Where the channels of a group lie in one dimension of one tensor of the state dict."""

    tensor: str
    dim: int
    role: Role
    positions: Tensor
    """``(channels, repeats)``: behind a flatten a channel is several inputs of a linear layer."""


@dataclass(frozen=True, repr=False)
class Group:
    """Channels of which each may go, with everything that belongs to it."""

    name: str
    """The first layer that makes them."""
    size: int
    uses: tuple[Use, ...]
    heads: tuple[str, ...] = ()
    """Where they are what attention or another product takes one by one: the modules in whose code they are that. What
    these call the number of heads goes along."""

    def __repr__(self) -> str:
        parts = [f"{use.tensor}[{':, ' * use.dim}{use.role}]" for use in self.uses]
        return f"Group({self.name}: {self.size} channels of {', '.join(parts)})"


@dataclass(frozen=True)
class Channels:
    """What `channels` found: groups, and for layers whose channels must stay, why."""

    groups: dict[str, Group]
    closed: dict[str, str]
    constants: tuple[float, ...] = ()
    """Numbers in the program, in the order they are used: without some heads the network has to have the same."""


def channels(network: nn.Module, shape: tuple[int, int, int]) -> Channels:
    """The channel groups of a network for images of (channels, height, width), by the first layer that makes them.

    Raises: UserError where the network cannot be exported, naming the cause.
    """
    labels = _Labels()
    graph, names = _exported(network, shape)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            values[node] = (
                _Parameter.of(name, tuple(node.meta["val"].shape))
                if name
                else labels.closed_like(node.meta["val"], "it is the image")
            )
        elif node.op == "call_function":
            values[node] = _Rules(labels, node, values).value()
        elif node.op == "output":
            for argument in node.all_input_nodes:
                labels.close(values[argument], "it is the output")
    constants = (a for node in graph.nodes for a in (*node.args, *node.kwargs.values()) if isinstance(a, float))
    return replace(labels.groups(), constants=tuple(constants))


class _Parameter(NamedTuple):
    """A tensor of the state dict, perhaps with dimensions of size 1 put in."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    """Its own dimensions that are longer than 1, in their order."""

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> _Parameter:
        return cls(name, shape, tuple(dim for dim, size in enumerate(shape) if size > 1))

    def viewed(self, shape: tuple[int, ...]) -> _Parameter | None:
        """In another shape with the same dimensions longer than 1; None where that is more than a view of those."""
        longer = [[size for size in one if size > 1] for one in (self.shape, shape)]
        return self._replace(shape=shape) if longer[0] == longer[1] else None

    def places(self) -> list[tuple[int, int]]:
        """(its own dimension, the dimension counted from the last one of the shape it has now)."""
        now = [dim - len(self.shape) for dim, size in enumerate(self.shape) if size > 1]
        return list(zip(self.dims, now, strict=True))


def _exported(network: nn.Module, shape: tuple[int, int, int]) -> tuple[fx.Graph, dict[str, str]]:
    """The program in eval mode, and the state dict's name of each input that is one of its tensors."""
    training = network.training
    first = next(network.parameters())
    example = torch.zeros(1, *shape, device=first.device, dtype=first.dtype)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.export.export(network.eval(), (example,), strict=False)
    except Exception as error:  # export fails in as many ways as Python can
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{type(network).__name__} cannot be traced: {reason}") from error
    finally:
        network.train(training)
    signature = program.graph_signature
    return program.graph, {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


class _Labels:
    """Channels by number, which may become one, or closed; 0 stands where there is no channel."""

    def __init__(self) -> None:
        self.parents = [0]
        self.reasons: dict[int, str] = {}
        self.places: dict[tuple[str, int, Role], Tensor] = {}
        self.split: list[tuple[Tensor, str]] = []
        """What became of channels where a dimension became several, and the reason if those cannot shrink."""
        self.heads: dict[str, list[Tensor]] = defaultdict(list)
        """By module: the labels that its code splits, or multiplies with each other."""

    def new(self, count: int) -> Tensor:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def find(self, label: int) -> int:
        root = label
        while self.parents[root] != root:
            root = self.parents[root]
        while self.parents[label] != root:
            self.parents[label], label = root, self.parents[label]
        return root

    def roots(self, labels: Tensor) -> Tensor:
        """The same tensor with labels that became one alike."""
        distinct, places = labels.unique(return_inverse=True)
        return torch.tensor([self.find(label) for label in distinct.tolist()], dtype=torch.int64)[places]

    def distinct(self, labels: Tensor) -> Tensor:
        """Of dimensions along which they are all alike the first place alone."""
        labels = self.roots(labels)
        for dim in range(labels.dim()):
            first = labels.narrow(dim, 0, 1)
            labels = first if bool((labels == first).all()) else labels
        return labels

    def join(self, first: Tensor, second: Tensor) -> None:
        """Labels in the same place become one; next to no channel (0) there is nothing to join."""
        for a, b in torch.stack([first.reshape(-1), second.reshape(-1)]).unique(dim=1).T.tolist():
            if not a or not b:
                continue
            a, b = self.find(a), self.find(b)
            if a != b:
                keep, gone = (a, b) if a < b else (b, a)
                self.parents[gone] = keep
                if gone in self.reasons:
                    self.reasons.setdefault(keep, self.reasons[gone])

    def close(self, value: Any, reason: str) -> None:
        if isinstance(value, Tensor):
            for label in value.unique().tolist():
                if label:
                    self.reasons.setdefault(self.find(label), reason)
        elif isinstance(value, list | tuple) and not isinstance(value, _Parameter):
            for part in value:
                self.close(part, reason)

    def closed_like(self, example: Any, reason: str) -> Any:
        """Labels of channels that must stay, in the shape of a tensor (or of several)."""
        if isinstance(example, list | tuple):
            return [self.closed_like(part, reason) for part in example]
        if not isinstance(example, Tensor):
            return None
        label = self.new(1)
        self.close(label, reason)
        return label.expand(tuple(example.shape))

    def lay(self, tensor: str, dim: int, role: Role, labels: Tensor) -> None:
        """These labels lie along a dimension of a tensor; if it runs twice, they are the same channels."""
        key = tensor, dim, role
        if key in self.places:
            self.join(self.places[key], labels)
        else:
            self.places[key] = labels

    def groups(self) -> Channels:
        for labels, reason in self.split:
            if sum(size > 1 for size in self.distinct(labels).shape) > 1:  # what is left would not be a block
                self.close(labels, reason)
        owners: dict[int, dict[str, None]] = defaultdict(dict)
        for layer, several in self.heads.items():
            for label in {label for labels in several for label in self.roots(labels).unique().tolist()}:
                owners[label][layer] = None
        where: dict[int, dict[tuple[str, int, Role], list[int]]] = defaultdict(lambda: defaultdict(list))
        for key, labels in self.places.items():
            for position, label in enumerate(self.roots(labels).tolist()):
                if label:
                    where[label][key].append(position)
        alike: dict[Any, list[int]] = defaultdict(list)
        closed: dict[str, str] = {}
        for label, places in where.items():
            makers = [tensor for tensor, _, role in places if role == "out"]
            if label in self.reasons or not makers:
                for tensor in makers:
                    closed.setdefault(tensor.rpartition(".")[0], self.reasons[label])
            else:
                alike[tuple((key, len(positions)) for key, positions in places.items())].append(label)
        found: dict[str, Group] = {}
        for keys, members in alike.items():
            uses = tuple(
                Use(tensor, dim, role, torch.tensor([where[label][tensor, dim, role] for label in members]))
                for (tensor, dim, role), _ in keys
            )
            name = next(use.tensor for use in uses if use.role == "out").rpartition(".")[0]
            while name in found:  # one layer may make channels of several groups
                name += "'"
            found[name] = Group(name, len(members), uses, tuple(owners[members[0]]))
        return Channels(found, {name: why for name, why in closed.items() if name not in found})


# fmt: off
POINTWISE = {
    "relu", "silu", "hardswish", "gelu", "sigmoid", "hardsigmoid", "hardtanh", "relu6", "clamp", "clamp_min", "elu",
    "clamp_max", "leaky_relu", "mish", "tanh", "exp", "sqrt", "rsqrt", "neg", "abs", "pow", "square", "softplus", "to",
    "dropout", "feature_dropout", "clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh_copy",
}
BINARY = {"add", "sub", "mul", "div", "maximum", "minimum"}
RESHAPES = {"view", "reshape", "reshape_as", "unflatten"}
MOVES = {
    *RESHAPES, "flatten", "permute", "transpose", "slice", "select", "split", "split_with_sizes", "chunk", "unsqueeze",
    "squeeze", "expand", "expand_as", "unbind", "cat", "concat", "stack", "t", "movedim", "narrow", "flip",
}
POOLS = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "mean", "amax", "sum",
}
PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm"}
# fmt: on


class _Rules:
    """What one operator does to labels."""

    def __init__(self, labels: _Labels, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        self.labels, self.node = labels, node
        # The types of fx are those of nodes; in their places are labels here.
        filled: Any = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        self.arguments: Any = filled[0]
        self.options: Any = filled[1]
        self.example: Any = node.meta.get("val")
        target: Any = node.target
        self.name = target._schema.name.partition("::")[2].rstrip("_") if hasattr(target, "_schema") else str(target)
        stack: Any = node.meta.get("nn_module_stack") or {}
        self.layer = next(reversed([path for path, _ in stack.values() if path]), "") if stack else ""

    def value(self) -> Any:
        if self.node.target is operator.getitem:
            return self.arguments[0][self.arguments[1]]
        rule = getattr(self, self.name, None)
        if self.name in BINARY:
            rule = self.binary
        elif self.name in POINTWISE:
            rule = self.pointwise
        elif self.name in MOVES:
            rule = self.move
        elif self.name in POOLS:
            rule = self.pool
        elif self.name in PRODUCTS:
            rule = self.product
        found = rule() if rule else None
        return self.stay() if found is None else found

    def stay(self, why: str = "") -> Any:
        """Close all that goes in; what comes out is closed as well."""
        reason = why or f"{self.name}{' in ' + self.layer if self.layer else ''} needs all of them"
        self.labels.close([*self.arguments, *self.options.values()], reason)
        return self.labels.closed_like(self.example, reason)

    def along(self, labels: Tensor, dim: int) -> Tensor | None:
        """The label of each place along a dimension; None where it depends on the others as well."""
        rows = self.labels.roots(labels.movedim(dim, 0).reshape(labels.shape[dim], -1))
        return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None

    def spread(self, along: Tensor, dim: int) -> Tensor:
        """Labels along one dimension of the output, whatever the others."""
        shape = tuple(self.example.shape)
        view = [1] * len(shape)
        view[dim] = shape[dim]
        return along.view(view).expand(shape)

    # Layers that make channels -------------------------------------------------------------------------------------

    def conv2d(self) -> Tensor | None:
        x, weight, bias, groups = (self.argument(i, name) for i, name in
                                   ((0, "input"), (1, "weight"), (2, "bias"), (6, "groups")))  # fmt: skip
        groups = groups or 1
        plain = isinstance(weight, _Parameter) and isinstance(bias, _Parameter | None)
        if not plain or not isinstance(x, Tensor) or (read := self.along(x, 1)) is None:
            return None
        outputs, inputs = weight.shape[:2]
        if groups == 1:
            self.labels.lay(weight.name, 1, "in", read)
            made, role = self.labels.new(outputs), "out"
        elif inputs == 1:  # depthwise: each channel has filters of its own
            made, role = read.repeat_interleave(outputs // groups), "along"
        else:  # the same places of all groups go together
            for part in read.view(groups, inputs)[1:]:
                self.labels.join(read[:inputs], part)
            self.labels.lay(weight.name, 1, "in", read[:inputs])
            made, role = self.labels.new(outputs // groups).repeat(groups), "out"
        self.labels.lay(weight.name, 0, role, made)
        if bias is not None:
            self.labels.lay(bias.name, 0, "along", made)
        return self.spread(made, 1)

    def linear(self) -> Tensor | None:
        x, weight, bias = (self.argument(i, name) for i, name in ((0, "input"), (1, "weight"), (2, "bias")))
        plain = isinstance(weight, _Parameter) and isinstance(bias, _Parameter | None)
        if not plain or not isinstance(x, Tensor) or (read := self.along(x, -1)) is None:
            return None
        self.labels.lay(weight.name, 1, "in", read)
        made = self.labels.new(weight.shape[0])
        self.labels.lay(weight.name, 0, "out", made)
        if bias is not None:
            self.labels.lay(bias.name, 0, "along", made)
        return self.spread(made, self.example.dim() - 1)

    # Attention -----------------------------------------------------------------------------------------------------

    def product(self) -> Tensor | None:
        """Of activations, matrix by matrix: what one matrix is made of is one head, which goes as a whole."""
        count = 3 if self.name == "scaled_dot_product_attention" else 2
        factors, others = self.arguments[:count], self.arguments[count:]
        batch = tuple(self.example.shape[:-2])
        if any(part is not None for part in [*others[:1], self.options.get("attn_mask")]) or any(
            not isinstance(part, Tensor) or part.dim() < 3 or tuple(part.shape[:-2]) != batch for part in factors
        ):
            return None
        rows = torch.cat([self.matrices(part) for part in factors], 1)
        self.labels.join(rows, rows.amax(1, keepdim=True).expand_as(rows))
        self.labels.heads[self.layer].append(rows)
        return self.labels.roots(rows.amax(1)).view(*batch, 1, 1).expand(tuple(self.example.shape))

    def matrices(self, labels: Tensor) -> Tensor:
        """``(matrices, labels that are in each)``."""
        inner = self.labels.distinct(labels.flatten(0, -3).movedim(0, 2)).movedim(2, 0)
        return inner.flatten(1).expand(_product(labels.shape[:-2]), -1)

    def softmax(self) -> Tensor | None:
        x, dim = self.arguments[:2]
        return x if isinstance(x, Tensor) and self.same_along(x, dim) else None

    _softmax = softmax

    def layer_norm(self) -> Tensor | None:
        """Over a head by itself, its places go together; over all channels, these have to stay."""
        x, inner = self.arguments[0], len(self.arguments[1])
        if not isinstance(x, Tensor) or x.dim() <= inner:
            return None
        rows = x.flatten(-inner)
        if self.labels.distinct(rows.flatten(0, -2)).shape[0] == 1 and not self.same_along(rows, -1):
            return None
        self.labels.join(rows, rows.narrow(-1, 0, 1).expand_as(rows))
        return x

    rms_norm = layer_norm

    # Layers that keep them -----------------------------------------------------------------------------------------

    def batch_norm(self) -> Tensor | None:
        x, *tensors = self.arguments[:5]
        plain = all(isinstance(tensor, _Parameter | None) for tensor in tensors)
        if not plain or (found := self.along(x, 1)) is None:
            return None
        for tensor in tensors:
            if tensor is not None:
                self.labels.lay(tensor.name, 0, "along", found)
        return x

    def prelu(self) -> Tensor | None:
        x, weight = self.arguments
        if not isinstance(weight, _Parameter) or (found := self.along(x, 1)) is None:
            return None
        if weight.shape[0] > 1:
            self.labels.lay(weight.name, 0, "along", found)
        return x

    def pointwise(self) -> Tensor | None:
        return self.arguments[0] if isinstance(self.arguments[0], Tensor) else None

    def binary(self) -> Tensor | None:
        first, second = self.arguments[:2]
        if isinstance(first, _Parameter):
            first, second = second, first
        if not isinstance(first, Tensor):
            return None
        shape = tuple(self.example.shape)
        if isinstance(second, _Parameter):
            wide = first.expand(shape)
            for own, dim in second.places():
                if not self.same_along(wide, dim):
                    if (found := self.along(wide, dim)) is None:
                        return None
                    self.labels.lay(second.name, own, "along", found)
            return wide
        if not isinstance(second, Tensor):
            return first
        first, second = self.blank(first, shape), self.blank(second, shape)
        self.labels.join(first, second)
        return torch.where(first > 0, first, second)

    def blank(self, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Spread over ``shape``; what is one number for all channels there has no channel."""
        spread = len(labels.shape) > 1 and labels.shape[1] == 1 and len(shape) > 1 and shape[1] > 1
        return (torch.zeros_like(labels) if spread else labels).expand(shape)

    def pool(self) -> Tensor | None:
        """Means and maxima over places, not over channels: 4-d maps keep dimension 1, anything else its labels."""
        x = self.arguments[0]
        dims = self.arguments[1] if self.name in ("mean", "amax", "sum") and len(self.arguments) > 1 else (2, 3)
        dims = [dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)]
        if any(not self.same_along(x, dim) for dim in dims):
            return None
        if x.dim() == self.example.dim():
            kept = x
            for dim in dims:
                kept = kept.narrow(dim, 0, 1)
            return kept.expand(tuple(self.example.shape))
        return x.amax(dims)

    def same_along(self, labels: Tensor, dim: int) -> bool:
        """Whether labels do not depend on the place along a dimension."""
        roots = self.labels.roots(labels)
        return bool((roots == roots.narrow(dim, 0, 1)).all())

    def pad(self) -> Tensor | None:
        x, widths = self.arguments[:2]
        if len(widths) > 4 and any(widths[4:]):
            return None
        dims = [-1, -2][: len(widths) // 2]
        if any(not self.same_along(x, dim) for dim in dims):
            return None
        for dim in dims:
            x = x.narrow(dim, 0, 1)
        return x.expand(tuple(self.example.shape))

    constant_pad_nd = pad

    # Operators that move numbers -----------------------------------------------------------------------------------

    def move(self) -> Any:
        if isinstance(self.arguments[0], _Parameter):
            return self.arguments[0].viewed(tuple(self.example.shape))
        parts = self.arguments[0] if isinstance(self.arguments[0], list | tuple) else [self.arguments[0]]
        if any(not isinstance(part, Tensor) for part in parts):
            return None
        if self.name in RESHAPES:
            moved = parts[0].reshape(self.example.shape)  # which never minds how labels lie in memory
            if self.splits(parts[0]):
                made = self.labels.distinct(moved)
                self.labels.split.append((made, f"{self.name}{' in ' + self.layer if self.layer else ''} splits them"))
                self.labels.heads[self.layer].append(made)
            return moved
        target: Any = self.node.target
        moved = target(*self.arguments, **self.options)
        return list(moved) if isinstance(moved, list | tuple) else moved

    def splits(self, labels: Tensor) -> bool:
        """Whether a dimension along which channels lie becomes several: what is left of it may not divide alike."""
        before, after = list(labels.shape), list(self.example.shape)
        dim = 0
        while before:
            size, dims = before.pop(0), [dim]
            dim += 1
            made = [after.pop(0)] if after else [1]
            while size != _product(made):
                if size < _product(made):
                    dims.append(dim)
                    size *= before.pop(0)
                    dim += 1
                else:
                    made.append(after.pop(0))
            if sum(n > 1 for n in made) > 1 and any(not self.same_along(labels, d) for d in dims):
                return True
        return False

    def argument(self, number: int, name: str) -> Any:
        return self.arguments[number] if number < len(self.arguments) else self.options.get(name)


def _product(numbers: Iterable[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product
