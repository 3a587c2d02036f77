"""A folder of images, or an uncompressed .tar of one: found, decoded when the task is opened, and kept."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from netsmith.errors import UserError
from netsmith.tasks.files import BROKEN

KEEP_BYTES = 2 << 30
"""A set whose decoded images need less (10,000 of 256 pixels) is decoded once; a larger one in every epoch too."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class ImageFile:
    """Where one image's bytes are: a file, or a stretch of a tar."""

    path: Path
    name: str
    parts: tuple[str, ...]
    """Folders and file name; as `find_images` gives it, the first is the class. In shards: shard and name."""
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def draw(self, purpose: str) -> float:
        """A number from 0 to 1 that looks random and depends on the purpose and the parts alone."""
        text = "/".join((purpose, *self.parts)).encode(errors="surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


@dataclass
class FolderImages:
    """`images[indices]` gives uint8 `(n, 3, side, side)`, like indexing a tensor of all images would.

    Every image is decoded here and now, also where there are too many to keep: a broken one should not wait for the
    end of a run. Raises `UserError` naming the file when one cannot be decoded.
    """

    files: list[ImageFile]
    side: int
    kept: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.files) * 3 * self.side**2 <= KEEP_BYTES:
            self.kept = torch.empty(len(self.files), 3, self.side, self.side, dtype=torch.uint8)
        for numbers in torch.arange(len(self.files)).split(1000):
            images = self._decode(numbers)
            if self.kept is not None:
                self.kept[numbers] = images

    def __len__(self) -> int:
        return len(self.files)

    def file(self, number: int) -> ImageFile:
        return self.files[number]

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self._decode(indices) if self.kept is None else self.kept[indices]

    def _decode(self, indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), 3, self.side, self.side, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets go of the interpreter while it decodes
            for row, image in enumerate(pool.map(lambda i: decode(self.files[i], self.side), indices.tolist())):
                images[row] = image
        return images


def decode(file: ImageFile, side: int) -> Tensor:
    """One image as uint8 `(3, side, side)`; `UserError` naming it if it is broken.

    It is turned upright, its shorter side resized to `side` and the middle square kept. Grey values of 16 bits are
    scaled to 8, what is transparent shows white, and of an animation or several pages the first counts.
    """
    try:
        with Image.open(io.BytesIO(file.read())) as image:
            image.draft("RGB", (side, side))  # a JPEG several times too large is decoded at half, a quarter, ...
            square = ImageOps.fit(_rgb(ImageOps.exif_transpose(image)), (side, side), Image.Resampling.BICUBIC)
    except (*BROKEN, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file.name} is not an image that can be read ({error})") from error
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows what is white")
    if image.mode.startswith("I"):  # `convert` would cut off all above 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:  # `convert` would show the colour that somebody left under it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_images(directory: Path) -> tuple[dict[str, list[ImageFile]], tuple[str, ...]]:
    """`{split: images}` and the class names of `directory`; the split is "all" where the folder names none.

    `directory` may be a .tar, or hold one, or hold one folder that holds it all. Below that, and below the split, the
    first folder is the class; what lies deeper belongs to it. Order is by path: the same everywhere.
    """
    if not directory.exists():
        raise UserError(f"folder:{directory}: there is no such folder or .tar file")
    files = sorted(_list(directory), key=lambda file: file.parts)
    outer = _outer(files)
    found: dict[str, list[ImageFile]] = {}
    others: dict[str, list[ImageFile]] = {}
    for file in files:
        parts = file.parts[outer:]
        split = SPLITS.get(parts[0].lower()) if len(parts) > 2 else None
        if split:
            parts = parts[1:]
        if len(parts) > 1:  # otherwise it lies beside the classes
            kind = found if PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES else others
            kind.setdefault(split or "all", []).append(replace(file, parts=parts))
    names = tuple(sorted({file.parts[0] for file in found.get("train", found.get("all", []))}))
    _check(directory, found, others, names)
    return found, names


