"""Published recipes, by name, and how each is carried to another batch size, length and resolution.

Sources: Wongpanich et al. 2020 (arXiv:2011.00071) and tensorflow/tpu, `efficientnet/main.py`; Masters et al. 2021
(arXiv:2106.03640) and graphcore-research, `configs.yml`; stanford-futuredata/dawn-bench-entries; tensorflow/tpu,
`resnet/lars_util.py`, `resnet/resnet_main.py` and `resnet/benchmark/resnet_benchmark.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from netsmith.errors import UserError, unknown
from netsmith.train.recipe import Recipe

IMAGENET = 1_281_167


@dataclass(frozen=True, kw_only=True)
class Published:
    """A recipe as it was published, with what it was published for."""

    recipe: Recipe
    model: str
    resolution: int
    """Pixels a side of the images of the test."""
    images: int = IMAGENET
    """In the training set."""
    decay_of_images: bool = False
    """`rmsprop_decay` is meant for so many images and not for steps: 1 - decay follows the batch."""
    note: str = ""
    """What the source has and this does not, or what is uncertain."""

    def scaled(
        self,
        images: int,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        resolution: int | None = None,
        linear: bool = True,
    ) -> Recipe:
        """The recipe for ``images`` training images, another batch size, number of epochs and resolution (px).

        Warm-up, decay and stages of resolution keep their part of the training; a learning rate that is meant per so
        many images follows the batch, and any other does so too with ``linear``; the average of the weights looks back
        over the same part of the training. Rates that end at a share of the peak still do. Where training images are
        smaller than those of the test, they stay so in the same proportion.

        Raises: UserError for numbers below 1.
        """
        mine = self.recipe
        size = mine.batch_size if batch_size is None else batch_size
        length = mine.epochs if epochs is None else epochs
        for name, given in (("images", images), ("batch_size", size), ("epochs", length)):
            if given < 1:
                raise UserError(f"{name} is {given}; allowed: 1 or more")
        part = length / mine.epochs
        rate = mine.learning_rate
        if mine.rate_per is None and linear:
            rate *= size / mine.batch_size
        ema = mine.ema
        if ema is not None:
            share = (1 / (1 - ema)) / (mine.epochs * self.images / mine.batch_size)
            back = max(2.0, share * length * images / size)
            ema = round(1 - 1 / back, 6)
        decay = mine.rmsprop_decay
        if self.decay_of_images:
            decay = max(0.0, 1 - (1 - decay) * size / mine.batch_size)
        return replace(
            mine,
            rmsprop_decay=decay,
            epochs=length,
            batch_size=size,
            learning_rate=rate,
            warmup_epochs=mine.warmup_epochs * part,
            decay_epochs=mine.decay_epochs * part,
            decay_at=tuple(epoch * part for epoch in mine.decay_at),
            resize_at=tuple(epoch * part for epoch in mine.resize_at),
            ema=ema,
            resolutions=mine.resolutions
            if resolution is None
            else tuple(max(4, round(size * resolution / self.resolution)) for size in mine.resolutions),
        )


RMSPROP = Recipe(
    epochs=350,
    batch_size=4096,
    optimizer="rmsprop",
    learning_rate=0.016,
    rate_per=256,
    weight_decay=0.0,
    l2_loss=1e-5,
    schedule="exponential",
    warmup_epochs=5.0,
    ema=0.9999,
)
LARS = replace(
    RMSPROP,
    optimizer="lars",
    batch_size=65_536,
    learning_rate=0.081,
    weight_decay=1e-5,
    l2_loss=0.0,
    schedule="polynomial",
    end_rate=0.1 / 20.736,
    warmup_epochs=43.0,
)
PERHAPS = "Published with and without AutoAugment (83.6 and 83.1 % for B5): `autoaugment`."
"""The supercomputer's 83.0 to 83.5 % do not say which."""

RECIPES: dict[str, Published] = {
    "efficientnet_rmsprop_4096": Published(
        recipe=RMSPROP, model="efficientnet_b2", resolution=260, note="Published with and without `autoaugment`."
    ),
    "efficientnet_lars_16384": Published(
        recipe=replace(LARS, batch_size=16_384, learning_rate=0.236, end_rate=0.1 / 15.104, warmup_epochs=50.0),
        model="efficientnet_b5",
        resolution=456,
        note=PERHAPS,
    ),
    "efficientnet_lars_32768": Published(
        recipe=replace(LARS, batch_size=32_768, learning_rate=0.118, end_rate=0.1 / 15.104, warmup_epochs=50.0),
        model="efficientnet_b5",
        resolution=456,
        note=PERHAPS,
    ),
    "efficientnet_lars_65536": Published(
        recipe=LARS,
        model="efficientnet_b5",
        resolution=456,
        note=f"{PERHAPS} The official code adds an L2 loss of 1e-5 as well: l2_loss.",
    ),
    "graphcore_b0_half_resolution": Published(
        recipe=replace(
            RMSPROP,
            batch_size=768,
            learning_rate=2**-14,
            rate_per=1,
            rmsprop_decay=1 - 768 * 2**-14,
            weight_decay=1e-5,
            l2_loss=0.0,
            mixup=0.1,
            autoaugment=True,
            resolutions=(160,),
            tune_epochs=2,
        ),
        model="efficientnet_b0_g16_pn",
        resolution=224,
        decay_of_images=True,
        note="The rate of the fine-tuning is ours. The source averages checkpoints, one an epoch at "
        "0.97, where this averages steps.",
    ),
    "amoebanet_d_dawnbench": Published(
        recipe=replace(
            RMSPROP,
            epochs=35,
            batch_size=1024,
            learning_rate=2.56,
            rate_per=None,
            rmsprop_eps=1.0,
            l2_loss=4e-5,
            decay_rate=0.88,
            decay_epochs=1.0,
            warmup_epochs=0.35,
        ),
        model="amoebanet_d",
        resolution=224,
        note="93 % top-5 in 7.47 hours on one Cloud TPU. No auxiliary head and no drop path here; the L2 loss of the "
        "source spares biases.",
    ),
    "resnet50_dawnbench": Published(
        recipe=Recipe(
            epochs=50,
            batch_size=1024,
            optimizer="sgd",
            learning_rate=0.1,
            rate_per=256,
            weight_decay=0.0,
            l2_loss=1e-4,
            schedule="step",
            decay_rate=0.1,
            decay_at=(21, 35, 43),
            warmup_epochs=4.0,
            label_smoothing=0.0,
            ema=None,
            resolutions=(128, 224, 288),
            resize_at=(18, 41),
        ),
        model="resnet50",
        resolution=288,
        note="93.3 % top-5 in 4.09 hours on one Cloud TPU: fast.ai's sizes and rates, as Google took them over. Small "
        "images are cut from the task's own here, and not from files made smaller beforehand.",
    ),
    "resnet50_lars_32768": Published(
        recipe=replace(
            LARS,
            epochs=90,
            batch_size=32_768,
            learning_rate=32.0,
            rate_per=None,
            weight_decay=1e-4,
            warmup_epochs=14.0,
            end_rate=0.0,
            ema=None,
        ),
        model="resnet50",
        resolution=224,
        note="Peak and warm-up are the code's; weight decay and 90 epochs the usual ones.",
    ),
}
"""Name -> recipe."""


def published(name: str) -> Published:
    """The recipe of that name. Raises: UserError with the nearest one for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
