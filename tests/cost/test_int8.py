"""The int8 file is the fake-quantised network: the same layers, ranges and answers, and nothing else in int8."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from netsmith.blocks.quantized import Int8, QuantConv2d, QuantLinear, calibrate, in_fp32, int8, is_int8
from netsmith.blocks.quantizers import span
from netsmith.cost.bits import QuantizedFileBytes
from netsmith.cost.counts import FileBytes
from netsmith.cost.device import OrtCpu, TorchCpu, cheap_onnx
from netsmith.cost.int8 import mark_int8
from netsmith.cost.memory import PeakMemory
from netsmith.errors import UserError
from netsmith.ship.export import export

SHAPE = (3, 12, 12)
NAMES = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.FLOAT: "fp32"}


class Residual(nn.Module):
    """Two convolutions with a sum around the second, a lone one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.third, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (x + self.norm2(self.second(x))).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


LAYERS = ("first", "second", "third", "head")


def images(count: int = 24) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))


def network(*layers: str, shown: bool = True) -> nn.Module:
    """`Residual` with these layers in int8, whose ranges have been ``shown``."""
    torch.manual_seed(0)
    made = Residual()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)  # folding a negative scale turns the weights' signs
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.1, 3)
    for path in layers:
        made.set_submodule(path, int8(made.get_submodule(path)))  # pyright: ignore[reportArgumentType]
    if shown:
        calibrate(made, images)
    return made.eval()


def answers(model: onnx.ModelProto | bytes, x: Tensor) -> np.ndarray:
    text = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(text)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def weights_of(model: onnx.ModelProto) -> dict[str, str]:
    """Layer -> the type its weight is kept in."""
    kept = [t for t in model.graph.initializer if ".weight" in t.name and len(t.dims) > 1]
    return {t.name.split(".")[0]: NAMES[t.data_type] for t in kept}


@pytest.mark.parametrize("chosen", [LAYERS, ("first", "second"), ("second", "head"), ("third",)], ids="+".join)
def test_the_file_is_the_fake_quantised_network(chosen, tmp_path):
    made, x = network(*chosen), images()
    file = onnx.load(export(made, SHAPE, tmp_path / "it.onnx", images=images()))
    assert weights_of(file) == {path: "int8" if path in chosen else "fp32" for path in LAYERS}
    assert {"QuantizeLinear", "DequantizeLinear"} < {node.op_type for node in file.graph.node}
    assert not [node for node in file.graph.node if node.domain == "netsmith"]
    with torch.no_grad():
        ours, plain = made(x).numpy(), network()(x).numpy()
    theirs = answers(file, x)
    assert np.abs(theirs - ours).max() < 0.01 * np.abs(ours).max()  # what lies between layers is rounded in the file
    assert np.abs(ours - plain).max() > 1e-4 * np.abs(plain).max()  # and int8 is something else than fp32


def test_a_lone_layer_is_the_same_to_a_step_of_its_output(tmp_path):
    made = nn.Sequential(int8(nn.Conv2d(3, 8, 3)))
    calibrate(made, images)
    file = onnx.load(export(made, SHAPE, tmp_path / "it.onnx", images=images()))
    scale = {t.name: t for t in file.graph.initializer}["logits_scale"]
    step = float(onnx.numpy_helper.to_array(scale))
    with torch.no_grad():
        assert np.abs(answers(file, images()) - made(images()).numpy()).max() <= 0.51 * step


def test_sums_of_large_products_do_not_overflow(tmp_path):
    # The largest weights on the largest inputs: on a processor without VNNI two such products are added in 16 bits.
    layer, x = nn.Conv2d(16, 4, 3, bias=False), torch.ones(2, 16, 6, 6)
    nn.init.ones_(layer.weight)
    file = export(nn.Sequential(int8(layer)), (16, 6, 6), tmp_path / "it.onnx", images=x)
    assert answers(onnx.load(file), x) == pytest.approx(np.full((2, 4, 4, 4), 144.0), rel=1e-2)


def test_what_lies_between_int8_layers_is_in_int8_and_the_rest_is_not(tmp_path):
    def read_in_int8(*chosen: str) -> set[str]:
        """The operators all of whose inputs come from a DequantizeLinear."""
        model = onnx.load(export(network(*chosen), SHAPE, tmp_path / "it.onnx", images=images()))
        made = {tensor for node in model.graph.node if node.op_type == "DequantizeLinear" for tensor in node.output}
        return {n.op_type for n in model.graph.node if n.input and set(n.input) <= made} - {"QuantizeLinear"}

    assert read_in_int8(*LAYERS) == {"Conv", "Gemm", "Add"}
    assert read_in_int8("first", "third") == {"Conv"}  # one side of the sum is fp32, so the sum is


def test_the_range_is_the_networks_own(tmp_path):
    made = network("first")
    made.first.input_quantizer.high.fill_(9.0)  # pyright: ignore
    made.first.input_quantizer.low.fill_(-6.3)  # pyright: ignore
    file = onnx.load(export(made, SHAPE, tmp_path / "it.onnx", images=images()))
    (scale,) = [onnx.numpy_helper.to_array(t) for t in file.graph.initializer if t.name == "image_scale"]
    assert float(scale) == pytest.approx(15.3 / 255)


