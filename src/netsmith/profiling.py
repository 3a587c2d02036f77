"""Measuring for its own sake: exported files, and how well a device's table predicts networks it has never seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from netsmith.architecture import extreme, outline
from netsmith.cost.counts import Shape
from netsmith.cost.device import Device, OrtCpu, parse_device
from netsmith.cost.latency import calibrate, calibration_networks, profile_space
from netsmith.cost.meter import measure
from netsmith.cost.table import LatencyTable, TableDevice
from netsmith.errors import UserError
from netsmith.prepare import offered_widths
from netsmith.ship.weights import load, points
from netsmith.spaces import open_space, space_defaults

if TYPE_CHECKING:
    from netsmith.job import Say


def measure_files(target: Path, device_name: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of an .onnx file, or of all networks of a run, timed in turn.

    Raises: UserError for what is neither, is damaged, or does not run on the device.
    """
    device = parse_device(device_name)
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds is {seconds:g}; allowed: more than 0")
    if not target.exists():
        raise UserError(f"{target} does not exist; an .onnx file or the folder of a run is needed")
    places = [target] if target.is_file() else _files(target)
    timed: dict[str, Callable[[], object]] = {}
    for file in places:
        shape = input_shape(file)
        if isinstance(device, OrtCpu) or target.is_file():
            timed[str(file)] = device.load(file, shape)
        else:
            timed[str(file.with_name("weights.safetensors"))] = device.load(load(file.parent), shape)
    networks = [
        {
            "file": file,
            "latency_ms": m.median_ms,
            "ci95": list(m.ci95),
            "minimum_ms": m.minimum_ms,
            "iterations": m.iterations,
            "settled": m.settled,
        }
        for file, m in measure(timed, seconds=seconds).items()
    ]
    return {
        "device": device.name,
        "versions": device.versions(),
        "fingerprint": device.fingerprint(),
        "networks": networks,
    }


def _files(run: Path) -> list[Path]:
    found = [place / "model.onnx" for place in [run, *points(run)] if (place / "model.onnx").is_file()]
    if not found:
        raise UserError(f"{run} holds no model.onnx: it is no run, or one that is not finished")
    return found


def input_shape(file: Path) -> Shape:
    """(channels, height, width) that an ONNX file takes. Raises: UserError for a file that cannot be loaded."""
    try:
        given = OrtCpu().session(file).get_inputs()[0].shape
    except UserError:
        raise
    except Exception as error:  # the runtime's errors share no class of their own
        raise UserError(f"{file} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from error
    if len(given) != 4 or not all(isinstance(size, int) for size in given[1:]):
        raise UserError(f"{file} takes {given}; measuring needs (batch, channels, height, width) with fixed sizes")
    return given[1], given[2], given[3]


def profile(
    space_name: str,
    device: Device,
    say: Say,
    *,
    networks: int = 20,
    seed: int = 0,
    again: bool = False,
    **options: int | None,
) -> dict[str, Any]:
    """Fill the table of a device with the layers of a space, then test it on whole networks drawn at random.

    ``again``: also the layers that the table has. ``options``: classes, channels and resolution, None for the space's
    own. A `TableDevice` is only checked: MissingEntry names a layer that it lacks.
    """
    defaults = space_defaults(space_name)
    known_options = {name: defaults[name] if value is None else value for name, value in options.items()}
    for name, value, least in [("networks", networks, 0), *((*item, 1) for item in known_options.items())]:
        if value < least:
            raise UserError(f"{name} is {value}; allowed: {least} or more")
    known_options |= offered_widths(space_name, None if isinstance(device, TableDevice) else device)
    with torch.device("meta"):
        space = open_space(space_name, **known_options)
    shape = (known_options["channels"], known_options["resolution"], known_options["resolution"])
    table, fingerprint = LatencyTable(), device.fingerprint()
    started, new = time.perf_counter(), 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal new
        new = total
        say.progress(what, done, total)

    say.stage(f"layers of {space_name} at {'x'.join(map(str, shape))}")
    latency = profile_space(space, shape, device, table, progress, again=again)
    spent = time.perf_counter() - started
    error: dict[str, Any] | None = None
    if not isinstance(device, TableDevice):
        known = calibration_networks(space, seed, raw=latency.raw)
        say.stage(f"whole networks: {len(known)} to calibrate on" + (f", {networks} to test" if networks else ""))
        unseen = calibration_networks(space, seed + 1, networks)
        times = calibrate(space, shape, device, latency, [*known, *unseen], seconds=0.8 * (len(known) + networks))
        latency = latency.calibrated(known, times[: len(known)])
        prices = latency.prices
        predicted = [prices.of(network) for network in unseen]
        error = table_error(predicted, times[len(known) :]) if unseen else None
    prices, lines = latency.prices, outline(space)
    ends = [extreme(prices.alone, lines.parents, lines.rules, largest=largest) for largest in (False, True)]
    return {
        "space": space_name,
        "device": device.name,
        "fingerprint": fingerprint,
        "versions": device.versions(),
        "input": list(shape),
        "entries": len(device.table if isinstance(device, TableDevice) else table.entries(fingerprint)),
        "new_entries": new,
        "ms_per_entry": 1e3 * spent / new if new else None,
        "range_ms": [prices.of(end) for end in ends],
        "error": error,
    }


def table_error(predicted: list[float], measured: list[float]) -> dict[str, Any]:
    """How far predictions are from measured milliseconds: mean and largest error in percent, and Kendall's tau
    (None where there is no order: a single network, or equal predictions)."""
    from scipy.stats import kendalltau

    errors = [100 * abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    tau: float = kendalltau(predicted, measured).statistic if len(measured) > 1 else math.nan  # pyright: ignore
    return {
        "networks": len(measured),
        "mean_percent": sum(errors) / len(errors),
        "largest_percent": max(errors),
        "kendall_tau": float(tau) if math.isfinite(tau) else None,
        "predicted_ms": predicted,
        "measured_ms": measured,
    }
