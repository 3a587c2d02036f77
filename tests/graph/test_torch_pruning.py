"""Our channel groups beside those of Torch-Pruning (VainF/Torch-Pruning 1.6.1), which reads autograd's graph."""

import warnings

import pytest
import timm
import torch
from timm.models.densenet import DenseNet
from torch import nn

from netsmith.graph.channels import channels

tp = pytest.importorskip("torch_pruning")

Places = set[tuple[str, int, int]]
"""(tensor of the state dict, dimension, index)"""

NETWORKS = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035"),
    "squeeze-excite": lambda: timm.create_model("mobilenetv3_small_050"),
    "densenet": lambda: DenseNet(growth_rate=4, block_config=(2, 3, 2)),
    "concatenations and a flatten": lambda: Joined(),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "vgg11_bn": lambda: timm.create_model("vgg11_bn"),
    "dla34": lambda: timm.create_model("dla34"),
    "resnet50": lambda: timm.create_model("resnet50"),
    "repvgg_a0": lambda: timm.create_model("repvgg_a0"),
    "inception_v3": lambda: timm.create_model("inception_v3"),
    "ghostnet_050": lambda: timm.create_model("ghostnet_050"),
}
SLOW = ("efficientnet_b0", "vgg11_bn", "dla34", "resnet50", "repvgg_a0", "inception_v3", "ghostnet_050")


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 5, 3)
        self.norm, self.head, self.out = nn.BatchNorm2d(10), nn.Linear(5 * 4, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = self.c(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.out(self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


def ours(group, channel: int) -> Places:
    return {(use.tensor, use.dim, int(i)) for use in group.uses for i in use.positions[channel]}


def theirs(graph, network: nn.Module, layer: str, channel: int) -> Places:
    """What goes with a channel that ``layer`` makes."""
    part = network.get_submodule(layer)
    prune = tp.prune_conv_out_channels if isinstance(part, nn.Conv2d) else tp.prune_linear_out_channels
    names = {id(module): name for name, module in network.named_modules()}
    found: Places = set()
    for dependency, indices in graph.get_pruning_group(part, prune, [channel]):
        module = dependency.target.module
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
            continue
        reads = dependency.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
        tensors = ["weight"] if reads else ["weight", "bias", "running_mean", "running_var"]
        held = [name for name in tensors if getattr(module, name, None) is not None]
        found |= {(f"{names[id(module)]}.{name}", int(reads), int(i)) for name in held for i in indices}
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETWORKS])
def test_the_same_goes_with_a_channel(name):
    network, side = NETWORKS[name]().eval(), 96 if name == "inception_v3" else 32
    found = channels(network, (3, side, side))
    with warnings.catch_warnings(action="ignore"):  # of parameters that it does not take for layers
        graph = tp.DependencyGraph().build_dependency(network, example_inputs=torch.randn(1, 3, side, side))
    assert found.groups
    for layer, group in found.groups.items():
        for channel in {0, group.size // 2, group.size - 1}:
            assert ours(group, channel) == theirs(graph, network, layer, channel), (layer, channel)
    # And what is left closed here is the output alone.
    assert set(found.closed.values()) <= {"it is the output"}
