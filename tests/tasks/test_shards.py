"""Webdataset shards: what they hold, the order of training, broken images and broken shards."""

import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from netsmith.errors import UserError
from netsmith.prepare import next_folder
from netsmith.tasks import open_task
from netsmith.tasks.classification import Split
from netsmith.tasks.shards import _members, open_shards


def jpeg(seed):
    """A noisy photograph of 40 x 30 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """`members`: name -> bytes, or pairs where a name occurs twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # a fraction takes a pax header, as webdataset's do
            archive.addfile(member, io.BytesIO(content))


def samples(first, count, classes=2):
    """Members for images numbered from `first`, classes in turn."""
    return {
        name: content
        for number in range(first, first + count)
        for name, content in ((f"{number:04d}.cls", b"%d" % (number % classes)), (f"{number:04d}.jpg", jpeg(number)))
    }


@pytest.fixture
def shards(tmp_path):
    """20 training images in 4 shards, 6 of val, 8 of test in 2 shards."""
    for number in range(4):
        write_tar(tmp_path / "shards" / f"train-{number:06d}.tar", samples(5 * number, 5))
    write_tar(tmp_path / "shards" / "val-000000.tar", samples(100, 6))
    for number in range(2):
        write_tar(tmp_path / "shards" / f"test-{number:06d}.tar", samples(200 + 4 * number, 4))
    return tmp_path / "shards"


def opened(directory, **options):
    return open_task(f"shards:{directory}", resolution=16, **options)


def lengths(task):
    return {name: len(split) for name, split in task.splits.items()}


def names(split):
    return [split.name(place) for place in range(len(split))]


def everything(split):
    return split[torch.arange(len(split))]


def cut(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def test_splits_labels_and_names(shards):
    task = opened(shards)
    found = lengths(task)
    assert found["train"] + found["search"] == found["trainval"] == 20
    assert (found["val"], found["test"]) == (6, 8)
    assert task.class_names == ("0", "1")
    assert (task.input_shape, task.source) == ((3, 16, 16), str(shards))
    for name in found:
        split = task.split(name)
        assert split.labels.tolist() == [int(of.split(":")[1][:4]) % 2 for of in names(split)]
    assert names(task.split("test"))[3:5] == ["test-000000.tar:0203.jpg", "test-000001.tar:0204.jpg"]
    assert set(names(task.split("train"))) | set(names(task.split("search"))) == set(names(task.split("trainval")))


def test_the_images_are_those_of_the_same_folder(shards, tmp_path):
    for number in (*range(20), *range(200, 208)):
        home = tmp_path / "folder" / ("train" if number < 20 else "test") / str(number % 2)
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number:04d}.jpg").write_bytes(jpeg(number))
    folder = open_task(f"folder:{tmp_path / 'folder'}", resolution=16)
    task = opened(shards)
    for split in ("trainval", "test"):
        there, here = folder.split(split), task.split(split)
        by_name = {there.name(place).split("/")[-1]: there[torch.tensor([place])] for place in range(len(there))}
        for place, name in enumerate(names(here)):
            image, label = here[torch.tensor([place])]
            assert image.equal(by_name[name.split(":")[1]][0])
            assert label.equal(by_name[name.split(":")[1]][1])
    assert (task.mean, task.std) == (folder.mean, folder.std)
    assert opened(shards).input_shape == folder.input_shape
    for resolution, side in ((63, 63), (64, 73), (128, 146)):  # with a margin, as for folders
        assert open_task(f"shards:{shards}", resolution=resolution).split("test").source.side == side


def test_images_in_any_order_are_those_in_turn(shards):
    split = opened(shards).split("trainval")
    for place, number in enumerate(split.indices.tolist()):
        assert split.source.file(number).read() == jpeg(place)
    images, labels = everything(split)
    order = torch.tensor([7, 0, 19, 7, 3])
    assert split[order][0].equal(images[order])
    assert split[order][1].equal(labels[order])
    assert split[order[:0]][0].shape == (0, 3, 16, 16)


