"""From a question to a shipped file: profile, search, keep the promise, train, pass the gate, report.

Every step is a stage of the run, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from netsmith.architecture import loads
from netsmith.blocks.quantized import calibrate
from netsmith.cost.budget import Budget
from netsmith.decisions import Architecture, derive
from netsmith.effort import counted, effort
from netsmith.errors import UserError
from netsmith.job import Job, Say, threads_for
from netsmith.methods import make_method
from netsmith.prepare import open_run
from netsmith.run import Run, atomically
from netsmith.search.allocate import Infeasible
from netsmith.search.problem import Problem, taught
from netsmith.search.promise import ENOUGH, Kept, keep
from netsmith.search.sampling import capacity
from netsmith.ship.export import calibration_images, export
from netsmith.ship.gate import Verdict, gate
from netsmith.ship.weights import load, save, tensors
from netsmith.train.loop import train


def search(run: Run, say: Say, *, enough: float = ENOUGH) -> dict:
    """The whole job of a run; returns the content of its `result.json`. Continues what a killed process left.

    ``enough``: the share of a limit from which a network that keeps it is close enough.
    """
    with threads_for(run.problem["space_options"]["resolution"]):
        return _search(Job(run, say, enough=enough))


GROUND = ("profile", "reference", "ship-reference")
"""Stages that runs of one problem may share, whatever their methods and seeds."""


def lay_ground(run: Run, say: Say) -> None:
    """The stages that a search begins with: prices, and the reference, trained where something is relative to it.

    Raises: Infeasible for a budget that no network keeps; the run is then discarded.
    """
    with threads_for(run.problem["space_options"]["resolution"]):
        job = Job(run, say)
        run.progress = say.progress
        _feasible(job)
        _reference(job)


def _search(job: Job) -> dict:
    run, say = job.run, job.say
    run.progress = say.progress
    problem = _feasible(job)
    seconds = {"profile": job.profile_seconds}
    say.stage(f"search: {job.asked['method']}")
    method = make_method(job.asked["method"], job.asked["method_options"])
    front = _timed(run, seconds, "search", lambda: _found(job, problem, job.asked["method"], method))
    rivals = {}
    for name in job.asked["baselines"]:
        if name != job.asked["method"]:
            say.stage(f"baseline {name}")
            rivals[name] = run.once(
                f"baseline-{name}", lambda n=name: [asdict(k) for k in _found(job, problem, n, make_method(n))]
            )
    say.stage("train, export, measure")
    return finish(job, front, rivals, seconds)


def _feasible(job: Job) -> Problem:
    problem = job.problem
    try:
        check_feasible(job, problem)
    except Infeasible:
        job.run.discard()  # what was measured lies in the device's table
        raise
    return problem


def check_feasible(job: Job, problem: Problem) -> None:
    """Raises: Infeasible for a budget that no network keeps as predicted, with the nearest that one does."""
    for asked, budgets in zip(job.budgets, problem.budgets, strict=True):
        try:
            problem.allocate(capacity(problem), budgets)
        except Infeasible as error:
            if not error.reachable:
                raise
            smallest = dict(zip([limit.name for limit in problem.limits(budgets)], error.reachable, strict=True))
            near = [b if b.metric not in smallest else _raised(b, smallest[b.metric][0], job) for b in asked]
            if near == asked:  # each can be kept, only not all at once
                raise
            raise Infeasible(f"{error}; the nearest that can be kept: {', '.join(map(str, near))}") from None


def _raised(budget: Budget, least: float, job: Job) -> Budget:
    """The budget, or the next above ``least`` in two digits: the file differs a little from what is predicted."""
    reference = job.reference["cost"][budget.metric]
    if least <= budget.absolute(reference):
        return budget
    limit = 1.02 * least / (reference if budget.relative else 1.0)
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return replace(budget, limit=float(f"{math.ceil(limit / step) * step:.2g}"))


def _found(job: Job, problem: Problem, name: str, method: Any) -> list[Kept]:
    with counted(job.run, name):
        values = method.search(problem, job.run)
    return [
        keep(problem, job.run, f"{name}-{i}", v, budgets, job.time, enough=job.enough)
        for i, (v, budgets) in enumerate(zip(values, problem.budgets, strict=True))
    ]


def _timed(run: Run, seconds: dict[str, float], name: str, compute: Callable[[], list[Kept]]) -> list[Kept]:
    def measured() -> dict:
        started = time.perf_counter()
        found = [asdict(kept) for kept in compute()]
        return {"found": found, "seconds": time.perf_counter() - started}

    stored = run.once(name, measured)
    seconds[name] = stored["seconds"]
    return [Kept(**kept) for kept in stored["found"]]


def finish(job: Job, front: list[Kept], rivals: Mapping[str, list[dict]], seconds: dict[str, float]) -> dict:
    """Train every network by the same recipe, pass the gate, write the results."""
    run, problem = job.run, job.problem
    names = [point_name(budgets) for budgets in job.budgets]
    reference = _reference(job)
    teacher = load(run.path / "others" / "reference") if job.recipe.distillation else None
    networks = []
    for i, kept in enumerate(front):
        folder = run.path / names[i] if len(front) > 1 else run.path
        own = taught(job.asked["method"], i)
        networks.append(_shipped(job, f"found-{i}", kept.architecture, folder, problem.budgets[i], teacher, own))
    baselines = [
        {
            "name": name,
            **_shipped(job, f"{name}-{i}", kept["architecture"], None, problem.budgets[i], teacher, taught(name, i)),
        }
        for name, kept_list in rivals.items()
        for i, kept in enumerate(kept_list)
    ]
    parts = [reference, *networks, *baselines]
    seconds |= {kind: sum(part["seconds"][kind] for part in parts) for kind in ("train", "ship")}
    asked = job.asked
    shared = {
        "method": asked["method"],
        "space": asked["space"],
        "task": asked["task"],
        "seed": asked["seed"],
        "reference": {key: reference[key] for key in ("metric", "cost")},
        "baselines": [
            {key: b[key] for key in ("name", "metric", "budgets", "cost")} | {"seed": asked["seed"]} for b in baselines
        ],
        "device": {
            "name": job.device.name,
            "fingerprint": job.device.fingerprint(),
            "versions": job.device.versions(),
        },
        "seconds": seconds,
        "effort": effort(run, asked["method"]),
    }
    points = [{key: value for key, value in network.items() if key != "seconds"} for network in networks]
    result = shared | (points[0] if len(points) == 1 else {"front": points, "kept": all(p["kept"] for p in points)})
    run.write_json("result.json", result)
    return result


def _reference(job: Job) -> dict:
    """What the gate says of the largest network of the space, which takes longest: trained where it was asked for."""
    yardstick = any(budget.relative for budgets in job.budgets for budget in budgets)
    if yardstick or job.recipe.distillation:
        return _shipped(job, "reference", job.reference["architecture"], None, [])
    return _untrained_reference(job)


def _shipped(
    job: Job,
    name: str,
    architecture: Architecture,
    folder: Path | None,
    budgets: list[Budget],
    teacher: nn.Module | None = None,
    own: str = "",
) -> dict:
    """Train, export and judge one network; with a folder, what is shipped stays there. ``own``: the file of weights
    that a method may have given the space for this network alone."""
    run = job.run
    recipe = job.recipe if teacher is not None else replace(job.recipe, distillation=0.0)

    def made() -> dict:
        started = time.perf_counter()
        space = job.build()
        if own and (run.path / own).exists():
            space.load_state_dict(tensors(run.path / own), strict=False)
        network = derive(space, architecture)

        def noted(epoch: dict[str, float]) -> None:
            run.event("train_epoch", which=name, **epoch)
            job.say.progress(f"train {name}", int(epoch["epoch"]), recipe.epochs, f"loss {epoch['loss']:.3f}")

        seed = run.seed("train")
        checkpoint = run.checkpoint(f"train-{name}.pt")
        calibrate(network, lambda: calibration_images(job.task))  # training goes on from there
        if recipe.epochs and (name != "reference" or not job.carried):  # which is trained already
            train(
                network, job.task, recipe, split="trainval", seed=seed,
                teacher=teacher, checkpoint=checkpoint, on_epoch=noted,
            )  # fmt: skip
        trained = time.perf_counter()
        place = folder or run.path / "others" / name
        place.mkdir(parents=True, exist_ok=True)
        save(place, network, architecture)
        verdict = _judged(job, network, architecture, place, budgets, with_layers=folder is not None)
        run.event("gate", which=name, kept=verdict.kept, sentence=verdict.sentence)
        shipped = time.perf_counter()
        return {
            **verdict.to_json(),
            "architecture": architecture,
            "seconds": {"train": trained - started, "ship": shipped - trained},
        }

    result = run.once(f"ship-{name}", made)
    if folder is not None and folder != run.path:
        with atomically(folder / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1))
    return result


def _untrained_reference(job: Job) -> dict:
    """What `_shipped` says, with the costs alone."""
    cost = job.reference["cost"]
    predicted = job.problem.latency.of(job.reference["architecture"])
    measured = cost["latency"] if job.time else None
    return {
        "metric": {"name": job.task.metric, "test": None, "test_exported": None},
        "cost": {
            "params": cost["params"],
            "macs": cost["macs"],
            "peak_memory_bytes": cost["peak_memory"],
            "ram_bytes": cost["ram"],
            "flash_bytes": cost["flash"],
            "file_bytes": cost["file"],
            "branches": cost["branches"],
            "bitops": cost.get("bitops"),  # None: measured by a version that did not count them
            "latency_ms": {"predicted": predicted, "median": measured, "ci95": None, "settled": None},
        },
        "seconds": {"train": 0.0, "ship": 0.0},
    }


def _judged(
    job: Job, network: nn.Module, architecture: Architecture, place: Path, budgets: list[Budget], *, with_layers: bool
) -> Verdict:
    file = export(
        network, job.task.input_shape, place / "model.onnx", architecture=architecture, task=job.task.without_test()
    )
    return gate(
        network,
        file,
        job.task,
        job.device,
        budgets,
        job.reference["cost"],
        predicted_ms=job.problem.latency.of(architecture),
        predicted_layers=job.latency.by_layer(architecture),
        with_layers=with_layers,
    )


def retrain(run: Run, say: Say, epochs: int | None = None) -> dict:
    """Train and ship the networks of a finished search once more; returns the content of `result.json`.

    ``epochs``: of this and any later training, in place of the recipe's.
    """
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs is {epochs}; allowed: 1 or more")
    run.read_json("result.json")  # UserError where the search is not finished
    job = Job(run, say)
    job.open()
    recipe = replace(job.recipe, epochs=job.recipe.epochs if epochs is None else epochs)
    for old in (*run.path.glob("stages/ship-*.json"), *run.path.glob("checkpoints/train-*.pt")):
        old.unlink()
    run.amend(recipe=asdict(recipe))
    return search(run, say)


def ship(folder: Path, say: Say) -> dict:
    """Export and judge a trained network of a run again: what the gate said. The run's `result.json` stays."""
    folder = folder.absolute()
    place = folder if (folder / "problem.yaml").exists() else folder.parent
    if not (place / "problem.yaml").exists():
        raise UserError(f"{folder} is no run of netsmith, nor a network of one")
    with open_run(place) as run:
        job = Job(run, say)
        network = load(folder)
        architecture = loads((folder / "architecture.json").read_text())
        number = 0 if folder == place else [point_name(b) for b in job.budgets].index(folder.name)
        verdict = _judged(job, network, architecture, folder, job.problem.budgets[number], with_layers=True)
        return verdict.to_json()


def point_name(budgets: list[Budget]) -> str:
    """The folder of one network of a front: `latency-0.5x`."""
    return "_".join(str(budget).replace("<=", "-") for budget in budgets)
