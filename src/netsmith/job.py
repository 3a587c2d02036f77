"""A run's question, opened: its task, device and space, what everything in it costs, and the problem they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from netsmith.cost.bits import BitOps
from netsmith.cost.budget import Budget, parse_budgets
from netsmith.cost.counts import BranchCount, Flash, Macs, Params
from netsmith.cost.device import Device, load_shipped, parse_device, torch_threads
from netsmith.cost.imported import import_table
from netsmith.cost.latency import SpaceLatency, calibrate, calibration_networks, profile_space
from netsmith.cost.memory import alive
from netsmith.cost.meter import measure
from netsmith.cost.prices import Prices
from netsmith.cost.table import Calibration, LatencyTable, TableDevice
from netsmith.errors import UserError
from netsmith.options import checked
from netsmith.run import Run
from netsmith.search.problem import LEARNT, Problem
from netsmith.search.promise import ENOUGH, Timer, export_untrained
from netsmith.ship.weights import tensors
from netsmith.spaces import FROM_MODEL, open_space
from netsmith.spaces.from_model import carry
from netsmith.tasks import open_task
from netsmith.train.recipe import Recipe

CARRIED = "original.safetensors"
"""In the folder of a run: the weights of the network that its space is made of."""


class Say(Protocol):
    """Where progress goes."""

    def stage(self, name: str) -> None: ...
    def progress(self, name: str, done: int, total: int, note: str = "") -> None: ...
    def line(self, text: str) -> None: ...


@dataclass
class Job:
    """A run's question, opened: task, device, space. Everything comes from the run's `problem.yaml`."""

    run: Run
    say: Say
    profile_seconds: float = 0.0
    enough: float = ENOUGH
    """The share of a limit from which a network that keeps it is close enough."""

    @property
    def asked(self) -> dict[str, Any]:
        return self.run.problem

    @cached_property
    def task(self):
        data = self.asked.get("data")
        task = open_task(self.asked["task"], Path(data) if data else None, resolution=self.asked.get("resolution"))
        if task.fingerprint != self.asked.get("images", task.fingerprint):
            raise UserError(
                f"{task.source} has other images than when {self.run.path} was started: put them back, or start anew"
            )
        return task

    @cached_property
    def device(self) -> Device:
        table = self.asked.get("table")
        return import_table(Path(table), self.asked.get("table_part")) if table else parse_device(self.asked["device"])

    @cached_property
    def recipe(self) -> Recipe:
        return checked(Recipe, self.asked["recipe"], "recipe")

    def open(self) -> None:
        """Open all that may not be there any more. Raises: UserError for what is not."""
        _ = self.task, self.device

    def build(self) -> nn.Module:
        """The supernet, with the same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed("supernet"))
            space = open_space(self.asked["space"], **self.asked["space_options"])
        if self.carried and torch.get_default_device().type != "meta":
            carry(space, tensors(self.run.path / CARRIED))
            if (learnt := self.run.path / LEARNT).exists():
                space.load_state_dict(tensors(learnt), strict=False)
        return space

    @property
    def carried(self) -> bool:
        """Whether the space is made of a trained network, whose weights it has."""
        return self.asked["space"] == FROM_MODEL

    @cached_property
    def problem(self) -> Problem:
        """The priced problem, budgets absolute."""
        problem = Problem(self.task, self.build, [], self.latency.prices, self.recipe, self.asked["seed"])
        self.reference = self.run.once("reference", lambda: self._measure_reference(problem))
        problem.budgets = [
            [Budget(b.metric, b.absolute(self.reference["cost"].get(b.metric, 0.0)), b.unit) for b in budgets]
            for budgets in self.budgets
        ]
        return problem

    @cached_property
    def budgets(self) -> list[list[Budget]]:
        """As asked, relative ones still relative."""
        return parse_budgets(self.asked["budget"])

    @cached_property
    def latency(self) -> SpaceLatency:
        """What the space's options take on the device, calibrated on whole networks."""

        def profiled() -> dict:
            with torch.device("meta"):
                space = self.build()
            self.say.stage("profile")
            started = time.perf_counter()
            table = LatencyTable()
            notes: Callable[[str, int, int], None] = self.say.progress
            latency = profile_space(space, self.task.input_shape, self.device, table, notes)
            if not isinstance(self.device, TableDevice):
                networks = calibration_networks(space, self.asked["seed"], raw=latency.raw)
                latency = latency.calibrated(
                    networks, calibrate(space, self.task.input_shape, self.device, latency, networks)
                )
            return {
                "raw": _to_pairs(latency.raw),
                "layers": _to_pairs(latency.layers),
                "weights": _to_pairs(latency.weights),
                "fixed": dict(latency.fixed),
                "calibration": asdict(latency.calibration),
                "seconds": time.perf_counter() - started,
            }

        stored = self.run.once("profile", profiled)
        self.profile_seconds = stored["seconds"]
        calibration = Calibration(**{**stored["calibration"], "residuals": tuple(stored["calibration"]["residuals"])})
        raw, layers, weights = (_from_pairs(stored[name]) for name in ("raw", "layers", "weights"))
        fixed = {path: (ms, count) for path, (ms, count) in stored.get("fixed", {}).items()}
        return SpaceLatency(raw, layers, weights, calibration, fixed)

    def _measure_reference(self, problem: Problem) -> dict:
        """The dearest network of the space, measured: what relative budgets are relative to."""
        architecture = problem.reference
        network, file = export_untrained(problem, architecture, self.run.path / "untrained.onnx")
        plain, shape = problem.plain(architecture), self.task.input_shape
        cost = {
            # The lower of two: a machine that was busy once would loosen every relative budget.
            "latency": min(self.time(network, file) for _ in "12") if self.time else problem.latency.of(architecture),
            "params": Params()(plain, shape),
            "macs": Macs()(plain, shape),
            **alive(plain, shape),
            "flash": Flash()(plain, shape),
            "file": float(file.stat().st_size),
            "branches": BranchCount()(plain, shape),
            "bitops": BitOps()(plain, shape),
        }
        return {"architecture": architecture, "cost": cost}

    @property
    def time(self) -> Timer | None:
        """On the device; None where nothing runs."""
        device = self.device
        if isinstance(device, TableDevice):
            return None

        def median_ms(network: nn.Module, file: Path) -> float:
            return measure({"it": load_shipped(device, network, file, self.task.input_shape)})["it"].median_ms

        return median_ms


ONE_THREAD = 16
"""Pixels up to which one thread trains. Threads of tiny layers wait for each other: an epoch of digits takes 0.7 s with
one thread, and with two on a busy two-core machine 4 to 25 s."""


def threads_for(resolution: int) -> AbstractContextManager[None]:
    """As many threads as suit images of so many pixels a side."""
    return torch_threads(1 if resolution <= ONE_THREAD else torch.get_num_threads())


def _to_pairs(prices: Prices) -> dict:
    """JSON keeps no integer keys, and widths are integers."""
    options = {path: list(row.items()) for path, row in prices.options.items()}
    pairs = [[*ends, [[*both, price] for both, price in row.items()]] for ends, row in prices.pairs.items()]
    return {"constant": prices.constant, "options": options, "pairs": pairs}


def _from_pairs(data: dict) -> Prices:
    options = {path: dict(row) for path, row in data["options"].items()}
    pairs = {(a, b): {(i, j): price for i, j, price in row} for a, b, row in data.get("pairs", ())}
    return Prices(data["constant"], options, pairs=pairs)
