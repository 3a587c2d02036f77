"""An architecture is plain data: decision path -> chosen option, for the decisions that are active.

A decision nested in an option that was not chosen is not part of it. In JSON a width is an integer, any other option
a string. Everything here needs only the outline of a space, so it takes a module or, where it is called often, an
`Outline` of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from netsmith.decisions import Architecture, Option, decisions, walk
from netsmith.errors import UserError, unknown

Choose = Callable[[str, list[Option]], Option]


@dataclass(frozen=True)
class Outline:
    """The decisions of a space as plain data: outer before inner."""

    options: dict[str, list[Option]]
    parents: dict[str, tuple[str, str]]
    """Nested decision -> the decision and option it belongs to."""

    def active(self, path: str, architecture: Mapping[str, Option]) -> bool:
        """Whether ``path`` is a decision, given what was decided above it."""
        if path not in self.parents:
            return True
        outer, option = self.parents[path]
        return architecture.get(outer) == option


def outline(space: nn.Module | Outline) -> Outline:
    if isinstance(space, Outline):
        return space
    found = list(walk(space))
    options = {path: list(decision.options) for path, decision, _ in found}
    return Outline(options, {path: owner for path, _, owner in found if owner is not None})


def assemble(space: nn.Module | Outline, choose: Choose) -> Architecture:
    """The architecture that ``choose(path, options)`` makes, asked for active decisions only, outer before inner."""
    lines = outline(space)
    architecture: Architecture = {}
    for path, options in lines.options.items():
        if lines.active(path, architecture):
            architecture[path] = choose(path, options)
    return architecture


def pick(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def sample(space: nn.Module | Outline, generator: torch.Generator) -> Architecture:
    """Every active decision uniformly at random."""
    return assemble(space, lambda _, options: pick(options, generator))


def mutate(space: nn.Module | Outline, architecture: Mapping[str, Option], generator: torch.Generator) -> Architecture:
    """Re-draw one decision, and whatever newly opens below it; all else stays."""
    lines = outline(space)
    open_ = [path for path in architecture if len(lines.options[path]) > 1]
    if not open_:
        return dict(architecture)
    changed = pick(open_, generator)

    def choose(path: str, options: list[Option]) -> Option:
        if path == changed:
            return pick([option for option in options if option != architecture[path]], generator)
        return architecture[path] if path in architecture else pick(options, generator)

    return assemble(lines, choose)


def extreme(
    prices: Mapping[str, Mapping[Any, float]],
    parents: Mapping[str, tuple[str, Option]] | None = None,
    *,
    largest: bool = True,
) -> Architecture:
    """The dearest (or cheapest) architecture, the first of equals, by dynamic programming over the tree."""
    inner: dict[tuple[str, Option], list[str]] = {}
    for path in prices:
        if parents and path in parents:
            inner.setdefault(parents[path], []).append(path)

    def best(path: str) -> tuple[float, Architecture]:
        def with_option(option: Option) -> tuple[float, Architecture]:
            below = [best(nested) for nested in inner.get((path, option), ())]
            price = prices[path][option] + sum(price for price, _ in below)
            return price, {path: option} | {key: chosen for _, part in below for key, chosen in part.items()}

        return (max if largest else min)(map(with_option, prices[path]), key=lambda found: found[0])

    tops = [best(path) for path in prices if not parents or path not in parents]
    return {key: chosen for _, part in tops for key, chosen in part.items()}


def argmax(model: nn.Module) -> Architecture:
    """The most probable option everywhere."""
    found = decisions(model)
    return assemble(model, lambda path, options: options[int(found[path].logits.argmax())])


def enumerate_architectures(space: nn.Module | Outline) -> Iterator[Architecture]:
    """Every architecture of the space, once. For small spaces and tests."""
    lines = outline(space)
    paths = list(lines.options)

    def extend(architecture: Architecture, i: int) -> Iterator[Architecture]:
        if i == len(paths):
            yield architecture
        elif not lines.active(paths[i], architecture):
            yield from extend(architecture, i + 1)
        else:
            for option in lines.options[paths[i]]:
                yield from extend({**architecture, paths[i]: option}, i + 1)

    return extend({}, 0)


def check(space: nn.Module | Outline, architecture: Mapping[str, Option]) -> None:
    """Raises UserError unless ``architecture`` decides exactly the active decisions of the space, each legally."""

    def choose(path: str, options: list[Option]) -> Option:
        if path not in architecture:
            raise UserError(f"the architecture leaves {path!r} open (options: {options})")
        if architecture[path] not in options:
            raise unknown(f"option of {path}", str(architecture[path]), map(str, options))
        return architecture[path]

    active = assemble(space, choose)
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
