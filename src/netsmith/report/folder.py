"""Reading a run folder: plain data in, one clear sentence where the result cannot be read."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from netsmith.errors import UserError
from netsmith.report.networks import found, pick
from netsmith.run import read_events

KEYS = {
    "search_epoch": ("search", "epoch"),
    "removed": ("search", "path", "option"),
    "train_epoch": ("which", "epoch"),
    "promise_round": ("name", "metric", "limit", "round"),
    "gate": ("which",),
    "lana_epoch": ("epoch",),
    "lana_scores": (),
    "lana_networks": ("networks",),
}
"""Kinds of events the page draws, and what makes two of them the same event: a resumed run repeats some."""

OF_THE_SEARCH = ("search_epoch", "removed", "lana_epoch", "lana_scores", "lana_networks")
"""Kinds that a baseline logs as well, and under no name of its own."""


@dataclass(frozen=True)
class Search:
    """What one supernet logged: a method may train several, a warm-up or one per budget."""

    name: str
    epochs: list[dict[str, Any]]
    removed: list[dict[str, Any]]

    @property
    def learned(self) -> bool:
        """Whether it chose among options; a warm-up trains weights only."""
        return any("search_loss" in epoch for epoch in self.epochs)


@dataclass(frozen=True)
class Folder:
    """A run folder as read."""

    path: Path
    label: str
    result: dict[str, Any]
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problem: str | None = None
    """The text of problem.yaml."""

    @property
    def found(self) -> list[dict[str, Any]]:
        return found(self.result)

    @property
    def searches(self) -> list[Search]:
        """What the method searched, each supernet by itself."""
        made: dict[str, Search] = {}
        for epoch in self.events["search_epoch"]:
            name = str(epoch.get("search", ""))
            made.setdefault(name, Search(name, [], [])).epochs.append(epoch)
        for event in self.events["removed"]:
            if (name := str(event.get("search", ""))) in made:
                made[name].removed.append(event)
        return list(made.values())

    @property
    def kept(self) -> bool | None:
        """Whether every network found keeps its budgets; None where the gate has not spoken."""
        said = [pick(member, "kept") for member in self.found]
        if any(kept is False for kept in said):
            return False
        return True if said and all(kept is True for kept in said) else None

    @property
    def command(self) -> str:
        """The command line that problem.yaml records, or nothing."""
        command = self.asked("command")
        return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")

    def asked(self, *keys: str) -> Any:
        """What problem.yaml holds under the nested keys, or None."""
        import yaml

        try:
            return pick(yaml.safe_load(self.problem or ""), *keys)
        except yaml.YAMLError:  # the text is shown as it is, whatever it is
            return None


def read(path: Path, label: str | None = None) -> Folder:
    """Read a run folder.

    Raises:
        UserError: `result.json` is missing, or that or `events.jsonl` cannot be read.
    """
    result = _result(path / "result.json")
    events = _events(path, str(pick(result, "method")))
    problem = path / "problem.yaml"
    text = problem.read_text("utf-8", errors="replace") if problem.is_file() else None
    return Folder(path, label or path.resolve().name, result, events, text)


def _result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; a report needs the folder of a finished run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: it is not UTF-8 text") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} holds a JSON {type(result).__name__}; a run's result is an object")
    return clean(result)


def _events(path: Path, method: str) -> dict[str, list[dict[str, Any]]]:
    """Events by kind, in order, of the networks that the method found; of repeated ones the last.

    Baselines search and keep promises too, under their own names and after the method; only their training is drawn.
    """
    file = path / "events.jsonl"
    try:
        events = [event for event in clean(read_events(path)) if isinstance(event, dict)]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON that is none, or no UTF-8
        raise UserError(f"{file} is damaged: it holds a line that is not JSON") from error
    rounds = [i for i, event in enumerate(events) if event.get("kind") == "promise_round" and _own(event, method)]
    kinds: dict[str, dict[Any, dict[str, Any]]] = {kind: {} for kind in KEYS}
    for i, event in enumerate(events):
        kind = event.get("kind")
        if not isinstance(kind, str) or kind not in kinds or not _own(event, method):
            continue
        if kind in OF_THE_SEARCH and rounds and i > rounds[-1]:
            continue  # a baseline's: the method had searched before its last round
        if kind == "train_epoch" and event.get("epoch") == 1:  # trained anew, perhaps for fewer epochs
            which = event.get("which")
            kinds[kind] = {key: past for key, past in kinds[kind].items() if past.get("which") != which}
        key = tuple(repr(event.get(name)) for name in KEYS[kind])
        kinds[kind].pop(key, None)  # the repetition stands where it was repeated
        kinds[kind][key] = event
    return {kind: list(events.values()) for kind, events in kinds.items()}


def _own(event: dict[str, Any], method: str) -> bool:
    """Whether a promise round or a gate is about a network found, not about a baseline or the reference."""
    name, stem = {"promise_round": ("name", method), "gate": ("which", "found")}.get(str(event.get("kind")), ("", ""))
    return not name or re.fullmatch(rf"{re.escape(stem)}-\d+", str(event.get(name))) is not None


def clean(data: Any) -> Any:
    """The same data with NaN and infinities (a loss that blew up) as None: JSON in a browser knows neither."""
    if isinstance(data, dict):
        return {str(key): clean(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [clean(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data
