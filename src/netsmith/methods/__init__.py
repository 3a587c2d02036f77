"""Search methods: one paper, one file. Cheap to import; a method is loaded when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from netsmith.errors import UserError, unknown
from netsmith.options import checked

if TYPE_CHECKING:
    from torch import nn

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
    "repnas": "netsmith.methods.repnas:RepNAS",
    "lana": "netsmith.methods.lana:LANA",
    "smcp": "netsmith.methods.smcp:SMCP",
    "mcu_pruning": "netsmith.methods.mcu_pruning:MCUPruning",
    "mixed_precision": "netsmith.methods.mixed_precision:MixedPrecision",
    "haq": "netsmith.methods.haq:HAQ",
    "edmips": "netsmith.methods.edmips:EdMIPS",
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


def check_searchable(name: str, space: nn.Module, space_name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises: UserError for a decision that the method, with its ``options``, cannot search: which, why, and the
    methods that can; and for options that are wrong.

    A method that searches only some says so in ``refuses(decision)``: why not, or None.
    """
    if refused := _refused(make_method(name, options), space):
        others = [other for other in METHODS if not _refused(make_method(other), space)]
        raise UserError(
            f"{name} cannot search the space {space_name!r}: {refused}; methods that can: {', '.join(others)}"
        )


def _refused(method: Any, space: nn.Module) -> str | None:
    from netsmith.decisions import decisions

    refuses = getattr(method, "refuses", lambda decision: None)
    found = ((path, refuses(decision)) for path, decision in decisions(space).items())
    return next((f"its decision {path!r} {why}" for path, why in found if why), None)
