"""RepVGG's published counts; a supernet step trains; a derived network with branches ships without them."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith import gates
from netsmith.architecture import check, sample
from netsmith.blocks.mobile import ConvBn
from netsmith.blocks.reparam import Branches
from netsmith.cost.counts import BranchCount, FileBytes, Macs, Params
from netsmith.cost.prices import tabulate
from netsmith.decisions import decisions, derive, logits
from netsmith.errors import UserError
from netsmith.ship.export import export, fold
from netsmith.ship.layers import layers
from netsmith.spaces.repvgg import VARIANTS, released, repvgg, repvgg_small

IMAGENET = (3, 224, 224)
COUNTS = {
    "a0": (8_309_384, 1.361e9, 132),
    "a1": (12_789_864, 2.364e9, 132),
    "a2": (25_499_944, 5.117e9, 132),
    "b1": (51_829_480, 11.815e9, 168),
    "b2": (80_315_112, 18.377e9, 168),
    "b2g4": (55_777_512, 11.332e9, 168),
    "b3": (110_960_872, 26.209e9, 168),
}
"""Parameters and MACs of the folded network, branches of the space. A0 and B3 are published with these parameters
(8.3094 M, 110.9609 M), the MACs of all with these first digits (1.4, 2.4, 5.1, 11.8, 18.4, 11.3, 26.2 G)."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_counts(variant):
    with torch.device("meta"):
        space = repvgg(variant=variant)
    parameters, macs, branches = COUNTS[variant]
    assert Params()(space, IMAGENET) == parameters
    assert Macs()(space, IMAGENET) == pytest.approx(macs, rel=4e-4)
    assert BranchCount()(space, IMAGENET) == len(decisions(space)) == branches


def test_the_released_mask():
    with torch.device("meta"):
        space = repvgg()
    architecture = released()
    check(space, architecture)
    network = derive(space, architecture)
    assert BranchCount()(network, IMAGENET) == 44 == int(0.34 * 132)
    assert tabulate(space, BranchCount(), IMAGENET).of(architecture) == 44
    assert Params()(network, IMAGENET) == 8_309_384
    assert FileBytes()(network, IMAGENET) == 4 * 8_309_384
    rows = [[kind for kind in block.kinds if architecture[f"{path}.{kind}"] == "on"] for path, block in blocks(space)]
    assert len(rows) == 22
    assert [i for i, row in enumerate(rows, start=1) if len(row) == 1] == [3, 5, 6, 10, 20]
    assert [len(rows[i - 1]) for i in (12, 22)] == [3, 6]


def blocks(model: nn.Module) -> list[tuple[str, Branches]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Branches)]


def test_b2g4_groups_every_other_layer():
    with torch.device("meta"):
        space = repvgg(variant="b2g4")
    assert [block.options["groups"] for _, block in blocks(space)][:6] == [1, 1, 4, 1, 4, 1]


def test_an_unknown_variant():
    with pytest.raises(UserError, match=r"unknown RepVGG 'a9'.*allowed: a0, a1"):
        repvgg(variant="a9")


@pytest.mark.parametrize("resolution", [8, 28, 32, 64])
def test_the_small_space_fits_small_images(resolution):
    with torch.device("meta"):
        space = repvgg_small(channels=1, resolution=resolution, depth=1)
    assert len(decisions(space)) == 24
    assert space(torch.empty(2, 1, resolution, resolution, device="meta")).shape == (2, 10)
    assert Macs()(space, (1, resolution, resolution)) < 5e6


def masked(seed: int = 0, steps: int = 0) -> nn.Module:
    """A small network with some of its branches, trained for a few steps on two kinds of noise."""
    torch.manual_seed(seed)
    space = repvgg_small(classes=2, resolution=16, depth=1)
    generator = torch.Generator().manual_seed(seed)
    network = derive(space, sample(space, generator)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        images, labels = noise(16, generator)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def noise(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of smooth or of rough noise, and which it is."""
    labels = torch.arange(count) % 2
    rough = torch.randn(count, 3, 16, 16, generator=generator)
    smooth = 3 * F.avg_pool2d(rough, 3, 1, 1)
    return torch.where(labels[:, None, None, None] == 1, rough, smooth), labels


def test_supernet_steps_train():
    torch.manual_seed(0)
    space = repvgg_small(classes=2, resolution=16, depth=1)
    generator = torch.Generator().manual_seed(0)
    parameters = [p for name, p in space.named_parameters() if not name.endswith("logits")]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        gates.fix(space, sample(space, generator))
        images, labels = noise(16, generator)
        optimizer.zero_grad()
        losses.append(F.cross_entropy(space(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    gates.release(space)
    F.cross_entropy(space(images), labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in logits(space))


def test_a_trained_network_ships_as_a_plain_one(tmp_path):
    """Branched in PyTorch, folded, and through the file: the same outputs; the file has one convolution a layer."""
    network = masked(steps=10)
    images, _ = noise(8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fold(network)(images), expected, rtol=1e-4, atol=1e-5)
        exact = fold(network.double())(images.double())
        torch.testing.assert_close(exact, network(images.double()), rtol=1e-10, atol=1e-10)
    file = export(network.float(), (3, 16, 16), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = np.asarray(session.run(None, {"image": images.numpy()})[0])
    np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-4, atol=1e-5)
    plain = nn.Sequential(
        *(ConvBn(i, o, 3, stride=s) for i, o, s in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 64, 2))),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    other = export(plain, (3, 16, 16), tmp_path / "plain.onnx")
    assert abs(file.stat().st_size - other.stat().st_size) < 2000
    assert FileBytes()(network, (3, 16, 16)) == FileBytes()(plain, (3, 16, 16))
    assert sum(p.numel() for p in fold(network).parameters()) == sum(p.numel() for p in fold(plain).parameters())


def test_the_layers_of_a_network_are_those_that_ship():
    found = layers(masked(), (3, 16, 16))
    assert [layer.text for layer in found][:2] == ["ConvBn(3, 16, kernel=3)", "ConvBn(16, 16, kernel=3)"]
    assert [layer.name for layer in found] == ["stem", "stage1.0", "stage2.0", "stage3.0", "head"]
    assert found[0].params == 3 * 16 * 9 + 16
