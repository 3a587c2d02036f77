"""netsmith: vision networks that keep a budget, as measured on the file you ship. Importing it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from torch import nn

    from netsmith.graph.features import Features

    __version__: str

__all__ = ["__version__", "load"]


@overload
def load(run: str | Path, *, features_only: Literal[False] = False) -> nn.Module: ...
@overload
def load(run: str | Path, *, features_only: Literal[True]) -> Features: ...
def load(run: str | Path, *, features_only: bool = False) -> nn.Module:
    """The trained network of a run, or of one point of its front, as a plain module in eval mode, on the CPU.

    ``features_only``: without its head, as a backbone. Images ``(n, channels, height, width)`` give a list of maps, the
    last one at each stride that the network has; `.channels` and `.reductions` say what comes.

    Raises: UserError where the folder holds no network or several, a file is missing, damaged or does not fit, or the
    network has no feature maps.

    >>> network = netsmith.load("runs/digits")
    >>> backbone = netsmith.load("runs/digits", features_only=True)
    >>> backbone.reductions, backbone.channels
    ([2, 4, 8, 16, 32], [64, 64, 128, 256, 512])
    """
    from netsmith.ship import weights

    return weights.load_features(Path(run)) if features_only else weights.load(Path(run))


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when asked for: importlib.metadata takes longer than all the rest here
        from importlib.metadata import version

        return version("netsmith")
    raise AttributeError(f"module 'netsmith' has no attribute {name!r}")
