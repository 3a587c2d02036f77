"""What every option of a supernet costs, for costs that add up.

A supernet is priced atom by atom. An atom is a largest part without a `OneOf` inside: a fixed stem, a candidate
block, a block with one open `Width`. Whatever adds up over atoms (parameters, MACs, file bytes, latency from a table)
becomes plain data, `Prices`, which the knapsack, the differentiable expectation and the report all read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from netsmith.cost.counts import Shape
from netsmith.decisions import Decision, OneOf, Option, Width, _only_width, decisions, parents
from netsmith.errors import UserError

Options = dict[str, dict[Option, float]]
Price = Callable[[nn.Module, Shape], float]


@dataclass(frozen=True)
class Prices:
    """Decision path -> option -> price, plus what every network of the space pays."""

    constant: float
    options: Options
    unit: str = ""

    def of(self, architecture: Mapping[str, Option]) -> float:
        """The price of one network. Raises: UserError naming the option that has no price."""
        return self.constant + sum(self.at(path, option) for path, option in architecture.items())

    def at(self, path: str, option: Option) -> float:
        try:
            return self.options[path][option]
        except KeyError:
            raise UserError(f"option {option!r} of decision {path!r} has no price") from None

    def map(self, scale: float = 1.0, constant: float = 0.0) -> Prices:
        """The same prices times ``scale``, plus ``constant`` once per network."""
        options = {path: {o: scale * price for o, price in row.items()} for path, row in self.options.items()}
        return replace(self, constant=scale * self.constant + constant, options=options)


@dataclass(frozen=True)
class Atom:
    """A part of a supernet that is priced as a whole."""

    path: str
    module: nn.Module
    shape: Shape
    """What goes in."""
    owner: tuple[str, Option] | None
    """The decision and option it belongs to; None when every network has it."""
    width: str | None = None
    """Path of the open width it owns."""

    def at(self, width: Option) -> nn.Module:
        """This block at a fixed width (with fresh weights)."""
        return self.module.at(width)  # pyright: ignore[reportCallIssue]


def atoms(supernet: nn.Module, input_shape: Shape) -> list[Atom]:
    """All atoms with their input shapes, found by one forward pass through every option."""
    found = list(_walk("", supernet, None))
    shapes: dict[int, Shape] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[id(module)] = tuple(inputs[0].shape[1:])  # pyright: ignore[reportArgumentType]

    hooks = [module.register_forward_pre_hook(note) for _, module, _, _ in found]
    drawn = {path: decision.drawn for path, decision in decisions(supernet).items()}
    training = supernet.training
    try:
        for decision in decisions(supernet).values():
            decision.drawn = None
        with torch.no_grad():
            example = next(supernet.parameters())
            supernet.eval()(torch.zeros(1, *input_shape, dtype=example.dtype, device=example.device))
    finally:
        for hook in hooks:
            hook.remove()
        for path, decision in decisions(supernet).items():
            decision.drawn = drawn[path]
        supernet.train(training)
    return [Atom(path, m, shapes[id(m)], owner, width) for path, m, owner, width in found if id(m) in shapes]


def _walk(
    path: str, module: nn.Module, owner: tuple[str, Option] | None
) -> Iterator[tuple[str, nn.Module, tuple[str, Option] | None, str | None]]:
    if isinstance(module, OneOf):
        for option in module.options:
            yield from _walk(f"{path}.{option}".lstrip("."), module.candidate(option), (path, option))
        return
    owned = {name: child for name, child in module.named_children() if isinstance(child, Width)}
    if owned:
        name, _ = _only_width(path, module, owned)
        yield path, module, owner, f"{path}.{name}".lstrip(".")
    elif any(isinstance(inner, Decision) for inner in module.modules()):
        for name, child in module.named_children():
            yield from _walk(f"{path}.{name}".lstrip("."), child, owner)
    else:
        yield path, module, owner, None


def tabulate(supernet: nn.Module, price: Price, input_shape: Shape) -> Prices:
    """Price every atom. ``price(module, shape)`` must be a cost that adds up over atoms."""
    constant = 0.0
    options: Options = {p: dict.fromkeys(d.options, 0.0) for p, d in decisions(supernet).items()}
    for atom in atoms(supernet, input_shape):
        if atom.width is not None:
            with torch.device("meta"):
                row = {n: price(atom.at(n), atom.shape) for n in options[atom.width]}
            options[atom.width] = row
        elif atom.owner is None:
            constant += price(atom.module, atom.shape)
        else:
            path, option = atom.owner
            options[path][option] += price(atom.module, atom.shape)
    return Prices(constant, options, getattr(price, "unit", ""))


def expected(supernet: nn.Module, prices: Prices, *, drawn: bool = False) -> Tensor:
    """The expected price over the architecture distribution, differentiable in the logits.

    E = constant + sum over decisions of P(reached) * sum_i p_i price_i, with p the softmax of the logits, or, with
    ``drawn``, the weights drawn for this pass (FBNet's LAT(a) = sum m_i LAT_i).
    """
    outer = parents(supernet)
    weight: dict[tuple[str, Option], Tensor] = {}
    total = torch.tensor(prices.constant)
    for path, decision in decisions(supernet).items():
        reached = weight.get(outer[path]) if path in outer else torch.tensor(1.0)
        if reached is None:
            continue
        if drawn:
            indices, probabilities = decision.draw()
        else:
            indices, probabilities = range(len(decision.options)), decision.logits.softmax(0)
        for i, p in zip(indices, probabilities, strict=True):
            option = decision.options[i]
            weight[path, option] = reached.to(p) * p
            total = total.to(p) + weight[path, option] * prices.at(path, option)
    return total
