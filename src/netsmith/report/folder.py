"""Reading a run folder: plain data in, one clear sentence where the result cannot be read."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from netsmith.errors import UserError
from netsmith.report.networks import found, pick

KEYS = {
    "search_epoch": ("epoch",),
    "removed": ("path", "option"),
    "train_epoch": ("which", "epoch"),
    "promise_round": ("limit", "round"),
    "gate": ("time",),
}
"""Kinds of events the page draws, and what makes two of them the same event: a resumed run repeats some."""


@dataclass(frozen=True)
class Folder:
    """A run folder as read."""

    path: Path
    label: str
    result: dict[str, Any]
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: int = 0
    """Lines of events.jsonl that are not JSON objects (a killed run may leave half a line)."""
    problem: str | None = None
    """The text of problem.yaml."""

    @property
    def found(self) -> list[dict[str, Any]]:
        return found(self.result)

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
        import yaml

        try:
            command = pick(yaml.safe_load(self.problem or ""), "command")
        except yaml.YAMLError:  # the text is shown as it is, whatever it is
            return ""
        return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def read(path: Path, label: str | None = None) -> Folder:
    """Read a run folder.

    Raises:
        UserError: `result.json` is missing or cannot be read.
    """
    result = _result(path / "result.json")
    events, unreadable = _events(path / "events.jsonl")
    problem = path / "problem.yaml"
    text = problem.read_text("utf-8", errors="replace") if problem.is_file() else None
    return Folder(path, label or path.resolve().name, result, events, unreadable, text)


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


def _events(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Events by kind, in order; of repeated ones (same epoch again after a resume) the last."""
    kinds: dict[str, dict[Any, dict[str, Any]]] = {kind: {} for kind in KEYS}
    unreadable = 0
    if path.is_file():
        # not splitlines(): it also cuts at characters that JSON allows inside a string
        for line in filter(str.strip, path.read_text("utf-8", errors="replace").split("\n")):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                event = None
            if not isinstance(event, dict):
                unreadable += 1
                continue
            kind = event.get("kind")
            if isinstance(kind, str) and kind in kinds:
                key = tuple(repr(event.get(name)) for name in KEYS[kind])
                kinds[kind].pop(key, None)  # the repetition stands where it was repeated
                kinds[kind][key] = clean(event)
    return {kind: list(events.values()) for kind, events in kinds.items()}, unreadable


def clean(data: Any) -> Any:
    """The same data with NaN and infinities (a loss that blew up) as None: JSON in a browser knows neither."""
    if isinstance(data, dict):
        return {str(key): clean(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [clean(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data
