"""The gate measures the file, touches the test split once, and its sentence says what was kept and what was broken."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.cost import meter
from netsmith.cost.budget import Budget
from netsmith.cost.device import OrtCpu, TorchCpu
from netsmith.cost.meter import Measurement
from netsmith.cost.table import TableDevice
from netsmith.errors import UserError
from netsmith.ship.export import export
from netsmith.ship.gate import gate
from netsmith.ship.layers import layers
from netsmith.tasks import open_task
from netsmith.train.loop import evaluate


@pytest.fixture(scope="module")
def task():
    return open_task("digits")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        ConvBn(1, 16, 3), nn.Sequential(MBConv(16, 16, hidden=48, squeeze=8), nn.Identity()), Head(16, 32, 10)
    ).eval()


@pytest.fixture(scope="module")
def file(network, task, tmp_path_factory):
    return export(network, task.input_shape, tmp_path_factory.mktemp("gate") / "model.onnx", task=task)


@pytest.fixture
def takes(monkeypatch) -> Callable:
    """A meter that returns what it is told, (median, low, high) in ms; notes how long it was to run."""

    def install(*results: tuple[float, float, float], settled: bool = True) -> list[float]:
        left, asked = list(results), []

        def measure(functions, *, seconds=10.0, **options):
            asked.append(seconds)
            for function in functions.values():
                function()
            median, low, high = left.pop(0)
            return dict.fromkeys(functions, Measurement(median, (low, high), low, 100, settled))

        monkeypatch.setattr(meter, "measure", measure)
        return asked

    return install


def judge(network, file, task, *budgets: str, device=None, **options):
    parsed = [Budget.parse(text) for text in budgets]
    return gate(network, file, task, device or OrtCpu(), parsed, seconds=10.0, with_layers=False, **options)


def test_a_kept_latency(network, file, task, takes):
    asked = takes((0.0789, 0.0786, 0.0793))
    verdict = judge(network, file, task, "latency<=80us", predicted_ms=0.077)
    assert asked == [10.0]
    assert verdict.kept
    images, labels = next(task.batches("test", 10**6, train=False))
    with torch.no_grad():
        accuracy = (network(images).argmax(1) == labels).float().mean().item()
    score = f"{100 * accuracy:.1f} %"
    assert verdict.sentence == (
        "kept: 78.9 µs measured (95 % interval 78.6-79.3) against a limit of 80.0 µs; "
        f"{score} through the file, {score} in PyTorch"
    )
    result = json.loads(json.dumps(verdict.to_json()))
    assert result["metric"] == pytest.approx({"name": "accuracy", "test": accuracy, "test_exported": accuracy})
    latency = {"predicted": 0.077, "median": 0.0789, "ci95": [0.0786, 0.0793], "settled": True}
    assert result["cost"]["latency_ms"] == latency
    assert result["budgets"] == [
        {"metric": "latency", "limit": pytest.approx(0.08), "unit": "ms", "measured": 0.0789, "kept": True}
    ]
    assert 0 < result["parity_max_abs_diff"] < 1e-4
    assert result["parity_same_class"] == 1
    assert result["cost"]["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert result["cost"]["file_bytes"] == file.stat().st_size
    assert result["cost"]["peak_memory_bytes"] > 4 * (16 + 48 + 48) * 64 - 1


def test_a_broken_latency(network, file, task, takes):
    asked = takes((0.0951, 0.0949, 0.0953), (0.0901, 0.0899, 0.0903))
    verdict = judge(network, file, task, "latency<=80us", "params<=1M")
    assert asked == [10.0, 30.0]
    assert not verdict.kept
    assert verdict.sentence.startswith(
        "broken: 90.1 µs measured (95 % interval 89.9-90.3) against a limit of 80.0 µs; kept: "
    )


@pytest.mark.parametrize(
    ("second", "kept", "says"),
    [
        ((0.0798, 0.0796, 0.0799), True, "limit of 80.0 µs; "),
        ((0.0799, 0.0797, 0.0802), True, "decided by the median as the interval straddles the limit"),
        ((0.08004, 0.0797, 0.0803), False, "0.08004 ms measured"),
    ],
)
@pytest.mark.parametrize("first", [(0.0795, 0.0788, 0.0802), (0.0951, 0.0949, 0.0953)], ids=["straddles", "over"])
def test_what_is_not_clearly_within_is_measured_longer_once(network, file, task, takes, first, second, kept, says):
    asked = takes(first, second)
    verdict = judge(network, file, task, "latency<=80us")
    assert asked == [10.0, 30.0]
    assert verdict.kept is kept
    assert says in verdict.sentence
    assert ("straddles" in verdict.sentence) == (second[2] > 0.08)


def test_a_busy_machine_is_said(network, file, task, takes):
    takes((0.07, 0.06, 0.075), settled=False)
    assert "too busy" in judge(network, file, task).sentence


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ("params<=1M", True),
        ("params<=1k", False),
        ("macs<=1G", True),
        ("macs<=1k", False),
        ("peak_memory<=1MB", True),
        ("peak_memory<=1kB", False),
        ("file<=1MB", True),
        ("file<=1kB", False),
    ],
)
def test_every_other_budget(network, file, task, takes, budget, kept):
    takes((0.07, 0.069, 0.071))
    verdict = judge(network, file, task, "latency<=1ms", budget)
    metric = budget.split("<=")[0]
    assert [b.kept for b in verdict.budgets] == [True, kept]
    assert verdict.kept is kept
    assert f"{metric.replace('_', ' ')} against a limit of" in verdict.sentence
    assert verdict.sentence.startswith("kept: 70.0 µs" if kept else "broken: ")
    assert verdict.budgets[1].measured == verdict.costs[metric]


def test_numbers_that_round_alike_are_told_apart(network, file, task, takes):
    takes((0.07, 0.069, 0.071))
    params = sum(parameter.numel() for parameter in network.parameters())
    sentence = judge(network, file, task, f"params<={params - 1}").sentence
    assert f"{params} params against a limit of {params - 1};" in sentence


def test_relative_budgets_and_the_reference(network, file, task, takes):
    takes((0.07, 0.069, 0.071))
    verdict = judge(network, file, task, "latency<=0.5x", reference={"latency": 0.16, "params": 1e4})
    assert verdict.budgets[0].limit == 0.08
    assert verdict.relative["latency"] == pytest.approx(0.4375)
    assert set(verdict.relative) == {"latency", "params"}
    assert "reference" not in verdict.sentence  # which is measured again; the table compares with that


def test_a_relative_budget_needs_a_reference(network, file, task):
    with pytest.raises(UserError, match=r"latency<=0\.5x is relative"):
        judge(network, file, task, "latency<=0.5x")


@pytest.mark.parametrize(("predicted", "kept"), [(4.8, True), (5.2, False)])
def test_a_table_predicts_only(network, file, task, predicted, kept):
    verdict = judge(network, file, task, "latency<=5ms", device=TableDevice("pixel", {}), predicted_ms=predicted)
    assert verdict.kept is kept
    assert f"{predicted:.2f} ms predicted only (nothing runs on the table pixel) against" in verdict.sentence
    result = verdict.to_json()
    assert result["cost"]["latency_ms"]["median"] is None
    assert result["budgets"][0]["measured"] is None
    assert "% through the file" in verdict.sentence


def test_a_table_without_a_prediction_is_an_error(network, file, task):
    with pytest.raises(UserError, match="needs a predicted latency"):
        judge(network, file, task, "latency<=5ms", device=TableDevice("pixel", {}))


def test_a_torch_device_times_the_network_and_says_so(network, file, task, takes):
    takes((0.07, 0.069, 0.071))
    sentence = judge(network, file, task, "latency<=5ms", device=TorchCpu()).sentence
    assert "70.0 µs measured in PyTorch on torch-cpu, not from the file, (95 % interval" in sentence


# agreement ------------------------------------------------------------------------------------------------------------


def damage(file, path, change) -> None:
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("change", [lambda a: a * 1.05, lambda a: a * float("nan"), lambda a: a * float("inf")])
def test_a_file_that_is_another_network_is_refused(network, file, task, takes, tmp_path, change):
    takes((0.07, 0.069, 0.071))
    damage(file, tmp_path / "other.onnx", change)
    verdict = judge(network, tmp_path / "other.onnx", task, "latency<=1ms")
    assert not verdict.kept
    assert verdict.sentence.startswith("broken: the file's outputs differ from PyTorch's by ")
    assert "; kept: 70.0 µs" in verdict.sentence


def test_the_file_is_scored_over_the_whole_test_split(network, task, takes, tmp_path):
    takes((0.07, 0.069, 0.071))
    other = nn.Sequential(ConvBn(1, 8, 3), Head(8, 8, 10)).eval()
    found = judge(network, export(other, task.input_shape, tmp_path / "other.onnx"), task).agreement
    assert found.accuracy == evaluate(network, task, "test")
    assert found.accuracy_exported == evaluate(other, task, "test") != found.accuracy


def test_a_network_of_nan_is_refused(file, task, takes):
    takes((0.07, 0.069, 0.071))
    ruined = nn.Sequential(ConvBn(1, 8), Head(8, 8, 10))
    nn.init.constant_(ruined[1].linear.weight, float("nan"))
    assert not judge(ruined, file, task).kept


def test_a_fixed_batch_is_scored_image_by_image(network, task, takes, tmp_path):
    takes((0.07, 0.069, 0.071))
    path = export(network, task.input_shape, tmp_path / "fixed.onnx", dynamic_batch=False)
    verdict = judge(network, path, task)
    assert verdict.agreement.holds
    assert verdict.agreement.same_class == 1


@pytest.mark.parametrize("content", [None, b"", b"no onnx"])
def test_a_file_that_cannot_be_loaded(network, task, tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx"):
        judge(network, path, task)


def test_the_test_split_is_touched_once_and_nothing_else(network, file, takes, monkeypatch):
    takes((0.07, 0.069, 0.071))
    task = open_task("digits")
    asked = []
    split = type(task).split
    monkeypatch.setattr(type(task), "split", lambda self, name: asked.append(name) or split(self, name))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    judge(network.train(), file, task)
    assert asked == ["test"]
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# layers ---------------------------------------------------------------------------------------------------------------


def test_layers_add_up(network, task):
    found = layers(network, task.input_shape, predicted={"0": 1.0, "elsewhere": 2.0})
    assert [layer.name for layer in found] == ["0", "1.0", "2"]
    assert [layer.text for layer in found] == [repr(network[0]), repr(network[1][0]), repr(network[2])]
    assert [(layer.input, layer.output) for layer in found] == [
        ((1, 8, 8), (16, 8, 8)),
        ((16, 8, 8), (16, 8, 8)),
        ((16, 8, 8), (10,)),
    ]
    assert sum(layer.params for layer in found) == sum(parameter.numel() for parameter in network.parameters())
    assert found[0].macs == 9 * 16 * 64
    assert [layer.predicted_ms for layer in found] == [1.0, None, None]
    assert [layer.measured_ms for layer in found] == [None] * 3


def test_measured_layers_are_differences(network, task, monkeypatch):
    times = iter((0.002, 0.012, 0.05, 0.049))

    def measure(functions, *, seconds):
        assert seconds == 4
        return {name: Measurement(t := next(times), (t, t), t, 1, True) for name in functions}

    monkeypatch.setattr(meter, "measure", measure)
    found = layers(network, task.input_shape, OrtCpu(), seconds=4)
    assert [layer.measured_ms for layer in found] == pytest.approx([0.01, 0.038, 0])


def test_really_measured(network, file, task):
    """No fake: the whole gate on this machine."""
    verdict = gate(network, file, task, OrtCpu(), [Budget.parse("latency<=1s")], seconds=0.5)
    assert verdict.kept
    total = sum(layer.measured_ms or 0 for layer in verdict.layers)
    assert verdict.latency is not None
    assert 0.3 * verdict.latency.median_ms < total < 3 * verdict.latency.median_ms


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.unused = ConvBn(1, 4), nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x):
        return self.twice(self.twice(self.a(x)))


def test_a_network_that_is_no_chain_has_counts_but_no_times():
    found = layers(Branches(), (1, 8, 8), OrtCpu())
    assert [layer.name for layer in found] == ["a"]
    assert found[0].measured_ms is None
