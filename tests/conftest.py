"""Shared by the tests of the core: a small space with every kind of nesting."""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from netsmith.blocks.mobile import ConvBn, FusedMBConv, Head, MBConv
from netsmith.cost.latency import calibrate
from netsmith.cost.meter import measure
from netsmith.decisions import OneOf, Places, Rule, Width
from netsmith.ship.gate import gate
from netsmith.ship.layers import layers

if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # oneDNN 3.13.3 (PyTorch 2.15) corrupts memory there when cells of four channels train; its older kernels do not.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
torch.set_num_threads(1)  # two threads on a busy core wait for each other: ten times the time


@pytest.fixture(autouse=True, scope="session")
def short_measurements() -> Iterator[None]:
    """A measurement ends when it has settled, which on a busy machine it never does: then all of its time is spent."""
    with pytest.MonkeyPatch.context() as patch:
        for timed in (measure, calibrate, gate, layers):
            assert timed.__kwdefaults__ is not None
            patch.setitem(timed.__kwdefaults__, "seconds", 1.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_list_of_operators() -> Iterator[None]:
    """The exporter makes its list of 500 operators anew for each file, a third of the time that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def nested() -> Callable[[], nn.Module]:
    """Three layers, 6 x 2 x 4 = 48 architectures, for images ``(3, 8, 8)``; float64, random batch norms."""

    def build() -> nn.Module:
        first = OneOf(
            {
                "k3": MBConv(8, 8, hidden=Width((4, 8, 16))),
                "k5": MBConv(8, 8, kernel=5, hidden=Width((8, 24)), squeeze=4),
                "skip": nn.Identity(),
            }
        )
        inner = OneOf({"conv": ConvBn(12, 12, 3), "skip": nn.Identity()})
        deep = nn.Sequential(MBConv(12, 12, hidden=24), inner)
        third = OneOf({"fused": FusedMBConv(12, 12, hidden=Width((4, 12))), "deep": deep})
        second = MBConv(8, 12, hidden=Width((8, 16)), stride=2)
        parts = OrderedDict(stem=ConvBn(3, 8, 3), first=first, second=second, third=third, head=Head(12, 16, 5))
        return randomize(nn.Sequential(parts).double())

    return build


@pytest.fixture
def tied() -> Callable[[], nn.Module]:
    return lambda: randomize(Tied().double())


class Tied(nn.Module):
    """Three layers that make the same choice, one of its options with a width of its own in each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, 3)
        self.edges = nn.ModuleDict({"a": self.edge(), "b": self.edge()})
        self.rules = (Rule(("edges.a", "edges.b"), "skip", 1, 2),)

    def edge(self) -> OneOf:
        return OneOf(
            {
                "conv": Places(ConvBn(8, 8, 3) for _ in range(3)),
                "open": Places(MBConv(8, 8, hidden=Width((4, 8))) for _ in range(3)),
                "skip": Places(nn.Identity() for _ in range(3)),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for place in range(3):
            x = self.edges["a"](x, place) + self.edges["b"](x, place)
        return x


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms as after some training, so that no statistic hides a wrong slice."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model
