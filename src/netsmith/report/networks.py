"""The networks of a run as the report compares them: the reference, what was found, the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from netsmith.report.numbers import count, limit, milliseconds, number, quality, size

COSTS = {"latency": milliseconds, "params": count, "macs": count, "file_bytes": size, "peak_memory_bytes": size}


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
    def sentence(self) -> str:
        return f"{self.name}: {quality(self.metric, self.score)} at {milliseconds(self.cost('latency'))}"


def score(data: Any) -> float | None:
    """The metric on the test split: of the exported file where it was scored, else of the PyTorch module."""
    exported = number(pick(data, "metric", "test_exported"))
    return number(pick(data, "metric", "test")) if exported is None else exported


def cost(data: Any, name: str) -> float | None:
    """A measured cost; latency is the median in ms."""
    return number(pick(data, "cost", "latency_ms", "median") if name == "latency" else pick(data, "cost", name))


def networks(result: dict[str, Any], label: str = "found") -> list[Network]:
    """Reference, found and baselines of one run, in that order; what was not recorded is left out."""
    members = found(result)
    metric = metric_name(result)
    reference = pick(result, "reference")
    listed = []
    if isinstance(reference, dict):
        listed.append(Network("reference", "reference", reference, reference, metric))
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
    costs["latency_ms"] = {"median": average([n.cost("latency") for n in group])}
    scores = [n.score for n in group if n.score is not None]
    data = {"metric": {"test": average([n.score for n in group])}, "cost": costs}
    first = group[0]
    spread = stdev(scores) if len(scores) > 1 else None
    return Network(first.kind, first.name, data, first.reference, first.metric, f"mean of {len(group)}", spread=spread)


def merged(baselines: list[Network]) -> list[Network]:
    """One network per baseline name."""
    names = dict.fromkeys(n.name for n in baselines)
    return [mean([n for n in baselines if n.name == name]) for name in names]


def rivals(mine: list[Network], baselines: list[Network]) -> list[str]:
    """Which baselines do as well as what was found, plainly: a search that does not beat chance must say so."""
    judged = [n for n in mine if n.score is not None and n.cost("latency") is not None]
    if not judged or not any(b.score is not None and b.cost("latency") is not None for b in baselines):
        return []
    sentences = []
    for network in judged:
        equal = [rival.name for rival in baselines if _as_good(rival, network)]
        total = [rival.name for rival in baselines]
        counts = {name: f"{equal.count(name)} of {total.count(name)}" for name in dict.fromkeys(equal)}
        listed = ", ".join(name if total.count(name) == 1 else f"{name} ({n})" for name, n in counts.items())
        if listed:
            sentences.append(f"{network.name} does not beat {listed}: as good and as fast.")
    return sentences or ["No baseline is both as good and as fast as what was found."]


def _as_good(rival: Network, network: Network) -> bool:
    """Whether the rival scores no less and is no slower than the network's interval reaches."""
    score, latency = rival.score, rival.cost("latency")
    if score is None or latency is None:
        return False
    return score >= (network.score or 0) and latency <= max(network.cost("latency") or 0, network.interval[1] or 0)
