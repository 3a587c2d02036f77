"""Integer arithmetic equals the fake-quantised path bit for bit."""

from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from netsmith.blocks.quantizers import Grid, affine, span, symmetric
from netsmith.blocks.requantize import dyadic, requantized
from netsmith.errors import UserError


def test_the_sheets_multiplier():
    m, e = dyadic(torch.tensor(0.0123, dtype=torch.float64))
    assert (int(m), int(e)) == (1690499128, 37)


def test_multipliers_are_nearest_and_have_31_bits():
    generator = torch.Generator().manual_seed(0)
    factors = torch.exp2(60 * torch.rand(1000, generator=generator, dtype=torch.float64) - 30.5)
    factors = torch.cat([factors, torch.tensor([1.0, 0.5, 1 - 2.0**-40, 2.0**-30], dtype=torch.float64)])
    for factor, m, e in zip(factors.tolist(), *(part.tolist() for part in dyadic(factors)), strict=True):
        assert 2**30 <= m < 2**31
        assert 1 <= e <= 62
        assert abs(Fraction(m, 2**e) - Fraction(factor)) <= Fraction(1, 2 ** (e + 1))


@pytest.mark.parametrize("factor", [0.0, -0.1, 2.0**-31, 2.0**30, float("nan")])
def test_factors_out_of_range(factor):
    with pytest.raises(UserError, match=r"factors between 2\^-31 and 2\^30"):
        dyadic(torch.tensor([0.5, factor], dtype=torch.float64))


def test_rounding_equals_exact_fractions():
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**31), 2**31, (3000,), generator=generator)
    factors = torch.exp2(40 * torch.rand(3000, generator=generator, dtype=torch.float64) - 30)
    m, e = dyadic(factors)
    exact = [round(Fraction(a * b, 2**c)) for a, b, c in zip(*(t.tolist() for t in (sums, m, e)), strict=True)]
    assert requantized(sums, m, e).tolist() == exact


def test_halves_go_to_even_below_zero_too():
    sums = torch.arange(-9, 10)
    m, e = dyadic(torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(requantized(sums, m, e), (sums / 2).round().long())


def integer_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Whole numbers all the way: int64 patches times int64 weights."""
    side = x.shape[-1]
    padded = F.pad(x, (1, 1, 1, 1))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(len(x), side * side, -1)
    sums = patches @ weight.flatten(1).T + bias
    assert sums.dtype == torch.int64
    return sums.transpose(1, 2).view(len(x), -1, side, side)


def power_of_two(grid: Grid) -> Grid:
    return grid._replace(scale=torch.exp2(grid.scale.log2().round()))


@pytest.mark.parametrize(("bits", "output_bits"), [(2, 2), (3, 8), (4, 4), (5, 6), (8, 8), (8, 4), (8, 16)])
@pytest.mark.parametrize("exact", [False, True], ids=["any scales", "powers of two"])
def test_integers_equal_the_fake_quantised_path(bits, output_bits, exact):
    """Two layers, a scale for every output channel, int32 biases, unsigned codes behind each ReLU."""
    generator = torch.Generator().manual_seed(bits)
    adjust = power_of_two if exact else lambda grid: grid
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    grid = adjust(symmetric(*span(x), bits))
    codes, fake = grid.codes(x).long(), grid(x)
    for outputs, inputs in ((8, 3), (6, 8)):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64)
        bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
        weights = adjust(symmetric(*span(weight, 0), bits))
        scale = weights.scale.flatten() * grid.scale
        biases = Grid(scale, torch.zeros(()), -(2**31), 2**31 - 1)

        sums = F.conv2d(fake, weights(weight), biases(bias), padding=1).relu()
        whole = integer_conv(codes, weights.codes(weight).long(), biases.codes(bias).long()).clamp(min=0)
        assert torch.equal((sums / scale.view(-1, 1, 1)).round().long(), whole)
        following = adjust(affine(*span(sums), output_bits))
        m, e = (part.view(-1, 1, 1) for part in dyadic(scale / following.scale))
        codes = requantized(whole, m, e).clamp(following.low, following.high)
        assert following.zero == 0
        assert len(codes.unique()) > 2

        factor = m.double() / torch.exp2(e.double())
        plain = Grid(torch.ones(()), torch.zeros(()), following.low, following.high)
        product = F.conv2d(grid.codes(fake), weights.codes(weight), biases.codes(bias), padding=1).relu() * factor
        assert torch.equal(codes, plain.codes(product).long())
        others = codes != following.codes(sums).long()
        assert not (exact and others.any())
        assert ((product[others] % 1 - 0.5).abs() < 1e-4).all()
        grid, fake = following, codes * following.scale
