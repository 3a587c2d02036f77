"""Branches that train as a sum and ship as one convolution (RepVGG, ACNet, DBB; searched in RepNAS, arXiv:2109.03508).

Everything between a block's input and its activation is linear in eval mode, so it folds exactly (Ding et al. 2021,
arXiv:2103.13425, transforms I to VI). `Branches` holds every branch as a decision between "on" and "off"; `folded`
gives the plain layer. Each branch says what it folds into as a `Kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.mobile import ConvBn, _text, activation
from netsmith.decisions import Decision, OneOf, Rule
from netsmith.errors import UserError, unknown

Kernel = tuple[Tensor, Tensor]
"""Weight ``(outputs, inputs / groups, height, width)`` and bias ``(outputs,)``, both float64."""

KINDS = ("1x1", "1x1_avg", "kxk", "1x1_kxk", "1xk", "kx1")
"""RepNAS's six, in the order of its masks. ACNet has kxk, 1xk and kx1; DBB kxk, 1x1, 1x1_kxk and 1x1_avg."""


class Branch(nn.Module):
    """Something linear that folds into a kernel; training pays for each of them, the shipped file for none."""

    def kernel(self) -> Kernel:
        raise NotImplementedError


class ConvBranch(Branch):
    """Convolution, batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int, groups: int, eps: float
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = _conv(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups)
        self.bn = nn.BatchNorm2d(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def kernel(self) -> Kernel:
        return _normed(self.conv.weight.double(), self.bn)


class PaddedBranch(Branch):
    """1x1 and batch norm, padded by what that norm gives to zeros, then kxk or its average, and batch norm.

    Padding with zeros in between would be no fold at the border. The padding comes from the running statistics in
    training as well, so there the border differs a little between training and eval, as in DBB's code.

    Args: ``average`` for the mean of kxk pixels instead of a convolution. Otherwise the 1x1 keeps the channels and
    starts as the identity, to which its weight, at first zero, is added.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, average: bool, stride: int, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.size, self.average = kernel, average
        between = outputs if average else inputs
        self.point = _conv(inputs, between, (1, 1), groups=groups)
        self.point_bn = nn.BatchNorm2d(between, eps=eps)
        if average:
            self.spatial = nn.AvgPool2d(kernel, stride)
        else:
            nn.init.zeros_(self.point.weight)
            self.spatial = _conv(inputs, outputs, (kernel, kernel), stride=stride, groups=groups)
        self.bn = nn.BatchNorm2d(outputs, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.point_bn(self.point(x) if self.average else x + self.point(x))
        border = _of_zero(self.point_bn)[:, None, None]
        return self.bn(self.spatial(F.pad(y - border, (self.size // 2,) * 4) + border))

    def kernel(self) -> Kernel:
        point, groups = self.point.weight.double(), self.point.groups
        if isinstance(self.spatial, nn.Conv2d):
            point, spatial = point + _identity(point), self.spatial.weight.double()
        else:
            alone = _identity(point.new_empty(len(point), len(point) // groups, 1, 1))
            spatial = alone.expand(-1, -1, self.size, self.size) / self.size**2
        return _chained(_normed(point, self.point_bn), _normed(spatial, self.bn), groups)


class Zero(nn.Module):
    """A branch that is off: a zero that broadcasts."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def is_branch(decision: Decision) -> bool:
    """Whether it says if a branch of `Branches` runs."""
    return set(decision.options) == {"on", "off"}


NO_PATH = "is whether a branch is on or off, and a path that takes none leaves its block without any"
"""Why a method that runs one option of each decision refuses branches."""


class Branches(nn.Module):
    """A sum of branches and an activation; ships as one kxk convolution with bias and the activation.

    Every branch of ``kinds`` is a decision of that name, "on" or "off". Where the shape stays, an identity with batch
    norm is always there. ``1x1_kxk`` is only its kxk part where the stride is not 1, as in RepNAS's code.

    Raises: UserError for an even kernel, one below 3, or an unknown kind; in `forward` and `folded` where no branch is
    on and there is no identity.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        kinds: Sequence[str] = KINDS,
        act: str = "relu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise UserError(f"branches need a kernel that is odd and at least 3; given: {kernel}")
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("branch", kind, KINDS)
        self.options: dict[str, Any] = {
            "inputs": inputs, "outputs": outputs, "kernel": kernel, "stride": stride, "groups": groups, "act": act
        }  # fmt: skip
        self.kinds = tuple(kinds)

        def conv(height: int, width: int) -> Branch:
            return ConvBranch(inputs, outputs, (height, width), stride=stride, groups=groups, eps=eps)

        def padded(*, average: bool) -> Branch:
            return PaddedBranch(inputs, outputs, kernel, average=average, stride=stride, groups=groups, eps=eps)

        build = {
            "1x1": lambda: conv(1, 1),
            "1x1_avg": lambda: padded(average=True),
            "kxk": lambda: conv(kernel, kernel),
            "1x1_kxk": lambda: padded(average=False) if stride == 1 else conv(kernel, kernel),
            "1xk": lambda: conv(1, kernel),
            "kx1": lambda: conv(kernel, 1),
        }
        for kind in kinds:
            self.add_module(kind, OneOf({"on": build[kind](), "off": Zero()}))
        self.identity = nn.BatchNorm2d(outputs, eps=eps) if stride == 1 and inputs == outputs else None
        self.act = activation(act)
        if self.identity is None:
            self.rules = (Rule(self.kinds, "off", 1, len(self.kinds)),)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self._running()]
        return self.act(functools.reduce(torch.add, outputs))

    def _running(self) -> list[nn.Module]:
        """The identity and the branches that are not off."""
        found: list[nn.Module] = [] if self.identity is None else [self.identity]
        found += [branch for kind in self.kinds if _weighed(branch := self.get_submodule(kind))]
        if not found:
            raise UserError(f"{self} has no branch on and no identity: it computes nothing")
        return found

    @torch.no_grad()
    def folded(self) -> ConvBn:
        """The plain layer that does what this one does in eval mode: with everything decided, with what was drawn, or
        (nothing drawn) with the mixture of "on" and "off"; computed in float64."""
        kernels = [(weight, part.kernel()) for branch in self._running() for weight, part in _weighed(branch)]
        size, like = self.options["kernel"], next(self.parameters())
        with torch.device("meta"):  # its numbers come from here: draw none
            plain = ConvBn(**self.options)
        weight = plain.conv.weight.new_zeros(plain.conv.weight.shape, dtype=torch.float64, device=like.device)
        bias = weight.new_zeros(len(weight))
        if self.identity is not None:
            kernels.append((1.0, _normed(_identity(weight), self.identity)))
        for share, (part, shift) in kernels:
            high, wide = ((size - k) // 2 for k in part.shape[2:])
            weight += share * F.pad(part, (wide, wide, high, high))
            bias += share * shift
        plain.conv.weight = nn.Parameter(weight.to(like.dtype))
        plain.conv.bias = nn.Parameter(bias.to(like.dtype))
        plain.add_module("bn", nn.Identity())
        return plain.train(self.training)

    def __repr__(self) -> str:
        on = " ".join(kind for kind in self.kinds if _weighed(self.get_submodule(kind)))
        return _text(Branches, **self.options, on=on)


def _weighed(branch: nn.Module) -> list[tuple[Tensor | float, Branch]]:
    """What runs of a branch, and how much it counts: nothing where it is off or the identity."""
    if isinstance(branch, OneOf):
        running = [(w, branch.candidate(branch.options[i])) for i, w in branch.draw().pairs()]
    else:
        running = [(1.0, branch)]
    return [(weight, part) for weight, part in running if isinstance(part, Branch)]


def _conv(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    if not conv.weight.is_meta:  # there it would draw nothing, slowly
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _normed(weight: Tensor, norm: nn.BatchNorm2d) -> Kernel:
    """A kernel without bias followed by a batch norm (transform I)."""
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None, None, None], _of_zero(norm, torch.float64)


def _of_zero(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> Tensor:
    """What the norm gives to zeros in eval mode, ``(channels,)``."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    gamma, beta, mean, variance = (part.to(dtype or part.dtype) for part in parts)
    return beta - mean * gamma / (variance + norm.eps).sqrt()


def _chained(first: Kernel, second: Kernel, groups: int = 1) -> Kernel:
    """Two convolutions as one, without zeros padded in between (transform III); one of them is 1x1. The second has
    ``groups``, and the first the same, or none."""
    (weight, bias), (spatial, shift) = first, second
    inner = weight.reshape(groups, -1, *weight.shape[1:])
    outer = spatial.reshape(groups, -1, *spatial.shape[1:])
    size = [max(pair) for pair in zip(weight.shape[2:], spatial.shape[2:], strict=True)]
    joint = torch.einsum("gomhw,gmiyx->goihwyx", outer, inner).reshape(len(spatial), -1, *size)
    return joint, shift + torch.einsum("gomhw,gm->go", outer, bias.reshape(groups, -1)).reshape(-1)


def _identity(like: Tensor) -> Tensor:
    """The kernel of ``like``'s shape that hands every channel on: a 1 at (c, c mod inputs / groups, centre)."""
    outputs, inputs, height, width = like.shape
    eye = torch.eye(inputs, dtype=like.dtype, device=like.device).repeat(outputs // inputs, 1)
    return F.pad(eye[:, :, None, None], (width // 2, width // 2, height // 2, height // 2))
