"""Uniform quantisers as functions: real numbers in, evenly spaced numbers that a few bits can name out.

`symmetric` and `affine` lay a `Grid` over a range; DoReFa (Zhou et al. 2016, arXiv:1606.06160), PACT (Choi et al. 2018,
arXiv:1805.06085), LSQ (Esser et al. 2020, arXiv:1902.08153) and HWGQ (Cai et al. 2017, arXiv:1702.00953) each have a
range and a gradient of their own.

Rounding is half to even, as in numpy and torch: 0.5, 1.5, 2.5 become 0, 2, 2. C kernels often round half away from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from netsmith.errors import UserError

Rounding = Callable[[Tensor], Tensor]

HWGQ_STEPS = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
"""Bits -> step of activations: least squared error for the positive half of a normal distribution."""
GAUSSIAN_STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.336}
"""Bits -> step of weights, in standard deviations: least squared error for a normal distribution."""


def check_bits(what: str, bits: int, *, least: int, most: int = 32) -> None:
    """Raises: UserError for bits outside of ``least`` to ``most``."""
    if bits not in range(least, most + 1):
        raise UserError(f"{what} takes {least} to {most} bits; given: {bits}")


def straight(seen: Tensor, value: Tensor) -> Tensor:
    """``value`` going forward, the gradient of ``seen`` going back (Bengio et al. 2013, arXiv:1308.3432)."""
    # What is added is exactly zero, where value + (seen - value) would round.
    return value.detach() + (seen - seen.detach())


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` between low and high; the gradient is 1 inside and on the limits (`torch.clamp` has had 0 and 1 there)."""
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def nearest(x: Tensor) -> Tensor:
    """The nearest integer, half to even; the gradient passes as if nothing was done."""
    return straight(x, x.round())


def stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """The integer below or, with the chance of the fraction, the one above, so that the mean is ``x`` (Gupta et al.
    2015, arXiv:1502.02551); the gradient passes as if nothing was done.

    >>> grid(x, rounding=functools.partial(stochastic, generator=generator))
    """
    below = x.detach().floor()
    above = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) < x - below
    return straight(x, below + above)


class Grid(NamedTuple):
    """The numbers scale * (q - zero) for the integers q from low to high."""

    scale: Tensor
    """Above zero; any shape that broadcasts with what is quantised, as ``(outputs, 1, 1, 1)`` for one a channel."""
    zero: Tensor
    """Whole numbers, of the shape of ``scale``: the code of 0."""
    low: int
    high: int

    def codes(self, x: Tensor, rounding: Rounding = nearest) -> Tensor:
        """q for every number, in the type of ``x``. The gradient is 1 / scale where q does not clip, as in PyTorch's
        fake quantisation: rounding first keeps the largest number, which the scale was made of, inside."""
        return clip(rounding(x / self.scale) + self.zero, self.low, self.high)

    def __call__(self, x: Tensor, rounding: Rounding = nearest) -> Tensor:
        """``x`` moved to the grid; the gradient is 1 where nothing clips, else 0."""
        return (self.codes(x, rounding) - self.zero) * self.scale


