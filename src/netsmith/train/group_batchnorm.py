"""Batch norm over groups of replicas (Wongpanich et al. 2020, arXiv:2011.00071, section 3.4; tensorflow/tpu,
`efficientnet/utils.py`): a replica with few images normalises with its neighbours, not with all.

Which replicas are neighbours is a partition of the ranks: consecutive ones, or rectangles of a two-dimensional mesh,
so that a group of more than 16 stays compact on a torus. The result depends on who is in a group and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from netsmith.errors import UserError

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


def over_groups(network: nn.Module, groups: Sequence[Sequence[int]], *, biased: bool = False) -> nn.Module:
    """Replace every `nn.BatchNorm2d` by one over the ``groups`` of ranks, in place; all ranks have to call this.

    Raises: UserError where the groups are no partition of all ranks into equal parts.
    """
    ranks = sorted(rank for group in groups for rank in group)
    if ranks != list(range(dist.get_world_size())) or len({len(group) for group in groups}) != 1:
        raise UserError(f"the groups {list(map(list, groups))} are no equal parts of {dist.get_world_size()} replicas")
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


class _GroupSum(torch.autograd.Function):
    """The sum over a group of processes; its gradient is the same sum."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        total = values.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = slope.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


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
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        count, apart = x.numel() / x.shape[1], mean - pivot
        number = values.new_tensor([count])
        sums = torch.cat([count * apart, count * (variance + apart.square()), number])
        channels = self.num_features
        apart, squares, number = _GroupSum.apply(sums, self.group).split([channels, channels, 1])
        apart, squares = apart / number, squares / number
        variance = (squares - apart.square()).clamp_min(0)
        mean = apart + pivot
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight.to(kind)
        shift = -mean * scale if not self.affine else self.bias.to(kind) - mean * scale
        y = torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(x.dtype)
        self._remember(mean.detach(), variance.detach(), number.detach())
        return y

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
