"""Open decisions inside an ordinary ``nn.Module``, and how they are closed.

A search space is a module in which some layers are a `OneOf` (which candidate runs) and some hidden widths are a
`Width` (how many channels exist). Each decision holds one logit per option. `derive` closes them all and returns a
plain module with nothing of the search left in it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from netsmith.errors import UserError, unknown

Option = str | int
Architecture = dict[str, Option]


class Draw(NamedTuple):
    """Which options of a decision run now, and how much each counts."""

    indices: list[int]
    weights: Tensor
    """Shape ``(len(indices),)``; carries the gradient to the logits where the gate has one."""
    binary: bool = False
    """The first option alone is the output, the others weigh 0: they run for the gradient of the weights only."""

    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        return zip(self.indices, self.weights, strict=True)


class Decision(nn.Module):
    """Something that is still open: options, one logit each, and what was drawn for the next forward pass.

    While nothing is drawn all options run, mixed by the softmax of the logits.
    """

    options: list

    def __init__(self, options: Iterable[Option]) -> None:
        super().__init__()
        self.options = list(options)
        if not self.options or len(set(self.options)) != len(self.options):
            raise UserError(f"a decision needs at least one option and no option twice; given: {self.options}")
        self.logits = nn.Parameter(torch.zeros(len(self.options)))
        self.drawn: Draw | None = None

    def draw(self) -> Draw:
        return self.drawn or Draw(list(range(len(self.options))), self.logits.softmax(0))

    def index(self, option: Option) -> int:
        if option not in self.options:
            raise unknown("option", str(option), map(str, self.options))
        return self.options.index(option)

    def remove(self, option: Option) -> list[int]:
        """Take ``option`` out for good; returns the kept positions, which optimizer state has to follow.

        Raises: UserError for the last option.
        """
        index = self.index(option)
        if len(self.options) == 1:
            raise UserError(f"option {option!r} is the last of its decision and cannot be removed")
        kept = [i for i in range(len(self.options)) if i != index]
        self.options.pop(index)
        # The parameter stays the same object, so that an optimizer goes on training it.
        self.logits.data = self.logits.detach()[kept].clone()
        self.logits.grad = None
        self.drawn = None
        return kept

    def __getstate__(self) -> dict:
        # A draw belongs to one step and holds its autograd graph: copies and pickles start without.
        return {**self.__dict__, "drawn": None}


class OneOf(Decision):
    """Exactly one of several modules stands here; all take the same input and return the same shape.

    >>> OneOf({"conv": nn.Conv2d(8, 8, 3, padding=1), "skip": nn.Identity()})
    """

    def __init__(self, candidates: Mapping[str, nn.Module]) -> None:
        super().__init__(candidates)
        for name, module in candidates.items():
            if "." in name or hasattr(self, name):
                raise UserError(f"a candidate cannot be called {name!r}: no dots, no attribute of a module")
            self.add_module(name, module)

    def candidate(self, option: str) -> nn.Module:
        return self.get_submodule(self.options[self.index(option)])

    def forward(self, x: Tensor, *place: int) -> Tensor:
        indices, weights, binary = self.draw()
        first, *others = [self.candidate(self.options[i]) for i in indices]
        if binary or (not others and not weights.requires_grad):
            y = first(x, *place)
            return _Watched.apply(y, weights, x, others, place) if weights.requires_grad else y  # pyright: ignore[reportReturnType]
        outputs = (w * candidate(x, *place) for candidate, w in zip([first, *others], weights, strict=True))
        return functools.reduce(torch.add, outputs)

    def remove(self, option: Option) -> list[int]:
        kept = super().remove(option)
        delattr(self, str(option))
        return kept


class _Watched(torch.autograd.Function):
    """y, the output of the only candidate that counts. On the way back the gradient of every gate is
    dL/dg_j = <dL/dy, o_j(x)> (ProxylessNAS, arXiv:1812.00332, section 3.2), for which the others run then, one after
    the other and without a graph: nothing of theirs is kept in between."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, x: Tensor, others: list[nn.Module], place: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(y, weights, x)
        ctx.others, ctx.place = others, place
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        y, weights, x = ctx.saved_tensors
        gates = [(grad * y).sum(), *((grad * other(x, *ctx.place)).sum() for other in ctx.others)]
        return grad, torch.stack(gates).to(weights), None, None, None


