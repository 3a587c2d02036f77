"""What every option of a supernet costs, for costs that add up.

A supernet is priced atom by atom. An atom is a largest part without a `OneOf` inside: a fixed stem, a candidate
block, a block with one open `Width`; or a part that folds itself when shipped, whatever is decided inside: it costs
what it folds into. Whatever adds up over atoms (parameters, MACs, file bytes, latency from a table)
becomes plain data, `Prices`, which the knapsack, the differentiable expectation and the report all read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from netsmith.cost.counts import Shape, image, run_shapes, shipped, to_meta
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
    known: dict[tuple, float | dict[Option, float]] = {}
    constant = 0.0
    options: Options = {p: dict.fromkeys(d.options, 0.0) for p, d in decisions(supernet).items()}
    for atom in atoms(supernet, input_shape, trained=getattr(price, "trained", False)):
        widths = tuple(options[atom.width]) if atom.width is not None else ()
        key = (*atom.signature, widths)
        if key not in known:
            known[key] = _along(price, atom, widths) if widths else price(atom.module, atom.shape)
        found = known[key]
        if isinstance(found, dict):
            assert atom.width is not None
            options[atom.width] = dict(found)
        elif atom.owner is None:
            constant += found
        else:
            path, option = atom.owner
            options[path][option] += found
    return Prices(constant, options, getattr(price, "unit", ""))


def _along(price: Price, atom: Atom, widths: tuple[Option, ...]) -> dict[Option, float]:
    """The price at every width. A count is a polynomial in the one width that varies, of degree 2 at most: three
    priced widths determine it, and a fourth catches prices that are none."""

    def at(width: Option) -> float:
        return price(atom.at(width), atom.shape)

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
    ``drawn``, the weights drawn for this pass (FBNet's LAT(a) = sum m_i LAT_i).
    """
    outer = parents(supernet)
    weight: dict[tuple[str, Option], Tensor] = {}
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
        total = total.to(reaching) + reaching @ reaching.new_tensor([prices.at(path, option) for option in options])
        if isinstance(decision, OneOf):
            weight.update({(path, option): p for option, p in zip(options, reaching, strict=True)})
    return total
