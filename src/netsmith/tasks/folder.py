"""A folder of images, or an uncompressed .tar of one, decoded when first asked for and then kept."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps
from torch import Tensor

from netsmith.errors import UserError

KEEP_BYTES = 2 << 30
"""A split whose decoded images need less (10,000 of 256 pixels) is decoded once; a larger one in every epoch."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class ImageFile:
    """Where one image's bytes are: a file, or a stretch of a tar."""

    path: Path
    name: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class FolderImages:
    """`images[indices]` gives uint8 `(n, 3, side, side)`, like indexing a tensor of all images would.

    An image is turned upright, its shorter side resized to `side` and the middle square kept.
    Raises `UserError` naming the file when one cannot be decoded.
    """

    files: list[ImageFile]
    side: int
    kept: Tensor | None = field(default=None, repr=False)
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool), repr=False)

    def __post_init__(self) -> None:
        if len(self.files) * 3 * self.side**2 <= KEEP_BYTES:
            self.kept = torch.empty(len(self.files), 3, self.side, self.side, dtype=torch.uint8)
            self.known = torch.zeros(len(self.files), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> Tensor:
        if self.kept is None:
            return self._decode(indices)
        missing = indices[~self.known[indices]].unique()
        if len(missing):
            self.kept[missing] = self._decode(missing)
            self.known[missing] = True
        return self.kept[indices]

    def _decode(self, indices: Tensor) -> Tensor:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets go of the interpreter while it decodes
            return torch.stack(list(pool.map(lambda i: decode(self.files[i], self.side), indices.tolist())))


def decode(file: ImageFile, side: int) -> Tensor:
    """One image as uint8 `(3, side, side)`; `UserError` naming it if it is broken."""
    try:
        with Image.open(io.BytesIO(file.read())) as image:
            image.draft("RGB", (side, side))  # a JPEG several times too large is decoded at half, a quarter, ...
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file.name} is not an image that can be read ({error})") from error
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)


def find_images(directory: Path) -> tuple[dict[str, tuple[list[ImageFile], list[int]]], tuple[str, ...]]:
    """`{split: (files, labels)}, class names` of `directory`; the split is "all" where the folder names none.

    `directory` may be a .tar, or hold one, or hold one folder that holds it all. Order is by name: the same everywhere.
    """
    if not directory.exists():
        raise UserError(f"folder:{directory}: there is no such folder or .tar file")
    found: dict[str, list[tuple[str, ImageFile]]] = {}
    for parts, file in _list(directory):
        if len(parts) >= 3 and parts[-3].lower() in SPLITS:
            found.setdefault(SPLITS[parts[-3].lower()], []).append((parts[-2], file))
        elif len(parts) >= 2:
            found.setdefault("all", []).append((parts[-2], file))
    layout = "expected DIR/{train,val,test}/class/*.jpg or DIR/class/*.jpg"
    if not found:
        raise UserError(f"folder:{directory} holds no images in class folders; {layout}")
    if len(found) > 1 and "all" in found:
        raise UserError(f"folder:{directory} mixes both layouts ({found['all'][0][1].name} lies in no split); {layout}")
    if "all" not in found and "train" not in found:
        raise UserError(f"folder:{directory} has {', '.join(sorted(found))} but no train folder; {layout}")
    names: tuple[str, ...] = tuple(sorted({name for name, _ in found.get("train", found.get("all", []))}))
    if len(names) < 2:
        raise UserError(f"folder:{directory} has a single class ({''.join(names)!r}); a classifier needs two or more")
    for split, files in found.items():
        if strange := {name for name, _ in files} - set(names):
            raise UserError(f"folder:{directory}: {split} has class {sorted(strange)[0]!r}, which train has not")
    return {
        split: ([file for _, file in files], [names.index(name) for name, _ in files]) for split, files in found.items()
    }, names


def _list(directory: Path) -> Iterator[tuple[tuple[str, ...], ImageFile]]:
    """Path parts below `directory` and place of every image, sorted by path."""
    if directory.is_file():
        yield from _list_tar(directory)
        return
    inside = [entry for entry in sorted(directory.iterdir()) if not entry.name.startswith(".")]
    tars = [entry for entry in inside if entry.suffix == ".tar"]
    folders = [entry for entry in inside if entry.is_dir()]
    if len(tars) == 1 and not folders:
        yield from _list_tar(tars[0])
        return
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts):
            yield parts, ImageFile(path, str(path))


def _list_tar(path: Path) -> Iterator[tuple[tuple[str, ...], ImageFile]]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not an uncompressed .tar that can be read ({error})") from error
    end = max((member.offset_data + member.size for member in members), default=0)
    if path.stat().st_size < -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
        raise UserError(f"{path} is cut short: the block of zeros that ends a .tar is missing")
    for member in sorted(members, key=lambda member: member.name):
        if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
            file = ImageFile(path, f"{path}:{member.name}", member.offset_data, member.size)
            yield PurePosixPath(member.name).parts, file
