"""The supernet loop that gradient methods share: weight steps, architecture steps, structural edits, on named splits.

An epoch is: weight steps over ``train``, then architecture steps over ``search``, then the method's own sweep over the
structure. What is new in a method (how options are mixed, what the architecture loss is, what gets pruned when) is a
`Searcher`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.decisions import Decision, Option
from netsmith.errors import UserError
from netsmith.run import Run
from netsmith.search.problem import Problem
from netsmith.train.allocator import keep_freed_memory
from netsmith.train.checkpoint import load_state, save_state


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How a supernet is trained; FBNet's values (section 4.1) but for the learning rate, which suits small batches."""

    epochs: PositiveInt = 15
    """Passes over the training split."""
    warmup_epochs: NonNegativeInt = 3
    """First epochs in which only weights learn."""
    batch_size: PositiveInt | None = None
    """Images a step, for weights and architecture alike; none: the recipe's."""
    learning_rate: PositiveFloat = 0.05
    """Of the weights, at its peak; falls along a cosine to 0."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the weights' SGD."""
    weight_decay: NonNegativeFloat = 1e-4
    """On the weights."""
    architecture_rate: PositiveFloat = 0.03
    """Adam's rate on the logits (FBNet: 0.01 over 90 epochs)."""
    architecture_decay: NonNegativeFloat = 5e-4
    """Weight decay on the logits."""

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"steps.warmup_epochs is {self.warmup_epochs}; allowed: less than the {self.epochs} epochs")


