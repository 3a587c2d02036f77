"""What every option of a supernet costs, for costs that add up.

A supernet is priced atom by atom. An atom is a largest part without a `OneOf` inside: a fixed stem, a candidate
block, a block with one open `Width`; or a part that folds itself when shipped, whatever is decided inside: it costs
what it folds into. Whatever adds up over atoms (parameters, MACs, file bytes, latency from a table)
becomes plain data, `Prices`, which the knapsack, the differentiable expectation and the report all read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from netsmith.cost.between import Between, bilinear, gathered, spread
from netsmith.cost.counts import Shape, image, run_shapes, shipped, to_meta
from netsmith.decisions import Decision, OneOf, Option, Width, _only_width, decisions, derive, parents
from netsmith.errors import UserError

Options = dict[str, dict[Option, float]]
Pairs = dict[tuple[str, str], dict[tuple[Option, Option], float]]
"""Two decisions -> an option of each -> a price: of a layer that reads channels of one width and makes another's."""
Price = Callable[[nn.Module, Shape], float]


@dataclass(frozen=True)
class Prices:
    """Decision path -> option -> price, plus what every network of the space pays, plus what two options cost
    together."""

    constant: float
    options: Options
    unit: str = ""
    pairs: Pairs = field(default_factory=dict)
    """Of decisions that every network has."""

    def of(self, architecture: Mapping[str, Option]) -> float:
        """The price of one network. Raises: UserError naming the option that has no price."""
        alone = (self.at(path, option) for path, option in architecture.items())
        together = (row[architecture[a], architecture[b]] for (a, b), row in self.pairs.items())
        return math.fsum((self.constant, *alone, *together))

    def at(self, path: str, option: Option) -> float:
        try:
            return self.options[path][option]
        except KeyError:
            raise UserError(f"option {option!r} of decision {path!r} has no price") from None

    def map(self, scale: float = 1.0, constant: float = 0.0) -> Prices:
        """The same prices times ``scale``, plus ``constant`` once per network."""
        options = {path: {o: scale * price for o, price in row.items()} for path, row in self.options.items()}
        pairs = {ends: {both: scale * price for both, price in row.items()} for ends, row in self.pairs.items()}
        return replace(self, constant=scale * self.constant + constant, options=options, pairs=pairs)

    @property
    def alone(self) -> Options:
        """What each option costs beside the dearest of every decision that it shares a price with: where prices rise
        with widths, the cheapest of these make the cheapest network and the dearest the dearest."""
        rows = {path: dict(row) for path, row in self.options.items()}
        for ends, row in self.pairs.items():
            for side, path in enumerate(ends):
                for option in self.options[path]:
                    rows[path][option] += max(price for both, price in row.items() if both[side] == option)
        return rows


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
        """This block at a fixed width, without numbers."""
        with torch.device("meta"):
            return self.module.at(width)  # pyright: ignore[reportCallIssue]

    @property
    def signature(self) -> tuple:
        """Alike for atoms that cost the same: spaces repeat the same few blocks many times."""
        plain = (item for module in self.module.modules() for item in vars(module).items() if _is_plain(item[1]))
        settings = tuple((name, value) for name, value in plain if name != "training")
        return (repr(self.module), settings, *(p.shape for p in self.module.parameters()), self.shape)


def _is_plain(value: object) -> bool:
    return all(isinstance(part, int | float | str) for part in (value if isinstance(value, tuple) else (value,)))


