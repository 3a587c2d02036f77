"""PyTorch and the exported file side by side on the test images: the same outputs, and the metric of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from netsmith.blocks.quantized import is_int8
from netsmith.cost.device import OrtCpu
from netsmith.errors import UserError
from netsmith.tasks.classification import Task

if TYPE_CHECKING:
    import onnxruntime

PARITY = 1e-3
"""Largest difference of an output allowed, relative to the largest output. Another order of fp32 additions makes
5e-7 (ours) to 2e-4 (the worst of 18 timm networks); a mistake in layout, folding or weights makes far more."""
INT8_PARITY = 0.1
"""The same with int8 layers: what lies between them, as a residual sum, is rounded to 8 bits in the file alone."""
BATCH = 250
"""Images at a time while scoring."""


@dataclass(frozen=True)
class Agreement:
    """PyTorch and the file side by side on the same images."""

    accuracy: float
    accuracy_exported: float
    max_abs_diff: float
    """Largest difference between two outputs; infinite where one of the two is not finite."""
    relative_diff: float
    """That over PyTorch's largest output."""
    same_class: float
    """Share of images on which both name the same class."""
    allowed: float = PARITY
    """The largest `relative_diff` that is no mistake."""

    @property
    def holds(self) -> bool:
        return self.relative_diff <= self.allowed


def agree(network: nn.Module, path: Path, task: Task) -> Agreement:
    """Both over the whole test split, in one pass; ``network`` is in eval mode on the CPU.

    Raises: UserError for a file that is missing or that ONNX Runtime cannot load.
    """
    session = _session(path)
    entry = session.get_inputs()[0]
    images = right = right_exported = same = 0
    difference = largest = 0.0
    for batch, labels in task.batches("test", BATCH, train=False):
        with torch.inference_mode():
            ours = network(batch).numpy()
        array = np.ascontiguousarray(batch.numpy())
        pieces = np.split(array, len(array)) if entry.shape[0] == 1 else [array]
        theirs = np.concatenate([np.asarray(session.run(None, {entry.name: piece})[0]) for piece in pieces])
        images += len(labels)
        right += int((ours.argmax(1) == labels.numpy()).sum())
        right_exported += int((theirs.argmax(1) == labels.numpy()).sum())
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        with np.errstate(invalid="ignore"):  # infinite outputs
            difference = max(difference, _largest(ours - theirs))
        largest = max(largest, _largest(ours))
    relative = difference / largest if 0 < largest < math.inf else float(difference > 0)
    allowed = INT8_PARITY if any(map(is_int8, network.modules())) else PARITY
    return Agreement(right / images, right_exported / images, difference, relative, same / images, allowed)


def _largest(values: np.ndarray) -> float:
    """The largest absolute value; infinite where one is NaN."""
    sizes = np.abs(values)
    return math.inf if np.isnan(sizes).any() else float(sizes.max())


def _session(path: Path) -> onnxruntime.InferenceSession:
    try:
        return OrtCpu(threads=torch.get_num_threads()).session(path)
    except UserError:
        raise
    except Exception as error:  # the runtime's errors share no class of their own
        raise UserError(f"{path} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from error
