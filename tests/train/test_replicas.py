"""Several processes train and evaluate as one does; any number of them goes on from a checkpoint; one may die."""

import contextlib
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from netsmith.errors import UserError
from netsmith.tasks import open_task
from netsmith.tasks.classification import Task
from netsmith.train.group_batchnorm import GroupBatchNorm2d
from netsmith.train.loop import evaluate, train
from netsmith.train.recipe import Recipe
from netsmith.train.replicas import ALONE, Replica

RECIPE = Recipe(epochs=2, batch_size=64, learning_rate=0.05, ema=0.9, mixup=0.4, cutmix=1.0, randaugment=5)


class Double(nn.Sequential):
    """In double precision, so that what is not rounding shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU()
    return Double(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).double()


def digits() -> Task:
    return open_task("digits", limit=150)


class Stopped(BaseException):
    pass


def trained(rank: int, world: int, recipe: Recipe, steps: int | None, options: dict, folder: Path, out: str) -> None:
    """One replica of ``world``; stopped after ``steps``, if they are given."""
    torch.set_num_threads(1)
    replica = ALONE
    if world > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{out}", rank=rank, world_size=world)
        replica = Replica(rank, world)
    module, task = network(), digits()
    if steps is not None:
        passes = iter(range(steps))

        def stop(*_) -> None:
            if next(passes, None) is None:
                raise Stopped

        module.register_forward_pre_hook(stop)
    history: list = []
    with contextlib.suppress(Stopped):
        history = train(module, task, recipe, replica=replica, watch=None if steps else "search", **options)
    if not steps:
        assert not any(isinstance(part, GroupBatchNorm2d) for part in module.modules())
    sizes = 3, 7, 60  # with rests, and with batches smaller than the number of replicas
    counted = [evaluate(module, task, "search", batch_size=size, replica=replica) for size in sizes if not steps]
    torch.save({"state": module.state_dict(), "history": history, "counted": counted}, folder / f"{out}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def train_with(world: int, folder: Path, recipe: Recipe = RECIPE, steps: int | None = None, **options) -> list[dict]:
    """What each of ``world`` processes ended with."""
    out = f"{world}-{len(list(folder.iterdir()))}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["netsmith.train.loop", "torchvision.transforms.v2"])
    everyone = range(world)
    own = recipe, steps, options, folder, out
    processes = [context.Process(target=trained, args=(rank, world, *own)) for rank in everyone]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f"{out}-{rank}.pt") for rank in everyone]


def assert_equal(one: dict, other: dict, atol: float = 1e-10) -> None:
    for name, tensor in one["state"].items():
        assert torch.allclose(tensor, other["state"][name], rtol=0, atol=atol), name


def losses(found: dict) -> list[float]:
    return [epoch["loss"] for epoch in found["history"]]


def test_replicas_train_like_one_process(tmp_path):
    (alone,) = train_with(1, tmp_path)
    for found in train_with(3, tmp_path):
        assert_equal(found, alone)
        assert losses(found) == pytest.approx(losses(alone), abs=1e-6)
        assert [epoch["accuracy"] for epoch in found["history"]] == [epoch["accuracy"] for epoch in alone["history"]]
        assert found["counted"] == alone["counted"]
    assert len(set(alone["counted"])) == 1


@pytest.mark.slow
def test_batch_norm_over_fewer_replicas_is_something_else(tmp_path):
    (alone,) = train_with(1, tmp_path)
    first, second = train_with(2, tmp_path, replace(RECIPE, norm_replicas=1))
    assert_equal(first, second, atol=0)
    with pytest.raises(AssertionError):
        assert_equal(first, alone)
    (grouped, *_) = train_with(4, tmp_path, replace(RECIPE, norm_replicas=2))
    (tiled, *_) = train_with(4, tmp_path, replace(RECIPE, norm_mesh=(2, 1), norm_tile=(1, 1)))
    assert_equal(grouped, tiled)


def test_parts_of_a_batch_add_up(tmp_path):
    """Without batch norm, which sees the parts."""
    recipe = replace(RECIPE, ema=None)

    def gradients(parts: int) -> dict[str, Tensor]:
        module = network()
        for name in ("1", "4"):
            module.set_submodule(name, nn.Identity())
        train(module, digits(), replace(recipe, accumulate=parts))
        return module.state_dict()

    whole = gradients(1)
    for parts in (2, 5):
        for name, tensor in gradients(parts).items():
            assert torch.allclose(tensor, whole[name], rtol=0, atol=1e-12), name


def test_accumulation_over_replicas(tmp_path):
    """Batch norm sees the same quarters of a batch in one process as in two."""
    (alone,) = train_with(1, tmp_path, replace(RECIPE, accumulate=4))
    weights = {name: tensor for name, tensor in alone["state"].items() if "running" not in name}
    weights = {name: tensor for name, tensor in weights.items() if "tracked" not in name}
    for found in train_with(2, tmp_path, replace(RECIPE, accumulate=2, norm_replicas=1)):
        assert_equal({"state": weights}, found)
        assert losses(found) == pytest.approx(losses(alone), abs=1e-6)


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_replicas_goes_on_from_where_four_were_stopped(tmp_path, steps):
    """Two steps an epoch: within the first, and within the second."""
    path, undisturbed = tmp_path / "train.pt", network()
    whole = train(undisturbed, digits(), RECIPE)
    train_with(4, tmp_path, steps=steps, checkpoint=path, save_every=1)
    state = torch.load(path)
    assert 2 * state["epoch"] + len(state["losses"]) == steps
    for world in (1, 2):
        copy = tmp_path / f"{world}.pt"
        copy.write_bytes(path.read_bytes())
        for found in train_with(world, tmp_path, checkpoint=copy):
            assert_equal(found, {"state": undisturbed.state_dict()})
            assert losses(found) == pytest.approx([epoch["loss"] for epoch in whole], abs=1e-6)


def test_batches_that_do_not_divide():
    with pytest.raises(UserError, match="batches of 60 images cannot be divided over 1 replicas and 61 parts"):
        train(network(), digits(), replace(RECIPE, accumulate=61))
