"""Webdataset shards: tars of `KEY.jpg` and `KEY.cls`, indexed when the task is opened, each image read when needed.

The index knows where in which tar an image lies, so that any image can be read at any time: a process reads its own
share of a batch and nothing else, and an interrupted epoch goes on where it stopped. A shuffle buffer allows neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from netsmith.errors import UserError
from netsmith.tasks.folder import SPLITS, SUFFIXES, ImageFile, decode

LAYOUT = "expected DIR/train-*.tar or DIR/train/*.tar, uncompressed, and val and test likewise"
KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""A member's name: the key ends at the first dot of the file name, as in webdataset; hidden files have none."""
BLOCK = 512
ZEROS = bytes(BLOCK)
FILE, EMPTY = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
"""Kinds of members that are files, and that have no content: links, devices, folders."""


@dataclass(frozen=True, eq=False)
class ShardImages:
    """The images of all shards in order of shard and place; `read(indices)` decodes some of them."""

    directory: Path
    shards: tuple[str, ...]
    """Paths below `directory`."""
    skipped: tuple[str, ...]
    """The shards among them that cannot be read to the end, of which no image is used."""
    class_names: tuple[str, ...]
    fingerprint: str
    """A short digest of the shards' names, sizes and numbers of images."""
    splits: dict[str, Tensor] = field(repr=False)
    """"train", and "val" and "test" where there are such shards: which images, `(n,)`."""
    labels: Tensor = field(repr=False)
    """int64 `(images,)`."""
    places: Tensor = field(repr=False)
    """Number of the shard, offset and size in bytes, int64 `(images, 3)`."""
    names: list[str] = field(repr=False)
    """Names in the tar."""
    side: int
    """Pixels a side of a decoded image."""
    window: int = 8
    """Shards whose images are shuffled together."""

    def __len__(self) -> int:
        return len(self.names)

    def file(self, number: int) -> ImageFile:
        shard, offset, size = self.places[number].tolist()
        path, name = self.shards[shard], self.names[number]
        return ImageFile(self.directory / path, f"{path}:{name}", (path, name), offset, size)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `(n, 3, side, side)`, and bool `(n,)`: which could be read. The others are black."""
        images = torch.zeros(len(indices), 3, self.side, self.side, dtype=torch.uint8)
        readable = torch.zeros(len(indices), dtype=torch.bool)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets go of the interpreter while it decodes
            for row, image in enumerate(pool.map(self._decode, indices.tolist())):
                if image is not None:
                    images[row], readable[row] = image, True
        return images, readable

    def _decode(self, number: int) -> Tensor | None:
        try:
            return decode(self.file(number), self.side)
        except UserError:
            return None

    def shuffled(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Positions in `indices`, each once, `(n,)`: shards in random order, images shuffled among `window` shards.

        So at any time an epoch reads from a few files only, which the system's cache may hold.
        """
        _, shard = self.places[indices, 0].unique(return_inverse=True)
        turn = torch.randperm(int(shard.max()) + 1, generator=generator)[shard] // self.window
        order = torch.randperm(len(indices), generator=generator)
        return order[turn[order].argsort(stable=True)]


def open_shards(directory: Path, side: int) -> ShardImages:
    """Index the shards in `directory`; the images will be decoded to `side` pixels.

    A shard that is cut short or damaged is skipped whole. Raises `UserError` where that befalls more than one shard and
    more than 1 % of them, and where the shards are no set to learn from.
    """
    shards = _find(directory)
    labels, names, places = [], [], []
    numbers: dict[str, list[int]] = {split: [] for split in shards.values()}
    skipped: dict[str, str] = {}
    digest = hashlib.sha256()
    for shard, (path, split) in enumerate(shards.items()):
        size, samples = 0, []
        try:
            size = (directory / path).stat().st_size
            samples = _samples(directory / path)
        except (ValueError, OSError) as error:
            skipped[path] = f"{path} cannot be read ({error})"
            if len(skipped) > max(1, len(shards) // 100):
                raise UserError(f"shards:{directory}: {next(iter(skipped.values()))}, nor can {path}") from error
        for name, *place, label in samples:
            numbers[split].append(len(names))
            names.append(name)
            places.append((shard, *place))
            labels.append(label)
        digest.update(f"{path}\n{size}\n{len(samples)}\n".encode(errors="surrogateescape"))
    for split, of_split in numbers.items():
        if not of_split:
            why = "".join(f"; {said}" for said in skipped.values())
            raise UserError(f"shards:{directory}: the {split} shards hold no images{why}")
    images = ShardImages(
        directory=directory,
        shards=tuple(shards),
        skipped=tuple(skipped),
        class_names=_class_names(directory, [labels[number] for number in numbers["train"]]),
        fingerprint=digest.hexdigest()[:16],
        splits={split: torch.tensor(of_split) for split, of_split in numbers.items()},
        labels=torch.tensor(labels),
        places=torch.tensor(places),
        names=names,
        side=side,
    )
    classes = len(images.class_names)
    if strange := [number for number, label in enumerate(labels) if label >= classes]:
        said = "classes.txt names" if (directory / "classes.txt").exists() else "the training images have"
        name = images.file(strange[0]).name
        raise UserError(
            f"shards:{directory}: {name} is of class {labels[strange[0]]}, but {said} {classes} classes, counted from 0"
        )
    return images


def _find(directory: Path) -> dict[str, str]:
    """Path below `directory` -> split, of every shard, in order of path."""
    missing = f"shards:{directory}: found none of train-*.tar, train/*.tar"
    if not directory.is_dir():
        raise UserError(f"{missing}; there is no such folder")
    inside = [path for path in directory.iterdir() if path.is_dir() and path.name.lower() in SPLITS]
    shards: dict[str, str] = {}
    for path in sorted(path for folder in (directory, *inside) for path in folder.glob("*.tar")):
        if path.name.startswith("."):  # a Mac leaves a ._train-0.tar beside train-0.tar
            continue
        words = [path.parent.name] if path.parent != directory else re.split(r"[-_.]", path.stem)
        split = next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)
        if split is None:
            raise UserError(f"shards:{directory}: {path.name} names no split; {LAYOUT}")
        shards[path.relative_to(directory).as_posix()] = split
    if "train" not in shards.values():
        held = f"only {', '.join(sorted(set(shards.values())))} shards" if shards else "no shards"
        raise UserError(f"{missing}; it holds {held}; {LAYOUT}")
    return shards


