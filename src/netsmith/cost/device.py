"""A device is a runtime on this machine: what loads a network and runs one inference at batch 1.

`DEVICES` lists them; `parse_device("ort-cpu:threads=2")` makes one from the command line. torch and onnxruntime are
imported when a device is used, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from netsmith.cost.meter import cpu_name
from netsmith.errors import UserError, unknown

if TYPE_CHECKING:
    import onnxruntime
    from torch import nn

Shape = tuple[int, int, int]
"""(channels, height, width); the batch is 1."""


class Device(Protocol):
    """What a latency is measured on."""

    @property
    def name(self) -> str: ...
    def versions(self) -> dict[str, str]: ...
    def fingerprint(self) -> str: ...
    def load(self, model: nn.Module | Path, input_shape: Shape) -> Callable[[], object]: ...


@dataclass(frozen=True, kw_only=True)
class OrtCpu:
    """ONNX Runtime on the CPU, fp32: what the shipped file runs on."""

    threads: int = 1
    """Intra-operator threads; one operator at a time."""
    name = "ort-cpu"

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def fingerprint(self) -> str:
        """What a stored latency is valid for."""
        return _fingerprint(self, cpu_name())

    def session(self, model: Path | bytes) -> onnxruntime.InferenceSession:
        """A session with all graph optimisations, sequential, without spinning threads."""
        import onnxruntime

        if isinstance(model, Path) and not model.exists():
            raise UserError(f"no such file: {model}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if self.threads == 1 else "1")
        source = str(model) if isinstance(model, Path) else model
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def load(self, model: nn.Module | Path, input_shape: Shape) -> Callable[[], object]:
        """One inference at batch 1 on a fixed random input, buffers bound beforehand.

        `model`: an .onnx file, or a module, exported by the cheap route (or the thorough one where that knows not
        every operator). Errors: UserError for a file that is missing or takes another input.
        """
        import numpy as np
        import onnxruntime

        session = self.session(model if isinstance(model, Path) else cheap_onnx(model, input_shape))
        wanted, *others = session.get_inputs()
        if others or wanted.type != "tensor(float)":
            given = ", ".join(f"{part.name} {part.type}" for part in session.get_inputs())
            raise UserError(f"{model} takes {given}; what is timed takes one image, tensor(float)")
        shape = (1, *input_shape)
        if len(wanted.shape) != len(shape) or any(
            isinstance(w, int) and w != s for w, s in zip(wanted.shape, shape, strict=True)
        ):
            raise UserError(
                f"{model if isinstance(model, Path) else type(model).__name__} takes {wanted.shape}, not {list(shape)}"
            )
        image = np.resize(np.random.default_rng(0).standard_normal(4096, np.float32), shape)
        binding = session.io_binding()
        binding.bind_ortvalue_input(wanted.name, onnxruntime.OrtValue.ortvalue_from_numpy(image))
        for output, value in zip(session.get_outputs(), session.run(None, {wanted.name: image}), strict=True):
            binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(value)))
        return lambda: session.run_with_iobinding(binding)


@dataclass(frozen=True, kw_only=True)
class TorchCpu:
    """PyTorch's own kernels on the CPU, batch norm folded, without the Python of the modules around them."""

    threads: int = 1
    """torch.set_num_threads during each inference."""
    channels_last: bool = True
    """Memory layout NHWC."""
    precision: str = "fp32"
    """fp32 or bf16."""
    name = "torch-cpu"

    def __post_init__(self) -> None:
        _allowed("precision", self.precision, ("fp32", "bf16"))

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}

    def fingerprint(self) -> str:
        """What a stored latency is valid for."""
        return _fingerprint(self, cpu_name())

    def load(self, model: nn.Module | Path, input_shape: Shape) -> Callable[[], object]:
        """One inference at batch 1 on a fixed input. Errors: UserError for a file, which only ONNX Runtime can run."""
        import torch

        with torch_threads(self.threads):
            run = _replay(self, model, input_shape, "cpu")

        def inference() -> None:
            with torch_threads(self.threads), torch.inference_mode():
                run()

        return inference


