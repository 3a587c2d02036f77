"""Layers that are wide in training and one convolution in the file: linear blocks (Bhardwaj et al. 2022, *Collapsible
Linear Blocks for Super-Efficient Super Resolution*, arXiv:2103.09404), and blocks whose inner activations go (RAN,
Bhardwaj et al. 2022, arXiv:2208.08562).

What stands between two activations is linear, so that without the activations inside a block is one kxk convolution.
A 1x1 convolution before a kxk one gives its bias, not zero, to what is padded: with zeros there the border would not
fold. Folding is in double precision; `netsmith.ship.export.fold` does it wherever there is a ``folded()``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netsmith.blocks.mobile import ACTIVATIONS, ConvBn, FusedMBConv, MBConv, _text, activation, pad_same
from netsmith.blocks.reparam import Kernel, _chained, _identity, _normed, _of_zero
from netsmith.blocks.residual import Bottleneck
from netsmith.errors import UserError, unknown

ORDERS = ("kxk_1x1", "1x1_kxk", "1x1_kxk_1x1")
"""Convolutions of a `LinearBlock`. SESR's is the first; with ``num_inner_layers=2`` the last."""


class LinearBlock(nn.Module):
    """Convolutions with bias through ``hidden`` channels and nothing between them; ships as one convolution with bias.

    Args: ``order`` one of `ORDERS`; ``depthwise`` makes the kxk one of 1x1_kxk_1x1 depthwise (an inverted bottleneck
    without activations); ``skip`` adds the input; ``online`` computes the one kernel in every step and convolves once,
    for the same loss and the same gradients of the weights as the convolutions one after the other, which take
    hidden / outputs times the MACs. Weights start as SESR's do: Glorot's uniform distribution, biases 0.

    Raises: UserError for an unknown order, an even kernel, ``skip`` where the shape does not stay, or ``depthwise``
    in another order.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        hidden: int = 256,
        order: str = "kxk_1x1",
        stride: int = 1,
        depthwise: bool = False,
        skip: bool = False,
        online: bool = False,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise unknown("order of a linear block", order, ORDERS)
        if kernel % 2 == 0:
            raise UserError(f"a linear block needs an odd kernel; given: {kernel}")
        if skip and (inputs != outputs or stride != 1):
            raise UserError(f"a skip needs the shape to stay; given: {inputs} to {outputs} channels, stride {stride}")
        if depthwise and order != "1x1_kxk_1x1":
            raise UserError(f"a depthwise kxk convolution stands between two 1x1 ones; given: order {order!r}")
        shown = {"kernel": kernel, "hidden": hidden, "order": order, "stride": stride, "skip": skip}
        self.text = _text(LinearBlock, inputs, outputs, **shown, depthwise=depthwise)
        self.size, self.stride, self.skip, self.online = kernel, stride, skip, online
        parts = order.split("_")
        widths = [inputs, *[hidden] * (len(parts) - 1), outputs]
        self.convs = nn.Sequential()
        for part, before, after in zip(parts, widths[:-1], widths[1:], strict=True):
            size, step, groups = (kernel, stride, hidden if depthwise else 1) if part == "kxk" else (1, 1, 1)
            conv = nn.Conv2d(before, after, size, step, groups=groups)
            if not conv.weight.is_meta:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.online:
            weight, bias = self.kernel()
            return F.conv2d(x, weight, bias, self.stride, self.size // 2)
        y = self.convs(F.pad(x, (self.size // 2,) * 4))  # before the first 1x1, which so puts its bias there
        return x + y if self.skip else y

    def kernel(self, dtype: torch.dtype | None = None) -> Kernel:
        """The one kernel, differentiable in the weights: W = sum over the hidden channels, b likewise, and a skip as
        ones in the centre."""
        found: Kernel | None = None
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            own = (conv.weight.to(dtype or conv.weight.dtype), conv.bias.to(dtype or conv.bias.dtype))
            found = own if found is None else _chained(found, own, conv.groups)
        assert found is not None
        weight, bias = found
        return (weight + _identity(weight) if self.skip else weight), bias

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """The convolution that does what this block does."""
        weight, bias = self.kernel(torch.float64)
        with torch.device("meta"):  # its numbers come from here: draw none
            plain = nn.Conv2d(weight.shape[1], weight.shape[0], self.size, self.stride, self.size // 2)
        like = next(self.parameters())
        plain.weight, plain.bias = nn.Parameter(weight.to(like.dtype)), nn.Parameter(bias.to(like.dtype))
        return plain.train(self.training)

    def __repr__(self) -> str:
        return self.text


class CollapsedBlock(nn.Module):
    """Batch norm, activation, kxk convolution, batch norm; added to the input where the shape stays (RAN-e's block,
    `RAN_e/model/blocks/collapsed_block.py`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        act: str = "hardswish",
        same: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.text = _text(CollapsedBlock, inputs, outputs, kernel=kernel, stride=stride, act=act, same=same)
        self.bn = nn.BatchNorm2d(inputs, eps=eps)
        self.act = activation(act)
        self.conv = ConvBn(inputs, outputs, kernel, stride=stride, act="none", same=same, eps=eps)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.act(self.bn(x)))
        return x + y if self.residual else y

    def __repr__(self) -> str:
        return self.text


