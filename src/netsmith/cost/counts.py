"""Counted costs: parameters, multiply-accumulates, bytes of the shipped file.

Convention: one MAC is one multiply-accumulate of a convolution or matrix product, with batch 1. Batch norm (folded when
shipped), activations, means and additions count 0. Nothing is computed: modules run on the ``meta`` device. What
folds itself when shipped (`shipped`) counts as what it folds into.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from netsmith.blocks.reparam import Branch

Shape = tuple[int, int, int]
"""(channels, height, width) of one image; the batch is 1."""


@dataclass(frozen=True)
class Params:
    """Learnable parameters."""

    name = "params"
    unit = ""
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        return float(sum(parameter.numel() for parameter in shipped(module).parameters()))


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image."""

    trained: bool = False
    """Of the network in training, before anything folds."""

    name = "macs"
    unit = ""
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        return count_macs(module, input_shape, trained=self.trained)


@dataclass(frozen=True)
class FileBytes:
    """Bytes of the fp32 file: four per shipped parameter, batch norm folded.

    Each folded norm leaves one bias per channel, whether or not it had parameters. The graph itself adds some kilobytes
    that depend on the exporter: the promise loop measures the real file and corrects for them.
    """

    name = "file"
    unit = "B"
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        module = shipped(module)
        count = sum(parameter.numel() for parameter in module.parameters())
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                count += -norm.num_features if norm.affine else norm.num_features
        return 4.0 * count


@dataclass(frozen=True)
class Flash:
    """Bytes of the weights with the whole network in int8, batch norm folded: one each, and four for each bias
    (TFLite Micro; µNAS counts one). The code of the runtime comes on top."""

    name = "flash"
    unit = "B"
    counted = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        weights = sum(parameter.numel() for parameter in shipped(module).parameters() if parameter.dim() > 1)
        return FileBytes()(module, input_shape) - 3.0 * weights


@dataclass(frozen=True)
class BranchCount:
    """Branches that a network trains with, and folds away when shipped (spaces `repvgg` and `repvgg_small`)."""

    name = "branches"
    unit = ""
    counted = True
    trained = True

    def __call__(self, module: nn.Module, input_shape: Shape) -> float:
        return float(sum(isinstance(part, Branch) for part in module.modules()))


def shipped(module: nn.Module) -> nn.Module:
    """The module with every part that has a ``folded()`` replaced by what that returns: a copy, or, where no part has
    one, the module itself."""
    folded: dict[int, object] = {id(part): part.folded() for part in module.modules() if hasattr(part, "folded")}  # pyright: ignore[reportCallIssue]
    return copy.deepcopy(module, folded) if folded else module


def count_macs(module: nn.Module, input_shape: Shape, *, trained: bool = False) -> float:
    """Exact MACs of one image of ``input_shape``, as shipped or with ``trained`` before anything folds. Raises what the
    module's own forward raises on a wrong shape."""
    counter, plain = FlopCounterMode(display=False), to_meta(module)
    plain = plain if trained else shipped(plain)
    with counter:
        run_shapes(plain, image(module, input_shape))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops / 2


def image(module: nn.Module, shape: Shape) -> Tensor:
    """An image for `to_meta(module)`: ``(1, channels, height, width)``, of the module's own precision."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return torch.empty(1, *shape, dtype=dtype, device="meta")


class _WithoutNorms(TorchFunctionMode):
    """Batch norm changes no shape and counts 0, but on ``meta`` it takes most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is F.batch_norm else func(*args, **(kwargs or {}))


def run_shapes(shadow: nn.Module, example: Tensor) -> None:
    """One pass of a `to_meta` copy, for what its hooks or a counter see."""
    with torch.no_grad(), _WithoutNorms():
        shadow(example)


def to_meta(module: nn.Module) -> nn.Module:
    """A copy of the module in eval mode without its numbers: shapes only, no memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in module.parameters()}
    memo.update({id(buffer): buffer.to("meta") for buffer in module.buffers()})
    return copy.deepcopy(module, memo).eval()
