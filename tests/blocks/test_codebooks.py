"""Binary, ternary, powers of two, centroids: golden values, gradients, and what holds for all weights."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netsmith.blocks.codebooks import binary, bwn, kmeans, power_of_two, ttq, ttq_sets, twn
from netsmith.errors import UserError

SHEET = (0.9, -0.05, 0.4, -0.6, 0.1, -0.35)
WEIGHTS = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def gradient(of: torch.Tensor, *to: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(of.sum(), to)


def test_the_sign_of_zero_is_one():
    assert binary(torch.tensor([0.0, -0.0, 2.0, -2.0])).tolist() == [1, 1, 1, -1]


def test_three_gradients_of_the_sign():
    w = double(-1.5, -1.0, 0.0, 0.5, 1.0, 1.5)
    assert gradient(binary(w), w)[0].tolist() == [0, 1, 1, 1, 1, 0], (
        "the limits, where clipping leaves them, are inside"
    )
    assert gradient(binary(w, torch.clone), w)[0].tolist() == [1] * 6
    assert torch.allclose(gradient(binary(w, torch.tanh), w)[0], 1 - w.tanh().square())


def test_the_scale_of_bwn():
    w = double(*SHEET)
    assert bwn(w, None).abs().tolist() == pytest.approx([0.4] * 6)
    rows = torch.stack([w.detach(), 3 * w.detach()])[:, :, None, None].requires_grad_()
    assert bwn(rows)[1].abs().flatten().tolist() == pytest.approx([1.2] * 6)
    assert gradient(bwn(rows), rows)[0].flatten().tolist() == [1.0] * 6 + [0, 1, 0, 0, 1, 0]


def test_twn_by_hand():
    w = double(*SHEET)
    y = twn(w)
    assert y.tolist() == pytest.approx([0.5625, 0, 0.5625, -0.5625, 0, -0.5625])
    assert gradient(y, w)[0].tolist() == [1] * 6
    error = float((y - w).detach().square().sum())
    assert error == pytest.approx(0.199375)
    patterns = [torch.tensor(p, dtype=w.dtype) for p in itertools.product((-1, 0, 1), repeat=6) if any(p)]
    scales = [(pattern * w.detach()).sum() / pattern.abs().sum() for pattern in patterns]
    best = min(float((p * s - w.detach()).square().sum()) for p, s in zip(patterns, scales, strict=True))
    assert error == pytest.approx(best), "here the rule finds the optimum"


def test_ttq_gradients():
    w, positive, negative = double(1.0, 0.5, 0.04, 0.0, -0.04, -0.2, -0.9), double(0.7)[0], double(0.3)[0]
    above, below = ttq_sets(w)
    assert above.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert below.tolist() == [0, 0, 0, 0, 0, 1, 1]
    y = ttq(w, positive, negative)
    assert y.tolist() == [0.7, 0.7, 0, 0, 0, -0.3, -0.3]
    upstream = torch.tensor([1.0, 10, 100, 1000, 10_000, 100_000, 1_000_000])
    of_w, of_positive, of_negative = gradient(upstream * y, w, positive, negative)
    assert of_positive == 11
    assert of_negative == -1_100_000
    assert of_w.tolist() == pytest.approx([0.7, 7, 100, 1000, 10_000, 30_000, 300_000])


@given(weight=WEIGHTS, bits=st.integers(2, 6))
def test_powers_of_two(weight, bits):
    y = power_of_two(weight, bits)
    assert torch.equal(power_of_two(y, bits), y)
    assert len(y.unique()) <= 2**bits
    assert (y[weight.argsort()].diff() >= 0).all()
    assert torch.equal(y == 0, weight == 0)
    sizes = y[y != 0].abs()
    assert (torch.frexp(sizes).mantissa == 0.5).all()
    if len(sizes):
        assert sizes.max() / sizes.min() <= 2 ** (2 ** (bits - 1) - 2)


def test_powers_of_two_by_hand():
    w = double(1.0, 1.4, 1.5, -0.7, 0.26, 0.01, 0.0)
    y = power_of_two(w, 3)  # three exponents: 1, 0, -1
    assert y.tolist() == [1, 1, 2, -0.5, 0.5, 0.5, 0]
    assert gradient(y, w)[0].tolist() == [1] * 7


@given(weight=WEIGHTS)
def test_invariants_of_ternary_and_binary(weight):
    for quantize, values in ((twn, 3), (lambda w: bwn(w, None), 2), (binary, 2)):
        y = quantize(weight)
        assert torch.allclose(quantize(y), y, rtol=1e-9)
        assert len(y.unique()) <= values
        assert (y[weight.argsort()].diff() >= 0).all()
    assert twn(weight)[weight == 0].abs().sum() == 0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_kmeans_ends_where_nothing_improves(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    centroids, codes = kmeans(weight, bits)
    assert centroids.shape == (2**bits,)
    assert codes.shape == weight.shape
    assert (centroids.diff() > 0).all()
    distance = (weight[..., None] - centroids).abs()
    assert torch.equal(distance.argmin(-1), codes)
    for index, centroid in enumerate(centroids):
        assert float(centroid) == pytest.approx(float(weight[codes == index].mean()))


def test_kmeans_finds_what_is_there():
    values = torch.tensor([-1.0, 0.25, 0.5, 2.0])
    centroids, codes = kmeans(values[torch.arange(200) % 4], 2)
    assert torch.equal(centroids, values)
    assert torch.equal(codes, torch.arange(200) % 4)
    centroids, codes = kmeans(torch.full((5,), 3.0), 2)
    assert centroids[codes].tolist() == [3.0] * 5


def test_bits_that_cannot_be():
    for quantize, text in ((power_of_two, "a power of two takes 2 to 32"), (kmeans, "k-means takes 1 to 16")):
        with pytest.raises(UserError, match=text):
            quantize(torch.randn(4), 0)