def test_what_webdataset_writes_is_read_as_webdataset_reads_it(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=7, verbose=0) as writer:
        for number in range(20):
            writer.write({"__key__": f"photo/{number:04d}", "jpg": jpeg(number), "cls": number % 3})
    task = opened(tmp_path)
    source = task.split("trainval").source
    assert len(source.shards) == 3
    theirs = []
    for shard in source.shards:  # WebDataset itself leaves the files open
        with open(tmp_path / shard, "rb") as stream:
            members = wds.tariterators.tar_file_expander([{"url": shard, "stream": stream}])
            theirs += list(wds.tariterators.group_by_keys(members))
    assert len(theirs) == len(source) == 20
    for number, sample in enumerate(theirs):
        assert source.file(number).read() == sample["jpg"] == jpeg(number)
        assert source.file(number).name == f"{sample['__url__']}:{sample['__key__']}.jpg"
        assert source.labels[number] == int(sample["cls"])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, format):
    path = tmp_path / "x.tar"
    content = {
        "a.cls": b"7",
        "folder/b.JSON": b"{}",
        "b" * 60 + "/" + "c" * 70 + ".jpg": bytes(513),  # more than the 100 bytes of the plain header
        "empty.jpg": b"",
        "photo of Zoë.jpg": bytes(512),
    }
    if format != tarfile.USTAR_FORMAT:
        content["d" * 300 + ".jpg"] = bytes(1000)
    write_tar(path, content, format)
    with tarfile.open(path, "a", format=format) as archive:
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE), ("in", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name if format == tarfile.USTAR_FORMAT else "long" * 40 + name)
            member.type, member.linkname = kind, "l" * (90 if format == tarfile.USTAR_FORMAT else 300)
            member.size = 0 if kind == tarfile.DIRTYPE else 2000  # a link states the size of its target
            archive.addfile(member)
        member = tarfile.TarInfo("last.jpg")
        archive.addfile(member)
    with tarfile.open(path) as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    ours = list(_members(path))
    assert [of[:3] for of in ours] == theirs
    assert [of[3] for of in ours if of[3]] == [b"7", b"{}"]


def test_the_other_layouts(shards, tmp_path):
    for number, path in enumerate(sorted(shards.glob("*.tar"))):
        split = {"train": "train", "val": "Validation", "test": "test"}[path.stem.split("-")[0]]
        to = tmp_path / "inside" / split / f"{number}.tar"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
        to = tmp_path / "long" / path.name.replace("val", "Valid").replace("-", "_")
        to.parent.mkdir(exist_ok=True)
        to.with_name(f"birds-{to.name}").write_bytes(path.read_bytes())
    (tmp_path / "inside" / "classes.txt").write_text("crane\ncrane\n\n", encoding="utf-8-sig")  # ImageNet has two
    (tmp_path / "inside" / "train" / "._0.tar").write_bytes(b"what a Mac leaves")
    task = opened(tmp_path / "inside")
    assert task.split("train").source.skipped == ()
    for other in (opened(tmp_path / "long"), opened(shards)):
        for split in ("trainval", "val", "test"):
            assert everything(task.split(split))[0].equal(everything(other.split(split))[0])
    assert task.class_names == ("crane", "crane")
    assert task.split("test").name(0) == "test/0.tar:0200.jpg"


def test_without_test_shards_val_is_the_test_split(shards):
    for path in shards.glob("test-*"):
        path.unlink()
    found = lengths(opened(shards))
    assert found["test"] == 6
    assert "val" not in found


def test_without_both_a_fifth_of_each_class_is(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"train-{number}.tar", samples(200 * number, 200))
    task, other = opened(tmp_path), opened(tmp_path, seed=1)
    counts = task.split("test").labels.bincount()
    assert 40 < counts.min() <= counts.max() < 80
    assert names(task.split("test")) == names(other.split("test"))
    assert names(task.split("search")) != names(other.split("search"))
    held = [set(names(task.split(split))) for split in ("train", "search", "test")]
    assert len(set.union(*held)) == sum(map(len, held)) == 600
    small = opened(tmp_path, limit=100)
    assert len(small.split("trainval")) == 100
    assert names(small.split("test")) == names(task.split("test"))


