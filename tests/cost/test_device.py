import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from netsmith.blocks.mobile import ConvBn, FusedMBConv, MBConv
from netsmith.cost.device import DEVICES, OrtCpu, TorchCpu, TorchCuda, _thorough_onnx, cheap_onnx, parse_device
from netsmith.cost.onnx_graph import Unsupported, onnx_model
from netsmith.cost.trace import record
from netsmith.errors import UserError


class Everything(nn.Module):
    """Operators that blocks use and the fixed layers do not cover."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.plain = nn.Linear(5, 5, bias=False)

    def forward(self, x):
        x = nn.functional.hardswish(self.norm(self.conv(x)), inplace=True)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = x.chunk(2, 1)
        x = torch.cat([nn.functional.silu(left), nn.functional.leaky_relu(right, 0.1)], 1)
        x = nn.functional.max_pool2d(x, 3, 2, 1) + nn.functional.avg_pool2d(x, 2)
        x = x * nn.functional.hardsigmoid(x.mean((2, 3), keepdim=True)) - 0.5 * nn.functional.gelu(x)
        x = nn.functional.interpolate(nn.functional.pad(x, (1, 0, 2, 1)), scale_factor=2.0)
        x = nn.functional.relu6(x[:, :, 1:]) / 2 + x.permute(0, 1, 3, 2).mean((2, 3), keepdim=True).clamp(0, 1)
        x = nn.functional.pixel_shuffle(x, 2).repeat_interleave(1, 1) if False else x
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(torch.tanh(x), 1), 1)
        return torch.softmax(self.plain(self.head(x)), 1)


MODULES = {
    "identity": lambda: nn.Identity(),
    "conv": lambda: ConvBn(8, 16, 3, stride=2),
    "mbconv": lambda: MBConv(8, 8, hidden=24, act="swish"),
    "squeeze": lambda: MBConv(8, 16, kernel=5, hidden=24, stride=2, squeeze=4, act="hardswish"),
    "shuffle": lambda: MBConv(8, 8, hidden=24, groups=2),
    "fused": lambda: FusedMBConv(8, 8, hidden=16),
    "everything": Everything,
    "norm alone": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
    "pixels": lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.PixelShuffle(2)),
    "by the exporter": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.ELU()),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 2.0)
    return module.eval()


@pytest.mark.parametrize("name", MODULES)
def test_runtimes_agree_with_pytorch(name: str):
    module, image = made(name), torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        expected = module(image.clone()).numpy()
    session = OrtCpu().session(cheap_onnx(module.train(), (8, 12, 12)))
    assert module.training
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0], expected, atol=1e-5)
    for device in (OrtCpu(), OrtCpu(threads=2), TorchCpu(), TorchCpu(channels_last=False)):
        if name != "by the exporter" or isinstance(device, TorchCpu):  # a second an export
            device.load(module, (8, 12, 12))()
    assert torch.is_grad_enabled()


def test_torch_replays_the_module():
    module = made("squeeze")
    image = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    from netsmith.cost.trace import replay

    with torch.no_grad():
        np.testing.assert_allclose(replay(record(module, image), image)()[0], module(image), atol=1e-5)
    names = [call.name for call in record(module, image).calls]
    assert not any("batch_norm" in name for name in names)
    TorchCpu(precision="bf16").load(module, (8, 12, 12))()


@pytest.mark.parametrize("name", ["mbconv", "squeeze", "shuffle"])
def test_cheap_graph_fuses_like_the_shipped_one(name: str, tmp_path: Path):
    module = made(name)
    kinds = []
    for source in (onnx_model(module, (8, 12, 12)), _thorough_onnx(module, (8, 12, 12))):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        kinds.append([node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node])
    assert kinds[0] == kinds[1]


def test_unknown_operator_is_named():
    with pytest.raises(Unsupported, match="elu"):
        onnx_model(made("by the exporter"), (8, 12, 12))


def test_a_mean_over_everything_is_left_to_the_exporter():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with pytest.raises(Unsupported, match="mean over all axes"):
        onnx_model(Mean(), (8, 4, 4))


def test_a_write_through_a_view_is_not_guessed():
    class Shared(nn.Module):
        def forward(self, x):
            x = x + 1
            torch.relu_(x[:, :4])
            return x

    with pytest.raises(Unsupported, match="view"):
        onnx_model(Shared(), (8, 4, 4))


def test_files_are_checked_and_run(tmp_path: Path):
    file = tmp_path / "model.onnx"
    module = made("conv")
    file.write_bytes(cheap_onnx(module, (8, 12, 12)))
    image = torch.randn(1, 8, 12, 12)
    OrtCpu().load(file, (8, 12, 12))()
    session = OrtCpu().session(file)
    with torch.no_grad():
        np.testing.assert_allclose(
            session.run(None, {session.get_inputs()[0].name: image.numpy()})[0], module(image), atol=1e-5
        )
    with pytest.raises(UserError, match=r"takes \[1, 8, 12, 12\], not \[1, 8, 16, 16\]"):
        OrtCpu().load(file, (8, 16, 16))
    with pytest.raises(UserError, match="no such file"):
        OrtCpu().load(tmp_path / "absent.onnx", (8, 12, 12))
    with pytest.raises(UserError, match="runs modules, not files"):
        TorchCpu().load(file, (8, 12, 12))


@pytest.mark.parametrize("element", ["FLOAT16", "UINT8"])
def test_a_file_that_takes_no_floats_is_named(element: str, tmp_path: Path):
    kind = getattr(onnx.TensorProto, element)
    x, y = (onnx.helper.make_tensor_value_info(name, kind, [1, 3, 4, 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    with pytest.raises(UserError, match=r"takes x tensor\(.*what is timed takes one image"):
        OrtCpu().load(tmp_path / "m.onnx", (3, 4, 4))


def test_a_file_with_two_inputs_is_named(tmp_path: Path):
    x, m, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 4, 4]) for name in "xmy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "m"], ["y"])], "g", [x, m], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    with pytest.raises(UserError, match=r"takes x tensor\(float\), m tensor\(float\)"):
        OrtCpu().load(tmp_path / "m.onnx", (3, 4, 4))


def test_fingerprints_tell_options_apart():
    prints = {OrtCpu().fingerprint(), OrtCpu(threads=2).fingerprint(), TorchCpu().fingerprint()}
    assert len(prints) == 3
    assert onnxruntime.__version__ in OrtCpu().fingerprint()


def test_devices_are_parsed():
    assert parse_device("ort-cpu") == OrtCpu()
    assert parse_device("ort-cpu:threads=2") == OrtCpu(threads=2)
    assert parse_device("torch-cpu:precision=bf16,channels_last=false") == TorchCpu(
        precision="bf16", channels_last=False
    )
    assert parse_device("torch-cuda:precision=fp16") == TorchCuda(precision="fp16")
    assert [parse_device(name).name for name in DEVICES] == list(DEVICES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ort-gpu", "unknown device 'ort-gpu'; did you mean 'ort-cpu'"),
        ("ort-cpu:thread=2", "did you mean 'threads'"),
        ("ort-cpu:threads=two", "whole number"),
        ("ort-cpu:threads=99999999999999999999", "from 1 to 1024"),
        ("torch-cuda:precision=fp8", "allowed: fp16, bf16, fp32"),
        ("torch-cpu:channels_last=maybe", "allowed: true, false"),
    ],
)
def test_wrong_devices_are_named(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_device(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_says_what_is_missing():
    with pytest.raises(UserError, match="torch-cuda needs"):
        TorchCuda().load(nn.Identity(), (3, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_cuda_runs(graphs: bool):
    TorchCuda(graphs=graphs).load(made("squeeze"), (8, 12, 12))()


def test_importing_a_device_loads_no_runtime():
    code = "import netsmith.cost.device, sys; print({'torch', 'onnxruntime', 'scipy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