class Collapsible(nn.Module):
    """A block of an existing network whose inner activations a gate takes away; the shapes of input and output stay.

    Every activation s inside becomes a s(z) + (1 - a) z, a the gate. At 1 this is the block, to the bit, and ships as
    it; at 0 nothing inside bends and it ships as one convolution. In between the gate may be a number, or a tensor with
    a graph by whoever learns it; it is set from outside and is no part of the state. What is padded before a kxk
    convolution is (1 - a) times what the norm before it gives to zeros, by its running statistics in training, too:
    nothing for the block as it was, and for the linear one what lets the border fold.

    Args: ``block`` an `MBConv`, a `FusedMBConv` or a `Bottleneck`, copied with its weights; ``front``: where a block
    ends without an activation, batch norm and one come in front as those inside go, a x + (1 - a) s(BN(x)), so that a
    `CollapsedBlock` is left, as in RAN-e; without it the whole block becomes linear and its skip a part of the kernel.
    A Bottleneck keeps the activation behind its sum. The gate is RAN's as far as that is known; how the front comes and
    what is padded are ours.

    Raises: UserError, with the reason, for a block that would not fold.
    """

    def __init__(self, block: nn.Module, *, front: bool = True, gate: float = 1.0) -> None:
        super().__init__()
        if not 0 <= gate <= 1:
            raise UserError(f"a gate is between 0 and 1; given: {gate}")
        if reason := _refused(block):
            raise UserError(f"{block} does not collapse into one convolution: {reason}")
        self.gate: float | Tensor = gate
        self.block: Any = copy.deepcopy(block)
        first, *others = _layers(self.block)
        self.acts = nn.ModuleList(_anew(layer.act) for layer in (first, *others[:-1]))
        self.front = None
        if front and not isinstance(block, Bottleneck):
            like, bn = first.conv.weight, _norm(first)
            norm = nn.BatchNorm2d(first.conv.in_channels, bn.eps, bn.momentum, device=like.device, dtype=like.dtype)
            self.front = nn.Sequential(norm, _anew(first.act))

    def forward(self, x: Tensor) -> Tensor:
        a, block = self.gate, self.block
        if not isinstance(a, Tensor) and a == 1:
            return block(x)
        first, *others = _layers(block)
        z = first.normalised(x if self.front is None else a * x + (1 - a) * self.front(x))
        edge = (1 - a) * _of_zero(_norm(first))[:, None, None]
        for layer, act in zip(others, self.acts, strict=True):
            z = _edged(layer, a * act(z) + (1 - a) * z, edge)
        if isinstance(block, Bottleneck):
            return block.act(block.shortcut(x) + block.drop_path(z))
        return x + block.drop_path(z) if block.residual else z

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """What ships: the block where the gate is 1, the plain layer where it is 0.

        Raises: UserError for a gate in between, which is neither.
        """
        if (gate := self._value()) not in (0, 1):
            raise UserError(f"a block ships with its activations or without, with a gate of 1 or 0: {self}")
        if gate:
            return copy.deepcopy(self.block)
        layers = _layers(self.block)
        weight, bias = _kernel(layers)
        stride = math.prod(layer.conv.stride[0] for layer in layers)
        plain: dict[str, Any] = {"stride": stride, "same": any(layer.same for layer in layers)}
        outputs, inputs, kernel, _ = weight.shape
        with torch.device("meta"):  # the numbers come from here: draw none
            if self.front is None:
                last = self.block.act if isinstance(self.block, Bottleneck) else nn.Identity()
                made = conv = ConvBn(inputs, outputs, kernel, act=_name(last), **plain)
                weight, bias = _with_skip(self.block, weight, bias)
            else:
                made = CollapsedBlock(inputs, outputs, kernel, act=_name(self.front[1]), **plain)
                made.add_module("bn", copy.deepcopy(self.front[0]))
                conv = made.conv
        dtype = layers[0].conv.weight.dtype
        conv.conv.weight, conv.conv.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
        conv.add_module("bn", nn.Identity())
        return made.train(self.training)

    def __getstate__(self) -> dict:
        # A learned gate holds its autograd graph: copies and pickles start from its value.
        return {**self.__dict__, "gate": self._value()}

    def _value(self) -> float:
        return self.gate.item() if isinstance(self.gate, Tensor) else self.gate

    def __repr__(self) -> str:
        front = "" if self.front is None else ", front=True"
        return f"Collapsible({self.block!r}{front}, gate={self._value():.3g})"


