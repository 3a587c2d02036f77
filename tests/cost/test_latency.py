"""The latency of a space from a table: exact sums, interpolation only between measured widths, nothing guessed."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from netsmith import architecture as architectures
from netsmith.architecture import extreme, outline
from netsmith.blocks.mobile import ConvBn, Head, MBConv
from netsmith.blocks.reparam import Branches
from netsmith.cost.counts import Macs
from netsmith.cost.fused import fused_atoms
from netsmith.cost.imported import import_table
from netsmith.cost.latency import SpaceLatency, calibration_networks, interpolate, leaning, profile_space, width_step
from netsmith.cost.prices import Prices, tabulate
from netsmith.cost.table import Calibration, LatencyTable, MissingEntry, TableDevice, entry_key
from netsmith.decisions import OneOf, Width, derive
from netsmith.ship.layers import layers as ship_layers
from netsmith.spaces import open_space

DATA = Path(os.environ.get("NETSMITH_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def space() -> nn.Module:
    blocks = {"a": MBConv(8, 8, hidden=Width((8, 16, 24))), "b": MBConv(8, 8, kernel=5, hidden=8)}
    return nn.Sequential(ConvBn(3, 8, 3), OneOf({**blocks, "skip": nn.Identity()}), Head(8, 16, 10))


def entries() -> dict[str, float]:
    layers = [MBConv(8, 8, hidden=n) for n in (8, 16, 24)] + [MBConv(8, 8, kernel=5, hidden=8)]
    table = {entry_key(layer, (8, 8, 8)): 0.1 * (i + 1) for i, layer in enumerate(layers)}
    return table | {entry_key(ConvBn(3, 8, 3), (3, 8, 8)): 1.0, entry_key(Head(8, 16, 10), (8, 8, 8)): 2.0}


def test_a_network_costs_the_sum_of_its_entries(tmp_path: Path):
    latency = profile_space(space(), (3, 8, 8), TableDevice("board", entries()), LatencyTable(tmp_path / "t.sqlite"))
    known = entries()
    for architecture in architectures.enumerate_architectures(space()):
        parts = [m for m in derive(space(), architecture).children() if not isinstance(m, nn.Identity)]
        shapes = [(3, 8, 8)] + [(8, 8, 8)] * 2
        expected = sum(known[entry_key(m, s)] for m, s in zip(parts, shapes, strict=False))
        assert latency.prices.of(architecture) == pytest.approx(expected, rel=1e-12)


def nested() -> nn.Module:
    """The layers of `space` behind a choice that has a fixed part of its own."""
    stem, choice, head = space().children()
    return nn.Sequential(OneOf({"deep": nn.Sequential(stem, choice), "bare": ConvBn(3, 8, 3)}), head)


@pytest.mark.parametrize("build", [space, nested])
def test_the_layers_of_a_network_add_up_to_its_price(build, tmp_path: Path):
    latency = profile_space(build(), (3, 8, 8), TableDevice("board", entries()), LatencyTable(tmp_path / "t.sqlite"))
    latency = replace(latency, calibration=Calibration(constant=0.5, scale=1.1, per_layer=-0.01, per_weight=1e-4))
    for architecture in architectures.enumerate_architectures(build()):
        network, by_layer = derive(build(), architecture), latency.by_layer(architecture)
        assert sum(by_layer.values()) == pytest.approx(latency.prices.of(architecture) - 0.5, rel=1e-12)
        named = {layer.name: layer for layer in ship_layers(network, (3, 8, 8), predicted=by_layer)}
        assert {name for name, ms in by_layer.items() if ms} == set(named)
        for layer in named.values():
            entry = entries()[entry_key(network.get_submodule(layer.name), layer.input)]
            assert layer.predicted_ms == pytest.approx(1.1 * entry - 0.01 + 1e-4 * layer.params, rel=1e-12)


class Loose(nn.Module):
    """A network as others write them: norms and activations are layers of their own, and not in the order they run."""

    def __init__(self, choice: nn.Module) -> None:
        super().__init__()
        self.act, self.conv, self.bn, self.choice, self.bn2 = (
            nn.ReLU(),
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            choice,
            nn.BatchNorm2d(8),
        )
        self.act2, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return self.fc(self.pool(self.act2(self.bn2(self.choice(x)))).flatten(1))


def test_what_folds_when_shipped_is_one_layer_and_none_is_below_zero(tmp_path: Path):
    """Behind a fixed layer, and behind each option of a choice; a priced space and a network have the same layers."""
    model = Loose(OneOf({"conv": nn.Conv2d(8, 8, 1), "skip": nn.Identity()}))
    rest = [nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    known = {
        entry_key(stem, (3, 8, 8)): 0.9,
        entry_key(nn.Sequential(nn.Conv2d(8, 8, 1), *rest), (8, 6, 6)): 0.5,
        entry_key(nn.Sequential(nn.Identity(), *rest), (8, 6, 6)): 0.3,
        entry_key(nn.AdaptiveAvgPool2d(1), (8, 6, 6)): 0.1,
        entry_key(nn.Linear(8, 5), (8,)): 0.2,
    }
    latency = profile_space(model, (3, 8, 8), TableDevice("board", known), LatencyTable(tmp_path / "t.sqlite"))
    assert latency.layers.constant == 3
    assert latency.raw.options == {"choice": {"conv": 0.5, "skip": 0.3}}
    latency = replace(latency, calibration=Calibration(constant=0.7, per_layer=-0.15))
    for option, own in {"conv": 0.35, "skip": 0.15}.items():
        by_layer = latency.by_layer({"choice": option})
        # Of 0.75 + 0.05 - 0.05 the pool, which is shorter than what a layer saves, has none.
        assert by_layer == pytest.approx({"conv": 0.75 * 15 / 16, "choice": own, "pool": 0.0, "fc": 0.75 / 16})
        assert sum(by_layer.values()) == pytest.approx(latency.prices.of({"choice": option}) - 0.7)
    network = derive(model, {"choice": "conv"})
    found = {
        layer.name: layer for layer in ship_layers(network, (3, 8, 8), predicted=latency.by_layer({"choice": "conv"}))
    }
    assert set(found) == set(by_layer)
    assert found["conv"].text == f"{nn.Conv2d(3, 8, 3)}, BatchNorm2d, ReLU"
    assert found["conv"].predicted_ms == pytest.approx(0.75 * 15 / 16)
    assert sum(layer.params for layer in found.values()) == sum(p.numel() for p in network.parameters())


def test_an_activation_that_runs_twice_belongs_to_no_layer():
    class Twice(Loose):
        def forward(self, x):
            return self.act(self.bn2(self.choice(self.act(self.bn(self.conv(x))))))

    model = Twice(OneOf({"conv": nn.Conv2d(8, 8, 1), "wide": nn.Conv2d(8, 8, 3, padding=1)}))
    for unused in ("act2", "pool", "fc"):
        delattr(model, unused)
    found = {atom.path: [type(part) for part in atom.module.children()] for atom in fused_atoms(model, (3, 4, 4))}
    both = [nn.Conv2d, nn.BatchNorm2d]
    assert found == {"act": [], "conv": both, "choice.conv": both, "choice.wide": both}


def test_branches_are_timed_as_what_they_fold_into(tmp_path: Path):
    """With the entry of the plain layer, whatever is on; the branches themselves cost nothing."""
    model = nn.Sequential(Branches(3, 8, kinds=("kxk", "1x1")), OneOf({"b": Branches(8, 8), "skip": nn.Identity()}))
    known = {"ConvBn(3, 8, kernel=3) @ 3x8x8": 1.0, "ConvBn(8, 8, kernel=3) @ 8x8x8": 0.25}
    latency = profile_space(model, (3, 8, 8), TableDevice("board", known), LatencyTable(tmp_path / "t.sqlite"))
    assert latency.raw.constant == 1.0
    assert latency.raw.options["1"] == {"b": 0.25, "skip": 0.0}
    for prices in (latency.raw, latency.layers, latency.weights):
        assert [path for path, row in prices.options.items() if any(row.values())] == ["1"]
    assert latency.weights.at("1", "b") == 8 * 8 * 9 + 8
    architecture = dict.fromkeys(latency.raw.options, "on") | {"1": "b"}
    by_layer = {name: ms for name, ms in latency.by_layer(architecture).items() if ms}
    assert by_layer == {"0": 1.0, "1": 0.25}
    named = {layer.name: layer for layer in ship_layers(derive(model, architecture), (3, 8, 8), predicted=by_layer)}
    assert {name: layer.predicted_ms for name, layer in named.items()} == by_layer


def test_an_option_without_entry_is_an_error_and_a_fixed_part_only_without_a_constant(tmp_path: Path):
    table = LatencyTable(tmp_path / "t.sqlite")
    lacking = {key: ms for key, ms in entries().items() if "kernel=5" not in key}
    with pytest.raises(MissingEntry, match="kernel=5"):
        profile_space(space(), (3, 8, 8), TableDevice("board", lacking, constant_ms=5.0), table)
    lacking = {key: ms for key, ms in entries().items() if "Head" not in key}
    with pytest.raises(MissingEntry, match="Head"):
        profile_space(space(), (3, 8, 8), TableDevice("board", lacking), table)
    latency = profile_space(space(), (3, 8, 8), TableDevice("board", lacking, constant_ms=5.0), table)
    assert latency.prices.of({"1": "skip"}) == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["fbnet_small", pytest.param("prunet_small", marks=pytest.mark.slow)])
def test_calibration_networks_cover_the_range(name: str):
    with torch.device("meta"):
        supernet = open_space(name, depth=2)
    raw, lines = tabulate(supernet, Macs(), (3, 32, 32)), outline(supernet)
    low, high = (raw.of(extreme(raw.options, lines.parents, largest=largest)) for largest in (False, True))
    costs = [raw.of(network) for network in calibration_networks(supernet, 0, 16, raw)]
    assert costs[:2] == [low, high]
    uniform = [raw.of(network) for network in calibration_networks(supernet, 0, 200)]
    generator = torch.Generator().manual_seed(0)
    leaning_ = [raw.of(leaning(lines, raw, generator)) for _ in range(200)]
    assert min(leaning_) < min(uniform)
    assert max(leaning_) > max(uniform)


def test_interpolation_stays_between_measured_widths():
    assert interpolate({16: 1.0, 48: 3.0}, 16) == 1.0
    assert interpolate({16: 1.0, 48: 3.0}, 24) == pytest.approx(1.5)
    for outside in (8, 64):
        with pytest.raises(ValueError):  # noqa: PT011
            interpolate({16: 1.0, 48: 3.0}, outside)


def test_the_calibration_is_a_price_per_option_again():
    raw = Prices(1.0, {"x": {"a": 2.0, "b": 3.0}})
    layers, weights = Prices(2.0, {"x": {"a": 1.0, "b": 0.0}}), Prices(100.0, {"x": {"a": 50.0, "b": 0.0}})
    calibration = Calibration(constant=0.5, scale=1.1, per_layer=-0.1, per_weight=1e-3)
    prices = SpaceLatency(raw, layers, weights, calibration).prices
    assert prices.of({"x": "a"}) == pytest.approx(calibration.predict([3.0, 3.0, 150.0]))
    assert prices.of({"x": "b"}) == pytest.approx(calibration.predict([4.0, 2.0, 100.0]))
    dear_layers = replace(calibration, per_layer=-3.0)  # then a short layer would cost less than none
    assert SpaceLatency(raw, layers, weights, dear_layers).prices.options == {"x": {"a": 0.0, "b": pytest.approx(3.3)}}


def test_calibrated_prices_are_none_below_zero():
    """The shortest layer sets what one may save: of options, of fixed parts, of what two widths have together."""
    raw = Prices(0.3, {"x": {"a": 0.2, "b": 0.8, "skip": 0.0}}, pairs={("x", "y"): {("a", 1): 0.15}})
    layers = Prices(2.0, {"x": {"a": 1.0, "b": 2.0, "skip": 0.0}}, pairs={("x", "y"): {("a", 1): 1.0}})
    weights = Prices(0.0, {"x": dict.fromkeys("ab", 0.0) | {"skip": 0.0}}, pairs={("x", "y"): {("a", 1): 0.0}})
    latency = SpaceLatency(raw, layers, weights, fixed={"stem": (0.12, 0.0), "head": (0.18, 0.0)})
    assert latency._shortest == 0.12
    assert replace(latency, fixed={})._shortest == 0.15
    assert SpaceLatency(Prices(0.0, {}), Prices(0.0, {}), Prices(0.0, {}))._shortest is None


class Staircase:
    """A device whose layers cost one unit per started step of channels."""

    def __init__(self, step: int) -> None:
        self.step = step

    name = "staircase"

    def versions(self) -> dict[str, str]:
        return {}

    def fingerprint(self) -> str:
        return f"staircase {self.step}"


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_the_staircase_of_a_device_is_found(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def profile(self: LatencyTable, device: Staircase, items: dict, progress=None) -> float:
        known.update({key: 1.0 + math.ceil(make().options["hidden"] / device.step) for key, (make, _) in items.items()})
        return 0.0

    known: dict[str, float] = {}
    monkeypatch.setattr(LatencyTable, "profile", profile)
    monkeypatch.setattr(LatencyTable, "get", lambda self, fingerprint, keys: {key: known[key] for key in keys})
    assert width_step(Staircase(step), LatencyTable(tmp_path / "t.sqlite")) == step  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not (DATA / "nas").is_dir(), reason="the published tables are not here")
def test_a_published_table_prices_its_own_space(tmp_path: Path):
    phone = import_table(DATA / "nas" / "lut_singlepath_pixel1.json.gz")
    with torch.device("meta"):
        supernet = open_space("single_path")
    latency = profile_space(supernet, (3, 224, 224), phone, LatencyTable(tmp_path / "t.sqlite"))
    rows = [path for path in latency.prices.options if "stage" in path]
    assert len(rows) == 20
    assert latency.prices.constant == pytest.approx(19.6)
    small = latency.prices.of(architectures.assemble(supernet, lambda _, options: options[-1]))
    large = latency.prices.of(architectures.assemble(supernet, lambda _, options: "k5_e6"))
    assert 19.6 < small < 60 < large < 200
