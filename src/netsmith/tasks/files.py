"""Read the layouts in which image classification sets are published; every defect is a `UserError` naming the file.

Nothing here runs code that comes with the data: CIFAR's pickles go through an unpickler that can only rebuild arrays,
`.npz` files are read without pickles, archives are never extracted.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netsmith.errors import UserError

BROKEN = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    MemoryError,
    OverflowError,
)
LARGEST = 4 << 30  # bytes; a header that asks for more is taken for a damaged one
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Arrays:
    """A set in memory: `images` uint8 `(images, height, width, channels)`, `labels` `(images,)`; train and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: Path


def digits() -> Arrays:
    """scikit-learn's 8x8 digits; a fixed fifth, class by class, is the test split (the file has none of its own)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    test = np.concatenate([(of := order[bunch.target[order] == c])[: len(of) // 5] for c in range(10)])
    train = np.setdiff1d(np.arange(len(images)), test)
    labels = bunch.target.astype(np.int64)
    return Arrays(
        images[train],
        labels[train],
        images[test],
        labels[test],
        tuple("0123456789"),
        Path("sklearn.datasets.load_digits"),
    )


def cifar10(roots: list[Path]) -> Arrays:
    """CIFAR-10 from Python batches, binary batches, or the 10,000-image pack, whichever is found first."""

    def names(folder: Path, file: str) -> tuple[str, ...]:
        path = folder / file
        if file.endswith(".txt"):
            return tuple(_reading(path, lambda: path.read_text().split()))
        return tuple(name.decode() for name in _unpickle(path, b"label_names")[0])

    parts = [f"data_batch_{i}" for i in range(1, 6)]
    if folder := _find(roots, "cifar-10-batches-py"):
        return _cifar(
            folder,
            names(folder, "batches.meta"),
            [folder / p for p in parts],
            [folder / "test_batch"],
            lambda path: _cifar_pickle(path, b"labels"),
        )
    if folder := _find(roots, "cifar-10-batches-bin"):
        return _cifar(
            folder,
            names(folder, "batches.meta.txt"),
            [folder / f"{p}.bin" for p in parts],
            [folder / "test_batch.bin"],
            lambda path: _cifar_binary(path, label_bytes=1),
        )
    if path := _find(roots, "cifar10_small.npz"):
        return _small_pack(path)
    raise _missing("cifar10", ["cifar-10-batches-py/", "cifar-10-batches-bin/", "cifar10_small.npz"], roots)


def cifar100(roots: list[Path]) -> Arrays:
    """CIFAR-100 (the 100 fine labels) from Python or binary files."""
    if folder := _find(roots, "cifar-100-python"):
        names = tuple(name.decode() for name in _unpickle(folder / "meta", b"fine_label_names")[0])
        return _cifar(
            folder, names, [folder / "train"], [folder / "test"], lambda path: _cifar_pickle(path, b"fine_labels")
        )
    if folder := _find(roots, "cifar-100-binary"):
        path = folder / "fine_label_names.txt"
        names = tuple(_reading(path, lambda: path.read_text().split()))
        return _cifar(
            folder,
            names,
            [folder / "train.bin"],
            [folder / "test.bin"],
            lambda path: _cifar_binary(path, label_bytes=2),
        )
    raise _missing("cifar100", ["cifar-100-python/", "cifar-100-binary/"], roots)


def fashion_mnist(roots: list[Path]) -> Arrays:
    """Fashion-MNIST from its four IDX files, compressed or not."""

    def idx(stem: str) -> np.ndarray:
        path = _find(folders, stem) or _find(folders, stem + ".gz")
        if path is None:
            raise _missing("fashion-mnist", [f"{stem}[.gz]"], folders)
        return read_idx(path)

    folders = [root / sub for root in roots for sub in ("fashion-mnist", "FashionMNIST/raw", "raw", ".")]
    train_images, train_labels = idx("train-images-idx3-ubyte"), idx("train-labels-idx1-ubyte")
    test_images, test_labels = idx("t10k-images-idx3-ubyte"), idx("t10k-labels-idx1-ubyte")
    source = next(f for f in folders if any(f.glob("train-images-idx3-ubyte*")))
    return _checked(Arrays(train_images[..., None], train_labels, test_images[..., None], test_labels, FASHION, source))


def read_idx(path: Path) -> np.ndarray:
    """A uint8 IDX file (big-endian: 0, 0, type 8, dimensions, sizes, bytes), gzip'd or not."""

    def read() -> np.ndarray:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
            if zero or kind != 8 or dimensions not in (1, 3):
                raise ValueError(f"not an IDX file of bytes (it starts with {zero}, {kind}, {dimensions})")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size = math.prod(shape)
            if size > LARGEST:
                raise ValueError(f"its header promises {shape}")
            content = file.read(size + 1)
            if len(content) != size:
                held = "more" if len(content) > size else len(content)
                raise ValueError(f"its header promises {size} bytes, it holds {held}")
        return np.frombuffer(content, np.uint8).reshape(shape)

    return _reading(path, read)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds dicts, lists, strings, numbers and numpy arrays; any other name in the stream is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # its home has moved once and warns at the old place
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes into a protocol-2 stream
            return lambda text, encoding="latin1": str(text).encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data file has no use for")


