"""The recipe's optimizer, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsmith.train.recipe import Recipe


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer over all parameters that want gradients; weight decay on those of two and more dimensions, and on
    what proxy norm assumes of its input."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if recipe.optimizer == "lars":
        from netsmith.train.lars import Lars

        # Neither decay nor a trust ratio for what is one number a channel: proxy norm's start at 0, with no size.
        of_size = {adapt: [p for _, p in named if (p.ndim > 1) == adapt] for adapt in (True, False)}
        groups = [{"params": p, "adapt": adapt} for adapt, p in of_size.items() if p]
        return Lars(groups, recipe.peak, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in named:
        parts[p.ndim > 1 or name.rpartition(".")[2].startswith("proxy_")].append(p)
    groups = [{"params": p, "weight_decay": recipe.weight_decay if decays else 0.0} for decays, p in parts.items() if p]
    if recipe.optimizer == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(groups, lr=recipe.peak, betas=(recipe.momentum, 0.999))
    if recipe.optimizer == "rmsprop":
        # torch's has eps outside the root, the rate outside the momentum and starts at 0: a different optimizer
        # (timm issues 11, 45). 3 s to import, so only here.
        from timm.optim.rmsprop_tf import RMSpropTF

        alpha, eps = recipe.rmsprop_decay, recipe.rmsprop_eps
        return RMSpropTF(groups, lr=recipe.peak, alpha=alpha, eps=eps, momentum=recipe.momentum)
    # fused: one kernel for all tensors; a small network has 100 of them and would wait for Python otherwise.
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak, betas=(recipe.momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=recipe.peak, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)


class Average:
    """Exponential moving average of a module's floating-point state (weights and batch norm statistics).

    average <- d * average + (1 - d) * live with d = min(decay, (1 + n) / (10 + n)) at update n, so that the random
    start is forgotten early (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        self.names, self.live = list(state), list(state.values())
        self.mean = [tensor.clone() for tensor in self.live]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for mean, live in zip(self.mean, self.live, strict=True):
            mean.lerp_(live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the module's weights; twice is as if nothing had been."""
        for mean, live in zip(self.mean, self.live, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        return {"updates": self.updates, "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for mean, stored in zip(self.mean, state["mean"], strict=True):
            mean.copy_(stored)
