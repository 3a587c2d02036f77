"""SMCP (Humble et al. 2022, arXiv:2211.02206): channels are masked while the network trains, and may come back.

Every few steps a knapsack keeps the channels that matter most within a budget that tightens. A mask lies on the weights
that *read* a channel: whoever makes it goes on computing it, so that the masked weights still receive a gradient, which
goes to them as it is. A channel that becomes important again is taken back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors.torch import save as serialised
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from netsmith.cost.prices import Options
from netsmith.decisions import Architecture, Decision
from netsmith.errors import UserError
from netsmith.graph.slimmable import Kept, Slimmable
from netsmith.run import Run, atomically
from netsmith.search.problem import Problem, prefer, taught
from netsmith.ship.export import norms_of
from netsmith.tasks.classification import steps
from netsmith.train.checkpoint import load_state, save_state

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class SMCP:
    """Sections 3.1 to 3.4. The paper trains 90 epochs of ImageNet from scratch: the shares of the schedule are its own,
    the rest of the training is that of a network which is trained already (ours)."""

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
    warm: Share = 0.1
    """The share of the steps before anything is masked (10 of 90 epochs)."""
    ramp: Share = 0.6
    """The share of the steps in which the budget tightens (55 of 90); the masks stay as they are for the rest."""
    every: PositiveInt = 20
    """Steps from one choice of channels to the next (80 of 256 images, of ImageNet's 450,000)."""
    masks: Literal["soft", "hard"] = "soft"
    """Whether masked weights go on learning."""
    importance: Literal["taylor", "weight"] = "taylor"
    """What a channel is worth: how much the loss would change without it, to first order, or its weights' size."""
    scaling: Literal["importance", "share", "none"] = "importance"
    """By what a norm behind masked weights is scaled: the share of importance, or of channels, that is left."""
    masked_decay: NonNegativeFloat = 2e-4
    """Weight decay of masked weights on top."""

    def refuses(self, decision: Decision) -> str | None:
        if isinstance(decision, Kept):
            return None
        return "is not how many channels of a group stay (netsmith compress --pool channels has such)"

    def search(self, problem: Problem, run: Run) -> list[Options]:
        return [self._searched(problem, run, number) for number in range(len(problem.budgets))]

    def _searched(self, problem: Problem, run: Run, number: int) -> Options:
        """A training of its own for each budget."""
        found = run.once(f"smcp-{number}", lambda: Pruning(self, problem, run, number).train())
        run.checkpoint(f"smcp-{number}.pt").unlink(missing_ok=True)
        values: Options = {
            p: dict(zip(problem.outline.options[p], row, strict=True)) for p, row in found["values"].items()
        }
        return prefer(values, found["architecture"], 1.0 + len(values))

    def tightened(self, step: int, total: int) -> float:
        """The share of the way from the whole network to the budget: 0, then 1 - e^(-0.05 t) over what that is one
        epoch after the ramp, t counting 55 paper epochs, then 1."""
        done = step / total
        if done < self.warm or self.ramp == 0:
            return float(done >= self.warm)
        t = 55 * (done - self.warm) / self.ramp
        return min(1.0, (1 - math.exp(-0.05 * t)) / (1 - math.exp(-0.05 * 56))) if t < 55 else 1.0


class Pruning:
    """The training of the network for one of the problem's budgets."""

    def __init__(self, method: SMCP, problem: Problem, run: Run, number: int = 0) -> None:
        self.method, self.problem, self.run, self.number = method, problem, run, number
        space = problem.build()
        assert isinstance(space, Slimmable)
        self.space = space
        self.masks = {path: torch.ones(group.size) for path, group in space.groups.items()}
        self.gathered = {path: torch.zeros(group.size) for path, group in space.groups.items()}
        self.scales: dict[str, float] = {}
        self.architecture: Architecture = dict(problem.reference)
        self.norms = norms_of(space.network)
        space.train()
        self.optimizer = torch.optim.SGD(
            space.network.parameters(), lr=method.learning_rate, momentum=0.9, weight_decay=method.weight_decay
        )
        self.epoch = self.step = 0

    def train(self) -> dict:
        checkpoint = self.run.checkpoint(f"smcp-{self.number}.pt")
        if checkpoint.exists():
            self.load(load_state(checkpoint))
        while self.epoch < self.method.epochs:
            loss = self.train_epoch()
            self.epoch += 1
            kept = sum(int(mask.sum()) for mask in self.masks.values()) / sum(map(len, self.masks.values()))
            self.run.event(
                "smcp_epoch", number=self.number, epoch=self.epoch, loss=loss, kept=kept, widths=self.architecture
            )
            note = f"loss {loss:.3f}, {100 * kept:.0f} % of the channels"
            self.run.progress("channels are chosen", self.epoch, self.method.epochs, note)
            save_state(checkpoint, self.state())
        self.finish()
        values = self.values(self.gathered)
        return {"values": {p: list(row.values()) for p, row in values.items()}, "architecture": self.architecture}

    def train_epoch(self) -> float:
        """One pass; returns the mean loss."""
        method, task, losses = self.method, self.problem.task, []
        total = method.epochs * steps(len(task.split("train")), method.batch_size)
        batches = task.batches("train", method.batch_size, train=True, seed=self.run.seed("smcp"), epoch=self.epoch)
        for images, labels in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = method.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / total))
            loss = F.cross_entropy(functional_call(self.space.network, self.tensors(), (images,)), labels)
            if not loss.isfinite():
                raise UserError(
                    f"the loss became {loss.item()} in epoch {self.epoch + 1} of smcp: a lower learning_rate may help"
                )
            self.optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            self.gather()
            self.decay()
            self.optimizer.step()
            self.step += 1
            tightened = method.tightened(self.step, total)
            last = min(total, math.ceil(total * (method.warm + method.ramp)))
            if (tightened > 0 and self.step < last and self.step % method.every == 0) or self.step == last:
                self.choose(tightened)
        return float(torch.stack(losses).mean())

    def tensors(self) -> dict[str, Tensor]:
        """What runs in place of the network's own parameters: weights that read are masked, norms are scaled; on the
        way back a gradient reaches a masked weight as it is, and a scaled norm divided by its scale (0 by 0)."""
        found = {}
        for name, mask in self.space.masks(self.masks).items():
            weight = self.space.network.get_parameter(name)
            masked = weight * mask
            found[name] = weight + (masked - weight).detach() if self.method.masks == "soft" else masked
        for name, scale in self.scales.items():
            weight = self.space.network.get_parameter(name)
            found[name] = weight / scale + (weight * scale - weight / scale).detach() if scale else weight * 0.0
        return found

    @torch.no_grad()
    def gather(self) -> None:
        """Importance of each channel c: |sum over what reads it of -W dL/dW|, of rows that are not masked themselves;
        a mean over the batches since the last choice (ours: the paper takes the last batch)."""
        rows = self.space.masks(self.masks, "out")
        for path, group in self.space.groups.items():
            total = torch.zeros(group.size)
            for use in group.uses:
                if use.role == "in":
                    weight = self.space.network.get_parameter(use.tensor)
                    if weight.grad is None:
                        continue
                    each = -weight * weight.grad if self.method.importance == "taylor" else weight.abs()
                    along = (each * rows.get(use.tensor, 1.0)).transpose(0, use.dim).flatten(1).sum(1)
                    total += along[use.positions].sum(1)
            self.gathered[path] += total.abs()

    @torch.no_grad()
    def decay(self) -> None:
        for name, mask in self.space.masks(self.masks).items():
            weight = self.space.network.get_parameter(name)
            if weight.grad is not None:
                weight.grad += self.method.masked_decay * weight * (1 - mask)

    def choose(self, tightened: float) -> None:
        """Keep the channels that matter most within the budgets of now."""
        budgets = self.problem.budgets[self.number]
        whole = [self.problem.predicted(budget, self.problem.reference) for budget in budgets]
        now = [
            replace(b, limit=b.limit + (1 - tightened) * max(0.0, cost - b.limit))
            for b, cost in zip(budgets, whole, strict=True)
        ]
        self.architecture = self.problem.allocate(self.values(self.gathered), now)
        before = self.masks
        self.masks = {path: _top(self.gathered[path], int(n)) for path, n in self.architecture.items()}
        back = sum(int(((new == 1) & (before[path] == 0)).sum()) for path, new in self.masks.items())
        self.scale()
        self.run.event(
            "smcp_choice", number=self.number, step=self.step, tightened=tightened, widths=self.architecture, back=back
        )
        if tightened < 1:
            self.gathered = {path: torch.zeros_like(found) for path, found in self.gathered.items()}

    def values(self, importance: Mapping[str, Tensor]) -> Options:
        """Of every width the importance of its most important channels; 1 is the most that a group has."""
        found: Options = {}
        for path in self.space.groups:
            top = importance[path].sort(descending=True).values.double().cumsum(0)
            found[path] = {n: float(top[int(n) - 1]) for n in self.space.width(path).options}
        scale = max(max(row.values()) for row in found.values()) or 1.0
        return {path: {n: value / scale for n, value in row.items()} for path, row in found.items()}

    def scale(self) -> None:
        """What each norm behind a reading layer is multiplied by."""
        self.scales = {}
        if self.method.scaling == "none":
            return
        left: dict[str, float] = defaultdict(lambda: 1.0)
        for path, group in self.space.groups.items():
            worth = self.gathered[path] if self.method.scaling == "importance" else torch.ones(group.size)
            kept = float((worth * self.masks[path]).sum() / worth.sum().clamp_min(1e-12))
            for use in group.uses:
                if use.role == "in" and (norm := self.norms.get(use.tensor.rpartition(".")[0])):
                    left[f"{norm}.weight"] *= kept
        self.scales = {name: share for name, share in left.items() if share < 1}

    @torch.no_grad()
    def finish(self) -> None:
        """The weights as they run, and the channels in order: those kept first, by importance."""
        for name, scale in self.scales.items():
            self.space.network.get_parameter(name).mul_(scale)
        for path, mask in self.masks.items():
            worth = self.gathered[path]
            self.space.order(path).copy_((worth + mask * (1 + worth.max())).argsort(descending=True, stable=True))
        self.space.eval()
        state = {name: tensor.contiguous().clone() for name, tensor in self.space.state_dict().items()}
        with atomically(self.run.path / taught("smcp", self.number)) as temporary:
            temporary.write_bytes(serialised(state))

    def state(self) -> dict:
        names = ("epoch", "step", "masks", "gathered", "scales", "architecture")
        kept = {name: getattr(self, name) for name in names}
        return {
            **kept,
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


def _top(worth: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(worth)
    mask[worth.argsort(descending=True, stable=True)[:count]] = 1.0
    return mask
