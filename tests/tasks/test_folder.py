"""Folders of images: both layouts, tars, and what can be wrong with them."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from netsmith.errors import UserError
from netsmith.tasks import folder, open_task

RNG = np.random.default_rng(0)


def write_images(directory, count, size=(40, 30), mode="RGB", suffix="jpg"):
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(directory / f"{i}.{suffix}")


@pytest.fixture
def plain(tmp_path):
    write_images(tmp_path / "images" / "cat", 10)
    write_images(tmp_path / "images" / "dog", 20, mode="L", suffix="png")
    return tmp_path / "images"


@pytest.fixture
def with_splits(tmp_path):
    for split, count in (("train", 10), ("valid", 3), ("test", 4)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "images" / split / name, count)
    return tmp_path / "images"


def test_a_folder_without_splits_is_split_the_same_way_every_time(plain):
    task, other_seed = open_task(f"folder:{plain}", resolution=16), open_task(f"folder:{plain}", resolution=16, seed=1)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 19,
        "search": 5,
        "trainval": 24,
        "test": 6,
    }
    assert task.split("test").labels.bincount().tolist() == [2, 4]
    assert task.split("test").indices.equal(other_seed.split("test").indices)  # the seed does not reach the test split
    assert not set(task.split("test").indices.tolist()) & set(task.split("trainval").indices.tolist())


def test_splits_of_the_folder_are_kept(with_splits):
    task = open_task(f"folder:{with_splits}", resolution=70)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 16,
        "search": 4,
        "trainval": 20,
        "val": 6,
        "test": 8,
    }
    images, labels = next(task.batches("train", 5, train=True))
    assert images.shape == (4, 3, 70, 70)
    assert labels.dtype == torch.int64
    assert next(task.batches("test", 8, train=False))[0].shape == (8, 3, 70, 70)


def test_a_tar_reads_like_the_folder_it_holds(with_splits, tmp_path):
    home = tmp_path / "pack"
    home.mkdir()
    with tarfile.open(home / "images.tar", "w") as archive:
        archive.add(with_splits, "images")
    tasks = [open_task(f"folder:{path}", resolution=16) for path in (with_splits, home, home / "images.tar")]
    first, *others = [list(task.batches("test", 3, train=False)) for task in tasks]
    for other in others:
        assert all(a.equal(x) and b.equal(y) for (a, b), (x, y) in zip(first, other, strict=True))
    content = (home / "images.tar").read_bytes()
    (home / "images.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"images\.tar is cut short"):
        open_task(f"folder:{home}", resolution=16)


def test_too_large_to_keep_gives_the_same_images(plain, monkeypatch):
    kept = open_task(f"folder:{plain}", resolution=16)
    monkeypatch.setattr(folder, "KEEP_BYTES", 1000)
    decoded = open_task(f"folder:{plain}", resolution=16)
    assert decoded.split("test").source.kept is None
    for epoch in (0, 1):
        for (a, _), (b, _) in zip(
            kept.batches("train", 4, train=True, epoch=epoch),
            decoded.batches("train", 4, train=True, epoch=epoch),
            strict=True,
        ):
            assert a.equal(b)


def test_images_are_upright(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            exif = Image.Exif()
            exif[0x0112] = 3  # upside down
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png", exif=exif)
    task = open_task(f"folder:{tmp_path}", resolution=32)
    image = task.split("train")[torch.tensor([0])][0][0]
    assert image[:, :16].max() == 0
    assert image[:, 16:].min() == 255


def test_broken_images_are_named(plain):
    path = plain / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])
    task = open_task(f"folder:{plain}", resolution=16)
    source = task.split("train").source
    with pytest.raises(UserError, match=r"cat/3\.jpg is not an image that can be read"):
        source[torch.arange(len(source))]


def test_bad_folders(tmp_path, with_splits):
    with pytest.raises(UserError, match="no such folder"):
        open_task(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images in class folders; expected DIR"):
        open_task(f"folder:{tmp_path / 'empty'}")
    write_images(tmp_path / "single" / "cat", 5)
    with pytest.raises(UserError, match="single class \\('cat'\\)"):
        open_task(f"folder:{tmp_path / 'single'}")
    write_images(tmp_path / "few" / "cat", 5)
    write_images(tmp_path / "few" / "dog", 2)
    with pytest.raises(UserError, match="'dog' has fewer than 3"):
        open_task(f"folder:{tmp_path / 'few'}")
    write_images(with_splits / "test" / "bird", 1)
    with pytest.raises(UserError, match="test has class 'bird', which train has not"):
        open_task(f"folder:{with_splits}")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"bad\.tar is not an uncompressed \.tar"):
        open_task(f"folder:{tmp_path / 'bad.tar'}")
