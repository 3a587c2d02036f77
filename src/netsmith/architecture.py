"""An architecture is plain data: decision path -> chosen option, for the decisions that are active.

A decision nested in an option that was not chosen is not part of it. In JSON a width is an integer, any other option
a string. Everything here needs only the outline of a space, so it takes a module or, where it is called often, an
`Outline` of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from netsmith.decisions import Architecture, Option, Rule, decisions, rules, walk
from netsmith.errors import UserError, unknown

Choose = Callable[[str, list[Option]], Option]


@dataclass(frozen=True)
class Outline:
    """The decisions of a space as plain data: outer before inner."""

    options: dict[str, list[Option]]
    parents: dict[str, tuple[str, str]]
    """Nested decision -> the decision and option it belongs to."""
    rules: tuple[Rule, ...] = ()

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
    return Outline(options, {path: owner for path, _, owner in found if owner is not None}, rules(space))


def assemble(space: nn.Module | Outline, choose: Choose) -> Architecture:
    """The architecture that ``choose(path, options)`` makes, asked for active decisions only, outer before inner.

    Rules are the business of ``choose``.
    """
    lines = outline(space)
    architecture: Architecture = {}
    for path, options in lines.options.items():
        if lines.active(path, architecture):
            architecture[path] = choose(path, options)
    return architecture


def pick(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def sample(space: nn.Module | Outline, generator: torch.Generator) -> Architecture:
    """Every active decision uniformly at random; within a rule, every combination that keeps it."""
    lines = outline(space)
    kept = draw_rules(lines, generator)
    return assemble(lines, lambda path, options: pick(kept.get(path, options), generator))


def draw_rules(lines: Outline, generator: torch.Generator) -> dict[str, list[Option]]:
    """Draw which decisions of the rules are idle: for each the options that are left, idle alone or all others.

    Picking one of these uniformly makes all combinations that keep the rule equally likely.
    """
    left: dict[str, list[Option]] = {}
    for rule in lines.rules:
        working = 0
        for i, path in enumerate(rule.paths):
            rest = [lines.options[other] for other in rule.paths[i + 1 :]]
            halves = [[o for o in lines.options[path] if (o != rule.idle) == works] for works in (False, True)]
            ways = [len(half) * _ways(rule, rest, working + works) for works, half in enumerate(halves)]
            works = int(torch.multinomial(torch.tensor(ways, dtype=torch.float64), 1, generator=generator))
            left[path], working = halves[works], working + works
    return left


def _ways(rule: Rule, rest: Sequence[list[Option]], working: int) -> int:
    """How many choices of ``rest`` keep the rule, where ``working`` other decisions are not idle."""
    ways = [1]  # by how many of the rest are not idle
    for options in rest:
        idle = rule.idle in options
        ways = [idle * a + (len(options) - idle) * b for a, b in zip([*ways, 0], [0, *ways], strict=True)]
    return sum(ways[max(0, rule.at_least - working) : max(0, rule.at_most - working + 1)])


def mutate(space: nn.Module | Outline, architecture: Mapping[str, Option], generator: torch.Generator) -> Architecture:
    """Re-draw one decision, and whatever newly opens below it; all else stays.

    Where that breaks a rule, another decision of the rule is changed as well.
    """
    lines = outline(space)
    open_ = [path for path in architecture if len(lines.options[path]) > 1]
    while open_:
        path = pick(open_, generator)
        others = [option for option in lines.options[path] if option != architecture[path]]
        while others:
            option = pick(others, generator)
            if mended := _mended(lines, architecture, path, option):
                return _completed(lines, mended[0] if len(mended) == 1 else pick(mended, generator), generator)
            others.remove(option)
        open_.remove(path)
    return dict(architecture)


def crossover(
    space: nn.Module | Outline, first: Mapping[str, Option], second: Mapping[str, Option], generator: torch.Generator
) -> Architecture:
    """A child that decides as ``first`` but, between two random points of the list of decisions, as ``second``.

    Where that parent has no such decision the other is asked, and where neither has, the option is drawn. A rule that
    the mixture breaks is taken from ``first`` as a whole.
    """
    lines = outline(space)
    paths = list(lines.options)
    start, stop = sorted(torch.randint(len(paths) + 1, (2,), generator=generator).tolist())
    swapped = set(paths[start:stop])
    for rule in lines.rules:
        if not rule.holds({path: (second if path in swapped else first)[path] for path in rule.paths}):
            swapped -= set(rule.paths)

    def choose(path: str, options: list[Option]) -> Option:
        asked = (second, first) if path in swapped else (first, second)
        return next((parent[path] for parent in asked if path in parent), None) or pick(options, generator)

    return assemble(lines, choose)


def _completed(lines: Outline, decided: Architecture, generator: torch.Generator) -> Architecture:
    return assemble(lines, lambda path, options: decided[path] if path in decided else pick(options, generator))


def _mended(lines: Outline, architecture: Mapping[str, Option], path: str, option: Option) -> list[Architecture]:
    """The architecture with ``option`` at ``path``, if need be with each other change that then keeps the rule."""
    changed = {**architecture, path: option}
    rule = next((rule for rule in lines.rules if path in rule.paths), None)
    if rule is None or rule.holds(changed):
        return [changed]
    mended = ({**changed, other: o} for other in rule.paths if other != path for o in lines.options[other])
    return [found for found in mended if rule.holds(found)]


def extreme(
    prices: Mapping[str, Mapping[Any, float]],
    parents: Mapping[str, tuple[str, Option]] | None = None,
    rules: Sequence[Rule] = (),
    *,
    largest: bool = True,
) -> Architecture:
    """The dearest (or cheapest) architecture, the first of equals, by dynamic programming over the tree.

    ``rules`` have to be such that the options with a price can keep them.
    """
    inner: dict[tuple[str, Option], list[str]] = {}
    for path in prices:
        if parents and path in parents:
            inner.setdefault(parents[path], []).append(path)

    def best(path: str, among: Sequence[Option] | None = None) -> tuple[float, Architecture]:
        def with_option(option: Option) -> tuple[float, Architecture]:
            below = [best(nested) for nested in inner.get((path, option), ())]
            price = prices[path][option] + sum(price for price, _ in below)
            return price, {path: option} | {key: chosen for _, part in below for key, chosen in part.items()}

        return (max if largest else min)(map(with_option, among or prices[path]), key=lambda found: found[0])

    def halves(path: str, idle: Option) -> tuple[list[Option], list[Option]]:
        return [o for o in prices[path] if o == idle], [o for o in prices[path] if o != idle]

    def gain(path: str, idle: Option) -> float:
        """What it is worth that a decision is not idle; infinite where it cannot be or has to be."""
        resting, working = halves(path, idle)
        if not resting or not working:
            return math.inf if working else -math.inf
        return (best(path, working)[0] - best(path, resting)[0]) * (1 if largest else -1)

    among: dict[str, list[Option]] = {}
    for rule in rules:
        gains = {path: gain(path, rule.idle) for path in rule.paths}
        for rank, path in enumerate(sorted(gains, key=lambda path: -gains[path])):
            works = rank < rule.at_least or (rank < rule.at_most and gains[path] > 0)
            among[path] = halves(path, rule.idle)[works]
    tops = [best(path, among.get(path)) for path in prices if not parents or path not in parents]
    return {key: chosen for _, part in tops for key, chosen in part.items()}


def argmax(model: nn.Module) -> Architecture:
    """The most probable option everywhere; within a rule, the most probable combination that keeps it."""
    found = decisions(model)
    scores = {path: dict(zip(d.options, d.logits.log_softmax(0).tolist(), strict=True)) for path, d in found.items()}
    lines = outline(model)
    kept = extreme({path: scores[path] for rule in lines.rules for path in rule.paths}, rules=lines.rules)
    return assemble(lines, lambda path, options: kept.get(path, max(options, key=scores[path].__getitem__)))


def enumerate_architectures(space: nn.Module | Outline) -> Iterator[Architecture]:
    """Every architecture of the space, once. For small spaces and tests."""
    lines = outline(space)
    paths = list(lines.options)

    def extend(architecture: Architecture, i: int) -> Iterator[Architecture]:
        if i == len(paths):
            if all(rule.holds(architecture) for rule in lines.rules):
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

    lines = outline(space)
    active = assemble(lines, choose)
    if extra := sorted(set(architecture) - set(active)):
        raise UserError(f"the architecture decides {extra[0]!r}, which is no active decision of this space")
    for rule in lines.rules:
        if not rule.holds(architecture):
            working = sum(architecture[path] != rule.idle for path in rule.paths)
            raise UserError(f"the architecture breaks the rule that {rule}: {working} are not")


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
