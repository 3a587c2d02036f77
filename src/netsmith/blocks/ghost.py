"""Ghost blocks: few maps by convolutions, the others from them by cheap linear operations.

C-Ghost, for CPUs (Han et al. 2020, arXiv:1911.11907): inside one layer, with depthwise convolutions. G-Ghost, for GPUs
(Han et al. 2022, arXiv:2201.03297): across a stage, without them. As huawei-noah/Efficient-AI-Backbones has released
both (`ghostnet_pytorch/ghostnet.py`, `g_ghost_pytorch/g_ghost_regnet.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netsmith.blocks.mobile import ConvBn, SqueezeExcite, _text, activation
from netsmith.blocks.residual import Bottleneck
from netsmith.errors import UserError


class GhostModule(nn.Module):
    """m = ceil(outputs / ratio) intrinsic maps by a convolution, and ratio - 1 ghosts of each by a depthwise one.

    Both have batch norm and activation; the intrinsic maps are the first m of ``outputs`` channels. ``ratio`` (s) 1 is
    a plain convolution. ``x`` is `(n, inputs, H, W)`; out comes `(n, outputs, H / stride, W / stride)`.

    Raises: UserError for a ratio below 1 or above ``outputs``, and for an even ``cheap_kernel`` (d).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        ratio: int = 2,
        cheap_kernel: int = 3,
        stride: int = 1,
        act: str = "relu",
    ) -> None:
        super().__init__()
        if not 1 <= ratio <= outputs:
            raise UserError(f"ratio is {ratio}; allowed for {outputs} channels: 1 to {outputs}")
        if cheap_kernel % 2 == 0:
            raise UserError(
                f"cheap_kernel is {cheap_kernel}; allowed: odd numbers, as ghosts keep the size of their map"
            )
        shown = {"kernel": kernel, "ratio": ratio, "cheap_kernel": cheap_kernel, "stride": stride, "act": act}
        self.text = _text(GhostModule, inputs, outputs, **shown)
        intrinsic = math.ceil(outputs / ratio)
        self.primary = ConvBn(inputs, intrinsic, kernel, stride=stride, act=act)
        self.ghosts = outputs - intrinsic
        made = intrinsic * (ratio - 1)  # every map has as many: where the ratio does not divide, the last are dropped
        self.cheap = ConvBn(intrinsic, made, cheap_kernel, groups=intrinsic, act=act) if made else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return x if self.cheap is None else torch.cat([x, self.cheap(x)[:, : self.ghosts]], 1)

    def __repr__(self) -> str:
        return self.text


class GhostBottleneck(nn.Module):
    """Ghost module to ``hidden`` channels; with a stride a depthwise kxk; squeeze-excite; linear ghost module; a sum.

    What is added is the input or, where the shape changes, its depthwise kxk and 1x1 convolution. ``kernel`` is of
    the depthwise convolutions, without a stride and a change of channels there are none; ``squeeze`` reduced channels
    of squeeze-excite with a hard gate, 0 for none; ``ratio`` and ``cheap_kernel`` of both modules as in `GhostModule`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        hidden: int,
        stride: int = 1,
        squeeze: int = 0,
        ratio: int = 2,
        cheap_kernel: int = 3,
    ) -> None:
        super().__init__()
        shown = {"kernel": kernel, "hidden": hidden, "stride": stride, "squeeze": squeeze}
        ghost: dict[str, Any] = {"ratio": ratio, "cheap_kernel": cheap_kernel}
        self.text = _text(GhostBottleneck, inputs, outputs, **shown, **ghost)
        self.expand = GhostModule(inputs, hidden, **ghost)
        self.depthwise, self.squeeze, self.shortcut = nn.Identity(), nn.Identity(), nn.Identity()
        if stride > 1:
            self.depthwise = ConvBn(hidden, hidden, kernel, stride=stride, groups=hidden, act="none")
        if squeeze:
            self.squeeze = SqueezeExcite(hidden, squeeze, gate="hard")
        self.project = GhostModule(hidden, outputs, act="none", **ghost)
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                ConvBn(inputs, inputs, kernel, stride=stride, groups=inputs, act="none"),
                ConvBn(inputs, outputs, act="none"),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.squeeze(self.depthwise(self.expand(x)))) + self.shortcut(x)

    def __repr__(self) -> str:
        return self.text


class Mix(nn.Module):
    """tau, what all maps of a stage say to the cheap ones: means, 1x1, batch norm, ReLU, 1x1, batch norm.

    ``maps`` are `(n, channels, H, W)` each, with ``inputs`` channels together; tau is `(n, outputs, 1, 1)`. Its norms
    see one value an image, so that training needs batches of two or more.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvBn(inputs, outputs), ConvBn(outputs, outputs, act="none"))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # The mean of the concatenated maps, which are never built.
        return self.layers(torch.cat([x.mean((2, 3), keepdim=True) for x in maps], 1))


