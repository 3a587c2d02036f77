"""The gate: the exported file is scored and timed again, and every budget is kept or broken by what it shows.

The only place that touches the `test` split, once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from netsmith.cost import meter
from netsmith.cost.bits import BitOps
from netsmith.cost.budget import Budget, show, within
from netsmith.cost.counts import BranchCount, Flash, Macs, Params, Shape
from netsmith.cost.device import Device, OrtCpu, load_shipped
from netsmith.cost.memory import ALIVE, alive
from netsmith.cost.meter import Measurement
from netsmith.cost.table import TableDevice
from netsmith.errors import UserError
from netsmith.ship.agreement import Agreement, agree
from netsmith.ship.layers import Layer, layers
from netsmith.tasks.classification import Task


@dataclass(frozen=True)
class Judged:
    """One budget and what became of it, in the unit of the budget."""

    metric: str
    limit: float
    unit: str
    measured: float | None
    """None where it could only be predicted."""
    kept: bool
    text: str
    """Such as: 812k params against a limit of 1.00M."""


@dataclass(frozen=True)
class Verdict:
    """What the file showed. `to_json()` are its pieces of `result.json`."""

    kept: bool
    sentence: str
    metric: str
    agreement: Agreement
    budgets: list[Judged]
    costs: dict[str, float | None]
    """By the metrics of budgets: latency (ms, the median), params, macs, peak_memory, ram, flash and file (bytes),
    branches, bitops."""
    latency: Measurement | None
    predicted_ms: float | None
    relative: dict[str, float]
    """The same costs as shares of the reference's, as `gate` was given them."""
    layers: list[Layer] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        median = self.latency.median_ms if self.latency else None
        interval = list(self.latency.ci95) if self.latency else None
        judged = [{k: getattr(b, k) for k in ("metric", "limit", "unit", "measured", "kept")} for b in self.budgets]
        return {
            "kept": self.kept,
            "verdict": self.sentence,
            "metric": {
                "name": self.metric,
                "test": self.agreement.accuracy,
                "test_exported": self.agreement.accuracy_exported,
            },
            "budgets": judged,
            "cost": {
                "params": self.costs["params"],
                "macs": self.costs["macs"],
                "peak_memory_bytes": self.costs["peak_memory"],
                "ram_bytes": self.costs["ram"],
                "flash_bytes": self.costs["flash"],
                "file_bytes": self.costs["file"],
                "branches": self.costs["branches"],
                "bitops": self.costs["bitops"],
                "latency_ms": {
                    "predicted": self.predicted_ms,
                    "median": median,
                    "ci95": interval,
                    "settled": self.latency.settled if self.latency else None,
                },
            },
            "relative": self.relative,
            "parity_max_abs_diff": self.agreement.max_abs_diff,
            "parity_same_class": self.agreement.same_class,
            "layers": [layer.to_json() for layer in self.layers],
        }


def gate(
    network: nn.Module,
    onnx_path: Path,
    task: Task,
    device: Device,
    budgets: Sequence[Budget],
    reference: Mapping[str, float] | None = None,
    *,
    predicted_ms: float | None = None,
    predicted_layers: Mapping[str, float] | None = None,
    seconds: float = 10.0,
    with_layers: bool = True,
) -> Verdict:
    """Judge the file that `ship.export` made of ``network``; both are left as they are.

    Args:
        device: `OrtCpu` times the file itself, a PyTorch device the network, and a `TableDevice` nothing: its latency
            is ``predicted_ms``, and said to be.
        budgets: limits that hold at once; relative ones are shares of ``reference``.
        reference: measured costs of the network to compare with, by the metrics of budgets, in their units.
        predicted_layers: milliseconds by the names of the network's layers.
        seconds: bounds the timing; what is not clearly within the limit is timed once more for three times as long,
            and that stands: other work on the machine can only add to a time.
        with_layers: the network is timed layer by layer as well.

    Raises: UserError for a file that cannot be loaded, a relative budget without reference, a latency budget on a
        table without ``predicted_ms``, or a peak memory budget on a network that cannot be traced. A broken budget
        does not raise: see `Verdict.kept`.
    """
    reference = reference or {}
    limits = {budget.metric: _limit(budget, reference) for budget in budgets}
    plain = copy.deepcopy(network).cpu().float().eval()
    shape = task.input_shape
    runs = not isinstance(device, TableDevice)
    if not runs and predicted_ms is None and "latency" in limits:
        raise UserError(f"{device.name} is a table: its latency budget needs a predicted latency")

    agreement = agree(plain, onnx_path, task)
    measured = _time(plain, onnx_path, device, shape, limits.get("latency"), seconds) if runs else None
    costs: dict[str, float | None] = {
        "latency": measured.median_ms if measured else None,
        "params": Params()(network, shape),
        "macs": Macs()(network, shape),
        **_alive(network, shape, needed=bool(ALIVE.keys() & limits)),
        "flash": Flash()(network, shape),
        "file": float(onnx_path.stat().st_size),
        "branches": BranchCount()(network, shape),
        "bitops": BitOps()(network, shape),
    }
    judged = [
        _judge(budget, limits[budget.metric], costs[budget.metric], predicted_ms, measured, device)
        for budget in budgets
    ]
    kept = agreement.holds and all(budget.kept for budget in judged)
    relative = {name: value / reference[name] for name, value in costs.items() if value and reference.get(name)}
    timed = device if runs and with_layers else None
    return Verdict(
        kept=kept,
        sentence=_sentence(kept, judged, agreement, measured),
        metric=task.metric,
        agreement=agreement,
        budgets=judged,
        costs=costs,
        latency=measured,
        predicted_ms=predicted_ms,
        relative=relative,
        layers=layers(plain, shape, timed, predicted=predicted_layers),
    )


