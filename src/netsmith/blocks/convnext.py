"""ConvNeXt's block (Liu et al. 2022, *A ConvNet for the 2020s*, arXiv:2201.03545; facebookresearch/ConvNeXt)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsmith.blocks.mobile import drop_path_of

EPS = 1e-6
"""Of every norm."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel, ``(n, channels, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise kxk, layer norm, 1x1 to four times the channels, GELU, 1x1 back, a factor per channel (1e-6 at first);
    added to the input."""

    def __init__(self, channels: int, *, kernel: int = 7, drop_path: float = 0.0) -> None:
        super().__init__()
        self.text = f"ConvNeXtBlock({channels}, {kernel=})"
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.expand = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.project = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = drop_path_of(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(self.act(self.expand(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def __repr__(self) -> str:
        return self.text
