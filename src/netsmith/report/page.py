"""The report: one HTML page that needs nothing but itself, made from one or several run folders.

plotly's script is embedded once (4.7 MB) and the page forbids itself the network, so it can be mailed and archived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netsmith.errors import UserError
from netsmith.report import drawing, figures, harms, heat, numbers
from netsmith.report.folder import Folder, Search, read
from netsmith.report.networks import (
    Network,
    asked,
    budgeted,
    cost,
    items,
    mean,
    merged,
    metric_name,
    networks,
    pick,
    predicted,
    rivals,
)
from netsmith.report.table import arrange, columns
from netsmith.run import atomically

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about the runs.

    Args:
        runs: run folders, each with `result.json` and, as far as the run got, `events.jsonl` and `problem.yaml`.
        out: the HTML file to write; folders above it are made.

    Returns:
        `out`.

    Raises:
        UserError: no run was given, a `result.json` is missing or cannot be read, or `out` cannot be written.
    """
    if not runs:
        raise UserError("no run folder was given; name at least one, such as runs/x")
    folders = [read(path, label) for path, label in zip(runs, labels(runs), strict=True)]
    gallery = Gallery()
    groups = [_group(folders, members, gallery) for members in _comparable(folders)]
    sections = [_section(folder, gallery) for folder in folders]
    context = {
        "groups": groups,
        "sections": sections,
        "verdict": _verdict(folders),
        "title": f"{folders[0].label} · netsmith" if len(folders) == 1 else f"{len(folders)} runs · netsmith",
    }
    return render("page.html.j2", context, gallery, out)


def render(template: str, context: dict[str, Any], gallery: Gallery, out: Path) -> Path:
    """Write the page that a template makes of its context and the figures. UserError: `out` cannot be written."""
    from plotly.offline import get_plotlyjs

    if out.is_dir():
        raise UserError(f"{out} cannot be written: it is a folder; give a file, such as {out / 'report.html'}")
    drawn = [figures.unpack(figure) for figure in gallery.figures]
    text = _environment().get_template(template).render(**context, figures=drawn, plotly=get_plotlyjs())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    with atomically(out) as draft:  # a report being read is never half a report
        draft.write_text(text, "utf-8")
    return out


class Gallery:
    """The page's figures; a section holds each one's number."""

    def __init__(self) -> None:
        self.figures: list[figures.Figure] = []

    def hang(self, figure: figures.Figure | None) -> dict[str, Any] | None:
        """What the template needs to place a figure, or None where there is nothing to draw."""
        if figure is None:
            return None
        self.figures.append(figure)
        steps = [step["label"] for step in figure.steps]
        return {"id": len(self.figures) - 1, "alt": figure.alt, "height": figure.height, "steps": steps}


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = (numbers.milliseconds, numbers.duration, numbers.quantity, numbers.limit, numbers.quality, numbers.number)
    page.globals |= {helper.__name__: helper for helper in (*shown, pick, items)}
    return page


def labels(runs: Sequence[Path]) -> list[str]:
    """A short name per run: the folder's, with the one above it where two are called alike."""
    paths = [path.resolve() for path in runs]
    names = [path.name for path in paths]
    return [n if names.count(n) == 1 else f"{path.parent.name}/{n}" for n, path in zip(names, paths, strict=True)]


def _verdict(folders: list[Folder]) -> dict[str, Any]:
    """Kept or broken, plainly, over all runs."""
    kept = [folder.kept for folder in folders]
    if len(folders) == 1:
        members = folders[0].found
        sentences = list(dict.fromkeys(str(pick(member, "verdict") or "") for member in members))
        return {"kept": kept[0], "sentences": list(filter(None, sentences)) or ["The run recorded no verdict."]}
    broken = [folder.label for folder in folders if folder.kept is False]
    silent = [folder.label for folder in folders if folder.kept is None]
    sentence = f"{kept.count(True)} of {len(folders)} runs keep what they promised."
    sentence += f" Broken: {', '.join(broken)}." if broken else ""
    sentence += f" No verdict: {', '.join(silent)}." if silent else ""
    return {"kept": False if broken else None if silent else True, "sentences": [sentence]}


def _setting(folder: Folder) -> tuple[str, str, str]:
    """Runs are compared where these agree: task, metric and device."""
    device = str(pick(folder.result, "device", "fingerprint") or pick(folder.result, "device", "name") or "")
    return str(pick(folder.result, "task") or ""), metric_name(folder.result), device


def _comparable(folders: list[Folder]) -> list[list[Folder]]:
    settings = dict.fromkeys(map(_setting, folders))
    return [[folder for folder in folders if _setting(folder) == setting] for setting in settings]


def _group(every: list[Folder], members: list[Folder], gallery: Gallery) -> dict[str, Any]:
    """One table and one Pareto chart; a reference or baseline that several runs share stands there once."""
    listed: list[Network] = []
    for folder in members:
        alone = len(every) == 1
        for network in networks(folder.result, "found" if alone else folder.label):
            if network.kind == "found" and not alone:
                network = replace(network, note=_origin(folder))
            if network.kind == "found" or not any(n.data == network.data and n.name == network.name for n in listed):
                listed.append(network)
    references = [n for n in listed if n.kind == "reference"]
    mine = [n for n in listed if n.kind == "found"]
    baselines = [n for n in listed if n.kind == "baseline"]
    several = [mean(seeds) for seeds in _seeds(mine)] if len(every) > 1 else []
    costs = columns([folder.result for folder in members])
    task, metric, device = _setting(members[0])
    known = [n for n in listed if n.score is not None and n.cost("latency") is not None]
    return {
        "metric": metric,
        "title": " · ".join(part for part in (task, device) if part),
        "rows": arrange(references + mine + several + merged(baselines), costs),
        "rivals": rivals(mine, baselines),
        "pareto": gallery.hang(figures.pareto(references + mine + baselines, metric)),
        "missing": len(listed) - len(known),
        "predicted": any(n.predicted for n in listed),
    }


