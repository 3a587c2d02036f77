"""What layers between two widths cost, against counting it out."""

import itertools
import random

import pytest
from torch import nn

from netsmith.cost.between import Between, Extent, bilinear, gathered, needed, spread
from netsmith.cost.prices import Prices

OPTIONS = {"a": [2, 4, 6], "b": [1, 3], "c": [8], "d": [5, 10]}


def layer(reads: Extent, makes: Extent) -> Between:
    return Between("layer", nn.Identity(), reads, makes, lambda u, v: (nn.Linear(u, v), (u,)))


def every():
    return [dict(zip(OPTIONS, chosen, strict=True)) for chosen in itertools.product(*OPTIONS.values())]


@pytest.mark.parametrize(
    ("reads", "makes"),
    [
        (Extent(3, {}), Extent(4, {})),
        (Extent(0, {"a": 1}), Extent(7, {})),
        (Extent(0, {"a": 1}), Extent(0, {"a": 1})),
        (Extent(2, {"a": 1}), Extent(0, {"b": 4})),
        (Extent(1, {"a": 2, "b": 1}), Extent(5, {})),
        (Extent(0, {"b": 1, "a": 3}), Extent(0, {"d": 2, "c": 1})),
        (Extent(1, {"a": 1, "d": 1}), Extent(2, {"a": 2, "b": 1})),
    ],
    ids=["closed", "one", "the same on both sides", "pair", "two in one", "many", "many, one of them on both sides"],
)
def test_the_rows_add_up_to_the_layer(reads, makes):
    """Weights of a linear layer with a bias: u v + v, whatever meets in u and v."""
    part = layer(reads, makes)

    def count(u: int, v: int) -> float:
        return float(u * v + v)

    for price in (count, bilinear(part, count, OPTIONS)):
        constant, alone, pairs = gathered([spread(part, price, OPTIONS)] * 2, OPTIONS)
        prices = Prices(constant, alone, pairs=pairs)
        for widths in every():
            assert prices.of(widths) == pytest.approx(2 * count(reads.at(widths), makes.at(widths)))


def test_a_staircase_is_kept_between_two_widths_and_asked_only_where_it_is_needed():
    part = layer(Extent(0, {"a": 1}), Extent(0, {"b": 1}))
    stairs = {lengths: random.Random(str(lengths)).random() for lengths in needed(part, OPTIONS)}
    assert set(stairs) == set(itertools.product(OPTIONS["a"], OPTIONS["b"]))
    (row,) = spread(part, lambda u, v: stairs[u, v], OPTIONS).values()
    assert row == stairs
    many = layer(Extent(0, {"a": 1, "b": 1}), Extent(0, {"d": 1}))
    assert set(needed(many, OPTIONS)) == {(3, 5), (3, 10), (9, 5), (9, 10)}, "the ends of both extents"
