"""Several compressions one after the other, each of what the one before has made: prune, then quantize, in one folder.

The folder is the run of the last method; those before it lie in `before/`, beside the original as measured here. Its
`chain.yaml` says what was asked, so that `netsmith compress --config FOLDER/chain.yaml` repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from netsmith.architecture import extreme
from netsmith.compression import cost_of, prepare_compression
from netsmith.cost.budget import Budget, parse_budgets, show
from netsmith.errors import UserError, unknown
from netsmith.job import Job, Say
from netsmith.methods import METHODS
from netsmith.options import CompressOptions, read_options
from netsmith.pipeline import search
from netsmith.prepare import next_folder
from netsmith.run import atomically, dump_yaml, load_yaml
from netsmith.search.problem import Problem

CHAIN = "chain.yaml"
BEFORE = "before"
SEPARATOR = ","
EASE = 1.1
"""No method is asked for its cheapest network, but for one that costs so many times as much."""


def begin_chain(options: CompressOptions) -> Path:
    """The folder of a new chain, `options` written to it; or of one that was begun with the same ones.

    Raises: UserError for an unknown method, for what belongs to one method alone, and for a folder with something else.
    """
    names = options.method.split(SEPARATOR)
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    if foreign := [name for name in options.method_options if name not in names]:
        raise UserError(
            f"method_options.{foreign[0]}: no method of the chain {options.method}; in a chain the options of a method "
            f"stand under its name, such as {names[0]}"
        )
    if len(parse_budgets(options.budget)) > 1:
        raise UserError(f"budget {', '.join(options.budget)!r} asks for a front; a chain makes one network")
    for given in ("pool", "search_epochs"):
        if getattr(options, given) is not None:
            raise UserError(f"{given} was given, and the chain {options.method} has several methods; each has its own")
    asked = asdict(options)
    folder = asked.pop("out") or next_folder(options.task or "compressed", "-".join(names))
    for name in ("model", "data", "table", "weights"):
        if asked[name] is not None and Path(asked[name]).exists():
            asked[name] = str(Path(asked[name]).absolute())
    text = dump_yaml({key: value for key, value in asked.items() if value is not None})
    if (folder / CHAIN).exists():
        if load_yaml((folder / CHAIN).read_text("utf-8")) != load_yaml(text):
            raise UserError(f"{folder} is another chain (see its {CHAIN}): give a new folder")
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and is no chain of netsmith: give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomically(folder / CHAIN) as temporary:
        temporary.write_text(text, "utf-8")
    return folder


def compress_in_turn(folder: Path, say: Say) -> tuple[Path, dict[str, Any]]:
    """Go through the chain in a folder, from where it was stopped; the run that it ends with, and the content of its
    `result.json`: the last network's, compared with the original, and under `stages` what each method has made. It ends
    early with a run whose file does not keep its share of the budget.

    Raises: UserError, as `prepare_compression`; Infeasible where a method cannot keep its share of the budget.
    """
    options = asked_of(folder)
    names = options.method.split(SEPARATOR)
    (asked,) = parse_budgets(options.budget)
    stages_of = [replace(options, method=name, method_options=options.method_options.get(name, {})) for name in names]
    opened = [_opened(stage, asked, folder / BEFORE / f"opened-{stage.method}", say) for stage in stages_of]
    reference: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    before: Path | None = None
    for number, (stage, limits) in enumerate(zip(stages_of, limits_of(asked, opened), strict=True)):
        last = number == len(names) - 1
        place = folder if last else folder / BEFORE / f"{number + 1}-{stage.method}"
        stage = replace(stage, budget=tuple(map(str, limits)), baselines=options.baselines if last else (), out=place)
        if before is not None:
            stage = replace(stage, model=str(before), weights=None, task=None, data=None, resolution=None)
        with prepare_compression(stage, beside=(CHAIN, BEFORE)) as run:
            limited = (f"{b.metric} <= {show(b.limit, b.unit)}" for b in limits)
            say.line(f"{place}: {stage.method}, {', '.join(limited)}")
            if before is None:
                for kind, value in opened[0].ground.items():
                    run.once(kind, lambda value=value: value)
            result = search(run, say)
            reference = reference or result["reference"]
            stages.append({"method": stage.method, **{key: result[key] for key in ("metric", "cost")}})
            if not result["kept"]:
                return place, result
            if last:
                result |= {"reference": reference, "relative": _relative(result, reference), "stages": stages}
                run.write_json("result.json", result)
                return place, result
        before = place
    raise AssertionError("a chain has a last method")


def _relative(result: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    pairs = {
        metric: (cost_of(result["cost"], metric), cost_of(reference["cost"], metric)) for metric in result["relative"]
    }
    return {metric: own / other for metric, (own, other) in pairs.items() if own and other}


def asked_of(folder: Path) -> CompressOptions:
    """What the chain in a folder was asked for."""
    return read_options(folder / CHAIN, CompressOptions)


def in_words(result: Mapping[str, Any]) -> list[str]:
    """What each method of a chain has made of the network."""

    def line(name: str, cost: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
        score, units = metric["test_exported"], {"latency": "ms", "params": "", "file": "B"}
        costs = [f"{key} {show(own, unit)}" for key, unit in units.items() if (own := cost_of(cost, key)) is not None]
        scored = [] if score is None else [f"{100 * score:.2f} % {metric['name']}"]
        return f"{name}: {', '.join(scored + costs)}"

    reference = result["reference"]
    after = [line(f"after {stage['method']}", stage["cost"], stage["metric"]) for stage in result["stages"]]
    return [line("original", reference["cost"], reference["metric"]), *after]


class Opened(NamedTuple):
    """The original as the space of one method."""

    ground: dict[str, Any]
    """Stages of a run that do not depend on its budget: prices, and what the original costs."""
    least: dict[str, float]
    """By the metrics of the budgets: what the cheapest network costs, as a share of the original."""


def _opened(stage: CompressOptions, asked: Sequence[Budget], folder: Path, say: Say) -> Opened:
    whole = tuple(f"{b.metric}<=1x" for b in asked)
    with prepare_compression(replace(stage, budget=whole, out=folder, baselines=())) as run:
        run.progress = say.progress
        problem = Job(run, say).problem
        least = {b.metric: _least(problem, b) for b in asked}
        return Opened({name: run.once(name, dict) for name in ("profile", "reference")}, least)


def _least(problem: Problem, budget: Budget) -> float:
    if not problem.adds_up(budget.metric):
        return 0.0  # not known
    metric = budget.metric if budget.metric in problem.prices else "macs"  # memory rises with every width
    prices = problem.prices[metric].alone
    cheapest = extreme(prices, problem.parents, problem.outline.rules, largest=False)
    return problem.predicted(budget, cheapest) / problem.predicted(budget, problem.reference)


def limits_of(asked: Sequence[Budget], opened: Sequence[Opened]) -> list[list[Budget]]:
    """What the network of each method has to keep, absolute; the last one's is what was asked for."""
    original = opened[0].ground["reference"]["cost"]
    limits: list[list[Budget]] = [[] for _ in opened]
    for budget in asked:
        limit = original[budget.metric]
        share = budget.absolute(limit) / limit
        for mine, factor in zip(limits, factors(share, [each.least[budget.metric] for each in opened]), strict=True):
            limit *= factor
            mine.append(replace(budget, limit=limit, relative=False))
    return limits


def factors(share: float, least: Sequence[float]) -> list[float]:
    """How far each method is to lower a cost, of which ``share`` is to be left: all by the same factor, but for those
    that cannot; what these leave undone the others take.

    ``least``: what is left of the cost after the utmost that each can do.

    >>> factors(0.25, [0.1, 0.2]), factors(0.25, [0.1, 0.5]), factors(0.25, [0.1, 1.0])
    ([0.5, 0.5], [0.45454545454545453, 0.55], [0.25, 1.0])
    """
    found, able = [1.0] * len(least), list(range(len(least)))
    while able:
        root = min(1.0, (share / prod(found)) ** (1 / len(able)))
        weak = [i for i in able if EASE * least[i] > root]
        if len(weak) in (0, len(able)):
            return [root if i in able else factor for i, factor in enumerate(found)]
        for i in weak:
            found[i] = min(1.0, EASE * least[i])
        able = [i for i in able if i not in weak]
    return found