def _origin(folder: Folder) -> str:
    seed = pick(folder.result, "seed")
    return str(pick(folder.result, "method") or "") + (f", seed {seed}" if seed is not None else "")


def _seeds(mine: list[Network]) -> list[list[Network]]:
    """Found networks that differ only in their seed, each group under one name."""
    groups: dict[str, list[Network]] = {}
    for network in mine:
        method, space = pick(network.data, "method"), pick(network.data, "space")
        name = f"{method} on {space}, {asked(network.data)}".removesuffix(", ")
        groups.setdefault(name, []).append(replace(network, name=name, kept=None))
    return [group for group in groups.values() if len(group) > 1]


def _first(of: Any) -> Any:
    """The name of the network that a chain of compressions began with, from the last one's `of`."""
    while inner := pick(of, "space_options", "of"):
        of = inner
    return pick(of, "space")


def _section(folder: Folder, gallery: Gallery) -> dict[str, Any]:
    """Everything about one run, in the page's order."""
    trained, members, searches = folder.events["train_epoch"], folder.found, folder.searches
    learned = [search for search in searches if search.learned] or searches
    metric = metric_name(folder.result)
    kinds = list(dict.fromkeys(drawing.kind(layer) for member in members for layer in items(member, "layers")))
    rounds, limited = _rounds(folder), budgeted(folder.result)
    return {
        "folder": folder,
        "facts": {
            **{key: pick(folder.result, key) for key in ("method", "space", "task", "seed")},
            "after": ", ".join(str(stage.get("method")) for stage in items(folder.result, "stages")[:-1]) or None,
            "made of": _first(folder.asked("space_options", "of")),
        },
        "searches": [_search(search, members, gallery) for search in learned],
        "losses": gallery.hang(figures.losses([(search.name, search.epochs) for search in searches])),
        "expected": [
            (search.name if len(learned) > 1 else "", gallery.hang(figure))
            for search in learned
            if (figure := figures.expected(search.epochs))
        ],
        "replaced": _replaced(folder, gallery),
        "members": [_member(member, kinds, gallery) for member in members],
        "several": len(members) > 1,
        "rounds": [
            gallery.hang(figure)
            for metric in dict.fromkeys(metric for metric, _ in rounds)
            if (figure := figures.rounds([r for m, r in rounds if m == metric], metric, limited.get(metric, "")))
        ],
        "round_rows": [(metric, limited.get(metric, ""), event) for metric, event in rounds],
        "predicted": any(map(predicted, members)),
        "training": [gallery.hang(figures.training(trained, key, metric)) for key in ("loss", "accuracy")],
        "metric": metric,
        "gates": folder.events["gate"],
        "versions": pick(folder.result, "device", "versions"),
        "command": folder.command,
    }


def _replaced(folder: Folder, gallery: Gallery) -> dict[str, Any] | None:
    """What LANA learnt, where the run's method is that."""
    epochs, scores, networks = (folder.events[f"lana_{kind}"] for kind in ("epoch", "scores", "networks"))
    if not scores:
        return None
    score = {"kl": "divergence"}.get(str(folder.asked("method_options", "score")), "loss")
    return {
        "score": score,
        "learning": gallery.hang(harms.learning(epochs)),
        "together": gallery.hang(harms.together(networks, scores, folder.found, score)),
        "harms": gallery.hang(harms.replacements(scores, folder.found)),
    }


def _rounds(folder: Folder) -> list[tuple[str, dict[str, Any]]]:
    """The rounds of the promise loop, each with its metric."""
    unmeasured = any(map(predicted, folder.found))
    rounds = [(str(event.get("metric", "latency")), event) for event in folder.events["promise_round"]]
    # where nothing runs, the loop's event repeats the prediction
    return [(m, e | {"measured": None} if unmeasured and m == "latency" else e) for m, e in rounds]


def _search(search: Search, members: list[dict[str, Any]], gallery: Gallery) -> dict[str, Any]:
    """How one supernet made up its mind, and what came of it."""
    # a method that searches once per budget numbers its searches as its budgets: prune-1 led to the second network
    last = search.name.rpartition("-")[2]
    own = members[int(last) :][:1] if last.isdecimal() and int(last) < len(members) else members
    sure = heat.certainty(search.epochs, search.removed)
    return {
        "name": search.name + (f" ({asked(own[0])})" if len(own) < len(members) and asked(own[0]) else ""),
        "certainty": gallery.hang(sure),
        "choices": [gallery.hang(figure) for figure in heat.choices(search.epochs, own)],
        "brackets": drawing.brackets(search.epochs),
        "kept": drawing.kept(search.epochs),
        "narrowed": drawing.narrowed(search.epochs),
    }


def _member(member: dict[str, Any], kinds: list[str], gallery: Gallery) -> dict[str, Any]:
    """One found network: its layers drawn and timed; a kind of block has the same colour in all of a run's."""
    layers = items(member, "layers")
    drawn = drawing.blocks(layers, kinds)
    return {
        "result": member,
        "title": asked(member),
        "latency": gallery.hang(figures.layers(layers)),
        "latency_ms": cost(member, "latency"),
        "predicted": predicted(member),
        "layers": layers,
        "blocks": drawn,
        "kinds": list(dict.fromkeys((block.kind, block.colour) for block in drawn)),
    }
