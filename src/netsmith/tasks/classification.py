"""Image classification: named splits of real images, batches of them, top-1 accuracy as the metric.

Weights learn on `train`, architectures on `search` (cut out of the training images), the final network on `trainval`
(both together); `test` belongs to the gate. `val` exists where the data come with one and a test split; it is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from netsmith.errors import UserError, unknown
from netsmith.tasks import IN_FOLDERS, TASKS, augment, files
from netsmith.tasks.folder import FolderImages, find_images, fingerprint
from netsmith.tasks.shards import ShardImages, open_shards

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = 64
"""Pixels from which on images are cropped at random sizes; smaller ones are only shifted."""


class TestSplitTouched(Exception):
    """A method asked for the test split, which only the gate may see: a bug in the method."""

    __test__ = False  # pytest collects what is called Test...


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a set: `split[places]` is uint8 `(n, channels, side, side)` and labels, int64 `(n,)`.

    Of an image in shards that cannot be read the label is -1 and the pixels are black.
    """

    source: Tensor | FolderImages | ShardImages = field(repr=False)
    indices: Tensor = field(repr=False)
    """Which images of `source` belong to the split, `(n,)`."""
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        numbers, labels = self.indices[chosen], self.labels[chosen]
        if isinstance(self.source, ShardImages):
            images, readable = self.source.read(numbers)
            return images, labels.where(readable, -1)
        return self.source[numbers], labels

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The places of all images, 0 to n - 1, in an order of training; of shards, those of a few shards together."""
        if isinstance(self.source, ShardImages):
            return self.source.shuffled(self.indices, generator)
        return torch.randperm(len(self), generator=generator)

    def name(self, place: int) -> str:
        """What to call an image when something is wrong with it."""
        number = int(self.indices[place])
        return f"image {number}" if isinstance(self.source, Tensor) else self.source.file(number).name

    def subset(self, chosen: Tensor) -> Split:
        return Split(self.source, self.indices[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A classification set, ready for training; see `open_task`."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    resolution: int
    """Pixels a side of the square that the network sees."""
    mean: tuple[float, ...]
    """Per channel, of pixels in 0..1; the network sees `(pixel - mean) / std`."""
    std: tuple[float, ...]
    source: str
    """Where the images came from."""
    splits: dict[str, Split] = field(repr=False)
    flip: bool = True
    """Whether a mirrored image keeps its class."""
    fingerprint: str = ""
    """A digest of which images there are, where that may change: in a folder, in shards."""
    metric: str = "accuracy"
    touched: set[str] = field(default_factory=set, repr=False)
    """The names of the splits handed out so far, by this task and all views of it."""
    skipped: set[str] = field(default_factory=set, repr=False)
    """The names of the images that could not be read, so far."""
    sealed: bool = False

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.resolution

    def split(self, name: str) -> Split:
        """The split of that name, noted in `touched`; in a view `without_test()` "test" raises `TestSplitTouched`."""
        if name not in self.splits:
            raise unknown("split", name, self.splits)
        if self.sealed and name == "test":
            raise TestSplitTouched(f"{self.name}: the test split belongs to the gate; score architectures on 'search'")
        self.touched.add(name)
        return self.splits[name]

    def without_test(self) -> Task:
        """The same task, sharing `touched`, that refuses to hand out the test split: what a search gets."""
        return replace(self, sealed=True)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        epoch: int = 0,
        first: int = 0,
        part: tuple[int, int] = (0, 1),
        led: bool = False,
        augmented: bool = True,
        randaugment: int = 0,
        autoaugment: bool = False,
        mirror: bool | None = None,
        resolution: int | None = None,
        device: str | torch.device = "cpu",
        loaders: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `split`: images float32 `(n, C, H, W)` in channels-last memory, labels int64 `(n,)`.

        With `train` the images are shuffled and, where `augmented`, changed by draws that depend on seed, epoch, batch
        number and place in the batch alone; the global generator is left as it was. Batches are as equal as they can
        be, `batch_size` or just less, so that none is too small for batch norm. `randaugment` is RandAugment's
        magnitude, 0 for none; `autoaugment` asks for AutoAugment's policy for ImageNet; `mirror` says whether half of
        the images are mirrored, None: as `flip` says. `resolution`: pixels a side, in place of the task's own.

        `first`: the number of the batch to begin with. `part`: (i, n) for the i-th of n parts of each batch, which
        differ by one image at most and together are the batch, to the bit; `led` puts before them the image that comes
        before them in the batch, around its end. `loaders`: processes that read images ahead.

        Images that cannot be read are left out and noted in `skipped`; UserError when they are many.
        """
        images = self.split(split)
        size = self.resolution if resolution is None else resolution
        count = steps(len(images), batch_size)
        order = images.shuffled(_generator(seed, epoch)) if train else torch.arange(len(images))
        chosen = order.tensor_split(count)[first:]
        places = [_part(len(batch), *part, led) for batch in chosen]
        wanted = [batch[mine] for batch, mine in zip(chosen, places, strict=True)]
        for number, (pixels, labels) in enumerate(_read_ahead(images, wanted, loaders)):
            pixels, read = pixels.to(device, non_blocking=True), labels >= 0
            if train and augmented:
                numbers = augment.draws(len(chosen[number]), _generator(seed, epoch, first + number))[places[number]]
                pixels = self._augmented(pixels, numbers, size, self.flip if mirror is None else mirror)
                if autoaugment:
                    pixels = augment.autoaugment(pixels, numbers)
                if randaugment:
                    pixels = augment.randaugment(pixels, randaugment, numbers)
            else:
                pixels = self._middle(pixels)
            if pixels.shape[-1] != size:
                pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
            if not read.all():
                self._skip(images, wanted[number][~read])
                pixels, labels = pixels[read.to(device)], labels[read]
            yield self.normalise(pixels), labels.to(device, non_blocking=True)

    def _augmented(self, pixels: Tensor, numbers: Tensor, size: int, flip: bool) -> Tensor:
        if self.resolution >= LARGE:
            return augment.crop_and_flip(pixels, size, flip, numbers)
        return augment.shift_and_flip(pixels, max(1, self.resolution // 8), flip, numbers)

    def _middle(self, pixels: Tensor) -> Tensor:
        edge = (pixels.shape[-1] - self.resolution) // 2
        return pixels[..., edge : edge + self.resolution, edge : edge + self.resolution]

    def _skip(self, split: Split, broken: Tensor) -> None:
        """Raises: UserError when more than one image in a hundred cannot be read, and more than ten."""
        self.skipped.update(split.name(place) for place in broken.tolist())
        if len(self.skipped) > max(10, len(split) // 100):
            shown = sorted(self.skipped)[0]
            raise UserError(f"{len(self.skipped)} images of {self.source} cannot be read, such as {shown}")

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 `(n, C, H, W)` -> what the network sees, float32 `(n, C, H, W)` in channels-last memory."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1) * 255
        return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def open_task(
    name: str,
    data: Path | None = None,
    *,
    resolution: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    search_fraction: float = 0.2,
) -> Task:
    """Open one of `TASKS`.

    `data`: the folder that holds the files (default: the environment variable NETSMITH_DATA, ./data, or ../shared/data
    beside the current directory or the repository). `resolution`: pixels a side (default: the set's own; 128 for
    folders). `seed` draws the search split and the subset; the test split never depends on it. `limit`: learn from
    that many of the training images, search split included. Splits and subsets keep the proportions of the classes.

    The test split of a folder is its test/, and a val/ beside that is not used; without test/ it is val/; with train/
    alone or no splits at all, about a fifth of each class. What is cut off, here and for the search split, is chosen by
    a hash of each image's path: images that come or go leave the others where they were. Every image of a folder is
    decoded before the task is returned. Shards (`shards:DIR`) are split likewise; their images are decoded when needed.

    Raises `UserError` when the name is unknown or files are missing or damaged.
    """
    if resolution is not None and not 4 <= resolution <= 2048:
        raise UserError(f"resolution {resolution} is out of range; allowed: 4 to 2048 pixels")
    if not 0 < search_fraction < 1:
        raise UserError(f"search_fraction {search_fraction} is out of range; allowed: between 0 and 1")
    if name.startswith(IN_FOLDERS):
        task = _from_folder(name, resolution or 128)
    elif name in TASKS:
        task = _from_arrays(name, _read(name, data), resolution)
    else:
        raise unknown("task", name, TASKS)

    generator = _generator(seed)
    training = task.splits["train"]
    if limit is not None:
        least = 5 * task.classes
        if not least <= limit <= len(training):
            raise UserError(f"limit {limit} is out of range; {name} allows {least} (5 a class) to {len(training)}")
        training = training.subset(_balanced(training.labels, limit, generator)[0])
    if isinstance(training.source, Tensor):
        search, train = _balanced(training.labels, round(search_fraction * len(training)), generator)
    else:
        search, train = _drawn(training, search_fraction, f"search {seed}", keep=1)
    task.splits.update(train=training.subset(train), search=training.subset(search), trainval=training)
    return task


def steps(images: int, batch_size: int) -> int:
    """How many batches an epoch has."""
    return -(-images // batch_size)


def share(n: int, index: int, parts: int) -> range:
    """The places of the `index`-th of `parts` parts of `n`, as equal as can be.

    >>> [list(share(5, i, 2)) for i in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n * index // parts, n * (index + 1) // parts)


def _part(n: int, index: int, parts: int, led: bool) -> Tensor:
    mine = torch.tensor(share(n, index, parts), dtype=torch.int64)
    return torch.cat([(mine[:1] - 1) % n, mine]) if led else mine


class _Chosen(Dataset):
    """What to read for each batch; a loader of PyTorch hands the items out to its processes."""

    def __init__(self, split: Split, wanted: Sequence[Tensor]) -> None:
        self.split, self.wanted = split, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.split[self.wanted[number]]


def _read_ahead(split: Split, wanted: Sequence[Tensor], loaders: int) -> Iterable[tuple[Tensor, Tensor]]:
    if not loaders:
        return (split[places] for places in wanted)
    # A generator of its own, because a loader draws a seed for its processes.
    return DataLoader(_Chosen(split, wanted), batch_size=None, num_workers=loaders, generator=torch.Generator())


def _read(name: str, data: Path | None) -> files.Arrays:
    if name == "digits":
        return files.digits()
    if data is not None:
        homes = [Path(data).expanduser()]
    elif "NETSMITH_DATA" in os.environ:
        homes = [Path(os.environ["NETSMITH_DATA"]).expanduser()]
    else:
        homes = [Path("data"), Path("../shared/data"), Path(__file__).parents[4] / "shared" / "data"]
    if data is not None and not homes[0].is_dir():
        raise UserError(f"{name}: the data folder {homes[0]} does not exist")
    inside = {"cifar10": ("cifar10", "cifar-10", "cifar10-small"), "cifar100": ("cifar100", "cifar-100")}
    roots = [home / sub for home in homes for sub in (".", *inside.get(name, ()))]
    return {"cifar10": files.cifar10, "cifar100": files.cifar100, "fashion-mnist": files.fashion_mnist}[name](roots)


def _from_arrays(name: str, arrays: files.Arrays, resolution: int | None) -> Task:
    pixels = arrays.train_images.reshape(-1, arrays.train_images.shape[-1])
    # Counting how often each of the 256 values occurs needs no float copy of the whole set.
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T]) / len(pixels)
    mean = counts @ (np.arange(256) / 255)
    std = np.sqrt(counts @ (np.arange(256) / 255) ** 2 - mean**2)

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        if resolution not in (None, tensor.shape[-1]):
            parts = [
                F.interpolate(part, size=(resolution, resolution), mode="bilinear", antialias=True)
                for part in tensor.split(1000)
            ]
            tensor = torch.cat(parts)
        return Split(tensor, torch.arange(len(tensor)), torch.from_numpy(labels.astype(np.int64)))

    return Task(
        name=name,
        class_names=arrays.class_names,
        channels=arrays.train_images.shape[-1],
        resolution=resolution or arrays.train_images.shape[1],
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        source=str(arrays.source),
        flip=name != "digits",
        splits={
            "train": split(arrays.train_images, arrays.train_labels),
            "test": split(arrays.test_images, arrays.test_labels),
        },
    )


def _from_folder(name: str, resolution: int) -> Task:
    """The task `folder:DIR` or `shards:DIR`."""
    kind, _, place = name.partition(":")
    directory = Path(place).expanduser()
    # Margin around the crop: an evaluation image is the middle 7/8, as ImageNet's 224 of 256.
    side = round(resolution * 8 / 7) if resolution >= LARGE else resolution
    if kind == "shards":
        source = open_shards(directory, side)
        class_names, labels, parts, digest = source.class_names, source.labels, source.splits, source.fingerprint
    else:
        found, class_names = find_images(directory)
        files = [file for part in found.values() for file in part]
        number = {class_name: label for label, class_name in enumerate(class_names)}
        labels = torch.tensor([number[file.parts[0]] for file in files])
        parts = dict(zip(found, torch.arange(len(files)).split([len(part) for part in found.values()]), strict=True))
        source, digest = FolderImages(files, side), fingerprint(found)
    whole = Split(source, torch.arange(len(labels)), labels)
    splits = {key: whole.subset(part) for key, part in parts.items()}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    if "test" not in splits:
        (only,) = splits.values()  # "all" or "train"
        test, train = _drawn(only, 0.2, "test", keep=2)
        splits = {"train": only.subset(train), "test": only.subset(test)}
    mean, std = IMAGENET  # not the images' own: these stay when an image is added
    return Task(
        name=name,
        class_names=class_names,
        channels=3,
        resolution=resolution,
        mean=mean,
        std=std,
        source=str(directory),
        splits=splits,
        fingerprint=digest,
    )


def _balanced(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` indices in the proportions of the classes, and the rest; both in ascending order.

    Each class gives its exact share rounded down; the images still wanted come from the largest remainders.
    """
    of_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    shares = np.array([count * len(members) / len(labels) for members in of_class])
    quota = np.floor(shares).astype(int)
    for c in np.argsort(quota - shares, kind="stable")[: count - quota.sum()]:
        quota[c] += 1
    chosen = torch.cat(
        [
            members[torch.randperm(len(members), generator=generator)[:n]]
            for members, n in zip(of_class, quota.tolist(), strict=True)
        ]
    )
    return _parted(chosen, len(labels))


def _drawn(images: Split, share: float, purpose: str, *, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of about `share` of the images, and the rest; both in ascending order.

    Each image is drawn by its own path, whatever the others are. Only where a class would give none, or keep fewer than
    `keep`, do the numbers drawn by its images say which go first.
    """
    assert not isinstance(images.source, Tensor)
    numbers = images.indices.tolist()
    draws = torch.tensor([images.source.file(number).draw(purpose) for number in numbers], dtype=torch.float64)
    chosen = []
    for label in images.labels.unique():
        members = (images.labels == label).nonzero().flatten()
        members = members[draws[members].argsort()]
        below = int((draws[members] < share).sum())
        chosen.append(members[: min(max(1, below), len(members) - keep)])
    return _parted(torch.cat(chosen), len(images))


def _parted(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`chosen` in ascending order, and the others of `count` indices."""
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    return chosen.sort().values, rest.nonzero().flatten()


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers, mixed by numpy: neighbouring seeds must not correlate."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))