class Searcher(Protocol):
    """What a method adds to the loop."""

    supernet: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """The architecture parameters that are trained now."""
        ...

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        """Decide what the next pass runs; ``learning`` tells an architecture step from a weight step."""
        ...

    def objective(self, loss: Tensor) -> Tensor:
        """The architecture loss, from the task loss of the pass just made."""
        ...

    def stepped(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """After each architecture step; ``progress`` of the search after warm-up, 0 to 1."""
        ...

    def sweep(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        """After each epoch: edit the structure. Returns an event per edit."""
        ...

    def describe(self) -> dict[str, Any]:
        """Probabilities, widths and expected costs, for the event of the epoch."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs to bring a fresh searcher to this structure, its tensors included."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def learn(
    problem: Problem,
    run: Run,
    name: str,
    make: Callable[[], Searcher],
    steps: Steps,
    *,
    until: int | None = None,
    after: Path | None = None,
) -> Searcher:
    """Train weights and architecture for ``steps.epochs``; ``until`` stops earlier (a warm-up that others continue).

    State is kept after every epoch in the run's checkpoint ``name``; a killed search goes on from there and ends with
    the same bits. ``after`` is the checkpoint of a warm-up to start from.

    Raises: UserError when the loss is no longer finite, naming epoch and step.
    """
    keep_freed_memory()
    last = steps.epochs if until is None else until
    searcher = make()
    checkpoint = run.checkpoint(f"{name}.pt")
    loop = _Loop(problem, searcher, steps)

    def train() -> int:
        if checkpoint.exists():
            run.rewind(loop.load(load_state(checkpoint)))
        elif after is not None:
            # Only weights were trained, and the number of open choices may be another one here.
            loop.load({**load_state(after), "architecture": None})
        while loop.epoch < last:
            entry, edits = loop.train_epoch(run.seed(name))
            for edit in edits:
                run.event("removed", search=name, epoch=loop.epoch, **edit)
            run.event("search_epoch", search=name, epoch=loop.epoch, **entry, **searcher.describe())
            run.progress(f"supernet ({name})", loop.epoch, last, "")
            save_state(checkpoint, loop.state(run.mark()))
        return loop.epoch

    # A stage, because going back to a finished checkpoint must not forget the events of what came after it.
    if run.once(f"supernet-{name}", train) > loop.epoch:
        loop.load(load_state(checkpoint))
    return searcher


class _Loop:
    def __init__(self, problem: Problem, searcher: Searcher, steps: Steps) -> None:
        self.problem, self.searcher, self.steps = problem, searcher, steps
        self.epoch = 0
        searcher.supernet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.weights = torch.optim.SGD(
            weights(searcher.supernet),
            lr=steps.learning_rate,
            momentum=steps.momentum,
            weight_decay=steps.weight_decay,
            nesterov=steps.momentum > 0,
        )
        self.architecture = torch.optim.Adam(
            [{"params": searcher.parameters()}],  # as a group it may be empty: nothing open from the start
            lr=steps.architecture_rate,
            betas=(0.5, 0.999),
            weight_decay=steps.architecture_decay,
        )

    def train_epoch(self, seed: int) -> tuple[dict[str, float], list[dict]]:
        searcher, steps = self.searcher, self.steps
        rate = 0.5 * steps.learning_rate * (1 + math.cos(math.pi * self.epoch / steps.epochs))
        for group in self.weights.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed * 1009 + self.epoch)
        learning = self.epoch >= steps.warmup_epochs
        searcher.supernet.train()
        losses = {"train_loss": 0.0, "search_loss": 0.0}
        count = 0
        for images, labels in self._batches("train", seed):
            searcher.draw(generator, learning=False)
            loss = F.cross_entropy(searcher.supernet(images), labels)
            self.weights.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights(searcher.supernet), 5.0)
            self.weights.step()
            losses["train_loss"] += self._finite(loss, count)
            count += 1
        entry = {"train_loss": losses["train_loss"] / count, "learning_rate": rate}
        edits: list[dict] = []
        if learning:
            entry["search_loss"] = self._learn_architecture(generator, seed)
            edits = searcher.sweep(self._progress(1.0), self.architecture)
            self._follow()
        self.epoch += 1
        return entry, edits

    def _learn_architecture(self, generator: torch.Generator, seed: int) -> float:
        searcher = self.searcher
        frozen = weights(searcher.supernet)
        batches = list(self._batches("search", seed))
        total = 0.0
        for count, (images, labels) in enumerate(batches):
            for parameter in frozen:  # no weight gradients: a third of the work saved
                parameter.requires_grad_(False)
            searcher.draw(generator, learning=True)
            loss = F.cross_entropy(searcher.supernet(images), labels)
            self.architecture.zero_grad()
            objective = searcher.objective(loss)
            if objective.requires_grad:  # otherwise everything is decided
                objective.backward()
                self.architecture.step()
            for parameter in frozen:
                parameter.requires_grad_(True)
            total += self._finite(loss, count)
            searcher.stepped(self._progress((count + 1) / len(batches)), self.architecture)
            frozen = weights(searcher.supernet)
        return total / len(batches)

    def _batches(self, split: str, seed: int):
        recipe = self.problem.recipe
        batch = self.steps.batch_size or recipe.batch_size
        return self.problem.task.batches(split, batch, train=True, seed=seed, epoch=self.epoch, mirror=recipe.mirror)

    def _progress(self, part: float) -> float:
        length = max(1, self.steps.epochs - self.steps.warmup_epochs)
        return (self.epoch - self.steps.warmup_epochs + part) / length

    def _finite(self, loss: Tensor, step: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the supernet's loss became {value} in epoch {self.epoch + 1}, step {step + 1}; "
                f"a lower learning rate than {self.steps.learning_rate:g} may help"
            )
        return value

    def _follow(self) -> None:
        """Let both optimizers forget what is no longer there and take up what is new."""
        follow(self.weights, weights(self.searcher.supernet))
        follow(self.architecture, self.searcher.parameters())

    def state(self, mark: int) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "events": mark,
            "searcher": self.searcher.state(),
            "weights": self.weights.state_dict(),
            "architecture": self.architecture.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> int:
        self.searcher.restore(state["searcher"])
        self._follow()
        self.weights.load_state_dict(state["weights"])
        if state["architecture"] is not None:
            self.architecture.load_state_dict(state["architecture"])
        self.epoch = state["epoch"]
        return state["events"]


def weights(supernet: nn.Module) -> list[nn.Parameter]:
    """What weight steps train: all but the logits, those of decisions and those that a method's own modules hold."""
    return [parameter for name, parameter in supernet.named_parameters() if name.rpartition(".")[2] != "logits"]


def follow(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Make an optimizer with one group train exactly ``parameters``; moments of those that stay are kept."""
    (group,) = optimizer.param_groups
    group["params"] = list(parameters)
    alive = set(map(id, group["params"]))
    for gone in [parameter for parameter in optimizer.state if id(parameter) not in alive]:
        del optimizer.state[gone]


def remove_option(decision: Decision, option: Option, optimizer: torch.optim.Optimizer) -> None:
    """Take an option out of a decision; the moments of the surviving logits move up with them."""
    before = len(decision.options)
    kept = decision.remove(option)
    state = optimizer.state.get(decision.logits, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == (before,):
            state[name] = value[kept]


def latency_factor(expected: Tensor, target: float, alpha: float, beta: float) -> Tensor:
    """alpha * log(LAT)^beta, FBNet equation 2, with LAT in units in which the target is e^3.

    The power acts on the logarithm, which has to stay positive: a LAT below 1 unit would make it NaN, and the unit
    decides the trade-off, so it is tied to the target instead of to milliseconds.
    """
    return alpha * (expected / target * math.exp(3)).clamp_min(1.0 + 1e-6).log() ** beta


@dataclass(frozen=True, kw_only=True)
class CostLoss:
    """How expected costs E and their targets T enter the architecture loss."""

    form: Literal["relative", "power"] = "relative"
    """relative: loss + weight * |E/T - 1|, two-sided (ours), because a one-sided penalty goes on shrinking below the
    budget; power: FBNet's product."""
    weight: NonNegativeFloat = 1.0
    """Of the relative form (ours)."""
    alpha: PositiveFloat = 0.2
    """Scale of the power form (FBNet, equation 2); without effect on the logits under Adam."""
    beta: PositiveFloat = 0.6
    """Power of log-latency (FBNet, equation 2)."""

    def __call__(self, loss: Tensor, costs: Mapping[str, Tensor], targets: Mapping[str, float]) -> Tensor:
        if self.form == "power":
            return loss * math.prod(latency_factor(costs[n], t, self.alpha, self.beta) for n, t in targets.items())
        return loss + self.weight * sum((costs[name] / target - 1).abs() for name, target in targets.items())
