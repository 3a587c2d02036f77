"""Folding changes nothing but the speed; the exported file is PyTorch's network for any batch and nothing more."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from netsmith.blocks.collapsible import Collapsible, LinearBlock
from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv, SqueezeExcite
from netsmith.blocks.reparam import KINDS, Branches
from netsmith.decisions import OneOf, Width, derive
from netsmith.errors import UserError
from netsmith.ship.export import export, fold, read_metadata

SHAPE = (8, 9, 9)
BLOCKS = {
    "conv": lambda: ConvBn(8, 12, 3, stride=2),
    "grouped": lambda: ConvBn(8, 12, 3, groups=4, act="swish"),
    "depthwise": lambda: ConvBn(8, 8, 5, groups=8, act="relu6"),
    "mbconv": lambda: MBConv(8, 8, hidden=24, kernel=5),
    "mbconv_no_expand": lambda: MBConv(8, 12, hidden=8, expand=False, act="hardswish"),
    "mbconv_shuffle": lambda: MBConv(8, 12, hidden=24, groups=4, stride=2),
    "mbconv_se": lambda: MBConv(8, 8, hidden=24, squeeze=4, act="swish"),
    "mbconv_se_hard": lambda: MBConv(8, 8, hidden=24, squeeze=8, gate="hard", act="hardswish", drop_path=0.2),
    "fused": lambda: FusedMBConv(8, 8, hidden=24),
    "fused_se": lambda: FusedMBConv(8, 12, hidden=24, squeeze=4, stride=2),
    "derived_width": lambda: derive(MBConv(8, 8, hidden=Width((8, 16, 24)), squeeze=4), {"hidden": 16}),
    "squeeze": lambda: SqueezeExcite(8, 4),
    "head": lambda: Head(8, 16, 5, dropout=0.2),
    "branches": lambda: derive(Branches(8, 8, groups=2), dict.fromkeys(KINDS, "on")),
    "branches_stride": lambda: derive(Branches(8, 8, stride=2, act="swish"), dict.fromkeys(KINDS, "on")),
    "linear": lambda: LinearBlock(8, 8, hidden=24, order="1x1_kxk_1x1", skip=True),
    "collapsed": lambda: Collapsible(MBConv(8, 8, hidden=24), front=False, gate=0.0),
    "collapsed_front": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Collapsible(MBConv(8, 12, hidden=24), gate=0.0)),
}


def settled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: every statistic and scale away from its initial value, some scales negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            ranges = {"weight": (-1.5, 1.5), "bias": (-1, 1), "running_mean": (-1, 1), "running_var": (0.1, 3)}
            for name, (low, high) in ranges.items():
                getattr(module, name).data.uniform_(low, high, generator=generator)
    return network


def images(batch: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def small() -> nn.Module:
    """One of each block type, so that the slow exporter runs once."""
    torch.manual_seed(0)
    widths = {"conv": 12, "mbconv_no_expand": 12, "mbconv_shuffle": 12, "fused_se": 12, "collapsed_front": 12}
    parts: dict[str, nn.Module] = {}
    for name, build in BLOCKS.items():
        if name in ("head", "grouped"):
            continue
        parts[name] = build()
        if name in widths:
            parts[f"{name}_back"] = ConvBn(12, 8, act="none")
    parts["head"] = Head(8, 16, 5, dropout=0.2)
    network = nn.Sequential()
    for name, part in parts.items():
        network.add_module(name, part)
    return settled(network).eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return small()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("ship") / "model.onnx"
    return export(network, (8, 32, 32), path, architecture={"body": "b", "hidden": 16})


def run(file, batch: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": batch.numpy()})[0])


# fold -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("block", BLOCKS)
def test_folding_a_block_is_exact(block, dtype, tolerance):
    torch.manual_seed(0)
    network = settled(BLOCKS[block]()).to(dtype).train()
    before = copy.deepcopy(network.state_dict())
    folded = fold(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not folded.training
    x = images(3).to(dtype)
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.state_dict().keys() == before.keys()


class Doubling(nn.Module):
    """Says itself what it folds into, and that has a batch norm which folds further."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBn(8, 8, 3, act="none")

    def forward(self, x):
        return 2 * self.conv(x)

    def folded(self):
        doubled = copy.deepcopy(self.conv)
        doubled.bn.weight.data *= 2
        doubled.bn.bias.data *= 2
        return doubled


