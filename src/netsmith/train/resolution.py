"""Train on small images, finish on large ones (Masters et al. 2021, arXiv:2106.03640; Tan & Le 2021, arXiv:2104.00298).

The stages of a training are `Recipe.resolutions`; here is where their sizes come from, and what comes after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from netsmith.errors import UserError
from netsmith.tasks.classification import Task
from netsmith.train.batchnorm import recalibrate
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe
from netsmith.train.replicas import ALONE, Replica

CALIBRATION = 8
"""Batches that give batch norm its statistics at the new size."""


def progressive(last: int, count: int = 4, first: int = 128) -> tuple[int, ...]:
    """Sizes of a progressive training, as google/automl computes them: the first stage is above ``first`` already.

    >>> progressive(300)
    (171, 214, 257, 300)
    """
    return tuple(int(first + (last - first) * (number + 1) / count) for number in range(count))


def tuning(recipe: Recipe) -> Recipe:
    """How the last layers are tuned after a training by this recipe."""
    return replace(
        recipe,
        epochs=recipe.tune_epochs,
        optimizer="sgd",
        learning_rate=recipe.tune_rate,
        rate_per=512,
        weight_decay=0.0,
        l2_loss=0.0,
        schedule="cosine",
        warmup_epochs=0.0,
        ema=None,
        mixup=0.0,
        cutmix=0.0,
        randaugment=0,
        autoaugment=False,
        mirror=False,
        augmented=False,
        resolutions=(),
        tune_epochs=0,
    )


def tune(
    module: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    split: str = "train",
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    replica: Replica = ALONE,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the last ``recipe.tune_layers`` children of a network for ``recipe.tune_epochs`` at the task's resolution.

    Batch norms first take their statistics at that size; every parameter before the last layers stays as it was, to
    the bit. ``options`` are those of `train`.

    Raises: UserError as `train`, and where the network has fewer children.
    """
    parts = list(module.children())
    if len(parts) < recipe.tune_layers:
        raise UserError(f"recipe.tune_layers is {recipe.tune_layers}; the network has {len(parts)} parts")
    if checkpoint is None or not checkpoint.exists():
        size, device = recipe.batch_size, options.get("device", "cpu")
        batches = task.batches(split, size, train=True, seed=seed, augmented=False, device=device)
        recalibrate(module, [images for images, _ in islice(batches, CALIBRATION)])
    top = {parameter for part in parts[-recipe.tune_layers :] for parameter in part.parameters()}
    frozen = [p for p in module.parameters() if p.requires_grad and p not in top]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return train(
            module, task, tuning(recipe), split=split, seed=seed, checkpoint=checkpoint, on_epoch=on_epoch,
            replica=replica, **options,
        )  # fmt: skip
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def sweep(
    module: nn.Module, task: Task, split: str, resolutions: Sequence[int], **options: Any
) -> list[tuple[int, float]]:
    """Accuracy on a split at each size of the same images, 0 to 1. ``options`` are those of `evaluate`."""
    return [(size, evaluate(module, task, split, resolution=size, **options)) for size in resolutions]
