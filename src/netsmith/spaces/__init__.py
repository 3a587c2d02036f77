"""Search spaces: functions that return an ordinary ``nn.Module`` with open decisions in it. Cheap to import."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from netsmith.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn

SPACES = {
    "fbnet": "netsmith.spaces.fbnet:fbnet",
    "prunet": "netsmith.spaces.prunet:prunet",
    "fbnet_small": "netsmith.spaces.small:fbnet_small",
    "single_path": "netsmith.spaces.single_path:single_path",
    "pad_nas": "netsmith.spaces.pad_nas:pad_nas",
    "prunet_small": "netsmith.spaces.small:prunet_small",
    "proxylessnas": "netsmith.spaces.proxylessnas:proxylessnas",
    "nasbench201": "netsmith.spaces.nasbench201:nasbench201",
    "darts": "netsmith.spaces.darts:darts",
    "repvgg": "netsmith.spaces.repvgg:repvgg",
    "repvgg_small": "netsmith.spaces.repvgg:repvgg_small",
}
"""Name -> where its function is; every one takes ``classes``, ``channels`` and ``resolution`` (px)."""

FROM_MODEL = "from_model"
"""The space that is made of a network (`spaces/from_model.py`): a search cannot name it, `netsmith compress` does."""


def open_space(name: str, **options: Any) -> nn.Module:
    """The supernet of that name; ``options`` are the arguments of its function. A network of
    `netsmith.spaces.networks.NETWORKS`, timm:NAME or module:path.to:factory is a space in which nothing is open.

    Raises: UserError for an unknown name or option, and for a value that an option does not allow.

    >>> open_space("fbnet", classes=10, channels=1)
    """
    from pydantic import TypeAdapter, ValidationError

    if name.startswith(("timm:", "module:")):
        from netsmith.spaces.outside import outside

        return outside(name, **options)
    if name == FROM_MODEL:
        from netsmith.spaces.from_model import from_model

        return from_model(**options)
    if name not in SPACES:
        from netsmith.spaces.networks import NETWORKS

        if name in NETWORKS:
            return NETWORKS[name](**{option: value for option, value in options.items() if option != "resolution"})
    known = space_defaults(name)
    function = _function(name)
    kinds = get_type_hints(function, include_extras=True)
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of space {name!r}:", option, known)
        try:
            TypeAdapter(kinds[option]).validate_json(json.dumps(value), strict=True)
        except ValidationError as errors:
            said = errors.errors()[0]["msg"].removeprefix("Input ")
            raise UserError(f"space_options.{option} is {value!r}; it {said}") from None
    return function(**options)


def space_defaults(name: str) -> dict[str, Any]:
    """The options of a space and their defaults. Raises: UserError for an unknown space."""
    return {option: parameter.default for option, parameter in inspect.signature(_function(name)).parameters.items()}


def _function(name: str) -> Callable[..., nn.Module]:
    if name not in SPACES:
        raise unknown("space", name, SPACES)
    module, function = SPACES[name].split(":")
    return getattr(import_module(module), function)
