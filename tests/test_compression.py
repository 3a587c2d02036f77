"""`netsmith compress`, whole: a network of one's own is made to keep a budget, and what cannot be is said in a line."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from netsmith import load, pipeline
from netsmith.blocks.quantized import is_int8
from netsmith.chain import begin_chain, factors
from netsmith.cli import main
from netsmith.compression import gained, prepare_compression
from netsmith.errors import UserError
from netsmith.options import CompressOptions
from netsmith.run import read_events
from netsmith.ship.export import read_metadata
from netsmith.spaces import open_space
from netsmith.tasks import open_task
from netsmith.train.loop import train
from netsmith.train.recipe import Recipe

MODULE = """
from torch import nn
from netsmith.blocks.mobile import ConvBn

def network(classes, channels):
    layers = [ConvBn(channels, 8, 3), *(ConvBn(8, 8, 3) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, classes))

def wide(classes, channels):
    layers = [ConvBn(channels, 48, 3), ConvBn(48, 48, 3, stride=2), ConvBn(48, 64, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a module that makes a network, and its weights."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "tiny_network.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        made = open_space("module:tiny_network:network", classes=10, channels=1, resolution=8)
        train(made, open_task("digits"), Recipe(epochs=4, batch_size=64), split="trainval")
        save_file(made.state_dict(), folder / "weights.safetensors")
        yield folder


def asked(**changed) -> CompressOptions:
    plain = {"model": "module:tiny_network:network", "task": "digits", "baselines": (), "epochs": 1}
    return CompressOptions(**{**plain, **changed})


def test_from_weights_to_a_file_that_is_faster(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = (place / "weights.safetensors").read_bytes()
    arguments = ["--task", "digits", "--weights", "weights.safetensors", "--pool", "identity", "--epochs", "1"]
    budget = ["--budget", "macs<=0.6x", "--out", "run", "--baselines", "--json"]
    code = main(["compress", "module:tiny_network:network", *arguments, *budget])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["kept"]
    assert result["cost"]["macs"] <= 0.6 * result["reference"]["cost"]["macs"]
    assert (place / "weights.safetensors").read_bytes() == before
    assert sorted(result["architecture"].values()) == ["identity", "identity", "original", "original"]
    network = load(place / "run")
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    original = load(place / "run" / "others" / "reference").state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in load_file("weights.safetensors").items())
    assert any(event["kind"] == "lana_scores" for event in read_events(place / "run"))
    # A run can be compressed again, without another word about its task.
    with prepare_compression(CompressOptions(model="run", out=place / "again", pool="identity")) as run:
        assert run.problem["task"] == "digits"
        assert run.problem["space_options"]["of"]["architecture"] == result["architecture"]


def test_int8_through_a_kill_to_a_file_that_is_smaller(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    made = open_space("module:tiny_network:wide", classes=10, channels=1, resolution=8)
    train(made, open_task("digits"), Recipe(epochs=3, batch_size=64), split="trainval")
    save_file(made.state_dict(), "wide.safetensors")
    given = ["--task", "digits", "--weights", "wide.safetensors", "--method", "mixed_precision", "--baselines"]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "gate", killed)
        command = ["compress", "module:tiny_network:wide", *given, "--budget", "file<=0.5x", "--epochs", "0"]
        assert main([*command, "--budget", "bitops<=0.9x", "--out", "int8"]) == 130
    capsys.readouterr()
    assert main(["compress", "--resume", "int8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(event["kind"] == "int8_harm" for event in read_events(place / "int8")) == 4  # each layer's, once
    original = result["reference"]["cost"]["file_bytes"]
    assert result["cost"]["file_bytes"] == (place / "int8" / "model.onnx").stat().st_size <= 0.5 * original
    before, after = (cost["bitops"] for cost in (result["reference"]["cost"], result["cost"]))
    assert before == 1024 * result["reference"]["cost"]["macs"]
    assert before / 16 < after <= 0.9 * before
    chosen = {path for path, option in result["architecture"].items() if option == "int8"}
    assert 0 < len(chosen) < 4  # as few as the budget asks for
    file = onnx.load(place / "int8" / "model.onnx")
    kept = {t.name.split(".weight")[0] for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert {path for path in result["architecture"] if any(name.startswith(path) for name in kept)} == chosen
    assert json.loads(read_metadata(place / "int8" / "model.onnx")["class_names"]) == [str(i) for i in range(10)]
    network = load(place / "int8")  # computes as the file does
    assert {path for path, part in network.named_modules() if is_int8(part)} == chosen
    assert abs(result["metric"]["test"] - result["metric"]["test_exported"]) < 0.01
    assert abs(result["metric"]["test"] - result["reference"]["metric"]["test"]) < 0.02  # 8 bits, without training
    assert result["parity_max_abs_diff"] > 0


def test_a_chain_through_a_kill_to_one_file(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    made = open_space("module:tiny_network:wide", classes=10, channels=1, resolution=8)
    train(made, open_task("digits"), Recipe(epochs=3, batch_size=64), split="trainval")
    save_file(made.state_dict(), "whole.safetensors")
    Path("asked.yaml").write_text("method_options: {smcp: {epochs: 2}}\n")
    given = ["--config", "asked.yaml", "--task", "digits", "--weights", "whole.safetensors", "--baselines"]
    given += ["--method", "smcp,mixed_precision", "--budget", "file<=0.3x", "--epochs", "0", "--out", "chain"]
    gate, judged = pipeline.gate, []

    def killed(*args, **options):
        judged.append(args)
        if len(judged) == 4:  # the original and the pruned network are judged, and the latter as an original
            raise KeyboardInterrupt
        return gate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "gate", killed)
        assert main(["compress", "module:tiny_network:wide", *given]) == 130
    assert "netsmith compress --resume chain" in capsys.readouterr().err
    assert main(["compress", "--resume", "chain", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    before, (pruned, quantized) = result["reference"]["cost"], [stage["cost"] for stage in result["stages"]]
    assert [stage["method"] for stage in result["stages"]] == ["smcp", "mixed_precision"]
    assert before["params"] == sum(parameter.numel() for parameter in made.parameters())
    assert before["params"] > pruned["params"] == quantized["params"]
    assert before["file_bytes"] > pruned["file_bytes"] > quantized["file_bytes"]
    assert quantized["file_bytes"] == Path("chain", "model.onnx").stat().st_size <= 0.3 * before["file_bytes"]
    assert result["relative"]["file"] == quantized["file_bytes"] / before["file_bytes"]
    network = load(Path("chain"))
    assert sum(parameter.numel() for parameter in network.parameters()) == quantized["params"]
    assert any(is_int8(part) for part in network.modules())
    (repeated,) = (line for line in Path("chain", "chain.yaml").read_text().splitlines() if line.startswith("method:"))
    assert repeated == "method: smcp,mixed_precision"


def test_a_chain_that_is_none(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    chain = asked(weights=Path("weights.safetensors"), method="smcp,mixed_precision", out=tmp_path / "chain")
    for changed, sentence in [
        ({"method": "smcp,mixed_precison"}, "did you mean 'mixed_precision'"),
        ({"method_options": {"lana": {}}}, "method_options.lana: no method of the chain smcp,mixed_precision"),
        ({"budget": ("file<=0.5x,0.3x",)}, "asks for a front; a chain makes one network"),
        ({"pool": "bits"}, "pool was given"),
        ({"search_epochs": 1}, "search_epochs was given"),
    ]:
        with pytest.raises(UserError, match=sentence):
            begin_chain(replace(chain, **changed))
        assert not (tmp_path / "chain").exists()
    assert begin_chain(chain) == begin_chain(chain) == tmp_path / "chain"
    with pytest.raises(UserError, match="is another chain"):
        begin_chain(replace(chain, budget=("file<=0.4x",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not empty and is no chain of netsmith"):
        begin_chain(replace(chain, out=tmp_path / "full"))


def test_what_no_method_can_do_costs_nothing_that_was_made(place, monkeypatch, tmp_path):
    """The last run of a chain is discarded alone."""
    (tmp_path / "before").mkdir()
    (tmp_path / "chain.yaml").touch()
    weights = place / "weights.safetensors"
    monkeypatch.chdir(place)
    with prepare_compression(asked(weights=weights, out=tmp_path), beside=("chain.yaml", "before")) as run:
        assert (tmp_path / "problem.yaml").exists()
        run.discard()
    assert {file.name for file in tmp_path.iterdir()} == {"chain.yaml", "before"}


@pytest.mark.parametrize(
    ("share", "least", "found"),
    [
        (0.25, [0.0, 0.0], [0.5, 0.5]),
        (0.125, [0.1, 0.1, 0.1], [0.5, 0.5, 0.5]),
        (0.25, [0.1, 0.5], [0.25 / 0.55, 0.55]),
        (0.25, [0.1, 1.0], [0.25, 1.0]),
        (0.04, [0.1, 0.5, 0.9], [0.04 / 0.55 / 0.99, 0.55, 0.99]),
        (0.01, [0.5, 0.5], [0.1, 0.1]),
        (2.0, [0.1, 0.1], [1.0, 1.0]),
    ],
)
def test_what_one_method_cannot_do_the_others_take(share, least, found):
    assert factors(share, least) == pytest.approx(found)


def test_a_pool_of_another_method_is_refused(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    weights = place / "weights.safetensors"
    for changed, sentence in [
        ({"method": "mixed_precision", "pool": "small"}, "is no choice between fp32 and int8"),
        ({"method": "lana", "pool": "bits"}, "does not replace a layer"),
    ]:
        with pytest.raises(UserError, match=sentence):
            prepare_compression(asked(weights=weights, out=tmp_path / "run", **changed))


def test_what_cannot_be_compressed(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    other = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(1)}, other)
    (tmp_path / "weights.pth").write_bytes(b"pickle")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for options, sentence in [
        ({"model": None}, "no MODEL was given"),
        ({}, "module:tiny_network:network has no trained weights"),
        ({"task": None, "weights": place / "weights.safetensors"}, "what has module:tiny_network:network learnt"),
        ({"weights": other}, "the weights do not fit module:tiny_network:network: '0.conv.weight' is missing"),
        ({"weights": tmp_path / "weights.pth"}, "is no safetensors file; a pickle can run code"),
        ({"weights": tmp_path / "broken.safetensors"}, "broken.safetensors is damaged"),
        ({"weights": tmp_path / "none.safetensors"}, "none.safetensors is missing"),
        ({"model": "nowhere"}, "nowhere is no folder"),
        ({"model": "timm:resnet18"}, "timm:resnet18 was trained to tell 1000 classes apart, and digits has 10"),
        ({"weights": place / "weights.safetensors", "method": "fbnet2"}, "unknown method 'fbnet2'"),
        ({"weights": place / "weights.safetensors", "budget": ("latency<=0.5",)}, "latency<=0.5"),
    ]:
        with pytest.raises(UserError, match=sentence):
            prepare_compression(asked(**options, out=tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_method_that_cannot_is_refused_and_nothing_is_left(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match="repnas cannot search the space 'from_model'"):
        prepare_compression(asked(weights=place / "weights.safetensors", method="repnas", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "asked", "sentence"),
    [
        (2.0, "latency<=5ms", ""),
        (3.0, "latency<=5ms", "nothing was gained: latency is 3.00 ms"),
        (4.0, "latency<=5ms", "nothing"),
        (2.0, "latency<=0.65x", ""),
        (2.0, "latency<=0.5x", "latency<=0.5x was asked, and latency is 2.00 ms, that of the original 3.00 ms"),
    ],
)
def test_a_file_that_is_not_faster_than_the_original_is_refused(own, asked, sentence):
    def cost(milliseconds: float) -> dict:
        return {"latency_ms": {"median": milliseconds}, "macs": 10.0}

    budgets = [{"metric": "latency", "unit": "ms", "limit": 5.0}]
    result = {"cost": cost(own), "budgets": budgets, "reference": {"cost": cost(3.0)}}
    assert gained(result, [asked]).startswith(sentence)
    assert bool(gained(result, [asked])) == bool(sentence)
    assert bool(gained({"front": [result], "reference": {"cost": cost(3.0)}}, [asked])) == bool(sentence)


def test_layers_are_replaced_in_a_copy(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    with prepare_compression(asked(weights=place / "weights.safetensors", out=tmp_path / "run")) as run:
        from netsmith.job import Job
        from netsmith.say import Console

        with Console() as say:
            space = Job(run, say).build()
    assert space.reference == {str(i): "original" for i in range(1, 5)}
    assert isinstance(space.get_submodule("1.identity"), nn.Identity)