def test_json_gives_the_class_where_there_is_no_cls(tmp_path):
    members = samples(0, 9, classes=3)
    del members["0001.cls"]
    members["0001.json"] = json.dumps({"label": 1, "filename": "x"}).encode()
    members["0002.json"] = json.dumps({"label": "cat"}).encode()  # its .cls counts
    members["0003.json"], members["0004.json"] = b"[]", b"{broken"
    members["0005.seg.png"], members["0006.txt"], members["readme.txt"] = b"no image of ours", b"text", b""
    members["._0007.jpg"], members[".hidden/0008.jpeg.txt"] = b"what a Mac leaves", b""
    write_tar(tmp_path / "train-0.tar", members)
    source = opened(tmp_path).split("trainval").source
    assert [source.labels[number] for number in range(9)] == [0, 1, 2] * 3


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_an_epoch_has_every_image_once_and_few_shards_at_a_time(tmp_path, window):
    for number in range(7):
        write_tar(tmp_path / f"train-{number}.tar", samples(10 * number, 4 + number))
    source = open_shards(tmp_path, 8)
    object.__setattr__(source, "window", window)
    wanted = torch.arange(len(source))[source.places[:, 0] != 3]  # one shard belongs to another split
    split = Split(source, wanted, source.labels[wanted])
    orders = []
    for seed in (0, 0, 1):
        order = split.shuffled(torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(len(split)))
        orders.append(order.tolist())
        shards = source.places[split.indices[order], 0].tolist()
        at, seen = 0, set()
        while at < len(shards):  # window by window: as many shards as it has, none of them again
            together = set()
            for shard in shards[at:]:
                if shard not in together and len(together) == min(window, 6 - len(seen)):
                    break
                together.add(shard)
                at += 1
            assert not together & seen
            seen |= together
        assert len(seen) == 6
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    if window == 8:  # a single window: neighbours come from all over
        assert sum(a == b for a, b in pairwise(shards)) < len(shards) / 2


def test_the_order_of_other_splits_is_a_plain_permutation():
    split = open_task("digits").split("train")
    order = split.shuffled(torch.Generator().manual_seed(3))
    assert order.equal(torch.randperm(len(split), generator=torch.Generator().manual_seed(3)))
    assert split.name(5) == f"image {int(split.indices[5])}"


def test_a_broken_image_has_no_label_and_a_name(shards):
    members = samples(5, 5)
    members["0006.jpg"] = members["0006.jpg"][:300]
    members["0008.jpg"] = b"no image"
    members["0009.jpg"] = b""
    write_tar(shards / "train-000001.tar", members)
    split = opened(shards).split("trainval")
    images, labels = everything(split)
    broken = [5 + place for place in (1, 3, 4)]
    assert (labels == -1).nonzero().flatten().tolist() == broken
    assert images[broken].count_nonzero() == 0
    assert [split.name(place) for place in broken] == [f"train-000001.tar:{number:04d}.jpg" for number in (6, 8, 9)]
    whole = [place for place in range(20) if place not in broken]
    assert labels[whole].tolist() == [place % 2 for place in whole]
    assert split.labels.min() == 0  # what the split says of itself stays


def test_a_shard_that_breaks_after_opening_gives_broken_images(shards):
    split = opened(shards).split("test")
    before, labels = everything(split)
    cut(shards / "test-000000.tar", 0.5)
    (shards / "test-000001.tar").unlink()
    after, now = everything(split)
    kept = now >= 0
    assert 0 < kept.sum() < 4
    assert (now[4:] == -1).all()
    assert after[kept].equal(before[kept])
    assert now[kept].equal(labels[kept])


def test_a_cut_shard_is_skipped_and_named(shards):
    whole = opened(shards)
    for part in (0.7, 0.5, 0.01):
        cut(shards / "train-000001.tar", part)
        task = opened(shards)
        assert task.split("train").source.skipped == ("train-000001.tar",)
        assert not [name for name in names(task.split("trainval")) if name.startswith("train-000001")]
        assert len(task.split("trainval")) == 15
        assert task.fingerprint != whole.fingerprint
    assert whole.split("train").source.skipped == ()


def test_every_cut_and_every_damaged_header_is_noticed(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {"a.cls": b"1", "a.jpg": bytes(700)})
    content, (*_, last) = path.read_bytes(), _members(path)
    end = last[1] + 1024
    assert not any(content[end:])
    for length in range(0, end + 512, 100):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut short"):
            list(_members(path))
    path.write_bytes(content[: end + 512])
    list(_members(path))
    for at in (0, 120, 130, 150, 156, last[1] - 512 + 3):  # all in headers
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"is no header of a \.tar"):
            list(_members(path))


