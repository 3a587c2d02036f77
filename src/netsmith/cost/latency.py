"""The latency of every option of a space on a device: table entries, added up and calibrated on whole networks."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import nn

from netsmith.architecture import Outline, assemble, draw_rules, extreme, outline, sample
from netsmith.blocks.mobile import MBConv
from netsmith.cost.between import Between, gathered, needed, spread
from netsmith.cost.counts import Shape, shipped
from netsmith.cost.device import Device
from netsmith.cost.fused import fused_atoms
from netsmith.cost.meter import measure
from netsmith.cost.prices import Atom, Prices
from netsmith.cost.table import Calibration, LatencyTable, TableDevice, entry_key
from netsmith.decisions import Architecture, Option, derive

Progress = Callable[[str, int, int], None]
"""(what is measured, done, to do)"""


@dataclass(frozen=True)
class SpaceLatency:
    """Sums of table entries, counts of measured layers and weights, and the calibration that makes milliseconds."""

    raw: Prices
    layers: Prices
    weights: Prices
    calibration: Calibration = field(default_factory=Calibration)
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Table entry in milliseconds and weights of the parts that no decision chooses (stem, head), by path."""

    def by_layer(self, architecture: Mapping[str, Option]) -> dict[str, float]:
        """Calibrated milliseconds of the layers of the derived network, by their names there; in all the price of the
        network less the constant that it pays once. Fixed layers share the price of the option that they belong to, or
        what every network pays, in proportion to what each would cost: none is below zero."""
        prices, per = self.prices, replace(self.calibration, constant=0.0)
        found: dict[str, float] = {}
        shares: dict[tuple[str, Option] | None, dict[str, float]] = defaultdict(dict)
        for path, entry in self.fixed.items():
            if name := name_in_network(path, architecture):
                inside = [(p, o) for p, o in architecture.items() if path.startswith(f"{p}.{o}.")]
                owner = max(inside, key=lambda both: len(both[0]), default=None)
                shares[owner][name] = per.predict((entry[0], 1.0, entry[1]))
        every = sum(shares[None].values())
        for owner, parts in shares.items():
            whole, positive = every if owner is None else prices.at(*owner), sum(max(0.0, ms) for ms in parts.values())
            for name, ms in parts.items():
                found[name] = max(0.0, whole) * max(0.0, ms) / positive if positive else 0.0
        for path, option in architecture.items():
            if (path, option) not in shares:
                name = name_in_network(path, architecture)
                layer = name.rpartition(".")[0] if isinstance(option, int) else name  # a width belongs to its block
                found[layer] = found.get(layer, 0.0) + prices.at(path, option)
        return found

    @property
    def prices(self) -> Prices:
        """Calibrated milliseconds: all terms of the calibration add up, so it is a price per option again. None is
        below zero, whatever the calibration takes off for each layer."""
        per = replace(self.calibration, constant=0.0)
        options = {
            path: {option: max(0.0, per.predict([part.at(path, option) for part in self._parts])) for option in row}
            for path, row in self.raw.options.items()
        }
        pairs = {
            ends: {both: max(0.0, per.predict([part.pairs[ends][both] for part in self._parts])) for both in row}
            for ends, row in self.raw.pairs.items()
        }
        return Prices(self.calibration.predict([part.constant for part in self._parts]), options, "ms", pairs)

    @property
    def _parts(self) -> tuple[Prices, Prices, Prices]:
        return self.raw, self.layers, self.weights

    def calibrated(self, networks: list[Architecture], milliseconds: list[float]) -> SpaceLatency:
        rows = [[part.of(network) for part in self._parts] for network in networks]
        return replace(self, calibration=Calibration.fit(rows, milliseconds, self._shortest))

    @property
    def _shortest(self) -> float | None:
        """Milliseconds of the shortest layer that is priced, alone or, of several in an option, on average."""
        of_fixed = [entry for entry, _ in self.fixed.values()]
        pairs = [(self.raw.options, self.layers.options), (self.raw.pairs, self.layers.pairs)]
        rows = [(raw[key], layers[key]) for raw, layers in pairs for key in raw]
        of_options = [row[o] / counts[o] for row, counts in rows for o in row if counts[o]]
        return min([*of_fixed, *of_options], default=None)


def name_in_network(path: str, architecture: Mapping[str, Option]) -> str:
    """What a module of the space is called in the network derived from it, where options have no level of their own;
    empty for one of an option that was not chosen."""
    for outer in sorted(architecture, key=len, reverse=True):
        chosen = f"{outer}.{architecture[outer]}"
        if path == chosen or path.startswith(f"{chosen}."):
            path = outer + path.removeprefix(chosen)
        elif path.startswith(f"{outer}."):
            return ""
    return path


