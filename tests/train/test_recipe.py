"""Recipes, schedules, optimizers and the averaged weights, against numbers worked out by hand."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn
from netsmith.errors import UserError
from netsmith.train.optimizers import Average, make_optimizer
from netsmith.train.recipe import Recipe
from netsmith.train.schedules import factor


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        ("learning_rate", -1.0),
        ("label_smoothing", 1.0),
        ("ema", 1.5),
        ("optimizer", "adam"),
        ("schedule", "cosin"),
        ("precision", "fp16"),
        ("distillation", 2.0),
        ("randaugment", 31),
        ("norm_tile", (0, 2)),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=re.escape(f"recipe.{field} is {value!r}; allowed:")):
        replace(Recipe(), **{field: value})


def test_tiles_and_the_mesh_belong_together():
    with pytest.raises(UserError, match="belong together"):
        Recipe(norm_tile=(2, 2))
    with pytest.raises(UserError, match="were both given"):
        Recipe(norm_tile=(2, 2), norm_mesh=(4, 4), norm_replicas=2)


def test_the_default_looks_at_the_task():
    def of(images, resolution):
        return Recipe.default(SimpleNamespace(splits={"trainval": range(images)}, resolution=resolution))  # pyright: ignore

    assert of(1442, 8).epochs == 8
    assert of(10_000, 32).epochs == 40
    assert of(60_000, 28).epochs == 15
    assert of(60_000, 28).batch_size > of(10_000, 32).batch_size
    assert of(1768, 128).learning_rate < of(10_000, 32).learning_rate


@pytest.mark.parametrize("images", [30, 1442, 10_000, 60_000])
@pytest.mark.parametrize("resolution", [8, 28, 128])
def test_average_and_warm_up_fit_the_length_of_the_training(images, resolution):
    task = SimpleNamespace(splits={"trainval": range(images)}, resolution=resolution)
    usual = Recipe.default(task)  # pyright: ignore
    steps = usual.epochs * images / usual.batch_size
    assert usual.ema == round(1 - 20 / max(1000, steps), 5)
    assert usual.warmup_epochs == 1.0
    assert Recipe.default(task, usual.epochs, usual.batch_size) == usual  # pyright: ignore
    for epochs in (1, 2, 300):
        recipe = Recipe.default(task, epochs=epochs)  # pyright: ignore
        assert recipe.epochs == epochs
        assert recipe.warmup_epochs == min(1.0, epochs / 4)
        part = 1 / (1 - usual.ema) / steps  # of the training that the average looks back over
        back = part * epochs * images / usual.batch_size
        assert 1 / (1 - recipe.ema) == pytest.approx(max(2.0, back), rel=0.05)
    halved = Recipe.default(task, batch_size=usual.batch_size // 2)  # pyright: ignore
    assert 1 / (1 - halved.ema) == pytest.approx(2 / (1 - usual.ema), rel=0.05)
    assert Recipe.default(task, epochs=10**9).ema == 0.99999  # pyright: ignore
    with pytest.raises(UserError, match=r"recipe\.batch_size is 0"):
        Recipe.default(task, batch_size=0)  # pyright: ignore


def test_schedules():
    assert [round(factor("cosine", s, 6, 2), 3) for s in range(6)] == [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    assert [factor("linear", s, 4, 0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [factor("constant", s, 4, 2) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_norms_and_biases_do_not_decay():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    decays = {
        id(p): group["weight_decay"] for group in make_optimizer(module, Recipe()).param_groups for p in group["params"]
    }
    assert decays[id(module[0].weight)] == 5e-4
    assert all(decays[id(p)] == 0 for p in (module[0].bias, module[1].weight, module[1].bias, module[2].bias))
    assert id(module[2].weight) not in decays


def test_rmsprop_is_tensorflows():
    """Golden steps from specs/efficientnet.md: torch's own RMSprop would be at [-.285, -.903] after the third."""
    module = nn.ParameterList([nn.Parameter(torch.tensor([1.0, -2.0]))])
    optimizer = make_optimizer(module, Recipe(optimizer="rmsprop", learning_rate=0.1))
    seen = []
    for gradient in ([0.5, -1.0], [0.5, -1.0], [0.0, 1.0]):
        module[0].grad = torch.tensor(gradient)
        optimizer.step()
        seen.append(module[0].detach().clone())
    expected = torch.tensor([[0.94804055, -1.90004996], [0.84731358, -1.71014489], [0.75665931, -1.63918036]])
    assert torch.allclose(torch.stack(seen), expected, atol=1e-6)


def test_the_average_by_hand():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = Average(module, 0.15)
    expected = 0.0
    for n, value in enumerate((1.0, 3.0, 2.0)):
        module.weight.data.fill_(value)
        average.update()
        decay = min(0.15, (1 + n) / (10 + n))  # 0.1, then 0.15
        expected = decay * expected + (1 - decay) * value
    average.swap()
    assert abs(module.weight.item() - expected) < 1e-6
    average.swap()
    assert module.weight.item() == 2.0


def test_the_average_has_the_norms_statistics_too():
    module = nn.BatchNorm1d(2)
    average = Average(module, 0.9)
    module.running_mean.fill_(1.0)
    average.update()
    average.swap()
    assert torch.allclose(module.running_mean, torch.full((2,), 0.9))


def test_the_rate_is_scaled_by_the_batch_where_a_recipe_says_so():
    assert Recipe(learning_rate=0.016, rate_per=256, batch_size=4096).peak == pytest.approx(0.256)
    assert Recipe(learning_rate=0.081, rate_per=256, batch_size=65_536).peak == pytest.approx(20.736)
    assert Recipe(learning_rate=0.1, batch_size=4096).peak == 0.1


def test_lars_adapts_weights_and_nothing_else():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    adapted, plain = make_optimizer(module, Recipe(optimizer="lars")).param_groups
    assert {id(p) for p in adapted["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert adapted["adapt"]
    assert not plain["adapt"]
    assert len(plain["params"]) == 4


def test_what_proxy_norm_assumes_decays():
    block = ConvBn(3, 4, act="swish", norm="layer+proxy")
    decays, rest = make_optimizer(block, Recipe()).param_groups
    assert {id(p) for p in decays["params"]} == {id(p) for p in (block.conv.weight, *list(block.act.parameters())[2:])}
    assert {id(p) for p in rest["params"]} == {id(p) for p in list(block.act.parameters())[:2]}
