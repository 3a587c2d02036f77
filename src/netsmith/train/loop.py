"""The training loop: forward, loss, backward, step, epoch by epoch; what happens is visible here.

Several replicas (`train/replicas.py`) train as one would: each takes its part of every batch, an image is changed the
same whoever takes it, gradients are averaged over all images. What stays different is said in `train`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from netsmith.blocks.norms import ProxyNorm
from netsmith.errors import UserError
from netsmith.tasks.classification import Task, share, steps
from netsmith.train.allocator import keep_freed_memory
from netsmith.train.checkpoint import load_state, save_state
from netsmith.train.group_batchnorm import agree, groups_of, over_groups, plain
from netsmith.train.optimizers import Average, make_optimizer
from netsmith.train.recipe import Recipe, stage
from netsmith.train.replicas import ALONE, Replica
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
    replica: Replica = ALONE,
    save_every: int | None = None,
    watch: str | None = None,
    loaders: int = 0,
    compiled: bool = False,
) -> list[dict[str, float]]:
    """Train `module` in place on a split; it ends on `device`, in eval mode, with the averaged weights.

    `module` maps images `(n, C, H, W)` to logits `(n, classes)`. `checkpoint` is written after each epoch, and every
    `save_every` steps, and continued where it exists: the result is bit for bit that of an undisturbed run with the
    same number of threads and replicas.

    With several replicas, all call this with the same arguments; the first writes the checkpoint, which any number of
    them can go on with. Batch norm is taken over groups of them (`train.group_batchnorm.groups_of`). If that is all of
    them, the result is that of one process, up to rounding and to the draws of dropout and drop path.

    `watch`: a split that is scored after each epoch, with the averaged weights. `loaders`: processes that read images
    ahead, for each replica. `compiled`: through torch.compile.

    Returns what happened, a dict for each epoch: epoch (from 1), loss (mean of its steps), learning_rate (the last
    one), seconds (without `watch`), data_share (part of the seconds spent on waiting for batches), accuracy (of
    `watch`). `on_epoch` sees each of them as it comes; in a continued run also those of the epochs done before.

    Raises `UserError` when the loss is no longer finite (the last good checkpoint remains), when the disk is full,
    when the checkpoint is damaged or of another run, and for batches that cannot be divided over the replicas.
    """
    if recipe.distillation and teacher is None:
        raise UserError(f"recipe.distillation is {recipe.distillation}, but there is no teacher to learn from")
    keep_freed_memory()
    for network in (module, *([] if teacher is None else [teacher])):
        # Channels last: small networks train about twice as fast on the CPU.
        network.to(device=torch.device(device), memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if replica.count > 1:
        over_groups(module, groups_of(recipe, replica.count))
    run = _Training(module, task, recipe, split, seed, teacher, torch.device(device), replica, loaders, checkpoint)
    with _own_random_numbers(run.device), _as_before(module):
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
            for past in run.history:
                if on_epoch:
                    on_epoch(past)
        run.share_work(compiled)  # all replicas meet here: none writes before all have read
        while run.epoch < recipe.epochs:
            done = run.train_epoch(save_every)
            if watch is not None:
                done["accuracy"] = run.accuracy(watch)
            run.history.append(done)
            run.save()
            if on_epoch:
                on_epoch(done)
        if run.average:
            run.average.swap()
    module.eval()
    return run.history


def evaluate(
    module: nn.Module,
    task: Task,
    split: str,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    resolution: int | None = None,
    replica: Replica = ALONE,
    loaders: int = 0,
) -> float:
    """Top-1 accuracy on a split, 0 to 1. `module` is moved to `device` and left in the mode it was in.

    `resolution`: pixels a side, in place of the task's own.

    Several replicas share the work; each image counts once, whatever their number, so that nothing has to be padded.
    """
    training = module.training
    module.to(device).eval()
    right = torch.zeros(2, dtype=torch.int64, device=device)
    part = replica.rank, replica.count
    with torch.no_grad():
        for images, labels in task.batches(
            split, batch_size, train=False, resolution=resolution, part=part, device=device, loaders=loaders
        ):
            if len(labels):
                hits = (module(images).argmax(1) == labels).sum()
                right += torch.stack([hits, torch.full_like(hits, len(labels))])
    module.train(training)
    hits, seen = replica.total(right).tolist()
    return hits / seen


def loss_of(logits: Tensor, targets: Tensor, recipe: Recipe, taught: Tensor | None = None) -> Tensor:
    """Cross-entropy with label smoothing, and the teacher's part: `(1 - w) * CE + w * T^2 * KL(teacher || student)`.

    `logits` and `taught` (the teacher's logits) are `(n, classes)`, `targets` classes `(n,)` or probabilities
    `(n, classes)`; T^2 keeps the gradients' size whatever the temperature (Hinton et al. 2015, section 2).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
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
    replica: Replica = ALONE
    loaders: int = 0
    checkpoint: Path | None = None
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the steps of this epoch that are done."""
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.images = len(self.task.split(self.split))
        self.steps = steps(self.images, recipe.batch_size)
        self.optimizer = make_optimizer(self.module, recipe)
        self.average = Average(self.module, recipe.ema) if recipe.ema else None
        norms = nn.modules.batchnorm._NormBase | nn.GroupNorm | ProxyNorm
        of_norms = {p for m in self.module.modules() if isinstance(m, norms) for p in m.parameters()}
        self.shrinking = [p for p in self.module.parameters() if p.requires_grad and p not in of_norms]
        self.forward: Callable[[Tensor], Tensor] = self.module
        smallest, parts = self.images // self.steps, self.replica.count * recipe.accumulate
        if smallest < parts:
            raise UserError(
                f"batches of {smallest} images cannot be divided over {self.replica.count} replicas and "
                f"{recipe.accumulate} parts: larger batches or fewer of these are needed"
            )

    def share_work(self, compiled: bool) -> None:
        """Let gradients be averaged over the replicas."""
        network = self.module
        if compiled:
            network = cast(nn.Module, torch.compile(self.module))
        if self.replica.count > 1:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                # PyTorch 2.15 has another word for it, which 2.11 does not know.
                network = DistributedDataParallel(network, broadcast_buffers=False)
        self.forward = network

    def train_epoch(self, save_every: int | None) -> dict[str, float]:
        """Train to the end of the epoch; returns its entry in the history."""
        self.module.train()
        size, strength = stage(self.recipe, self.epoch)
        self.mix = _mixing(self.recipe, strength, self.task.classes)
        for part in self.module.modules():
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()  # what is frozen keeps its statistics too
        batches = self.task.batches(
            self.split,
            self.recipe.batch_size,
            train=True,
            seed=self.seed,
            epoch=self.epoch,
            first=len(self.losses),
            part=(self.replica.rank, self.replica.count),
            led=self.mix is not None,
            augmented=self.recipe.augmented,
            randaugment=round(strength * self.recipe.randaugment),
            autoaugment=self.recipe.autoaugment,
            mirror=self.recipe.mirror,
            resolution=size,
            device=self.device,
            loaders=self.loaders,
        )
        start, waited = time.perf_counter(), 0.0
        pending: list[Tensor] = []
        for step in range(len(self.losses), self.steps):
            before = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - before
            pending.append(self.train_step(step, images, labels))
            last, due = step == self.steps - 1, save_every is not None and (step + 1) % save_every == 0
            if len(pending) == WINDOW or last or due:
                self.losses += self.checked(pending)
                pending.clear()
            if due and not last:
                self.agree()
                self.check_weights()
                self.save()
        self.agree()
        self.check_weights()
        seconds = time.perf_counter() - start
        done = {
            "epoch": self.epoch + 1,
            "loss": sum(self.losses) / self.steps,
            "learning_rate": self.rate(self.steps - 1),
            "seconds": seconds,
            "data_share": waited / seconds,
        }
        self.epoch += 1
        self.losses = []
        return done

    def train_step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One step on this replica's part of a batch; returns the part of the loss that is its own."""
        # Dropout, drop path and mixup draw from the global generator: seeded in every step, no epoch needs another.
        self.draw_anew(step, 0)
        targets = labels
        if self.mix:  # each image is mixed with the one before it: the first came along for that
            images, targets = self.mix(images, labels)
            images, targets = images[1:], targets[1:]
        self.draw_anew(step, 1 + self.replica.rank)
        self.optimizer.zero_grad()
        whole = len(range(step, self.images, self.steps))  # of this batch, over all replicas
        loss = images.new_zeros(())
        parts = self.recipe.accumulate
        for number in range(parts):
            mine = share(len(images), number, parts)
            some = slice(mine.start, mine.stop)
            loss += self.backward(images[some], targets[some], len(mine) / whole, last=number == parts - 1)
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
        return loss

    def backward(self, images: Tensor, targets: Tensor, weight: float, *, last: bool) -> Tensor:
        """Add to the gradients what these images, `weight` of the batch, contribute; returns that part of the loss."""
        taught = None
        # Gradients travel once a step, with the last part of it.
        waiting = isinstance(self.forward, DistributedDataParallel) and not last
        with self.forward.no_sync() if waiting else nullcontext():  # type: ignore[attr-defined]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                if self.teacher is not None and self.recipe.distillation:
                    with torch.no_grad():
                        taught = self.teacher(images)
                logits = self.forward(images)
            loss = weight * loss_of(logits, targets, self.recipe, taught)
            (loss * self.replica.count).backward()  # their mean over the replicas is then the mean over the images
        return loss.detach()

    def draw_anew(self, *purpose: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, *purpose)).generate_state(1)[0]))

    def accuracy(self, split: str) -> float:
        """On a split, with the averaged weights."""
        if self.average:
            self.average.swap()
        found = evaluate(self.module, self.task, split, device=self.device, replica=self.replica, loaders=self.loaders)
        if self.average:
            self.average.swap()
        return found

    def rate(self, step: int) -> float:
        """The learning rate of a step of this epoch."""
        warmup = round(self.recipe.warmup_epochs * self.steps)
        number, total = self.epoch * self.steps + step, self.recipe.epochs * self.steps
        recipe = self.recipe
        down = factor(
            recipe.schedule, number, total, warmup, epoch=self.steps, rate=recipe.decay_rate,
            every=recipe.decay_epochs, at=recipe.decay_at, end=recipe.end_rate,
        )  # fmt: skip
        return recipe.peak * down

    def checked(self, pending: list[Tensor]) -> list[float]:
        """The losses of the newest steps, over all replicas; `UserError` at the first that is not finite."""
        losses = self.replica.total(torch.stack(pending)).tolist()
        for step, loss in enumerate(losses, len(self.losses)):
            if not math.isfinite(loss):
                self.diverged(f"the loss became {loss}", step)
        return losses

    def check_weights(self) -> None:
        """A finite loss may be followed by a step to infinity: such weights must not replace good ones on disk."""
        if self.broken():
            self.diverged("a weight became infinite", len(self.losses) - 1)

    def broken(self) -> list[str]:
        """The names of the weights and buffers that are not finite."""
        return [name for name, tensor in self.module.state_dict().items() if not tensor.isfinite().all()]

    def diverged(self, what: str, step: int) -> None:
        names = self.broken()
        more = f" and {len(names) - 1} more" if names[1:] else ""
        among = f" (not finite now: {names[0]}{more})" if names else ""
        raise UserError(
            f"training broke down: {what} in epoch {self.epoch + 1}, step {step + 1} of {self.steps}, at learning rate "
            f"{self.rate(step):.3g}{among}; a lower recipe.learning_rate may help"
        )

    def agree(self) -> None:
        """Let all replicas have the same statistics of batch norm: what groups saw, averaged."""
        if self.replica.count > 1:
            own = {name: tensor for name, tensor in self.module.named_buffers() if tensor.is_floating_point()}
            averaged = zip(self.average.names, self.average.mean, strict=True) if self.average else ()
            agree([*own.values(), *(mean for name, mean in averaged if name in own)])

    def save(self) -> None:
        """Write the checkpoint, if there is to be one; the first replica does, for all have the same state."""
        if self.checkpoint is None or not self.replica.first:
            return
        save_state(
            self.checkpoint,
            {
                "run": self.identity(),
                "epoch": self.epoch,
                "losses": self.losses,
                "history": self.history,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
            },
        )

    def load(self, path: Path) -> None:
        state = load_state(path)
        known = {"run", "epoch", "losses", "history", "module", "optimizer", "average"}
        if set(state) != known:
            raise UserError(f"{path} is not the checkpoint of a training; delete it to start anew")
        for key, here in self.identity().items():
            if (there := state["run"].get(key)) != here:
                raise UserError(f"{path} belongs to another training: {key} is {there!r} there and {here!r} here")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.epoch, self.losses, self.history = state["epoch"], state["losses"], state["history"]

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


def _mixing(recipe: Recipe, strength: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2

    mixes = [
        kind(alpha=strength * alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        if alpha
    ]
    return v2.RandomChoice(mixes)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Give the module back with ordinary norms and in the usual memory layout, which safetensors asks for."""
    try:
        yield
    finally:
        plain(module)
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
