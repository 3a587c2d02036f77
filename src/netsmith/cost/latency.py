"""The latency of every option of a space on a device: table entries, added up and calibrated on whole networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from netsmith.architecture import outline, sample
from netsmith.blocks.mobile import MBConv
from netsmith.cost.counts import Params, Shape
from netsmith.cost.device import Device
from netsmith.cost.meter import measure
from netsmith.cost.prices import Atom, Options, Prices, atoms, tabulate
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

    @property
    def prices(self) -> Prices:
        """Calibrated milliseconds: all terms of the calibration add up, so it is a price per option again."""
        per = replace(self.calibration, constant=0.0)
        options = {
            path: {option: per.predict([part.at(path, option) for part in self._parts]) for option in row}
            for path, row in self.raw.options.items()
        }
        return Prices(self.calibration.predict([part.constant for part in self._parts]), options, "ms")

    @property
    def _parts(self) -> tuple[Prices, Prices, Prices]:
        return self.raw, self.layers, self.weights

    def calibrated(self, networks: list[Architecture], milliseconds: list[float]) -> SpaceLatency:
        rows = [[part.of(network) for part in self._parts] for network in networks]
        return replace(self, calibration=Calibration.fit(rows, milliseconds))


def profile_space(
    space: nn.Module, input_shape: Shape, device: Device, table: LatencyTable, progress: Progress | None = None
) -> SpaceLatency:
    """Fill the table with what the space needs and read it back, uncalibrated. ``space`` may be on the meta device.

    A width decision is measured at some widths; between two of them the time is interpolated linearly. Nothing else
    is ever guessed: an entry that was not measured raises MissingEntry.
    """
    found = [atom for atom in atoms(space, input_shape) if not isinstance(atom.module, nn.Identity)]
    lines = outline(space)
    parts = {(i, width): _at(atom, width) for i, atom in enumerate(found) for width in _widths(atom, lines.options)}
    keys = {place: entry_key(module, found[place[0]].shape) for place, module in parts.items()}
    if isinstance(device, TableDevice):
        known: Mapping[str, float] = device.get(dict.fromkeys(keys.values()))
        constant = device.constant_ms
    else:
        items = {keys[p]: (lambda m=module: materialised(m), found[p[0]].shape) for p, module in parts.items()}
        table.profile(device, items, (lambda done, all_: progress("layers", done, all_)) if progress else None)
        known, constant = table.get(device.fingerprint(), items), 0.0

    raw: Options = {path: dict.fromkeys(options, 0.0) for path, options in lines.options.items()}
    layers: Options = {path: dict.fromkeys(options, 0.0) for path, options in lines.options.items()}
    fixed = [constant, 0.0]
    for i, atom in enumerate(found):
        if atom.width is not None:
            points = {int(w): known[keys[i, w]] for w in _widths(atom, lines.options) if w is not None}
            raw[atom.width] = {n: interpolate(points, int(n)) for n in lines.options[atom.width]}
            layers[atom.width] = dict.fromkeys(lines.options[atom.width], 1.0)
        elif atom.owner is not None:
            path, option = atom.owner
            raw[path][option] += known[keys[i, None]]
            layers[path][option] += 1.0
        else:
            fixed = [fixed[0] + known[keys[i, None]], fixed[1] + 1.0]
    weights = tabulate(space, Params(), input_shape)
    return SpaceLatency(Prices(fixed[0], raw, "ms"), Prices(fixed[1], layers), weights)


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
    loaded = {str(i): device.load(materialised(derive(space, a)), input_shape) for i, a in enumerate(networks)}
    measured = measure(loaded, seconds=seconds)
    return [measured[str(i)].median_ms for i in range(len(networks))]


def calibration_networks(space: nn.Module, seed: int, count: int = 16) -> list[Architecture]:
    """Random networks of the space to calibrate on."""
    generator = torch.Generator().manual_seed(seed)
    lines = outline(space)
    return [sample(lines, generator) for _ in range(count)]


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
    """Which widths to measure: the narrowest four, then ever wider steps, and the widest."""
    if atom.width is None:
        return [None]
    widths = [int(n) for n in options[atom.width]]
    chosen, i = [], 0
    while i < len(widths):
        chosen.append(widths[i])
        i += max(1, (i + 1) // 3)
    return [*chosen, *([] if chosen[-1] == widths[-1] else [widths[-1]])]


def _at(atom: Atom, width: int | None) -> nn.Module:
    if width is None:
        return atom.module
    with torch.device("meta"):
        return atom.at(width)


def materialised(module: nn.Module) -> nn.Module:
    """A copy with harmless numbers where it has none: time does not depend on weights, unless they are denormal."""
    if not any(tensor.device.type == "meta" for tensor in module.state_dict().values()):
        return module
    real = copy.deepcopy(module).to_empty(device="cpu").eval()
    for name, tensor in real.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.fill_(1.0)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(0))
        else:
            tensor.zero_()
    return real
