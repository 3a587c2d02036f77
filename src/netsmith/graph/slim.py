"""A network without some of its channels: smaller tensors in a copy, everything else as it was."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from netsmith.errors import UserError
from netsmith.graph.channels import Channels, Group


def slim(network: nn.Module, groups: Mapping[str, Group], keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which of each group named in ``keep`` only those channels exist: indices ``(kept,)``, in any order.

    Raises: UserError for a group that is not there, and where nothing or what is not there would be kept.
    """
    slimmed = copy.deepcopy(network)
    state = slimmed.state_dict(keep_vars=True)
    left: dict[tuple[str, int], Tensor] = {}
    for name, kept in keep.items():
        if name not in groups:
            raise UserError(f"there is no group {name!r}; groups: {', '.join(groups)}")
        if not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= groups[name].size:
            raise UserError(f"of the {groups[name].size} channels of {name!r} {kept.tolist()} cannot be kept")
        gone = kept.new_ones(groups[name].size, dtype=torch.bool)  # numbers, also where the network has none
        gone[kept] = False
        for use in groups[name].uses:
            place = use.tensor, use.dim
            if place not in left:
                left[place] = gone.new_ones(state[use.tensor].shape[use.dim])
            left[place][use.positions[gone].reshape(-1)] = False
    cut: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (tensor, dim), stays in left.items():
        cut[tensor][dim] = stays.nonzero().squeeze(1)
    for tensor, dims in cut.items():
        owner, _, name = tensor.rpartition(".")
        shorten(slimmed.get_submodule(owner), name, dims)
    return slimmed


def masked(network: nn.Module, groups: Mapping[str, Group], keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the same shape in which nothing reads the channels that `slim` would take out."""
    muted = copy.deepcopy(network)
    state = muted.state_dict()
    for name, kept in keep.items():
        gone = torch.ones(groups[name].size, dtype=torch.bool)
        gone[kept] = False
        for use in groups[name].uses:
            if use.role == "in":
                state[use.tensor].index_fill_(use.dim, use.positions[gone].reshape(-1), 0.0)
    return muted


def proven(network: nn.Module, found: Channels, shape: tuple[int, int, int]) -> Channels:
    """Without the groups that the network's own code does not let go: a size may be written into a forward pass.

    Each is tried without half of its channels, on the meta device.
    """
    with torch.device("meta"):
        shadow = copy.deepcopy(network).to("meta").eval()
    halves = {name: torch.arange(max(1, group.size // 2)) for name, group in found.groups.items()}
    if not (_failure(shadow, found.groups, halves, shape)):
        return found
    failures = {name: _failure(shadow, found.groups, {name: half}, shape) for name, half in halves.items()}
    groups = {name: group for name, group in found.groups.items() if not failures[name]}
    return Channels(groups, {**found.closed, **{name: why for name, why in failures.items() if why}})


def _failure(
    shadow: nn.Module, groups: Mapping[str, Group], keep: Mapping[str, Tensor], shape: tuple[int, int, int]
) -> str:
    """What the network without these channels says when it runs; empty where it runs as before."""
    image = torch.empty(2, *shape, device="meta", dtype=next(shadow.parameters()).dtype)
    try:
        with torch.no_grad():
            before, after = shadow(image), slim(shadow, groups, keep)(image)
    except Exception as error:  # whatever the network's own code raises
        return f"without some of them: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    return "" if before.shape == after.shape else f"without some of them the output is {tuple(after.shape)}"


def shorten(owner: nn.Module, name: str, dims: Mapping[int, Tensor]) -> None:
    """Keep only some places along dimensions of a tensor of a layer, which is changed: ``dims`` is dimension ->
    indices. Its attributes that count channels follow."""
    tensor = getattr(owner, name)
    with torch.no_grad():
        smaller = tensor
        for dim, kept in dims.items():
            smaller = smaller.index_select(dim, kept.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(owner, name, nn.Parameter(smaller.clone(), requires_grad=tensor.requires_grad))
    else:
        setattr(owner, name, smaller.clone())
    if name != "weight":
        return
    if isinstance(owner, nn.Conv2d):
        depthwise = owner.groups > 1 and owner.groups == owner.in_channels
        if depthwise:
            owner.groups = smaller.shape[0] * owner.in_channels // owner.out_channels
        owner.out_channels, owner.in_channels = smaller.shape[0], smaller.shape[1] * owner.groups
    elif isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = smaller.shape
    elif isinstance(owner, nn.modules.batchnorm._NormBase):
        owner.num_features = smaller.shape[0]
