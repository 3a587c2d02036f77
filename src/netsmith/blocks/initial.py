"""How the weights of a network are drawn."""

from __future__ import annotations

import math

from torch import nn


def initialise(network: nn.Module, momentum: float) -> None:
    """Draw weights as tensorflow/tpu does: convolutions N(0, 2 / fan), with fan = k * k * outputs / groups (a depthwise
    one counts one output), linear layers uniform in +-1/sqrt(classes), counted as 1,000 at least."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
        elif isinstance(part, nn.Conv2d) and not part.weight.is_meta:
            fan = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, 0.0, math.sqrt(2 / fan))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear) and not part.weight.is_meta:
            bound = 1 / math.sqrt(max(part.out_features, 1000))  # of few classes logits would begin ten times as large
            nn.init.uniform_(part.weight, -bound, bound)
            nn.init.zeros_(part.bias)
