"""netsmith: vision networks that keep a budget, as measured on the file you ship. Importing it loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    __version__: str

__all__ = ["__version__", "load"]


def load(run: str | Path) -> nn.Module:
    """The trained network of a run, or of one point of its front, as a plain module in eval mode, on the CPU.

    Raises: UserError where the folder holds no network or several, or a file is missing, damaged or does not fit.

    >>> network = netsmith.load("runs/digits")
    """
    from netsmith.ship.weights import load as load_network

    return load_network(Path(run))


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when asked for: importlib.metadata takes longer than all the rest here
        from importlib.metadata import version

        return version("netsmith")
    raise AttributeError(f"module 'netsmith' has no attribute {name!r}")
