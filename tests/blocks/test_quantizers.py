"""Uniform quantisers: golden values, gradients against the formulas, and what holds for every grid."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netsmith.blocks.quantizers import (
    GAUSSIAN_STEPS,
    affine,
    dorefa_activation,
    dorefa_weight,
    hwgq_activation,
    hwgq_weight,
    lsq,
    lsq_range,
    lsq_scale,
    nearest,
    pact,
    span,
    stochastic,
    symmetric,
)
from netsmith.errors import UserError


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def close(found: torch.Tensor, *expected: float, tolerance: float = 1e-6) -> None:
    assert found.detach().flatten().tolist() == pytest.approx(expected, abs=tolerance)


def gradient(of: torch.Tensor, *to: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(of.sum(), to)


NUMBERS = st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=2, max_size=40).map(
    lambda x: double(*x).detach()
)
BITS = st.integers(2, 8)


def grid_of(kind: str, x: torch.Tensor, bits: int):
    return {
        "symmetric": lambda: symmetric(*span(x), bits),
        "narrow": lambda: symmetric(*span(x), bits, narrow=True),
        "affine": lambda: affine(*span(x), bits),
    }[kind]()


KINDS = pytest.mark.parametrize("kind", ["symmetric", "narrow", "affine"])


def test_halves_go_to_even():
    close(nearest(double(0.5, 1.5, 2.5, -0.5, -1.5)), 0, 2, 2, 0, -2)
    grid = affine(torch.tensor(0.0), torch.tensor(3.0), 2)
    close(grid(torch.tensor([0.5, 1.5, 2.5])), 0, 2, 2)


def test_affine_by_hand():
    grid = affine(torch.tensor(-1.0).double(), torch.tensor(3.0).double(), 8)
    close(grid.scale, 0.0156862745, tolerance=1e-10)
    assert grid.zero == 64
    close(grid(double(-1, 0, 0.5, 3)), -1.00392157, 0, 0.50196078, 2.99607843, tolerance=1e-8)


@pytest.mark.parametrize(("low", "high", "lowest", "highest"), [(1.0, 3.0, 0, 3), (-3.0, -1.0, -3, 0)])
def test_an_affine_range_holds_zero(low, high, lowest, highest):
    grid = affine(torch.tensor(low), torch.tensor(high), 8)
    close(grid(torch.tensor([-9.0, 0.0, 9.0])), lowest, 0, highest)


def test_the_lower_limit_of_a_symmetric_grid():
    ends = torch.tensor(-3.0), torch.tensor(3.0)
    x = torch.tensor([-9.0, 9.0])
    close(symmetric(*ends, 3)(x), -4, 3)
    close(symmetric(*ends, 3, narrow=True)(x), -3, 3)


def test_a_scale_per_channel():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for axis in (0, 1):
        found = symmetric(*span(x, axis), 4)
        assert found.scale.numel() == x.shape[axis]
        for index in range(x.shape[axis]):
            alone = x.select(axis, index)
            assert torch.equal(found(x).select(axis, index), symmetric(*span(alone), 4)(alone))


def test_nothing_but_zeros():
    x = torch.zeros(2, 3)
    for grid in (symmetric(*span(x), 4), symmetric(*span(x, 0), 4), affine(*span(x), 4)):
        assert torch.equal(grid(x), x)
    assert dorefa_weight(x, 2).isfinite().all()


@KINDS
@given(x=NUMBERS, bits=BITS)
def test_invariants(kind, x, bits):
    grid = grid_of(kind, x, bits)
    y, scale = grid(x), float(grid.scale)
    assert torch.equal(grid(y), y), "idempotent"
    assert len(y.unique()) <= 2**bits
    assert (y[x.argsort()].diff() >= 0).all(), "monotone"
    # An affine grid is shifted by up to half a step, to have 0 on it: at the ends both halves add up.
    inside = (x > grid(x.min() - 1e9)) & (x < grid(x.max() + 1e9))
    assert ((y - x).abs()[inside] <= scale * (0.5 + 1e-9)).all()
    assert ((y - x).abs() <= scale * (1 + 1e-9)).all()
    assert grid(torch.zeros(1, dtype=x.dtype)) == 0
    codes = grid.codes(x)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high


@given(x=NUMBERS, bits=BITS, scale=st.floats(1e-3, 1e2))
def test_invariants_of_what_is_learned(x, bits, scale):
    learned = torch.tensor(scale, dtype=x.dtype)
    for function, limit in [
        (lambda v: lsq(v, learned, *lsq_range(bits, signed=True)), None),
        (lambda v: lsq(v, learned, *lsq_range(bits, signed=False)), None),
        (lambda v: pact(v, learned, bits), scale),
        (lambda v: dorefa_activation(v, bits), 1.0),
        (lambda v: hwgq_activation(v, min(bits, 4)), None),
    ]:
        y = function(x)
        assert torch.allclose(function(y), y, rtol=1e-12)
        assert len(y.unique()) <= 2**bits
        assert (y[x.argsort()].diff() >= 0).all()
        assert function(torch.zeros(1)) == 0
        if limit is not None:
            step, inside = limit / (2**bits - 1), (x >= 0) & (x <= limit)
            assert ((y - x).abs()[inside] <= step * (0.5 + 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_32_bits_change_nothing(dtype):
    x = torch.randn(1000, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    high = lsq_range(32, signed=True)[1]
    for y in (symmetric(*span(x), 32)(x), affine(*span(x), 32)(x), lsq(x, x.abs().max() / high, -high - 1, high)):
        assert torch.allclose(y, x, rtol=0, atol=tolerance * float(x.abs().max()))


@KINDS
def test_the_gradient_is_one_inside_and_zero_outside(kind):
    x = double(-1.0, -0.3, 0.0, 0.7, 0.9, -50.0, 50.0)
    grid = grid_of(kind, x.detach()[:5], 4)
    assert gradient(grid(x), x)[0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_the_largest_weight_keeps_its_gradient():
    """max / (max / n) is often a little above n."""
    x = torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradient(symmetric(*span(x, 0), 4, narrow=True)(x), x)[0].min() == 1


def test_stochastic_rounding_is_right_on_average():
    draws, generator = 100_000, torch.Generator().manual_seed(0)
    grid = symmetric(torch.tensor(-1.0), torch.tensor(1.0), 4)
    step = float(grid.scale)
    for x in (0.3, -0.55, 0.01, 2 * step):
        y = grid(torch.full((draws,), x), rounding=functools.partial(stochastic, generator=generator)).double()
        fraction = x / step % 1
        error = step * (fraction * (1 - fraction) / draws) ** 0.5
        assert abs(float(y.mean()) - x) <= 4 * error + 1e-7
        assert len(y.unique()) <= 2


def test_stochastic_rounding_has_the_gradient_of_rounding_and_its_own_generator():
    x = double(0.3, 2.7)
    y = stochastic(x, torch.Generator().manual_seed(1))
    assert gradient(y, x)[0].tolist() == [1, 1]
    assert torch.equal(y, stochastic(x, torch.Generator().manual_seed(1)))


def test_dorefa_by_hand():
    w = double(-1, -0.2, 0.1, 0.5)
    close(dorefa_weight(w, 2), -1, -1 / 3, 1 / 3, 1 / 3)
    close(dorefa_weight(w, 1), -0.45, -0.45, 0.45, 0.45)
    assert gradient(dorefa_weight(w, 1), w)[0].tolist() == [1, 1, 1, 1]
    x = double(-0.5, 0.2, 0.5, 3)
    close(dorefa_activation(x, 2), 0, 1 / 3, 2 / 3, 1)
    assert gradient(dorefa_activation(x, 2), x)[0].tolist() == [0, 1, 1, 0]


def test_dorefas_gradient_is_that_of_tanh_over_its_largest():
    w, v = double(-1, -0.2, 0.1, 0.5), double(-1, -0.2, 0.1, 0.5)
    weights = torch.tensor([1.0, 2, 3, 4])
    smooth = v.tanh() / v.tanh().abs().amax()
    close(gradient(weights * dorefa_weight(w, 3), w)[0], *gradient(weights * smooth, v)[0].tolist())


def test_pact_by_hand():
    x, alpha = double(-0.5, 0.3, 1.1, 2.5, 2.0), double(2.0)[0]
    y = pact(x, alpha, 3)
    close(y[:4], 0, 0.285714, 1.142857, 2)
    upstream = torch.tensor([1.0, 10, 100, 1000, 10_000])
    of_x, of_alpha = gradient(upstream * y, x, alpha)
    assert of_x.tolist() == [0, 10, 100, 0, 0]
    assert of_alpha == 11_000, "the sum over x >= alpha"


def test_lsq_by_hand():
    v, scale = double(-1, -0.33, 0.1, 0.26, 0.9), double(0.25)
    low, high = lsq_range(3, signed=True)
    assert (low, high) == (-4, 3)
    y = lsq(v, scale, low, high)
    close(y, -1, -0.25, 0, 0.25, 0.75)
    each = [float(gradient(y[i], scale)[0]) for i in range(5) if (y := lsq(v, scale, low, high)) is not None]
    assert each == pytest.approx([-4, 0.32, -0.4, -0.04, 3])
    factor = (5 * high) ** -0.5
    assert factor == pytest.approx(0.258199, abs=1e-6)
    of_v, of_scale = gradient(lsq(v, scale, low, high, factor), v, scale)
    close(of_scale, -0.289183)
    assert of_v.tolist() == [0, 1, 1, 1, 0]
    close(lsq_scale(v, high), 0.598135)
    assert torch.equal(lsq(v, scale, low, high, factor), y), "the factor changes the gradient alone, to the bit"
    assert lsq_range(4, signed=False) == (0, 15)


def test_lsq_starts_per_channel():
    x = torch.randn(3, 2, 2, 2)
    close(lsq_scale(x, 7, 0), *(float(lsq_scale(row, 7)) for row in x))
    close(lsq_scale(x, 7, 1), *(float(lsq_scale(x[:, i], 7)) for i in range(2)))


@pytest.mark.parametrize(("bits", "step"), [(1, 0.799), (2, 0.538), (3, 0.3217), (4, 0.185)])
def test_hwgq_activations(bits, step):
    x = double(-1, 0.4 * step, 0.6 * step, 99)
    y = hwgq_activation(x, bits)
    close(y, 0, 0, step, (2**bits - 1) * step)
    assert gradient(y, x)[0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3635), (2, 0.1190), (3, 0.0374), (4, 0.0116)])
def test_gaussian_steps_have_the_published_error(bits, error):
    w = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    assert float((hwgq_weight(w, bits) - w).square().mean()) == pytest.approx(error, abs=2e-4)  # the sheet's are draws


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_weights_are_odd_multiples_of_half_a_step(bits):
    w = (2 * torch.randn(4000, dtype=torch.float64) - 0.1).requires_grad_()
    y, step = hwgq_weight(w, bits), GAUSSIAN_STEPS[bits] * float(w.detach().std())
    halves = y / step * 2
    assert torch.allclose(halves, halves.round())
    assert (halves.round() % 2 == 1).all()
    assert len(halves.round().unique()) == 2**bits
    assert (y[w.argsort()].diff() >= 0).all()
    assert gradient(y, w)[0].unique() == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: symmetric(*span(x), 1), "a symmetric grid takes 2 to 32 bits; given: 1"),
        (lambda x: lsq_range(1, signed=True), "LSQ with a sign takes 2 to 32 bits; given: 1"),
        (lambda x: lsq_range(0, signed=False), "LSQ takes 1 to 32 bits; given: 0"),
        (lambda x: affine(*span(x), 33), "an affine grid takes 1 to 32 bits; given: 33"),
        (lambda x: dorefa_weight(x, 0), "DoReFa takes 1 to 32"),
        (lambda x: dorefa_activation(x, 0), "DoReFa takes 1 to 32"),
        (lambda x: pact(x, x[0], 0), "PACT takes 1 to 32"),
        (lambda x: hwgq_weight(x, 5), "the Gaussian quantiser takes 1 to 4 bits; given: 5"),
        (lambda x: hwgq_activation(x, 8), "HWGQ takes 1 to 4 bits; given: 8"),
    ],
)
def test_bits_that_cannot_be(call, text):
    with pytest.raises(UserError, match=text):
        call(torch.randn(8))
