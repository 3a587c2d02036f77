"""PruNet (Kierat et al. 2022, arXiv:2209.11785): search by pruning, in three tiers, while the supernet trains.

1. Prunode: a block with an open hidden width runs at two widths only, whatever the number of widths; the pair closes in
   on the better one. 2. Blocks whose probability falls below a rising threshold are removed from their layer.
3. Whole layers are removed; skipping is introduced only later on, so that it cannot bias the search to shallow nets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from netsmith.blocks.prunode import Prunode
from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options, expected
from netsmith.decisions import Architecture, Decision, Draw, OneOf, Option, Width, decisions
from netsmith.errors import UserError
from netsmith.gates import Gate, Gumbel, softmax
from netsmith.run import Run
from netsmith.search.differentiable import CostLoss, Searcher, Steps, learn, remove_option
from netsmith.search.problem import Problem, prefer
from netsmith.search.race import Finals, finalists, race, within_each
from netsmith.search.sampling import at_budget, capacity

SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class PruNet:
    """Constants are ours where the paper gives none (most of them); see docs/methods/prunet.md."""

    steps: Steps = field(default_factory=Steps)
    """How the supernet is trained; its warm-up is shared by all budgets with the same structure and layers."""
    prunode: bool = True
    """Tier 1. Off: each width decision stays at its maximum until the final knapsack."""
    block_pruning: bool = True
    """Tier 2."""
    layer_pruning: bool = True
    """Tier 3."""
    copies: Literal["separate", "shared"] = "shared"
    """separate: two copies of the block, as in the paper; shared: one set of weights under both masks. Mixing before
    the last batch norm, the shared pair costs a single pass of the wider width."""
    starts: NonNegativeInt = 4
    """Random networks at the budget that race, beside the no-search ones, to be what the supernet is built around
    (ours)."""
    headroom: NonNegativeFloat = 2.0
    """A layer of the supernet may cost this many times what it costs in the network that it is built around, and only
    that network's layers are there (ours). The largest network of a space is often ten budgets: training that teaches
    little about small ones, and with all layers open the widths collapsed before any layer went. 0: the whole space."""
    check_every: PositiveInt = 8
    """Architecture steps between two moves of a Prunode (K; ours)."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.55
    """Probability from which a Prunode trusts its better width (tau; ours)."""
    momentum: bool = True
    """Double the move when the same side wins again (ours)."""
    block_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Tier 2's threshold at the end; it rises linearly from 0 at the end of the warm-up (ours)."""
    layers_from: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Part of the search after which layers may go (the paper: "halfway"; ours is shorter and starts smaller)."""
    settled: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Part of the search after which the expected cost has to be at the budget; until then the aim falls linearly from
    where the supernet starts, so that what is worth least goes first, and not everything at once (ours)."""
    layer_start: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """A layer's weight when skipping is introduced (s; 0.9 would lie above the margin and keep every layer)."""
    layer_margin: Annotated[float, Field(ge=0, le=0.5)] = 0.4
    """Distance from 0.5 at which a layer is decided; falls linearly to 0 at the end (m; ours)."""
    cost: CostLoss = field(default_factory=lambda: CostLoss(weight=2.0))
    """How latency enters the architecture loss (the paper's is not known)."""
    temperature: NonNegativeFloat = 0.0
    """Of Gumbel noise on the mixture while training; 0: plain softmax (ours)."""
    finals: Finals = field(default_factory=lambda: Finals(noise=0.5, epochs=(2, 6)))
    """Networks drawn around the result (FBNet's way of ending), and the lengths of all short trainings."""

    def search(self, problem: Problem, run: Run) -> list[Options]:
        starts = [self._start(problem, run, f"start-{i}", budgets) for i, budgets in enumerate(problem.budgets)]
        return [self._prune(problem, run, i, starts) for i in range(len(starts))]

    def _start(self, problem: Problem, run: Run, name: str, budgets: Sequence[Budget]) -> Architecture:
        """The network that the supernet is built around. Strides, stage widths and depth move accuracy more than all
        else, and in one supernet they would cost a network per option: they race."""
        generator = torch.Generator().manual_seed(run.seed(name))
        entrants = within_each(problem, budgets, capacity(problem), problem.structural)
        entrants += [at_budget(problem, budgets, generator) for _ in range(self.starts)]
        if len(entrants) == 1:
            return entrants[0]
        return race(problem, run, name, entrants, epochs=self.finals.epochs)[0][0]

    def _prune(self, problem: Problem, run: Run, number: int, starts: Sequence[Architecture]) -> Options:
        budgets, start = problem.budgets[number], starts[number]
        chosen = {path: option for path, option in start.items() if path in problem.structural}
        alike = [i for i, other in enumerate(starts) if self._opened(problem, other) == self._opened(problem, start)]

        def make(number: int = number) -> Pruning:
            return Pruning(self, problem, problem.budgets[number], starts[number])

        warmup, warm = self.steps.warmup_epochs, f"warm-{alike[0]}"
        if warmup:  # shared by the budgets of one structure, in the supernet of the dearest
            dearest = max(alike, key=lambda i: problem.latency.of(starts[i]))
            learn(problem, run, warm, lambda: make(dearest), self.steps, until=warmup)
        after = run.checkpoint(f"{warm}.pt") if warmup else None
        searcher = learn(problem, run, f"prune-{number}", make, self.steps, after=after)
        assert isinstance(searcher, Pruning)
        values = prefer(searcher.values(), chosen, 1e3)
        generator = torch.Generator().manual_seed(run.seed(f"finalists-{number}"))
        drawn = finalists(problem, budgets, values, self.finals, generator, still=searcher.still)
        entrants = [start, *drawn]
        best, _ = race(problem, run, f"finalists-{number}", entrants, epochs=self.finals.epochs, always=[start])[0]
        return prefer(values, best, 1e3)

    def _opened(self, problem: Problem, start: Architecture) -> dict[str, Option]:
        """What decides which layers the supernet around a start has."""
        left_out = SKIP if self.headroom else None
        return {path: option for path, option in start.items() if path in problem.structural or option == left_out}


