"""State of something under way, on disk: replaced whole or not at all, read without running code."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from netsmith.errors import UserError
from netsmith.run import atomically


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data to `path`; if that fails, what was there before is still there.

    Raises `UserError` naming the path when the disk is full.
    """
    # Through memory: torch's own file writer would turn a full disk into a RuntimeError without a cause.
    content = io.BytesIO()
    torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU. Raises `UserError` when the file is damaged or something else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's guesses at what a foreign file may be
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read ({reason}); delete it to start anew") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint of netsmith; delete it to start anew")
    return state