def span(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest, without gradient: a number each or, with ``axis``, one for every index along it, in a shape
    that broadcasts with ``x``."""
    x, others = x.detach(), [d for d in range(x.dim()) if d != axis]
    return x.amin(others, keepdim=axis is not None), x.amax(others, keepdim=axis is not None)


def symmetric(low: Tensor, high: Tensor, bits: int, *, narrow: bool = False) -> Grid:
    """scale = max|x| / n with n = 2^(bits-1) - 1; codes from -n - 1 (HAWQ) or, ``narrow``, from -n (many backends).

    ``low`` and ``high``: ends of the range, of any shape. Raises: UserError for 1 bit, which leaves nothing above zero.

    >>> symmetric(*span(weight, axis=0), bits=4)(weight)
    """
    check_bits("a symmetric grid", bits, least=2)
    n = 2 ** (bits - 1) - 1
    scale = _not_zero(torch.maximum(-low, high) / n)
    return Grid(scale, torch.zeros_like(scale), -n if narrow else -n - 1, n)


def affine(low: Tensor, high: Tensor, bits: int) -> Grid:
    """scale = (high - low) / (2^bits - 1), zero = round(-low / scale), codes from 0; the range is widened to hold 0.

    What is never negative, as after a ReLU, gets zero = 0: the unsigned grid. ``low`` and ``high``: ends of the range,
    of any shape. Raises: UserError for bits outside of 1 to 32.
    """
    check_bits("an affine grid", bits, least=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _not_zero((high - low) / (2**bits - 1))
    return Grid(scale, (-low / scale).round(), 0, 2**bits - 1)


def _not_zero(scale: Tensor) -> Tensor:
    """1 for a scale of 0: where all is 0, any scale says so."""
    return torch.where(scale == 0, 1.0, scale)


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """2 round(r (2^bits - 1)) / (2^bits - 1) - 1 with r = tanh(w) / (2 max|tanh w|) + 1/2; with 1 bit sign(w) mean|w|,
    whose gradient passes whole. Raises: UserError for bits outside of 1 to 32."""
    check_bits("DoReFa", bits, least=1)
    if bits == 1:
        return straight(weight, torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean())
    levels, bounded = 2**bits - 1, weight.tanh()
    r = bounded / (2 * _not_zero(bounded.abs().amax())) + 0.5
    return 2 * nearest(r * levels) / levels - 1


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """round(x (2^bits - 1)) / (2^bits - 1), ``x`` clipped to [0, 1]. Raises: UserError for bits outside of 1 to 32."""
    check_bits("DoReFa", bits, least=1)
    levels = 2**bits - 1
    return nearest(clip(x, 0, 1) * levels) / levels


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """``x`` clipped to [0, alpha] and rounded to 2^bits levels. dL/dalpha is the sum of dL/dy over x >= alpha.

    ``alpha``: a number above zero. Raises: UserError for bits outside of 1 to 32.
    """
    check_bits("PACT", bits, least=1)
    levels = 2**bits - 1
    y = torch.where(x >= alpha, alpha, x.relu())
    return straight(y, (y * levels / alpha).round() * alpha / levels)


def lsq_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code, -Qn and Qp. Raises: UserError for 1 bit with a sign, which has Qp = 0."""
    check_bits("LSQ with a sign" if signed else "LSQ", bits, least=2 if signed else 1)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq_scale(x: Tensor, high: int, axis: int | None = None) -> Tensor:
    """Where LSQ's scale starts, 2 mean|x| / sqrt(Qp); with ``axis`` one for every index along it."""
    size = x.detach().abs()
    mean = size.mean() if axis is None else size.transpose(0, axis).flatten(1).mean(1)
    return 2 * mean / math.sqrt(high)


def lsq(x: Tensor, scale: Tensor, low: int, high: int, factor: float = 1.0) -> Tensor:
    """scale * round(clip(x / scale, low, high)), with LSQ's gradients.

    d/dx = 1 for low < x / scale < high, else 0; d/dscale = low or high outside, round(x / scale) - x / scale inside,
    times ``factor``, which is 1 / sqrt(N high) for N numbers that share a scale. ``scale``: above zero, of a shape that
    broadcasts with ``x``.
    """
    scale = scale.detach() + factor * (scale - scale.detach())
    v = x / scale
    # Unlike in `clip`, what lies on a limit belongs to the scale and not to x.
    clipped = torch.where(v <= low, low, torch.where(v >= high, high, v))
    return nearest(clipped) * scale


def hwgq_activation(x: Tensor, bits: int) -> Tensor:
    """Half-wave Gaussian quantisation of what a batch norm put out, ReLU included: multiples of a fixed step, up to
    2^bits - 1 of them. The gradient is 1 inside. Raises: UserError for bits outside of 1 to 4."""
    check_bits("HWGQ", bits, least=1, most=4)
    step = HWGQ_STEPS[bits]
    clipped = clip(x, 0, (2**bits - 1) * step)
    return straight(clipped, (clipped / step).round() * step)


def hwgq_weight(weight: Tensor, bits: int) -> Tensor:
    """EdMIPS' uniform quantiser of normal weights (arXiv:2004.05795): odd multiples of half a step, so 0 is none of
    them; the gradient passes whole. Raises: UserError for bits outside of 1 to 4."""
    check_bits("the Gaussian quantiser", bits, least=1, most=4)
    step = GAUSSIAN_STEPS[bits] * weight.detach().std()
    edge = (2**bits / 2 - 0.5) * step
    value = ((weight / step + 0.5).round() - 0.5) * step
    return straight(weight, torch.minimum(torch.maximum(value, -edge), edge))
