"""What data-parallel training takes on hardware one does not have: a step is compute plus all-reduce.

All-reduce costs what the ring does, 2 (N-1)/N V/B + 2 (N-1) L for V bytes over N devices (Patarasuk & Yuan 2009), or
what the two-dimensional torus does, rows first and then columns (Mikami et al. 2018, arXiv:1811.05233). The published
table to check against is that of Wongpanich et al. 2020 (arXiv:2011.00071); see docs/plan.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from netsmith.cost.counts import Macs
from netsmith.errors import UserError, unknown
from netsmith.train.group_batchnorm import TARGET, group_size
from netsmith.train.recipes import IMAGENET

FORWARD_AND_BACKWARD = 3
"""A training step costs about three forward passes: the backward one has a product for the gradient of the inputs and
one for that of the weights. What is recomputed, the optimizer and all that is no product come on top."""
BACKWARD = 2 / 3
"""Its share in the compute of a step: what gradients can hide behind."""
MOST = 10**12
"""The largest number of anything that can be asked for."""
MOST_DEVICES = 10**6


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and the links between them. Raises: UserError for numbers out of range."""

    devices: int
    """N."""
    bandwidth: float
    """GB/s (1e9 bytes) of one link in one direction; what a device can send to its neighbour in the ring (B)."""
    link_latency: float = 5.0
    """Microseconds from one device to the next, whatever the size of the message (L)."""
    topology: Literal["ring", "torus"] = "ring"
    """Of the all-reduce: one ring of all devices, or rings of rows and then of columns."""
    mesh: tuple[int, int] | None = None
    """Rows and columns of the torus (none: as square as the number of devices allows)."""

    def __post_init__(self) -> None:
        within("devices", self.devices, 1, MOST_DEVICES)
        positive("bandwidth", self.bandwidth)
        within("link_latency", self.link_latency, 0)
        if self.topology not in ("ring", "torus"):
            raise unknown("topology", self.topology, ("ring", "torus"))
        if self.mesh is not None and (min(self.mesh) < 1 or math.prod(self.mesh) != self.devices):
            raise UserError(f"a mesh of {self.mesh[0]}x{self.mesh[1]} does not hold {self.devices} devices")

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns; a ring has one row."""
        if self.topology == "ring":
            return 1, self.devices
        return self.mesh or square(self.devices)

    def all_reduce(self, volume: float) -> float:
        """Seconds to sum ``volume`` bytes over all devices.

        Torus of R rows and C columns: reduce-scatter in the rows, all-reduce of a C-th in the columns, all-gather in
        the rows; which is ``ring(V, C) + ring(V / C, R)``.
        """
        rows, columns = self.sides
        return self.ring(volume, columns) + self.ring(volume / columns, rows)

    def ring(self, volume: float, devices: int) -> float:
        """Seconds to sum ``volume`` bytes over a ring of so many neighbours: 2 (n-1)/n V/B + 2 (n-1) L."""
        hops = 2 * (devices - 1)
        return hops / devices * volume / (1e9 * self.bandwidth) + hops * 1e-6 * self.link_latency


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one network asks of a step."""

    parameters: int
    """That have a gradient."""
    norms: tuple[int, ...]
    """Channels of each batch norm layer."""
    macs: float
    """Of the forward pass of one image, in training."""

    @classmethod
    def of(cls, network: nn.Module, resolution: int, channels: int = 3) -> Load:
        """Counted on the ``meta`` device. Raises what the network's own forward raises on a wrong shape."""
        return cls(
            parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
            norms=tuple(part.num_features for part in network.modules() if isinstance(part, nn.BatchNorm2d)),
            macs=Macs(trained=True)(network, (channels, resolution, resolution)),
        )

    def images_per_second(self, tflops: float, utilisation: float) -> float:
        """Of one device with so many TFLOP/s at its peak: tflops * utilisation / (3 * 2 FLOP * MACs).

        Raises: UserError for a peak of 0 or less, and for a utilisation outside 0 to 1.
        """
        positive("device_tflops", tflops)
        positive("utilisation", utilisation, 1)
        return 1e12 * tflops * utilisation / (FORWARD_AND_BACKWARD * 2 * self.macs)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step in seconds, and what follows from it."""

    devices: int
    batch: int
    """Images of a step on all devices."""
    epochs: int
    images: int
    """Of the training set."""
    norm_group: int
    """Devices that a batch norm takes its statistics over."""
    compute: float
    """Seconds; forward, backward and whatever else one device does in a step."""
    gradients: float
    """Seconds of the all-reduce of the gradients."""
    hidden: float
    """Seconds of these that pass while the backward pass computes."""
    norms: float
    """Seconds of the all-reduces of batch norm, of which nothing can be hidden: the next layer waits for them."""

    @property
    def step(self) -> float:
        """Seconds."""
        return self.compute + self.all_reduce

    @property
    def all_reduce(self) -> float:
        """Seconds of a step in which devices wait for one another's sums."""
        return self.gradients - self.hidden + self.norms

    @property
    def all_reduce_percent(self) -> float:
        return 100 * self.all_reduce / self.step

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step

    @property
    def efficiency(self) -> float:
        """Images/s as a share of what so many devices would do that never wait."""
        return self.compute / self.step

    @property
    def steps_per_epoch(self) -> float:
        return self.images / self.batch

    @property
    def total_steps(self) -> int:
        """Whole steps of the training, as the official code counts them: 6,842 for 350 epochs at batch 65,536."""
        return self.epochs * self.images // self.batch

    @property
    def hours(self) -> float:
        """Of the steps alone: no evaluation, no start, no checkpoint."""
        return self.total_steps * self.step / 3600

    @property
    def device_hours(self) -> float:
        return self.devices * self.hours

    def data(self) -> dict[str, Any]:
        """All of it, as plain data."""
        derived = ("step", "all_reduce", "all_reduce_percent", "images_per_second", "efficiency", "steps_per_epoch")
        later = ("total_steps", "hours", "device_hours")
        return {**asdict(self), **{name: getattr(self, name) for name in (*derived, *later)}}


