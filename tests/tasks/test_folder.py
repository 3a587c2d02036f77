"""Folders of images: both layouts, tars, and what can be wrong with them."""

import io
import struct
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


def places(task, split):
    """The class and path of each image of a split."""
    images = task.split(split)
    return {"/".join(images.source.files[number].parts) for number in images.indices.tolist()}


def decoded(tmp_path, image, suffix="png", **options):
    """The image, saved and read again: uint8 `(3, 8, 8)`."""
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return folder.decode(folder.ImageFile(path, str(path), path.parts), 8)


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
    assert places(task, "test") == places(other_seed, "test")  # the seed does not reach the test split
    assert places(task, "search") != places(other_seed, "search")
    assert len(places(task, "test") | places(task, "trainval")) == 30
    assert not places(task, "test") & places(task, "trainval")
    assert not places(task, "search") & places(task, "train")
    assert places(task, "search") | places(task, "train") == places(task, "trainval")


def test_about_a_fifth_of_each_class_is_the_test_split(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 300, size=(4, 4), suffix="bmp")
    write_images(tmp_path / "rare", 3)
    task = open_task(f"folder:{tmp_path}", resolution=4)
    assert 40 < task.split("test").labels.bincount()[:2].min() <= task.split("test").labels.bincount()[:2].max() < 80
    for split in ("train", "search", "test"):
        assert task.split(split).labels.bincount()[2] == 1


def test_images_that_come_or_go_leave_the_others_in_their_splits(plain):
    before = open_task(f"folder:{plain}", resolution=8)
    write_images(plain / "ant", 5)
    write_images(plain / "dog", 25, suffix="jpg")
    (plain / sorted(places(before, "test") - {"cat/0.jpg"})[-1]).unlink()
    after = open_task(f"folder:{plain}", resolution=8)
    for split in ("train", "search", "test"):
        kept = places(after, "trainval") | places(after, "test")
        assert places(before, split) & kept == places(after, split) & (
            places(before, "trainval") | places(before, "test")
        )


def test_the_fingerprint_changes_with_the_list_of_images(plain, tmp_path):
    first = open_task(f"folder:{plain}", resolution=8)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(plain, "images")
    assert open_task(f"folder:{tmp_path / 'images.tar'}", resolution=16).fingerprint == first.fingerprint
    (plain / "cat" / "3.jpg").rename(plain / "dog" / "3.jpg")
    assert open_task(f"folder:{plain}", resolution=8).fingerprint != first.fingerprint
    assert open_task("digits").fingerprint == ""


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


def test_val_is_the_test_split_where_there_is_no_other(with_splits):
    for file in (with_splits / "test").rglob("*.jpg"):
        file.unlink()
    task = open_task(f"folder:{with_splits}", resolution=16)
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 16,
        "search": 4,
        "trainval": 20,
        "test": 6,
    }


def test_deeper_folders_belong_to_the_class(tmp_path):
    for name in ("cat", "dog"):
        for year in ("2023", "2024"):
            write_images(tmp_path / "plain" / name / year, 3)
            write_images(tmp_path / "split" / "photos" / "train" / name / year / "may", 3)
        write_images(tmp_path / "split" / "photos" / "test" / name, 2)
    for layout in ("plain", "split"):
        task = open_task(f"folder:{tmp_path / layout}", resolution=8)
        assert task.class_names == ("cat", "dog")
        assert sum(len(task.split(split)) for split in ("trainval", "test")) == (12 if layout == "plain" else 16)
    assert task.split("test").labels.bincount().tolist() == [2, 2]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        write_images(tmp_path / name, 4)
    assert open_task(f"folder:{tmp_path}", resolution=8).class_names == ("car", "train")


def test_linked_classes_are_found_and_links_in_circles_end(plain, tmp_path):
    write_images(tmp_path / "elsewhere", 5)
    (plain / "owl").symlink_to(tmp_path / "elsewhere")
    (plain / "cat" / "all").symlink_to(plain)
    (plain / "dog" / "self").symlink_to(plain / "dog")
    task = open_task(f"folder:{plain}", resolution=8)
    assert task.class_names == ("cat", "dog", "owl")
    assert len(task.split("trainval")) + len(task.split("test")) == 35
    (plain / "emu").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="emu is neither a file nor a folder nor a link to one"):
        open_task(f"folder:{plain}")


