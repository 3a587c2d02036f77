"""The training loop: forward, loss, backward, step, epoch by epoch; what happens is visible here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsmith.blocks.norms import ProxyNorm
from netsmith.errors import UserError
from netsmith.tasks.classification import Task, steps
from netsmith.train.allocator import keep_freed_memory
from netsmith.train.checkpoint import load_state, save_state
from netsmith.train.optimizers import Average, make_optimizer
from netsmith.train.recipe import Recipe
from netsmith.train.schedules import factor

WINDOW = 50
"""Steps between two looks at the loss: on a GPU a look waits for the result."""


def train(
    module: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    split: str = "train",
    seed: int = 0,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    device: str | torch.device = "cpu",
) -> list[dict[str, float]]:
    """Train `module` in place on a split; it ends on `device`, in eval mode, with the averaged weights.

    `module` maps images `(n, C, H, W)` to logits `(n, classes)`. `checkpoint` is written after each epoch and continued
    where it exists: the result is bit for bit that of an undisturbed run with the same number of threads.

    Returns what happened, a dict for each epoch: epoch (from 1), loss (mean of its steps), learning_rate (the last
    one), seconds, data_share (part of the seconds spent on making batches). `on_epoch` sees each of them as it comes;
    in a continued run also those of the epochs done before.

    Raises `UserError` when the loss is no longer finite (the last good checkpoint remains), when the disk is full, and
    when the checkpoint is damaged or of another run.
    """
    if recipe.distillation and teacher is None:
        raise UserError(f"recipe.distillation is {recipe.distillation}, but there is no teacher to learn from")
    keep_freed_memory()
    for network in (module, *([] if teacher is None else [teacher])):
        # Channels last: small networks train about twice as fast on the CPU.
        network.to(device=torch.device(device), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    run = _Training(module, task, recipe, split, seed, teacher, torch.device(device))
    with _own_random_numbers(run.device), _contiguous_again(module):
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
            for past in run.history:
                if on_epoch:
                    on_epoch(past)
        while run.epoch < recipe.epochs:
            done = run.train_epoch()
            run.history.append(done)
            if checkpoint is not None:
                run.save(checkpoint)
            if on_epoch:
                on_epoch(done)
        if run.average:
            run.average.swap()
    module.eval()
    return run.history


def evaluate(
    module: nn.Module, task: Task, split: str, *, device: str | torch.device = "cpu", batch_size: int = 256
) -> float:
    """Top-1 accuracy on a split, 0 to 1. `module` is moved to `device` and left in the mode it was in."""
    training = module.training
    module.to(device).eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for images, labels in task.batches(split, batch_size, train=False, device=device):
            right += (module(images).argmax(1) == labels).sum()
    module.train(training)
    return right.item() / len(task.split(split))


def loss_of(logits: Tensor, targets: Tensor, recipe: Recipe, taught: Tensor | None = None) -> Tensor:
    """Cross-entropy with label smoothing, and the teacher's part: `(1 - w) * CE + w * T^2 * KL(teacher || student)`.

    `logits` and `taught` (the teacher's logits) are `(n, classes)`, `targets` classes `(n,)` or probabilities
    `(n, classes)`; T^2 keeps the gradients' size whatever the temperature (Hinton et al. 2015, section 2).
    """
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    if taught is None or not recipe.distillation:
        return loss
    student, teacher = ((x.float() / recipe.temperature).log_softmax(1) for x in (logits, taught))
    gap = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return torch.lerp(loss, recipe.temperature**2 * gap, recipe.distillation)


@dataclass
class _Training:
    """A training under way: everything that a checkpoint holds, and how to go on."""

    module: nn.Module
    task: Task
    recipe: Recipe
    split: str
    seed: int
    teacher: nn.Module | None
    device: torch.device
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.images = len(self.task.split(self.split))
        self.steps = steps(self.images, recipe.batch_size)
        self.optimizer = make_optimizer(self.module, recipe)
        self.average = Average(self.module, recipe.ema) if recipe.ema else None
        self.mix = _mixing(recipe, self.task.classes)
        norms = nn.modules.batchnorm._NormBase | nn.GroupNorm | ProxyNorm
        of_norms = {p for m in self.module.modules() if isinstance(m, norms) for p in m.parameters()}
        self.shrinking = [p for p in self.module.parameters() if p.requires_grad and p not in of_norms]

    def train_epoch(self) -> dict[str, float]:
        """Train for one epoch; returns its entry in the history."""
        self.module.train()
        batches = self.task.batches(
            self.split,
            self.recipe.batch_size,
            train=True,
            seed=self.seed,
            epoch=self.epoch,
            randaugment=self.recipe.randaugment,
            mirror=self.recipe.mirror,
            device=self.device,
        )
        start, waited = time.perf_counter(), 0.0
        losses: list[float] = []
        pending: list[Tensor] = []
        for step in range(self.steps):
            before = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - before
            pending.append(self.train_step(step, images, labels))
            if len(pending) == WINDOW or step == self.steps - 1:
                losses += self.checked(pending, len(losses))
                pending.clear()
        self.check_weights()
        seconds = time.perf_counter() - start
        done = {
            "epoch": self.epoch + 1,
            "loss": sum(losses) / self.steps,
            "learning_rate": self.rate(self.steps - 1),
            "seconds": seconds,
            "data_share": waited / seconds,
        }
        self.epoch += 1
        return done

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        # Dropout, drop path and mixup draw from the global generator: seeded in every step, no epoch needs another.
        torch.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, step)).generate_state(1)[0]))
        targets = labels
        if self.mix:
            images, targets = self.mix(images, labels)
        taught = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            if self.teacher is not None and self.recipe.distillation:
                with torch.no_grad():
                    taught = self.teacher(images)
            logits = self.module(images)
        loss = loss_of(logits, targets, self.recipe, taught)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.l2_loss:
            with torch.no_grad():
                for weight in self.shrinking:
                    if weight.grad is not None:
                        weight.grad.add_(weight, alpha=self.recipe.l2_loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        if self.average:
            self.average.update()
        return loss.detach()

    def rate(self, step: int) -> float:
        """The learning rate of a step of this epoch."""
        warmup = round(self.recipe.warmup_epochs * self.steps)
        number, total = self.epoch * self.steps + step, self.recipe.epochs * self.steps
        recipe = self.recipe
        decay = recipe.decay_rate, recipe.decay_epochs
        down = factor(recipe.schedule, number, total, warmup, epoch=self.steps, decay=decay, end=recipe.end_rate)
        return recipe.peak * down

    def checked(self, pending: list[Tensor], first: int) -> list[float]:
        """The losses of the steps from `first` on; `UserError` at the first that is not finite."""
        losses = torch.stack(pending).tolist()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                self.diverged(f"the loss became {loss}", step)
        return losses

    def check_weights(self) -> None:
        """A finite loss may be followed by a step to infinity: such weights must not replace good ones on disk."""
        if not all(tensor.isfinite().all() for tensor in self.module.state_dict().values()):
            self.diverged("a weight became infinite", self.steps - 1)

    def diverged(self, what: str, step: int) -> None:
        raise UserError(
            f"training broke down: {what} in epoch {self.epoch + 1}, step {step + 1} of {self.steps}, at "
            f"learning rate {self.rate(step):.3g}; a lower recipe.learning_rate may help"
        )

    def save(self, path: Path) -> None:
        save_state(
            path,
            {
                "run": self.identity(),
                "epoch": self.epoch,
                "history": self.history,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
            },
        )

    def load(self, path: Path) -> None:
        state = load_state(path)
        known = {"run", "epoch", "history", "module", "optimizer", "average"}
        if set(state) != known:
            raise UserError(f"{path} is not the checkpoint of a training; delete it to start anew")
        for key, here in self.identity().items():
            if (there := state["run"].get(key)) != here:
                raise UserError(f"{path} belongs to another training: {key} is {there!r} there and {here!r} here")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.epoch, self.history = state["epoch"], state["history"]

    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this training."""
        shapes = {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}
        return {
            "task": self.task.name,
            "images": self.images,
            "the list of images": self.task.fingerprint,
            "input": list(self.task.input_shape),
            "split": self.split,
            "seed": self.seed,
            **asdict(self.recipe),
            "the network": shapes,
        }


def _mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2

    mixes = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        if alpha
    ]
    return v2.RandomChoice(mixes)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _contiguous_again(module: nn.Module) -> Iterator[None]:
    """Give the module back in the usual memory layout, which safetensors asks for."""
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
