"""What was saved comes back bit for bit; every way in which the files can be wrong is one sentence naming the file."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import netsmith
from netsmith import spaces
from netsmith.architecture import sample
from netsmith.decisions import Decision, derive
from netsmith.errors import UserError
from netsmith.run import dump_yaml
from netsmith.ship import weights

OPTIONS = {"classes": 10, "channels": 1, "resolution": 8}


@pytest.fixture
def run(tmp_path) -> tuple[Path, nn.Module]:
    """A run with one network in it, weights and statistics away from where a fresh network has them."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "problem.yaml").write_text(dump_yaml({"format": 1, "space": "prunet_small", "space_options": OPTIONS}))
    supernet = spaces.open_space("prunet_small", **OPTIONS)
    architecture = sample(supernet, torch.Generator().manual_seed(3))
    network = derive(supernet, architecture)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 9 + 1)
    weights.save(folder, network, architecture)
    return folder, network


def test_the_network_comes_back_bit_for_bit(run):
    folder, network = run
    loaded = netsmith.load(folder)
    assert str(loaded) == str(network)
    ours, theirs = network.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name
    assert not loaded.training
    assert not any(isinstance(module, Decision) for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), network.eval()(x))


def test_features_are_those_of_the_network(run):
    folder, network = run
    backbone = netsmith.load(folder, features_only=True)
    images = torch.randn(2, 1, 8, 8)
    maps = backbone(images)
    assert [found.shape[1] for found in maps] == backbone.channels
    classifier = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
    assert torch.allclose(classifier(maps[-1].mean((2, 3))), netsmith.load(folder)(images), rtol=1e-4)
    with pytest.raises(UserError, match="nowhere is no folder"):
        netsmith.load(folder / "nowhere", features_only=True)
    space = spaces.open_space("prunet_small")  # by its own defaults, which no file names
    architecture = sample(space, torch.Generator().manual_seed(0))
    (folder / "problem.yaml").write_text(dump_yaml({"space": "prunet_small", "space_options": {}}))
    weights.save(folder, derive(space, architecture), architecture)
    with pytest.raises(UserError, match="`space_options` lacks channels and resolution"):
        netsmith.load(folder, features_only=True)


def test_a_path_may_be_text_and_half_precision_stays(run):
    folder, network = run
    architecture = json.loads((folder / "architecture.json").read_text())
    weights.save(folder, network.half(), architecture)
    assert next(netsmith.load(str(folder)).parameters()).dtype == torch.float16


def test_loading_draws_no_random_numbers_and_never_holds_the_space(run, monkeypatch):
    devices = []
    build = spaces.open_space

    def spy(name, **options):
        supernet = build(name, **options)
        devices.extend({parameter.device.type for parameter in supernet.parameters()})
        return supernet

    monkeypatch.setattr(weights, "open_space", spy)
    before = torch.get_rng_state()
    netsmith.load(run[0])
    assert torch.equal(before, torch.get_rng_state())
    assert devices == ["meta"]


class Positions(nn.Module):
    """Has a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.scale = nn.Parameter(torch.ones(3))


def test_buffers_outside_the_state_dict_are_computed(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(weights, "open_space", lambda name, **options: Positions())
    weights.save(folder, Positions(), {})
    assert netsmith.load(folder).table.tolist() == [0, 1, 2]


def test_a_front_asks_which(run):
    folder, network = run
    architecture = json.loads((folder / "architecture.json").read_text())
    for name in ("latency-0.5x", "latency-0.3x"):
        weights.save(folder / name, network, architecture)
    (folder / "architecture.json").unlink()
    with pytest.raises(UserError, match=r"a front of 2; load one of: .*latency-0\.3x, .*latency-0\.5x"):
        netsmith.load(folder)
    assert str(netsmith.load(folder / "latency-0.3x")) == str(network)


@pytest.mark.parametrize("place", ["point", "others/reference"])
def test_from_inside_a_point(run, monkeypatch, place):
    folder, network = run
    weights.save(folder / place, network, json.loads((folder / "architecture.json").read_text()))
    monkeypatch.chdir(folder / place)
    assert str(netsmith.load(".")) == str(network)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(file: Path) -> None:
    """A file that would run code if anything unpickled it."""

    class Trap:
        def __reduce__(self):
            return (Path(file.parent / "executed").touch, ())

    file.write_bytes(pickle.dumps(Trap()))


def other_width(file: Path) -> None:
    """A legal architecture whose first open width differs from the saved weights'."""
    architecture = json.loads(file.read_text())
    path = next(path for path, option in architecture.items() if isinstance(option, int))
    file.write_text(json.dumps({**architecture, path: 16 if architecture[path] != 16 else 32}))


def no_such_option(file: Path) -> None:
    architecture = json.loads(file.read_text())
    file.write_text(json.dumps({**architecture, "body": "elsewhere"}))


def first_missing(file: Path) -> None:
    architecture = json.loads(file.read_text())
    architecture.pop("body")
    file.write_text(json.dumps(architecture))


def more_tensors(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(file), "surplus": torch.ones(1)}, file)


def fewer_tensors(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors.pop("stem.conv.weight")
    save_file(tensors, file)


BROKEN = {
    "truncated weights": ("weights.safetensors", truncate, "damaged"),
    "empty weights": ("weights.safetensors", lambda file: file.write_bytes(b""), "damaged"),
    "a pickle": ("weights.safetensors", to_pickle, "damaged or no safetensors"),
    "no weights": ("weights.safetensors", Path.unlink, "is missing"),
    "surplus tensor": ("weights.safetensors", more_tensors, "the network has no 'surplus'"),
    "missing tensor": ("weights.safetensors", fewer_tensors, "'stem.conv.weight' is missing"),
    "another width": ("architecture.json", other_width, "weights.safetensors does not fit architecture.json: .* shape"),
    "unknown option": ("architecture.json", no_such_option, "does not fit the space 'prunet_small'.*elsewhere"),
    "open decision": ("architecture.json", first_missing, "leaves 'body' open"),
    "no JSON": ("architecture.json", lambda file: file.write_text("{"), "JSON"),
    "no text": ("architecture.json", lambda file: file.write_bytes(b"\xff\xfe"), "UTF-8"),
    "no problem": ("problem.yaml", Path.unlink, "problem.yaml is missing"),
    "no YAML": ("problem.yaml", lambda file: file.write_text("{"), "YAML"),
    "no space": ("problem.yaml", lambda file: file.write_text("format: 1"), "names no space"),
    "a list": ("problem.yaml", lambda file: file.write_text("[1]"), "names no space"),
    "unknown space": ("problem.yaml", lambda file: file.write_text("space: prunet_smal"), "did you mean"),
    "wrong option": ("problem.yaml", lambda file: file.write_text("space: fbnet\nspace_options: {a: 1}"), "option"),
    "no architecture": ("architecture.json", Path.unlink, "no finished network"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named_in_one_sentence(run, what):
    folder, _ = run
    name, break_, says = BROKEN[what]
    break_(folder / name)
    with pytest.raises(UserError, match=says) as caught:
        netsmith.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        netsmith.load(tmp_path / "nothing")


def test_importing_netsmith_is_cheap():
    code = "import sys, netsmith; print(netsmith.__version__, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\S* False\n", ran.stdout)


def test_no_other_attribute():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        netsmith.lod  # noqa: B018
