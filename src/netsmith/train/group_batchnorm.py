"""Batch norm over groups of replicas (Wongpanich et al. 2020, arXiv:2011.00071, section 3.4; tensorflow/tpu,
`efficientnet/utils.py`): a replica with few images normalises with its neighbours, not with all.

Which replicas are neighbours is a partition of the ranks: consecutive ones, or rectangles of a two-dimensional mesh,
so that a group of more than 16 stays compact on a torus. The result depends on who is in a group and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from netsmith.errors import UserError
from netsmith.train.recipe import Recipe

TARGET = 128
"""Images that a group normalises over, as in the official code (`batch_norm_batch_size`)."""


def group_size(replicas: int, images: int, target: int = TARGET) -> int:
    """Replicas that make up ``target`` of the ``images`` of a global batch; all of them where there are at most 8.

    Raises: UserError where the replicas do not divide into such groups.

    >>> group_size(1024, 65536), group_size(1024, 32768), group_size(8, 1024)
    (2, 4, 8)
    """
    size = replicas if replicas <= 8 else max(1, target * replicas // images)
    if replicas % size:
        raise UserError(f"batch norm over groups of {size} replicas: {replicas} replicas do not divide into them")
    return size


def contiguous(replicas: int, size: int) -> list[list[int]]:
    """Groups of ``size`` consecutive ranks. Raises: UserError where ``size`` does not divide the replicas.

    >>> contiguous(4, 2)
    [[0, 1], [2, 3]]
    """
    if size < 1 or replicas % size:
        allowed = [n for n in range(1, replicas + 1) if replicas % n == 0]
        raise UserError(f"groups of {size} do not divide {replicas} replicas; allowed: {allowed}")
    return [list(range(first, first + size)) for first in range(0, replicas, size)]


def tiles(rows: int, columns: int, tile: tuple[int, int], cores: int = 2) -> list[list[int]]:
    """Rectangles of ``tile`` rows and columns on a mesh of chips with ``cores`` ranks each; rank = (row * columns +
    column) * cores + core, groups over columns first (as Google's MLPerf SSD code numbers them).

    Raises: UserError where the tile does not divide the mesh.

    >>> tiles(2, 2, (1, 2), cores=1)
    [[0, 1], [2, 3]]
    """
    high, wide = tile
    if high < 1 or wide < 1 or rows % high or columns % wide:
        raise UserError(f"tiles of {high}x{wide} do not divide a mesh of {rows}x{columns} chips")
    return [
        [
            (row * columns + column) * cores + core
            for row in range(top, top + high)
            for column in range(left, left + wide)
            for core in range(cores)
        ]
        for top in range(0, rows, high)
        for left in range(0, columns, wide)
    ]


def groups_of(recipe: Recipe, replicas: int) -> list[list[int]]:
    """The ranks that batch norm joins, of so many ``replicas``. Raises: UserError where they do not divide."""
    if recipe.norm_tile is None or recipe.norm_mesh is None:
        return contiguous(replicas, recipe.norm_replicas or group_size(replicas, recipe.batch_size))
    rows, columns = recipe.norm_mesh
    if replicas % (rows * columns):
        raise UserError(f"{replicas} replicas cannot be shared out evenly to a mesh of {rows}x{columns} chips")
    return tiles(rows, columns, recipe.norm_tile, replicas // (rows * columns))


def over_groups(network: nn.Module, groups: Sequence[Sequence[int]], *, biased: bool = False) -> nn.Module:
    """Replace every `nn.BatchNorm2d` by one over the ``groups`` of ranks, in place; all ranks have to call this.

    In groups of one they stay, unless they are to be ``biased``: `agree` is all that they need.

    Raises: UserError where the groups are no partition of all ranks into equal parts.
    """
    ranks = sorted(rank for group in groups for rank in group)
    if ranks != list(range(dist.get_world_size())) or len({len(group) for group in groups}) != 1:
        raise UserError(f"the groups {list(map(list, groups))} are no equal parts of {dist.get_world_size()} replicas")
    if len(groups[0]) == 1 and not biased:
        return network
    handles = [dist.new_group(list(group)) for group in groups]  # every rank makes all of them
    mine = next(handle for handle, group in zip(handles, groups, strict=True) if dist.get_rank() in group)
    assert isinstance(mine, dist.ProcessGroup)
    return _exchanged(network, nn.BatchNorm2d, lambda *a, **k: GroupBatchNorm2d(*a, group=mine, biased=biased, **k))


def plain(network: nn.Module) -> nn.Module:
    """The ordinary `nn.BatchNorm2d` in place of each one over groups, in place."""
    return _exchanged(network, GroupBatchNorm2d, nn.BatchNorm2d)


def _exchanged(network: nn.Module, kind: type[nn.BatchNorm2d], make: Callable[..., nn.BatchNorm2d]) -> nn.Module:
    """Norms of exactly this kind made anew, with the same parameters and buffers."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is kind:
                new = make(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=norm.affine, device="meta")
                for own, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                    setattr(new, own, tensor)
                setattr(parent, name, new.train(norm.training))
    return network


@torch.no_grad()
def agree(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all replicas, in one message; all ranks have to call this.

    For running statistics of groups: they are sums over the steps, so their mean now is what it would be if every step
    had been averaged, as the paper does. A message a layer and step would cost more than the gradients.
    """
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias with the statistics of the group, which depend on x.

    With g the gradient of y, h the normalised x, n the group's numbers a channel and sums over the group:

        dx = weight / sqrt(variance + eps) * (g - (sum(g) + h sum(g h)) / n)

    PyTorch's kernels for fixed statistics do both passes and this replica's part of the sums.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, number, eps, group) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, mean, variance, number)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):  # type: ignore[override]
        x, weight, mean, variance, number = ctx.saved_tensors
        fixed = torch.ops.aten.native_batch_norm_backward
        dx, dweight, dbias = fixed(slope, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        sums = torch.cat([dbias, dweight])
        dist.all_reduce(sums, group=ctx.group)
        scale = (variance + ctx.eps).rsqrt()
        of_slope, of_product = (sums / number).tensor_split(2)
        along = -weight * scale.square() * of_product
        offset = -weight * scale * of_slope - mean * along
        dx = torch.addcmul(dx, x, along[:, None, None]).add_(offset[:, None, None])
        return dx, dweight, dbias, None, None, None, None, None


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all replicas of a group; equal to `nn.BatchNorm2d` of their joined batch.

    Statistics are taken in single precision at least, as differences from the running mean, which the group shares:
    E[x^2] - E[x]^2 would cancel. The running statistics are the group's own until `agree` averages them over all
    replicas (the spread between the groups' means is then not in the variance); ``biased`` keeps the variance as
    TensorFlow does, without n / (n - 1). In eval mode nothing is sent.
    """

    def __init__(self, channels: int, *, group: dist.ProcessGroup | None, biased: bool = False, **options) -> None:
        super().__init__(channels, **options)
        self.group, self.biased = group, biased

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.group is None:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        kind = torch.promote_types(x.dtype, torch.float32)
        values = x.to(kind)
        pivot = self.running_mean.to(kind)
        channels = self.num_features
        with torch.no_grad():
            # Two passes, as batch norm itself takes them; torch.var_mean needs ten times as long on a CPU.
            mean, variance = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
            count, apart = x.numel() / x.shape[1], mean - pivot
            sums = torch.cat([count * apart, count * (variance + apart.square()), values.new_tensor([count])])
            dist.all_reduce(sums, group=self.group)
            apart, squares, number = sums.split([channels, channels, 1])
            apart, squares = apart / number, squares / number
            mean, variance = apart + pivot, (squares - apart.square()).clamp_min(0)
            self._remember(mean, variance, number)
        weight = self.weight.to(kind) if self.affine else torch.ones_like(mean)
        bias = self.bias.to(kind) if self.affine else torch.zeros_like(mean)
        y = _Normalise.apply(values, weight, bias, mean, variance, number, self.eps, self.group)
        return y.to(x.dtype)  # type: ignore[union-attr]

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, number: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if not self.biased:
            variance = variance * (number / (number - 1))
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
