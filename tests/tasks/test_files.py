"""Published layouts: read right when whole, refused in one sentence when not."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest

from netsmith.errors import UserError
from netsmith.tasks import TASKS, open_task

RNG = np.random.default_rng(0)


def cifar_rows(count: int, classes: int) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (count, 3072), np.uint8), [i % classes for i in range(count)]


def write_cifar10_pickles(folder, per_batch=20):
    folder.mkdir(parents=True)
    written = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows, labels = cifar_rows(per_batch, 10)
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": labels, b"batch_label": b"x"}, protocol=2))
        written[name] = rows
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, protocol=2))
    return written


def write_cifar10_binary(folder):
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows, labels = cifar_rows(20, 10)
        (folder / name).write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], rows], 1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n\n")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, compress=True, train=100, test=20):
    folder.mkdir(parents=True)
    for stem, count in (("train", train), ("t10k", test)):
        arrays = {
            "images-idx3": RNG.integers(0, 256, (count, 28, 28), np.uint8),
            "labels-idx1": (np.arange(count) % 10).astype(np.uint8),
        }
        for kind, array in arrays.items():
            content = idx_bytes(array)
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("below", ["cifar10", ".", "itself"])
def test_cifar10_pickles(tmp_path, below):
    folder = tmp_path / ("" if below == "itself" else below) / "cifar-10-batches-py"
    written = write_cifar10_pickles(folder)
    task = open_task("cifar10", folder if below == "itself" else tmp_path)
    assert task.classes == 10
    assert task.class_names[3] == "c3"
    assert task.input_shape == (3, 32, 32)
    assert (task.split("trainval").source[0].numpy() == written["data_batch_1"][0].reshape(3, 32, 32)).all()
    assert (task.split("test").source.numpy().reshape(-1, 3072) == written["test_batch"]).all()
    assert task.split("trainval").labels.tolist() == [i % 10 for _ in range(5) for i in range(20)]


def test_cifar10_binary(tmp_path):
    write_cifar10_binary(tmp_path / "cifar-10-batches-bin")
    task = open_task("cifar10", tmp_path)
    assert task.class_names[9] == "c9"
    assert len(task.split("trainval")) == 100
    assert task.split("test").labels.tolist() == [i % 10 for i in range(20)]


def test_cifar100_pickle_and_binary_agree(tmp_path):
    names = [f"f{i}" for i in range(100)]
    python, binary = tmp_path / "a" / "cifar-100-python", tmp_path / "b" / "cifar-100-binary"
    python.mkdir(parents=True)
    binary.mkdir(parents=True)
    for part, count in (("train", 500), ("test", 100)):
        rows, fine = cifar_rows(count, 100)
        (python / part).write_bytes(pickle.dumps({b"data": rows, b"fine_labels": fine}, protocol=2))
        labels = np.array([[7, label] for label in fine], np.uint8)  # the coarse label comes first
        (binary / f"{part}.bin").write_bytes(np.concatenate([labels, rows], 1).tobytes())
    (python / "meta").write_bytes(pickle.dumps({b"fine_label_names": [n.encode() for n in names]}, protocol=2))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    first, second = open_task("cifar100", tmp_path / "a"), open_task("cifar100", tmp_path / "b")
    assert first.class_names == second.class_names == tuple(names)
    for split in ("train", "search", "test"):
        assert first.split(split).indices.equal(second.split(split).indices)
        assert first.split(split).labels.equal(second.split(split).labels)
        assert first.split(split).source.equal(second.split(split).source)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist(tmp_path, below, compress):
    write_fashion(tmp_path / "data" / below, compress)
    task = open_task("fashion-mnist", tmp_path / "data")
    assert task.input_shape == (1, 28, 28)
    assert len(task.split("trainval")) == 100
    assert task.class_names[9] == "Ankle boot"


def test_the_data_folder_comes_from_the_environment(tmp_path, monkeypatch):
    write_fashion(tmp_path / "raw")
    monkeypatch.setenv("NETSMITH_DATA", str(tmp_path))
    assert len(open_task("fashion-mnist").split("test")) == 20


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/netsmith-was-here",)


def test_a_malicious_pickle_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10_pickles(folder)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_2 cannot be read .*system, which a data file has no use for"):
        open_task("cifar10", tmp_path)
    assert not os.path.exists("/tmp/netsmith-was-here")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def garbage(path):
    path.write_bytes(b"this is no data at all, sorry" * 3)


@pytest.mark.parametrize("damage", [truncate, garbage, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    ("task", "write", "file"),
    [
        ("cifar10", write_cifar10_pickles, "cifar-10-batches-py/data_batch_3"),
        ("cifar10", write_cifar10_pickles, "cifar-10-batches-py/batches.meta"),
        ("cifar10", write_cifar10_binary, "cifar-10-batches-bin/data_batch_3.bin"),
        ("fashion-mnist", write_fashion, "raw/train-images-idx3-ubyte.gz"),
        ("fashion-mnist", write_fashion, "raw/t10k-labels-idx1-ubyte.gz"),
    ],
)
def test_damaged_files_are_named(tmp_path, task, write, file, damage):
    path = tmp_path / file
    write(path.parent)
    damage(path)
    with pytest.raises(UserError, match=path.name.split(".")[0]) as caught:
        open_task(task, tmp_path)
    assert "\n" not in str(caught.value)


def test_plain_idx_and_npz_cut_short(tmp_path):
    write_fashion(tmp_path / "raw", compress=False)
    truncate(tmp_path / "raw" / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match="its header promises 78400 bytes, it holds 78390"):
        open_task("fashion-mnist", tmp_path)
    path = tmp_path / "cifar10_small.npz"
    x, y = RNG.integers(0, 256, (100, 32, 32, 3), np.uint8), np.arange(100) % 10
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y, classes=[f"c{i}" for i in range(10)])
    assert len(open_task("cifar10", tmp_path).split("train")) == 80
    truncate(path)
    with pytest.raises(UserError, match=r"cifar10_small\.npz cannot be read"):
        open_task("cifar10", tmp_path)
    np.savez(path, x_train=x, y_train=y + 1, x_test=x, y_test=y, classes=[f"c{i}" for i in range(10)])
    with pytest.raises(UserError, match=r"a train label lies outside 0\.\.9"):
        open_task("cifar10", tmp_path)
    np.savez(path, x_train=np.array([Evil()], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        open_task("cifar10", tmp_path)


def test_missing_files_say_what_was_looked_for_and_where(tmp_path):
    with pytest.raises(UserError, match=r"cifar10_small\.npz in .*NETSMITH_DATA") as caught:
        open_task("cifar10", tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        open_task("cifar10", tmp_path / "nowhere")
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        open_task("cifar")
    for name in TASKS.keys() - {"digits", "folder:DIR"}:
        with pytest.raises(UserError, match="found none of"):
            open_task(name, tmp_path)
