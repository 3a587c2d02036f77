"""LARS (You, Gitman, Ginsburg 2017, arXiv:1708.03888), exactly as tensorflow/tpu trains EfficientNet with it.

For a weight w with gradient g (`models/official/efficientnet/lars_optimizer.py`):

    trust = eeta |w| / (|g| + lambda |w| + eps)     where |w| > 0 and |g| > 0, else 1
    m <- mu m + eta trust (g + lambda w)            w <- w - m

The norms are of whole tensors, in single precision, |g| before weight decay is added. The learning rate eta lies inside
m: a later rate does not change past steps. Biases and the numbers of norms are not adapted: m <- mu m + eta g. timm's
Lars differs in all of these: the rate comes after the momentum, eps is 1e-8, and what has no decay is not adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """Groups of parameters may hold ``adapt: False`` for plain momentum SGD without weight decay.

    Args: ``lr`` eta, ``momentum`` mu, ``weight_decay`` lambda, ``trust`` eeta, ``eps``; ``nesterov`` steps by
    mu m + (the new summand) instead of m.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        trust: float = 1e-3,
        eps: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, {**own, "nesterov": nesterov, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for w in group["params"]:
                if (g := w.grad) is None:
                    continue
                if group["adapt"]:
                    size_w, size_g = _norm(w), _norm(g)
                    trust = group["trust"] * size_w / (size_g + decay * size_w + group["eps"])
                    trust = torch.where((size_w > 0) & (size_g > 0), trust, 1.0)
                    added = (rate * trust).to(w.dtype) * torch.add(g, w, alpha=decay)
                else:
                    added = rate * g
                m = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                m.mul_(momentum).add_(added)
                w.sub_(added + momentum * m if group["nesterov"] else m)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
