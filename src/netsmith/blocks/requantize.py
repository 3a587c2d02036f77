"""Integers only: from the sums of a layer to the codes of the next by a multiplication and a shift.

Jacob et al. 2018 (arXiv:1712.05877); rounded as in HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680).

A layer of codes q_in and q_w sums them to an integer a; its real output is s_in s_w a. The next layer's code is
round(a M) with M = s_in s_w / s_out, and M = m / 2^e with whole m makes that exact integer arithmetic.

The fake-quantised path has the same sums, times their scale. Its codes are the same bit for bit where it computes on
the integers, or with scales that are powers of two. Else it rounds on its way, and M is off by a share of 2^-31 at
most: a sum halfway between two codes may then fall on another side. There are such sums: s_out often comes from the
largest, and half of that one is code 127.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from netsmith.errors import UserError


def dyadic(factor: Tensor) -> tuple[Tensor, Tensor]:
    """m and e, int64 and of the shape of ``factor``, with m / 2^e the nearest to it and 2^30 <= m < 2^31.

    ``factor``: float64, scale of weights times scale of inputs over scale of outputs, one number or one a channel.
    Raises: UserError for a factor that is not above 2^-31 and below 2^30, where the shift is 1 to 62.

    >>> dyadic(torch.tensor(0.0123, dtype=torch.float64))  # 1690499128, 37
    """
    if not bool(((factor > 2.0**-31) & (factor < 2.0**30)).all()):
        raise UserError(f"requantisation needs factors between 2^-31 and 2^30; given: {factor}")
    mantissa, exponent = torch.frexp(factor.double())
    multiplier, shift = (mantissa * 2**31).round().long(), 31 - exponent.long()
    full = multiplier == 2**31  # a mantissa that rounds up to 1
    return torch.where(full, 2**30, multiplier), torch.where(full, shift - 1, shift)


def requantized(accumulator: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """round(accumulator * multiplier / 2^shift), half to even as the quantisers round, in int64 throughout.

    ``accumulator``: int64, within 32 bits with sign, any shape; the others as `dyadic` gives them, of a shape that
    broadcasts. Clip the result to the codes there are. Sums of a residual block, of two scales, are such a result each,
    kept at 16 bits.
    """
    product = accumulator * multiplier
    below = product >> shift
    rest, half = product - (below << shift), torch.ones_like(shift) << (shift - 1)
    return below + ((rest > half) | ((rest == half) & (below % 2 == 1))).long()