def test_both_exporters_make_the_same(tmp_path):
    made = network("first", "second", shown=False)
    cheap = onnx.load_from_string(cheap_onnx(made, SHAPE))
    thorough = onnx.load(export(made, SHAPE, tmp_path / "it.onnx", images=images()))
    kinds = [sorted(node.op_type for node in model.graph.node) for model in (cheap, thorough)]
    assert kinds[0] == kinds[1]


def test_int8_is_smaller_and_counted_so(tmp_path):
    made = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(6400, 10))
    plain = export(made, (64, 12, 12), tmp_path / "plain.onnx")
    for path in ("0", "2"):
        made.set_submodule(path, int8(made.get_submodule(path)))  # pyright: ignore[reportArgumentType]
    file = export(made, (64, 12, 12), tmp_path / "int8.onnx", images=torch.randn(4, 64, 12, 12))
    assert file.stat().st_size < 0.3 * plain.stat().st_size
    counted = QuantizedFileBytes()(made, (64, 12, 12))
    assert counted < 0.3 * FileBytes()(made, (64, 12, 12))
    assert file.stat().st_size == pytest.approx(counted, rel=0.1)


def test_activations_count_as_in_fp32():
    assert PeakMemory()(network(*LAYERS), SHAPE) == PeakMemory()(network(), SHAPE)


# Ranges ------------------------------------------------------------------------------------------------------------


def test_calibrating_shows_smallest_and_largest_inputs_in_fp32():
    made, x = network(*LAYERS, shown=False), images(70)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    seen: dict[str, Tensor] = {}
    plain = network()
    plain.third.register_forward_pre_hook(lambda _, inputs: seen.update(third=inputs[0]))  # pyright: ignore
    with torch.no_grad():
        plain(x)
    calibrate(made.train(), lambda: x)
    assert made.training
    assert (made.third.input_quantizer.low, made.third.input_quantizer.high) == span(seen["third"])  # pyright: ignore
    assert made.first.input_quantizer.high == x.max()  # pyright: ignore[reportAttributeAccessIssue]
    for name, tensor in made.state_dict().items():
        assert name.endswith((".low", ".high")) or torch.equal(tensor, before[name])

    def none() -> Tensor:
        raise AssertionError("no layer needs them")

    calibrate(made, none)  # ranges that are there stay
    calibrate(network(), none)


def test_weights_keep_within_seven_bits_and_fold_with_a_norm():
    weight = torch.randn(6, 4, 3, 3)
    codes = Int8()(weight) / weight.abs().amax((1, 2, 3), keepdim=True) * 64
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert codes.abs().max() <= 64.00001
    factor = torch.tensor([2.0, -0.5, 4.0, 1.0, -1.0, 0.25]).view(-1, 1, 1, 1)
    assert torch.equal(Int8()(weight * factor), Int8()(weight) * factor)
    assert torch.equal(Int8()(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_marks_leave_the_network_as_it_is():
    made = network("first", "head")
    marked = mark_int8(made)
    assert is_int8(made.first)
    assert isinstance(made.head, QuantLinear)
    assert not [part for part in marked.modules() if isinstance(part, QuantConv2d | QuantLinear)]
    assert mark_int8(plain := network()) is plain
    assert in_fp32(plain) is plain
    with torch.no_grad():
        assert torch.equal(in_fp32(made)(images()), plain(images()))


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(4, 3, 10, 12), r"the calibration images are \(4, 3, 10, 12\) .* \(n, 3, 12, 12\)"),
        (torch.zeros(0, *SHAPE), r"the calibration images are \(0, 3, 12, 12\)"),
        (torch.zeros(4, *SHAPE, dtype=torch.uint8), "of torch.uint8"),
        (None, "exported with images of its task"),
    ],
)
def test_calibration_images_that_do_not_fit_are_named(given, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export(network("first"), SHAPE, tmp_path / "it.onnx", images=given)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_int8_is_named():
    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = int8(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    with pytest.raises(UserError, match="a layer marked int8 is a Pad in ONNX"):
        export(Twisted(), SHAPE, "nowhere.onnx", images=images())  # pyright: ignore[reportArgumentType]


def test_pytorch_devices_have_no_int8_layers():
    with pytest.raises(UserError, match="torch-cpu has no int8 layers; ort-cpu has"):
        TorchCpu().load(network("first"), SHAPE)
    assert OrtCpu().load(network("first"), SHAPE)() is None


def test_a_range_that_was_never_shown_is_taken_from_the_images(tmp_path):
    made = network("first", shown=False)
    assert math.isnan(made.first.input_quantizer.low)  # pyright: ignore
    file = onnx.load(export(made, SHAPE, tmp_path / "it.onnx", images=images()))
    assert np.isfinite(answers(file, images())).all()
