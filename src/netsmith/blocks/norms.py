"""Normalisation that does not look at other images: group and layer norm, and proxy-normalised activations.

Labatie, Masters, Eaton-Rosen, Luschi 2021, *Proxy-Normalizing Activations to Match Batch Normalization while Removing
Batch Dependence* (arXiv:2106.03743); as used by Masters et al. 2021 (arXiv:2106.03640; graphcore/examples v2.1.0,
`proxy_norm.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from netsmith.errors import unknown

NORMS = {
    "batch": "Batch norm (Ioffe & Szegedy 2015).",
    "group": "Group norm with 4 groups (Wu & He 2018).",
    "layer": "Layer norm over height, width and channels: group norm with one group.",
    "group+proxy": "Group norm with 4 groups, and a proxy-normalised activation.",
    "layer+proxy": "Layer norm, and a proxy-normalised activation.",
}
"""What `norm` of a block may be."""

GROUPS = {"group": 4, "layer": 1}
QUANTILES = 200
PROXY_EPS = 0.03


def make_norm(norm: str, channels: int, *, eps: float, linear: bool) -> nn.Module:
    """The norm of a layer with ``channels``, to be followed by an activation or, with ``linear``, by none.

    In front of a proxy-normalised activation a norm has no scale and shift, which are the activation's; where none
    follows it has a scale alone. Raises: UserError for a name unknown.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=eps)
    base, _, proxy = norm.partition("+")
    made = nn.GroupNorm(math.gcd(GROUPS[base], channels), channels, eps=eps, affine=linear or not proxy)
    if proxy and linear:
        made.register_parameter("bias", None)
    return made


class ProxyNorm(nn.Module):
    """An activation phi whose output has, channel by channel, mean 0 and variance 1 for an assumed Gaussian input.

        z = (phi(gamma y + beta) - m) / sqrt(v + 0.03)

    with m and v the mean and variance of phi(gamma yhat + beta) for yhat = (1 + gamma') q + beta', and q the 200
    mid-point quantiles of the normal distribution (arXiv:2106.03743, section 5). gamma, beta, gamma' and beta' are
    learned, one number a channel, starting at 1, 0, 0, 0. Nothing depends on the batch or on the mode. Of the four,
    gamma' and beta' want weight decay.

    ``x`` is `(n, channels, H, W)`, normalised and without scale and shift.
    """

    quantiles: Tensor

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.proxy_scale = nn.Parameter(torch.zeros(channels))
        self.proxy_shift = nn.Parameter(torch.zeros(channels))
        middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
        quantiles = math.sqrt(2) * torch.erfinv(2 * middles - 1)
        self.register_buffer("quantiles", quantiles.to(torch.get_default_dtype()), persistent=False)

    def proxy(self) -> tuple[Tensor, Tensor]:
        """m and 1 / sqrt(v + 0.03), `(channels,)` each, in single precision at least."""
        kind = torch.promote_types(self.scale.dtype, torch.float32)
        learned = (self.scale, self.shift, self.proxy_scale, self.proxy_shift)
        gamma, beta, gamma_, beta_ = (parameter.to(kind)[:, None] for parameter in learned)
        a = self.act(gamma * ((1 + gamma_) * self.quantiles.to(kind) + beta_) + beta)
        mean = a.mean(1)
        variance = (a - mean[:, None]).square().mean(1)
        return mean, (variance + PROXY_EPS).rsqrt()

    def unscaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """phi(gamma x + beta) - m, and the factor that is left, `(channels, 1, 1)`."""
        mean, factor = self.proxy()
        y = self.act(torch.addcmul(self.shift[:, None, None], x, self.scale[:, None, None]))
        return y - mean[:, None, None].to(y.dtype), factor[:, None, None].to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, factor = self.unscaled(x)
        return y * factor
