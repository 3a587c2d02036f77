"""Search methods: one paper, one file. Cheap to import; a method is loaded when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from netsmith.errors import unknown
from netsmith.options import checked

METHODS = {
    "random": "netsmith.methods.random:Random",
    "capacity": "netsmith.methods.capacity:Capacity",
    "best_of": "netsmith.methods.best_of:BestOf",
    "prunet": "netsmith.methods.prunet:PruNet",
    "fbnet": "netsmith.methods.fbnet:FBNet",
    "proxylessnas": "netsmith.methods.proxylessnas:ProxylessNAS",
    "darts": "netsmith.methods.darts:DARTS",
    "rarts": "netsmith.methods.rarts:RARTS",
    "pad_nas": "netsmith.methods.pad_nas:PADNAS",
}
"""Name -> where its dataclass is; the fields are the method's options."""


def method_class(name: str) -> type:
    """The dataclass of that name. Raises: UserError for an unknown name."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, kind = METHODS[name].split(":")
    return getattr(import_module(module), kind)


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The method of that name, its options from plain data.

    Raises: UserError for an unknown name or option, or a value of the wrong type.

    >>> make_method("fbnet", {"temperature": 2}).temperature
    2.0
    """
    return checked(method_class(name), dict(options or {}), "method_options")
