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
    numbers = augment.draws(len(images), torch.Generator().manual_seed(0))
    shifted = augment.shift_and_flip(images, 2, True, numbers)
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
    still = augment.shift_and_flip(images, 2, False, numbers)
    assert all(
        any(padded[i, :, top : top + 8, left : left + 8].equal(still[i]) for top in range(5) for left in range(5))
        for i in range(64)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_leaves_the_global_generator_alone(channels):
    images = torch.randint(0, 256, (20, channels, 70, 70), dtype=torch.uint8)
    state = torch.get_rng_state()
    for change in (
        lambda n: augment.randaugment(images, 9, n),
        lambda n: augment.autoaugment(images, n),
        lambda n: augment.crop_and_flip(images, 64, True, n),
    ):
        numbers = [augment.draws(len(images), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        first, second, other = map(change, numbers)
        assert first.equal(second)
        assert not first.equal(other)
        assert first.dtype == torch.uint8
    assert torch.get_rng_state().equal(state)


def test_crops_on_a_grid_are_those_made_one_by_one():
    smooth = torch.linspace(0, 255, 80)
    images = torch.stack([smooth.expand(80, 80), smooth.expand(80, 80).T, 255 - smooth.expand(80, 80)])
    images = images.to(torch.uint8).expand(24, 3, 80, 80)
    numbers = augment.draws(24, torch.Generator().manual_seed(0))
    crops = augment.crop_and_flip(images, 70, True, numbers)
    assert crops.shape == (24, 3, 70, 70)
    widths = (crops[:, 0, 35].float().amax(1) - crops[:, 0, 35].float().amin(1)) / 255
    heights = (crops[:, 1, :, 35].float().amax(1) - crops[:, 1, :, 35].float().amin(1)) / 255
    area = widths * heights
    assert 0.3 < area.min() < 0.5
    assert 0.8 < area.max() <= 1
    assert 0.7 < (widths / heights).min() < 0.9
    mirrored = crops[:, 0, 35, -1] < crops[:, 0, 35, 0]
    assert 4 < mirrored.sum() < 20
    still = augment.crop_and_flip(images, 70, False, numbers)
    assert still[mirrored].flip(-1).equal(crops[mirrored])
    side = torch.tensor([80, 80])
    boxes = (numbers[:, :2] * side * 0).long(), side.expand(24, 2), mirrored
    whole = [function(images, *boxes, 70).float() for function in (augment._resized, augment._sampled)]
    assert (whole[0] - whole[1]).abs().max() <= 4  # one of them blurs


@pytest.mark.parametrize("resolution", [8, 64])
def test_parts_of_a_batch_are_the_batch_to_the_bit(resolution):
    task = open_task("digits", limit=100, resolution=resolution)
    options = {"train": True, "seed": 3, "epoch": 1, "randaugment": 5, "autoaugment": True, "mirror": True}
    whole = list(task.batches("trainval", 30, **options))
    assert [len(labels) for _, labels in whole] == [25, 25, 25, 25]
    for parts in (2, 3, 7):
        split = [list(task.batches("trainval", 30, part=(i, parts), **options)) for i in range(parts)]
        for number, (images, labels) in enumerate(whole):
            assert torch.cat([own[number][0] for own in split]).equal(images)
            assert torch.cat([own[number][1] for own in split]).equal(labels)
    later = list(task.batches("trainval", 30, first=2, part=(1, 2), led=True, **options))
    assert len(later) == 2
    images, labels = whole[2]
    assert later[0][0].equal(images[11:])  # the second half, and the image before it
    around = next(task.batches("trainval", 30, part=(0, 2), led=True, **options))
    assert around[1].equal(torch.cat([whole[0][1][-1:], whole[0][1][:12]]))


def test_what_other_processes_read_ahead_is_the_same(digits):
    assert same(draw(digits, seed=3, loaders=2), draw(digits, seed=3))


def test_parts_may_be_empty(digits):
    sizes = [len(next(digits.batches("test", 400, train=False, part=(i, 500)))[1]) for i in range(500)]
    assert sum(sizes) == 355
    assert set(sizes) == {0, 1}


def test_images_that_cannot_be_read_are_left_out_and_noted(digits):
    split = digits.split("train")
    labels = split.labels.clone()
    labels[[3, 70]] = -1
    task = replace(digits, splits={**digits.splits, "train": replace(split, labels=labels)}, skipped=set())
    images, found = zip(*draw(task), strict=True)
    assert sum(map(len, found)) == sum(map(len, images)) == len(split) - 2
    assert min(map(min, found)) >= 0
    assert task.skipped == {split.name(3), split.name(70)}
    labels[:20] = -1
    with pytest.raises(UserError, match=r"1\d images of .* cannot be read, such as image"):
        draw(task)


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
