"""The promise loop: allocate, export untrained, measure, correct, until the measured file keeps the budget.

Latency and file size do not depend on the weights, so the winner is measured before anything is spent on training it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from netsmith.cost.budget import Budget, show, within
from netsmith.cost.prices import Options
from netsmith.decisions import Architecture
from netsmith.errors import PromiseBroken
from netsmith.run import Run
from netsmith.search.allocate import Infeasible, Unsolved
from netsmith.search.problem import FILL, Problem
from netsmith.ship.export import export

AIM = 0.98
"""Share of the limit that a correction aims at: the knapsack fills what it is given, and the same file measured in
another process differs by 1.2 % (standard deviation; three jobs on two cores)."""
TIGHT = 0.985
"""Share of the limit above which a kept time may be over it in another process (at 0.985 two of 20 were by 0.4 %, one
at 0.995 was by 2.2 %): it counts as a landing below `ENOUGH`, and another round looks for a safer network."""
ENOUGH = 0.95
"""Share of the limit from which a kept network is good enough to stop."""
CLOSE = 0.97
"""Share of the limit from which a time that keeps it is taken twice, and the slower one counts."""
PATIENCE, NEARLY = 3, 0.9
"""Rounds after which a network that uses this share of a limit will do."""


Timer = Callable[[nn.Module, Path], float]
"""Milliseconds, from a network and the file it was exported to: a device runs one of them."""


@dataclass(frozen=True)
class Kept:
    """An architecture whose exported file keeps its budgets as measured."""

    architecture: Architecture
    predicted: dict[str, float]
    measured: dict[str, float]
    rounds: int


def keep(
    problem: Problem,
    run: Run,
    name: str,
    values: Options,
    budgets: Sequence[Budget],
    time: Timer | None,
    *,
    rounds: int = 5,
    enough: float = ENOUGH,
) -> Kept:
    """The most valuable architecture whose exported file keeps ``budgets``.

    ``time`` measures; None where the device can only predict. ``enough``: the share of a limit from which a network
    that keeps it is close enough.

    Raises: Infeasible when nothing is within the budgets; PromiseBroken when measuring contradicts the table for
    ``rounds`` rounds.
    """
    result = run.once(
        f"promise-{name}", lambda: asdict(_keep(problem, run, name, values, budgets, time, rounds, enough))
    )
    return Kept(**result)


def _keep(
    problem: Problem,
    run: Run,
    name: str,
    values: Options,
    budgets: Sequence[Budget],
    time: Timer | None,
    rounds: int,
    enough: float,
) -> Kept:
    def worth(measured: dict[str, float]) -> float:
        """The largest share of a budget that is used: who uses more of it is the better network, but for tight ones."""
        tight = time and any(b.metric == "latency" and measured[b.metric] > TIGHT * b.limit for b in budgets)
        return ENOUGH - 0.01 if tight else max((measured[b.metric] / b.limit for b in budgets), default=1.0)

    scale = {budget.metric: AIM if _measurable(budget, time) else 1.0 for budget in budgets}
    best: Kept | None = None
    previous: Architecture = {}
    points: dict[str, list[tuple[float, float]]] = {budget.metric: [] for budget in budgets}
    worst, measurings, least = "", 0, 0.0
    for number in range(1, rounds + 1):
        try:
            architecture = problem.allocate(values, budgets, scale, least=least)
        except (Infeasible, Unsolved) as error:
            if number > 1:
                break  # nothing is small enough for the corrected limit, or the solver found nothing in time
            if isinstance(error, Unsolved):
                raise
            architecture = problem.allocate(values, budgets)
        if architecture == previous:
            break
        previous, measurings = architecture, number
        predicted = {b.metric: problem.predicted(b, architecture) for b in budgets}
        if number == 1:  # a corrected limit is to be used as far as what the method found uses the limit
            used = [predicted[b.metric] / (b.limit * scale[b.metric]) for b in budgets]
            least = min(FILL, max(used, default=0.0))
        measured = run.once(
            f"promise-{name}-{number}",
            lambda a=architecture, p=predicted: _tried(problem, run, a, budgets, p, time),
        )
        broken = [b for b in budgets if not within(measured[b.metric], b.limit)]
        for b in budgets:
            run.event(
                "promise_round",
                name=name,
                round=number,
                metric=b.metric,
                limit=b.limit,
                predicted=predicted[b.metric],
                measured=measured[b.metric],
                kept=b not in broken,
            )
        if not broken and (best is None or worth(measured) > worth(best.measured)):
            best = Kept(architecture, predicted, measured, number)
        if not broken and worth(measured) >= enough:
            break
        if best and number >= PATIENCE and worth(best.measured) >= NEARLY:
            break
        for b in budgets:
            if _measurable(b, time):
                points[b.metric].append((predicted[b.metric], measured[b.metric]))
                scale[b.metric] = _corrected(points[b.metric], b.limit)
        if broken:
            b = broken[0]
            worst = f"{b} was measured at {show(measured[b.metric], b.unit)}"
    if best is None:
        raise PromiseBroken(f"no exported network kept its budget in {measurings} rounds: {worst}")
    return Kept(best.architecture, best.predicted, best.measured, measurings)


def _tried(
    problem: Problem,
    run: Run,
    architecture: Architecture,
    budgets: Sequence[Budget],
    predicted: dict[str, float],
    time: Timer | None,
) -> dict[str, float]:
    """What the file of an architecture takes of each budget's metric."""
    network, file = export_untrained(problem, architecture, run.path / "untrained.onnx")
    return {b.metric: _measured(b, predicted[b.metric], network, file, time) for b in budgets}


def _corrected(points: Sequence[tuple[float, float]], limit: float) -> float:
    """The share of the limit to ask the table for next, from (predicted, measured) of the rounds so far.

    With a round on each side of the limit, by interpolation between the nearest two: what the table is wrong by need
    not be in proportion. Otherwise in proportion to the last round.
    """
    kept = max((point for point in points if point[1] <= limit), default=None)
    broken = min((point for point in points if point[1] > limit), default=None)
    if kept and broken and kept[0] < broken[0]:
        way = (AIM * limit - kept[1]) / (broken[1] - kept[1])
        return (kept[0] + way * (broken[0] - kept[0])) / limit
    predicted, measured = points[-1]
    return AIM * predicted / measured


def export_untrained(problem: Problem, architecture: Architecture, path: Path) -> tuple[nn.Module, Path]:
    """A network before its training, as it will look after it, and its file."""
    network = with_shifts(problem.network(architecture))
    return network, export(network, problem.input_shape, path, architecture=architecture, task=problem.task)


def with_shifts(network: nn.Module) -> nn.Module:
    """The untrained network with random shifts in its batch norms: a folded bias of all zeros would be dropped by the
    exporter, which makes the untrained file up to 2 % faster than the trained one."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    return network


def _measurable(budget: Budget, time: Timer | None) -> bool:
    """Whether the file may disagree with the prediction; counts are exact."""
    return budget.metric == "file" or (budget.metric == "latency" and time is not None)


def _measured(budget: Budget, predicted: float, network: nn.Module, file: Path, time: Timer | None) -> float:
    if budget.metric == "file":
        return float(file.stat().st_size)
    if budget.metric == "latency" and time is not None:
        first = time(network, file)
        return max(first, time(network, file)) if CLOSE * budget.limit < first <= budget.limit else first
    return predicted