def _refused(block: nn.Module) -> str | None:
    """Why a block cannot become one convolution, None for one that can."""
    if type(block) not in (MBConv, FusedMBConv, Bottleneck):
        return "it is no MBConv, FusedMBConv or Bottleneck, which have activations between convolutions"
    if "hidden" in block._modules:
        return "its width is open; derive it first"
    if getattr(block, "squeeze", None) is not None:
        return "squeeze-excite multiplies channels by what it sees, which no convolution does"
    if any(not isinstance(layer.bn, nn.BatchNorm2d) for layer in _layers(block)):
        return "its norms look at the image; only batch norm folds"
    if isinstance(block, MBConv) and block.options["groups"] > 1:
        return "its 1x1 convolutions have groups and a shuffle between them"
    if isinstance(block, Bottleneck) and block.conv.same:
        return "with TensorFlow's padding it depends on the image's size where in the kernel the shortcut's pixel is"
    return None


def _layers(block: Any) -> list[ConvBn]:
    """The chain of a block, in the order it runs; one layer at most is not 1x1, and it is the first or the second."""
    if isinstance(block, Bottleneck):
        return [block.reduce, block.conv, block.expand]
    return [*block.opening(), block.project]


def _norm(layer: ConvBn) -> nn.BatchNorm2d:
    assert isinstance(layer.bn, nn.BatchNorm2d)
    return layer.bn


def _name(act: nn.Module) -> str:
    return next(name for name, kind in ACTIVATIONS.items() if type(act) is kind)


def _anew(act: nn.Module) -> nn.Module:
    """The same activation, not in place: its input is needed beside its output."""
    return ACTIVATIONS[_name(act)]()


def _edged(layer: ConvBn, x: Tensor, edge: Tensor) -> Tensor:
    """The layer's output before its activation, with ``edge`` `(channels, 1, 1)` padded instead of zeros."""
    (size, _), (stride, _) = layer.conv.kernel_size, layer.conv.stride
    if size == 1:
        return layer.normalised(x)
    x = x - edge
    x = pad_same(x, size, stride) if layer.same else F.pad(x, (size // 2,) * 4)
    return layer.bn(F.conv2d(x + edge, layer.conv.weight, None, stride, groups=layer.conv.groups))


def _kernel(layers: Sequence[ConvBn]) -> Kernel:
    """The layers without their activations as one kernel."""
    inputs, like = layers[0].conv.in_channels, layers[0].conv.weight
    eye = torch.eye(inputs, dtype=torch.float64, device=like.device)[:, :, None, None]
    found = (eye, eye.new_zeros(inputs))  # in front, so that a depthwise first layer becomes a dense kernel
    for layer in layers:
        found = _chained(found, _normed(layer.conv.weight.double(), _norm(layer)), layer.conv.groups)
    return found


def _with_skip(block: Any, weight: Tensor, bias: Tensor) -> Kernel:
    """The kernel with what is added around it: the input, or its projection by a 1x1 of the same stride."""
    if not isinstance(block, Bottleneck):
        return (weight + _identity(weight) if block.residual else weight), bias
    if not isinstance(block.shortcut, ConvBn):
        return weight + _identity(weight), bias
    around, shift = _kernel([block.shortcut])
    return weight + F.pad(around, (weight.shape[-1] // 2,) * 4), bias + shift
