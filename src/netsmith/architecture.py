"""An architecture is plain data: decision path -> chosen option, for the decisions that are active.

A decision nested in an option that was not chosen is not part of it. In JSON a width is an integer, any other option
a string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from netsmith.decisions import Architecture, Decision, Option, decisions, parents
from netsmith.errors import UserError

Choose = Callable[[str, Decision], Option]


def assemble(model: nn.Module, choose: Choose) -> Architecture:
    """The architecture that ``choose(path, decision)`` makes, asked for active decisions only, outer before inner."""
    outer = parents(model)
    architecture: Architecture = {}
    for path, decision in decisions(model).items():
        if path not in outer or architecture.get(outer[path][0]) == outer[path][1]:
            architecture[path] = choose(path, decision)
    return architecture


def pick(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def sample(model: nn.Module, generator: torch.Generator) -> Architecture:
    """Every active decision uniformly at random."""
    return assemble(model, lambda _, decision: pick(decision.options, generator))


def mutate(model: nn.Module, architecture: Mapping[str, Option], generator: torch.Generator) -> Architecture:
    """Re-draw one decision, and whatever newly opens below it; all else stays."""
    found = decisions(model)
    open_ = [path for path in architecture if len(found[path].options) > 1]
    if not open_:
        return dict(architecture)
    changed = pick(open_, generator)

    def choose(path: str, decision: Decision) -> Option:
        if path == changed:
            return pick([option for option in decision.options if option != architecture[path]], generator)
        return architecture[path] if path in architecture else pick(decision.options, generator)

    return assemble(model, choose)


def crossover(
    model: nn.Module, left: Mapping[str, Option], right: Mapping[str, Option], generator: torch.Generator
) -> Architecture:
    """Every decision from one of two parents; what neither has decided is drawn."""

    def choose(path: str, decision: Decision) -> Option:
        given = [parent[path] for parent in (left, right) if path in parent] or decision.options
        return pick(given, generator)

    return assemble(model, choose)


def argmax(model: nn.Module) -> Architecture:
    """The most probable option everywhere."""
    return assemble(model, lambda _, decision: decision.options[int(decision.logits.argmax())])


def enumerate_architectures(model: nn.Module) -> Iterator[Architecture]:
    """Every architecture of the space, once. For small spaces and tests."""
    outer = parents(model)
    found = list(decisions(model).items())

    def extend(architecture: Architecture, i: int) -> Iterator[Architecture]:
        if i == len(found):
            yield architecture
            return
        path, decision = found[i]
        if path in outer and architecture.get(outer[path][0]) != outer[path][1]:
            yield from extend(architecture, i + 1)
            return
        for option in decision.options:
            yield from extend({**architecture, path: option}, i + 1)

    return extend({}, 0)


def check(model: nn.Module, architecture: Mapping[str, Option]) -> None:
    """Raises UserError unless ``architecture`` decides exactly the active decisions of ``model``, each legally."""

    def choose(path: str, decision: Decision) -> Option:
        if path not in architecture:
            raise UserError(f"the architecture leaves {path!r} open (options: {decision.options})")
        return decision.options[decision.index(architecture[path])]

    active = assemble(model, choose)
    if extra := sorted(set(architecture) - set(active)):
        raise UserError(f"the architecture decides {extra[0]!r}, which is no active decision of this space")


def dumps(architecture: Mapping[str, Option]) -> str:
    return json.dumps(dict(architecture), sort_keys=True)


def loads(text: str) -> Architecture:
    """Raises: UserError unless the text is a flat JSON object of strings and integers."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"an architecture is a JSON object; {error}") from None
    ok = isinstance(data, dict) and all(isinstance(v, str | int) and not isinstance(v, bool) for v in data.values())
    if not ok:
        raise UserError("an architecture is a flat JSON object: decision path -> option name or width")
    return data
