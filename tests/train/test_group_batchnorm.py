"""Batch norm over groups of replicas: gloo processes against one process on the joined batch."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from netsmith.errors import UserError
from netsmith.train.group_batchnorm import agree, contiguous, group_size, groups_of, over_groups, tiles
from netsmith.train.recipe import Recipe

IMAGES, CHANNELS = 3, 4


def test_golden_groups():
    assert tiles(4, 4, (2, 2)) == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
        [16, 17, 18, 19, 24, 25, 26, 27],
        [20, 21, 22, 23, 28, 29, 30, 31],
    ]
    sizes = [(1024, 65_536, 128), (1024, 32_768, 128), (1024, 65_536, 2_048), (8, 65_536, 128)]
    assert [group_size(*one) for one in sizes] == [2, 4, 32, 8]
    assert group_size(512, 16_384, 512) == 16


@pytest.mark.parametrize("tile", [(1, 1), (1, 4), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("cores", [1, 2])
def test_tiles_are_a_partition(tile, cores):
    groups = tiles(4, 8, tile, cores)
    assert sorted(rank for group in groups for rank in group) == list(range(32 * cores))
    assert {len(group) for group in groups} == {tile[0] * tile[1] * cores}


def test_a_recipe_says_who_is_joined():
    assert groups_of(Recipe(norm_replicas=2), 4) == contiguous(4, 2)
    assert groups_of(Recipe(batch_size=65_536), 1024) == contiguous(1024, 2)
    assert groups_of(Recipe(norm_mesh=(4, 4), norm_tile=(2, 2)), 32) == tiles(4, 4, (2, 2), cores=2)
    with pytest.raises(UserError, match="6 replicas cannot be shared out evenly to a mesh of 2x2 chips"):
        groups_of(Recipe(norm_mesh=(2, 2), norm_tile=(1, 1)), 6)


def test_groups_that_do_not_divide():
    with pytest.raises(UserError, match=r"groups of 3 do not divide 4 replicas; allowed: \[1, 2, 4\]"):
        contiguous(4, 3)
    with pytest.raises(UserError, match="tiles of 3x1 do not divide a mesh of 4x4 chips"):
        tiles(4, 4, (3, 1))
    with pytest.raises(UserError, match="10 replicas do not divide"):
        group_size(10, 320, 128)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS, momentum=0.3), nn.SiLU(), nn.Conv2d(CHANNELS, 2, 1)
    return nn.Sequential(*layers, nn.BatchNorm2d(2)).double()


def batch(rank: int) -> torch.Tensor:
    return 5 + 2 * torch.randn(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def told(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two steps forward, one backward, and everything that came out."""
    module(images.flip(0))
    images = images.clone().requires_grad_()
    y = module(images)
    (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).square().sum().backward()
    slopes = {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": images.grad, **slopes, **dict(module.named_buffers())}


def replica(rank: int, world: int, groups: list[list[int]], folder: Path) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not lead anywhere
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = told(over_groups(network(), groups), batch(rank))
    agree([tensor for name, tensor in found.items() if "running" in name])
    for name in found:
        if name.startswith("grad"):
            dist.all_reduce(found[name])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def replicas(world: int, groups: list[list[int]], folder: Path) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["netsmith.train.loop", "torchvision.transforms.v2"])
    processes = [context.Process(target=replica, args=(rank, world, groups, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_a_group_of_all_equals_one_process_on_the_joined_batch(tmp_path):
    whole = told(network(), torch.cat([batch(0), batch(1)]))
    found = replicas(2, [[0, 1]], tmp_path / "two")
    assert torch.allclose(torch.cat([found[0]["y"], found[1]["y"]]), whole["y"], rtol=0, atol=1e-10)
    assert torch.allclose(torch.cat([found[0]["x"], found[1]["x"]]), whole["x"], rtol=0, atol=1e-10)
    for name in whole.keys() - {"y", "x"}:
        for own in found:
            assert torch.allclose(own[name], whole[name], rtol=0, atol=1e-9), name


def test_groups_of_one_are_local_and_order_within_a_group_does_not_matter(tmp_path):
    alone = [told(network(), batch(rank)) for rank in range(4)]
    found = replicas(4, contiguous(4, 1), tmp_path / "alone")
    for own, local in zip(found, alone, strict=True):
        assert torch.allclose(own["y"], local["y"], rtol=0, atol=1e-10)
        means = torch.stack([one["1.running_mean"] for one in alone]).mean(0)
        assert torch.allclose(own["1.running_mean"], means, rtol=0, atol=1e-10)
    a = replicas(4, [[0, 2], [1, 3]], tmp_path / "a")
    b = replicas(4, [[3, 1], [2, 0]], tmp_path / "b")
    for one, other in zip(a, b, strict=True):
        assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-12) for name in one)
    pair = told(network(), torch.cat([batch(0), batch(2)]))
    assert torch.allclose(torch.cat([a[0]["x"], a[2]["x"]]), pair["x"], rtol=0, atol=1e-9)


def test_groups_that_are_no_partition(tmp_path, monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="no equal parts of 1 replicas"):
            over_groups(network(), [[0], [1]])
    finally:
        dist.destroy_process_group()