def _unpickle(path: Path, *keys: bytes) -> list[Any]:
    def read() -> list[Any]:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return [content[key] for key in keys]

    return _reading(path, read)


def _cifar_pickle(path: Path, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = _unpickle(path, b"data", label_key)
    return rows, np.asarray(labels)


def _cifar_binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    def read() -> tuple[np.ndarray, np.ndarray]:
        rows = np.fromfile(path, np.uint8)
        if not len(rows) or len(rows) % (label_bytes + 3072):
            raise ValueError(f"{len(rows)} bytes are no whole number of {label_bytes + 3072}-byte records")
        rows = rows.reshape(-1, label_bytes + 3072)
        return rows[:, label_bytes:], rows[:, label_bytes - 1]  # the fine label is the last before the pixels

    return _reading(path, read)


def _cifar(
    folder: Path,
    class_names: tuple[str, ...],
    train: list[Path],
    test: list[Path],
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]],
) -> Arrays:
    def join(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for path in paths:
            rows, labels = read(path)
            if getattr(rows, "dtype", None) != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
                raise UserError(f"{path} is damaged: its rows are not 3072 bytes")
            if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
                raise UserError(f"{path} is damaged: {labels.shape} labels for {len(rows)} images")
            parts.append((rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([labels for _, labels in parts])

    return _checked(Arrays(*join(train), *join(test), class_names, folder))


def _small_pack(path: Path) -> Arrays:
    def read() -> Arrays:
        # A file of our own: numpy leaves the one it opens itself open when the archive is damaged.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as pack:
            return Arrays(
                pack["x_train"],
                pack["y_train"],
                pack["x_test"],
                pack["y_test"],
                tuple(str(name) for name in pack["classes"]),
                path,
            )

    return _checked(_reading(path, read))


def _checked(arrays: Arrays) -> Arrays:
    for part, images, labels in (
        ("train", arrays.train_images, arrays.train_labels),
        ("test", arrays.test_images, arrays.test_labels),
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
            raise UserError(f"{arrays.source} is damaged: {part} images are {images.shape}, labels {labels.shape}")
        if not len(images):
            raise UserError(f"{arrays.source} has no {part} images")
        if labels.min() < 0 or labels.max() >= len(arrays.class_names):
            raise UserError(f"{arrays.source} is damaged: a {part} label lies outside 0..{len(arrays.class_names) - 1}")
    return arrays


def _find(roots: list[Path], name: str) -> Path | None:
    candidates = [path for root in roots for path in (root / name, root) if path.name == name]
    return next((path for path in candidates if path.exists()), None)


def _missing(task: str, names: list[str], roots: list[Path]) -> UserError:
    looked = ", ".join(dict.fromkeys(str(root) for root in roots if root.is_dir())) or "no folder that exists"
    return UserError(
        f"{task}: found none of {', '.join(names)} in {looked}; "
        "name the folder that holds them (data, or the environment variable NETSMITH_DATA)"
    )


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except BROKEN as error:
        raise UserError(f"{path} cannot be read ({error or type(error).__name__})") from error
