"""How a network is trained: one dataclass, everything that `train` needs beside the network and the task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from netsmith.errors import UserError
from netsmith.train.schedules import SCHEDULES

if TYPE_CHECKING:
    from netsmith.tasks.classification import Task

OPTIMIZERS = ("sgd", "adamw", "rmsprop", "lars", "lamb")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The defaults suit small networks on small images; `Recipe.default(task)` looks at the task."""

    epochs: int = 30
    """Passes over the training images; the schedule spans them. 0: a network that is trained already stays as it is."""
    batch_size: int = 128
    """Images a step."""
    accumulate: int = 1
    """Parts in which each replica's share of a batch goes through the network, one after the other, where memory is
    short; batch norm sees the parts, and its running statistics follow each of them."""
    norm_replicas: int | None = None
    """Replicas whose images batch norm joins, of those that train together; none: as many as give it 128 images, all
    where there are at most 8 (tensorflow/tpu)."""
    norm_tile: tuple[int, int] | None = None
    """Instead: rows and columns of chips whose replicas batch norm joins, ..."""
    norm_mesh: tuple[int, int] | None = None
    """... on a mesh of so many rows and columns; the replicas are shared out evenly, neighbouring ranks on one chip."""
    optimizer: Literal["sgd", "adamw", "rmsprop", "lars", "lamb"] = "sgd"
    """sgd: with Nesterov momentum; rmsprop: TensorFlow's, as the EfficientNet papers mean it; lars: `train/lars.py`;
    lamb: You et al. 2020, arXiv:1904.00962."""
    learning_rate: float = 0.1
    """Its peak, right after the warm-up."""
    rate_per: int | None = None
    """The learning rate is meant for a batch of so many images and grows in proportion to `batch_size` (Goyal et al.
    2017, arXiv:1706.02677; 256 in most papers); none: it is what it is."""
    momentum: float = 0.9
    """Momentum of sgd, rmsprop and lars, beta 1 of adamw and lamb."""
    rmsprop_decay: float = 0.9
    """rmsprop: of the mean of the squared gradients."""
    rmsprop_eps: float = 1e-3
    """rmsprop: added to that mean, under the root."""
    weight_decay: float = 5e-4
    """On weights of two and more dimensions; norms, biases and logits of decisions have none."""
    l2_loss: float = 0.0
    """Factor of sum(w^2) / 2 in the loss, over all but the numbers of norms: what tensorflow/tpu adds whatever the
    optimizer, so that with lars the weights decay twice there."""
    schedule: Literal["cosine", "linear", "constant", "exponential", "polynomial", "step"] = "cosine"
    """How the learning rate goes down from its peak (constant: it stays); see `train/schedules.py`."""
    decay_rate: float = 0.97
    """exponential and step: times this..."""
    decay_epochs: float = 2.4
    """exponential: ... every so many epochs."""
    decay_at: tuple[float, ...] = ()
    """step: ... at each of these epochs."""
    end_rate: float = 0.0
    """polynomial: where it ends, as a share of the peak."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises from 0."""
    label_smoothing: float = 0.1
    """Part of the target that is spread evenly over all classes (Szegedy et al. 2016)."""
    ema: float | None = 0.999
    """Decay a step of the moving average of the weights that becomes the result; warms up; none: the last weights."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); 0: off. With both, a coin chooses for each batch."""
    randaugment: int = 0
    """Magnitude of RandAugment, two operations; 0: off."""
    autoaugment: bool = False
    """AutoAugment's policy for ImageNet (Cubuk et al. 2019); `ramp` leaves it as it is."""
    mirror: bool | None = None
    """Whether half of the training images are mirrored; none: as suits the task. Folders are taken for photographs:
    false for letters or arrows."""
    augmented: bool = True
    """Whether training images are shifted, cropped and mirrored; false: seen as those of the test are."""
    resolutions: tuple[int, ...] = ()
    """Pixels a side of the training images, in stages of equal length (progressive learning, Tan & Le 2021, section 4;
    a single smaller one: reduced resolution, Masters et al. 2021); none: the task's."""
    resize_at: tuple[float, ...] = ()
    """Epochs at which the second of these stages begins, the third, and so on; none: of equal length."""
    ramp: bool = False
    """RandAugment and mixup grow with these stages, from 1 / n of them to all (Tan & Le: small images, little
    augmentation)."""
    tune_epochs: int = 0
    """Epochs after these at the task's own resolution, of the last layers alone, with images as the test has them
    (Masters et al. 2021)."""
    tune_layers: int = 1
    """How many of the network's parts learn then, from the end."""
    tune_rate: float = 0.05
    """Learning rate of these epochs for 512 images a batch, by SGD and without warm-up; falls along a cosine."""
    distillation: float = 0.0
    """Weight of the teacher's distribution in the loss, 0 to 1 (Hinton et al. 2015); 0: off. The teacher of a run is
    the reference, the largest network of the space."""
    temperature: float = 4.0
    """Of teacher and student in the distillation loss."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and backward in bfloat16 under autocast; for GPUs: on a CPU it took three times as long as fp32."""

    def __post_init__(self) -> None:
        for names, legal, allowed in (
            (("batch_size", "accumulate", "tune_layers"), lambda v: v >= 1, "1 or more"),
            (("learning_rate", "tune_rate", "temperature", "decay_epochs", "rmsprop_eps"), lambda v: v > 0, "above 0"),
            (("rate_per", "norm_replicas"), lambda v: v is None or v >= 1, "none, or 1 or more"),
            (("norm_tile", "norm_mesh"), lambda v: v is None or min(v) >= 1, "none, or two numbers of 1 or more"),
            (("resolutions",), lambda v: all(size >= 4 for size in v), "4 pixels or more each"),
            (("decay_at",), _rises, "epochs above 0, each later than the one before"),
            (
                ("resize_at",),
                lambda v: not v or (_rises(v) and len(v) == len(self.resolutions) - 1),
                "none, or an epoch for each of `resolutions` but the first, each later than the one before",
            ),
            (("epochs", "weight_decay", "l2_loss", "warmup_epochs", "tune_epochs"), lambda v: v >= 0, "0 or more"),
            (("mixup", "cutmix"), lambda v: v >= 0, "0 or more"),
            (("end_rate",), lambda v: 0 <= v <= 1, "0 to 1"),
            (("decay_rate",), lambda v: 0 < v <= 1, "above 0 to 1"),
            (("momentum", "label_smoothing", "rmsprop_decay"), lambda v: 0 <= v < 1, "0 to below 1"),
            (("ema",), lambda v: v is None or 0 < v < 1, "none, or between 0 and 1"),
            (("randaugment",), lambda v: 0 <= v <= 30, "0 to 30"),
            (("distillation",), lambda v: 0 <= v <= 1, "0 to 1"),
            (("optimizer",), lambda v: v in OPTIMIZERS, ", ".join(OPTIMIZERS)),
            (("schedule",), lambda v: v in SCHEDULES, ", ".join(SCHEDULES)),
            (("precision",), lambda v: v in ("fp32", "bf16"), "fp32, bf16"),
        ):
            for name in names:
                if not legal(value := getattr(self, name)):
                    raise UserError(f"recipe.{name} is {value!r}; allowed: {allowed}")
        if (self.norm_tile is None) != (self.norm_mesh is None):
            raise UserError("recipe.norm_tile and recipe.norm_mesh belong together; one of them was given")
        if self.norm_tile and self.norm_replicas:
            raise UserError("recipe.norm_replicas and recipe.norm_tile were both given; batch norm joins one of them")

    @property
    def peak(self) -> float:
        """The learning rate right after the warm-up."""
        return self.learning_rate * (self.batch_size / self.rate_per if self.rate_per else 1.0)

    @classmethod
    def default(cls, task: Task, epochs: int | None = None, batch_size: int | None = None) -> Recipe:
        """A sensible start for the task's number and size of images, for networks of up to some million parameters.

        With other `epochs` or another `batch_size` than the task's own, the average and the warm-up are scaled to them.
        """
        images = len(task.splits["trainval"])
        # Small sets need more passes: about 400,000 images are seen, in 15 to 40 epochs; of tiny images 8 are enough,
        # of large ones up to 60.
        fewest, most = (8, 8) if task.resolution <= 12 else (15, 60 if task.resolution >= 64 else 40)
        usual_epochs = max(fewest, min(most, round(400_000 / images)))
        # On 8,000 images, steps matter more than large batches.
        usual_size = 64 if images <= 20_000 else 128
        recipe = cls(
            epochs=usual_epochs if epochs is None else epochs,
            batch_size=usual_size if batch_size is None else batch_size,
            learning_rate=0.05 if task.resolution >= 64 else 0.1,
        )
        # The average looks back over a twentieth of the training; over more of it, up to 50 steps, where the task's
        # usual training is short.
        part = max(1 / 20, 50 * usual_size / (usual_epochs * images))
        back = min(max(2.0, part * recipe.epochs * images / recipe.batch_size), 1e5)
        return replace(recipe, ema=round(1 - 1 / back, 5), warmup_epochs=min(1.0, recipe.epochs / 4))


def stage(recipe: Recipe, epoch: int) -> tuple[int | None, float]:
    """Pixels a side of an epoch's images (none: the task's), and how much of RandAugment and mixup it has.

    >>> [stage(Recipe(epochs=4, resolutions=(16, 32), ramp=True), epoch) for epoch in range(4)]
    [(16, 0.5), (16, 0.5), (32, 1.0), (32, 1.0)]
    """
    if not recipe.resolutions:
        return None, 1.0
    count = len(recipe.resolutions)
    if recipe.resize_at:
        number = sum(round(start) <= epoch for start in recipe.resize_at)
    else:
        number = min(epoch * count // recipe.epochs, count - 1)
    return recipe.resolutions[number], (number + 1) / count if recipe.ramp else 1.0


def _rises(epochs: tuple[float, ...]) -> bool:
    return all(before < after for before, after in pairwise((0.0, *epochs)))
