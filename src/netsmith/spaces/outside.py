"""Networks that are not ours: `timm:NAME`, and `module:path.to:factory`, a function in a Python module of yours."""

from __future__ import annotations

import inspect
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from netsmith.errors import UserError

PREFIXES = ("timm:", "module:")
RESOLUTION = 224
"""Pixels a side, where a network does not say."""


def outside(name: str, *, classes: int, channels: int, resolution: int, **options: Any) -> nn.Module:
    """The network of that name, with untrained weights, or timm's own with ``pretrained=True``.

    timm: ``options`` go to `timm.create_model`. module: the factory gets ``options``, and of classes, channels and
    resolution what it has parameters for; the module is looked for where Python would, and in the current directory.

    Raises: UserError for a name, an option or a factory that is not there, and for one that makes no `nn.Module`.

    >>> outside("timm:resnet18", classes=10, channels=3, resolution=32)
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return _timm(rest, num_classes=classes, in_chans=channels, **options)
    return _from_module(rest, {"classes": classes, "channels": channels, "resolution": resolution}, options)


def usual_resolution(name: str) -> int:
    """Pixels a side that the network of that name is trained at. Raises: UserError for a name that timm lacks."""
    if not name.startswith("timm:"):
        return RESOLUTION
    from timm.models import get_pretrained_cfg

    _known(rest := name.removeprefix("timm:"))
    found = get_pretrained_cfg(rest, allow_unregistered=True)
    return found.input_size[-1] if found else RESOLUTION


def _timm(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    from timm import create_model

    _known(name)
    # Without numbers, only the shapes are asked for.
    pretrained = pretrained and torch.get_default_device().type != "meta"
    try:
        return create_model(name, pretrained=pretrained, **options)
    except OSError as error:
        raise UserError(f"timm:{name}: its trained weights cannot be fetched ({error})") from error
    except Exception as error:  # whatever the network's own code raises for what it was given
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"timm:{name} cannot be made with {options}: {reason}") from error


def _known(name: str) -> None:
    from timm import is_model, list_models

    if not is_model(name):
        near = get_close_matches(name, list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them all"
        raise UserError(f"timm has no network {name!r}; {hint}")


def _from_module(place: str, shape: dict[str, int], options: dict[str, Any]) -> nn.Module:
    path, _, factory = place.partition(":")
    if not path or not factory:
        raise UserError(f"module:{place} names no function; it has to look like module:package.file:function")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(import_module(path), factory, None)
    except ImportError as error:
        raise UserError(f"module:{place}: {path!r} cannot be imported ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise UserError(f"module:{place}: {path!r} has no function {factory!r}")
    takes = inspect.signature(function).parameters
    try:
        network = function(**{name: value for name, value in shape.items() if name in takes}, **options)
    except TypeError as error:
        raise UserError(f"module:{place} cannot be called: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"module:{place} made a {type(network).__name__}, not an nn.Module")
    return network