def profile_space(
    space: nn.Module,
    input_shape: Shape,
    device: Device,
    table: LatencyTable,
    progress: Progress | None = None,
    *,
    again: bool = False,
) -> SpaceLatency:
    """Fill the table with what the space needs (``again``: whether or not it has it) and read it back, uncalibrated.
    ``space`` may be on the meta device.

    A width decision is measured at some widths; between two of them the time is interpolated linearly. Nothing else
    is ever guessed: an entry that was not measured raises MissingEntry.
    """
    note = (lambda done, all_: progress("layers", done, all_)) if progress else None
    if hasattr(space, "between"):
        return _profile_between(space, input_shape, device, table, note, again)
    found = fused_atoms(space, input_shape)
    lines = outline(space)
    if isinstance(device, TableDevice) and device.constant_ms:
        # A published table gives stem and head, which every network has, as one number.
        found = [a for a in found if a.owner or a.width or entry_key(a.module, a.shape) in device.table]
    parts = _parts(found, lines.options)
    items = {k: (lambda m=m: materialised(m), shape) for row in parts for k, m, shape in row.values()}
    if isinstance(device, TableDevice):
        known: Mapping[str, float] = device.get(items)
        constant = device.constant_ms
    else:
        table.profile(device, items, note, again=again)
        known, constant = table.get(device.fingerprint(), items), 0.0

    raw, layers, weights = (Prices(0.0, {p: dict.fromkeys(o, 0.0) for p, o in lines.options.items()}) for _ in "123")
    always = [constant, 0.0, 0.0]
    fixed: dict[str, tuple[float, float]] = {}
    for atom, row in zip(found, parts, strict=True):
        measured = {width: (known[key], 1.0, _weights(module)) for width, (key, module, _) in row.items()}
        for i, prices in enumerate((raw, layers, weights)):
            points = {width: values[i] for width, values in measured.items()}
            if atom.width is not None:
                prices.options[atom.width] = {n: interpolate(points, int(n)) for n in lines.options[atom.width]}
            elif atom.owner is not None:
                path, option = atom.owner
                prices.options[path][option] += points[0]
            else:
                always[i] += points[0]
        if atom.width is None and (atom.owner is None or atom.path != ".".join(map(str, atom.owner))):
            fixed[atom.path] = measured[0][0], measured[0][2]
    return SpaceLatency(
        Prices(always[0], raw.options, "ms"),
        Prices(always[1], layers.options),
        Prices(always[2], weights.options),
        fixed=fixed,
    )


def _profile_between(
    space: nn.Module,
    input_shape: Shape,
    device: Device,
    table: LatencyTable,
    note: Callable[[int, int], None] | None,
    again: bool,
) -> SpaceLatency:
    """Of layers between two widths: all that compute are timed, at every pair of widths. Norms fold into them, and what
    else there is takes what the calibration says."""
    options = outline(space).options
    between: list[Between] = space.between(input_shape)  # pyright: ignore[reportCallIssue, reportAssignmentType]
    layers = [each for each in between if isinstance(each.layer, nn.Conv2d | nn.Linear)]
    parts: list[dict[tuple[int, int], tuple[str, nn.Module, Shape]]] = []
    for layer in layers:
        made = {lengths: layer.at(*lengths) for lengths in needed(layer, options)}
        parts.append({lengths: (entry_key(m, shape), m, shape) for lengths, (m, shape) in made.items()})
    items = {key: (lambda m=m: materialised(m), shape) for row in parts for key, m, shape in row.values()}
    if isinstance(device, TableDevice):
        known: Mapping[str, float] = device.get(items)
    else:
        table.profile(device, items, note, again=again)
        known = table.get(device.fingerprint(), items)
    prices = []
    for kind in range(3):

        def values(row: Mapping, kind: int = kind) -> Callable[[int, int], float]:
            return lambda u, v: (known[row[u, v][0]], 1.0, _weights(row[u, v][1]))[kind]

        rows = [spread(layer, values(row), options) for layer, row in zip(layers, parts, strict=True)]
        constant, alone, pairs = gathered(rows, options)
        prices.append(Prices(constant, alone, pairs=pairs))
    raw, counts, weights = prices
    return SpaceLatency(replace(raw, unit="ms"), counts, weights)


def _parts(found: list[Atom], options: Mapping[str, list[Option]]) -> list[dict[int, tuple[str, nn.Module, Shape]]]:
    """Per atom: width (0 without an open one) -> key of the entry, module, input. Spaces repeat the same few blocks
    many times: what prints alike is built once."""
    built: dict[tuple, dict[int, tuple[str, nn.Module, Shape]]] = {}
    rows = []
    for atom in found:
        widths = _widths(atom, options)
        alike = (*atom.signature, *widths)
        if alike not in built:
            modules = {width or 0: atom.module if width is None else atom.at(width) for width in widths}
            built[alike] = {w: (entry_key(m, atom.shape), m, atom.shape) for w, m in modules.items()}
        rows.append(built[alike])
    return rows


def _weights(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))


def calibrate(
    space: nn.Module,
    input_shape: Shape,
    device: Device,
    latency: SpaceLatency,
    networks: list[Architecture],
    *,
    seconds: float = 12.0,
) -> list[float]:
    """Milliseconds of whole networks, measured together in one round-robin, for `SpaceLatency.calibrated`."""
    plain = (materialised(shipped(derive(space, a))) for a in networks)
    loaded = {str(i): device.load(network, input_shape) for i, network in enumerate(plain)}
    measured = measure(loaded, seconds=seconds)
    return [measured[str(i)].median_ms for i in range(len(networks))]


