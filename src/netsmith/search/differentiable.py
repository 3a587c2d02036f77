"""The supernet loop that gradient methods share: weight steps, architecture steps, structural edits, on named splits.

An epoch is: weight steps over ``train``, architecture steps over ``search``, after them or in between, then the
method's own sweep over the structure. What is new in a method (how options are mixed, what the architecture loss is,
what a step does, what gets pruned when) is a `Searcher`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.decisions import Decision, Option
from netsmith.errors import UserError
from netsmith.run import Run
from netsmith.search.problem import Problem
from netsmith.tasks.classification import steps as steps_of
from netsmith.train.allocator import keep_freed_memory
from netsmith.train.checkpoint import load_state, save_state

Batch = tuple[Tensor, Tensor]
"""Images ``(n, C, H, W)`` and labels ``(n,)``."""
LONGEST = 5.0
"""Norm to which the gradient of the weights is cut."""


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
    architecture_optimizer: Literal["adam", "sgd"] = "adam"
    """Of the logits; sgd has the momentum of the weights (EdMIPS)."""
    architecture_rate: PositiveFloat = 0.03
    """Its rate (FBNet: 0.01 over 90 epochs)."""
    architecture_decay: NonNegativeFloat = 5e-4
    """Weight decay on the logits."""
    architecture_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Adam's beta_1 on the logits (DARTS and FBNet)."""
    rhythm: NonNegativeInt = 0
    """Weight steps to each architecture step, which comes before them; 0: first an epoch of the one, then an epoch of
    the other (FBNet)."""

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"steps.warmup_epochs is {self.warmup_epochs}; allowed: less than the {self.epochs} epochs")

    def descent(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """The optimizer of the weights."""
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )

    def of_logits(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the logits."""
        group = {"params": list(parameters)}  # as a group it may be empty: nothing open from the start
        rate, decay = self.architecture_rate, self.architecture_decay
        if self.architecture_optimizer == "sgd":
            return torch.optim.SGD([group], lr=rate, momentum=self.momentum, weight_decay=decay)
        return torch.optim.Adam([group], lr=rate, betas=(self.architecture_momentum, 0.999), weight_decay=decay)


class Searcher:
    """A supernet, and what a method does with it. Both steps are the ordinary ones; a method overrides what its paper
    does differently."""

    supernet: nn.Module
    joint: bool = False
    """Weights and logits learn from one loss on ``train``: `weight_step` makes both steps, `architecture_step` none."""

    def parameters(self) -> list[nn.Parameter]:
        """The architecture parameters that are trained now; none: there are no architecture steps."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator, *, learning: bool) -> None:
        """Decide what the next pass runs; ``learning`` tells an architecture step from a weight step."""
        raise NotImplementedError

    def objective(self, loss: Tensor) -> Tensor:
        """The architecture loss, from the task loss of the pass just made."""
        raise NotImplementedError

    def weight_step(self, loop: Loop, batch: Batch) -> Tensor:
        """One step on a batch of ``train``; returns the loss."""
        self.draw(loop.generator, learning=False)
        loss = task_loss(self.supernet, batch)
        loop.weights.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights(self.supernet), LONGEST)
        loop.weights.step()
        return loss

    def architecture_step(self, loop: Loop, batch: Batch, beside: Batch | None) -> Tensor:
        """One step on a batch of ``search``; ``beside`` is the batch of ``train`` that the next weight step takes,
        where the two kinds of step alternate. Returns the loss."""
        with frozen(weights(self.supernet)):  # no weight gradients: a third of the work saved
            self.draw(loop.generator, learning=True)
            loss = task_loss(self.supernet, batch)
            objective = self.objective(loss)
            if objective.requires_grad:  # otherwise everything is decided
                loop.architecture.zero_grad()
                objective.backward()
                loop.architecture.step()
        return loss

    def stepped(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """After each architecture step; ``progress`` of the search after warm-up, 0 to 1."""

    def sweep(self, progress: float, optimizer: torch.optim.Optimizer) -> list[dict]:
        """After each epoch: edit the structure. Returns an event per edit."""
        return []

    def describe(self) -> dict[str, Any]:
        """Probabilities, widths and expected costs, for the event of the epoch."""
        return {}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to bring a fresh searcher to this structure, its tensors included."""
        return {"supernet": self.supernet.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.supernet.load_state_dict(state["supernet"])


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
    loop = Loop(problem, searcher, steps)

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


class Loop:
    """A search in progress: the searcher, its two optimizers, the noise of the epoch."""

    def __init__(self, problem: Problem, searcher: Searcher, steps: Steps) -> None:
        self.problem, self.searcher, self.steps = problem, searcher, steps
        self.epoch = 0
        self.generator = torch.Generator()
        searcher.supernet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.weights = steps.descent(weights(searcher.supernet))
        self.architecture = steps.of_logits(searcher.parameters())

    @property
    def learning(self) -> bool:
        """Whether the warm-up is over."""
        return self.epoch >= self.steps.warmup_epochs

    @property
    def rate(self) -> float:
        """Of the weights, in this epoch."""
        return 0.5 * self.steps.learning_rate * (1 + math.cos(math.pi * self.epoch / self.steps.epochs))

    def train_epoch(self, seed: int) -> tuple[dict[str, float], list[dict]]:
        """One pass over ``train`` and, after the warm-up, the architecture steps. Returns means and edits."""
        for group in self.weights.param_groups:
            group["lr"] = self.rate
        entry = {"learning_rate": self.rate}
        self.generator.manual_seed(seed * 1009 + self.epoch)
        self.searcher.supernet.train()
        taught = self.learning and not self.searcher.joint and bool(self.searcher.parameters())
        losses: dict[str, list[float]] = {"train_loss": [], "search_loss": []}
        alternating = taught and self.steps.rhythm > 0
        search = self._endless("search", seed)
        for count, batch in enumerate(self._batches("train", seed)):
            if alternating and count % self.steps.rhythm == 0:
                losses["search_loss"].append(self._architecture_step(next(search), batch, count, self._count("train")))
            losses["train_loss"].append(self._finite(self.searcher.weight_step(self, batch), count))
        if taught and not alternating:
            losses["search_loss"] = self.architecture_epoch(seed)
        entry |= {name: statistics.fmean(values) for name, values in losses.items() if values}
        edits: list[dict] = []
        if self.learning:
            edits = self.searcher.sweep(self._progress(1.0), self.architecture)
            self._follow()
        self.epoch += 1
        return entry, edits

    def architecture_epoch(self, seed: int) -> list[float]:
        """One pass of architecture steps over ``search``; returns their losses."""
        batches = enumerate(self._batches("search", seed))
        return [self._architecture_step(batch, None, count, self._count("search")) for count, batch in batches]

    def _architecture_step(self, batch: Batch, beside: Batch | None, step: int, of: int) -> float:
        loss = self._finite(self.searcher.architecture_step(self, batch, beside), step)
        self.searcher.stepped(self._progress((step + 1) / of), self.architecture)
        return loss

    @property
    def _batch_size(self) -> int:
        return self.steps.batch_size or self.problem.recipe.batch_size

    def _count(self, split: str) -> int:
        return steps_of(len(self.problem.task.split(split)), self._batch_size)

    def _endless(self, split: str, seed: int) -> Iterator[Batch]:
        """Pass after pass, each in an order of its own."""
        for turn in itertools.count():
            yield from self._batches(split, seed, turn)

    def _batches(self, split: str, seed: int, turn: int = 0) -> Iterator[Batch]:
        task, mirror = self.problem.task, self.problem.recipe.mirror
        epoch = self.epoch + turn * self.steps.epochs
        return task.batches(split, self._batch_size, train=True, seed=seed, epoch=epoch, mirror=mirror)

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


def task_loss(supernet: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(supernet(images), labels)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for ``parameters``."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


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
