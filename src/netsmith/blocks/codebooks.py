"""Weights that take a few values, not evenly spaced: binary, ternary, powers of two, centroids.

BinaryConnect (Courbariaux et al. 2015, arXiv:1511.00363), BWN (Rastegari et al. 2016, arXiv:1603.05279), TWN (Li et al.
2016, arXiv:1605.04711), TTQ (Zhu et al. 2017, arXiv:1612.01064), INQ's powers of two (Zhou et al. 2017,
arXiv:1702.03044), Deep Compression's k-means (Han et al. 2016, arXiv:1510.00149).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from netsmith.blocks.quantizers import check_bits, clip, straight


def window(weight: Tensor) -> Tensor:
    """What BinaryConnect's gradient sees: 1 where |w| <= 1, else 0.

    The limits count as inside: latent weights are clipped to them after every step, and would never leave them again.
    """
    return clip(weight, -1, 1)


def binary(weight: Tensor, seen: Callable[[Tensor], Tensor] = window) -> Tensor:
    """The sign, with sign(0) = +1; the gradient of ``seen``: `window`, `torch.tanh`, or `torch.clone` for all of it."""
    return straight(seen(weight), torch.where(weight >= 0, 1.0, -1.0).to(weight))


def bwn(weight: Tensor, axis: int | None = 0) -> Tensor:
    """sign(w) mean|w|, the mean for each index along ``axis`` (output channels) or with None for all; gradient as in
    `binary`, the scale counts as a constant."""
    size = weight.detach().abs()
    scale = size.mean() if axis is None else size.mean([d for d in range(weight.dim()) if d != axis], keepdim=True)
    return straight(window(weight), scale * binary(weight))


def twn(weight: Tensor) -> Tensor:
    """alpha sign(w) where |w| > Delta, else 0; Delta = 0.7 mean|w|, alpha the mean |w| above it. The gradient passes
    whole."""
    size = weight.detach().abs()
    large = size > 0.7 * size.mean()
    alpha = (size * large).sum() / large.sum().clamp(min=1)
    return straight(weight, alpha * weight.sign() * large)


def ttq_sets(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Which weights TTQ makes positive and which negative: beyond 0.05 max|w|."""
    delta = 0.05 * weight.detach().abs().amax()
    return weight > delta, weight < -delta


def ttq(weight: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """``positive``, 0 or -``negative``, two learned numbers above zero.

    dL/dpositive is the sum of dL/dQ over the positive set; dL/dnegative minus the sum over the negative one, as Q is
    -negative there. The weights get dL/dQ times positive, 1 or negative.
    """
    above, below = ttq_sets(weight)
    value = torch.where(above, positive, torch.where(below, -negative, 0.0))
    factor = torch.where(above, positive, torch.where(below, negative, 1.0)).detach()
    return value + factor * (weight - weight.detach())


def power_of_two(weight: Tensor, bits: int) -> Tensor:
    """sign(w) 2^round(log2|w|), and 0 for 0. There are 2^(bits-1) - 1 exponents, up to the highest that occurs; lower
    ones are raised to the lowest of them. The gradient passes whole. Raises: UserError for 1 bit, which leaves none."""
    check_bits("a power of two", bits, least=2)
    latent = weight.detach()
    exponent = latent.abs().log2().round()  # of 0: minus infinity
    top = exponent.amax()
    exponent = torch.where(latent == 0, 0, exponent.clamp(min=top - 2 ** (bits - 1) + 2))
    return straight(weight, torch.ldexp(latent.sign(), exponent.int()))


def kmeans(weight: Tensor, bits: int, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """The 2^bits centroids, ascending, and for every weight the index of its own, of the shape of ``weight``.

    Lloyd's algorithm from evenly spaced centroids, as Deep Compression found best, until nothing changes or for
    ``rounds``. A centroid that no weight is nearest to stays. Raises: UserError for bits outside of 1 to 16.
    """
    check_bits("k-means", bits, least=1, most=16)
    values = weight.detach().flatten()
    centroids = torch.lerp(values.amin(), values.amax(), torch.linspace(0, 1, 2**bits).to(values))
    codes = torch.zeros_like(values, dtype=torch.long)
    for _ in range(rounds):
        before, codes = codes, torch.bucketize(values, (centroids[1:] + centroids[:-1]) / 2)
        if torch.equal(before, codes):
            break
        count = torch.bincount(codes, minlength=len(centroids))
        mean = torch.zeros_like(centroids).index_add(0, codes, values) / count
        centroids = torch.where(count > 0, mean, centroids)
    return centroids, codes.view(weight.shape)