def _limit(budget: Budget, reference: Mapping[str, float]) -> float:
    if budget.relative and budget.metric not in reference:
        raise UserError(f"budget {budget} is relative, and the reference's {budget.metric} is not known")
    return budget.absolute(reference.get(budget.metric, 0.0))


def _time(
    network: nn.Module, path: Path, device: Device, shape: Shape, limit: float | None, seconds: float
) -> Measurement:
    timed = {"network": load_shipped(device, network, path, shape)}
    measured = meter.measure(timed, seconds=seconds)["network"]
    if limit is not None and limit < measured.ci95[1]:
        measured = meter.measure(timed, seconds=3 * seconds, precision=0.002)["network"]
    return measured


def _straddles(measured: Measurement, limit: float) -> bool:
    return measured.ci95[0] <= limit < measured.ci95[1]


def _alive(network: nn.Module, shape: Shape, *, needed: bool) -> dict[str, float] | dict[str, None]:
    try:
        return alive(network, shape)
    except UserError:
        if needed:
            raise
        return dict.fromkeys(ALIVE)


def _judge(
    budget: Budget,
    limit: float,
    value: float | None,
    predicted_ms: float | None,
    measured: Measurement | None,
    device: Device,
) -> Judged:
    decisive = predicted_ms if value is None else value
    assert decisive is not None
    kept = within(decisive, limit)
    shown, bound = _apart(decisive, limit, budget.unit)
    if budget.metric != "latency":
        what = f"{shown} {budget.metric.replace('_', ' ')}"
    elif measured is None:
        what = f"{shown} predicted only (nothing runs on the table {device.name})"
    else:
        where = "" if isinstance(device, OrtCpu) else f" in PyTorch on {device.name}, not from the file,"
        what = f"{shown} measured{where} (95 % interval {_interval(*measured.ci95)})"
    text = f"{what} against a limit of {bound}"
    if measured is not None and budget.metric == "latency" and _straddles(measured, limit):
        text += ", decided by the median as the interval straddles the limit"
    return Judged(budget.metric, limit, budget.unit, value, kept, text)


def _sentence(kept: bool, judged: list[Judged], agreement: Agreement, measured: Measurement | None) -> str:
    """Broken promises first.

    Without shares of the reference: it is measured again once it is trained, a percent or two apart. The limit holds
    for the first time; the report's table gives shares of the second, which stands beside them.
    """
    parts = [budget.text for budget in judged if not budget.kept]
    if not agreement.holds:
        parts.insert(
            0,
            f"the file's outputs differ from PyTorch's by {agreement.max_abs_diff:.2g}, "
            f"{agreement.relative_diff:.1g} of the largest, where {agreement.allowed:g} is allowed",
        )
    held = [budget.text for budget in judged if budget.kept]
    if parts and held:
        held[0] = f"kept: {held[0]}"
    parts += held
    if measured is not None and not measured.settled:
        parts.append("the machine was too busy for a narrow interval")
    scores = f"{_percent(agreement.accuracy_exported)} through the file, {_percent(agreement.accuracy)} in PyTorch"
    return f"{'kept' if kept else 'broken'}: {'; '.join([*parts, scores])}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _apart(value: float, limit: float, unit: str) -> tuple[str, str]:
    """Both as text, in full where three digits would make one of what is two."""
    shown = show(value, unit), show(limit, unit)
    if shown[0] == shown[1] and value != limit:
        return f"{value:.8g} {unit}".strip(), f"{limit:.8g} {unit}".strip()
    return shown


def _interval(low: float, high: float) -> str:
    first, second = show(low, "ms").split(), show(high, "ms").split()
    return f"{first[0]}-{second[0]}" if first[1] == second[1] else f"{' '.join(first)} - {' '.join(second)}"
