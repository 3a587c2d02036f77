"""How much the loss bends along each layer's weights: the trace of its Hessian, by Hutchinson's estimator.

As in PyHessian (Yao et al. 2020, arXiv:1912.07145) and HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852), whose code for it
is not published. Per layer: the trace of the block of the Hessian that is about this layer's weight alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def trace(
    gradient: Tensor, weight: Tensor, generator: torch.Generator, *, draws: int = 100, tolerance: float = 1e-3
) -> float:
    """The trace of d gradient / d weight: the mean of v·Hv over vectors v of random signs.

    ``gradient``: of the loss, of the shape of ``weight``, with a graph (``create_graph=True``). At most ``draws``; ends
    when one more changes the mean by less than ``tolerance``, relatively and up or down. Exact with one draw where the
    Hessian is diagonal. Traces may be negative: away from a minimum a loss bends downwards, too.
    """
    if not gradient.requires_grad:
        return 0.0
    mean = 0.0
    for number in range(1, draws + 1):
        signs = torch.randint(0, 2, weight.shape, generator=generator, device=generator.device).to(weight) * 2 - 1
        (product,) = torch.autograd.grad(gradient, weight, signs, retain_graph=True, materialize_grads=True)
        change = (float((signs * product).sum()) - mean) / number
        settled = number > 1 and abs(change) < tolerance * abs(mean)
        mean += change
        if settled:
            break
    return mean


def traces(
    network: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    layers: Iterable[str],
    generator: torch.Generator,
    *,
    draws: int = 100,
    tolerance: float = 1e-3,
) -> dict[str, float]:
    """Path -> trace of the Hessian of ``loss`` with respect to that layer's weight.

    ``loss(network)``: a number, from one fixed batch. It is given a copy in eval mode; ``network`` stays untouched.
    ``draws`` and ``tolerance`` as in `trace`, for each layer.

    >>> traces(network, lambda n: F.cross_entropy(n(images), targets), ["head.1"], generator)
    """
    shadow = copy.deepcopy(network).eval().requires_grad_(False)
    weights = {path: shadow.get_parameter(f"{path}.weight").requires_grad_() for path in layers}
    gradients = torch.autograd.grad(loss(shadow), list(weights.values()), create_graph=True, materialize_grads=True)
    return {
        path: trace(gradient, weight, generator, draws=draws, tolerance=tolerance)
        for (path, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def omega(trace: float, weight: Tensor, quantized: Tensor) -> float:
    """HAWQ's sensitivity: trace / n times the squared error of the weight's n numbers.

    ``weight`` and ``quantized``: one shape. A negative trace counts as 0 (ours): no error makes a network better.
    """
    return max(trace, 0.0) / weight.numel() * float((quantized - weight).detach().square().sum())
