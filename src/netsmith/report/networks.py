"""The networks of a run as the report compares them: the reference, what was found, the baselines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from netsmith.report.numbers import count, limit, milliseconds, number, quality, size

COSTS = {
    "latency": milliseconds,
    "params": count,
    "macs": count,
    "file_bytes": size,
    "peak_memory_bytes": size,
    "ram_bytes": size,
    "flash_bytes": size,
    "branches": count,
    "bitops": count,
}
ON_DEMAND = ("peak_memory_bytes", "ram_bytes", "flash_bytes", "branches", "bitops")
"""Costs that are shown only where a budget asks for them."""
NAMES = {name: f"{name}_bytes" for name in ("file", "peak_memory", "ram", "flash")}
"""Costs that a budget calls by another name."""

AS_GOOD = {
    "latency": "as fast",
    "params": "with as few parameters",
    "macs": "with as few MACs",
    "file": "with as small a file",
    "peak_memory": "with as little memory",
    "ram": "with as little RAM in int8",
    "flash": "with as little flash in int8",
    "branches": "with as few branches to train",
    "bitops": "with as few bit operations",
}
"""What a network is that takes no more of a budget's metric than another."""


def pick(data: Any, *keys: str) -> Any:
    """What stands under the nested keys; None where a key is missing (an interrupted run may lack any of them)."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def items(data: Any, *keys: str) -> list[dict[str, Any]]:
    """The list of objects under the nested keys; empty where it is missing."""
    value = pick(data, *keys)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def found(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One result per network found: the run itself, or each member of its front with the shared keys filled in."""
    if "front" not in result:
        return [result]
    shared = {key: value for key, value in result.items() if key != "front"}
    return [{**shared, **member} for member in items(result, "front")]


def budgeted(result: dict[str, Any]) -> dict[str, str]:
    """What the budgets limit, with its unit: {"latency": "ms"}."""
    return {str(b.get("metric")): str(b.get("unit") or "") for f in found(result) for b in items(f, "budgets")}


def asked(result: dict[str, Any]) -> str:
    """The budgets of one found network: "latency ≤ 5 ms"."""
    budgets = items(result, "budgets")
    return ", ".join(f"{b.get('metric')} ≤ {limit(b.get('limit'), str(b.get('unit') or ''))}" for b in budgets)


@dataclass(frozen=True)
class Network:
    """One network, or the mean over several that differ only in their seed."""

    kind: str
    """"reference", "found" or "baseline"."""
    name: str
    data: dict[str, Any]
    """Holds "metric" and "cost"."""
    reference: dict[str, Any] | None
    metric: str = "accuracy"
    note: str = ""
    kept: bool | None = None
    spread: float | None = None
    """Standard deviation of the metric over seeds, for a mean."""

    @property
    def score(self) -> float | None:
        return score(self.data)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % confidence interval of the latency, ms."""
        ends = pick(self.data, "cost", "latency_ms", "ci95")
        return (number(ends[0]), number(ends[1])) if isinstance(ends, list) and len(ends) == 2 else (None, None)

    def cost(self, name: str) -> float | None:
        return cost(self.data, name)

    @property
    def predicted(self) -> bool:
        return predicted(self.data)

    @property
    def sentence(self) -> str:
        said = " (predicted)" if self.predicted else ""
        return f"{self.name}: {quality(self.metric, self.score)} at {milliseconds(self.cost('latency'))}{said}"


def score(data: Any) -> float | None:
    """The metric on the test split: of the exported file where it was scored, else of the PyTorch module."""
    exported = number(pick(data, "metric", "test_exported"))
    return number(pick(data, "metric", "test")) if exported is None else exported


def cost(data: Any, name: str) -> float | None:
    """A measured cost; latency is the median in ms, or the prediction of a table, where nothing runs."""
    if name != "latency":
        return number(pick(data, "cost", name))
    return number(pick(data, "cost", "latency_ms", "predicted" if predicted(data) else "median"))


def predicted(data: Any) -> bool:
    """Whether the latency is known only as predicted."""
    times = pick(data, "cost", "latency_ms")
    return number(pick(times, "median")) is None and number(pick(times, "predicted")) is not None


def networks(result: dict[str, Any], label: str = "found") -> list[Network]:
    """Reference, found and baselines of one run, in that order; what was not recorded is left out."""
    members = found(result)
    metric = metric_name(result)
    reference = pick(result, "reference")
    listed = []
    if isinstance(reference, dict):
        note = "not trained" if score(reference) is None else ""
        listed.append(Network("reference", "reference", reference, reference, metric, note))
    for member in members:
        name = f"{label}, {asked(member)}" if len(members) > 1 else label
        listed.append(Network("found", name, member, reference, metric, kept=pick(member, "kept")))
    for baseline in items(result, "baselines"):
        seed = baseline.get("seed")
        note = "" if seed is None else f"seed {seed}"
        listed.append(Network("baseline", str(baseline.get("name", "baseline")), baseline, reference, metric, note))
    return listed


def metric_name(result: dict[str, Any]) -> str:
    """The name of the task's metric."""
    return str(pick(found(result)[0] if found(result) else result, "metric", "name") or "accuracy")


