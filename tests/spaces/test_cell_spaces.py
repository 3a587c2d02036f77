"""The spaces of cells: the benchmark's counts, names and order, DARTS' released networks, one choice in many places."""

import csv
import gzip
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from netsmith import gates
from netsmith.architecture import check, dumps, mutate, outline, sample
from netsmith.cost.counts import Macs, Params
from netsmith.cost.latency import calibration_networks
from netsmith.cost.prices import tabulate
from netsmith.decisions import decisions, derive, rules
from netsmith.errors import UserError
from netsmith.ship.export import export
from netsmith.ship.layers import layers
from netsmith.spaces import darts, nasbench201, open_space

DATA = Path(os.environ.get("NETSMITH_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
TABLE = DATA / "nas" / "nasbench201_accuracy.csv.gz"
SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def cells() -> nn.Module:
    with torch.device("meta"):
        return nasbench201.nasbench201()


@pytest.mark.parametrize(
    ("operation", "params", "macs"),
    [("conv3x3", 1_531_546, 220_119_680), ("none", 73_306, 7_783_040), ("skip", 73_306, 7_783_040)],
)
def test_nasbench201_to_the_unit(cells, operation, params, macs):
    network = derive(cells, {f"edges.{edge}": operation for edge in nasbench201.EDGES})
    assert Params()(network, SHAPE) == params
    assert Macs()(network, SHAPE) == macs


def test_every_cell_of_the_benchmark_comes_back(cells):
    found = [nasbench201.at_index(index) for index in range(15_625)]
    strings = [nasbench201.to_string(cell) for cell in found]
    assert len(set(strings)) == 15_625
    assert [nasbench201.from_string(text) for text in strings] == found
    assert [nasbench201.index_of(cell) for cell in found] == list(range(15_625))
    assert len({nasbench201.isomorphism_class(cell) for cell in found}) == 6_466
    check(cells, found[0])


@pytest.mark.skipif(not TABLE.is_file(), reason="the benchmark's table is not here")
def test_indices_strings_and_classes_are_the_benchmarks():
    with gzip.open(TABLE, "rt") as file:
        rows = list(csv.DictReader(file))
    names = list(nasbench201.OPERATIONS)
    assert len(rows) == 15_625
    for row in rows:
        cell = nasbench201.at_index(int(row["index"]))
        assert nasbench201.to_string(cell) == row["arch"]
        assert "".join(str(names.index(cell[f"edges.{edge}"])) for edge in nasbench201.EDGES) == row["ops"]
        assert nasbench201.isomorphism_class(cell) == row["unique_string"]


@pytest.mark.parametrize("text", ["", "|none~0|", "|none~0|+|none~0|none~0|+|none~0|none~1|none~2|", "conv"])
def test_what_is_no_cell_of_the_benchmark(text):
    with pytest.raises(UserError):
        nasbench201.from_string(text)
    with pytest.raises(UserError, match="from 0 to 15624; given: 15625"):
        nasbench201.at_index(15_625)


@pytest.mark.parametrize(("name", "params"), [("DARTS_V1", 3_169_414), ("DARTS_V2", 3_349_342)])
def test_released_darts_to_the_unit(name, params):
    with torch.device("meta"):
        space = darts.darts(width=36, cells=20)
    architecture = darts.released(name)
    check(space, architecture)
    assert Params()(derive(space, architecture), SHAPE) == params


def test_every_node_of_darts_keeps_two_edges():
    with torch.device("meta"):
        space = darts.darts()
    found = rules(space)
    assert len(decisions(space)) == 28
    assert {len(decision.options) for decision in decisions(space).values()} == {8}
    assert sorted(len(rule.paths) for rule in found) == [2, 2, 3, 3, 4, 4, 5, 5]
    generator, lines = torch.Generator().manual_seed(0), outline(space)
    architecture = sample(lines, generator)
    for _ in range(50):
        architecture = mutate(lines, architecture, generator)
        check(lines, architecture)
        for rule in found:
            assert sum(architecture[path] != "none" for path in rule.paths) == 2
    broken = {**architecture, next(p for p in found[0].paths): "none"}
    with pytest.raises(UserError, match=r"breaks the rule that 2 of normal.0_2, normal.1_2 are not 'none': 1 are not"):
        check(lines, broken)


def test_networks_to_calibrate_on_keep_the_rules():
    with torch.device("meta"):
        space = darts.darts(3, 1, 8, cells=3, width=4)
    lines = outline(space)
    networks = calibration_networks(space, 0, 16, tabulate(space, Params(), (1, 8, 8)))
    assert len({dumps(network) for network in networks}) == 16
    for network in networks:
        check(lines, network)


SMALL = {"nasbench201": {"cells": 2, "width": 4}, "darts": {"cells": 3, "width": 4}}


@pytest.mark.parametrize("name", SMALL)
def test_exactly_the_fixed_supernet_is_derived(name):
    torch.manual_seed(0)
    space = open_space(name, classes=3, channels=1, resolution=8, **SMALL[name]).double()
    generator = torch.Generator().manual_seed(0)
    for training in (True, False):
        x = torch.randn(2, 1, 8, 8).double()
        architecture = sample(space, generator)
        network = derive(space.train(training), architecture)
        assert not rules(network)
        gates.fix(space, architecture)
        with torch.no_grad():
            assert torch.equal(network(x), space(x))


@pytest.mark.parametrize("name", SMALL)
def test_the_layers_of_a_network_are_its_operations_in_order(name):
    with torch.device("meta"):
        space = open_space(name, classes=3, channels=1, resolution=8, **SMALL[name])
    network = derive(space, sample(space, torch.Generator().manual_seed(1)))
    found = layers(network, (1, 8, 8))
    assert (found[0].name, found[-1].name) == ("stem", "head")
    assert sum(layer.params for layer in found) == Params()(network, (1, 8, 8))
    assert sum(layer.macs for layer in found) == Macs()(network, (1, 8, 8))
    assert not any(layer.text.startswith("Zero") for layer in found)


def test_a_zero_leaves_no_trace_in_the_file(tmp_path):
    import onnx

    space = nasbench201.nasbench201(3, 1, 8, cells=1, width=4).eval()
    architecture = {f"edges.{edge}": "none" for edge in nasbench201.EDGES} | {"edges.0_3": "conv3x3"}
    file = export(derive(space, architecture), (1, 8, 8), tmp_path / "model.onnx")
    nodes = [node.op_type for node in onnx.load(file).graph.node]
    # A convolution each for stem, three cells, and three in each of the two reductions; the first layers' ReLUs.
    assert nodes.count("Conv") == 10
    assert not {"Mul", "ConstantOfShape", "Expand", "Slice"} & set(nodes)
    empty = export(derive(space, dict.fromkeys(architecture, "none")), (1, 8, 8), tmp_path / "empty.onnx")
    onnx.checker.check_model(onnx.load(empty))


@pytest.mark.parametrize("name", SMALL)
def test_a_size_that_cannot_be_halved_twice_is_refused(name):
    with pytest.raises(UserError, match="needs a multiple of 4 px; given: 30 px"):
        open_space(name, resolution=30)
