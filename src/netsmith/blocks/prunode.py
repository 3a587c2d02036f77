"""PruNet's Prunode (Kierat et al. 2022, arXiv:2209.11785, section "bi-path"): a block that runs at two of its widths.

The pair starts at the narrowest and the widest, and closes in on the better width; time and memory of a pass are those
of two blocks, whatever the number of widths.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from netsmith.decisions import Draw, Width


class Prunode(nn.Module):
    """A block that runs at two of its widths; it stands where the block stood (section "bi-path").

    Both paths are sliced, so the pass costs two narrow blocks at most. ``low`` and ``high`` index the options of
    ``hidden``; ``logits`` (u) weigh the two. With single moves the optimum of a unimodal width-to-utility curve always
    stays between.
    """

    def __init__(self, block: nn.Module, *, separate: bool) -> None:
        super().__init__()
        self.hidden: Width = block.hidden  # pyright: ignore[reportAttributeAccessIssue]
        del block._modules["hidden"]
        self.block = block
        self.second = copy.deepcopy(block) if separate else None
        self.logits = nn.Parameter(torch.zeros(2))
        self.low, self.high = 0, len(self.hidden.options) - 1
        self.speed, self.winner = 1, -1

    @property
    def closed(self) -> bool:
        return self.low == self.high

    def open(self) -> Draw:
        """What `hidden` draws: both widths with their probabilities."""
        if self.closed:
            return Draw([self.low], torch.ones(1))
        return Draw([self.low, self.high], self.logits.softmax(0))

    def forward(self, x: Tensor) -> Tensor:
        indices, weights, _ = self.hidden.draw()
        block: Any = self.block
        if self.second is None or len(indices) == 1:
            alone: Any = block if self.second is None or indices[0] != self.high else self.second
            y = alone.body_at(x, *self.hidden.extent())
        else:
            second: Any = self.second
            narrow, wide = (self.hidden.options[i] for i in indices)
            y = weights[0] * block.body_at(x, narrow) + weights[1] * second.body_at(x, wide)
        return x + block.drop_path(y) if block.residual else y

    def move(self, confidence: float, *, momentum: bool, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Bring the losing width closer to the winning one, if one of them wins clearly. Returns whether it moved."""
        if self.closed:
            return False
        q = self.logits.detach().softmax(0)
        winner = int(q.argmax())
        if q[winner] < confidence:
            return False
        self.speed = 2 * self.speed if momentum and winner == self.winner else 1
        self.speed = min(self.speed, max(1, (self.high - self.low) // 2))
        self.winner = winner
        if winner == 1:
            self._grow(self.low + self.speed)
        else:
            self.high -= self.speed
        if self.closed:
            self._keep_copy(winner)
        with torch.no_grad():
            self.logits.zero_()
        if optimizer is not None:
            optimizer.state.pop(self.logits, None)
        return True

    def _grow(self, low: int) -> None:
        """Raise the narrow path's width; the channels it gains start as the winner's, not untrained."""
        if self.second is not None:
            old, new = self.hidden.options[self.low], self.hidden.options[low]
            copy_channels(self.block, self.second, old, new)
        self.low = low

    def close(self) -> None:
        """Decide for the more probable width."""
        if self.closed:
            return
        winner = int(self.logits.detach().argmax())
        self.low = self.high = (self.low, self.high)[winner]
        self._keep_copy(winner)

    def _keep_copy(self, winner: int) -> None:
        if self.second is not None and winner == 1:
            self.block = self.second
        self.second = None


@torch.no_grad()
def copy_channels(narrow: nn.Module, wide: nn.Module, start: int, stop: int) -> None:
    """Copy hidden channels ``start:stop`` of one copy of a block into the other: every tensor that has them."""
    full = wide.project.conv.in_channels  # pyright: ignore[reportAttributeAccessIssue]
    source = wide.state_dict()
    for name, tensor in narrow.state_dict().items():
        for axis in (0, 1):
            if tensor.dim() > axis and tensor.shape[axis] == full and _holds_hidden(name, axis):
                part = slice(start, stop) if axis == 0 else (slice(None), slice(start, stop))
                tensor[part] = source[name][part]


def _holds_hidden(name: str, axis: int) -> bool:
    layer = name.split(".")[0]
    if layer == "squeeze":
        return axis == (1 if "reduce" in name else 0)
    return axis == (1 if layer == "project" else 0)