def mean(group: list[Network]) -> Network:
    """The mean over seeds, with the spread of the metric; a single network comes back as it is."""
    if len(group) == 1:
        return group[0]

    def average(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    costs: dict[str, Any] = {name: average([n.cost(name) for n in group]) for name in COSTS if name != "latency"}
    clock = "predicted" if any(n.predicted for n in group) else "median"
    costs["latency_ms"] = {clock: average([n.cost("latency") for n in group])}
    scores = [n.score for n in group if n.score is not None]
    data = {"metric": {"test": average([n.score for n in group])}, "cost": costs}
    first = group[0]
    spread = stdev(scores) if len(scores) > 1 else None
    return Network(first.kind, first.name, data, first.reference, first.metric, f"mean of {len(group)}", spread=spread)


def merged(baselines: list[Network]) -> list[Network]:
    """One network per baseline and budget, which is named where there are several."""
    groups: dict[tuple[str, str], list[Network]] = {}
    for network in baselines:
        groups.setdefault((network.name, asked(network.data)), []).append(network)
    several = len({budget for _, budget in groups}) > 1
    named = {key: f"{key[0]}, {key[1]}" if several and key[1] else key[0] for key in groups}
    return [replace(mean(group), name=named[key]) for key, group in groups.items()]


EQUALLY_FAST = 1.02
"""One file timed in two processes differs by about as much, more than the interval within one says."""


def rivals(mine: list[Network], baselines: list[Network]) -> list[str]:
    """Which baselines do as well as what was found, plainly: a search that does not beat chance must say so."""
    sentences: list[str] = []
    compared: dict[str, None] = {}
    for network in mine:
        metrics = list(budgeted(network.data)) or ["latency"]
        if not _known(network, metrics) or not any(_known(rival, metrics) for rival in baselines):
            continue
        compared |= dict.fromkeys(metrics)
        equal = [rival.name for rival in baselines if _known(rival, metrics) and _as_good(rival, network, metrics)]
        total = [rival.name for rival in baselines]
        counts = {name: f"{equal.count(name)} of {total.count(name)}" for name in dict.fromkeys(equal)}
        listed = ", ".join(name if total.count(name) == 1 else f"{name} ({n})" for name, n in counts.items())
        if listed:
            sentences.append(f"{network.name} does not beat {listed}: {_words(metrics)}.")
    if sentences or not compared:
        return sentences
    both = "both " if len(compared) == 1 else ""
    return [f"No baseline is {both}{_words(list(compared))} as what was found."]


def _words(metrics: list[str]) -> str:
    words = ["as good", *(AS_GOOD.get(metric, f"with as little {metric}") for metric in metrics)]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _known(network: Network, metrics: list[str]) -> bool:
    return network.score is not None and all(network.cost(NAMES.get(m, m)) is not None for m in metrics)


def _as_good(rival: Network, network: Network, metrics: list[str]) -> bool:
    """Whether the rival scores no less and takes no more of what has a budget (latency: `EQUALLY_FAST`)."""
    pairs = [(rival.cost(NAMES.get(m, m)) or 0, network.cost(NAMES.get(m, m)) or 0) for m in metrics]
    slack = [EQUALLY_FAST if m == "latency" else 1.0 for m in metrics]
    within = all(theirs <= own * more for (theirs, own), more in zip(pairs, slack, strict=True))
    return within and (rival.score or 0) >= (network.score or 0)