class Places(nn.ModuleList):
    """What one decision puts into many places: a module each, so that the choice is shared and the weights are not.

    >>> edge = OneOf({"conv": Places(ConvBn(8, 8) for _ in range(5)), "skip": Places(nn.Identity() for _ in range(5))})
    >>> edge(x, 3)  # what stands in the fourth place
    """

    def forward(self, x: Tensor, place: int) -> Tensor:
        return self[place](x)


class Width(Decision):
    """How many channels of one hidden tensor exist; the block that owns it slices its weights accordingly.

    >>> MBConv(16, 24, kernel=3, hidden=Width(range(16, 97, 16)))
    """

    def __init__(self, options: Iterable[int]) -> None:
        super().__init__(sorted(options))
        if self.options[0] < 1:
            raise UserError(f"a width is at least 1 channel; given: {self.options}")

    @property
    def maximum(self) -> int:
        return self.options[-1]

    def extent(self) -> tuple[int, Tensor | None]:
        """Channels that exist in this pass, and the mask ``(channels,)`` that mixes several widths, if several run.

        With widths n_i drawn with weights w_i, channel c counts with the sum of the w_i whose n_i exceeds it. Where the
        layer after the mask is linear, this equals the mixture of the separately computed widths (FBNetV2's masks);
        a squeeze there, or batch statistics, make it an approximation.
        """
        indices, weights, _ = self.draw()
        drawn = [self.options[i] for i in indices]
        channels = max(drawn)
        if len(indices) == 1 and not weights.requires_grad:
            return channels, None
        widths = torch.tensor(drawn, device=weights.device)
        exists = torch.arange(channels, device=weights.device) < widths[:, None]
        return channels, weights @ exists.to(weights.dtype)

    def extra_repr(self) -> str:
        return f"{self.options[0]}..{self.maximum}" if len(self.options) > 1 else str(self.maximum)


class Rule(NamedTuple):
    """How many of some decisions choose something else than ``idle``.

    A module states its own in an attribute, ``self.rules = (Rule(...),)``. They concern architectures: while
    searching, a supernet runs all its options.
    """

    paths: tuple[str, ...]
    """Decisions, named from the module that states the rule."""
    idle: Option
    at_least: int
    at_most: int

    def holds(self, architecture: Mapping[str, Option]) -> bool:
        return self.at_least <= sum(architecture[path] != self.idle for path in self.paths) <= self.at_most

    def can_hold(self, options: Mapping[str, Collection[Option]]) -> bool:
        """Whether some choice among ``options`` keeps it."""
        fewest = sum(self.idle not in options[path] for path in self.paths)
        most = sum(set(options[path]) != {self.idle} for path in self.paths)
        return max(self.at_least, fewest) <= min(self.at_most, most)

    def __str__(self) -> str:
        span = f"{self.at_least} to {self.at_most}" if self.at_least < self.at_most else str(self.at_most)
        return f"{span} of {', '.join(self.paths)} are not {self.idle!r}"


def walk(
    model: nn.Module, path: str = "", owner: tuple[str, str] | None = None
) -> Iterator[tuple[str, Decision, tuple[str, str] | None]]:
    """Every open decision, outer before inner: its path, itself, and the decision and option it is nested in."""
    if isinstance(model, Decision):
        yield path, model, owner
    for name, child in model.named_children():
        inner = (path, name) if isinstance(model, OneOf) else owner
        yield from walk(child, f"{path}.{name}" if path else name, inner)


