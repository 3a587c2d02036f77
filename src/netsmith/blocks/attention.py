"""Self-attention over the places of a small map, as LeViT has it (Graham et al. 2021, arXiv:2104.01136): with 1x1
convolutions and batch norm, which folds away, in place of linear layers and layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsmith.blocks.mobile import ConvBn, _text, activation
from netsmith.errors import UserError


class Attention(nn.Module):
    """Each place looks at all places, and what it saw is added to it; then two 1x1 convolutions, added too.

        y = x + project(act(softmax(q k' / sqrt(d)) v)),  q, k, v = qkv(x) in ``heads`` parts of d = outputs / heads
        out = y + shrink(act(expand(y))),  with ``expansion`` * outputs channels in between; 0 for none

    Where the shape changes, x is first the depthwise 3x3 convolution with the stride, and a 1x1 one. The heads do not
    know where a place is, which is left to the layers around (LeViT learns a bias for each distance, and is tied to one
    image size by that; ours goes without). ``x`` is `(n, inputs, H, W)`; out comes `(n, outputs, H / stride,
    W / stride)`. The two matrix products take 2 (H W / stride^2)^2 ``outputs`` MACs, which are counted.

    Raises: UserError for heads that do not divide the channels.
    """

    def __init__(
        self, inputs: int, outputs: int, *, heads: int, stride: int = 1, expansion: int = 0, act: str = "hardswish"
    ) -> None:
        super().__init__()
        if heads < 1 or outputs % heads:
            raise UserError(f"{outputs} channels do not divide into {heads} heads")
        self.text = _text(Attention, inputs, outputs, heads=heads, stride=stride, expansion=expansion, act=act)
        self.heads, self.each = heads, outputs // heads
        self.bring = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.bring = nn.Sequential(
                ConvBn(inputs, inputs, 3, stride=stride, groups=inputs, act="none"),
                ConvBn(inputs, outputs, act="none"),
            )
        self.qkv = ConvBn(outputs, 3 * outputs, act="none")
        self.act = type(activation(act))()  # not in place: its input is a view
        self.project = ConvBn(outputs, outputs, act="none")
        self.mlp = None
        if expansion:
            hidden = expansion * outputs
            self.mlp = nn.Sequential(ConvBn(outputs, hidden, act=act), ConvBn(hidden, outputs, act="none"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bring(x)
        n, _, height, width = x.shape
        rows = n * self.heads, self.each, height * width
        q, k, v = (part.reshape(rows) for part in self.qkv(x).chunk(3, 1))
        # Written out, as the cheap exporter and the counter of MACs know these operators.
        seen = torch.bmm((self.each**-0.5 * q).transpose(1, 2), k).softmax(-1)
        y = torch.bmm(v, seen.transpose(1, 2)).reshape(n, -1, height, width)
        x = x + self.project(self.act(y))
        return x if self.mlp is None else x + self.mlp(x)

    def __repr__(self) -> str:
        return self.text
