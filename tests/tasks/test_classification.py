"""Splits, batches and augmentation, on the digits and, where the packs are there, on real photographs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from netsmith.errors import UserError
from netsmith.tasks import augment, open_task
from netsmith.tasks.classification import TestSplitTouched


@pytest.fixture(scope="module")
def digits():
    return open_task("digits")


def draw(task, split="train", **options):
    return list(task.batches(split, 100, train=True, **options))


def same(first, second):
    return all(a.equal(x) and b.equal(y) for (a, b), (x, y) in zip(first, second, strict=True))


def test_splits_are_disjoint_balanced_and_the_same_every_time(digits):
    sets = {name: set(digits.split(name).indices.tolist()) for name in ("train", "search", "trainval")}
    assert sets["train"] | sets["search"] == sets["trainval"]
    assert not sets["train"] & sets["search"]
    assert len(sets["search"]) == round(0.2 * len(sets["trainval"]))
    counts = digits.split("search").labels.bincount() / digits.split("trainval").labels.bincount()
    assert counts.min() > 0.19
    assert counts.max() < 0.21
    again, other = open_task("digits"), open_task("digits", seed=1)
    assert again.split("search").indices.equal(digits.split("search").indices)
    assert not other.split("search").indices.equal(digits.split("search").indices)
    assert other.split("test").source.equal(digits.split("test").source)
    train, test = (digits.split(name).source.flatten(1) for name in ("trainval", "test"))
    assert not {row.numpy().tobytes() for row in train} & {row.numpy().tobytes() for row in test}
    assert len(train) + len(test) == 1797


def test_limit_keeps_the_proportions_and_leaves_the_test_split_alone(digits):
    small = open_task("digits", limit=200)
    assert len(small.split("trainval")) == 200
    assert len(small.split("search")) == 40
    assert small.split("trainval").labels.bincount().min() >= 19
    assert small.split("test").labels.equal(digits.split("test").labels)
    for limit in (49, 1443):
        with pytest.raises(UserError, match=f"limit {limit} is out of range; digits allows 50"):
            open_task("digits", limit=limit)


def test_access_is_recorded_and_the_test_split_can_be_sealed():
    task = open_task("digits")
    view = task.without_test()
    draw(view)
    view.split("search")
    assert task.touched == {"train", "search"}
    with pytest.raises(TestSplitTouched):
        view.split("test")
    with pytest.raises(TestSplitTouched):
        list(view.batches("test", 10, train=False))
    assert "test" not in task.touched
    task.split("test")
    assert "test" in view.touched
    with pytest.raises(UserError, match="unknown split 'serch'; did you mean 'search'"):
        task.split("serch")


def test_batches_depend_on_seed_and_epoch_alone(digits):
    first = draw(digits, seed=3, epoch=2)
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert same(first, draw(digits, seed=3, epoch=2))
    assert torch.get_rng_state().equal(state)
    assert not first[0][0].equal(draw(digits, seed=3, epoch=3)[0][0])
    assert not first[0][0].equal(draw(digits, seed=4, epoch=2)[0][0])


def test_an_epoch_has_every_image_once_in_batches_of_nearly_equal_size(digits):
    batches = draw(digits)
    sizes = {len(labels) for _, labels in batches}
    assert max(sizes) <= 100
    assert max(sizes) - min(sizes) <= 1
    seen = torch.cat([labels for _, labels in batches])
    assert seen.bincount().equal(digits.split("train").labels.bincount())
    assert batches[0][0].dtype == torch.float32
    assert batches[0][0].shape[1:] == (1, 8, 8)


def test_mirroring_can_be_forced_and_forbidden(digits):
    assert same(draw(digits), draw(digits, mirror=False))  # a mirrored digit is none
    assert not same(draw(digits), draw(digits, mirror=True))
    photographs = replace(digits, flip=True)
    assert same(draw(photographs), draw(digits, mirror=True))
    assert same(draw(photographs, mirror=False), draw(digits))


def test_normalised_images_have_mean_zero_and_deviation_one(digits):
    images = torch.cat([images for images, _ in digits.batches("trainval", 500, train=False)])
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-3


def test_shift_and_flip_equals_crops_made_one_by_one():
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    shifted = augment.shift_and_flip(images, 2, True, torch.Generator().manual_seed(0))
    assert shifted.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for picture, result in zip(padded, shifted, strict=True):
        windows = {
            (top, left, flip): crop.flip(-1) if flip else crop
            for top in range(5)
            for left in range(5)
            for flip in (0, 1)
            for crop in [picture[:, top : top + 8, left : left + 8]]
        }
        match = [place for place, window in windows.items() if window.equal(result)]
        assert len(match) == 1
        places.add(match[0])
    assert len(places) > 25  # of 50: each image has its own draw
    still = augment.shift_and_flip(images, 2, False, torch.Generator().manual_seed(0))
    assert all(
        any(padded[i, :, top : top + 8, left : left + 8].equal(still[i]) for top in range(5) for left in range(5))
        for i in range(64)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_and_random_crops_leave_the_global_generator_alone(channels):
    images = torch.randint(0, 256, (20, channels, 70, 70), dtype=torch.uint8)
    state = torch.get_rng_state()
    for change in (lambda g: augment.randaugment(images, 9, g), lambda g: augment.crop_and_flip(images, 64, True, g)):
        first, second, other = (change(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert first.equal(second)
        assert not first.equal(other)
        assert first.dtype == torch.uint8
    assert torch.get_rng_state().equal(state)


def test_resolution(digits):
    task = open_task("digits", resolution=16)
    assert task.input_shape == (1, 16, 16)
    assert next(task.batches("train", 4, train=True))[0].shape[1:] == (1, 16, 16)
    with pytest.raises(UserError, match="resolution 2 is out of range"):
        open_task("digits", resolution=2)
    with pytest.raises(UserError, match="search_fraction 1 is out of range"):
        open_task("digits", search_fraction=1)


@pytest.mark.parametrize(("name", "images", "mean"), [("cifar10", None, 0.491), ("fashion-mnist", 60000, 0.2860)])
def test_the_real_packs(name, images, mean):
    try:
        task = open_task(name)
    except UserError as error:
        pytest.skip(str(error))
    assert images in (None, len(task.split("trainval")))
    assert abs(task.mean[0] - mean) < 1e-3
    assert np.ptp(task.split("search").labels.bincount().numpy()) == 0
    pixels, labels = next(task.batches("train", 64, train=True))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.max() < 10