def atoms(supernet: nn.Module, input_shape: Shape, *, trained: bool = False) -> list[Atom]:
    """All atoms with their input shapes, found by one forward pass of a copy without numbers through every option;
    with ``trained`` those of the network in training, before anything folds.

    Raises: UserError for what would have no price, or one price for two runs.
    """
    shadow = to_meta(supernet)
    found = list(_walk("", supernet, None, trained))
    shapes: dict[int, Shape] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(module) in shapes and _has_parameters(module):
            raise UserError(f"{module} runs twice in one pass: its price would count once only")
        if not inputs or not isinstance(inputs[0], Tensor):
            given = type(inputs[0]).__name__ if inputs else "nothing"
            raise UserError(f"{type(module).__name__} takes {given}, not a tensor: alone it cannot be timed or counted")
        shapes[id(module)] = tuple(inputs[0].shape[1:])  # pyright: ignore[reportArgumentType]

    shadows = {path: shadow.get_submodule(path) for path, _, _, _ in found}
    for module in shadows.values():
        module.register_forward_pre_hook(note)
    run_shapes(shadow, image(supernet, input_shape))

    for path, module in shadows.items():
        if id(module) not in shapes and _has_parameters(module):
            raise UserError(f"{path!r} has parameters but does not run on {input_shape}: its price is unknown")
    ran = ((path, m, shapes.get(id(shadows[path])), owner, width) for path, m, owner, width in found)
    return [Atom(path, m, shape, owner, width) for path, m, shape, owner, width in ran if shape is not None]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _walk(
    path: str, module: nn.Module, owner: tuple[str, Option] | None, trained: bool
) -> Iterator[tuple[str, nn.Module, tuple[str, Option] | None, str | None]]:
    if isinstance(module, OneOf):
        for option in module.options:
            yield from _walk(f"{path}.{option}".lstrip("."), module.candidate(option), (path, option), trained)
        return
    if hasattr(module, "between"):  # priced layer by layer, between two widths each
        return
    if not trained and hasattr(module, "folded"):
        yield path, shipped(to_meta(module)), owner, None
        return
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # runs piece by piece: so are `Places`, and rows of cells
        for name, child in module.named_children():
            yield from _walk(f"{path}.{name}".lstrip("."), child, owner, trained)
        return
    owned = {name: child for name, child in module.named_children() if isinstance(child, Width)}
    if owned:
        name, _ = _only_width(path, module, owned)
        yield path, module, owner, f"{path}.{name}".lstrip(".")
    elif any(isinstance(inner, Decision) for inner in module.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            raise UserError(
                f"{type(module).__name__} at {path!r} has parameters of its own beside a decision inside: "
                "move them into a child module, so that they have a price"
            )
        for name, child in module.named_children():
            yield from _walk(f"{path}.{name}".lstrip("."), child, owner, trained)
    else:
        yield path, module if trained else shipped(module), owner, None


def tabulate(supernet: nn.Module, price: Price, input_shape: Shape) -> Prices:
    """Price every atom. ``price(module, shape)`` must be a cost that adds up over atoms; one with ``trained`` is about
    the network in training, any other about the shipped one."""
    return tabulate_all(supernet, {"it": price}, input_shape)["it"]


def tabulate_all(supernet: nn.Module, costs: Mapping[str, Price], input_shape: Shape) -> dict[str, Prices]:
    """`tabulate` for several costs by name; to find the atoms takes longer than to price them."""
    if hasattr(supernet, "between"):
        return {name: _tabulate_between(supernet, price, input_shape) for name, price in costs.items()}
    folds = any(hasattr(part, "folded") for part in supernet.modules())  # else what trains is what ships
    found: dict[str, Prices] = {}
    for trained in (False, True) if folds else (False,):
        some = {n: price for n, price in costs.items() if not folds or getattr(price, "trained", False) == trained}
        found |= _tabulate(supernet, some, atoms(supernet, input_shape, trained=trained)) if some else {}
    return {name: found[name] for name in costs}


def _tabulate(supernet: nn.Module, costs: Mapping[str, Price], found: list[Atom]) -> dict[str, Prices]:
    known: dict[tuple, dict[str, float | dict[Option, float]]] = {}
    widths = {path: tuple(decision.options) for path, decision in decisions(supernet).items()}
    tables = {
        name: Prices(0.0, {path: dict.fromkeys(row, 0.0) for path, row in widths.items()}, getattr(price, "unit", ""))
        for name, price in costs.items()
    }
    constant = dict.fromkeys(costs, 0.0)
    for atom in found:
        open_ = widths[atom.width] if atom.width is not None else ()
        key = (*atom.signature, open_)
        if key not in known:
            known[key] = _priced(costs, atom, open_)
        for name, price in known[key].items():
            options = tables[name].options
            if isinstance(price, dict):
                assert atom.width is not None
                options[atom.width] = dict(price)
            elif atom.owner is None:
                constant[name] += price
            else:
                path, option = atom.owner
                options[path][option] += price
    return {name: replace(table, constant=constant[name]) for name, table in tables.items()}


def _priced(
    costs: Mapping[str, Price], atom: Atom, widths: tuple[Option, ...]
) -> dict[str, float | dict[Option, float]]:
    """By cost: the price of an atom, or where it has an open width the price at each."""
    if not widths:
        return {name: price(atom.module, atom.shape) for name, price in costs.items()}
    at = functools.cache(atom.at)
    return {name: _along(price, lambda n, p=price: p(at(n), atom.shape), widths) for name, price in costs.items()}


def _tabulate_between(space: nn.Module, price: Price, input_shape: Shape) -> Prices:
    """What is in no layer, the products of attention, is linear in the heads of each group, for costs that are counted;
    for others it is not priced by width."""
    options = {path: list(decision.options) for path, decision in decisions(space).items()}
    rows = []
    for layer in space.between(input_shape):  # pyright: ignore[reportCallIssue]

        def at(u: int, v: int, layer: Between = layer) -> float:
            return price(*layer.at(u, v))

        rows.append(spread(layer, bilinear(layer, at, options) if getattr(price, "counted", False) else at, options))
    constant, alone, pairs = gathered(rows, options)
    prices = Prices(constant, alone, getattr(price, "unit", ""), pairs)

    def rest(chosen: Mapping[str, Option]) -> float:
        return price(derive(space, chosen), input_shape) - prices.of(chosen)

    whole = {path: max(row) for path, row in options.items()}
    full = rest(whole)
    sloped = {}
    for path in space.heads if getattr(price, "counted", False) else ():  # pyright: ignore[reportGeneralTypeIssues]
        most, least = int(max(options[path])), int(min(options[path]))
        head = (full - rest({**whole, path: least})) / (most - least)
        sloped[path] = {n: already + head * (int(n) - most) for n, already in alone[path].items()}
    return replace(prices, constant=constant + full, options=alone | sloped)


def _along(price: Price, at: Callable[[Option], float], widths: tuple[Option, ...]) -> dict[Option, float]:
    """The price at every width. A count is a polynomial in the one width that varies, of degree 2 at most: three
    priced widths determine it, and a fourth catches prices that are none."""
    if getattr(price, "counted", False) and len(widths) > 4:
        nodes = [int(widths[i]) for i in (0, len(widths) // 2, -1)]
        values = [Fraction(at(n)) for n in nodes]

        def polynomial(width: Option) -> float:
            return float(sum(v * _lagrange(int(width), n, nodes) for n, v in zip(nodes, values, strict=True)))

        if polynomial(widths[1]) == at(widths[1]):
            return {n: polynomial(n) for n in widths}
    return {n: at(n) for n in widths}


def _lagrange(x: int, node: int, nodes: list[int]) -> Fraction:
    product = Fraction(1)
    for other in nodes:
        if other != node:
            product *= Fraction(x - other, node - other)
    return product


def expected(supernet: nn.Module, prices: Prices, *, drawn: bool = False) -> Tensor:
    """The expected price over the architecture distribution, differentiable in the logits.

    E = constant + sum over decisions of P(reached) * sum_i p_i price_i, with p the softmax of the logits, or, with
    ``drawn``, the weights drawn for this pass (FBNet's LAT(a) = sum m_i LAT_i); plus sum_ij p_i q_j price_ij of pairs.
    """
    outer = parents(supernet)
    weight: dict[tuple[str, Option], Tensor] = {}
    chances: dict[str, tuple[list[Option], Tensor]] = {}
    total = torch.tensor(prices.constant, dtype=torch.float64)
    for path, decision in decisions(supernet).items():
        reached = weight.get(outer[path]) if path in outer else torch.tensor(1.0)
        if reached is None:
            continue
        if drawn:
            indices, probabilities, _ = decision.draw()
        else:
            indices, probabilities = range(len(decision.options)), decision.logits.softmax(0)
        options = [decision.options[i] for i in indices]
        reaching = reached.to(probabilities) * probabilities
        chances[path] = options, reaching
        total = total.to(reaching) + reaching @ reaching.new_tensor([prices.at(path, option) for option in options])
        if isinstance(decision, OneOf):
            weight.update({(path, option): p for option, p in zip(options, reaching, strict=True)})
    for ends, row in prices.pairs.items():
        (firsts, p), (seconds, q) = (chances[path] for path in ends)
        total = total + p @ p.new_tensor([[row[i, j] for j in seconds] for i in firsts]) @ q
    return total
