"""Batch norm statistics of a network that inherited its weights: those it inherited are of other networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running mean and variance of every batch norm by their means over ``batches`` of images `(n, C, H, W)`.

    Single-path supernets need it before a network is scored (Guo et al. 2019, arXiv:1904.00420, section 3.4). Nothing
    else changes: dropout is off, modes stay as they were, and of an empty ``batches`` the statistics do too.
    """
    modes = {part: part.training for part in module.modules()}
    norms = [part for part in modes if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for number, images in enumerate(batches, start=1):
        for norm in norms:
            norm.train()
            norm.momentum = 1 / number  # the running mean is then the plain one, and of what was there nothing stays
        module(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for part, training in modes.items():
        part.training = training