def test_more_than_one_broken_shard_in_a_hundred_is_an_error(tmp_path):
    for number in range(200):
        write_tar(tmp_path / f"train-{number:03d}.tar", {f"{number}.cls": b"%d" % (number % 2), f"{number}.jpg": b""})
    for number in (7, 70):
        (tmp_path / f"train-{number:03d}.tar").write_bytes(b"no tar" * 200)
    assert open_shards(tmp_path, 8).skipped == ("train-007.tar", "train-070.tar")
    cut(tmp_path / "train-150.tar", 0.1)
    with pytest.raises(UserError, match=r"train-007\.tar cannot be read \(byte 0 .*, nor can train-150\.tar"):
        open_shards(tmp_path, 8)


def test_a_split_whose_only_shard_is_broken_is_an_error(shards):
    cut(shards / "val-000000.tar", 0.5)
    with pytest.raises(UserError, match=r"the val shards hold no images; val-000000\.tar cannot .*\(it is cut"):
        opened(shards)


def test_the_fingerprint_changes_with_the_shards(shards):
    first = opened(shards).fingerprint
    assert open_task(f"shards:{shards}", resolution=32).fingerprint == first
    (shards / "train-000003.tar").rename(shards / "train-000004.tar")
    second = opened(shards).fingerprint
    (shards / "train-000000.tar").unlink()
    third = opened(shards).fingerprint
    write_tar(shards / "val-000000.tar", {**samples(100, 5), "0105.cls": b"1", "0105.jpg": bytes(20000)})
    assert len({first, second, third, opened(shards).fingerprint}) == 4


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.jpg": b""}, r"train-9\.tar:a\.jpg has no class; expected its number in a\.cls beside it"),
        ({"a.cls": b"1"}, r"train-9\.tar:a\.cls has no image beside it that can be read; allowed: \.bmp"),
        ({"a.heic": b"", "a.cls": b"1"}, r"a\.cls has no image beside it"),
        ({"a.jpg": b"", "a.cls": b"cat"}, r"train-9\.tar:a\.cls gives 'cat' as the class; expected a number from 0"),
        ({"a.jpg": b"", "a.cls": b""}, r"gives '' as the class"),
        ({"a.jpg": b"", "a.cls": b"-1"}, r"gives '-1' as the class"),
        ({"a.jpg": b"", "a.cls": "\u0663".encode()}, r"gives '\u0663' as the class"),
        ({"a.jpg": b"", "a.json": b'{"label": 1.5}'}, r"train-9\.tar:a\.json gives '1\.5' as the class"),
        (
            {"a.jpg": b"", "a.cls": b"3"},
            r"train-9\.tar:a\.jpg is of class 3, but classes\.txt names 3 classes",
        ),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"1"}, r"two images with the key 'a': a\.jpg and a\.png"),
        ([("a.jpg", b""), ("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", b"")], r"two images with the key 'a'"),
    ],
)
def test_bad_samples(shards, members, said):
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    opened(shards)
    write_tar(shards / "train-9.tar", members)
    with pytest.raises(UserError, match=said):
        opened(shards)


def test_bad_folders(tmp_path, shards):
    with pytest.raises(UserError, match=r"found none of train-\*\.tar, train/\*\.tar; there is no such folder"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it holds no shards; expected DIR/train-\*\.tar"):
        opened(tmp_path / "empty")
    write_tar(tmp_path / "empty" / "test-0.tar", samples(0, 4))
    with pytest.raises(UserError, match="it holds only test shards; expected"):
        opened(tmp_path / "empty")
    write_tar(tmp_path / "empty" / "train-0.tar", {})
    with pytest.raises(UserError, match="the train shards hold no images"):
        opened(tmp_path / "empty")
    write_tar(tmp_path / "empty" / "train-0.tar", samples(0, 4, classes=1))
    with pytest.raises(UserError, match=r"has a single class \(0\)"):
        opened(tmp_path / "empty")
    write_tar(shards / "test-5.tar", {"a.jpg": b"", "a.cls": b"2"})
    with pytest.raises(UserError, match=r"test-5\.tar:a\.jpg is of class 2, but the training images have 2 classes"):
        opened(shards)
    (shards / "test-5.tar").rename(shards / "extra-5.tar")
    with pytest.raises(UserError, match=r"extra-5\.tar names no split; expected"):
        opened(shards)


def test_runs_are_named_after_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(next_folder("shards:/data/birds/", "prunet")) == "runs/birds-prunet-1"