def _outer(files: list[ImageFile]) -> int:
    """How many folders, one in the other, hold all that there is."""
    depth = 0
    while True:
        inside = [file.parts[depth:] for file in files if len(file.parts) > depth + 1]
        tops = {parts[0] for parts in inside}
        if len(tops) != 1 or tops.pop().lower() in SPLITS or all(len(parts) == 2 for parts in inside):
            return depth
        depth += 1


def _check(
    directory: Path, found: dict[str, list[ImageFile]], others: dict[str, list[ImageFile]], names: tuple[str, ...]
) -> None:
    """`UserError` where the images in `found` are no set to learn from; `others` are the files that are no images."""
    layout = "expected DIR/{train,val,test}/class/*.jpg or DIR/class/*.jpg"
    if not found:
        raise UserError(f"folder:{directory} holds no images in class folders; {layout}")
    if len(found) > 1 and "all" in found:
        raise UserError(
            f"folder:{directory} mixes both layouts ({found['all'][0].name} lies in no class of a split); {layout}"
        )
    if "all" not in found and "train" not in found:
        raise UserError(f"folder:{directory} has {', '.join(sorted(found))} but no train folder; {layout}")
    for split, files in found.items():
        read = {file.parts[0] for file in files}
        if unread := [file for file in others.get(split, []) if file.parts[0] not in read]:
            raise UserError(
                f"folder:{directory}: class {unread[0].parts[0]!r} holds files, such as {unread[0].name}, but no image "
                f"that can be read; allowed: {', '.join(sorted(SUFFIXES))}"
            )
        if strange := read - set(names):
            raise UserError(f"folder:{directory}: {split} has class {sorted(strange)[0]!r}, which train has not")
    if len(names) < 2:
        raise UserError(f"folder:{directory} has a single class ({''.join(names)!r}); a classifier needs two or more")
    counts = Counter(file.parts[0] for file in found.get("train", found.get("all", [])))
    if few := [name for name in names if counts[name] < 3]:
        raise UserError(f"folder:{directory}: class {few[0]!r} has fewer than 3 training images")


def fingerprint(found: dict[str, list[ImageFile]]) -> str:
    """A short digest of which images there are, by split, class and path."""
    places = ["/".join((split, *file.parts)) for split, files in sorted(found.items()) for file in files]
    return hashlib.sha256("\n".join(places).encode(errors="surrogateescape")).hexdigest()[:16]


def _list(directory: Path) -> Iterator[ImageFile]:
    """Every file that is not hidden, an image or not; `parts` as below `directory`."""
    if directory.is_file():
        yield from _list_tar(directory)
        return
    inside = [entry for entry in sorted(directory.iterdir()) if not entry.name.startswith(".")]
    tars = [entry for entry in inside if entry.suffix == ".tar"]
    folders = [entry for entry in inside if entry.is_dir()]
    if len(tars) == 1 and not folders:
        yield from _list_tar(tars[0])
        return
    for path in _walk(directory, frozenset()):
        yield ImageFile(path, str(path), path.relative_to(directory).parts)


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files below `folder`, links followed but not back to one of the folders `above` it."""
    try:
        here = folder.resolve()
        entries = [] if here in above else [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry, above | {here})
        elif entry.is_file():
            yield entry
        else:
            raise UserError(f"{entry} is neither a file nor a folder nor a link to one")


def _list_tar(path: Path) -> Iterator[ImageFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            members, end = archive.getmembers(), archive.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not an uncompressed .tar that can be read ({error})") from error
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        after = file.read(tarfile.BLOCKSIZE)
    if len(after) < tarfile.BLOCKSIZE:
        raise UserError(f"{path} is cut short: the block of zeros that ends a .tar is missing")
    if any(after):
        raise UserError(f"{path} is damaged: what follows {members[-1].name} is neither a file nor the end of a .tar")
    for member in members:
        parts = PurePosixPath(member.name).parts
        if any(part.startswith(".") for part in parts):  # a Mac packs a ._0.png beside 0.png
            continue
        if member.issym() or member.islnk():
            raise UserError(f"{path}:{member.name} is a link; pack the files themselves (tar -h --hard-dereference)")
        if member.isfile():
            yield ImageFile(path, f"{path}:{member.name}", parts, member.offset_data, member.size)