def test_every_kind_of_image_is_read_and_no_class_is_lost(plain):
    write_images(plain / "ant", 4, suffix="tif")
    write_images(plain / "bee", 4, suffix="gif")
    assert open_task(f"folder:{plain}", resolution=8).class_names == ("ant", "bee", "cat", "dog")
    (plain / "notes.txt").write_text("beside the classes")
    (plain / "cat" / "notes.txt").write_text("beside images")
    (plain / "fox").mkdir()
    (plain / "fox" / ".hidden").write_text("")
    open_task(f"folder:{plain}", resolution=8)
    (plain / "fox" / "0.heic").write_text("")
    with pytest.raises(UserError, match=r"class 'fox' holds files, such as .*0\.heic, but no image .*; allowed: \.bmp"):
        open_task(f"folder:{plain}")


def test_a_tar_made_on_a_mac_and_one_with_links(with_splits, tmp_path):
    def pack(path, name, kind=None):
        with tarfile.open(path, "w") as archive:
            archive.add(with_splits, ".")
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind, "train/cat/0.jpg"
            else:
                member.size = 4
            archive.addfile(member, None if kind else io.BytesIO(b"Mac!"))
        return open_task(f"folder:{path}", resolution=8)

    assert len(pack(tmp_path / "mac.tar", "./train/cat/._0.jpg").split("trainval")) == 20
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with pytest.raises(UserError, match=r"links\.tar:train/cat/99\.jpg is a link; pack the files themselves"):
            pack(tmp_path / "links.tar", "train/cat/99.jpg", kind)


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


def test_a_tar_with_a_damaged_header_is_not_read_up_to_there(with_splits, tmp_path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(with_splits, ".")
    with tarfile.open(path) as archive:
        header = archive.getmembers()[20].offset
    content = bytearray(path.read_bytes())
    content[header] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"images\.tar is damaged: what follows .* is neither a file nor the end"):
        open_task(f"folder:{path}", resolution=8)


def test_too_large_to_keep_gives_the_same_images(plain, monkeypatch):
    kept = open_task(f"folder:{plain}", resolution=16)
    monkeypatch.setattr(folder, "KEEP_BYTES", 1000)
    anew = open_task(f"folder:{plain}", resolution=16)
    assert anew.split("test").source.kept is None
    assert anew.split("test")[torch.arange(0)][0].shape == (0, 3, 16, 16)
    for epoch in (0, 1):
        for (a, _), (b, _) in zip(
            kept.batches("train", 4, train=True, epoch=epoch),
            anew.batches("train", 4, train=True, epoch=epoch),
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


def test_16_bits_are_scaled_to_8(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    scaled = torch.from_numpy((ramp // 257).astype(np.uint8))
    for kind, suffix in (("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")):
        assert (decoded(tmp_path, Image.fromarray(ramp.astype(kind)), suffix) == scaled).all()
    with pytest.raises(UserError, match=r"image\.tif is not an image that can be read \(its pixels are floating-point"):
        decoded(tmp_path, Image.fromarray(ramp.astype(np.float32)), "tif")


def test_what_is_transparent_is_white(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    for image, options in (
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}),
        (Image.new("LA", (8, 8), (9, 0)), {}),
        (palette, {"transparency": 1}),
        (Image.new("RGB", (8, 8), (9, 8, 7)), {"transparency": (9, 8, 7)}),
    ):
        assert (decoded(tmp_path, image, **options) == 255).all()
    half = decoded(tmp_path, Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert half[:, 0, 0].tolist() == [255, 127, 127]
    assert decoded(tmp_path, palette)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("keep_bytes", [folder.KEEP_BYTES, 1000])
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_images_are_named_at_once(with_splits, keep_bytes, split, monkeypatch):
    monkeypatch.setattr(folder, "KEEP_BYTES", keep_bytes)
    path = with_splits / split / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cat/3\.jpg is not an image that can be read"):
        open_task(f"folder:{with_splits}", resolution=16)


def test_a_broken_exif_block_is_named(plain):
    # Turned by a quarter, and a width that is text: turning it upright writes the block anew and stumbles.
    entries = struct.pack("<HHHII", 2, 0x112, 3, 1, 6) + struct.pack("<HHII", 0x100, 2, 4, 0x20202020)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)
    Image.new("RGB", (8, 8)).save(plain / "cat" / "3.jpg", exif=exif)
    with pytest.raises(UserError, match=r"cat/3\.jpg is not an image that can be read \(required argument is not"):
        open_task(f"folder:{plain}", resolution=16)


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
