"""Channels that are masked while the network trains, and may come back: what SMCP and MCU pruning share.

A mask lies on the weights that *read* a channel: whoever makes it goes on computing it, so that the masked weights
still receive a gradient, which goes to them as it is. A channel that becomes important again is taken back. What a
method adds is which channels are masked, and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors.torch import save as serialised
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from netsmith.cost.budget import Budget
from netsmith.cost.prices import Options, Prices
from netsmith.decisions import Architecture, Decision, Option
from netsmith.errors import UserError
from netsmith.graph.slimmable import Kept, Slimmable
from netsmith.run import Run, atomically
from netsmith.search.problem import Problem, prefer, taught
from netsmith.ship.export import norms_of
from netsmith.tasks.classification import steps
from netsmith.train.checkpoint import load_state, save_state

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How the network is trained meanwhile. The papers train from scratch: the rest of a training that starts from a
    trained network is ours."""

    pool: ClassVar = "channels"
    """Of `netsmith compress`, where none is asked for."""
    epochs: PositiveInt = 10
    """Passes over the training images (ours)."""
    batch_size: PositiveInt = 128
    """Images a step."""
    learning_rate: PositiveFloat = 0.02
    """Of SGD with momentum 0.9, falling along a cosine (ours)."""
    weight_decay: NonNegativeFloat = 5e-4
    """Of all weights (ours)."""
    masks: Literal["soft", "hard"] = "soft"
    """Whether masked weights go on learning."""

    def refuses(self, decision: Decision) -> str | None:
        if isinstance(decision, Kept):
            return None
        return "is not how many channels of a group stay (netsmith compress --pool channels has such)"


