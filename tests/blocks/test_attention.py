"""Attention over places: PyTorch's own numbers, its MACs by hand, no place preferred, one cheap ONNX file."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from netsmith.blocks.attention import Attention
from netsmith.cost.counts import Macs, Params
from netsmith.cost.device import OrtCpu
from netsmith.cost.onnx_graph import onnx_model
from netsmith.errors import UserError


def settled(block: nn.Module) -> nn.Module:
    for name, tensor in block.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return block.eval()


def test_it_is_multi_head_attention():
    block, x = settled(Attention(12, 12, heads=3, act="relu")), torch.randn(2, 12, 4, 5)
    q, k, v = block.qkv(x).flatten(2).view(2, 3, 3, 4, 20).transpose(3, 4).unbind(1)  # (n, heads, places, 4)
    seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 12, 4, 5)
    assert torch.allclose(block(x), x + block.project(seen.relu()), atol=1e-6)


def test_all_places_are_alike_to_it():
    block, x, order = settled(Attention(8, 8, heads=2, expansion=2)), torch.randn(1, 8, 3, 4), torch.randperm(12)
    moved = x.flatten(2)[..., order].view_as(x)
    assert torch.allclose(block(moved), block(x).flatten(2)[..., order].view_as(x), atol=1e-6)


@pytest.mark.parametrize(("stride", "outputs", "expansion"), [(1, 16, 0), (1, 16, 2), (2, 24, 0), (2, 16, 3)])
def test_its_macs_and_parameters(stride, outputs, expansion):
    block, shape = Attention(16, outputs, heads=4, stride=stride, expansion=expansion), (16, 9, 7)
    places = -(-9 // stride) * -(-7 // stride)
    brings = stride > 1 or outputs != 16
    weights = (4 + 2 * expansion) * outputs**2 + brings * (9 * 16 + 16 * outputs)
    assert Macs()(block, shape) == places * weights + 2 * places**2 * outputs
    norms = 2 * ((4 + expansion + bool(expansion)) * outputs + brings * (16 + outputs))
    assert Params()(block, shape) == weights + norms
    assert block(torch.zeros(2, *shape)).shape == (2, outputs, -(-9 // stride), -(-7 // stride))


def test_the_cheap_file_says_the_same():
    block, x = settled(Attention(8, 16, heads=2, stride=2, expansion=2)), torch.randn(1, 8, 6, 6)
    session = OrtCpu().session(onnx_model(block, (8, 6, 6)))
    assert np.allclose(session.run(None, {"x": x.numpy()})[0], block(x).detach().numpy(), atol=1e-5)


def test_heads_have_to_divide():
    for heads in (0, 5):
        with pytest.raises(UserError, match=f"16 channels do not divide into {heads} heads"):
            Attention(16, 16, heads=heads)