def predict(
    cluster: Cluster,
    load: Load,
    *,
    images_per_second: float,
    batch: int,
    epochs: int = 1,
    images: int = IMAGENET,
    gradient_bytes: int = 4,
    norm_images: int = TARGET,
    overlap: float = 0.0,
) -> Prediction:
    """A training of ``epochs`` over ``images``, with ``batch`` images a step on all devices of ``cluster``.

    ``images_per_second``: of one device alone, measured at ``batch / devices`` images.
    ``gradient_bytes``: a parameter.
    ``norm_images``: what batch norm takes its statistics over (`group_size`); 0: every device its own.
    ``overlap``: share of the gradients' all-reduce that passes during the backward pass, at most all of that pass; 0,
    nothing, bounds the cost from above. Batch norm: one message forward and one backward for each layer, of 2
    channels + 1 numbers with 4 bytes.

    Raises: UserError for numbers out of range, for a batch that the devices do not share evenly, and where the devices
    do not divide into groups of ``norm_images``.
    """
    positive("images_per_second", images_per_second)
    for name, number in (("images", images), ("epochs", epochs)):
        within(name, number, 1, MOST)
    within("norm_images", norm_images, 0, MOST)
    within("overlap", overlap, 0, 1)
    if gradient_bytes not in (2, 4):
        raise UserError(f"gradient_bytes is {gradient_bytes}; allowed: 2, 4")
    devices = cluster.devices
    if batch < devices or batch % devices:
        raise UserError(f"batch is {batch} for {devices} devices; allowed: multiples of {devices}")
    if batch > images:
        raise UserError(f"batch is {batch}; allowed: at most the {images} images of the training set")
    try:
        group = group_size(devices, batch, norm_images) if norm_images else 1
    except UserError as error:
        raise UserError(f"{error}; norm_images is {norm_images}, with 0 every device normalises alone") from None
    compute = batch / devices / images_per_second
    gradients = cluster.all_reduce(gradient_bytes * load.parameters)
    return Prediction(
        devices=devices,
        batch=batch,
        epochs=epochs,
        images=images,
        norm_group=group,
        compute=compute,
        gradients=gradients,
        hidden=min(overlap * gradients, BACKWARD * compute),
        norms=2 * sum(cluster.ring(4 * (2 * channels + 1), group) for channels in load.norms),
    )


def square(devices: int) -> tuple[int, int]:
    """The rows and columns of so many devices that are nearest to each other.

    >>> square(512), square(1024), square(7)
    ((16, 32), (32, 32), (1, 7))
    """
    rows = next(rows for rows in range(math.isqrt(devices), 0, -1) if devices % rows == 0)
    return rows, devices // rows


def within(name: str, given: float, low: int, high: int | None = None) -> None:
    """Raises: UserError for a number that is not from ``low`` to ``high``."""
    if not low <= given <= (math.inf if high is None else high) or given == math.inf:
        raise UserError(f"{name} is {given}; allowed: {low} " + ("or more" if high is None else f"to {high}"))


def positive(name: str, given: float, high: int | None = None) -> None:
    """Raises: UserError for a number that is not above 0, and not above ``high``."""
    if not 0 < given <= (math.inf if high is None else high) or given == math.inf:
        raise UserError(f"{name} is {given}; allowed: more than 0" + ("" if high is None else f" to {high}"))
