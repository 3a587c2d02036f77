"""A trained network on disk: `architecture.json`, `weights.safetensors`, and the `problem.yaml` of its run. No pickles.

RUN/problem.yaml          names the space: `space: fbnet_small`, `space_options: {classes: 10, ...}`
RUN/architecture.json     what was decided in it
RUN/weights.safetensors   the derived network's weights
RUN/latency-0.5x/...      the same two files for every point of a front, instead of those in RUN itself
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from netsmith import architecture as architectures
from netsmith.decisions import Architecture, Option, derive
from netsmith.errors import UserError
from netsmith.graph.features import Features, features
from netsmith.run import atomically, load_yaml
from netsmith.spaces import open_space

ARCHITECTURE = "architecture.json"
WEIGHTS = "weights.safetensors"
PROBLEM = "problem.yaml"


def save(folder: Path, network: nn.Module, architecture: dict[str, Option]) -> None:
    """Write a derived network into ``folder``, made if need be; its weights are kept bit for bit.

    The space is not written: it stands in the run's `problem.yaml`, in ``folder`` or up to two folders above.
    """
    from safetensors.torch import save as serialised

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    with atomically(folder / WEIGHTS) as temporary:
        temporary.write_bytes(serialised(tensors))
    with atomically(folder / ARCHITECTURE) as temporary:
        temporary.write_text(architectures.dumps(architecture) + "\n")


def load(folder: Path) -> nn.Module:
    """The network that `save` wrote, as a plain module in eval mode on the CPU.

    Raises: UserError where the folder holds no network or a front of several, or naming the file that is missing,
    damaged, or does not fit the others.
    """
    if not (folder / ARCHITECTURE).is_file():
        raise _none_here(folder)
    space, options, problem = space_of(folder)
    architecture = architecture_of(folder / ARCHITECTURE)
    found = tensors(folder / WEIGHTS)
    network = _derived(space, options, architecture, folder / ARCHITECTURE, problem, "meta")
    if _hidden_buffers(network):  # what no file holds has to be computed, so the whole space is really built
        network = _derived(space, options, architecture, folder / ARCHITECTURE, problem, "cpu")
    fit(network, found, f"{folder / WEIGHTS} does not fit {ARCHITECTURE}")
    network.load_state_dict(found, strict=True, assign=True)
    return network.eval()


def load_features(folder: Path) -> Features:
    """The network that `save` wrote without its head, giving its feature maps: see `netsmith.graph.features`.

    Raises: UserError, as `load` does, and where a network has no maps to give out.
    """
    network = load(folder)
    _, options, problem = space_of(folder)
    channels, resolution = options.get("channels"), options.get("resolution")
    if not isinstance(channels, int) or not isinstance(resolution, int):
        raise UserError(f"{problem}: `space_options` lacks channels and resolution, which its maps are found by")
    return features(network, (channels, resolution, resolution))


def points(folder: Path) -> list[Path]:
    """The subfolders of a run that hold the networks of its front, in the order of their names."""
    return sorted(path.parent for path in folder.glob(f"*/{ARCHITECTURE}"))


def _none_here(folder: Path) -> UserError:
    if front := points(folder):
        return UserError(f"{folder} holds a front of {len(front)}; load one of: {', '.join(map(str, front))}")
    if not folder.is_dir():
        return UserError(f"{folder} is no folder; a run's folder, or a point of its front, is needed")
    return UserError(f"{folder} holds no finished network: it has no {ARCHITECTURE}")


def space_of(folder: Path) -> tuple[str, dict[str, Any], Path]:
    """The space's name and options, and the file they stand in."""
    # A point lies in its run, the networks it was compared with one folder deeper.
    found = [path for place in (folder, *folder.resolve().parents[:2]) if (path := place / PROBLEM).is_file()]
    if not found:
        raise UserError(f"{folder / PROBLEM} is missing: it names the space that {ARCHITECTURE} belongs to")
    try:
        problem = load_yaml(found[0].read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{found[0]} cannot be read as YAML") from None
    space = problem.get("space") if isinstance(problem, dict) else None
    options = problem.get("space_options") or {} if isinstance(problem, dict) else {}
    if not isinstance(space, str) or not isinstance(options, dict):
        raise UserError(f"{found[0]} names no space: `space` is a name and `space_options` a mapping")
    return space, options, found[0]


def architecture_of(file: Path) -> Architecture:
    """What an `architecture.json` holds. Raises: UserError naming the file."""
    try:
        return architectures.loads(file.read_text("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds. Raises: UserError naming the file that is missing or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        return load_file(file)
    except (SafetensorError, KeyError) as error:  # KeyError: a number type that torch does not have
        raise UserError(f"{file} is damaged or no safetensors file ({error})") from None


def _derived(
    space: str, options: dict[str, Any], architecture: Architecture, file: Path, problem: Path, device: str
) -> nn.Module:
    try:
        with torch.device(device):  # on "meta" a space costs no memory and draws no random numbers, however big
            supernet = open_space(space, **options)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{problem}: {error}") from error
    try:
        architectures.check(supernet, architecture)
        return derive(supernet, architecture)
    except UserError as error:
        raise UserError(f"{file} does not fit the space {space!r} of {problem}: {error}") from None


def _hidden_buffers(network: nn.Module) -> bool:
    """Whether there are buffers that a state dict leaves out."""
    return any(module._non_persistent_buffers_set for module in network.modules())


def fit(network: nn.Module, tensors: Mapping[str, Tensor], sentence: str) -> None:
    """Raises: UserError naming the first tensor that is missing, of another shape, or too many; ``sentence`` begins
    it."""
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name not in tensors:
            raise UserError(f"{sentence}: {name!r} is missing")
        if tensors[name].shape != tensor.shape:
            given, needed = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{sentence}: {name!r} has shape {given}, not {needed}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{sentence}: the network has no {extra[0]!r}")
