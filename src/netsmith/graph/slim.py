"""A network without some of its channels: smaller tensors in a copy, everything else as it was."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from netsmith.errors import UserError
from netsmith.graph.channels import Channels, Group, channels

HEADS = {
    "num_heads", "heads", "n_heads", "num_attention_heads",
    "attn_dim", "attention_dim", "val_attn_dim", "inner_dim", "all_head_size",
}  # fmt: skip
"""What modules call the number of their heads, and the length of all heads together: these shrink with the heads."""


def slim(network: nn.Module, groups: Mapping[str, Group], keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which of each group named in ``keep`` only those channels exist: indices ``(kept,)``, in any order.
    What the layers, and the modules of a group's `heads`, count in attributes follows.

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
        for owner in map(slimmed.get_submodule, groups[name].heads):
            for number in HEADS & vars(owner).keys():
                setattr(owner, number, getattr(owner, number) * (len(gone) - int(gone.sum())) // len(gone))
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

    Each is tried without half of its channels, on the meta device. Without half of the heads the code may run and mean
    something else, as shorter heads: so what is left is traced again, and has to have the same groups, half as large.
    """
    with torch.device("meta"):
        shadow = copy.deepcopy(network).to("meta").eval()
    halves = {name: torch.arange((group.size + 1) // 2) for name, group in found.groups.items()}
    image = torch.empty(2, *shape, device="meta", dtype=next(shadow.parameters()).dtype)
    whole = functools.cache(lambda: shadow(image).shape)
    heads, others = ({n: h for n, h in halves.items() if bool(found.groups[n].heads) is kind} for kind in (True, False))
    failures = dict.fromkeys(halves, "")
    for some in (heads, others):
        if some and _failure(shadow, found.groups, some, image, whole):
            failures |= {n: _failure(shadow, found.groups, {n: half}, image, whole) for n, half in some.items()}
    if heads := {name: half for name, half in heads.items() if not failures[name]}:
        failures |= _misread(shadow, found, heads, shape)
    groups = {name: group for name, group in found.groups.items() if not failures[name]}
    return replace(found, groups=groups, closed=found.closed | {name: why for name, why in failures.items() if why})


def _misread(
    shadow: nn.Module, found: Channels, keep: Mapping[str, Tensor], shape: tuple[int, int, int]
) -> dict[str, str]:
    """Of groups that are heads, those that the network does not have, at this size, without the others of them."""
    try:
        again = channels(slim(shadow, found.groups, keep), shape)
    except UserError as error:
        return dict.fromkeys(keep, f"without some of them: {error}")
    if again.constants != found.constants:
        return dict.fromkeys(keep, "without some of them the network computes with other numbers")
    wrong = {}
    for name, kept in keep.items():
        group, left = found.groups[name], again.groups.get(name)
        uses = [[(*use[:3], use.positions.shape[1]) for use in each.uses] for each in (group, left) if each]
        if left is None and len(kept) == 1:  # what is done to all of the one head may have closed it
            continue
        if left is None or left.size != len(kept) or uses[0] != uses[1]:
            wrong[name] = "without some of them the code makes other heads"
    return wrong


def _failure(
    shadow: nn.Module,
    groups: Mapping[str, Group],
    keep: Mapping[str, Tensor],
    image: Tensor,
    whole: Callable[[], torch.Size],
) -> str:
    """What the network without these channels says when it runs; empty where its output has the shape of the whole."""
    try:
        with torch.no_grad():
            before, after = whole(), slim(shadow, groups, keep)(image).shape
    except Exception as error:  # whatever the network's own code raises
        return f"without some of them: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    return "" if after == before else f"without some of them the output is {tuple(after)}"


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