def test_what_folds_itself_is_replaced_before_the_norms_fold():
    network = settled(nn.Sequential(Doubling(), nn.ReLU())).eval()
    folded = fold(network)
    assert isinstance(folded[0], ConvBn)
    assert isinstance(folded[0].bn, nn.Identity)
    assert isinstance(network[0], Doubling)
    torch.testing.assert_close(folded(images(2)), network(images(2)), rtol=1e-5, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.free, self.norm = ConvBn(8, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        if x.mean() > 1e9:
            raise ValueError
        return self.norm(self.free(self.conv(x)))


def test_an_untraceable_network_folds_what_is_known():
    network = settled(Untraceable()).eval()
    folded = fold(network)
    assert isinstance(folded.conv.bn, nn.Identity)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images(2)), network(images(2)), rtol=1e-5, atol=1e-5)


class Awkward(nn.Module):
    """What must not be folded: an output read twice, a convolution shared by two norms; and a norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm_a = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shared, self.norm_b, self.norm_c = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.alias, self.norm_d = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.other, self.again = self.alias, self.norm_d

    def forward(self, x):
        y = self.twice(x)
        x = y + self.norm_a(y)
        x = self.norm_c(self.shared(self.norm_b(self.shared(x))))
        return self.again(self.other(x))


def test_what_cannot_be_folded_stays_and_aliases_are_followed():
    network = Awkward()
    with torch.no_grad():
        for norm in (network.norm_a, network.norm_b, network.norm_c, network.norm_d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    folded = fold(network.eval())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 3
    torch.testing.assert_close(folded(images(2)), network(images(2)), rtol=1e-5, atol=1e-5)


# export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7])
def test_the_file_is_the_network(network, file, batch):
    x = images(batch, (8, 32, 32))
    with torch.no_grad():
        expected = network(x)
    np.testing.assert_allclose(run(file, x), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_file_is_one_checked_file_without_the_exporters_notes(file):
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b"/work" not in file.read_bytes()
    assert b".py" not in file.read_bytes()
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert file.stat().st_size - weights < 300 * len(model.graph.node) + 3000
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_the_file_says_what_it_is(file):
    notes = read_metadata(file)
    assert json.loads(notes["architecture"]) == {"body": "b", "hidden": 16}
    assert notes["input"] == "float32 (batch, 8, 32, 32)"
    assert notes["netsmith_version"]


def test_task_metadata_fixed_batch_same_bytes_and_silence(tmp_path, capfd, recwarn):
    from netsmith.tasks import open_task

    task = open_task("digits")
    network = nn.Sequential(ConvBn(1, 8, 3), Head(8, 8, 10)).eval()
    paths = [tmp_path / name / "model.onnx" for name in ("a", "b")]
    for path in paths:
        export(network, (1, 8, 8), path, dynamic_batch=False, task=task)
    out, err = capfd.readouterr()
    assert (out, err, len(recwarn)) == ("", "", 0)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    notes = read_metadata(paths[0])
    assert json.loads(notes["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(notes["mean"]) == pytest.approx(task.mean)
    assert json.loads(notes["std"]) == pytest.approx(task.std)
    assert onnx.load(paths[0]).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.conv.weight", "0.bn.running_var"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    network = nn.Sequential(ConvBn(8, 8, 3))
    network.state_dict()[name].view(-1)[0] = value
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*1 NaN or infinite"):
        export(network, SHAPE, path)
    assert path.read_bytes() == b"the old file"


def test_an_open_decision_is_refused(tmp_path):
    supernet = nn.Sequential(OneOf({"a": ConvBn(8, 8), "b": ConvBn(8, 8, 3)}))
    with pytest.raises(UserError, match=r"leaves '0' open"):
        export(supernet, SHAPE, tmp_path / "model.onnx")


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) + torch.ones(2, 1)


def test_a_network_that_cannot_be_exported_says_so(tmp_path):
    with pytest.raises(UserError, match=r"FixedBatch cannot be exported.*dynamic_batch=False"):
        export(FixedBatch(), SHAPE, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