class Pruning(Searcher):
    """The state of one search under one budget."""

    def __init__(self, method: PruNet, problem: Problem, budgets: Sequence[Budget], start: Architecture) -> None:
        self.method, self.problem = method, problem
        self.targets = {b.metric: b.limit for b in budgets if b.metric in problem.prices}
        if not self.targets:  # peak memory alone, which has no expectation: the size of the start stands for it
            self.targets = {"macs": problem.prices["macs"].of(start)}
        self.supernet = problem.build()
        self.structural = set(problem.structural)
        for path in problem.structural:
            if path in start:
                decision = decisions(self.supernet)[path]
                for other in [o for o in decision.options if o != start[path]]:
                    decision.remove(other)
        self.stages = {atom.owner[0]: atom.shape for atom in problem.atoms if atom.owner}
        """What goes into a layer, (channels, height, width): the same in all layers of a stage that may be skipped."""
        self.unopened: set[str] = set()
        """Layers that were left out from the start."""
        if method.headroom:
            self._shrink(start)
        self.prunodes = self._insert_prunodes() if method.prunode else {}
        self.depth: dict[str, nn.Parameter] = {}
        """d of every layer that may be skipped, from the moment skipping is introduced."""
        self.kept: set[str] = set()
        """Layers decided to stay."""
        self.steps, self.progress = 0, 0.0
        self.first_excess = max(0.0, self.excess())

    def _shrink(self, start: Architecture) -> None:
        """Remove the layers that ``start`` skips, and widths that cost more than ``headroom`` times what their layer
        costs there, but for the two narrowest of each block."""
        for path, layer in self.layers().items():
            if start.get(path) == SKIP:
                self.unopened.add(path)
                for option in [o for o in layer.options if o != SKIP]:
                    layer.remove(option)

        def share(path: str, option: Option) -> float:
            """Of the tightest budget."""
            return max(self.problem.prices[name].at(path, option) / target for name, target in self.targets.items())

        for path, width in decisions(self.supernet).items():
            if isinstance(width, Width):
                layer = self.problem.parents[path][0] if path in self.problem.parents else path
                inside = f"{layer}.{start[layer]}.hidden"
                cap = self.method.headroom * sum(share(p, start[p]) for p in {layer, inside} if p in start)
                for n in [n for n in width.options[2:] if share(path, n) > cap]:
                    width.remove(n)

    def _insert_prunodes(self) -> dict[str, Prunode]:
        found = {}
        for path, decision in decisions(self.supernet).items():
            if isinstance(decision, Width):
                place, _, name = path.rpartition(".")
                block = self.supernet.get_submodule(place)
                if name != "hidden" or not hasattr(block, "body_at"):
                    raise UserError(
                        f"{type(block).__name__} at {place!r} cannot run at two widths: a Prunode needs a block with "
                        "its width in `hidden` and a `body_at(x, width)`, such as MBConv"
                    )
                found[path] = Prunode(block, separate=self.method.copies == "separate")
                self.supernet.set_submodule(place, found[path])
        return found

    def layers(self) -> dict[str, OneOf]:
        found = decisions(self.supernet)
        return {p: d for p, d in found.items() if isinstance(d, OneOf) and p not in self.structural}

    def parameters(self) -> list[nn.Parameter]:
        inner = [p.logits for p in self._alive_prunodes().values() if not p.closed]
        layers = [d.logits for d in self.layers().values() if len(d.options) > 1]
        return [*layers, *inner, *(d for path, d in self.depth.items() if path not in self.kept)]

    def _alive_prunodes(self) -> dict[str, Prunode]:
        alive = decisions(self.supernet)
        return {path: prunode for path, prunode in self.prunodes.items() if path in alive}

    # Mixing -------------------------------------------------------------------------------------------------------

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        """Every block and both widths run, mixed, in weight steps too. Single paths learned far slower: a loss of 2.27
        after 90 processor seconds of CIFAR-10, against 1.99 after 80."""
        self._mix(Gumbel(self.method.temperature) if self.method.temperature > 0 else softmax, generator)

    def _mix(self, gate: Gate, generator: torch.Generator) -> None:
        for path, decision in decisions(self.supernet).items():
            decision.drawn = self._draw(path, decision, gate, generator)

    def _draw(self, path: str, decision: Decision, gate: Gate, generator: torch.Generator) -> Draw:
        if path in self.prunodes:
            return self.prunodes[path].open()
        if isinstance(decision, Width):
            return Draw([len(decision.options) - 1], torch.ones(1))
        if len(decision.options) == 1:
            return Draw([0], torch.ones(1))
        # Skip takes part only through the depth gate: y = (1 - s) x + s * sum_j p_j block_j(x).
        blocks = [i for i, option in enumerate(decision.options) if option != SKIP]
        p = gate(decision.logits[blocks], generator).weights
        if path not in self.depth or path in self.kept:
            return Draw(blocks, p)
        s = self.depth[path].sigmoid()
        return Draw([*blocks, decision.index(SKIP)], torch.cat([s * p, (1 - s)[None]]))

    def _costs(self) -> dict[str, Tensor]:
        """Expected, under the probabilities without noise."""
        self._mix(softmax, torch.Generator())
        return {name: expected(self.supernet, self.problem.prices[name], drawn=True) for name in self.targets}

    def objective(self, loss: Tensor) -> Tensor:
        slack = 1 + self.first_excess * max(0.0, 1 - self.progress / self.method.settled)
        return self.method.cost(loss, self._costs(), {name: slack * target for name, target in self.targets.items()})

    def excess(self) -> float:
        """The largest expected share of a budget, minus 1."""
        with torch.no_grad():
            return max(cost.item() / self.targets[name] for name, cost in self._costs().items()) - 1

    # The three tiers ----------------------------------------------------------------------------------------------

    def stepped(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """Tier 1: every K steps each Prunode may move. Near the end less confidence is asked, so that all close."""
        self.steps += 1
        self.progress = progress
        if self.steps % self.method.check_every:
            return
        hurry = min(1.0, max(0.0, (progress - 0.8) / 0.2))
        confidence = self.method.confidence + hurry * (0.5 - self.method.confidence)
        for prunode in self._alive_prunodes().values():
            prunode.move(confidence, momentum=self.method.momentum, optimizer=optimizer)

    def sweep(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        events: list[dict] = []
        if self.method.block_pruning:
            events += self._prune_blocks(self.method.block_threshold * progress, optimizer)
        if self.method.layer_pruning and progress >= self.method.layers_from:
            events += self._prune_layers(progress, optimizer)
        if progress >= 1:
            for prunode in self._alive_prunodes().values():
                prunode.close()
        self._bury()
        return events

    def _bury(self) -> None:
        """Free the weights of removed Prunodes; how far they had come still counts in `values`."""
        for path in self.prunodes.keys() - self._alive_prunodes().keys():
            self.prunodes[path].block, self.prunodes[path].second = nn.Identity(), None

    def _prune_blocks(self, threshold: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Tier 2: lowest first, never the last nor what a rule needs, each removal followed by new probabilities."""
        events = []
        for path, layer in self.layers().items():
            while len(blocks := [i for i, option in enumerate(layer.options) if option != SKIP]) > 1:
                p = layer.logits.detach()[blocks].softmax(0)
                weakest = int(p.argmin())
                if p[weakest] >= threshold:
                    break
                option = layer.options[blocks[weakest]]
                if not self._dispensable(path, option):
                    break
                remove_option(layer, option, optimizer)
                events.append({"path": path, "option": option, "tier": 2, "probability": p[weakest].item()})
        return events

    def _dispensable(self, path: str, option: str) -> bool:
        """Whether all rules of the space can be kept without the option."""
        rules = [rule for rule in self.problem.outline.rules if path in rule.paths]
        alive = decisions(self.supernet) if rules else {}
        left = {p: [o for o in decision.options if (p, o) != (path, option)] for p, decision in alive.items()}
        return all(rule.can_hold(left) for rule in rules)

    def _prune_layers(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Tier 3: introduce the depth gates, then decide layer by layer, at most one removal per stage and sweep."""
        if not self.depth:
            start = math.log(self.method.layer_start / (1 - self.method.layer_start))
            skippable = [p for p, layer in self.layers().items() if SKIP in layer.options and len(layer.options) > 1]
            self.depth = {path: nn.Parameter(torch.tensor(start)) for path in skippable}
            return []
        span = max(1e-9, 1 - self.method.layers_from)
        margin = self.method.layer_margin * (1 - progress) / span
        events, touched = [], set()
        for path, d in sorted(self.depth.items(), key=lambda item: item[1].item()):
            if path in self.kept:
                continue
            s, stage = d.sigmoid().item(), self.stages[path]
            # Once the expected cost has reached the target, removing more would overshoot.
            if s < 0.5 - margin and stage not in touched and self.excess() > 0:
                layer = self.layers()[path]
                for option in [o for o in layer.options if o != SKIP]:
                    remove_option(layer, option, optimizer)
                del self.depth[path]
                touched.add(stage)
                events.append({"path": path, "option": "layer", "tier": 3, "probability": s})
            elif s > 0.5 + margin or progress >= 1:
                self.kept.add(path)
        return events

    # Results ------------------------------------------------------------------------------------------------------

    def values(self) -> Options:
        """What the search has learned, as a value per option; the knapsack does the rest under the hard budget.

        A skip counts nothing and a block 0.05 + s * (2 + log p / p_max), with log at least -2: always more than a skip,
        so that slack brings back a layer, and more the surer the search was. A width counts with the log of its share
        of the width found and grows slowly beyond: halving a width costs a third of dropping a sure layer.
        """
        values = {path: dict(row) for path, row in capacity(self.problem).items()}
        alive = decisions(self.supernet)
        for path, layer in self.layers().items():
            blocks = [i for i, option in enumerate(layer.options) if option != SKIP]
            log_p = layer.logits.detach()[blocks].log_softmax(0).tolist()
            p = {layer.options[i]: value for i, value in zip(blocks, log_p, strict=True)}
            s = self._staying(path, layer)
            for option in values[path]:
                lead = max(p.get(option, -math.inf) - max(log_p, default=0.0), -2.0)
                values[path][option] = 0.0 if option == SKIP else 0.05 + s * (2 + lead)
        for path, prunode in self.prunodes.items():
            found = prunode.hidden.options[prunode.high if path in alive else prunode.low]
            for width in values[path]:
                n = int(width)
                values[path][width] = math.log(min(n, found) / found) + 0.25 * math.log(max(n, found) / found)
        for path in self.still:
            values[path] = {o: 0.05 if isinstance(o, str) and o != SKIP else 0.0 for o in values[path]}
        return values

    @property
    def still(self) -> set[str]:
        """Decisions about which the search has learned nothing: the layers left out from the start. Only slack that
        nothing else can use brings one back."""
        return self.unopened | {path for path, (layer, _) in self.problem.parents.items() if layer in self.unopened}

    def _staying(self, path: str, layer: OneOf) -> float:
        if layer.options == [SKIP]:
            return 0.0
        return self.depth[path].sigmoid().item() if path in self.depth else 1.0

    def describe(self) -> dict[str, Any]:
        with torch.no_grad():
            costs = {name: cost.item() for name, cost in self._costs().items()}
            probabilities = {
                path: {layer.options[i]: w.item() for i, w in layer.draw().pairs()}
                for path, layer in self.layers().items()
            }
        widths = {
            path: [prunode.hidden.options[prunode.low], prunode.hidden.options[prunode.high]]
            for path, prunode in self._alive_prunodes().items()
        }
        target = self.targets.get("latency")
        return {"expected": costs, "target": target, "probabilities": probabilities, "widths": widths}

    # State --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "progress": self.progress,
            "options": {path: list(layer.options) for path, layer in self.layers().items()},
            "prunodes": {p: [n.low, n.high, n.speed, n.winner, n.second is None] for p, n in self.prunodes.items()},
            "depth": {path: d.detach().clone() for path, d in self.depth.items()},
            "kept": sorted(self.kept),
            "supernet": self.supernet.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.steps, self.progress = state["steps"], state["progress"]
        if self.progress:  # before that, a warm-up: weights only, perhaps of another budget's widths
            self._restore_structure(state)
        # The logits of the widths themselves are never trained: a Prunode weighs its two.
        own = {f"{path}.logits": d.logits for path, d in decisions(self.supernet).items() if path in self.prunodes}
        self.supernet.load_state_dict({**state["supernet"], **own})

    def _restore_structure(self, state: dict[str, Any]) -> None:
        for path, options in state["options"].items():
            layer = self.layers()[path]
            for option in [o for o in layer.options if o not in options]:
                layer.remove(option)
        for path, (low, high, speed, winner, single) in state["prunodes"].items():
            node = self.prunodes[path]
            node.low, node.high, node.speed, node.winner = low, high, speed, winner
            if single:
                node.second = None
        self._bury()
        self.depth = {path: nn.Parameter(d.clone()) for path, d in state["depth"].items()}
        self.kept = set(state["kept"])