@dataclass(frozen=True, kw_only=True)
class TorchCuda:
    """PyTorch on an NVIDIA GPU, batch norm folded; the time includes the wait for the GPU, and no transfer of
    images."""

    graphs: bool = True
    """Replay a CUDA graph: without it, batch 1 measures the launching of kernels."""
    channels_last: bool = True
    """Memory layout NHWC."""
    precision: str = "fp16"
    """fp16, bf16 or fp32."""
    name = "torch-cuda"

    def __post_init__(self) -> None:
        _allowed("precision", self.precision, ("fp16", "bf16", "fp32"))

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}

    def fingerprint(self) -> str:
        """What a stored latency is valid for. Errors: UserError without a GPU."""
        import torch

        self._check()
        return _fingerprint(self, torch.cuda.get_device_name())

    def _check(self) -> None:
        import torch

        if torch.version.cuda is None:
            raise UserError(f"torch-cuda needs a CUDA build of torch; {torch.__version__} is built without it")
        if not torch.cuda.is_available():
            raise UserError("torch-cuda needs an NVIDIA GPU with a driver, and this machine has none")

    def load(self, model: nn.Module | Path, input_shape: Shape) -> Callable[[], object]:
        """One inference at batch 1 on a fixed input, ended by a synchronisation. Errors: UserError without a GPU, or
        for a file."""
        import torch

        self._check()
        run = _replay(self, model, input_shape, "cuda")
        graph = None
        with torch.inference_mode():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                side
            ):  # libraries allocate and choose kernels in their first calls, which must not be captured
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            if self.graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()

        def inference() -> None:
            if graph is not None:
                graph.replay()
            else:
                with torch.inference_mode():
                    run()
            torch.cuda.synchronize()

        return inference


def load_shipped(device: Device, network: nn.Module, file: Path, input_shape: Shape) -> Callable[[], object]:
    """One inference of the exported file; on a device that runs no files, of the network that it was made from."""
    from netsmith.cost.counts import shipped

    return device.load(file if isinstance(device, OrtCpu) else shipped(network), input_shape)


DEVICES: dict[str, type[OrtCpu] | type[TorchCpu] | type[TorchCuda]] = {
    "ort-cpu": OrtCpu,
    "torch-cpu": TorchCpu,
    "torch-cuda": TorchCuda,
}


def parse_device(text: str) -> OrtCpu | TorchCpu | TorchCuda:
    """A device from its name and options: "ort-cpu", "ort-cpu:threads=2", "torch-cuda:precision=fp16,graphs=false".

    Errors: UserError naming what is not known, and what is.
    """
    name, _, rest = text.partition(":")
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    kind = DEVICES[name]
    known: dict[str, Any] = {field.name: field.default for field in fields(kind)}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        option, _, value = item.partition("=")
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        options[option] = _parsed(f"{name}:{option}", value, known[option])
    return kind(**options)


def _parsed(option: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        _allowed(option, value.lower(), ("true", "false"))
        return value.lower() == "true"
    if isinstance(default, int):
        if not value.isdecimal() or not 1 <= int(value) <= 1024:
            raise UserError(f"{option} must be a whole number from 1 to 1024, not {value!r}")
        return int(value)
    return value


def _allowed(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise unknown(option, value, allowed)


def _fingerprint(device: OrtCpu | TorchCpu | TorchCuda, machine: str) -> str:
    """One line: device, options, machine, versions."""
    options = ",".join(f"{field.name}={getattr(device, field.name)}" for field in fields(device))
    versions = " ".join(f"{name} {version}" for name, version in device.versions().items())
    return f"{device.name}:{options} | {machine} | {versions}"


def cheap_onnx(model: nn.Module, input_shape: Shape) -> bytes:
    """A serialised ONNX model with batch norm folded, about a millisecond; by torch's exporter (about a second) where
    an operator is unknown. Layers that ship in int8 are in int8 (about a second more for a whole network)."""
    import onnx

    from netsmith.cost.int8 import in_int8, mark_int8
    from netsmith.cost.onnx_graph import Unsupported, onnx_model

    marked = mark_int8(model)
    with torch_threads(1):
        try:
            made = onnx_model(marked, input_shape)
        except Unsupported:
            made = _thorough_onnx(marked, input_shape)
    return made if marked is model else in_int8(onnx.load_from_string(made)).SerializeToString()


def _thorough_onnx(model: nn.Module, input_shape: Shape) -> bytes:
    import copy
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            copy.deepcopy(model).eval(), (torch.zeros(1, *input_shape),), dynamo=True, verbose=False
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def _replay(
    device: TorchCpu | TorchCuda, model: nn.Module | Path, input_shape: Shape, where: str
) -> Callable[[], object]:
    import copy

    import torch

    from netsmith.blocks.quantized import is_int8
    from netsmith.cost.trace import record, replay

    if isinstance(model, Path):
        raise UserError(f"{device.name} runs modules, not files ({model}); measure the file on ort-cpu")
    if any(map(is_int8, model.modules())):
        raise UserError(f"{device.name} has no int8 layers; ort-cpu has")
    layout = torch.channels_last if device.channels_last else torch.contiguous_format
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[device.precision]
    copied = copy.deepcopy(model).to(device=where, dtype=dtype)
    copied = copied.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    image = image.to(device=where, dtype=dtype, memory_format=layout)
    return replay(record(copied, image), image)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch with so many threads, and as before afterwards. (One microsecond; two threads on a busy core can cost 100
    ms a call.)"""
    import torch

    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)