def decisions(model: nn.Module) -> dict[str, Decision]:
    """All open decisions by path (the module's qualified name), outer before inner."""
    return {path: decision for path, decision, _ in walk(model)}


def parents(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For each nested decision the decision it depends on and the option it belongs to: ``{path: (outer, option)}``."""
    return {path: owner for path, _, owner in walk(model) if owner is not None}


def rules(model: nn.Module) -> tuple[Rule, ...]:
    """All rules that modules of ``model`` state, with full paths.

    Raises: UserError for a rule that no network keeps, and for a decision that is none, is nested in an option, or has
    another rule already.
    """
    found: list[Rule] = []
    for path, module in model.named_modules():
        own: tuple[Rule, ...] = getattr(module, "rules", ())
        found += [rule._replace(paths=tuple(f"{path}.{p}".lstrip(".") for p in rule.paths)) for rule in own]
    if not found:
        return ()
    known, nested, ruled = decisions(model), parents(model), set()
    for rule in found:
        for path in rule.paths:
            if path not in known or path in nested or path in ruled:
                wrong = "is no decision" if path not in known else "is nested" if path in nested else "has two rules"
                raise UserError(f"a rule is about single decisions that every network has, but {path!r} {wrong}")
            ruled.add(path)
        if not rule.can_hold({path: known[path].options for path in rule.paths}):
            raise UserError(f"no network keeps the rule that {rule}")
    return tuple(found)


def logits(model: nn.Module) -> list[nn.Parameter]:
    """The architecture parameters: what gradient methods train on the ``search`` split."""
    return [decision.logits for decision in decisions(model).values()]


def derive(model: nn.Module, architecture: Mapping[str, Option]) -> nn.Module:
    """The plain network that ``architecture`` names, with copies of the supernet's weights; ``model`` stays untouched.

    Raises: UserError when an active decision is left open or an option is unknown.
    """
    closed: dict[int, object] = {}

    def close(path: str, module: nn.Module) -> nn.Module:
        if isinstance(module, OneOf):
            chosen = str(_chosen(path, module, architecture))
            return close(f"{path}.{chosen}".lstrip("."), module.candidate(chosen))
        owned = {name: child for name, child in module.named_children() if isinstance(child, Width)}
        if owned and hasattr(module, "narrowed"):
            return module.narrowed({n: _chosen(f"{path}.{n}".lstrip("."), w, architecture) for n, w in owned.items()})  # pyright: ignore[reportCallIssue]
        if owned:
            name, width = _only_width(path, module, owned)
            chosen = _chosen(f"{path}.{name}".lstrip("."), width, architecture)
            return module.sliced(width.options[width.index(chosen)])  # pyright: ignore[reportCallIssue]
        for name, child in module.named_children():
            if any(isinstance(inner, Decision) for inner in child.modules()):
                closed[id(child)] = close(f"{path}.{name}".lstrip("."), child)
        return copy.deepcopy(module, dict(closed))

    network = close("", model)
    for module in network.modules():
        module.__dict__.pop("rules", None)
        module.__dict__.pop("reference", None)
    network.train(model.training)
    return network


def _chosen(path: str, decision: Decision, architecture: Mapping[str, Option]) -> Option:
    if path not in architecture:
        raise UserError(f"the architecture leaves {path!r} open (options: {decision.options})")
    if architecture[path] not in decision.options:
        raise UserError(f"decision {path!r} has no option {architecture[path]!r} (options: {decision.options})")
    return architecture[path]


def _only_width(path: str, block: nn.Module, owned: dict[str, Width]) -> tuple[str, Width]:
    if len(owned) > 1 or not hasattr(block, "sliced"):
        raise UserError(
            f"{type(block).__name__} at {path!r} owns {len(owned)} widths; a block can own one, and needs a method "
            "sliced(width) that returns the block physically that wide, or several, and narrowed(widths)"
        )
    return next(iter(owned.items()))
