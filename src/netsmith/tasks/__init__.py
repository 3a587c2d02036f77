"""Tasks: named data with splits, augmentation and a metric. Cheap to import; the data are read by `open_task`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netsmith.tasks.classification import Task

TASKS = {
    "digits": "handwritten digits, 8x8 grey, 10 classes, 1,797 images; comes with scikit-learn",
    "cifar10": "small colour photographs, 32x32, 10 classes; the original files or the pack cifar10-small",
    "cifar100": "small colour photographs, 32x32, 100 classes; the original files",
    "fashion-mnist": "clothes, 28x28 grey, 10 classes, 70,000 images; the original files",
    "folder:DIR": "your images: DIR/{train,val,test}/class/*.jpg or DIR/class/*.jpg, or a .tar of either",
    "shards:DIR": "your images in webdataset shards: DIR/{train,val,test}-*.tar with KEY.jpg and KEY.cls",
}
"""Name on the command line -> what it is."""
IN_FOLDERS = ("folder:", "shards:")
"""How the names of tasks begin that go on with a path."""


def open_task(
    name: str,
    data: Path | None = None,
    *,
    resolution: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    search_fraction: float = 0.2,
) -> Task:
    """The task of that name; see `netsmith.tasks.classification.open_task`."""
    return import_module("netsmith.tasks.classification").open_task(
        name, data, resolution=resolution, seed=seed, limit=limit, search_fraction=search_fraction
    )