class Masked:
    """The training of the network for one of the problem's budgets."""

    STATE: ClassVar[tuple[str, ...]] = ("epoch", "step", "masks", "gathered", "architecture")
    """What a checkpoint has beside weights and optimizer."""

    def __init__(self, name: str, method: Any, problem: Problem, run: Run, number: int = 0) -> None:
        self.name, self.method, self.problem, self.run, self.number = name, method, problem, run, number
        space = problem.build()
        assert isinstance(space, Slimmable)
        self.space = space
        self.masks = {path: torch.ones(group.size) for path, group in space.groups.items()}
        self.gathered = {path: torch.zeros(group.size) for path, group in space.groups.items()}
        """What the channels of a group are worth ``(channels,)``."""
        self.architecture: Architecture = dict(problem.reference)
        self.norms = norms_of(space.network)
        space.train()
        self.optimizer = torch.optim.SGD(
            space.network.parameters(), lr=method.learning_rate, momentum=0.9, weight_decay=method.weight_decay
        )
        self.epoch = self.step = 0

    @property
    def budgets(self) -> list[Budget]:
        return self.problem.budgets[self.number]

    def learn(self) -> None:
        """After a backward pass, before the step of the optimizer: what the channels are worth."""
        raise NotImplementedError

    def choose(self, total: int) -> None:
        """After a step, of ``total``: the masks of the next one."""
        raise NotImplementedError

    def train(self) -> dict:
        checkpoint = self.run.checkpoint(f"{self.name}-{self.number}.pt")
        if checkpoint.exists():
            self.load(load_state(checkpoint))
        else:
            self.note({})
        while self.epoch < self.method.epochs:
            loss = self.train_epoch()
            self.epoch += 1
            self.note({"train_loss": loss})
            kept = sum(mask.sum().item() for mask in self.masks.values()) / sum(map(len, self.masks.values()))
            note = f"loss {loss:.3f}, {100 * kept:.0f} % of the channels"
            self.run.progress("channels are chosen", self.epoch, self.method.epochs, note)
            save_state(checkpoint, self.state())
        self.finish()
        values = self.values()
        return {"values": {p: list(row.values()) for p, row in values.items()}, "architecture": self.architecture}

    def note(self, entry: dict[str, float]) -> None:
        """What the page draws of an epoch; the whole network is number 0."""
        s = {path: torch.tensor(float(n), dtype=torch.float64) for path, n in self.architecture.items()}
        costs = {b.metric: used(self.problem, b, s).item() for b in self.budgets}
        limits = {b.metric: b.limit for b in self.budgets}
        self.run.event(
            "search_epoch",
            search=f"{self.name}-{self.number}",
            epoch=self.epoch,
            **entry,
            expected=costs,
            target=limits,
            kept=self.architecture,
        )

    def train_epoch(self) -> float:
        """One pass; returns the mean loss."""
        method, task, losses = self.method, self.problem.task, []
        total = method.epochs * steps(len(task.split("train")), method.batch_size)
        batches = task.batches("train", method.batch_size, train=True, seed=self.run.seed(self.name), epoch=self.epoch)
        for images, labels in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = method.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / total))
            loss = F.cross_entropy(functional_call(self.space.network, self.tensors(), (images,)), labels)
            if not loss.isfinite():
                raise UserError(
                    f"the loss became {loss.item()} in epoch {self.epoch + 1} of {self.name}: "
                    "a lower learning_rate may help"
                )
            self.optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            self.learn()
            self.optimizer.step()
            self.step += 1
            self.choose(total)
        return float(torch.stack(losses).mean())

    def tensors(self) -> dict[str, Tensor]:
        """What runs in place of the network's own parameters: weights that read are masked; on the way back a gradient
        reaches a masked weight as it is, with soft masks."""
        found = {}
        for name, mask in self.space.masks(self.masks).items():
            weight = self.space.network.get_parameter(name)
            masked = weight * mask
            found[name] = weight + (masked - weight).detach() if self.method.masks == "soft" else masked
        return found

    @torch.no_grad()
    def read_sums(self, worth: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """Of each channel ``(channels,)`` the sum of ``worth(weight, gradient)`` over what reads it, of rows that are
        not masked themselves."""
        rows, found = self.space.masks(self.masks, "out"), {}
        for path, group in self.space.groups.items():
            total = torch.zeros(group.size)
            for use in group.uses:
                if use.role == "in":
                    weight = self.space.network.get_parameter(use.tensor)
                    if weight.grad is None:
                        continue
                    each = worth(weight, weight.grad) * rows.get(use.tensor, 1.0)
                    total += each.transpose(0, use.dim).flatten(1).sum(1)[use.positions].sum(1)
            found[path] = total
        return found

    def values(self) -> Options:
        """Of every width the worth of its best channels; 1 is the most that a group has."""
        found: Options = {}
        for path in self.space.groups:
            top = self.gathered[path].sort(descending=True).values.double().cumsum(0)
            found[path] = {n: float(top[int(n) - 1]) for n in self.space.width(path).options}
        scale = max(max(row.values()) for row in found.values()) or 1.0
        return {path: {n: value / scale for n, value in row.items()} for path, row in found.items()}

    def keep(self, architecture: Architecture) -> int:
        """Mask all but the best channels, as many as ``architecture`` says; returns how many have come back."""
        before, self.architecture = self.masks, architecture
        self.masks = {path: _top(self.gathered[path], int(n)) for path, n in architecture.items()}
        return sum(int(((new == 1) & (before[path] == 0)).sum()) for path, new in self.masks.items())

    @torch.no_grad()
    def finish(self) -> None:
        """The channels in order: those kept first, by worth; and the weights into the run's folder."""
        for path, mask in self.masks.items():
            worth = self.gathered[path]
            self.space.order(path).copy_((worth + mask * (1 + worth.max())).argsort(descending=True, stable=True))
        self.space.eval()
        state = {name: tensor.contiguous().clone() for name, tensor in self.space.state_dict().items()}
        with atomically(self.run.path / taught(self.name, self.number)) as temporary:
            temporary.write_bytes(serialised(state))

    def state(self) -> dict:
        return {
            **{name: getattr(self, name) for name in self.STATE},
            "space": self.space.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mark": self.run.mark(),
        }

    def load(self, state: dict) -> None:
        self.run.rewind(state.pop("mark"))
        self.space.load_state_dict(state.pop("space"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)


def search_masked(problem: Problem, run: Run, name: str, training: Callable[[int], Masked]) -> list[Options]:
    """A training of its own for each budget; its network is preferred, and what its channels are worth decides where
    the budget turns out to be tighter or wider."""

    def searched(number: int) -> Options:
        found: Mapping[str, Any] = run.once(f"{name}-{number}", lambda: training(number).train())
        run.checkpoint(f"{name}-{number}.pt").unlink(missing_ok=True)
        options = problem.outline.options
        values: Options = {p: dict(zip(options[p], row, strict=True)) for p, row in found["values"].items()}
        return prefer(values, found["architecture"], 1.0 + len(values))

    return [searched(number) for number in range(len(problem.budgets))]


def used(problem: Problem, budget: Budget, s: Mapping[str, Tensor]) -> Tensor:
    """What a budget limits at real widths, differentiable: exact at the options for latency, everywhere for sums of
    products of two widths; memory is that of its worst moment. Unit: the budget's."""
    return torch.stack([at(prices, s) for prices in problem.sums(budget.metric)]).max()


def at(prices: Prices, s: Mapping[str, Tensor]) -> Tensor:
    """A price between the options of each width, linear along each: at an option it is the option's own."""
    hats = {path: hat([int(n) for n in row], s[path]) for path, row in prices.options.items()}
    total = next(iter(s.values())).new_tensor(prices.constant)
    for path, row in prices.options.items():
        total = total + hats[path] @ total.new_tensor(list(row.values()))
    for (a, b), row in prices.pairs.items():
        first: Sequence[Option] = list(prices.options[a])
        second: Sequence[Option] = list(prices.options[b])
        total = total + hats[a] @ total.new_tensor([[row[i, j] for j in second] for i in first]) @ hats[b]
    return total


def hat(options: Sequence[int], s: Tensor) -> Tensor:
    """The shares of a number s among ``options``, rising: those of the two next to it, in which it is linear."""
    if len(options) == 1:
        return torch.ones_like(s)[None]
    i = min(max(sum(n <= s.item() for n in options) - 1, 0), len(options) - 2)
    share = (s - options[i]) / (options[i + 1] - options[i])
    found = s.new_zeros(len(options))
    return found.index_put((torch.tensor([i, i + 1]),), torch.stack([1 - share, share]))


def _top(worth: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(worth)
    mask[worth.argsort(descending=True, stable=True)[:count]] = 1.0
    return mask