def _class_names(directory: Path, labels: list[int]) -> tuple[str, ...]:
    """The lines of classes.txt, or else a number for each class up to the highest of the training images."""
    if len(set(labels)) < 2:
        raise UserError(f"shards:{directory} has a single class ({labels[0]}); a classifier needs two or more")
    file = directory / "classes.txt"
    if not file.exists():
        return tuple(str(label) for label in range(max(labels) + 1))
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error


def _samples(path: Path) -> list[tuple[str, int, int, int]]:
    """Name, offset, size (bytes) and label of every image of one shard, in its order.

    Raises: ValueError or OSError where the tar cannot be read to its end; UserError for what it should not hold.
    """
    images: dict[str, tuple[str, int, int]] = {}
    written: dict[str, int] = {}
    described: dict[str, object] = {}
    for name, offset, size, content in _members(path):
        if not (match := KEY.fullmatch(name)):
            continue
        key, suffix = match[1], match[2].lower()
        if f".{suffix}" in SUFFIXES:
            if key in images:
                raise UserError(f"{path} has two images with the key {key!r}: {images[key][0]} and {name}")
            images[key] = name, offset, size
        elif suffix == "cls":
            written[key] = _number(content.decode(errors="replace").strip(), f"{path}:{name}")
        elif suffix == "json" and (label := _described(content)) is not None:
            described[key] = label
    labels = written | {
        key: _number(str(label), f"{path}:{key}.json")
        for key, label in described.items()
        if key in images and key not in written  # beside a .cls, it may be the name of the class
    }
    if lost := [key for key in images if key not in labels]:
        raise UserError(f"{path}:{images[lost[0]][0]} has no class; expected its number in {lost[0]}.cls beside it")
    if lost := [key for key in written if key not in images]:
        allowed = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{path}:{lost[0]}.cls has no image beside it that can be read; allowed: {allowed}")
    return [(*images[key], labels[key]) for key in images]


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name} gives {text[:40]!r} as the class; expected a number from 0 in decimal digits")
    return int(text)


def _described(content: bytes) -> object:
    """The "label" of a .json, or None."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found.get("label") if isinstance(found, dict) else None


def _members(path: Path) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, offset and size (bytes) of each file in a tar; the content of .cls and .json, of others nothing.

    Not tarfile, which needs four times as long (0.2 ms an image, three minutes for a million): webdataset writes the
    time of each file as a header of its own. Raises: ValueError or OSError where the tar is cut short or damaged.
    """
    with open(path, "rb") as file:

        def read(count: int) -> bytes:
            if len(content := file.read(count)) < count:
                raise ValueError("it is cut short: the block of zeros that ends a .tar is missing")
            return content

        at, long_name = 0, ""
        while (header := read(BLOCK)) != ZEROS:
            size = _size(header)
            if size is None:
                raise ValueError(f"byte {at} is no header of a .tar")
            kind = header[156:157]
            if kind in FILE:
                name = long_name or _name(header)
                yield name, at + BLOCK, size, read(size) if name.lower().endswith((".cls", ".json")) else b""
            if kind == b"L":
                long_name = _text(read(size))
            elif kind == b"x":
                long_name = _pax_path(read(size)) or long_name
            else:
                long_name = ""
            at += BLOCK + (0 if kind in EMPTY else -(-size // BLOCK) * BLOCK)
            file.seek(at)


def _size(header: bytes) -> int | None:
    """Bytes that follow a header; None where its sum of bytes is wrong, or it is of a kind that is not read here."""
    try:
        written = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0") or b"0", 8)  # from 8 GiB on it is written otherwise
    except ValueError:
        return None
    intact = written == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return size if intact and size >= 0 and header[156:157] != b"S" else None


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_path(records: bytes) -> str:
    """The path in records of the form `LENGTH KEY=VALUE\\n`, or nothing."""
    path = b""
    while records:
        length = int(records.partition(b" ")[0])
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        if length < 5:
            raise ValueError("it has a damaged pax header")
        if key == b"path":
            path = value[:-1]
        records = records[length:]
    return _text(path)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode(errors="surrogateescape")
