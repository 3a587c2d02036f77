"""Sizes of training images, stage by stage; the last layers tuned at another size; accuracy over sizes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from netsmith.errors import UserError
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe, stage
from netsmith.train.resolution import progressive, sweep, tune, tuning

RECIPE = Recipe(epochs=4, batch_size=64, resolutions=(5, 8), randaugment=9, mixup=0.4, ramp=True, tune_epochs=2)


@pytest.fixture(scope="module")
def few():
    return open_task("digits", limit=300)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.2))
    top = nn.Sequential(nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, top, nn.Linear(16, 10))


def test_published_stages():
    assert progressive(300) == (171, 214, 257, 300)  # EfficientNetV2-S, google/automl
    assert progressive(380, 2) == (254, 380)
    assert [stage(RECIPE, epoch) for epoch in range(4)] == [(5, 0.5), (5, 0.5), (8, 1.0), (8, 1.0)]
    thirds = replace(RECIPE, epochs=7, resolutions=(4, 5, 8), ramp=False)
    assert [stage(thirds, epoch)[0] for epoch in range(7)] == [4, 4, 4, 5, 5, 8, 8]
    early = replace(thirds, resize_at=(1.2, 4))
    assert [stage(early, epoch)[0] for epoch in range(7)] == [4, 5, 5, 5, 8, 8, 8]
    assert stage(replace(RECIPE, resolutions=()), 3) == (None, 1.0)


def test_the_network_sees_the_sizes_of_the_stages(few):
    module, seen = network(), []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    train(module, few, RECIPE, watch="search")
    steps, scored = -(-240 // 64), 1
    epochs = [seen[number * (steps + scored) : (number + 1) * (steps + scored)] for number in range(4)]
    assert epochs == [[5] * steps + [8]] * 2 + [[8] * (steps + 1)] * 2


def test_large_images_are_cropped_to_the_size_of_the_stage():
    task = open_task("digits", limit=100, resolution=64)
    (images, _), *_ = task.batches("train", 20, train=True, resolution=48)
    assert images.shape[2:] == (48, 48)
    (images, _), *_ = task.batches("train", 20, train=False, resolution=80)
    assert images.shape[2:] == (80, 80)


def test_images_that_are_not_augmented_are_those_of_the_test(few):
    seen = torch.cat([images for images, _ in few.batches("search", 64, train=True, augmented=False)])
    plain = torch.cat([images for images, _ in few.batches("search", 64, train=False)])
    key = lambda images: sorted(image.numpy().tobytes() for image in images)  # noqa: E731
    assert key(seen) == key(plain)
    assert not seen.equal(plain)  # in another order


@pytest.mark.parametrize("layers", [1, 2])
def test_tuning_leaves_everything_before_the_last_layers_as_it_was(few, layers):
    module = network()
    train(module, few, replace(RECIPE, tune_layers=layers))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    history = tune(module, few, replace(RECIPE, tune_layers=layers))
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    for name, tensor in module.state_dict().items():
        of_top = int(name[0]) >= 3 - layers
        statistics = "running" in name or "tracked" in name
        if of_top and not statistics:
            assert not tensor.equal(before[name]), name
        elif not of_top and not statistics:
            assert tensor.equal(before[name]), name
    assert not module.state_dict()["0.1.running_mean"].equal(before["0.1.running_mean"])  # taken at the new size
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_tuning_that_was_stopped_ends_the_same(few, tmp_path):
    trained = network()
    train(trained, few, replace(RECIPE, epochs=1))
    undisturbed, module, path = network(), network(), tmp_path / "tune.pt"
    for one in (undisturbed, module):
        one.load_state_dict(trained.state_dict())
    tune(undisturbed, few, RECIPE)

    def stop(_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(module, few, RECIPE, checkpoint=path, on_epoch=stop)
    again = network()
    again.load_state_dict(trained.state_dict())
    tune(again, few, RECIPE, checkpoint=path)
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), undisturbed.state_dict().values(), strict=True))


def test_tuning_is_plain(few):
    plain = tuning(RECIPE)
    assert (plain.epochs, plain.optimizer, plain.augmented, plain.mixup, plain.ema) == (2, "sgd", False, 0, None)
    assert plain.peak == pytest.approx(0.05 * 64 / 512)
    assert plain.resolutions == ()
    with pytest.raises(UserError, match=r"recipe\.tune_layers is 4; the network has 3 parts"):
        tune(network(), few, replace(RECIPE, tune_layers=4))


def test_a_sweep_scores_every_size(few):
    module = network()
    train(module, few, replace(RECIPE, epochs=2))
    found = sweep(module, few, "search", [6, 8, 12])
    assert [size for size, _ in found] == [6, 8, 12]
    assert dict(found)[8] == evaluate(module, few, "search")
    assert len({accuracy for _, accuracy in found}) > 1