def calibration_networks(space: nn.Module, seed: int, count: int = 16, raw: Prices | None = None) -> list[Architecture]:
    """Networks of the space to calibrate on, drawn uniformly.

    With ``raw``, the sums of table entries, they cover its whole range: one is the cheapest, one the dearest, and every
    other one of the rest leans to cheap or to dear options. Networks drawn uniformly are all alike in a space of many
    layers, and budgets are not: without the leaning ones the error on networks all over the range of `fbnet` at 96 px
    was 5.1 %, with them 3.2 % (three jobs per core); without the ends the cheapest network of `prunet_small` at 32 px
    was predicted at 28.8 us where it takes 19.
    """
    generator = torch.Generator().manual_seed(seed)
    lines = outline(space)
    if raw is None:
        return [sample(lines, generator) for _ in range(count)]
    ends = [extreme(raw.alone, lines.parents, lines.rules, largest=largest) for largest in (False, True)]
    rest = [sample(lines, generator) if i % 2 else leaning(lines, raw, generator) for i in range(count - 2)]
    return [*ends, *rest][:count]


def leaning(lines: Outline, raw: Prices, generator: torch.Generator) -> Architecture:
    """A random network that prefers cheap or dear options, as much as chance has it (up to e^4 to 1)."""
    strength = float(torch.empty(1).uniform_(-4, 4, generator=generator))
    kept, alone = draw_rules(lines, generator), raw.alone
    inside: dict[tuple[str, Option], list[str]] = defaultdict(list)
    for path, owner in lines.parents.items():
        inside[owner].append(path)

    @functools.cache
    def price(path: str, option: Option) -> float:
        """With what the decisions inside the option cost on average."""
        return alone[path][option] + sum(fmean(price(p, o) for o in lines.options[p]) for p in inside[path, option])

    def choose(path: str, options: list[Option]) -> Option:
        ranked = sorted(kept.get(path, options), key=lambda option: price(path, option))
        weights = (strength * torch.linspace(0, 1, len(ranked))).exp()
        return ranked[int(torch.multinomial(weights, 1, generator=generator))]

    return assemble(lines, choose)


def interpolate(points: Mapping[int, float], width: int) -> float:
    """Piecewise linear between measured widths; outside of them there is no answer (KeyError)."""
    if width in points:
        return points[width]
    below, above = max(n for n in points if n < width), min(n for n in points if n > width)
    share = (width - below) / (above - below)
    return (1 - share) * points[below] + share * points[above]


def width_step(device: Device, table: LatencyTable, *, finest: int = 4, coarsest: int = 32) -> int:
    """How many channels a step of the device's width staircase has: the widths worth offering are its multiples.

    Times one block at every multiple of ``finest`` up to 3 * ``coarsest`` and takes the largest step at which the
    widths in between are on average no more than 2 % cheaper than the next multiple.
    """
    widths = range(finest, 3 * coarsest + 1, finest)
    shape = (32, 16, 16)
    blocks = {n: MBConv(32, 32, kernel=3, hidden=n) for n in widths}
    items = {entry_key(b, shape): (lambda b=b: b, shape) for b in blocks.values()}
    table.profile(device, items)
    known = table.get(device.fingerprint(), items)
    times = {n: known[entry_key(block, shape)] for n, block in blocks.items()}
    step = finest
    while step < coarsest and _in_between_wasted(times, 2 * step):
        step *= 2
    return step


def _in_between_wasted(times: Mapping[int, float], step: int) -> bool:
    gains = [1 - ms / times[-(-n // step) * step] for n, ms in times.items() if n % step]
    return sum(gains) / len(gains) <= 0.02


def _widths(atom: Atom, options: Mapping[str, list[Option]]) -> list[int | None]:
    """Which widths to measure: the narrowest six, then ever wider steps, and the widest."""
    if atom.width is None:
        return [None]
    widths = [int(n) for n in options[atom.width]]
    chosen, i = [], 0
    while i < len(widths):
        chosen.append(widths[i])
        i += max(1, (i + 1) // 3)
    return [*chosen, *([] if chosen[-1] == widths[-1] else [widths[-1]])]


def materialised(module: nn.Module) -> nn.Module:
    """A copy with harmless numbers where it has none: time does not depend on weights, unless they are denormal."""
    if not any(tensor.device.type == "meta" for tensor in module.state_dict().values()):
        return module
    numbers: dict[int, object] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        real = _numbers(name, tensor)
        numbers[id(tensor)] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    return copy.deepcopy(module, numbers).eval()


def _numbers(name: str, like: torch.Tensor) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if name.endswith(("running_var", "bn.weight")):
        return torch.ones(like.shape, dtype=like.dtype)
    return _noise().repeat(-(-like.numel() // 4096))[: like.numel()].reshape(like.shape).to(like.dtype)


@functools.cache
def _noise() -> torch.Tensor:
    """Drawing millions of numbers for every entry took longer than timing it."""
    return 0.05 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