class GGhostStage(nn.Module):
    """``depth`` (n) bottlenecks, of which only the first and the last have all channels.

        x0 = block_1(x),  e = block_{n-1}(...block_2(x0[:raw]))
        y = block_n([e, relu(norm(conv1x1(x0[raw:])) + tau)]),  tau = mix(x0, and what each block inside puts out)

    Blocks are RegNet's: `Bottleneck` as wide inside as outside, with groups of ``group_width``. Those in between have
    groups of g, three quarters of that, and raw = floor(outputs (1 - cheap_ratio) / g) g channels; ``cheap_ratio`` is
    the paper's lambda. ``mix=False`` leaves out tau. ``x`` is `(n, inputs, H, W)`; out comes `(n, outputs, H / stride,
    W / stride)`. The paper's figure ends with the concatenation; its counts are the code's, with a block behind that.

    Raises: UserError for fewer than three blocks, groups of fewer than two channels, a ratio that is not between 0 and
    1 or leaves no raw channels, and channels that their groups do not divide.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        depth: int,
        group_width: int,
        stride: int = 2,
        cheap_ratio: float = 0.5,
        mix: bool = True,
    ) -> None:
        super().__init__()
        if depth < 3:
            raise UserError(f"depth is {depth}; allowed: 3 or more, a first block, a last one, and raw ones in between")
        if group_width < 2:
            raise UserError(
                f"group_width is {group_width}; allowed: 2 or more, as raw blocks have three quarters of it"
            )
        group = int(0.75 * group_width)
        self.raw = int(outputs * (1 - cheap_ratio) / group) * group
        if not 0 < cheap_ratio < 1 or self.raw == 0:
            raise UserError(
                f"cheap_ratio is {cheap_ratio}; allowed: above 0 and below 1, with a group of {group} raw channels at "
                f"least left of {outputs}"
            )
        shown = {"group_width": group_width, "stride": stride, "cheap_ratio": cheap_ratio, "mix": mix}
        self.text = _text(GGhostStage, inputs, outputs, depth=depth, **shown)
        cheap = outputs - self.raw
        self.first = Bottleneck(inputs, outputs, hidden=outputs, stride=stride, group_size=group_width)
        inner = (Bottleneck(self.raw, self.raw, hidden=self.raw, group_size=group) for _ in range(depth - 2))
        self.inner = nn.ModuleList(inner)
        self.last = Bottleneck(outputs, outputs, hidden=outputs, group_size=group_width)
        self.cheap = ConvBn(cheap, cheap, act="none")
        self.mix = Mix(outputs + self.raw * (depth - 2), cheap) if mix else None
        self.act = activation("relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        raw, cheap = x[:, : self.raw], self.cheap(x[:, self.raw :])
        maps = [x]
        for block in self.inner:
            raw = block(raw)
            maps.append(raw)
        if self.mix is not None:
            cheap = cheap + self.mix(maps)
        return self.last(torch.cat([raw, self.act(cheap)], 1))

    def __repr__(self) -> str:
        return self.text


def ghosted(conv: nn.Conv2d, ratio: int = 2, *, cheap_kernel: int = 3, act: str = "none") -> GhostModule:
    """A ghost module, with weights of its own, that can stand where ``conv`` stands: the same shapes, precision and
    device. Linear by default, as the convolution's norm and activation come behind it.

    >>> ghosted(nn.Conv2d(64, 128, 3, stride=2, padding=1))

    Raises: UserError for a convolution with groups, one whose output has another size than a ghost module's (kernel
    or stride not square, padding other than half the kernel, dilation), and what `GhostModule` raises.
    """
    if conv.groups != 1:
        raise UserError(f"a ghost module reads all its inputs, which a convolution with groups does not; given: {conv}")
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    padding = (kernel // 2, kernel // 2)
    square = conv.kernel_size == (kernel, kernel) and conv.stride == (stride, stride)
    if not square or conv.padding not in (padding, "same") or conv.dilation != (1, 1):
        raise UserError(
            "a ghost module has a square kernel and stride, half the kernel for padding and no dilation, so its "
            f"output would have another size; given: {conv}"
        )
    made = GhostModule(
        conv.in_channels, conv.out_channels, kernel, ratio=ratio, cheap_kernel=cheap_kernel, stride=stride, act=act
    )
    return made.to(conv.weight.device, conv.weight.dtype).train(conv.training)


def with_ghosts(block: nn.Module, ratio: int = 2) -> nn.Module | None:
    """A copy of a block with ghost modules, untrained, in place of its convolutions; None where there are none.

    Replaced is what `ghosted` takes and has no bias: a norm comes behind that, which squeeze-excite's convolutions, on
    maps of one place, have not.
    """
    if isinstance(block, nn.Conv2d):
        return None
    made: dict[int, object] = {}
    for part in block.modules():
        if type(part) is nn.Conv2d and part.bias is None:
            try:
                made[id(part)] = ghosted(part, ratio)
            except UserError:  # it stays
                continue
    return copy.deepcopy(block, made) if made else None
