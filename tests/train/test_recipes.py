"""Published recipes: their numbers, and what stays the same when they are carried to small hardware."""

import pytest
import torch
from torch import nn

from netsmith.errors import UserError
from netsmith.spaces.networks import NETWORKS
from netsmith.train.recipe import Recipe, stage
from netsmith.train.recipes import IMAGENET, RECIPES, published
from netsmith.train.schedules import factor


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("efficientnet_rmsprop_4096", 0.256),
        ("efficientnet_lars_16384", 15.104),
        ("efficientnet_lars_32768", 15.104),
        ("efficientnet_lars_65536", 20.736),
        ("graphcore_b0_half_resolution", 0.046875),
    ],
)
def test_peaks(name, peak):
    assert published(name).recipe.peak == pytest.approx(peak)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_a_network_that_is_there(name):
    assert published(name).model in NETWORKS


def rates(recipe, images: int) -> list[float]:
    """A hundred learning rates over the training, as shares of the peak."""
    steps = images / recipe.batch_size
    total, warmup = round(recipe.epochs * steps), round(recipe.warmup_epochs * steps)
    how = {"rate": recipe.decay_rate, "every": recipe.decay_epochs, "at": recipe.decay_at, "end": recipe.end_rate}
    at = [total * (2 * part + 1) // 200 for part in range(100)]  # away from where stairs begin
    return [factor(recipe.schedule, t, total, warmup, epoch=steps, **how) for t in at]


@pytest.mark.parametrize("name", RECIPES)
def test_a_scaled_recipe_follows_the_same_curve(name):
    whole = published(name)
    small = whole.scaled(8_000, batch_size=64, epochs=30)
    assert small.epochs == 30
    expected, found = rates(whole.recipe, IMAGENET), rates(small, 8_000)
    assert found == pytest.approx(expected, abs=0.03)
    assert small.peak == pytest.approx(whole.recipe.peak * 64 / whole.recipe.batch_size)
    if whole.recipe.ema:
        back = [1 / (1 - r.ema) / (r.epochs * n / r.batch_size) for r, n in ((whole.recipe, IMAGENET), (small, 8_000))]
        assert back[0] == pytest.approx(back[1], rel=0.01) or 1 / (1 - small.ema) == pytest.approx(2)


def test_the_resnet_of_dawnbench():
    """Rates and sizes of the entry google_resnet50_tpu_tensorflow111_fastai, epoch by epoch (the first is 0)."""
    recipe = RECIPES["resnet50_dawnbench"].recipe
    rate = [
        recipe.peak * factor("step", epoch, recipe.epochs, 4, rate=recipe.decay_rate, at=recipe.decay_at)
        for epoch in range(recipe.epochs)
    ]
    assert rate == pytest.approx([0, 0.1, 0.2, 0.3] + 17 * [0.4] + 14 * [0.04] + 8 * [0.004] + 7 * [0.0004])
    sizes = [stage(recipe, epoch)[0] for epoch in range(recipe.epochs)]
    assert sizes == 18 * [128] + 23 * [224] + 9 * [288]
    short = RECIPES["resnet50_dawnbench"].scaled(50_000, batch_size=128, epochs=10, resolution=32)
    assert [stage(short, epoch)[0] for epoch in range(10)] == 4 * [14] + 4 * [25] + 2 * [32]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"decay_at": (3, 2)}, "recipe.decay_at is .3, 2.; allowed: epochs above 0, each later than the one before"),
        ({"resolutions": (8, 16), "resize_at": (1, 2)}, "recipe.resize_at is .1, 2.; allowed: none, or an epoch for"),
        ({"resize_at": (1,)}, "recipe.resize_at is"),
    ],
)
def test_epochs_that_cannot_be(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        Recipe(**wrong)


def test_nothing_asked_nothing_changed():
    for recipe in RECIPES.values():
        assert recipe.scaled(IMAGENET) == recipe.recipe


def test_what_cannot_be():
    with pytest.raises(UserError, match="did you mean 'efficientnet_lars_65536'"):
        published("efficientnet_lars_65535")
    with pytest.raises(UserError, match="batch_size is 0; allowed: 1 or more"):
        published("efficientnet_lars_65536").scaled(1000, batch_size=0)


def test_the_l2_loss_is_what_it_says(monkeypatch):
    from dataclasses import replace

    from netsmith.tasks import open_task
    from netsmith.train import loop
    from netsmith.train.recipe import Recipe

    plain = Recipe(epochs=1, batch_size=64, learning_rate=0.1, ema=None, warmup_epochs=0.0)
    task = open_task("digits")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))

    decayed = build()
    loop.train(decayed, task, replace(plain, l2_loss=1e-2, weight_decay=0.0))
    by_hand, loss_of = build(), loop.loss_of

    def with_loss(logits, targets, recipe, taught=None):
        shrinking = [by_hand[0].weight, by_hand[0].bias, by_hand[3].weight, by_hand[3].bias]
        return loss_of(logits, targets, recipe, taught) + 0.5e-2 * sum(w.square().sum() for w in shrinking)

    monkeypatch.setattr(loop, "loss_of", with_loss)
    loop.train(by_hand, task, replace(plain, weight_decay=0.0))
    for a, b in zip(decayed.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_decay_that_is_meant_for_images_follows_the_batch():
    half = RECIPES["graphcore_b0_half_resolution"].scaled(50_000, batch_size=64, epochs=10, resolution=32)
    assert half.rmsprop_decay == pytest.approx(1 - 64 * 2**-14)
    assert half.peak == pytest.approx(64 * 2**-14)
    assert half.resolutions == (23,)  # 160 of 224
    assert RECIPES["efficientnet_rmsprop_4096"].scaled(50_000, batch_size=64).rmsprop_decay == 0.9
