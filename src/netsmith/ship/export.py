"""The file that ships: batch norm folded, one self-contained ONNX file with a free batch, checked, written whole."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from netsmith import architecture as architectures
from netsmith.blocks.mobile import ConvBn
from netsmith.cost.counts import Shape, shipped
from netsmith.cost.int8 import in_int8, mark_int8
from netsmith.decisions import Option, decisions
from netsmith.errors import UserError
from netsmith.run import atomically

if TYPE_CHECKING:
    import onnx

    from netsmith.tasks.classification import Task

OPSET = 20
CALIBRATION = 128
"""Images that show the ranges of an int8 file (ours)."""
LARGEST = 2**31 - 1
"""Bytes; protobuf holds no more in one file."""


def fold(network: nn.Module) -> nn.Module:
    """A copy in eval mode with every part that folds itself (it has ``folded()``) replaced by what it folds into, and
    every batch norm that directly follows a convolution folded into that.

    The structure stays: a folded norm is an `nn.Identity` in its place. Pairs are found by tracing the network, or,
    where it cannot be traced, inside our `ConvBn`; a norm without such a pair stays as it is.
    """
    copied = copy.deepcopy(shipped(network)).eval()
    for conv, norm in _pairs(copied):
        _absorb(conv, norm)
        # By identity, not by name: a module may be known under several names, and any of them may be the one called.
        for module in list(copied.modules()):
            for name, child in list(module._modules.items()):
                if child is norm:
                    module._modules[name] = nn.Identity()
    return copied


def export(
    network: nn.Module,
    input_shape: Shape,
    path: Path,
    *,
    dynamic_batch: bool = True,
    architecture: Mapping[str, Option] | None = None,
    task: Task | None = None,
    images: Tensor | None = None,
) -> Path:
    """Write ``network`` as an ONNX file (fp32, batch norm folded, input "image", output "logits"); returns ``path``.

    Layers that ship in int8 (`blocks.quantized.int8`) are in int8 in the file, with what lies between them.

    Args:
        input_shape: (channels, height, width).
        path: replaced whole or not at all.
        architecture, task: go into the metadata (`read_metadata`), so that whoever finds the file alone can use it.
        images: ``(n, channels, height, width)``, normalised, which show the range of what lies between int8 layers;
            by default training images of ``task``.

    Raises: UserError where decisions are open, a weight is NaN or infinite, the network cannot be exported (with
    ``dynamic_batch``: perhaps because its forward fixes the batch), or the file would exceed 2 GB; for int8 layers
    where neither ``images`` nor ``task`` is given, and what `cost.int8.in_int8` raises.
    """
    if open_ := list(decisions(network)):
        raise UserError(f"only a derived network can be exported; this one leaves {open_[0]!r} open")
    plain = mark_int8(network)
    check_finite(plain)
    if plain is not network and images is None:
        if task is None:
            raise UserError("a network with int8 layers is exported with images of its task, or with the task itself")
        images = calibration_images(task)
    plain = fold(plain).cpu().float()
    check_finite(plain)
    if sum(tensor.nbytes for tensor in plain.state_dict().values()) > LARGEST:
        raise UserError(f"{path}: an ONNX file holds 2 GB, and these weights are larger")
    proto = _proto(plain, input_shape, dynamic_batch)
    _strip(proto)
    proto = in_int8(proto, images)
    for key, value in _metadata(input_shape, architecture, task).items():
        proto.metadata_props.add(key=key, value=value)
    return _write(proto, path)


def calibration_images(task: Task) -> Tensor:
    """Some training images, always the same: ``(n, channels, height, width)``, normalised."""
    images, _ = next(iter(task.batches("train", CALIBRATION, train=True, augmented=False)))
    return images


def read_metadata(path: Path) -> dict[str, str]:
    """What `export` wrote beside the graph: version, input, architecture, class names, mean and std (JSON texts)."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def check_finite(network: nn.Module) -> None:
    """Raises: UserError naming the first parameter or buffer with a NaN or infinite value."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            bad = int((~finite).sum())
            raise UserError(f"{name!r} holds {bad} NaN or infinite values of {tensor.numel()}: nothing is exported")


def norms_of(network: nn.Module) -> dict[str, str]:
    """Convolution -> the batch norm that alone reads its output, by their paths."""
    names = {module: path for path, module in network.named_modules()}
    return {names[conv]: names[norm] for conv, norm in _pairs(network)}


def _pairs(network: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, the batch norm that alone reads its output); each runs once in a pass."""
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:  # tracing can fail in as many ways as Python can: then only what we built ourselves is known
        return [(m.conv, m.bn) for m in network.modules() if isinstance(m, ConvBn) and _foldable(m.conv, m.bn)]
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    count = Counter(id(modules[str(node.target)]) for node in calls)
    found = []
    for node in calls:
        source = node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        if count[id(conv)] == count[id(norm)] == 1 and _foldable(conv, norm):
            found.append((conv, norm))
    return found


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    # Exact types: a subclass may do more in its forward (timm's BatchNormAct2d applies an activation).
    return type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_mean is not None


@torch.no_grad()
def _absorb(conv: nn.Module, norm: nn.Module) -> None:
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(), double(conv.bias), norm.running_mean.double(), norm.running_var.double(), norm.eps,
        double(norm.weight), double(norm.bias),
    )  # fmt: skip
    layout = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else None
    kept = weight.to(conv.weight.dtype)
    conv.weight = nn.Parameter(kept if layout is None else kept.contiguous(memory_format=layout))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def _proto(network: nn.Module, input_shape: Shape, dynamic_batch: bool) -> onnx.ModelProto:
    # Two images: torch.export takes a batch of one for a constant.
    example = torch.zeros(2 if dynamic_batch else 1, *input_shape)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        cause = _innermost(error)
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        raise _not_exported(network, reason, dynamic_batch) from error
    assert program is not None
    proto = program.model_proto
    # A forward that fixes the batch does not fail, it is exported with the example's two images built in.
    if dynamic_batch and not all(_batch(value) for value in (*proto.graph.input, *proto.graph.output)):
        raise _not_exported(network, "its output does not follow the batch of its input", dynamic_batch)
    return proto


def _batch(value: onnx.ValueInfoProto) -> str:
    """The name of a free batch dimension; empty where it is a number."""
    return value.type.tensor_type.shape.dim[0].dim_param


def _not_exported(network: nn.Module, reason: str, dynamic_batch: bool) -> UserError:
    hint = "; a forward that fixes the batch needs dynamic_batch=False" if dynamic_batch else ""
    return UserError(f"{type(network).__name__} cannot be exported to ONNX: {reason}{hint}")


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, logs and warns about its own internals; none of it helps whoever asked for a file."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(proto: onnx.ModelProto) -> None:
    """Take out the exporter's notes on every node: stack traces with this machine's paths, 5 % of a small file."""
    graph = proto.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.ClearField("doc_string")


def _metadata(input_shape: Shape, architecture: Mapping[str, Option] | None, task: Task | None) -> dict[str, str]:
    notes = {"netsmith_version": version("netsmith"), "input": f"float32 (batch, {', '.join(map(str, input_shape))})"}
    if architecture is not None:
        notes["architecture"] = architectures.dumps(architecture)
    if task is not None:
        notes["class_names"] = json.dumps(task.class_names)
        notes["normalisation"] = "(pixel / 255 - mean) / std, per channel"
        notes["mean"], notes["std"] = json.dumps(task.mean), json.dumps(task.std)
    return notes


def _write(proto: onnx.ModelProto, path: Path) -> Path:
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return path
