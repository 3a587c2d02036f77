"""Run a module once and write down the aten calls: a flat program with batch norm folded, to be replayed or turned
into ONNX.

Symbolic tracing stumbles over `b, c, h, w = x.shape`; recording real calls (torch's dispatch mode) takes any Python.
What does not depend on the input (sliced or quantised weights) is computed while recording and becomes a constant.
With an example without numbers (on the meta device) only shapes are computed of what depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BATCH_NORMS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")


@dataclass(frozen=True)
class Slot:
    """A value that depends on the input: its place in the program's memory."""

    index: int


@dataclass
class Call:
    """One aten call; `arguments` and `outputs` hold a `Slot` where a live tensor stands."""

    target: Any
    arguments: list[Any]
    options: dict[str, Any]
    outputs: list[Slot]
    shapes: list[tuple[int, ...]]

    @property
    def name(self) -> str:
        """The operator without namespace and overload, "convolution"; in-place variants read like the others."""
        name = self.target._schema.name.split("::")[1]
        return name[:-1] if name.endswith("_") else name

    @property
    def inputs(self) -> list[Slot]:
        return [value for value in _leaves([self.arguments, self.options]) if isinstance(value, Slot)]


@dataclass
class Program:
    """Calls in order. Slot 0 is the input; `outputs` are what the module returned."""

    shapes: dict[Slot, tuple[int, ...]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    aliased_writes: bool = False
    """An in-place call hit a tensor that others see through views: fine to replay, wrong as a pure data flow."""


def record(module: nn.Module, example: Tensor) -> Program:
    """The program of `module.eval()(example)`, batch norm folded into the convolution before it. The module is left
    as it is.

    Errors: TypeError when the module does not return a tensor, or a tuple, list or dict of tensors, that depend on
    the input.
    """
    training = [part for part in module.modules() if part.training]
    recorder = _Recorder(example)
    try:
        module.eval()
        with torch.no_grad(), recorder:
            result = module(example)
    finally:
        for part in training:
            part.training = True
    program = recorder.program
    for value in _leaves(result):
        if not isinstance(value, Tensor) or id(value) not in recorder.slots:
            raise TypeError(
                f"{type(module).__name__} returned {type(value).__name__}, not a tensor computed from its input"
            )
        program.outputs.append(recorder.slots[id(value)])
    _fold_batch_norm(program)
    return program


def replay(program: Program, example: Tensor) -> Callable[[], list[Tensor]]:
    """A function that runs the program on `example` with next to no Python between the kernels."""
    memory: list[Any] = [None] * (1 + max(slot.index for slot in program.shapes))
    memory[0] = example
    steps = []
    for call in program.calls:
        nested = any(isinstance(value, (list, tuple)) and _has_slot(value) for value in call.arguments) or _has_slot(
            call.options
        )
        steps.append((call.target, call.arguments, call.options, nested, [slot.index for slot in call.outputs]))
    results = [slot.index for slot in program.outputs]

    def run() -> list[Tensor]:
        for target, arguments, options, nested, outputs in steps:
            if nested:
                value = target(*_filled(arguments, memory), **_filled(options, memory))
            else:
                value = target(*[memory[a.index] if type(a) is Slot else a for a in arguments], **options)
            if isinstance(value, Tensor):
                memory[outputs[0]] = value
            else:
                for index, part in zip(outputs, value, strict=True):
                    memory[index] = part
        return [memory[index] for index in results]

    return run


class _Recorder(TorchDispatchMode):
    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.program = Program()
        self.slots: dict[int, Slot] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.storages: dict[int, set[int]] = {}
        self.new_slot(example)

    def new_slot(self, tensor: Tensor) -> Slot:
        slot = Slot(len(self.program.shapes))
        self.slots[id(tensor)] = slot
        self.alive.append(tensor)
        self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        self.program.shapes[slot] = tuple(tensor.shape)
        return slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        live = [v for v in _leaves([args, kwargs]) if isinstance(v, Tensor) and id(v) in self.slots]
        arguments, options = _marked(args, self.slots), _marked(kwargs, self.slots)
        if live and live[0].is_meta:
            result = _shapes_only(func, _on_meta(args), _on_meta(kwargs))
        else:
            result = func(*args, **kwargs)
        if live:
            parts = [result] if isinstance(result, Tensor) else list(result)
            if func._schema.is_mutable and len(self.storages[parts[0].untyped_storage()._cdata]) > 1:
                self.program.aliased_writes = True
            outputs = [self.new_slot(part) for part in parts]
            self.program.calls.append(
                Call(func, list(arguments), options, outputs, [tuple(part.shape) for part in parts])
            )
        return result


def _fold_batch_norm(program: Program) -> None:
    maker = {slot: call for call in program.calls for slot in call.outputs}
    uses = [slot for call in program.calls for slot in call.inputs] + program.outputs
    kept = []
    for call in program.calls:
        source = call.arguments[0] if call.name in BATCH_NORMS else None
        before = maker.get(source) if isinstance(source, Slot) else None
        if before is None or not _foldable(before, call) or uses.count(before.outputs[0]) != 1:
            kept.append(call)
            continue
        scale, shift, mean, variance = call.arguments[1:5]
        epsilon = call.arguments[-1] if call.name != "cudnn_batch_norm" else call.arguments[7]
        factor = torch.rsqrt(variance + epsilon)
        factor = factor if scale is None else factor * scale
        weight, bias = before.arguments[1], before.arguments[2]
        with torch.no_grad():
            offset = -mean * factor if bias is None else (bias - mean) * factor
            folded = weight * factor.reshape(-1, 1, 1, 1).to(weight.dtype)
            before.arguments[1] = folded.contiguous(memory_format=torch.channels_last) if _is_nhwc(weight) else folded
            before.arguments[2] = (offset if shift is None else offset + shift).to(weight.dtype)
        before.outputs = call.outputs[:1]
        maker[call.outputs[0]] = before
    program.calls = kept


def _foldable(before: Call, norm: Call) -> bool:
    """A plain 2-d convolution (a transposed one has its output channels elsewhere), and statistics that are fixed."""
    plain = before.name == "convolution" and not before.arguments[6] and isinstance(before.arguments[1], Tensor)
    fixed = norm.arguments[3] is not None and norm.arguments[5] is not True
    return plain and fixed and before.arguments[1].dim() == 4


def _is_nhwc(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (list, tuple)) else [value]


def _has_slot(value: Any) -> bool:
    return any(isinstance(leaf, Slot) for leaf in _leaves(value))


def _marked(value: Any, slots: dict[int, Slot]) -> Any:
    if isinstance(value, Tensor):
        return slots.get(id(value), value.detach())
    if isinstance(value, dict):
        return {name: _marked(part, slots) for name, part in value.items()}
    return [_marked(part, slots) for part in value] if isinstance(value, (list, tuple)) else value


def _shapes_only(func: Any, args: Any, options: dict[str, Any]) -> Any:
    if func._schema.name == "aten::native_batch_norm" and args[5] is False:
        # torch takes this one apart first, which was half of all the time of recording.
        return torch.empty_like(args[0]), torch.empty(0, device="meta"), torch.empty(0, device="meta")
    return func(*args, **options)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    return [_on_meta(part) for part in value] if isinstance(value, (list, tuple)) else value


def _filled(value: Any, memory: list[Any]) -> Any:
    if isinstance(value, Slot):
        return memory[value.index]
    if isinstance(value, dict):
        return {name: _filled(part, memory) for name, part in value.items()}
    return [_filled(part, memory) for part in value] if isinstance(value, list) else value
